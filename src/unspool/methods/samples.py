"""What a distribution loss scores: a student's samples, here those read off noised data (CausVid).

The student's own rollout (Self-Forcing) is in `unspool.methods.on_policy`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Window, check_window
from unspool.data.batch import Batch
from unspool.diffusion.schedule import Schedule, few_step, few_step_on_grid
from unspool.methods.common import FLOW, BatchPrompts, Student, clean_latents, noise_like
from unspool.methods.draws import uniform
from unspool.methods.past import NoisyPast, Positions, chunk_numbers
from unspool.models.base import Codec


@dataclass(frozen=True, kw_only=True)
class StepList:
    """The student's few denoising steps: `steps` on the timestep scale, a final 0 optional.

    Fields: `shift`: with `warp` the list indexes the shifted grid (`few_step`), with `warp=False` the steps are told as
    they are and their levels snap to it (`few_step_on_grid`, CausVid's 1000, 757, 522 at shift 8).
    """

    steps: tuple[float, ...]
    shift: float
    warp: bool = True

    def __post_init__(self) -> None:
        first = self.schedule.sigmas[0]
        if first != 1.0:
            raise ValueError(f"steps={self.steps} begin at sigma {first:.4f}: expected noise; begin at 1000")

    @property
    def schedule(self) -> Schedule:
        """The schedule of the rollout. It always ends at sigma 0."""
        make = few_step if self.warp else few_step_on_grid
        return make(self.steps, shift=self.shift)

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        """(sigma, what the network is told) at each entry of the schedule, the final 0 among them, float32."""
        schedule = self.schedule
        told = [*(step.conditioning for step in schedule.steps), 0.0]
        return torch.tensor(schedule.sigmas, dtype=torch.float32), torch.tensor(told, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Samples of a student.

    Fields: `latents` [b, t, c, h, w]; `counted` [b, t] latent frames that carry loss (None: all); `bounds` of sigma
    within which a score's level is drawn; `prompts`, `uncond` as the scores shall follow them.
    """

    latents: Tensor
    prompts: BatchPrompts
    uncond: BatchPrompts
    counted: Tensor | None = None
    bounds: tuple[float, float] = (0.0, 1.0)


class Sampler(Protocol):
    """What makes samples for a distribution loss. `steps` is the student's list."""

    @property
    def steps(self) -> StepList: ...

    def __call__(
        self, student: Student, batch: Batch, prompts: BatchPrompts, uncond: BatchPrompts, rng: torch.Generator
    ) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class NoisedDataConfig:
    """CausVid's samples (arXiv:2412.07772 section 4.3): data noised chunk by chunk, one causal forward.

    Fields: `steps`; `plan`, `visibility`, `positions` of the causal mask; `clean` whether a chunk may also be drawn at
    sigma 0, as published; `backend` of the masked attention.
    """

    steps: StepList
    plan: ChunkPlan
    visibility: Full | Window = field(default_factory=Full)
    positions: Positions = field(default_factory=Absolute)
    clean: bool = True
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        check_window(self.visibility, self.plan.longest)

    def build(self, codec: Codec[Any] | None = None) -> NoisedData:
        return NoisedData(self)


class NoisedData:
    """x0 of every chunk, read off data noised at random entries of the student's list (implements `Sampler`)."""

    def __init__(self, config: NoisedDataConfig) -> None:
        self.config = config
        self._predict = NoisyPast(config)

    @property
    def steps(self) -> StepList:
        return self.config.steps

    def __call__(
        self, student: Student, batch: Batch, prompts: BatchPrompts, uncond: BatchPrompts, rng: torch.Generator
    ) -> Sample:
        x0 = clean_latents(batch)
        sigma, told = drawn_levels(self.config.steps, self.config.plan, x0, rng, clean=self.config.clean)
        x = FLOW.add_noise(x0, noise_like(x0, rng), sigma)
        prediction = self._predict(student, x, told, prompts)
        return Sample(latents=FLOW.to_x0(x, prediction.to(x.dtype), sigma), prompts=prompts, uncond=uncond)


def drawn_levels(
    steps: StepList, plan: ChunkPlan, x0: Tensor, rng: torch.Generator, *, clean: bool
) -> tuple[Tensor, Tensor]:
    """(sigma, what the network is told) [b, t] in float32: per chunk one entry of the list, 0 among them if
    `clean`."""
    size, frames = x0.shape[:2]
    chunk_of = chunk_numbers(plan, frames)
    sigma, told = steps.levels
    count = len(sigma) - (not clean)
    which = (uniform((size, int(chunk_of[-1]) + 1), rng) * count).long()[:, chunk_of]
    return sigma[which], told[which]
