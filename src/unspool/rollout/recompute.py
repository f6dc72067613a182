"""Passes that compute the clean past anew, for `commit="recompute"`: what a rollout is without a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.causal.cache.base import Cache
from unspool.causal.chunks import ChunkPlan, FrameSet
from unspool.causal.visibility import Kind, Pass, Segment, Visibility
from unspool.models.base import Prompts
from unspool.rollout.settings import RolloutConfig

if TYPE_CHECKING:
    from unspool.rollout.rollout import Rollout


def with_past(segment: Segment, plan: ChunkPlan, visibility: Visibility, sigma_commit: float) -> Pass:
    """The clean latent frames that `segment` reads as segments by chunk, then `segment` itself.

    A frame of the past reads no frame before those, unlike a cached one, whose keys were made when these were there.
    """
    past = visibility.visible(segment)
    readable = past | FrameSet.of(segment.frames)
    before = []
    for start, end in past.intervals:
        for chunk in plan.chunks(start, end):
            frames = range(max(start, chunk.start), min(end, chunk.stop))
            before.append(Segment(kind=Kind.COMMIT, frames=frames, sigma=sigma_commit, limit=readable))
    return (*before, replace(segment, limit=readable))


def forward_with_past(stream: Rollout, segment: Segment, x: Tensor, told: float, prompts: list[Prompts]) -> Tensor:
    """Prediction for noisy latents `x` of `segment`, told the level `told`, in one forward with its clean past."""
    config = stream.config
    segments = with_past(segment, config.plan, stream.visibility, config.sigma_commit)
    past = [stream._to_commit(s.frames, stream.history.take(s.frames)) for s in segments[:-1]]
    levels = [config.sigma_commit] * sum(part.shape[1] for part in past) + [told] * x.shape[1]
    sigma = torch.tensor([levels], dtype=torch.float64)
    return stream.branches.run(segments, torch.cat([*past, x], dim=1), sigma, prompts)[:, -x.shape[1] :]


def check_commit(cache: Cache, config: RolloutConfig) -> None:
    """Raise ValueError where a cache can only be used with another way of committing chunks."""
    needed = getattr(cache, "commit", None)
    if needed is not None and config.commit != needed:
        raise ValueError(
            f"commit={config.commit!r} with the cache {type(cache).__name__}: expected commit={needed!r}, the only way "
            "in which it learns of a finished chunk; set it, or use the cache 'kv'"
        )
