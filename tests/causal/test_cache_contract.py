"""What a cache promises beside its numbers: staging, several segments, isolation, bytes, and what a chunk costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import FULL, RELATIVE, RULE, network_of, setup
from oracle import (
    Rule,
    assert_equal_outputs,
    chunk_bounds,
    commit,
    denoise,
    make_cache,
    make_inputs,
    make_network,
    only,
    rollout,
    step,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Site
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Kind, Segment


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- stage, promote, discard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [RULE, RELATIVE], ids=["absolute", "relative"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_denoising_pass_does_not_see_the_one_before(rule: Rule, grad: bool) -> None:
    network, cache, inputs = setup(rule, 4)
    own = range(8, 10)
    with torch.set_grad_enabled(grad):
        want = denoise(network, cache, inputs, own)
        other = denoise(network, cache, inputs, own, 3 * inputs.clean[:, 8:10])
        again = denoise(network, cache, inputs, own)
    assert not torch.equal(want, other)
    assert torch.equal(want, again)


@pytest.mark.parametrize("rule", [RULE, RELATIVE], ids=["absolute", "relative"])
@pytest.mark.parametrize("grad", [False, True])
def test_discard_leaves_what_was_promoted(rule: Rule, grad: bool) -> None:
    network, cache, inputs = setup(rule, 4)
    with torch.set_grad_enabled(grad):
        denoise(network, cache, inputs, range(8, 10))
        frames = cache.frames
        cache.discard()
        assert cache.frames == frames and not cache.slots.staged
        with pytest.raises(ValueError, match="promote"):
            cache.promote()
        got = step(network, cache, rule, inputs, 4, 7)
    network, plain, inputs = setup(rule, 4)
    with torch.set_grad_enabled(grad):
        assert torch.equal(got, step(network, plain, rule, inputs, 4, 7))


def test_a_discarded_pass_that_never_ran_leaves_moved_keys_right() -> None:
    """A begun pass plans the move of the sink; dropping it before any site ran must not lose or double the move."""
    network, cache, inputs = setup(RELATIVE, 4)
    for _ in range(3):
        cache.begin(only(Kind.DENOISE, 8, 10))
        cache.discard()
    got = step(network, cache, RELATIVE, inputs, 4, 7)
    network, plain, inputs = setup(RELATIVE, 4)
    assert_equal_outputs(got, step(network, plain, RELATIVE, inputs, 4, 7))


def test_a_pass_cancelled_half_way_through_the_network_leaves_moved_keys_right() -> None:
    network, cache, inputs = setup(RELATIVE, 4)

    class Cancelled(Exception):
        pass

    class Halting:
        def __init__(self, context: Any) -> None:
            self.context = context

        def attend(self, site: Site, *rest: Any) -> Tensor:
            if site.index == 1:
                raise Cancelled
            return self.context.attend(site, *rest)

    halting: Any = Halting(cache.begin(only(Kind.DENOISE, 8, 10)))
    with pytest.raises(Cancelled):
        network(inputs.noisy[:, 8:10], inputs.part(range(8, 10)), inputs.cond(range(8, 10)), halting)
    with pytest.raises(ValueError, match="sites"):
        cache.promote()
    cache.discard()
    got = step(network, cache, RELATIVE, inputs, 4, 7)
    network, plain, inputs = setup(RELATIVE, 4)
    assert_equal_outputs(got, step(network, plain, RELATIVE, inputs, 4, 7))


def test_a_view_is_over_after_the_next_begin() -> None:
    network, cache, inputs = setup(RULE, 4)
    x, sigma, cond = inputs.noisy[:, 8:10], inputs.part(range(8, 10)), inputs.cond(range(8, 10))
    view = cache.begin(only(Kind.DENOISE, 8, 10))
    network(x, sigma, cond, view)
    cache.promote()
    cache.begin(only(Kind.DENOISE, 10, 12))
    with pytest.raises(RuntimeError, match="view"):
        network(x, sigma, cond, view)


def test_a_view_of_several_segments_is_over_after_the_next_begin() -> None:
    """It reads slots that later chunks overwrite, so a late use must be refused and not answered with other frames."""
    network, cache, inputs = setup(RULE, 3)
    view = cache.begin((*only(Kind.COMMIT, 6, 8), *only(Kind.DENOISE, 8, 10)))
    x, cond = inputs.noisy[:, 6:10], inputs.cond(range(6, 10))
    network(x, torch.ones(1, 1), cond, view)
    cache.discard()
    step(network, cache, RULE, inputs, 3, 7)
    with pytest.raises(RuntimeError, match="view"):
        network(x, torch.ones(1, 1), cond, view)


def test_a_grad_mode_view_keeps_what_it_read() -> None:
    """Recomputation under gradient checkpointing happens after the stream has moved on."""
    network, cache, inputs = setup(RULE, 3)
    with torch.enable_grad():
        view = cache.begin(only(Kind.DENOISE, 6, 8))
        x, sigma, cond = inputs.noisy[:, 6:8], inputs.part(range(6, 8)), inputs.cond(range(6, 8))
        want = network(x, sigma, cond, view)
        step(network, cache, RULE, inputs, 3, 7)
        assert torch.equal(network(x, sigma, cond, view), want)


def test_a_grad_mode_view_first_used_too_late_is_refused() -> None:
    network, cache, inputs = setup(RULE, 3)
    with torch.enable_grad():
        view = cache.begin(only(Kind.DENOISE, 6, 8))
        step(network, cache, RULE, inputs, 3, 7)
        with pytest.raises(RuntimeError, match="view"):
            network(inputs.noisy[:, 6:8], inputs.part(range(6, 8)), inputs.cond(range(6, 8)), view)


def test_a_forward_with_gradients_never_hangs_a_graph_on_the_buffers() -> None:
    """begin() outside and forward inside grad mode: refused, or the buffers stay free of a graph."""
    network = make_network().requires_grad_(True)
    inputs = make_inputs(network, RULE)
    cache = make_cache(network, RULE, inputs)
    view = cache.begin(only(Kind.DENOISE, 0, 2))
    try:
        with torch.enable_grad():
            network(inputs.noisy[:, :2], inputs.part(range(2)), inputs.cond(range(2)), view)
    except (RuntimeError, ValueError) as error:
        assert "grad" in str(error)
    entry = cache.entries[0]
    assert not entry.keys.requires_grad and not entry.values.requires_grad


# ---- several segments in one forward ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [RULE, RELATIVE, FULL], ids=["absolute", "relative", "full"])
def test_commit_and_next_denoise_in_one_forward(rule: Rule) -> None:
    network, cache, inputs = setup(rule, 3)
    context = cache.begin((*only(Kind.COMMIT, 4, 6), *only(Kind.DENOISE, 6, 8)))
    cache.discard()
    network, cache, inputs = setup(rule, 2)
    context = cache.begin((*only(Kind.COMMIT, 4, 6), *only(Kind.DENOISE, 6, 8)))
    sigma = torch.cat([torch.zeros_like(inputs.sigma[:, 4:6]), inputs.sigma[:, 6:8]], 1)
    x = torch.cat([inputs.clean[:, 4:6], inputs.noisy[:, 6:8]], 1)
    got = network(x, sigma, inputs.cond(range(4, 8)), context)
    cache.promote()
    assert 6 not in cache.frames and 5 in cache.frames
    network, plain, inputs = setup(rule, 2)
    first = commit(network, plain, inputs, range(4, 6))
    assert_equal_outputs(got, torch.cat([first, denoise(network, plain, inputs, range(6, 8))], 1))
    assert_equal_outputs(denoise(network, cache, inputs, range(6, 8)), got[:, 2:])


@pytest.mark.parametrize("rule", [RULE, RELATIVE, FULL], ids=["absolute", "relative", "full"])
def test_prefill_of_several_chunks_in_one_forward(rule: Rule) -> None:
    """Five chunks through a window of three: the sink and the recent frames of it stay."""
    rule = replace(rule, num_frames=14)
    network, cache, inputs = setup(rule, 0)
    context = cache.begin(tuple(s for i in range(5) for s in only(Kind.PREFILL, 2 * i, 2 * i + 2)))
    got = network(inputs.clean[:, :10], torch.zeros(1, 1), inputs.cond(range(10)), context)
    cache.promote()
    network, plain, inputs = setup(rule, 0)
    want = torch.cat([commit(network, plain, inputs, range(2 * i, 2 * i + 2)) for i in range(5)], 1)
    assert_equal_outputs(got, want)
    assert_equal_outputs(step(network, cache, rule, inputs, 5, 7), step(network, plain, rule, inputs, 5, 7))


def test_recache_under_the_same_prompt_reproduces_the_cache() -> None:
    network, cache, inputs = setup(FULL, 4)
    before = {i: (e.keys.clone(), e.values.clone()) for i, e in cache.entries.items()}
    context = cache.begin(tuple(s for i in range(4) for s in only(Kind.RECACHE, 2 * i, 2 * i + 2)))
    network(inputs.clean, torch.zeros(1, 1), inputs.cond(range(8)), context)
    cache.promote()
    for i, entry in cache.entries.items():
        torch.testing.assert_close(entry.keys, before[i][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(entry.values, before[i][1], rtol=0, atol=1e-12)


def test_recache_in_both_directions_does_not_reproduce_the_cache() -> None:
    """Negative control: one segment over all frames lets them see each other in both directions."""
    network, cache, inputs = setup(FULL, 4)
    before = cache.entries[2].values.clone()
    network(inputs.clean, torch.zeros(1, 1), inputs.cond(range(8)), cache.begin(only(Kind.RECACHE, 0, 8)))
    cache.promote()
    assert (cache.entries[2].values - before).abs().max() > 1e-3


@pytest.mark.parametrize("together", [True, False])
def test_recache_under_another_prompt_equals_a_stream_that_always_had_it(together: bool) -> None:
    network, cache, inputs = setup(FULL, 3)
    prompts = make_inputs(network, FULL, seed=99).prompts
    other = replace(inputs, prompts=prompts)
    groups = [[0, 1, 2]] if together else [[0], [1], [2]]
    for group in groups:
        frames = range(2 * group[0], 2 * group[-1] + 2)
        done = FrameSet.of((0, 2 * group[-1] + 2))
        context = cache.begin(
            tuple(Segment(kind=Kind.RECACHE, frames=range(2 * i, 2 * i + 2), limit=done) for i in group)
        )
        network(inputs.clean[:, frames.start : frames.stop], torch.zeros(1, 1), other.cond(frames), context)
        cache.promote()
    network, plain, _ = setup(FULL, 0)
    step(network, plain, FULL, other, 0, 3)
    assert_equal_outputs(step(network, cache, FULL, other, 3, 4), step(network, plain, FULL, other, 3, 4))


# ---- sessions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [RULE, RELATIVE], ids=["absolute", "relative"])
def test_two_interleaved_caches_do_not_touch_each_other(rule: Rule) -> None:
    network = network_of()
    first, second = make_inputs(network, rule), make_inputs(network, rule, batch=1, grid=(3, 2), seed=5)
    alone = [torch.cat(rollout(network, make_cache(network, rule, i), rule, i), 1) for i in (first, second)]
    caches = [make_cache(network, rule, i) for i in (first, second)]
    outputs: list[tuple[list[Tensor], list[Tensor]]] = [([], []), ([], [])]
    for start, end in chunk_bounds(rule):
        for cache, inputs, (_, noisy) in zip(caches, (first, second), outputs, strict=True):
            noisy.append(denoise(network, cache, inputs, range(start, end)))
        for cache, inputs, (clean, _) in zip(caches, (first, second), outputs, strict=True):
            clean.append(commit(network, cache, inputs, range(start, end)))
    for want, (clean, noisy) in zip(alone, outputs, strict=True):
        assert torch.equal(torch.cat(clean + noisy, 1), want)


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    network = network_of()
    inputs = make_inputs(network, RULE, batch=3, num_prompts=2)
    want = torch.cat(rollout(network, make_cache(network, RULE, inputs), RULE, inputs), 1)
    changed = replace(inputs, noisy=inputs.noisy.clone(), clean=inputs.clean.clone())
    changed.noisy[1] *= 2
    changed.clean[1] += 1
    got = torch.cat(rollout(network, make_cache(network, RULE, changed), RULE, changed), 1)
    assert torch.equal(got[[0, 2]], want[[0, 2]]) and not torch.equal(got[1], want[1])


# ---- bytes and what a chunk costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["absolute", "relative"])
def test_bytes_are_the_buffers_and_constant(policy: str) -> None:
    """50 chunks: keys and values of 3 sites, and one copy of the sink's keys where they move."""
    rule = Rule(chunk=2, num_frames=100, window=7, sink=2, policy=policy)
    network = network_of()
    inputs = make_inputs(network, rule, batch=2)
    cache = make_cache(network, rule, inputs)
    per_frame = 2 * 6 * 2 * 12 * 8  # batch, tokens, heads, head_dim, bytes of fp64
    expected = 3 * per_frame * (2 * 7 + (2 if policy == "relative" else 0))
    pointers = {i: (e.keys.data_ptr(), e.values.data_ptr()) for i, e in cache.entries.items()}
    for number in range(50):
        step(network, cache, rule, inputs, number, number + 1)
        assert cache.num_bytes == expected
        assert len(cache.frames) <= 7
        assert {i: (e.keys.data_ptr(), e.values.data_ptr()) for i, e in cache.entries.items()} == pointers
        books = [cache.slots.promoted, cache.slots.baked, cache.master_slots, *cache.pending.values(), cache.graph]
        assert all(len(book) <= 7 for book in books), "host-side books must not grow with the stream"


def test_a_cache_without_a_bound_grows_in_blocks() -> None:
    rule = Rule(chunk=2, num_frames=20)
    network = network_of()
    inputs = make_inputs(network, rule)
    cache = make_cache(network, rule, inputs, block_frames=6)
    per_frame = 3 * 2 * (2 * 6 * 2 * 12 * 8)
    for number in range(10):
        step(network, cache, rule, inputs, number, number + 1)
        blocks = -(-(2 * number + 2) // 6)
        assert cache.num_bytes == 6 * blocks * per_frame


class Copies(TorchDispatchMode):
    """Counts operators that copy cached keys or wait for the device."""

    def __init__(self, floats: int) -> None:
        super().__init__()
        self.floats = floats
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        big = isinstance(out, Tensor) and out.numel() >= self.floats
        if name in ("_local_scalar_dense", "nonzero", "equal") or (
            big and name in ("cat", "clone", "copy_", "_to_copy", "index_select", "index", "roll", "gather")
        ):
            self.seen.append(name)
        return out


@pytest.mark.parametrize("window", [6, 7])
def test_a_full_window_is_read_without_copies_and_without_item(window: int) -> None:
    """Windows that are and are not a multiple of the chunk: keys are read where they lie."""
    rule = Rule(chunk=2, num_frames=20, window=window, sink=1)
    network, cache, inputs = setup(rule, 8)
    past = (window - 2) * inputs.tokens * 24 * inputs.clean.shape[0]  # floats of the past keys
    with Copies(past) as copies:
        denoise(network, cache, inputs, range(16, 18))
        commit(network, cache, inputs, range(16, 18))
    assert copies.seen == []


def test_the_counter_of_copies_counts() -> None:
    """Negative control: the grad-mode view does copy what it reads."""
    rule = Rule(chunk=2, num_frames=20, window=6, sink=1)
    network, cache, inputs = setup(rule, 8)
    with torch.enable_grad(), Copies(4 * inputs.tokens * 24 * inputs.clean.shape[0]) as copies:
        denoise(network, cache, inputs, range(16, 18))
    assert "cat" in copies.seen and "index_select" in copies.seen


def test_a_site_with_rows_and_one_token_per_frame() -> None:
    """Attention over time alone: every spatial position is a row; additive positions, so no rotation."""
    site = Site(index=4, heads=2, head_dim=4, rows=3, tokens_per_frame=1)
    cache = KVCache(
        [site],
        batch=2,
        tokens_per_frame=99,
        visibility=Full(),
        positions=Absolute(),
        block_frames=2,
        dtype=torch.float64,
    )
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 6, 2, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    for grad in (False, True):
        cache.drop(cache.frames)
        outputs = []
        with torch.set_grad_enabled(grad):
            for start in (0, 2, 4):
                view = cache.begin(only(Kind.COMMIT, start, start + 2))
                own = slice(start, start + 2)
                outputs.append(view.attend(site, q[:, own], k[:, own], v[:, own], None))
                cache.promote()
        for start, got in zip((0, 2, 4), outputs, strict=True):
            scores = torch.einsum("bqhd,bkhd->bhqk", q[:, start : start + 2], k[:, : start + 2]) / 2
            want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, : start + 2])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert cache.num_bytes == 2 * 6 * 6 * 2 * 4 * 8
