"""No cache: the clean past goes through every forward again (the baselines OS-Fix and OS-Ext of arXiv:2411.16375).

For rollouts with `commit="recompute"`, whose passes hold the past as segments of their own. What it costs is what a
cache saves: P + l latent frames a forward instead of l.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Context, FullSequence, Site
from unspool.causal.mask import MaskSpec, open_mask, pass_mask
from unspool.causal.position import PositionPolicy
from unspool.causal.visibility import Pass, Visibility


class KeepsNothing:
    """What a cache without content has of `Cache`, all but `begin`. Arguments as `KVCache`."""

    def __init__(
        self,
        sites: list[Site],
        *,
        batch: int,
        tokens_per_frame: int,
        visibility: Visibility,
        positions: PositionPolicy,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        self.visibility, self.positions = visibility, positions

    @property
    def frames(self) -> FrameSet:
        return FrameSet()

    @property
    def num_bytes(self) -> int:
        return 0

    def promote(self, *, keep_graph: bool = False) -> None: ...

    def discard(self) -> None: ...

    def drop(self, frames: FrameSet) -> None: ...

    def snapshot(self) -> Snapshot:
        return Snapshot({}, {})

    def restore(self, snapshot: Snapshot) -> None: ...


class Recompute(KeepsNothing):
    """Stands in for a cache (implements `Cache`) and keeps nothing; each segment reads by the visibility.

    Equals a cache of the same visibility as long as no frame was evicted: keys that a cache kept remember through
    depth what came before the window, keys computed anew do not. Arguments as `KVCache`.
    """

    commit: ClassVar[str] = "recompute"

    _last: tuple[Pass, Visibility, FullSequence] | None = None

    def begin(self, segments: Pass) -> Context:
        """The context of one forward. Raises ValueError where a segment reads frames that are not in it."""
        known = tuple(replace(segment, sigma=0.0) for segment in segments)  # who reads whom does not depend on it
        if self._last is None or self._last[:2] != (known, self.visibility):
            mask = self._mask(known)
            self._last = (known, self.visibility, FullSequence(mask.num_frames, mask))
        return self._last[2]

    def _mask(self, segments: Pass) -> MaskSpec:
        return pass_mask(segments, self.visibility, self.positions)


class RecomputeBidirectional(Recompute):
    """As `Recompute`, but all latent frames of a forward read each other, clean ones the noisy ones too.

    What OS-Fix and OS-Ext do: their networks are bidirectional. The visibility only says which past frames take part.
    """

    def _mask(self, segments: Pass) -> MaskSpec:
        return open_mask(segments, self.visibility, self.positions)
