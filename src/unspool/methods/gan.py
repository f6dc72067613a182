"""Adversarial distillation: a discriminator on a video network's features tells the student's samples from data.

Where distribution matching asks two scores, this asks one question of noised clips. Source: arXiv:2506.08009 (the
GAN variant of Self-Forcing; arXiv:2501.05441 for the relativistic loss and its regularisation).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from unspool.causal.context import FullSequence
from unspool.data.batch import Batch
from unspool.methods.base import StepResult
from unspool.methods.common import FLOW, BatchPrompts, Contexts, Student, clean_latents, noise_like
from unspool.methods.dmd import same_latents
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.samples import NoisedDataConfig, Sample, Sampler
from unspool.methods.scores import Conditioner, ScoreLevels, alternating_roles, sample_for


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """What decides the training.

    Fields: `sample` where the student's samples come from; `levels` at which clips are judged; `relativistic`: a sample
    is compared with the data of its own prompt, else each is judged alone; `r1`, `r2` weights of the penalties on data
    and samples (published: 30 in the paper, 0.5 in code), `probe` the step of their finite difference (0.05; 0.01);
    `weight` of the student's loss; `taps` depths, as shares of the blocks, whose features are read (published: blocks
    13, 21 and 29 of 30); `ratio` updates of the discriminator for one of the student; `alone`: at the first so many
    steps the discriminator learns alone.
    """

    sample: NoisedDataConfig | OnPolicyConfig
    levels: ScoreLevels
    relativistic: bool = True
    r1: float = 30.0
    r2: float = 30.0
    probe: float = 0.05
    weight: float = 1.0
    taps: tuple[float, ...] = (0.45, 0.72, 1.0)
    ratio: int = 5
    alone: int = 0

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.alone < 0:
            raise ValueError(f"ratio={self.ratio}, alone={self.alone}: expected ratio >= 1 and alone >= 0")
        if not self.taps or not all(0.0 < tap <= 1.0 for tap in self.taps):
            raise ValueError(f"taps={self.taps}: expected depths above 0 and up to 1, such as 0.5 1.0")
        if min(self.r1, self.r2) < 0 or not self.probe > 0 or not self.weight > 0:
            raise ValueError(
                f"r1={self.r1}, r2={self.r2}, probe={self.probe}, weight={self.weight}: expected no negative number, "
                "and probe and weight above 0"
            )
        if isinstance(self.sample, OnPolicyConfig) and self.sample.is_long:
            raise ValueError(
                "sample.longest above frames: data has no clip that begins in a stream; leave longest at 0"
            )


class Heads(nn.Module):
    """Logits [b] from the features [b, tokens, width] of some depths: per depth a learned register attends to all of
    them, and what the registers read decides through two layers. In at least fp32, as penalties compare logits that
    hardly differ."""

    fsdp_fp32: ClassVar[bool] = True

    def __init__(self, depths: int, width: int, attention_heads: int) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(depths, width) / width**0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depths))
        self.readers = nn.ModuleList(
            nn.MultiheadAttention(width, attention_heads, batch_first=True) for _ in range(depths)
        )
        self.judge = nn.Sequential(
            nn.LayerNorm(depths * width), nn.Linear(depths * width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, found: Sequence[Tensor]) -> Tensor:
        wide = torch.promote_types(found[0].dtype, torch.float32)
        read = []
        with torch.autocast(found[0].device.type, enabled=False):
            for k, features in enumerate(found):
                keys = self.norms[k](features.to(wide))
                query = self.registers[k].to(wide).repeat(len(keys), 1, 1)
                read.append(self.readers[k](query, keys, keys, need_weights=False)[0][:, 0])
            logits: Tensor = self.judge(torch.cat(read, dim=1))[:, 0]
        return logits


class Discriminator(Student):
    """One logit per noised clip, from the features of a video network (`blocks`) at some depths; its `heads` are new,
    on the network's device."""

    def __init__(self, backbone: nn.Module, taps: tuple[float, ...], *, heads: int = 4) -> None:
        super().__init__(backbone)
        network: Any = backbone
        blocks = len(network.blocks)
        self._places = sorted({max(1, round(tap * blocks)) - 1 for tap in taps})
        width = int(network.config.dim)
        made = Heads(len(self._places), width, math.gcd(width, heads))  # drawn on the CPU: alike on every device
        self.heads = made.to(next(backbone.parameters()).device)

    def fsdp_units(self) -> list[nn.Module]:
        """What is sharded together, beside the network's own units."""
        return [self.heads]

    def forward(self, x: Any, sigma: Any = None, prompts: Any = None, context: Any = None) -> Any:
        """Logits [b] of clips `x` [b, t, c, h, w] at `sigma` [b, t]."""
        with self._tapped() as found:
            super().forward(x, sigma, prompts, context)
        return self.heads(found)

    @contextmanager
    def _tapped(self) -> Iterator[list[Tensor]]:
        """What the chosen blocks put out, in their order."""
        found: list[Tensor] = []
        blocks: Any = self.backbone.blocks
        hooks = [
            blocks[place].register_forward_hook(lambda module, given, out: found.append(out)) for place in self._places
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def judged(real: Tensor, sample: Tensor, *, relativistic: bool) -> tuple[Tensor, Tensor]:
    """(loss of the discriminator, loss of the student) from logits [b] of data and samples.

    Relativistic: softplus(-(r - f)) and softplus(-(f - r)); else the non-saturating pair softplus(-r) + softplus(f) and
    softplus(-f). Means over the batch.
    """
    if relativistic:
        return softplus(sample - real).mean(), softplus(real - sample).mean()
    return (softplus(-real) + softplus(sample)).mean(), softplus(-sample).mean()


def penalty(here: Tensor, there: Tensor, step: float) -> Tensor:
    """mean ((D(x + s e) - D(x)) / s)^2 for logits at x and at x + s e, e standard normal: in expectation |grad D|^2."""
    return ((there - here) / step).square().mean()


class Adversarial:
    """A few-step student against a discriminator (implements `Method`; roles "student" and "critic").

    The discriminator learns at every step, the student before it at every `ratio`-th. Args: `backbone` the student;
    `critic` the network whose features are judged, usually the teacher's weights; the rest as `DistributionMatching`.
    Raises ValueError where the networks do not fit each other, or batches hold shorter clips than are sampled.
    """

    def __init__(
        self,
        config: GanConfig,
        *,
        backbone: nn.Module,
        critic: nn.Module,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        same_latents(student=backbone, critic=critic)
        self.config = config
        self.student, self.discriminator = Student(backbone), Discriminator(critic, config.taps)
        self.conditioner = Conditioner(text, null_text)
        self.sampler = sampler or config.sample.build(None)
        self._whole = Contexts(FullSequence)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student, "critic": self.discriminator}

    def roles(self, step: int) -> tuple[str, ...]:
        return alternating_roles(step, ratio=self.config.ratio, alone=self.config.alone)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        sample = sample_for(role, self.sampler, self.student, self.conditioner, batch, rng)
        data = clean_latents(batch)
        if data.shape[1] != sample.latents.shape[1]:
            raise ValueError(
                f"clips of {data.shape[1]} latent frames, samples of {sample.latents.shape[1]}: expected as many; set "
                "sample.frames, or the length of the clips"
            )
        sigma = self.config.levels.draw(len(data), rng, sample.bounds)
        noise = noise_like(data, rng)  # the same for both: what differs is the clip
        real, own = (FLOW.add_noise(x, noise, sigma) for x in (data.to(sample.latents.dtype), sample.latents))
        if role == "student":
            with torch.no_grad():
                against = self._logits(real, sigma, sample)
            found = self._logits(own, sigma, sample)
            loss = self.config.weight * judged(against, found, relativistic=self.config.relativistic)[1]
            return StepResult(loss=loss, metrics={"loss": loss.detach(), "margin": (against - found.detach()).mean()})
        return self._critic_step(real, own.detach(), sigma, sample, rng)

    def _critic_step(
        self, real: Tensor, own: Tensor, sigma: Tensor, sample: Sample, rng: torch.Generator
    ) -> StepResult:
        c = self.config
        logits = [self._logits(x, sigma, sample) for x in (real, own)]
        loss = judged(*logits, relativistic=c.relativistic)[0]
        metrics = {"loss": loss.detach(), "margin": (logits[0] - logits[1]).detach().mean()}
        for name, weight, x, here in (("r1", c.r1, real, logits[0]), ("r2", c.r2, own, logits[1])):
            if weight:
                there = self._logits(x + c.probe * noise_like(x, rng).to(x.device, x.dtype), sigma, sample)
                found = penalty(here, there, c.probe)
                loss, metrics[name] = loss + weight * found, found.detach()
        return StepResult(loss=loss, metrics=metrics)

    def _logits(self, x: Tensor, sigma: Tensor, sample: Sample) -> Tensor:
        prompts: BatchPrompts = sample.prompts
        levels = sigma.expand(-1, x.shape[1]).to(torch.float32)
        logits: Tensor = self.discriminator(x, levels, prompts, self._whole[x.shape[1]])
        return logits
