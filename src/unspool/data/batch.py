"""What a training step is fed: one `Batch`, from whatever source, and what a source must offer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from unspool.shapes import Latent, Pixels


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of clips; a field that a source does not know is None, and a method names the ones it needs.

    Fields: `pixels` [b, f, 3, y, x] in [-1, 1]; `latents` [b, t, c, h, w], normalised (about unit variance);
    `captions`: per sample its prompts in order of time; `prompt_index` [b, t] int64, which of the sample's prompts each
    latent frame follows (None: the first throughout); `text` [b, prompts, rows, channels] ready-made text states, for
    encoders that are not trained along; `indices` [b] int64 which clip of its split each sample is.
    """

    pixels: Pixels | None = None
    latents: Latent | None = None
    captions: tuple[tuple[str, ...], ...] | None = None
    prompt_index: Tensor | None = None
    text: Tensor | None = None
    indices: Tensor | None = None

    def __len__(self) -> int:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                return len(value)
        return 0

    def need(self, *names: str) -> None:
        """Raise ValueError unless every named field is there."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            there = [f.name for f in fields(self) if getattr(self, f.name) is not None]
            raise ValueError(f"the batch has no {', '.join(missing)} but {', '.join(there)}; use a source with them")

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class ParsedBatch(Batch):
    """Captions (one per sample) and what they state: `labels` [b, slots, attributes] int64, the number of a value or
    -1 for what is not stated."""

    labels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TrajectoryBatch(Batch):
    """Paths of a teacher's sampler: `trajectory` [b, steps, t, c, h, w] from noise to its end point, and the `sigmas`
    of those states, the last 0 (None: the file does not say). `latents` are the end point, or the clean clip that a
    causal teacher read."""

    trajectory: Tensor | None = None
    sigmas: tuple[float, ...] | None = None


@runtime_checkable
class Source(Protocol):
    """Where batches come from. Stateless: what step k gives depends on k and the seed alone: resuming is one integer.

    `rank` of `world` takes every world-th sample of the global batch of `size` samples: sample j of the global batch is
    the same clip whatever `world` is.
    """

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        """Samples rank, rank + world, ... of the global batch of `size` samples at `step`."""
        ...
