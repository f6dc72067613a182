"""What decides a rollout, and what it yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from unspool.causal.cache.snapshot import describe
from unspool.causal.chunks import ChunkPlan
from unspool.causal.newer import NEWER, stated
from unspool.causal.position import Absolute, PositionPolicy, check_circle
from unspool.causal.visibility import Visibility, check_window
from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.process import Process
from unspool.diffusion.schedule import Schedule
from unspool.rollout.guidance import Guidance
from unspool.rollout.solvers.base import Solver
from unspool.rollout.solvers.fewstep import FewStep


class Cancelled(Exception):
    """A rollout was asked to stop between two passes; the chunk can be asked for again."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """All that decides what a rollout computes, besides network, prompts and noise.

    Fields: `plan` chunks; `schedule` denoising levels of every chunk, `first_schedule` of chunk 0 where it differs
    (None: the same); `visibility`, `positions`; `solver`, `guidance`, `process`; `sigma_commit` noise level told at
    the commit pass (the latents stay clean); `commit_noise` level to which the latents of a commit are noised, which
    is told `sigma_commit` all the same, while those handed out stay clean (Ca2-VDM's code); `commit`: "separate"
    (steps + 1 forwards a chunk), "fused" (in one forward with the next chunk's first step: steps forwards), "none"
    (the last step's K/V are kept: steps forwards), "recompute" (none is kept; every forward also holds the clean past).
    """

    plan: ChunkPlan
    schedule: Schedule
    visibility: Visibility
    positions: PositionPolicy = field(default_factory=Absolute)
    solver: Solver = field(default_factory=FewStep)
    guidance: Guidance = field(default_factory=Guidance)
    process: Process = field(default_factory=FlowMatching)
    first_schedule: Schedule | None = None
    sigma_commit: float = 0.0
    commit_noise: float = field(default=0.0, metadata=NEWER)
    commit: Literal["separate", "fused", "none", "recompute"] = "separate"

    def __post_init__(self) -> None:
        check_window(self.visibility, self.plan.longest)
        for name, value, kind in (
            ("visibility", self.visibility, Visibility),
            ("positions", self.positions, PositionPolicy),
            ("solver", self.solver, Solver),
            ("process", self.process, Process),
        ):
            if not isinstance(value, kind):
                raise ValueError(
                    f"{name}={value!r}: expected an object with the methods of {kind.__name__}; make one from a name "
                    "by unspool.config.locate(name, table)()"
                )
        process = getattr(self.solver, "process", self.process)  # a solver that uses no process has no say in it
        if process != self.process:
            raise ValueError(
                f"solver {self.solver} is made for {process}: expected {self.process}, the rollout's process"
            )
        for schedule in (self.schedule, self.first_schedule):
            if schedule is not None and schedule.sigmas[0] != 1.0:
                raise ValueError(
                    f"schedule starts at sigma {schedule.sigmas[0]}: a rollout begins with pure noise, sigma 1.0; "
                    "starting lower needs an input video"
                )
        for name, level in (("sigma_commit", self.sigma_commit), ("commit_noise", self.commit_noise)):
            if not 0.0 <= level <= 1.0:
                raise ValueError(f"{name}={level}: expected a noise level in [0, 1], 0 for clean")
        if self.commit not in ("separate", "fused", "none", "recompute"):
            raise ValueError(f"commit={self.commit!r}: expected 'separate', 'fused', 'none' or 'recompute'")
        check_circle(self.positions, self.visibility, self.plan.num_frames)
        if self.commit_noise and self.commit == "none":
            raise ValueError(
                f"commit_noise={self.commit_noise} with commit='none': there is no commit to be noised; use 0"
            )

    def schedule_of(self, chunk: int) -> Schedule:
        return self.first_schedule if chunk == 0 and self.first_schedule is not None else self.schedule

    @property
    def commit_step(self) -> int:
        """The number under which a noise source is asked for `commit_noise`: after those of all denoising steps."""
        first = self.first_schedule or self.schedule
        return max(self.schedule.num_steps, first.num_steps)

    @property
    def fingerprint(self) -> str:
        """What a snapshot must agree with."""
        parts = [f"{name}={describe(v) if hasattr(v, '__dict__') else v!r}" for name, v in stated(self).items()]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One finished chunk: `latents` [b, k, c, h, w], its `frames` in the stream, and the prompt it followed."""

    index: int
    frames: range
    latents: Tensor
    prompt: int
    switched: bool
