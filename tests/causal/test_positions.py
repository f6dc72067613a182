"""Where keys and queries stand: worked numbers, and the properties that a cache relies on."""

from __future__ import annotations

import pytest
from cases import FUZZ, rules
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Rule, chunk_bounds, plain_rows

from unspool.causal.cache.slots import common_shift
from unspool.causal.chunks import FrameSet
from unspool.causal.position import POSITIONS, Absolute, Cyclic, PositionPolicy, ReanchoredSink, WindowRelative
from unspool.causal.visibility import Kind, Segment

HELD = FrameSet.of((0, 2), (7, 9))
OWN = Segment(kind=Kind.DENOISE, frames=range(9, 12))


def test_worked_numbers() -> None:
    assert Absolute().assign(OWN, HELD) == ([0, 1, 7, 8], [9, 10, 11])
    assert Absolute(offset=100).assign(OWN, HELD) == ([100, 101, 107, 108], [109, 110, 111])
    assert WindowRelative().assign(OWN, HELD) == ([0, 1, 2, 3], [4, 5, 6])
    assert WindowRelative(offset=7).assign(OWN, HELD) == ([7, 8, 9, 10], [11, 12, 13])
    assert ReanchoredSink().assign(OWN, HELD) == ([5, 6, 7, 8], [9, 10, 11])
    assert Cyclic(length=12).assign(OWN, HELD) == ([0, 1, 7, 8], [9, 10, 11])
    assert Cyclic(length=5).assign(OWN, FrameSet.of((7, 9))) == ([2, 3], [4, 0, 1])


@given(rule=rules())
@settings(FUZZ, max_examples=100)
def test_differences_are_those_of_the_oracle(rule: Rule) -> None:
    """Rotary attention sees key minus query position and nothing else."""
    rows = plain_rows(rule)
    for start, end in chunk_bounds(rule):
        segment = Segment(kind=Kind.DENOISE, frames=range(start, end))
        past = rule.visibility.visible(segment)
        keys, own = rule.positions.assign(segment, past)
        got = dict(zip([*past, *range(start, end)], [*keys, *own], strict=True))
        for f in range(start, end):
            for g, position in rows[f].keys:
                assert got[g] - got[f] == position - rows[f].position


@given(rule=rules(), index=st.integers(0, 13))
@settings(FUZZ, max_examples=100)
def test_relative_positions_are_bounded_by_what_is_held(rule: Rule, index: int) -> None:
    bounds = chunk_bounds(rule)
    start, end = bounds[index % len(bounds)]
    segment = Segment(kind=Kind.DENOISE, frames=range(start + 10**7, end + 10**7))
    kept = rule.visibility.visible(Segment(kind=Kind.DENOISE, frames=range(start, end)))
    keys, own = WindowRelative().assign(segment, kept)
    assert keys + own == list(range(len(kept) + end - start))


@given(length=st.integers(1, 10), start=st.integers(0, 60), count=st.integers(1, 4), kept=st.sets(st.integers(0, 59)))
@settings(FUZZ, max_examples=300)
def test_cyclic_positions_are_distinct_or_refused(length: int, start: int, count: int, kept: set[int]) -> None:
    """Two frames of one attention at one additive position could not be told apart."""
    past = FrameSet.of_frames(f for f in kept if f < start)
    segment = Segment(kind=Kind.DENOISE, frames=range(start, start + count))
    try:
        keys, own = Cyclic(length=length).assign(segment, past)
    except ValueError as error:
        assert "length" in str(error) and len({f % length for f in [*past, *segment.frames]}) < len(past) + count
        return
    assert len(set(keys + own)) == len(keys + own)
    assert keys + own == [f % length for f in [*past, *segment.frames]]


def test_cyclic_of_a_rolling_window_never_refuses() -> None:
    """Ca2-VDM: window = length, so that every frame held has its own position for ever."""
    for start in range(0, 200, 3):
        past = FrameSet.of((max(0, start - 6), start))
        keys, own = Cyclic(length=9).assign(Segment(kind=Kind.DENOISE, frames=range(start, start + 3)), past)
        assert len(set(keys + own)) == len(past) + 3
    with pytest.raises(ValueError, match="at least 1"):
        Cyclic(length=0)


@given(
    wanted=st.lists(st.integers(0, 20), max_size=6),
    moved=st.integers(-5, 5),
    odd=st.lists(st.integers(-3, 3), min_size=6, max_size=6),
)
@settings(FUZZ, max_examples=100)
def test_common_shift_moves_the_fewest_keys(wanted: list[int], moved: int, odd: list[int]) -> None:
    baked = [w + moved + o for w, o in zip(wanted, odd, strict=False)]
    chosen = common_shift(wanted, baked)
    shifts = [b - w for w, b in zip(wanted, baked, strict=True)]
    assert shifts.count(chosen) == max((shifts.count(s) for s in shifts), default=0)


def test_names() -> None:
    for policy in (Absolute(), WindowRelative(), ReanchoredSink(), Cyclic(length=3)):
        assert isinstance(policy, PositionPolicy)
    for target in POSITIONS.values():
        module, _, name = target.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name)
