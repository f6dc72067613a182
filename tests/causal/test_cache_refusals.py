"""Bad input to a cache or a network: a ValueError that says got, expected and fix, and nothing is changed by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from oracle import Inputs, Rule, assert_equal_outputs, make_cache, make_inputs, make_network, only, started, step
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import FrameSet
from unspool.causal.context import FullSequence, Site
from unspool.causal.mask import causal_mask
from unspool.causal.position import WindowRelative
from unspool.causal.visibility import Full, Kind, Segment, Window, check_window
from unspool.models.base import Conditioning, Text
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer

RULE = Rule(chunk=2, num_frames=14, window=6, sink=1)


@lru_cache(maxsize=1)
def network_of() -> WanTransformer:
    return make_network(dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("start", [0, 6])
def test_a_chunk_longer_than_the_window(start: int, grad: bool) -> None:
    cache, _ = started(network_of(), RULE, start // 2)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="window"):
        cache.begin(only(Kind.DENOISE, start, start + 7))


@pytest.mark.parametrize("grad", [False, True])
def test_a_skipped_chunk(grad: bool) -> None:
    cache, _ = started(network_of(), RULE, 3)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"\[6, 8\).*holds.*order"):
        cache.begin(only(Kind.COMMIT, 8, 10))


BROKEN: dict[str, tuple[Segment, ...]] = {
    "skipped": only(Kind.DENOISE, 10, 12),
    "too long": only(Kind.DENOISE, 6, 13),
    "overlap": (*only(Kind.COMMIT, 6, 8), *only(Kind.DENOISE, 7, 9)),
    "fused and skipped": (*only(Kind.COMMIT, 6, 8), *only(Kind.DENOISE, 10, 12)),
    "nothing": (),
    "other bank": (Segment(kind=Kind.DENOISE, frames=range(6, 8), read_bank="noisy"),),
}


@pytest.mark.parametrize("policy", ["absolute", "relative"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("segments", BROKEN.values(), ids=BROKEN)
def test_a_refused_pass_changes_nothing(segments: tuple[Segment, ...], grad: bool, policy: str) -> None:
    """A stream must survive a bad request: the next good chunk gives what it would have given."""
    rule, network = replace(RULE, policy=policy), network_of()
    cache, inputs = started(network, rule, 3)
    frames, slots = cache.frames, dict(cache.slots.promoted)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError):
        cache.begin(segments)
    assert cache.frames == frames and cache.slots.promoted == slots
    plain, _ = started(network, rule, 3)
    assert_equal_outputs(step(network, cache, rule, inputs, 3, 6), step(network, plain, rule, inputs, 3, 6))


def test_a_refused_pass_is_not_promoted_in_place_of_the_last_good_one() -> None:
    """promote() after a refused begin(): a ValueError, or the last good pass, but never frames that nobody computed."""
    network = network_of()
    cache, inputs = started(network, RULE, 3)
    cond, x = inputs.cond(range(6, 8)), inputs.clean[:, 6:8]
    network(x, torch.zeros(1, 1), cond, cache.begin(only(Kind.COMMIT, 6, 8)))
    with pytest.raises(ValueError):
        cache.begin(only(Kind.DENOISE, 10, 12))
    with contextlib.suppress(ValueError):
        cache.promote()
    assert cache.frames <= FrameSet.of((0, 8))


def test_later_segments_of_a_pass_cannot_be_read_by_earlier_ones() -> None:
    """DENOISE of chunk 3 before a RECACHE of chunk 2 reads the old chunk 2, or is refused in words."""
    network = network_of()
    cache, inputs = started(network, RULE, 3)
    try:
        view = cache.begin((*only(Kind.DENOISE, 6, 8), *only(Kind.RECACHE, 4, 6)))
        x = torch.cat([inputs.noisy[:, 6:8], inputs.clean[:, 4:6]], 1)
        sigma = torch.cat([inputs.sigma[:, 6:8], torch.zeros_like(inputs.sigma[:, 4:6])], 1)
        got = network(x, sigma, Conditioning(prompts=inputs.prompts), view)[:, :2]
    except ValueError as error:
        assert "order" in str(error) or "segment" in str(error)
    else:
        plain, _ = started(network, RULE, 3)
        own = inputs.noisy[:, 6:8]
        want = network(own, inputs.sigma[:, 6:8], inputs.cond(range(6, 8)), plain.begin(only(Kind.DENOISE, 6, 8)))
        assert_equal_outputs(got, want)


def test_promote_with_nothing_staged_and_promote_of_a_pass_that_never_ran() -> None:
    cache, _ = started(network_of(), RULE, 3)
    with pytest.raises(ValueError, match="promote"):
        cache.promote()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            cache.begin(only(Kind.DENOISE, 6, 8))
            with pytest.raises(ValueError, match="sites"):
                cache.promote()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 4, 8, 6), (2, 3, 4, 4, 6), (1, 2, 4, 4, 6)], ids=str)
def test_latents_of_another_size_than_the_cache(shape: tuple[int, ...], grad: bool) -> None:
    network = network_of()
    cache, _ = started(network, RULE, 3)
    prompts = make_inputs(network, RULE, batch=shape[0]).prompts
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"got .*expected .*cache was built for"):
        view = cache.begin(only(Kind.DENOISE, 6, 8))
        network(torch.zeros(shape, dtype=torch.float64), torch.ones(1, 1), Conditioning(prompts=prompts), view)


@pytest.mark.parametrize("change", [{"batch": 0}, {"tokens_per_frame": 0}, {"block_frames": 0}])
def test_impossible_sizes(change: dict[str, Any]) -> None:
    network = network_of()
    with pytest.raises(ValueError, match="expected at least 1"):
        make_cache(network, RULE, make_inputs(network, RULE), **change)
    with pytest.raises(ValueError, match="0 sites"):
        KVCache([], batch=1, tokens_per_frame=1, visibility=Full(), positions=RULE.positions)


def test_windows_without_room() -> None:
    with pytest.raises(ValueError, match=r"window=3 .*sink=3.*at least 4"):
        Window(window=3, sink=3)
    with pytest.raises(ValueError, match="commit_window=2"):
        Window(window=6, sink=2, commit_window=2)
    with pytest.raises(ValueError, match="expected window"):
        Window(window=0)
    with pytest.raises(ValueError, match=r"chunk of 4 .*>= 7"):
        check_window(Window(window=6, sink=3), 4)
    check_window(Window(window=7, sink=3), 4)
    check_window(Full(), 1000)


@pytest.mark.parametrize("frames", [range(3, 3), range(4, 2), range(0, 6, 2), range(-2, 1)], ids=str)
def test_segments_of_no_frames(frames: range) -> None:
    with pytest.raises(ValueError, match="non-empty range"):
        Segment(kind=Kind.DENOISE, frames=frames)


# ---- networks -----------------------------------------------------------------------------------------------------


def call(**changes: Any) -> Tensor:
    """A bidirectional forward of 4 latent frames, 2 samples and 2 prompts, with something changed."""
    network = changes.pop("network", network_of())
    inputs: Inputs = make_inputs(network, replace(RULE, num_frames=4), num_prompts=2)
    cond: dict[str, Any] = {"prompts": inputs.prompts, "prompt_index": inputs.index, **changes.pop("cond", {})}
    options: dict[str, Any] = {"x": inputs.noisy, "sigma": inputs.sigma, "context": FullSequence(4), **changes}
    return network(options["x"], options["sigma"], Conditioning(**cond), options["context"])


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


BAD_CALLS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "x without time": (lambda: {"x": zeros(2, 4, 4, 6)}, "latents of shape"),
    "x with channels first": (lambda: {"x": zeros(2, 5, 3, 4, 6)}, "time before channels"),
    "x off the patch grid": (lambda: {"x": zeros(2, 4, 4, 5, 6)}, "6x6"),
    "sigma of one dimension": (lambda: {"sigma": zeros(2)}, "sigma"),
    "sigma of other frames": (lambda: {"sigma": zeros(2, 3)}, "sigma"),
    "sigma of other samples": (lambda: {"sigma": zeros(3, 4)}, "sigma"),
    "prompts of another batch": (lambda: {"x": zeros(3, 4, 4, 4, 6), "sigma": zeros(1, 1)}, "prompts"),
    "prompt above the last": (lambda: {"cond": {"prompt_index": torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]])}}, "prompt"),
    "prompt below zero": (lambda: {"cond": {"prompt_index": torch.tensor([[0, 0, 0, 0], [0, -1, 0, 0]])}}, "prompt"),
    "prompts of other frames": (lambda: {"cond": {"prompt_index": torch.zeros(2, 3, dtype=torch.int64)}}, "prompt"),
    "channels nobody asked for": (lambda: {"cond": {"channels": zeros(2, 4, 1, 4, 6)}}, "extra_channels"),
    "vectors nobody asked for": (lambda: {"cond": {"vectors": zeros(2, 4, 3)}}, "frame_vector_dim"),
    "context of a shorter clip": (lambda: {"context": FullSequence(2)}, "clip length|sequence of 2"),
    "context of a longer clip": (lambda: {"context": FullSequence(8)}, "clip length|sequence of 8"),
    "context of three frames": (lambda: {"context": FullSequence(3)}, "clip length|sequence of 3"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_of_the_network(name: str) -> None:
    change, words = BAD_CALLS[name]
    call()
    with pytest.raises(ValueError, match=words):
        call(**change())


def test_vectors_of_other_frames() -> None:
    """Two vectors for four latent frames must not be spread over them in silence."""
    config = WanConfig(
        dim=24,
        ffn_dim=32,
        num_layers=1,
        num_heads=2,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        text_len=5,
        freq_dim=16,
        frame_vector_dim=3,
    )
    network = WanTransformer(config).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    call(network=network, sigma=one, cond={"vectors": zeros(2, 4, 3)})
    with pytest.raises(ValueError, match="vectors"):
        call(network=network, sigma=one, cond={"vectors": zeros(2, 2, 3)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_text_states_that_are_not_finite(value: float) -> None:
    states = torch.zeros(1, 5, 8)
    states[0, 3, 2] = value
    with pytest.raises(ValueError, match=r"NaN or infinity.*expected finite"):
        network_of().prepare(states)


@pytest.mark.parametrize("shape", [(5, 8), (1, 6, 8), (1, 5, 9), (1, 0, 8), (1, 1, 1, 5, 8)], ids=str)
def test_text_states_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="text states"):
        network_of().prepare(torch.zeros(shape))


def test_text_states_are_padded_with_zeros() -> None:
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    short = network_of().prepare(Text.of(states))
    full = network_of().prepare(torch.cat([states, torch.zeros(2, 2, 8)], 1))
    assert all(torch.equal(a, b) for a, b in zip(short.keys + short.values, full.keys + full.values, strict=True))


def test_contexts_of_another_length_or_backend() -> None:
    mask = causal_mask(RULE.plan, 6, RULE.visibility, RULE.positions)
    with pytest.raises(ValueError, match="6 sequence frames for a sequence of 4"):
        FullSequence(4, mask)
    wrong: Any = "sparse"
    with pytest.raises(ValueError, match="slices"):
        FullSequence(6, mask, backend=wrong)


def test_a_mask_for_what_depends_on_content_is_refused_by_name() -> None:
    class ByContent(Full):
        maskable = False

    with pytest.raises(ValueError, match="ByContent"):
        causal_mask(RULE.plan, 6, ByContent(), RULE.positions)


@pytest.mark.parametrize("grad", [False, True])
def test_keys_that_were_not_rotated_cannot_be_moved(grad: bool) -> None:
    """A network that adds positions to its hidden state has them baked in; moving its sink must not pass in silence."""
    site = Site(index=0, heads=2, head_dim=4)
    cache = KVCache(
        [site], batch=1, tokens_per_frame=1, visibility=Window(window=3, sink=1), positions=WindowRelative()
    )
    x = torch.randn(1, 1, 2, 4)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="Absolute or Cyclic"):
        for frame in range(6):
            cache.begin(only(Kind.COMMIT, frame, frame + 1)).attend(site, x, x, x, None)
            cache.promote()
