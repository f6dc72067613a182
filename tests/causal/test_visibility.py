"""What a chunk reads, against arithmetic on frame numbers; what is dropped is never asked for again."""

from __future__ import annotations

from typing import Any

import pytest
from cases import FUZZ, rules
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Rule, chunk_bounds, reads_past

from unspool.causal.chunks import FrameSet
from unspool.causal.visibility import (
    VISIBILITIES,
    Full,
    Kind,
    Segment,
    Since,
    Visibility,
    Window,
    outlived,
    retained,
    sink_of,
)


@given(rule=rules())
@settings(FUZZ, max_examples=200)
def test_visible_is_the_arithmetic_of_the_oracle(rule: Rule) -> None:
    for start, end in chunk_bounds(rule):
        for kind in Kind:
            got = rule.visibility.visible(Segment(kind=kind, frames=range(start, end)))
            want = {g for g in range(start) if reads_past(rule, end, g, kind is not Kind.DENOISE)}
            assert set(got) == want
            if rule.window is not None:
                reach = rule.window if kind is Kind.DENOISE or rule.commit_window is None else rule.commit_window
                assert len(got) + (end - start) <= reach, "the window counts sink and chunk"


def walk(visibility: Visibility, bounds: list[tuple[int, int]]) -> None:
    """Evict as a cache does; whatever is still asked for must still be there."""
    held: set[int] = set()
    for start, end in bounds:
        segment = Segment(kind=Kind.DENOISE, frames=range(start, end))
        needed = set(retained(visibility, segment))
        for kind in Kind:
            wanted = visibility.visible(Segment(kind=kind, frames=range(start, end)))
            assert set(wanted) <= needed and all(g < start for g in wanted)
        assert needed <= held, f"chunk [{start}, {end}) asks again for {sorted(needed - held)}"
        held = needed | set(range(start, end))


@given(rule=rules(), sink_start=st.integers(0, 6), floor=st.integers(0, 8), keep=st.sets(st.integers(0, 7), max_size=3))
@settings(FUZZ, max_examples=200)
def test_what_is_dropped_is_never_asked_for_again(rule: Rule, sink_start: int, floor: int, keep: set[int]) -> None:
    base: Any = rule.visibility
    bounds = chunk_bounds(rule)
    walk(base, bounds)
    flushed = Since(base=base, floor=floor, keep=FrameSet.of_frames(keep))
    assert flushed.within == base.within
    walk(flushed, bounds)
    for start, end in bounds:
        segment = Segment(kind=Kind.DENOISE, frames=range(start, end))
        reachable = {g for g in base.visible(segment) if g >= floor or g in keep}
        assert set(flushed.visible(segment)) == reachable
    if isinstance(base, Window):
        walk(Window(window=base.window, sink=base.sink, sink_start=sink_start), bounds)


@given(
    window=st.integers(2, 12),
    sink=st.integers(0, 4),
    sink_start=st.integers(0, 9),
    chunk=st.integers(1, 4),
    start=st.integers(0, 30),
    reads=st.booleans(),
)
@settings(FUZZ, max_examples=200)
def test_a_replaced_sink(window: int, sink: int, sink_start: int, chunk: int, start: int, reads: bool) -> None:
    """Nothing before the new sink is read; the sink is `sink` frames from `sink_start`."""
    assume(window >= sink + chunk)
    visibility = Window(window=window, sink=sink, sink_start=sink_start, commit_reads_sink=reads)
    for kind in (Kind.DENOISE, Kind.COMMIT):
        got = set(visibility.visible(Segment(kind=kind, frames=range(start, start + chunk))))
        want = set()
        for g in range(sink_start, start):
            if g - sink_start < sink:
                if kind is Kind.DENOISE or reads:
                    want.add(g)
            elif start + chunk - g <= window - sink:
                want.add(g)
        assert got == want


def test_sinks_and_names() -> None:
    window = Window(window=9, sink=3, sink_start=2)
    assert sink_of(window) == FrameSet.of((2, 5)) == sink_of(Since(base=window, floor=7))
    assert len(sink_of(Full())) == 0
    assert isinstance(Full(), Visibility) and isinstance(window, Visibility)
    for target in VISIBILITIES.values():
        module, _, name = target.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_two_settings_in_numbers() -> None:
    """Self-Forcing (all 21 of 21) and LongLive (window 12, sink 3), chunk 3, at the chunk of frames 21..23."""
    own = Segment(kind=Kind.DENOISE, frames=range(21, 24))
    assert str(Window(window=21).visible(own)) == "[3, 21)"
    assert str(Window(window=12, sink=3).visible(own)) == "[0, 3) + [15, 21)"
    with pytest.raises(ValueError, match="no room"):
        Window(window=3, sink=3)


@given(
    window=st.integers(2, 9),
    sink=st.integers(0, 3),
    floor=st.integers(0, 20),
    now=st.integers(0, 40),
    k=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_flush_is_outlived_when_nothing_it_hides_can_be_read(
    window: int, sink: int, floor: int, now: int, k: int
) -> None:
    """Dropping the wrapper early would read what was forgotten; never dropping it costs time for ever."""
    if window <= sink or floor < sink:
        return
    base = Window(window=window, sink=sink)
    since = Since(base=base, floor=floor, keep=FrameSet.of((0, sink)))
    simple = outlived(since, now)
    segment = Segment(kind=Kind.DENOISE, frames=range(now, now + k))
    if simple is base:
        assert base.visible(segment) == since.visible(segment)
    assert outlived(since, floor + window) is base
