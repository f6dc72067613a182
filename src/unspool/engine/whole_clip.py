"""A bidirectional network in the one rollout: the whole clip is its only chunk, and there is no past to keep."""

from __future__ import annotations

import torch

from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Context, FullSequence, Site
from unspool.causal.position import PositionPolicy
from unspool.causal.visibility import Pass, Visibility


class NoCache:
    """Stands in for a cache (implements `Cache`): every pass sees its own latent frames, all of each other, and nothing
    is kept, so a clip costs no memory for keys and values."""

    def __init__(
        self,
        sites: list[Site],
        *,
        batch: int,
        tokens_per_frame: int,
        visibility: Visibility,
        positions: PositionPolicy,
        dtype: torch.dtype,
        device: torch.device | str,
        compiled: bool = False,
    ) -> None:
        self.visibility, self.positions = visibility, positions
        self._context: FullSequence | None = None

    @property
    def frames(self) -> FrameSet:
        return FrameSet()

    @property
    def num_bytes(self) -> int:
        return 0

    def begin(self, segments: Pass) -> Context:
        (segment,) = segments
        if self._context is None or self._context.num_frames != len(segment.frames):
            _, own = self.positions.assign(segment, FrameSet())
            self._context = FullSequence(len(segment.frames), offset=own[0])
        return self._context

    def promote(self, *, keep_graph: bool = False) -> None: ...

    def discard(self) -> None: ...

    def drop(self, frames: FrameSet) -> None: ...

    def snapshot(self) -> Snapshot:
        return Snapshot({}, {})

    def restore(self, snapshot: Snapshot) -> None: ...
