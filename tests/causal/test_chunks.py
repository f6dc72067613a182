"""Sets of latent frames against Python's sets, and chunk plans against a walk along the clip."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Rule, chunk_bounds

from unspool.causal.chunks import ChunkPlan, FrameSet

FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5)


def members(spans: list[tuple[int, int]]) -> set[int]:
    return {f for start, end in spans for f in range(start, end)}


def canonical(frames: FrameSet) -> bool:
    """Sorted, disjoint, non-touching, non-empty intervals: equal sets are equal objects."""
    flat = [edge for interval in frames.intervals for edge in interval]
    return flat == sorted(set(flat))


@given(a=SPANS, b=SPANS, offset=st.integers(0, 5))
@FUZZ
def test_frame_set_algebra_is_that_of_sets(a: list[tuple[int, int]], b: list[tuple[int, int]], offset: int) -> None:
    x, y, left, right = FrameSet.of(*a), FrameSet.of(*b), members(a), members(b)
    for got, want in (
        (x, left),
        (x | y, left | right),
        (x & y, left & right),
        (x - y, left - right),
        (x.shifted(offset), {f + offset for f in left}),
        (FrameSet.of_frames(left), left),
        (FrameSet.of(*(range(s, e) for s, e in a)), left),
    ):
        assert list(got) == sorted(want)
        assert len(got) == len(want) and canonical(got)
        assert got == FrameSet.of_frames(want) and hash(got) == hash(FrameSet.of_frames(want))
        assert all((f in got) == (f in want) for f in range(30))
    assert (x <= y) == (left <= right)
    assert (x == y) == (left == right)


def test_frame_set_in_words() -> None:
    assert str(FrameSet.of((6, 9), (0, 3))) == "[0, 3) + [6, 9)"
    assert str(FrameSet()) == "nothing"
    assert "3" not in FrameSet.of((0, 5))


def test_frame_set_of_a_range_with_steps() -> None:
    """Every second frame is not the span around them: refused, or taken as it says."""
    try:
        got = FrameSet.of(range(0, 10, 2))
    except ValueError:
        return
    assert list(got) == [0, 2, 4, 6, 8]


PLANS = st.tuples(st.integers(1, 5), st.sampled_from([None, 1, 2, 7]), st.integers(1, 23))


@given(sizes=PLANS)
@FUZZ
def test_chunks_are_a_walk_along_the_clip(sizes: tuple[int, int | None, int]) -> None:
    chunk, first, num_frames = sizes
    plan = ChunkPlan(chunk=chunk, first=first, num_frames=num_frames)
    want = [range(*b) for b in chunk_bounds(Rule(chunk=chunk, first=first, num_frames=num_frames))]
    assert plan.num_chunks == len(want)
    assert [plan.frames(i) for i in range(len(want))] == want
    assert plan.chunks(0, num_frames) == want
    for index, frames in enumerate(want):
        assert all(plan.chunk_of(f) == index for f in frames)
    for bad in (-1, len(want)):
        with pytest.raises(ValueError, match="outside the stream"):
            plan.frames(bad)
    for bad in (-1, num_frames):
        with pytest.raises(ValueError, match="outside the stream"):
            plan.chunk_of(bad)


@given(sizes=PLANS)
@FUZZ
def test_longest_is_the_longest_chunk(sizes: tuple[int, int | None, int]) -> None:
    chunk, first, num_frames = sizes
    plan = ChunkPlan(chunk=chunk, first=first, num_frames=num_frames)
    bounds = chunk_bounds(Rule(chunk=chunk, first=first, num_frames=num_frames))
    assert plan.longest == max(end - start for start, end in bounds)


@given(sizes=PLANS, ends=st.tuples(st.integers(0, 22), st.integers(0, 22)))
@FUZZ
def test_chunks_that_hold_a_span(sizes: tuple[int, int | None, int], ends: tuple[int, int]) -> None:
    chunk, first, num_frames = sizes
    start, end = (min(e, num_frames) for e in ends)
    plan = ChunkPlan(chunk=chunk, first=first, num_frames=num_frames)
    every = [plan.frames(i) for i in range(plan.num_chunks or 0)]
    assert plan.chunks(start, end) == [c for c in every if any(start <= f < end for f in c)]


def test_an_endless_plan() -> None:
    plan = ChunkPlan(chunk=3, first=1)
    assert plan.num_chunks is None and plan.longest == 3
    assert plan.frames(0) == range(0, 1)
    assert plan.frames(10**6) == range(1 + 3 * (10**6 - 1), 1 + 3 * 10**6)
    assert plan.chunk_of(3 * 10**6) == 10**6


@pytest.mark.parametrize("sizes", [{"chunk": 0}, {"chunk": 3, "first": 0}, {"chunk": 3, "num_frames": 0}])
def test_impossible_plans(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 latent frame"):
        ChunkPlan(**sizes)
