"""Seconds, pixel frames and chunks of a stream: exact integer arithmetic, no tensors.

Frame f is shown at f / fps. A prompt switch takes effect at the first chunk that starts at or after its time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unspool.causal.chunks import ChunkPlan
from unspool.geometry import Geometry

ROUNDING = 1e-6  # of a frame: 4.0 s at 16 fps is frame 64 whatever floats make of it


@dataclass(frozen=True, kw_only=True)
class Clock:
    """When the chunks of a stream are shown."""

    geometry: Geometry
    plan: ChunkPlan
    fps: float

    def first_frame(self, chunk: int) -> int:
        """Pixel frames before chunk `chunk`, which is also the number of its first one."""
        return self.geometry.pixel_frames(0 if chunk == 0 else self.plan.lead + (chunk - 1) * self.plan.chunk)

    def num_frames(self, chunk: int) -> int:
        """Pixel frames of chunk `chunk`."""
        frames = self.plan.frames(chunk)
        return self.geometry.pixel_frames(len(frames), start=frames.start)

    def seconds(self, chunk: int) -> float:
        """When chunk `chunk` begins."""
        return self.first_frame(chunk) / self.fps

    def chunk_at(self, seconds: float) -> int:
        """The first chunk that begins at or after `seconds`. Raises ValueError for a time before the start."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a prompt switch at {seconds} s: expected a time of at least 0")
        return self._chunks_before(self.latents_for(math.ceil(seconds * self.fps - ROUNDING)))

    def chunks_for(self, num_frames: int) -> int:
        """Chunks that a clip of `num_frames` pixel frames needs."""
        return self._chunks_before(self.latents_for(num_frames))

    def latents_for(self, num_frames: int) -> int:
        """Fewest latent frames that decode to at least `num_frames` pixel frames."""
        lead = 1 if self.geometry.first_alone else 0
        return 0 if num_frames <= 0 else lead + max(0, -(-(num_frames - lead) // self.geometry.temporal))

    def _chunks_before(self, latents: int) -> int:
        """Fewest whole chunks that hold at least `latents` latent frames."""
        return 0 if latents <= 0 else 1 + max(0, -(-(latents - self.plan.lead) // self.plan.chunk))
