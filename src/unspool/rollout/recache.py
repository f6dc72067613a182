"""Which latent frames are computed again at a prompt switch, and what the stream remembers for it.

Ranges follow LongLive 1.0 (arXiv:2509.22622) for windows; with full visibility everything is recached. A chunk that the
window cuts is recached whole, because its frames were computed together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.chunks import ChunkPlan, FrameSet
from unspool.causal.visibility import Kind, Pass, Segment, Since, Visibility, Window, capacity_of, sink_of
from unspool.rollout.prompts import SinkPolicy


@dataclass(frozen=True)
class RecachePlan:
    """`visibility` from now on, `forget` frames that leave the cache first, `passes` forwards to run in order."""

    visibility: Visibility
    forget: FrameSet
    passes: tuple[Pass, ...]


def plan_recache(
    visibility: Visibility,
    held: FrameSet,
    plan: ChunkPlan,
    now: int,
    *,
    sink: SinkPolicy,
    bidirectional: bool,
    sigma: float,
) -> RecachePlan:
    """What a switch at latent frame `now` recomputes. `held`: promoted frames of the cache."""
    if now == 0:
        return RecachePlan(visibility, FrameSet(), ())
    base = visibility.base if isinstance(visibility, Since) else visibility
    reach, floor = capacity_of(base), _floor(visibility)
    if reach is None:
        everything = FrameSet.of((floor, now)) | (visibility.keep if isinstance(visibility, Since) else held)
        return RecachePlan(visibility, held, _passes(everything, FrameSet(), plan, now, bidirectional, sigma))
    if bidirectional and reach >= now:
        if len(sink_of(base)) and not isinstance(base, Window):
            raise ValueError(
                f"policy='recache_bidirectional' at latent frame {now} replaces the sink, which {type(base).__name__} "
                "cannot move; use policy='recache', or Window"
            )
        sink = "replaced"  # as published: a recache that reaches frame 0 does not spare the sink
    size = len(sink_of(base))
    if sink == "replaced" and size:
        start = max(0, now - reach, floor)
        moved = _with(visibility, _moved_sink(base, start))
        frames = FrameSet.of((start, now))
        return RecachePlan(moved, held, _passes(frames, FrameSet(), plan, now, bidirectional, sigma))
    if sink == "recomputed" and size:
        base = _moved_sink(base, 0) if isinstance(base, Window) else base
        visibility = _with(visibility, base, keep=sink_of(base) & FrameSet.of((0, now)))
    kept = sink_of(base) & FrameSet.of((0, now))
    recent = FrameSet.of((max(now - (reach - size), floor, 0), now)) - kept
    if sink == "recomputed":
        passes = _passes(recent | kept, FrameSet(), plan, now, bidirectional, sigma)
        return RecachePlan(visibility, held, passes)
    return RecachePlan(visibility, held - kept, _passes(recent, kept & held, plan, now, bidirectional, sigma))


def _with(visibility: Visibility, base: Visibility, keep: FrameSet | None = None) -> Visibility:
    """`visibility` over another base, with what a flush remembers of the sink replaced by `keep`."""
    if not isinstance(visibility, Since):
        return base
    return replace(visibility, base=base, keep=visibility.keep if keep is None else keep)


def _moved_sink(base: Visibility, start: int) -> Visibility:
    if not isinstance(base, Window):
        raise ValueError(
            f"sink='replaced' cannot move the sink of {type(base).__name__}; use sink='kept' or 'recomputed', or Window"
        )
    return replace(base, sink_start=start)


def _floor(visibility: Visibility) -> int:
    return visibility.floor if isinstance(visibility, Since) else 0


def _passes(
    frames: FrameSet, kept: FrameSet, plan: ChunkPlan, now: int, bidirectional: bool, sigma: float
) -> tuple[Pass, ...]:
    """One forward: segments of whole chunks, or one segment per run of frames when all see each other."""
    spans: list[range] = []
    for start, end in frames.intervals:
        if bidirectional:
            spans.append(range(start, end))
            continue
        for chunk in plan.chunks(start, end):
            whole = FrameSet.of((chunk.start, min(chunk.stop, now))) - kept
            spans += [range(a, b) for a, b in whole.intervals]
    unique = sorted({(s.start, s.stop) for s in spans})
    readable = kept | FrameSet.of(*unique)
    segments = tuple(Segment(kind=Kind.RECACHE, frames=range(a, b), sigma=sigma, limit=readable) for a, b in unique)
    return (segments,) if segments else ()


class CleanHistory:
    """Finished latents of the stream, chunk by chunk: as many as a recache can ask for.

    Bounded for a window (the sink's chunks and the last `window` latent frames, rounded up to chunks); with full
    visibility all of them.
    """

    def __init__(self, plan: ChunkPlan, window: int | None, sink: int) -> None:
        self.plan = plan
        self.window = window
        self.sink = sink if plan.num_frames is None else min(sink, plan.num_frames)
        self.chunks: dict[int, Tensor] = {}

    def add(self, frames: range, latents: Tensor, sink: FrameSet) -> None:
        """Keep a finished chunk [b, k, c, h, w] and forget what no recache can reach. `sink`: where it lies by now."""
        self.chunks[self.plan.chunk_of(frames.start)] = latents.detach()
        if self.window is None:
            return
        oldest = self.plan.chunk_of(max(0, frames.stop - self.window))
        last_sink = self.plan.chunk_of(self.sink - 1) if self.sink else -1
        moved = {self.plan.chunk_of(frame) for frame in sink if frame < frames.stop}  # by a switch
        for index in [i for i in self.chunks if last_sink < i < oldest and i not in moved]:
            del self.chunks[index]

    def take(self, frames: range) -> Tensor:
        """Clean latents [b, frames, c, h, w]. Raises ValueError when they were not kept."""
        parts = []
        for chunk in self.plan.chunks(frames.start, frames.stop):
            index = self.plan.chunk_of(chunk.start)
            if index not in self.chunks:
                raise ValueError(f"clean latents of chunk {index} were not kept; kept are {sorted(self.chunks)}")
            a, b = max(frames.start, chunk.start), min(frames.stop, chunk.stop)
            parts.append(self.chunks[index][:, a - chunk.start : b - chunk.start])
        return torch.cat(parts, dim=1)

    def snapshot(self) -> Snapshot:
        return Snapshot({f"chunk.{i}": t.detach().clone() for i, t in self.chunks.items()}, {})

    def restore(self, snapshot: Snapshot, device: torch.device) -> None:
        self.chunks = {int(name.split(".")[1]): t.to(device, copy=True) for name, t in sorted(snapshot.tensors.items())}
