"""Gradients through a cached rollout: cut by default, whole when asked for, the same under checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import FULL, RELATIVE, RULE, network_of
from oracle import (
    Rule,
    chunk_bounds,
    commit,
    denoise,
    make_cache,
    make_inputs,
    make_network,
    oracle_forcing,
)
from torch import Tensor


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- gradients ----------------------------------------------------------------------------------------------------


def gradients(
    rule: Rule, *, cached: bool, keep_graph: bool = False, checkpointing: bool = False, free_steps: int = 0
) -> dict[str, Tensor]:
    """Gradients of a random linear loss on all predictions, for parameters and both clips."""
    network = make_network(seed=3, dtype=torch.float64).requires_grad_(True)
    network.gradient_checkpointing = checkpointing
    with torch.enable_grad():
        inputs = make_inputs(network, rule)
        inputs.clean.requires_grad_(True)
        inputs.noisy.requires_grad_(True)
        if not cached:
            clean, noisy = oracle_forcing(network, rule, inputs)
        else:
            cache, parts, finals = make_cache(network, rule, inputs), [], []
            for start, end in chunk_bounds(rule):
                with torch.no_grad():
                    for _ in range(free_steps):
                        denoise(network, cache, inputs, range(start, end), torch.ones_like(inputs.noisy[:, start:end]))
                finals.append(denoise(network, cache, inputs, range(start, end)))
                parts.append(commit(network, cache, inputs, range(start, end), keep_graph=keep_graph))
            clean, noisy = torch.cat(parts, 1), torch.cat(finals, 1)
        out = torch.cat([clean, noisy], 1)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (out * weight).sum().backward()
    found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert len(found) == len(list(network.parameters()))
    assert inputs.clean.grad is not None and inputs.noisy.grad is not None
    return {"output": out.detach(), **found, "clean": inputs.clean.grad, "noisy": inputs.noisy.grad}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, grad in want.items():
        worst = (got[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-3)
        assert worst <= tolerance, f"{name} or its gradient: relative difference {worst}"


@pytest.mark.parametrize("free_steps", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "rule",
    [replace(RULE, num_frames=10), replace(RELATIVE, num_frames=10), replace(FULL, causal_inside=True)],
    ids=["absolute", "relative", "full"],
)
def test_kept_graph_has_the_gradient_of_one_masked_forward(rule: Rule, checkpointing: bool, free_steps: int) -> None:
    """Also with denoising steps outside of autograd in between, as a rollout in training has them."""
    got = gradients(rule, cached=True, keep_graph=True, checkpointing=checkpointing, free_steps=free_steps)
    assert_same_gradients(got, gradients(rule, cached=False))


@pytest.mark.parametrize("free_steps", [0, 1])
@pytest.mark.parametrize("rule", [replace(RULE, num_frames=10), replace(RELATIVE, num_frames=10)])
def test_gradients_with_and_without_checkpointing_agree(rule: Rule, free_steps: int) -> None:
    plain = gradients(rule, cached=True, free_steps=free_steps)
    assert_same_gradients(gradients(rule, cached=True, checkpointing=True, free_steps=free_steps), plain)
    uncut = gradients(rule, cached=False)
    assert (uncut["clean"] - plain["clean"]).abs().max() > 1e-3, "the default must cut what the full forward has"


@pytest.mark.parametrize("keep_graph", [False, True])
def test_gradient_reaches_the_previous_chunk_only_when_asked(keep_graph: bool) -> None:
    network = network_of()
    inputs = make_inputs(network, RULE)
    cache = make_cache(network, RULE, inputs)
    inputs.clean.requires_grad_(True)
    inputs.noisy.requires_grad_(True)
    with torch.enable_grad():
        commit(network, cache, inputs, range(0, 2), keep_graph=keep_graph)
        denoise(network, cache, inputs, range(2, 4)).sum().backward()
    assert inputs.noisy.grad is not None and inputs.noisy.grad[:, 2:4].abs().max() > 0
    reached = inputs.clean.grad is not None and bool(inputs.clean.grad[:, 0:2].abs().max() > 0)
    assert reached == keep_graph


def test_kept_graphs_are_counted_and_dropped_with_their_frames() -> None:
    network = make_network(dtype=torch.float64).requires_grad_(True)
    inputs = make_inputs(network, RULE)
    cache = make_cache(network, RULE, inputs)
    bare = cache.num_bytes
    with torch.enable_grad():
        for start, end in chunk_bounds(RULE):
            commit(network, cache, inputs, range(start, end), keep_graph=True)
            assert set(cache.graph) <= set(cache.frames)
            per_frame = 3 * 2 * inputs.clean.shape[0] * inputs.tokens * 24 * 8
            assert cache.num_bytes == bare + len(cache.graph) * per_frame
