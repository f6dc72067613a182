"""The cached rollout, the library's masks and an oracle of plain loops give one and the same result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, FUZZ, network_of, rules, settings_of_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    Inputs,
    RawStore,
    Rule,
    assert_equal_outputs,
    chunk_bounds,
    commit,
    denoise,
    make_cache,
    make_inputs,
    make_network,
    oracle_forcing,
    oracle_plain,
    rollout,
)
from torch import Tensor

from unspool.causal.chunks import FrameSet
from unspool.causal.position import Absolute
from unspool.causal.visibility import Kind, Segment
from unspool.models.wan.network import WanTransformer


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def compare(network: WanTransformer, rule: Rule, inputs: Inputs, **options: Any) -> None:
    """Cached rollout against the oracle's one teacher-forcing forward, denoising and committing passes alike."""
    want = torch.cat(oracle_forcing(network, rule, inputs), 1)
    got = torch.cat(rollout(network, make_cache(network, rule, inputs, **options), rule, inputs), 1)
    assert_equal_outputs(got, want)


# ---- the claim ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(rule=rules(), how=settings_of_inputs())
@FUZZ
def test_cached_equals_one_teacher_forcing_forward(rule: Rule, how: dict[str, Any], dtype: torch.dtype) -> None:
    network = network_of(dtype)
    compare(network, rule, make_inputs(network, rule, **how))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rule=rules(), how=settings_of_inputs())
@settings(FUZZ, max_examples=25)
def test_grad_mode_view_equals_the_same_forward(rule: Rule, how: dict[str, Any], dtype: torch.dtype) -> None:
    network = network_of(dtype)
    with torch.enable_grad():
        compare(network, rule, make_inputs(network, rule, **how))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rule=rules(), how=settings_of_inputs())
@settings(FUZZ, max_examples=25)
def test_cached_equals_plain_forward_when_what_is_committed_is_what_was_denoised(
    rule: Rule, how: dict[str, Any], dtype: torch.dtype
) -> None:
    """Committing the noisy chunk at its own sigma is a plain causal forward: the DENOISE pass itself is promoted."""
    rule = replace(rule, commit_window=None, commit_reads_sink=True)
    network = network_of(dtype)
    inputs = make_inputs(network, rule, **how)
    cache, outputs = make_cache(network, rule, inputs), []
    for start, end in chunk_bounds(rule):
        outputs.append(denoise(network, cache, inputs, range(start, end)))
        cache.promote()
    assert_equal_outputs(torch.cat(outputs, 1), oracle_plain(network, rule, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", ["absolute", "relative", "reanchored"])
@pytest.mark.parametrize("grid", [(8, 16), (4, 8), (3, 5)])
def test_token_counts_that_are_and_are_not_multiples_of_128(
    grid: tuple[int, int], policy: str, dtype: torch.dtype
) -> None:
    rule = Rule(chunk=2, num_frames=7, window=5, sink=1, policy=policy)
    network = network_of(dtype)
    compare(network, rule, make_inputs(network, rule, batch=1, grid=grid))


@pytest.mark.parametrize("policy", ["absolute", "relative", "reanchored"])
@pytest.mark.parametrize("num_frames", [5, 6, 7, 8, 9, 30])
def test_before_at_and_long_after_eviction(num_frames: int, policy: str) -> None:
    rule = Rule(chunk=2, num_frames=num_frames, window=7, sink=2, policy=policy)
    network = network_of(torch.float32)
    compare(network, rule, make_inputs(network, rule))


def test_commit_that_reaches_further_than_the_denoise_moves_the_sink_back_and_forth() -> None:
    rule = Rule(chunk=1, num_frames=20, window=4, sink=2, commit_window=7, policy="relative")
    network = network_of(torch.float64)
    compare(network, rule, make_inputs(network, rule))


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_position_above_a_million(dtype: torch.dtype) -> None:
    far = Rule(chunk=3, num_frames=12, window=8, sink=2, offset=10**6 + 7)
    network = network_of(dtype)
    inputs = make_inputs(network, far)
    compare(network, far, inputs)
    near = replace(far, offset=0)
    got = torch.cat(rollout(network, make_cache(network, far, inputs), far, inputs), 1)
    want = torch.cat(rollout(network, make_cache(network, near, inputs), near, inputs), 1)
    # fp64 angles of 10^6 carry an absolute error of 10^6 x 1.1e-16; the tolerance of fp64 still holds
    assert_equal_outputs(got, want)


@pytest.mark.parametrize("offset", [1, 977, 10**6 + 7])
def test_relative_policy_is_unchanged_by_a_constant_shift(offset: int) -> None:
    rule = Rule(chunk=2, num_frames=11, window=6, sink=1, policy="relative")
    network = network_of(torch.float64)
    inputs = make_inputs(network, rule)
    want = torch.cat(rollout(network, make_cache(network, rule, inputs), rule, inputs), 1)
    moved = replace(rule, offset=offset)
    assert_equal_outputs(torch.cat(rollout(network, make_cache(network, moved, inputs), moved, inputs), 1), want)


def test_a_long_relative_stream_does_not_drift() -> None:
    """120 chunks: the re-anchored sink is rotated from what was first written, so rounding does not add up."""
    rule = Rule(chunk=1, num_frames=120, window=4, sink=2, policy="relative")
    network = network_of(torch.float32)
    compare(network, rule, make_inputs(network, rule, batch=1, grid=(1, 2)))


# ---- a random program of passes -----------------------------------------------------------------------------------


def run_program(network: WanTransformer, rule: Rule, inputs: Inputs, draw: Any) -> tuple[Tensor, Tensor]:
    """Chunk after chunk, each by a way drawn at random: extra, discarded, fused and grad-mode passes, recommits."""
    cache = make_cache(network, rule, inputs)
    bounds = chunk_bounds(rule)
    clean: list[Tensor] = []
    noisy: list[Tensor] = []
    while len(clean) < len(bounds):
        number = len(clean)
        own = range(*bounds[number])
        with torch.set_grad_enabled(draw(st.booleans())):
            way = draw(st.sampled_from(["plain", "twice", "discard", "fused", "prefill", "recommit"]))
            if way == "twice":
                denoise(network, cache, inputs, own, torch.randn_like(inputs.noisy[:, own.start : own.stop]))
            if way == "discard":
                denoise(network, cache, inputs, own, torch.randn_like(inputs.noisy[:, own.start : own.stop]))
                cache.discard()
            if len(noisy) == number:
                noisy.append(denoise(network, cache, inputs, own))
        with torch.set_grad_enabled(draw(st.booleans())):
            if way == "fused" and number + 1 < len(bounds):
                following = range(*bounds[number + 1])
                out = fused(network, cache, inputs, [(Kind.COMMIT, own), (Kind.DENOISE, following)])
                clean.append(out[:, : len(own)])
                noisy.append(out[:, len(own) :])
            elif way == "prefill" and number + 1 < len(bounds):
                following = range(*bounds[number + 1])
                noisy += [lone_denoise(network, rule, inputs, number + 1)] if len(noisy) == number + 1 else []
                out = fused(network, cache, inputs, [(Kind.PREFILL, own), (Kind.PREFILL, following)])
                clean += [out[:, : len(own)], out[:, len(own) :]]
            else:
                clean.append(commit(network, cache, inputs, own))
            if way == "recommit" and rule.commit_window is None and torch.is_grad_enabled() is False:
                held = cache.frames
                redo = Segment(kind=Kind.RECACHE, frames=own, limit=held)
                if cache.visibility.visible(redo) <= held:
                    zero = torch.zeros(1, 1, dtype=inputs.sigma.dtype)
                    x = inputs.clean[:, own.start : own.stop]
                    assert_equal_outputs(network(x, zero, inputs.cond(own), cache.begin((redo,))), clean[-1])
                    cache.promote()
    return torch.cat(clean, 1), torch.cat(noisy, 1)


def lone_denoise(network: WanTransformer, rule: Rule, inputs: Inputs, number: int) -> Tensor:
    """The denoising prediction of one chunk, from the oracle (its cached form is not taken on this path)."""
    start, end = chunk_bounds(rule)[number]
    return oracle_forcing(network, rule, inputs)[1][:, start:end]


def fused(network: WanTransformer, cache: Any, inputs: Inputs, parts: list[tuple[Kind, range]]) -> Tensor:
    """Several segments in one forward, then promotion."""
    b = inputs.clean.shape[0]
    context = cache.begin(tuple(Segment(kind=kind, frames=frames) for kind, frames in parts))
    x, sigma = [], []
    for kind, frames in parts:
        source = inputs.noisy if kind is Kind.DENOISE else inputs.clean
        x.append(source[:, frames.start : frames.stop])
        level = inputs.part(frames).expand(b, len(frames))
        sigma.append(level if kind is Kind.DENOISE else torch.zeros_like(level))
    whole = range(parts[0][1].start, parts[-1][1].stop)
    out = network(torch.cat(x, 1), torch.cat(sigma, 1), inputs.cond(whole), context)
    cache.promote()
    cache.slots.check()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), rule=rules(), how=settings_of_inputs())
@settings(FUZZ, max_examples=60)
def test_any_program_of_passes_equals_the_oracle(
    data: st.DataObject, rule: Rule, how: dict[str, Any], dtype: torch.dtype
) -> None:
    network = network_of(dtype)
    inputs = make_inputs(network, rule, **how)
    want = torch.cat(oracle_forcing(network, rule, inputs), 1)
    assert_equal_outputs(torch.cat(run_program(network, rule, inputs, data.draw), 1), want)


# ---- each side broken alone must be noticed -----------------------------------------------------------------------


CONTROL = Rule(chunk=2, num_frames=10, window=6, sink=1)


def test_control_a_corrupted_cache_slot_is_noticed() -> None:
    network = network_of(torch.float32)
    inputs = make_inputs(network, CONTROL)
    want = torch.cat(oracle_forcing(network, CONTROL, inputs), 1)
    cache, clean, noisy = make_cache(network, CONTROL, inputs), [], []
    for number, (start, end) in enumerate(chunk_bounds(CONTROL)):
        noisy.append(denoise(network, cache, inputs, range(start, end)))
        clean.append(commit(network, cache, inputs, range(start, end)))
        if number == 3:
            slot = cache.slots.promoted[end - 1]
            one = cache.entries[1].values[:, slot * inputs.tokens : (slot + 1) * inputs.tokens]
            one += 0.01 * torch.randn_like(one)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_equal_outputs(torch.cat(clean + noisy, 1), want)


class OffByOne:
    """Absolute positions, one kept frame excepted."""

    moves_keys = True

    def __init__(self, frame: int) -> None:
        self.frame = frame

    def assign(self, segment: Segment, kept: FrameSet) -> tuple[list[int], list[int]]:
        keys, own = Absolute().assign(segment, kept)
        return [p + (f == self.frame) for f, p in zip(kept, keys, strict=True)], own


@pytest.mark.parametrize("frame", [0, 5])
def test_control_one_position_off_by_one_is_noticed(frame: int) -> None:
    network = network_of(torch.float32)
    inputs = make_inputs(network, CONTROL)
    with pytest.raises(AssertionError, match="relative difference"):
        compare(network, CONTROL, inputs, positions=OffByOne(frame))


@pytest.mark.parametrize(
    "change", [{"window": 7}, {"window": 5}, {"sink": 0}, {"sink": 2}, {"causal_inside": True}, {"commit_window": 5}]
)
def test_control_one_frame_too_many_or_too_few_is_noticed(change: dict[str, Any]) -> None:
    network = network_of(torch.float32)
    inputs = make_inputs(network, CONTROL)
    wrong = torch.cat(oracle_forcing(network, replace(CONTROL, **change), inputs), 1)
    got = torch.cat(rollout(network, make_cache(network, CONTROL, inputs), CONTROL, inputs), 1)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_equal_outputs(got, wrong)


def test_control_another_prompt_and_another_sigma_are_noticed() -> None:
    network = network_of(torch.float32)
    inputs = make_inputs(network, CONTROL, num_prompts=2)
    want = torch.cat(oracle_forcing(network, CONTROL, inputs), 1)
    assert inputs.index is not None
    index, sigma = inputs.index.clone(), inputs.sigma.clone()
    index[1, 9] = 1 - index[1, 9]
    sigma[0, 3] += 0.01
    for wrong in (replace(inputs, index=index), replace(inputs, sigma=sigma)):
        got = torch.cat(rollout(network, make_cache(network, CONTROL, wrong), CONTROL, wrong), 1)
        with pytest.raises(AssertionError, match="relative difference"):
            assert_equal_outputs(got, want)


# ---- other ways to the same numbers -------------------------------------------------------------------------------


@given(rule=rules(), how=settings_of_inputs())
@settings(FUZZ, max_examples=25)
def test_rotated_at_write_equals_rotated_at_read(rule: Rule, how: dict[str, Any]) -> None:
    network = network_of(torch.float64)
    inputs = make_inputs(network, rule, **how)
    store, clean, noisy = RawStore(rule, inputs.grid), [], []
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for start, end in chunk_bounds(rule):
        own, cond = range(start, end), inputs.cond(range(start, end))
        view: Any = store.view(start, end, False)
        noisy.append(network(inputs.noisy[:, start:end], inputs.part(own), cond, view))
        view = store.view(start, end, True)
        clean.append(network(inputs.clean[:, start:end], zero, cond, view))
        store.promote()
    got = rollout(network, make_cache(network, rule, inputs), rule, inputs)
    assert_equal_outputs(torch.cat(got, 1), torch.cat(clean + noisy, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", ["absolute", "relative"])
def test_ring_view_equals_grad_mode_view(policy: str, dtype: torch.dtype) -> None:
    rule = Rule(chunk=2, num_frames=13, window=7, sink=2, policy=policy, causal_inside=True)
    network = network_of(dtype)
    inputs = make_inputs(network, rule, num_prompts=2)
    ring = torch.cat(rollout(network, make_cache(network, rule, inputs), rule, inputs), 1)
    with torch.enable_grad():
        functional = torch.cat(rollout(network, make_cache(network, rule, inputs), rule, inputs), 1)
    assert_equal_outputs(functional, ring)


# ---- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """The compiled network over a compiled cache, windowed and relative, against eager ones."""
    from unspool.ops.compile import compile_backbone, compiler_works

    if not compiler_works():
        pytest.skip("torch.compile cannot build a kernel here (no C++ compiler)")
    eager, quick = make_network(), compile_backbone(make_network())
    assert isinstance(quick, WanTransformer)
    for rule in (CONTROL, replace(CONTROL, policy="relative")):
        inputs = make_inputs(eager, rule, num_prompts=2)
        want = torch.cat(rollout(eager, make_cache(eager, rule, inputs), rule, inputs), 1)
        got = torch.cat(rollout(quick, make_cache(quick, rule, inputs, compiled=True), rule, inputs), 1)
        assert_equal_outputs(got, want)


# ---- one cache, used again, and grad modes in turn ----------------------------------------------------------------


@pytest.mark.parametrize("policy", ["absolute", "relative"])
def test_a_cache_that_dropped_everything_is_as_new(policy: str) -> None:
    """Nothing of the first clip may come back, its sink as first written least of all."""
    rule = replace(CONTROL, policy=policy)
    network = network_of(torch.float64)
    cache = make_cache(network, rule, make_inputs(network, rule))
    rollout(network, cache, rule, make_inputs(network, rule))
    cache.drop(cache.frames)
    second = make_inputs(network, rule, seed=77)
    want = torch.cat(oracle_forcing(network, rule, second), 1)
    assert_equal_outputs(torch.cat(rollout(network, cache, rule, second), 1), want)


@pytest.mark.parametrize("rule", [Rule(chunk=2, num_frames=12), replace(CONTROL, policy="relative")], ids=str)
def test_inference_mode_and_others_in_turn(rule: Rule) -> None:
    """A cache may be made, grown and filled in any grad mode and go on in another."""
    network = network_of(torch.float64)
    inputs = make_inputs(network, rule)
    with torch.inference_mode():
        cache = make_cache(network, rule, inputs)
    clean, noisy = [], []
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    for number, (start, end) in enumerate(chunk_bounds(rule)):
        with modes[number % 3]():
            noisy.append(denoise(network, cache, inputs, range(start, end)).clone())
            clean.append(commit(network, cache, inputs, range(start, end)).clone())
    want = torch.cat(oracle_forcing(network, rule, inputs), 1)
    assert_equal_outputs(torch.cat(clean + noisy, 1).detach(), want)
