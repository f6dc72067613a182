"""Which temporal positions the keys and queries of a segment get: pure functions of indices.

Positions are integers in latent frames. For rotary embeddings only differences matter, so a cache may keep keys as
they were rotated when written as long as all visible keys and the queries agree up to one common shift; a policy need
not care (see `unspool.causal.cache.kv`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from unspool.causal.chunks import FrameSet
from unspool.causal.newer import NEWER, brief
from unspool.causal.visibility import Segment, Visibility, capacity_of, sink_of


@runtime_checkable
class PositionPolicy(Protocol):
    """Positions of what a segment reads and of the segment itself."""

    @property
    def moves_keys(self) -> bool:
        """Whether a kept frame can move against the others after it was written, so that its key is rotated anew."""
        ...

    def __hash__(self) -> int: ...  # masks are remembered per policy

    def assign(self, segment: Segment, kept: FrameSet) -> tuple[list[int], list[int]]:
        """Positions of the `kept` past frames, in ascending order of frame, and of the segment's own frames."""
        ...


@dataclass(frozen=True, kw_only=True)
class Absolute:
    """The index of the latent frame in the stream, plus `offset` (CausVid, Self-Forcing, LongLive 1.0)."""

    offset: int = 0
    moves_keys: bool = False

    def assign(self, segment: Segment, kept: FrameSet) -> tuple[list[int], list[int]]:
        return [f + self.offset for f in kept], [f + self.offset for f in segment.frames]


@dataclass(frozen=True, kw_only=True)
class WindowRelative:
    """0, 1, 2... over the frames held, sink first, then recent ones, then the segment: bounded for any length.

    LongLive's relative variant and Infinity-RoPE (arXiv:2511.20649). The sink moves with the window, so its keys are
    rotated anew at every chunk once frames have been dropped.
    """

    offset: int = 0
    moves_keys: bool = True

    def assign(self, segment: Segment, kept: FrameSet) -> tuple[list[int], list[int]]:
        past = len(kept)
        keys = list(range(self.offset, self.offset + past))
        return keys, list(range(self.offset + past, self.offset + past + len(segment.frames)))


@dataclass(frozen=True, kw_only=True)
class ReanchoredSink:
    """Absolute indices, but frames cut off from the segment by a gap stand directly before the recent ones.

    Rolling Forcing's sink (arXiv:2509.25161). Under rotary embeddings equal to `WindowRelative`; it differs for
    backbones that add positions to the hidden state.
    """

    moves_keys: bool = True

    def assign(self, segment: Segment, kept: FrameSet) -> tuple[list[int], list[int]]:
        own = list(segment.frames)
        past = len(kept)
        return list(range(own[0] - past, own[0])), own


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """The index modulo `length` (Ca2-VDM, arXiv:2411.16375 section 3.3): additive ids written into the hidden state.

    `offset` turns all ids, as training does with clips of exactly `length` latent frames; generation leaves it 0.
    """

    length: int
    offset: int = field(default=0, metadata=NEWER)
    moves_keys: bool = False

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length}: expected at least 1 cyclic position")

    def assign(self, segment: Segment, kept: FrameSet) -> tuple[list[int], list[int]]:
        keys, own = ([(f + self.offset) % self.length for f in frames] for frames in (kept, segment.frames))
        if len({*keys, *own}) < len(keys) + len(own):
            raise ValueError(
                f"latent frames {kept} and {segment.frames} need distinct cyclic positions, but two of them meet at "
                f"length={self.length}; use a length of at least the window, without a sink"
            )
        return keys, own


def check_circle(positions: PositionPolicy, visibility: Visibility, num_frames: int | None = None) -> None:
    """Raise ValueError when cyclic positions are fewer than the latent frames that stand on them at once.

    `num_frames` of the whole stream, where it ends before its window is full or the circle is gone round.
    """
    if not isinstance(positions, Cyclic) or (num_frames is not None and num_frames <= positions.length):
        return
    window, sink = capacity_of(visibility), sink_of(visibility)
    if window is None or len(sink):
        held = f"sink frames {sink}, which are kept for good" if len(sink) else "a past without a bound"
        raise ValueError(
            f"length={positions.length} cyclic positions with {held}: two latent frames meet as soon as the circle has "
            "been gone round; use a window without a sink, other positions, or a stream that ends before"
        )
    needed = window if num_frames is None else min(window, num_frames)
    if positions.length < needed:
        raise ValueError(
            f"length={positions.length} cyclic positions for a window of {window} latent frames (Pmax + chunk): two of "
            f"them meet; expected at least {needed}; use such a length or a shorter window"
        )


POSITIONS = {
    "absolute": "unspool.causal.position:Absolute",
    "relative": "unspool.causal.position:WindowRelative",
    "reanchored": "unspool.causal.position:ReanchoredSink",
    "cyclic": "unspool.causal.position:Cyclic",
}
