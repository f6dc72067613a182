"""Draws of a training step that do not depend on how the batch is split: every sample has a generator of its own.

Methods draw through `uniform` and `normal`. With a plain generator these are torch's own draws; with the `SampleRng` of
the training loop, row j of a draw depends on sample j alone, so two ranks, or two micro-batches, see the same noise as
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class SampleRng(torch.Generator):
    """A CPU generator that also holds one generator for each sample of a batch, and one that all ranks share.

    Used as an ordinary generator (`torch.rand(..., generator=rng)`) it draws from `seed`; such draws depend on how the
    batch is split.
    """

    samples: tuple[torch.Generator, ...]
    shared: torch.Generator

    def __new__(cls, seed: int, sample_seeds: Sequence[int], shared_seed: int = 0) -> SampleRng:
        rng = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        rng.manual_seed(seed)
        rng.samples = tuple(torch.Generator().manual_seed(own) for own in sample_seeds)
        rng.shared = torch.Generator().manual_seed(shared_seed)
        return rng

    def __init__(self, seed: int, sample_seeds: Sequence[int], shared_seed: int = 0) -> None:
        """`seed` of the ordinary draws, `sample_seeds` of the samples, in the order of the batch; `shared_seed` of what
        every rank and micro-batch of a step draws alike."""


def uniform(shape: Sequence[int], rng: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform draws in [0, 1) on the CPU; `shape` begins with the batch."""
    return _draw(torch.rand, shape, rng, dtype)


def normal(shape: Sequence[int], rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws on the CPU; `shape` begins with the batch."""
    return _draw(torch.randn, shape, rng, dtype)


def shared_integer(count: int, rng: torch.Generator) -> int:
    """An integer in [0, count) that every rank of a step draws alike: what decides how many forwards a step makes."""
    source = rng.shared if isinstance(rng, SampleRng) else rng
    return int(torch.randint(count, (), generator=source))


def _draw(law: Callable[..., Tensor], shape: Sequence[int], rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    if not isinstance(rng, SampleRng):
        return law(tuple(shape), generator=rng, dtype=dtype)
    if len(shape) < 1 or shape[0] != len(rng.samples):
        raise ValueError(f"a draw of shape {tuple(shape)}: expected the batch of {len(rng.samples)} samples first")
    out = torch.empty(tuple(shape), dtype=dtype)
    rest: Any = tuple(shape[1:])
    for row, own in zip(out, rng.samples, strict=True):
        row.copy_(law(rest, generator=own, dtype=dtype))
    return out
