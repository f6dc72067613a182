"""Diffusion forcing: every chunk has a noise level of its own and reads the noisy chunks before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Window, check_window
from unspool.data.batch import Batch
from unspool.methods.base import StepResult
from unspool.methods.common import (
    FLOW,
    SigmaLaw,
    Student,
    Weight,
    check_share,
    check_weight,
    chosen,
    clean_latents,
    noise_like,
    student_only,
    velocity_loss,
)
from unspool.methods.past import NoisyPast, Positions, chunk_numbers


@dataclass(frozen=True, kw_only=True)
class DiffusionForcingConfig:
    """What decides the objective.

    Fields: `plan` chunks (endless: a batch says how many latent frames there are); `visibility` and `positions` what a
    chunk reads and where, as in the rollout; `sigma` law of each chunk's noise level; `weight` of the loss by sigma;
    `drop_text` probability that a sample loses its prompts; `clean_first` probability that chunk 0 is given clean, at
    sigma 0 and without loss; `backend` of the masked attention ("slices" on CPUs, "flex" on CUDA).
    """

    plan: ChunkPlan
    visibility: Full | Window
    sigma: SigmaLaw
    weight: Weight
    drop_text: float
    positions: Positions = field(default_factory=Absolute)
    clean_first: float = 0.0
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        check_window(self.visibility, self.plan.longest)
        check_weight(self.weight)
        check_share("drop_text", self.drop_text)
        check_share("clean_first", self.clean_first)


class DiffusionForcing:
    """E sum_k || v(x_k, sigma_k | x_j, sigma_j for j < k, text) - (noise_k - x0_k) ||^2, sigma_k independent per chunk.

    Source: arXiv:2407.01392 algorithm 1; per chunk as in arXiv:2412.07772 (implements `Method`; role "student").
    Arguments as `FlowMatching`.
    """

    def __init__(
        self,
        config: DiffusionForcingConfig,
        *,
        backbone: nn.Module,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        self.config = config
        self.student = Student(backbone, text, null_text)
        self._predict = NoisyPast(config)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        student_only(role)
        x0 = clean_latents(batch)
        size, frames = x0.shape[:2]
        chunk_of = chunk_numbers(self.config.plan, frames)
        if self.config.clean_first and chunk_of[-1] == 0:
            raise ValueError("clean_first gives chunk 0, but the clips have no other; use longer clips or 0")
        prompts = self.student.prompts_of(batch, chosen((size,), self.config.drop_text, rng))
        given = chosen((size,), self.config.clean_first, rng)[:, None] & (chunk_of == 0)
        sigma = self.config.sigma.draw((size, int(chunk_of[-1]) + 1), rng)[:, chunk_of].to(x0.dtype)
        sigma = sigma.masked_fill(given, 0.0)
        noise = noise_like(x0, rng)
        prediction = self._predict(self.student, FLOW.add_noise(x0, noise, sigma), sigma, prompts)
        weights = self.config.sigma.weigh(sigma, self.config.weight)
        return velocity_loss(prediction, FLOW.target(x0, noise, sigma), sigma, weights=weights, counted=~given)
