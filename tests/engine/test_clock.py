"""Seconds to chunks: integer arithmetic, checked by walking along the stream frame by frame."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unspool.causal.chunks import ChunkPlan
from unspool.engine.clock import Clock
from unspool.geometry import Geometry

clocks = st.builds(
    Clock,
    geometry=st.builds(Geometry, temporal=st.integers(1, 8), first_alone=st.booleans()),
    plan=st.builds(ChunkPlan, chunk=st.integers(1, 7), first=st.none() | st.integers(1, 7)),
    fps=st.sampled_from([8.0, 12.5, 16.0, 23.976, 30.0]),
)


def starts(clock: Clock, chunks: int) -> list[int]:
    """First pixel frames of chunks, by counting what every latent frame decodes to."""
    found, frame = [], 0
    for index in range(chunks):
        found.append(frame)
        for latent in clock.plan.frames(index):
            frame += 1 if latent == 0 and clock.geometry.first_alone else clock.geometry.temporal
    return found


@given(clocks)
def test_chunks_lie_end_to_end(clock: Clock) -> None:
    walked = starts(clock, 9)
    assert [clock.first_frame(i) for i in range(9)] == walked
    assert [clock.num_frames(i) for i in range(8)] == [b - a for a, b in pairwise(walked)]


@given(clocks, st.integers(0, 60))
def test_a_switch_takes_effect_at_the_first_chunk_that_begins_then_or_later(clock: Clock, frame: int) -> None:
    walked = starts(clock, 70)
    expected = next(i for i, start in enumerate(walked) if start >= frame)
    assert clock.chunk_at(frame / clock.fps) == expected
    assert clock.seconds(expected) >= frame / clock.fps


@given(clocks, st.fractions(0, 5))
def test_times_between_frames_round_up(clock: Clock, seconds: Fraction) -> None:
    chunk = clock.chunk_at(float(seconds))
    assert clock.seconds(chunk) >= float(seconds) - 1e-5
    assert chunk == 0 or clock.seconds(chunk - 1) < float(seconds)


@given(clocks, st.integers(1, 80))
def test_as_many_chunks_as_frames_need(clock: Clock, frames: int) -> None:
    count = clock.chunks_for(frames)
    assert clock.first_frame(count) >= frames > clock.first_frame(count - 1)
    latents = clock.latents_for(frames)
    assert clock.geometry.pixel_frames(latents) >= frames
    assert latents == 1 or clock.geometry.pixel_frames(latents - 1) < frames


def test_wan_s_numbers() -> None:
    clock = Clock(geometry=Geometry(), plan=ChunkPlan(chunk=3), fps=16.0)
    assert [clock.first_frame(i) for i in range(4)] == [0, 9, 21, 33]
    assert clock.chunk_at(4.0) == 6 and clock.seconds(6) == 69 / 16
    assert clock.chunks_for(81) == 7 and clock.latents_for(81) == 21
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a time of at least 0"):
            clock.chunk_at(bad)
