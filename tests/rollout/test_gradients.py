"""Which passes of a rollout keep gradients, and that these are the ones of a rollout without a cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import Ledger, Setting, assert_close, make_network, make_rollout, reference, run, text
from torch import Tensor

from unspool.models.wan.network import WanTransformer
from unspool.rollout.prompts import Switch

KEEP = (Switch(frame=3, text=text(1), policy="keep"),)
GRAD = Setting(chunk=2, num_frames=6, window=5, sink=1)


def chosen(pairs: set[tuple[int, int]]) -> Callable[[int, int], bool]:
    return lambda chunk, step: (chunk, step) in pairs


def gradients(net: WanTransformer, chunks: list[Tensor]) -> dict[str, Tensor | None]:
    net.zero_grad(set_to_none=True)
    torch.stack([(c * c).mean() for c in chunks if c.requires_grad]).sum().backward()
    return {name: p.grad for name, p in net.named_parameters()}


def same_gradients(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    for name, expected in want.items():
        assert expected is not None and expected.abs().max() > 0, name
        found = got[name]
        assert found is not None, f"no gradient in {name}"
        assert (found - expected).abs().max() <= 1e-9 * (1e-3 + expected.abs().max()), name


LAST_STEPS = {(0, 1), (1, 1), (2, 1)}


def test_no_gradient_by_default() -> None:
    net = make_network()
    assert all(not c.latents.requires_grad for c in make_rollout(net, GRAD, text(0)))
    with_grad = list(make_rollout(net, GRAD, text(0), grad=chosen({(1, 1)})))
    assert [c.latents.requires_grad for c in with_grad] == [False, True, False]
    with torch.no_grad():
        assert not any(c.latents.requires_grad for c in make_rollout(net, GRAD, text(0), grad=lambda c, s: True))


@pytest.mark.parametrize("commit", ["separate", "fused", "none"])
def test_latents_are_the_same_with_gradients(commit: str) -> None:
    net = make_network()
    for grad in (chosen(LAST_STEPS), lambda c, s: True):
        got = run(net, GRAD, text(0), KEEP, commit=commit, grad=grad)
        assert_close(got.detach(), run(net, GRAD, text(0), KEEP, commit=commit))


def outside_text(gradient: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: g for n, g in gradient.items() if "text_embedding" not in n and "cross_attn.kv" not in n
            and "cross_attn.norm_k" not in n}  # fmt: skip


@pytest.mark.parametrize("passes", [{(1, 1)}, {(2, 0), (2, 1)}, LAST_STEPS])
def test_gradients_equal_those_without_a_cache(passes: set[tuple[int, int]]) -> None:
    """Through the chosen passes alone; what they read from earlier chunks is a constant. Text aside, see below."""
    net = make_network()
    got = gradients(net, [c.latents for c in make_rollout(net, GRAD, text(0), grad=chosen(passes))])
    want = gradients(net, reference(net, GRAD, text(0), grad=chosen(passes)))
    same_gradients(outside_text(got), outside_text(want))


def test_gradients_reach_the_text_weights() -> None:
    """Keys and values of the text are made in the first pass, without a graph, and serve the pass that has one."""
    net = make_network()
    got = gradients(net, [c.latents for c in make_rollout(net, GRAD, text(0), grad=chosen(LAST_STEPS))])
    same_gradients(got, gradients(net, reference(net, GRAD, text(0), grad=chosen(LAST_STEPS))))


def test_backward_chunk_by_chunk() -> None:
    """Memory of training is bounded only where each chunk can be differentiated before the next one is made."""
    net = make_network()
    for chunk in make_rollout(net, GRAD, text(0), grad=lambda c, s: s < 2):
        (chunk.latents * chunk.latents).mean().backward()


def test_gradients_through_the_commit_pass() -> None:
    """step = number of steps chooses the commit pass: a loss on the last chunk then reaches the chunk before it."""
    net, passes = make_network(), {(c, s) for c in range(3) for s in range(3)}
    stream = make_rollout(net, GRAD, text(0), grad=chosen(passes))
    got = gradients(net, [list(stream)[-1].latents])
    with torch.enable_grad():
        ledger = Ledger(net, GRAD, cut=False)
        want = gradients(net, reference(net, GRAD, text(0), ledger=ledger, grad=lambda c, s: True)[-1:])
    same_gradients(outside_text(got), outside_text(want))


def test_gradients_agree_under_checkpointing() -> None:
    """Recomputation in the backward, when the stream has long moved on, reads what the forward read."""
    results = []
    for checkpointing in (False, True):
        net = make_network()
        net.gradient_checkpointing = checkpointing
        results.append(gradients(net, [c.latents for c in make_rollout(net, GRAD, text(0), grad=chosen(LAST_STEPS))]))
    same_gradients(outside_text(results[1]), outside_text(results[0]))
