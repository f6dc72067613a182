"""Prefix-enhanced spatial attention as a visibility: a second stream of attentions that reads the last past frames.

Source: Ca2-VDM, arXiv:2411.16375 eq. 4. Noisy frames read the last P' clean frames; clean frames read themselves. Both
published forms are streams here, so a network says by its sites which of them it was built for.
"""

from __future__ import annotations

from dataclasses import dataclass

from unspool.causal.chunks import FrameSet
from unspool.causal.visibility import (
    Kind,
    Segment,
    Visibility,
    Within,
    capacity_of,
    sink_of,
    within_of,
)

JOINT = "prefix"
"""The form of the paper: one attention over the last P' past frames and the frame itself."""

SEPARATE = "prefix_only"
"""The form of the published code: an attention of its own over the last P' past frames, the frame itself left out."""


@dataclass(frozen=True, kw_only=True)
class LastFrames:
    """The last `frames` past latent frames for noisy frames, nothing of the past for clean ones.

    A frame reads nothing else of its chunk than itself, or (`own=False`, noisy frames with a past) not even that. Where
    the past is shorter than `frames`, its first frame is repeated, as the published network was trained.
    """

    frames: int
    own: bool

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: expected at least 1 latent frame of the past; the paper uses 3")

    @property
    def within(self) -> Within:
        return "own"

    def within_of(self, segment: Segment) -> Within:
        return "own" if self.own or not len(self.visible(segment)) else "none"

    def visible(self, segment: Segment) -> FrameSet:
        start = segment.frames.start
        return FrameSet.of((max(0, start - self.frames), start)) if segment.kind is Kind.DENOISE else FrameSet()

    @property
    def padded_to(self) -> int:
        return self.frames


@dataclass(frozen=True, kw_only=True)
class PrefixEnhanced:
    """`base` for the temporal attentions, and the last `frames` past latent frames for prefix-enhanced ones.

    A cache for it is "streams" of `CACHES`: the prefix is short, so it is kept apart. Differs from the published
    cache, which holds frames of the newest chunk only, where a chunk is shorter than `frames`: there the published
    network is not what was trained.
    """

    base: Visibility
    frames: int

    def __post_init__(self) -> None:
        LastFrames(frames=self.frames, own=True)

    @property
    def within(self) -> Within:
        return self.base.within

    def within_of(self, segment: Segment) -> Within:
        return within_of(self.base, segment)

    def visible(self, segment: Segment) -> FrameSet:
        return self.base.visible(segment)

    @property
    def capacity(self) -> int | None:
        return capacity_of(self.base)

    @property
    def sink_frames(self) -> FrameSet:
        return sink_of(self.base)

    @property
    def streams(self) -> tuple[str, ...]:
        return (JOINT, SEPARATE)

    def stream(self, name: str) -> Visibility:
        return LastFrames(frames=self.frames, own=name == JOINT)
