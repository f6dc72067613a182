"""What a training objective offers to the loop: which roles act at a step, and the loss of one role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unspool.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """`loss`: scalar to be minimised, mean over the samples of the batch; `metrics`: scalars for the log, detached."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Follower:
    """A network that is no optimizer's: after each update of `role` its weights move towards that role's,
    follower <- decay follower + (1 - decay) role. Same names and shapes; begins as a copy."""

    network: nn.Module
    role: str
    decay: float


@runtime_checkable
class Method(Protocol):
    """One objective over the networks of its roles ("student", "critic", ...).

    A method may also have `frozen`: name -> network that is used and never trained (a teacher), which the loop only
    places, and `followers`: name -> `Follower`, which it moves and checkpoints.

    The loop owns optimizers, EMA, precision and distribution; a method computes losses. All its randomness comes from
    `rng`, a CPU generator that the loop seeds from (seed, step, micro-batch, rank), so a step can be run again exactly.
    """

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Role -> the module whose parameters that role's optimizer owns."""
        ...

    def roles(self, step: int) -> tuple[str, ...]:
        """The roles that are updated at `step`, in order."""
        ...

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        """Loss of `role` on `batch`. Raises ValueError for a batch without what the objective needs."""
        ...
