"""Distribution matching distillation: a few-step student learns from the difference of two scores.

`sample=` decides what is scored: data that was noised gives CausVid, the student's own rollout gives Self-Forcing. The
teacher may see the whole clip while the student is causal (asymmetric distillation, arXiv:2412.07772). Losses take the
sample and two estimates of clean latents and never see schedules; `unspool.methods.sid` has another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unspool.data.batch import Batch
from unspool.methods.base import StepResult
from unspool.methods.common import FLOW, Student, noise_like, velocity_loss
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.samples import NoisedDataConfig, Sample, Sampler
from unspool.methods.scores import Conditioner, Score, ScoreConfig, ScoreLevels, alternating_roles, sample_for
from unspool.methods.sid import Sid
from unspool.models.base import Codec
from unspool.shapes import to_device


class DistributionLoss(Protocol):
    """A loss of the student from its sample [b, t, c, h, w], with graph, and the two scores."""

    def __call__(self, sample: Sample, scores: Scores) -> StepResult: ...


class Scores:
    """What teacher and critic say of a sample that was noised once, at one level per sample.

    `teacher()` and `critic()` give x0 estimates [b, t, c, h, w]; `x`, `sigma` what they are given. A loss that
    differentiates through them (SiD) passes `grad=True`; otherwise they run without a graph.
    """

    def __init__(self, sample: Sample, x: Tensor, sigma: Tensor, teacher: Score, critic: Score) -> None:
        self._sample, self._teacher, self._critic = sample, teacher, critic
        self.x, self.sigma = x, sigma

    def teacher(self, *, grad: bool = False) -> Tensor:
        return self._ask(self._teacher, grad)

    def critic(self, *, grad: bool = False) -> Tensor:
        return self._ask(self._critic, grad)

    def _ask(self, score: Score, grad: bool) -> Tensor:
        sample, x = self._sample, self.x if grad else self.x.detach()
        with torch.set_grad_enabled(grad):
            return score.x0(x, self.sigma, sample.prompts, sample.uncond, sample.latents.detach())


def dmd_gradient(sample: Tensor, teacher: Tensor, critic: Tensor) -> Tensor:
    """(critic - teacher) / mean |sample - teacher|, the mean over each sample's latent frames, channels and places.

    arXiv:2311.18828 eq. 7-8 with the normaliser of the video successors: the teacher's distance to the sample, all of
    its latent frames, those without loss too. Zero where a value is not finite or the teacher returns the sample
    itself (published code makes the largest float of that).
    """
    distance = (sample.double() - teacher.double()).abs().flatten(1).mean(1)
    difference = critic.double() - teacher.double()
    gradient = difference / distance.reshape(-1, *(1,) * (sample.ndim - 1))
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(sample: Tensor, gradient: Tensor, counted: Tensor | None = None) -> Tensor:
    """0.5 mean (sample - stopgrad(sample - gradient))^2 in float64, over the `counted` [b, t] latent frames (on the
    CPU, or the host waits for them).

    Its gradient in the sample is `gradient` over the number of counted values.
    """
    wide = sample.double()
    error = (wide - (wide - gradient).detach()).square()
    if counted is None:
        return 0.5 * error.mean()
    rows = to_device(counted.flatten().nonzero()[:, 0], error.device)
    return 0.5 * error.flatten(0, 1).index_select(0, rows).mean()


@dataclass(frozen=True, kw_only=True)
class Dmd:
    """The loss of DMD (implements `DistributionLoss`)."""

    def __call__(self, sample: Sample, scores: Scores) -> StepResult:
        latents = sample.latents.detach()
        teacher, critic = scores.teacher(), scores.critic()
        gradient = dmd_gradient(latents, teacher, critic)
        # A single sample without a finite score counts as 0, as published. If none has one, so has the loss none, or
        # the training would go on as if nothing were wrong.
        lost = ~(torch.isfinite(teacher) & torch.isfinite(critic)).flatten(1).all(1)
        loss = dmd_loss(sample.latents, gradient, sample.counted) + torch.where(lost.all(), torch.nan, 0.0)
        metrics = {
            "loss": loss.detach(),
            "not_finite": lost.double().mean(),
            "gradient": gradient.abs().mean(),
            "teacher_distance": (latents - teacher).abs().mean(),
            "score_distance": (critic - teacher).abs().mean(),
        }
        return StepResult(loss=loss, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class DmdConfig:
    """What decides the training.

    Fields: `sample` where the student's samples come from; `levels` at which scores are compared, `critic_levels` at
    which the critic is trained (None: the same law, its own draws); `teacher`, `critic` how they are asked; `ratio`
    critic updates for one of the student (published: 5); `alone`: at the first so many steps the critic learns alone;
    `loss` of the student.
    """

    sample: NoisedDataConfig | OnPolicyConfig
    levels: ScoreLevels
    teacher: ScoreConfig
    critic: ScoreConfig = field(default_factory=ScoreConfig)
    critic_levels: ScoreLevels | None = None
    ratio: int = 5
    alone: int = 0
    loss: Dmd | Sid = field(default_factory=Dmd)

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.alone < 0:
            raise ValueError(f"ratio={self.ratio}, alone={self.alone}: expected ratio >= 1 and alone >= 0")


class DistributionMatching:
    """A few-step student against a frozen teacher, with a critic that follows the student (implements `Method`).

    Roles: "critic" at every step, "student" before it at every `ratio`-th. Sources: arXiv:2311.18828, arXiv:2405.14867
    (critic updates), arXiv:2412.07772 (causal student), arXiv:2506.08009 (rollouts).

    Args: `backbone` the student; `teacher`, `critic` networks of the same latents, the critic begins as the teacher's
    copy; `text` a caption encoder, which does not learn here, or None for batches with text states, then with
    `null_text` [rows, channels]; `sampler` instead of what `config.sample` builds; `codec` for rollouts longer than
    what is scored. Raises ValueError where the networks do not fit each other.
    """

    def __init__(
        self,
        config: DmdConfig,
        *,
        backbone: nn.Module,
        teacher: nn.Module,
        critic: nn.Module,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
        sampler: Sampler | None = None,
        codec: Codec[Any] | None = None,
    ) -> None:
        same_latents(student=backbone, teacher=teacher, critic=critic)
        self.config = config
        self.student, self.critic_network = Student(backbone), Student(critic)
        self.teacher_network = Student(teacher.requires_grad_(False))
        self.conditioner = Conditioner(text, null_text)
        self.sampler = sampler or config.sample.build(codec)
        self.teacher = Score(config.teacher, self.teacher_network)
        self.critic = Score(config.critic, self.critic_network)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student, "critic": self.critic_network}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """Networks that are used and not trained; the loop places and shards them."""
        return {"teacher": self.teacher_network}

    def roles(self, step: int) -> tuple[str, ...]:
        return alternating_roles(step, ratio=self.config.ratio, alone=self.config.alone)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        sample = sample_for(role, self.sampler, self.student, self.conditioner, batch, rng)
        if role == "critic":
            return self._critic_step(sample, rng)
        sigma = self.config.levels.draw(len(sample.latents), rng, sample.bounds)
        x = FLOW.add_noise(sample.latents, noise_like(sample.latents, rng), sigma)
        return self.config.loss(sample, Scores(sample, x, sigma, self.teacher, self.critic))

    def _critic_step(self, sample: Sample, rng: torch.Generator) -> StepResult:
        latents = sample.latents.detach()
        levels = self.config.critic_levels or self.config.levels
        sigma = levels.draw(len(latents), rng, sample.bounds)
        noise = noise_like(latents, rng)
        x = FLOW.add_noise(latents, noise, sigma)
        prediction = self.critic.velocity(x, sigma, sample.prompts, latents)
        every = sigma.expand(-1, latents.shape[1])
        return velocity_loss(
            prediction, FLOW.target(latents, noise, sigma), every, weights=torch.ones_like(every),
            counted=sample.counted,
        )  # fmt: skip


def same_latents(**networks: nn.Module) -> None:
    """Raise ValueError unless all networks have latents of the same channels and patch size."""
    found = {
        role: (getattr(net, "latent_channels", None), _patch(net))
        for role, net in networks.items()
        if hasattr(net, "latent_channels")
    }
    if len(set(found.values())) > 1:
        told = ", ".join(f"{role}: {count} channels, patches of {patch}" for role, (count, patch) in found.items())
        raise ValueError(f"networks of different latents ({told}); expected those of one codec: train or convert one")


def _patch(network: nn.Module) -> object:
    return getattr(getattr(network, "config", None), "patch_size", None)
