"""Networks with a formula instead of weights, for the losses of distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unspool.causal.chunks import ChunkPlan
from unspool.data.batch import Batch
from unspool.methods.common import BatchPrompts, Student
from unspool.methods.consistency import CausalConsistency, ConsistencyConfig
from unspool.methods.samples import Sample, StepList
from unspool.models.base import Conditioning, Prompts, Text


class Formula(nn.Module):
    """`said` stands for the prompt: the first number of its states is 1, that of the unconditional one is 0."""

    def prepare(self, text: Text) -> Prompts:
        return Prompts(keys=(text.states,), values=(text.states,))

    @staticmethod
    def said(cond: Conditioning) -> Tensor:
        return cond.prompts.keys[0][:, 0, 0, 0].reshape(-1, 1, 1, 1, 1)


class LinearTeacher(Formula):
    """velocity = A x + (b | b_uncond) + sigma c + 0.1 past."""

    def __init__(self, d: dict[str, Tensor]) -> None:
        super().__init__()
        self.d = d

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        clean, noisy = x.chunk(2, dim=1)
        d = {name: torch.cat([t] * (len(x) // len(t))) for name, t in self.d.items() if t.ndim == 5}
        level = sigma[:, clean.shape[1] :, None, None, None]
        b = torch.where(self.said(cond) > 0, d["b_cond"], d["b_uncond"])
        return torch.cat([clean, d["A"] * noisy + b + level * d["c_time"] + 0.1 * clean], dim=1)


class LinearStudent(Formula):
    """velocity = a x + b + 0.1 past, so that x0 = x - sigma velocity."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        clean, noisy = x.chunk(2, dim=1)
        return torch.cat([clean, self.a * noisy + self.b + 0.1 * clean], dim=1)


def said(batch: int, spoken: bool = True) -> BatchPrompts:
    """Prompts that `Formula` takes for the given (or the unconditional) one."""
    return BatchPrompts(states=torch.full((batch, 1, 1, 1), float(spoken)))


def consistency_of(
    d: dict[str, Tensor], *, grid: int, shift: float, guidance: float
) -> tuple[Callable[[int], Tensor], LinearStudent]:
    """A method over the record's stub networks: (loss at a number of the grid, the student)."""
    student = LinearStudent(d["student_A"], d["student_b"])
    config = ConsistencyConfig(grid=grid, shift=shift, guidance_from_uncond=guidance, plan=ChunkPlan(chunk=3))
    method = CausalConsistency(
        config, backbone=student, teacher=LinearTeacher(d), average=LinearStudent(d["ema_A"], d["ema_b"]),
        null_text=torch.zeros(1, 1),
    )  # fmt: skip
    size, frames = d["clean"].shape[:2]

    def loss(index: int) -> Tensor:
        which = torch.full((size, frames), index)
        return method.loss(d["clean"], d["noise"], which, said(size), said(size, False))

    return loss, student


class Gaussian(Formula):
    """The optimal velocity for scalar data N(mean, exp(log_std)^2); the prompt adds `shift_said` to the mean."""

    latent_channels = 1

    def __init__(self, mean: float, std: float, shift_said: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())
        self.shift_said = shift_said

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        level = sigma.double()[..., None, None, None]
        keep, variance = 1 - level, (2 * self.log_std).exp()
        mean = self.mean + self.shift_said * self.said(cond)
        off = x.double() - keep * mean
        total = keep**2 * variance + level**2
        # E[noise | x] - E[x0 | x]
        return (level - keep * variance) / total * off - mean


@dataclass(frozen=True)
class GaussianSampler:
    """Samples mean + std z of a `Gaussian` student, each value for itself (implements `Sampler`)."""

    frames: int = 2
    steps: StepList = StepList(steps=(1000.0,), shift=1.0)  # noqa: RUF009

    def __call__(
        self, student: Student, batch: Batch, prompts: BatchPrompts, uncond: BatchPrompts, rng: torch.Generator
    ) -> Sample:
        z = torch.randn(len(batch), self.frames, 1, 1, 1, generator=rng, dtype=torch.float64)
        own: Any = student.backbone
        latents = student(lambda: own.mean + own.log_std.exp() * z)
        return Sample(latents=latents, prompts=prompts, uncond=uncond)
