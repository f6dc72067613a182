"""Flow matching of whole clips: one noise level per clip, every latent frame sees every other (the teacher)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unspool.causal.context import FullSequence
from unspool.data.batch import Batch
from unspool.methods.base import StepResult
from unspool.methods.common import (
    FLOW,
    Contexts,
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


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """What decides the objective.

    Fields: `sigma` law of the noise level; `weight` of the loss by sigma; `drop_text` probability that a sample loses
    its prompts (classifier-free guidance, arXiv:2207.12598); `clean_first` probability that latent frame 0 is given
    clean, at sigma 0 and without loss (image to video); `own_levels` probability that each latent frame of a clip has a
    noise level of its own instead of one for all (arXiv:2407.01392, here with every frame seeing every other): what
    persists in a clip is learnt sooner where some frames show it.
    """

    sigma: SigmaLaw
    weight: Weight
    drop_text: float
    clean_first: float = 0.0
    own_levels: float = 0.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_share("drop_text", self.drop_text)
        check_share("clean_first", self.clean_first)
        check_share("own_levels", self.own_levels)


class FlowMatching:
    """E || v(x, sigma, text) - (noise - x0) ||^2 with x = (1 - sigma) x0 + sigma noise, one sigma per clip.

    Source: arXiv:2209.03003 eq. 1, arXiv:2210.02747 (implements `Method`; role "student").

    Args: `backbone` the network; `text` a caption encoder that is trained along, or None for batches with text states,
    then with `null_text` [rows, channels] where prompts are dropped.
    """

    def __init__(
        self,
        config: FlowMatchingConfig,
        *,
        backbone: nn.Module,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        self.config = config
        self.student = Student(backbone, text, null_text)
        self._contexts = Contexts(FullSequence)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        student_only(role)
        x0 = clean_latents(batch)
        size, frames = x0.shape[:2]
        if self.config.clean_first and frames < 2:
            raise ValueError("clean_first gives latent frame 0, but the clips have no other; use longer clips or 0")
        prompts = self.student.prompts_of(batch, chosen((size,), self.config.drop_text, rng))
        given = chosen((size,), self.config.clean_first, rng)[:, None] & (torch.arange(frames) == 0)
        sigma = self.config.sigma.draw((size, 1), rng).expand(size, frames)
        noise = noise_like(x0, rng)
        has_own = chosen((size,), self.config.own_levels, rng)[:, None]
        sigma = torch.where(has_own, self.config.sigma.draw((size, frames), rng), sigma)
        sigma = sigma.to(x0.dtype).masked_fill(given, 0.0)
        prediction = self.student(FLOW.add_noise(x0, noise, sigma), sigma, prompts, self._contexts[frames])
        weights = self.config.sigma.weigh(sigma, self.config.weight)
        return velocity_loss(prediction, FLOW.target(x0, noise, sigma), sigma, weights=weights, counted=~given)
