"""Causal consistency distillation: a few-step causal student from a causal many-step teacher, without stored paths."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Window, check_window
from unspool.data.batch import Batch
from unspool.diffusion.schedule import Schedule
from unspool.diffusion.schedule import uniform as uniform_schedule
from unspool.methods.base import Follower, StepResult
from unspool.methods.common import FLOW, BatchPrompts, Student, clean_latents, noise_like, student_only
from unspool.methods.dmd import same_latents
from unspool.methods.draws import uniform
from unspool.methods.past import Clean, CleanPast, Positions, check_commit_level, chunk_numbers
from unspool.methods.scores import Conditioner, joined
from unspool.rollout.guidance import combine
from unspool.shapes import to_device


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """What decides the objective.

    Fields: `grid` points and `shift` of the teacher's schedule (published: 48, 5); `guidance_from_uncond`: s in
    uncond + s (cond - uncond) of the teacher's step (3); `decay` of the average that gives the target (0.99); `plan`,
    `visibility`, `positions`, `sigma_commit` as teacher and student were trained; `per_chunk` draws a level for every
    chunk instead of one for the clip; `to_end` also draws the last interval, whose target is where the teacher ends:
    published code leaves it out, and then a constant x0 is as consistent as the right one.
    """

    grid: int
    shift: float
    guidance_from_uncond: float
    plan: ChunkPlan
    decay: float = 0.99
    visibility: Full | Window = field(default_factory=Full)
    positions: Positions = field(default_factory=Absolute)
    sigma_commit: float = 0.0
    per_chunk: bool = False
    to_end: bool = True
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        check_window(self.visibility, self.plan.longest)
        check_commit_level(self.sigma_commit)
        if self.grid < 2:
            raise ValueError(f"grid={self.grid}: expected at least 2 points")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay={self.decay}: expected a number in [0, 1)")
        uniform_schedule(self.grid, shift=self.shift)

    @property
    def schedule(self) -> Schedule:
        return uniform_schedule(self.grid, shift=self.shift)


class CausalConsistency:
    """E || x0_student(x_t | past) - x0_average(x_next | past) ||^2, x_next one guided step of the teacher from x_t.

    At the last point of the grid x_next is the target itself. All three networks read the clean clip as the past.
    Levels are floats of the schedule: published code rounds them to bfloat16, which makes some steps 1.6 times too
    long. Source: arXiv:2602.02214 stage 2, arXiv:2303.01469 (implements `Method`; role "student"). Arguments as
    `DistributionMatching`; `average` is the student's copy where none is given.
    """

    def __init__(
        self,
        config: ConsistencyConfig,
        *,
        backbone: nn.Module,
        teacher: nn.Module,
        average: nn.Module | None = None,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        average = copy.deepcopy(backbone) if average is None else average
        same_latents(student=backbone, teacher=teacher, average=average)
        self.config = config
        self.student = Student(backbone)
        self.teacher = Student(teacher.requires_grad_(False))
        self.average = Student(average.requires_grad_(False))
        self.conditioner = Conditioner(text, null_text)
        self._predict = CleanPast(config)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    @property
    def followers(self) -> Mapping[str, Follower]:
        return {"average": Follower(network=self.average, role="student", decay=self.config.decay)}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        student_only(role)
        x0 = clean_latents(batch)
        size, frames = x0.shape[:2]
        chunk_of = chunk_numbers(self.config.plan, frames)
        prompts, uncond = self.conditioner(batch)
        # the same draws whether they are used per chunk or not
        which = (uniform((size, int(chunk_of[-1]) + 1), rng) * (self.config.grid - (not self.config.to_end))).long()
        which = which[:, chunk_of] if self.config.per_chunk else which[:, :1].expand(size, frames)
        loss = self.loss(x0, noise_like(x0, rng), which, prompts, uncond)
        return StepResult(loss=loss, metrics={"loss": loss.detach()})

    def loss(self, x0: Tensor, noise: Tensor, which: Tensor, prompts: BatchPrompts, uncond: BatchPrompts) -> Tensor:
        """The loss for given noise and numbers `which` [b, t] of the grid."""
        grid = torch.tensor(self.config.schedule.sigmas)
        sigma, after = grid[which].to(torch.float32), grid[which + 1].to(torch.float32)
        x = FLOW.add_noise(x0, noise, sigma)
        with torch.no_grad():
            following = self._euler(x, x0, sigma, after, prompts, uncond)
            target = self._x0(self.average, following, x0, after, prompts)
        return (self._x0(self.student, x, x0, sigma, prompts) - target).square().mean()

    def _euler(
        self, x: Tensor, past: Tensor, sigma: Tensor, after: Tensor, prompts: BatchPrompts, uncond: BatchPrompts
    ) -> Tensor:
        scale = self.config.guidance_from_uncond
        if scale == 1.0:
            velocity = self._velocity(self.teacher, x, past, sigma, prompts)
        else:
            x2, past2, sigma2 = (torch.cat([value, value]) for value in (x, past, sigma))
            with_text, without = self._velocity(self.teacher, x2, past2, sigma2, joined(prompts, uncond)).chunk(2)
            velocity = combine(with_text, without, scale)
        step = to_device(after - sigma, x.device)[..., None, None, None]
        return x + step * velocity

    def _x0(self, network: Student, x: Tensor, past: Tensor, sigma: Tensor, prompts: BatchPrompts) -> Tensor:
        return FLOW.to_x0(x, self._velocity(network, x, past, sigma, prompts), sigma)

    def _velocity(self, network: Student, x: Tensor, past: Tensor, sigma: Tensor, prompts: BatchPrompts) -> Tensor:
        return self._predict(network, x, sigma, prompts, Clean(past, self.config.sigma_commit)).to(x.dtype)
