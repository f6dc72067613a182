"""What chunks read while all of them train in one forward: the noisy chunks before them, or a clean copy of those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend, FullSequence
from unspool.causal.mask import causal_mask, teacher_forcing_mask
from unspool.causal.position import Absolute, Cyclic, ReanchoredSink, WindowRelative
from unspool.causal.visibility import Full, Window
from unspool.methods.common import BatchPrompts, Contexts

Positions = Absolute | WindowRelative | ReanchoredSink | Cyclic
Network = Callable[..., Any]
"""A `Student`, or its forward."""


class Masked(Protocol):
    """The part of a method's config that says what a chunk reads and where."""

    @property
    def plan(self) -> ChunkPlan: ...
    @property
    def visibility(self) -> Full | Window: ...
    @property
    def positions(self) -> Positions: ...
    @property
    def backend(self) -> Backend: ...


class NoisyPast:
    """Chunks read the noisy ones before them (diffusion forcing, arXiv:2407.01392)."""

    def __init__(self, config: Masked) -> None:
        def context(frames: int) -> FullSequence:
            mask = causal_mask(config.plan, frames, config.visibility, config.positions)
            return FullSequence(frames, mask, backend=config.backend)

        self._contexts = Contexts(context)

    def __call__(self, network: Network, x: Tensor, levels: Tensor, prompts: BatchPrompts) -> Tensor:
        """The network's prediction [b, t, c, h, w] for `x` at `levels` [b, t]."""
        prediction: Tensor = network(x, levels, prompts, self._contexts[x.shape[1]])
        return prediction


@dataclass(frozen=True)
class Clean:
    """What stands for the chunks before: `latents` [b, t, c, h, w], and the level that the network is told for them,
    one for all or [b, t]."""

    latents: Tensor
    level: float | Tensor = 0.0


class CleanPast:
    """Chunks read the clean ones before them (teacher forcing): the sequence is [clean | noisy]."""

    def __init__(self, config: Masked) -> None:
        def context(frames: int) -> FullSequence:
            mask = teacher_forcing_mask(config.plan, frames, config.visibility, config.positions)
            return FullSequence(2 * frames, mask, backend=config.backend)

        self._contexts = Contexts(context)

    def __call__(self, network: Network, x: Tensor, levels: Tensor, prompts: BatchPrompts, clean: Clean) -> Tensor:
        """The network's prediction [b, t, c, h, w] for `x` at `levels` [b, t]."""
        frames = x.shape[1]
        told = clean.level if isinstance(clean.level, Tensor) else torch.full_like(levels, clean.level)
        both = torch.cat([clean.latents.to(x.dtype), x], dim=1)
        prediction: Tensor = network(both, torch.cat([told, levels], dim=1), prompts.doubled(), self._contexts[frames])
        return prediction[:, frames:]


def check_commit_level(sigma_commit: float, *, read: bool = True) -> None:
    """Raise ValueError unless it is a noise level, and 0 where no clean past is `read`."""
    if not 0.0 <= sigma_commit <= 1.0:
        raise ValueError(f"sigma_commit={sigma_commit}: expected a noise level in [0, 1], 0 for clean")
    if sigma_commit and not read:
        raise ValueError(f"sigma_commit={sigma_commit} has no effect where no clean past is read; leave it at 0")


def chunk_numbers(plan: ChunkPlan, frames: int) -> Tensor:
    """The chunk of each of the first `frames` latent frames [frames], int64 on the CPU.

    Raises ValueError past the end of the plan.
    """
    return torch.tensor([plan.chunk_of(frame) for frame in range(frames)])
