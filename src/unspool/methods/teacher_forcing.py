"""Teacher forcing: every noisy chunk is predicted from the clean chunks before it, all chunks in one forward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
from unspool.methods.draws import uniform
from unspool.methods.past import Clean, CleanPast, Positions, check_commit_level, chunk_numbers


@dataclass(frozen=True, kw_only=True)
class ContextNoise:
    """Slight noise on the clean copy, so that a rollout's own errors are not unknown to the student.

    Fields: `share` of the samples or chunks (`per`) that get it; `max_sigma`: their level is uniform in [0, max_sigma];
    `told`: "true" tells the network that level, "commit" tells it the rollout's `sigma_commit` as for clean latents,
    so that errors look to it like data.
    """

    share: float = 0.0
    max_sigma: float = 0.0
    per: Literal["sample", "chunk"] = "chunk"
    told: Literal["true", "commit"] = "true"

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_share("max_sigma", self.max_sigma)
        if bool(self.share) != bool(self.max_sigma):
            raise ValueError(
                f"share={self.share}, max_sigma={self.max_sigma}: one has no effect without the other; set both or "
                "neither"
            )
        if self.per not in ("sample", "chunk"):
            raise ValueError(f"per={self.per!r}: expected 'sample' or 'chunk'")
        if self.told not in ("true", "commit"):
            raise ValueError(f"told={self.told!r}: expected 'true' or 'commit'")


@dataclass(frozen=True, kw_only=True)
class TeacherForcingConfig:
    """What decides the objective.

    Fields: `plan`, `visibility`, `positions`, `sigma`, `weight`, `drop_text`, `backend` as `DiffusionForcingConfig`;
    `sigma_commit` the level that the network is told for the clean copy, that of the rollout's commit pass; `context`
    noise on the clean copy; `first_weight` the loss of the first chunk counts so much. What a clip begins with is
    mostly undetermined, so at high noise its error is many times that of a continuation, and its gradient drowns the
    one by which motion is learnt (docs/stage-model.md "What was tried"): below 1 where beginnings are known already.
    """

    plan: ChunkPlan
    visibility: Full | Window
    sigma: SigmaLaw
    weight: Weight
    drop_text: float
    positions: Positions = field(default_factory=Absolute)
    sigma_commit: float = 0.0
    context: ContextNoise = field(default_factory=ContextNoise)
    first_weight: float = 1.0
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        check_window(self.visibility, self.plan.longest)
        check_weight(self.weight)
        check_share("drop_text", self.drop_text)
        check_commit_level(self.sigma_commit)
        if not 0.0 <= self.first_weight < math.inf:
            raise ValueError(f"first_weight={self.first_weight}: expected a finite weight of at least 0")


class TeacherForcing:
    """E sum_k || v(x_k, sigma_k | x0_j for j < k, text) - (noise_k - x0_k) ||^2: what the cached rollout computes.

    The sequence is [clean | noisy]; clean chunks read each other as commit passes do, noisy ones read themselves and
    the clean ones before them. Noise on the clean copy is drawn for itself, never the noisy copy's, and its level is
    a sigma and no index of a grid (a published trainer takes small indices of a descending grid, near-pure noise).
    Source: arXiv:2412.07720, arXiv:2602.02214 stage 1 (implements `Method`; role "student"). Arguments
    as `FlowMatching`.
    """

    def __init__(
        self,
        config: TeacherForcingConfig,
        *,
        backbone: nn.Module,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        self.config = config
        self.student = Student(backbone, text, null_text)
        self._predict = CleanPast(config)

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
        prompts = self.student.prompts_of(batch, chosen((size,), self.config.drop_text, rng))
        sigma = self.config.sigma.draw((size, int(chunk_of[-1]) + 1), rng)[:, chunk_of].to(x0.dtype)
        noise = noise_like(x0, rng)
        clean = self._clean(x0, chunk_of, rng)
        prediction = self._predict(self.student, FLOW.add_noise(x0, noise, sigma), sigma, prompts, clean)
        weights = self.config.sigma.weigh(sigma, self.config.weight)
        if self.config.first_weight != 1.0:
            weights = weights * torch.where(chunk_of == 0, self.config.first_weight, 1.0)
        return velocity_loss(prediction, FLOW.target(x0, noise, sigma), sigma, weights=weights)

    def _clean(self, x0: Tensor, chunk_of: Tensor, rng: torch.Generator) -> Clean:
        """The clean copy, slightly noised where it is drawn, and the level that the network is told for it."""
        size, noise = len(x0), self.config.context
        shape = (size, int(chunk_of[-1]) + 1) if noise.per == "chunk" else (size, 1)
        which = chunk_of if noise.per == "chunk" else torch.zeros_like(chunk_of)
        noised = chosen(shape, noise.share, rng)[:, which]
        level = noise.max_sigma * uniform(shape, rng)[:, which]
        clean = torch.full_like(level, self.config.sigma_commit).to(x0.dtype)
        if not noise.share:
            return Clean(x0, clean)
        level = level.to(x0.dtype).masked_fill(~noised, 0.0)
        past = FLOW.add_noise(x0, noise_like(x0, rng), level)
        return Clean(past, torch.where(noised, level, clean) if noise.told == "true" else clean)
