"""A bidirectional network in the one rollout: the whole clip is its only chunk, and there is no past to keep."""

from __future__ import annotations

from unspool.causal.cache.recompute import KeepsNothing
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Context, FullSequence
from unspool.causal.visibility import Pass


class NoCache(KeepsNothing):
    """Stands in for a cache (implements `Cache`): every pass sees its own latent frames, all of each other, and nothing
    is kept, so a clip costs no memory for keys and values."""

    _context: FullSequence | None = None

    def begin(self, segments: Pass) -> Context:
        (segment,) = segments
        if self._context is None or self._context.num_frames != len(segment.frames):
            _, own = self.positions.assign(segment, FrameSet())
            self._context = FullSequence(len(segment.frames), offset=own[0])
        return self._context
