"""Chunks and sets of latent frames, as plain integers: no tensors, no networks.

A chunk is a half-open range of latent frames that are denoised together; frames are counted from 0 over the whole
stream, so an index never changes its meaning when old frames are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class FrameSet:
    """A set of latent frame indices as sorted, disjoint, non-touching half-open intervals."""

    intervals: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(*spans: tuple[int, int] | range) -> FrameSet:
        """The union of half-open spans; empty or reversed ones count as nothing. Raises ValueError for steps."""
        if any(isinstance(s, range) and s.step != 1 for s in spans):
            raise ValueError(f"spans {spans}: expected ranges of step 1; use of_frames() for every other frame")
        pairs = sorted((s.start, s.stop) if isinstance(s, range) else (s[0], s[1]) for s in spans)
        merged: list[tuple[int, int]] = []
        for start, end in pairs:
            if end <= start:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return FrameSet(tuple(merged))

    @staticmethod
    def of_frames(frames: Iterable[int]) -> FrameSet:
        return FrameSet.of(*((f, f + 1) for f in frames))

    def __iter__(self) -> Iterator[int]:
        for start, end in self.intervals:
            yield from range(start, end)

    def __len__(self) -> int:
        return sum(end - start for start, end in self.intervals)

    def __contains__(self, frame: object) -> bool:
        return isinstance(frame, int) and any(start <= frame < end for start, end in self.intervals)

    def __or__(self, other: FrameSet) -> FrameSet:
        return FrameSet.of(*self.intervals, *other.intervals)

    def __and__(self, other: FrameSet) -> FrameSet:
        return FrameSet.of(*((max(a, c), min(b, d)) for a, b in self.intervals for c, d in other.intervals))

    def __sub__(self, other: FrameSet) -> FrameSet:
        spans = list(self.intervals)
        for c, d in other.intervals:
            spans = [piece for a, b in spans for piece in ((a, min(b, c)), (max(a, d), b)) if piece[0] < piece[1]]
        return FrameSet.of(*spans)

    def __le__(self, other: FrameSet) -> bool:
        return not (self - other)

    def shifted(self, offset: int) -> FrameSet:
        """The same set with `offset` added to every frame."""
        return FrameSet(tuple((a + offset, b + offset) for a, b in self.intervals))

    def __str__(self) -> str:
        return " + ".join(f"[{a}, {b})" for a, b in self.intervals) or "nothing"


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """How a stream is cut into chunks.

    Fields: `chunk` latent frames per chunk; `first` latent frames of chunk 0 (1 for image-first models, wan_causal
    1.3; None: like the others); `num_frames` where the stream ends (None: endless), the last chunk then may be short.
    """

    chunk: int
    first: int | None = None
    num_frames: int | None = None

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: expected at least 1 latent frame per chunk")
        if self.first is not None and self.first < 1:
            raise ValueError(f"first={self.first}: expected None or at least 1 latent frame in the first chunk")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames}: expected None (endless) or at least 1 latent frame")

    @property
    def lead(self) -> int:
        """Latent frames of chunk 0 before any shortening by the end of the stream."""
        return self.chunk if self.first is None else self.first

    @property
    def longest(self) -> int:
        """Latent frames of the longest chunk."""
        if self.num_frames is None:
            return max(self.chunk, self.lead)
        return max(min(self.lead, self.num_frames), min(self.chunk, self.num_frames - self.lead))

    @property
    def num_chunks(self) -> int | None:
        """Chunks of the whole stream; None when it is endless."""
        if self.num_frames is None:
            return None
        return 1 + max(0, -(-(self.num_frames - self.lead) // self.chunk))

    def frames(self, index: int) -> range:
        """Latent frames of chunk `index`. Raises ValueError outside the stream."""
        start = 0 if index == 0 else self.lead + (index - 1) * self.chunk
        end = start + (self.lead if index == 0 else self.chunk)
        if self.num_frames is not None:
            end = min(end, self.num_frames)
        if index < 0 or end <= start:
            raise ValueError(f"chunk {index} is outside the stream of {self.num_chunks} chunks")
        return range(start, end)

    def chunk_of(self, frame: int) -> int:
        """Index of the chunk that holds latent frame `frame`. Raises ValueError outside the stream."""
        if frame < 0 or (self.num_frames is not None and frame >= self.num_frames):
            raise ValueError(f"latent frame {frame} is outside the stream of {self.num_frames} latent frames")
        return 0 if frame < self.lead else 1 + (frame - self.lead) // self.chunk

    def chunks(self, start: int, end: int) -> list[range]:
        """The chunks that hold latent frames [start, end), whole."""
        if end <= start:
            return []
        return [self.frames(i) for i in range(self.chunk_of(start), self.chunk_of(end - 1) + 1)]


def check_prefix(chunk: int, prefix_frames: int | None) -> None:
    """Raise ValueError for chunks of `chunk` latent frames that prefix-enhanced attention reaches behind.

    `PrefixEnhanced` itself reads right in that case; published caches hold frames of the newest chunk only, and repeat
    them, which is not what the network was trained with. So a model made so could not be run elsewhere.
    """
    if prefix_frames is not None and prefix_frames < 1:
        raise ValueError(f"prefix_frames={prefix_frames}: expected at least 1, or None for a network without; P' is 3")
    if prefix_frames is not None and chunk < prefix_frames:
        raise ValueError(
            f"a chunk of {chunk} latent frames is shorter than prefix_frames={prefix_frames}, which published caches "
            f"take from the newest chunk alone; use chunks of at least {prefix_frames}, or prefix_frames={chunk}"
        )
