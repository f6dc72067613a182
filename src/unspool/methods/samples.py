"""Where a distribution loss gets the student's samples: noised data (CausVid) or its own rollout (Self-Forcing).

Both take a batch and give x0 estimates of the student, with their graph where the grad mode asks for it. What a chunk
may read is cut from the graph by construction: commit passes keep none (arXiv:2506.08009 says so; its published code
lets gradients through the exit step's keys). `through_kv` asks for them instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend, FullSequence
from unspool.causal.mask import causal_mask, teacher_forcing_mask
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Window, check_window
from unspool.data.batch import Batch
from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.schedule import Schedule, few_step, few_step_on_grid, unshift_sigma
from unspool.methods.common import FLOW, BatchPrompts, Contexts, Student, clean_latents, noise_like
from unspool.methods.diffusion_forcing import chunk_numbers
from unspool.methods.draws import normal, shared_integer, uniform
from unspool.methods.scores import Positions
from unspool.ops.transfer import to_device
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout
from unspool.rollout.settings import RolloutConfig
from unspool.rollout.solvers.base import Noise, Solver, SolverState
from unspool.rollout.solvers.fewstep import FewStep


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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Samples of a student.

    Fields: `latents` [b, t, c, h, w]; `counted` [b, t] latent frames that carry loss (None: all); `bounds` within which
    a score's level is drawn before its shift; `prompts`, `uncond` as the scores shall follow them.
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

    def build(self) -> NoisedData:
        return NoisedData(self)


class NoisedData:
    """x0 of every chunk, read off data noised at random entries of the student's list (implements `Sampler`)."""

    def __init__(self, config: NoisedDataConfig) -> None:
        self.config = config
        self._contexts = Contexts(self._context)

    @property
    def steps(self) -> StepList:
        return self.config.steps

    def _context(self, frames: int) -> FullSequence:
        c = self.config
        return FullSequence(frames, causal_mask(c.plan, frames, c.visibility, c.positions), backend=c.backend)

    def __call__(
        self, student: Student, batch: Batch, prompts: BatchPrompts, uncond: BatchPrompts, rng: torch.Generator
    ) -> Sample:
        x0 = clean_latents(batch)
        sigma, told = drawn_levels(self.config.steps.schedule, self.config.plan, x0, rng, clean=self.config.clean)
        x = FLOW.add_noise(x0, noise_like(x0, rng), sigma)
        prediction = student(x, told, prompts, self._contexts[x0.shape[1]])
        return Sample(latents=FLOW.to_x0(x, prediction.to(x.dtype), sigma), prompts=prompts, uncond=uncond)


def drawn_levels(
    schedule: Schedule, plan: ChunkPlan, x0: Tensor, rng: torch.Generator, *, clean: bool
) -> tuple[Tensor, Tensor]:
    """(sigma, what the network is told) [b, t] in float32: per chunk one entry of the schedule, 0 among them if
    `clean`."""
    size, frames = x0.shape[:2]
    chunk_of = chunk_numbers(plan, frames)
    count = schedule.num_steps + clean
    which = (uniform((size, int(chunk_of[-1]) + 1), rng) * count).long()[:, chunk_of]
    levels = torch.tensor(schedule.sigmas)
    told = torch.tensor([*(step.conditioning for step in schedule.steps), 0.0])
    return levels[which].float(), told[which].float()


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Self-Forcing's samples (arXiv:2506.08009 algorithm 1): the student's own rollout through its cache.

    Fields: `steps`; `plan` chunks; `frames` latent frames of the rollout; `latent_size` (rows, columns), None takes
    that of the batch; `visibility`, `positions`, `sigma_commit` as the student will stream; `exit` "random": all chunks
    and samples end at one drawn step, whose estimate is the sample, "last": the last; `restrict` draws the score's
    level between the exit step's and the next one's only (`ts_schedule` of the published code); `through_kv` gradients
    reach what later chunks read: the rollout is replayed in one parallel forward over its own latents (SGF,
    arXiv:2607.20368).
    """

    steps: StepList
    plan: ChunkPlan
    frames: int
    latent_size: tuple[int, int] | None = None
    visibility: Full | Window = field(default_factory=Full)
    positions: Positions = field(default_factory=Absolute)
    sigma_commit: float = 0.0
    exit: Literal["random", "last"] = "random"
    restrict: bool = False
    through_kv: bool = False
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        chunk_numbers(self.plan, self.frames)
        ends = [c.stop for c in self.plan.chunks(0, self.frames)]
        if not ends or ends[-1] != self.frames:
            raise ValueError(f"frames={self.frames} ends inside a chunk of {self.plan}; use whole chunks")
        if self.exit not in ("random", "last"):
            raise ValueError(f"exit={self.exit!r}: expected 'random' or 'last'")
        self.rollout(self.steps.schedule)

    def rollout(self, schedule: Schedule) -> RolloutConfig:
        """The rollout with another schedule."""
        return RolloutConfig(
            plan=self.plan, schedule=schedule, visibility=self.visibility, positions=self.positions,
            sigma_commit=self.sigma_commit,
        )  # fmt: skip

    def build(self) -> OnPolicy:
        return OnPolicy(self)


class OnPolicy:
    """The student's rollout, ended at a random step (implements `Sampler`)."""

    def __init__(self, config: OnPolicyConfig) -> None:
        self.config = config
        self._contexts = Contexts(self._context)

    @property
    def steps(self) -> StepList:
        return self.config.steps

    def _context(self, frames: int) -> FullSequence:
        c = self.config
        mask = teacher_forcing_mask(c.plan, frames, c.visibility, c.positions)
        return FullSequence(2 * frames, mask, backend=c.backend)

    def __call__(
        self, student: Student, batch: Batch, prompts: BatchPrompts, uncond: BatchPrompts, rng: torch.Generator
    ) -> Sample:
        c = self.config
        full = c.steps.schedule
        count = full.num_steps
        drawn = shared_integer(count, rng)  # ranks that made different numbers of forwards would wait for ever
        last = count - 1 if c.exit == "last" else drawn
        prompts, uncond = self._aligned(prompts), self._aligned(uncond)
        shape = self._shape(student, batch, prompts)
        noise = normal((shape[0], last + 1, *shape[1:]), rng)
        noise = noise.to(next(student.parameters()).device)
        run = _Run(c, Schedule((*full.sigmas[: last + 1], 0.0), told(full, last)), prompts, noise)
        replays = c.through_kv and torch.is_grad_enabled()  # its values are those of the rollout
        latents = student(lambda: run.replay(student, self._contexts) if replays else run.latents(student))
        return Sample(latents=latents, prompts=prompts, uncond=uncond, bounds=self._bounds(full, last))

    def _bounds(self, full: Schedule, last: int) -> tuple[float, float]:
        if not self.config.restrict:
            return 0.0, 1.0
        shift = self.config.steps.shift
        return unshift_sigma(full.sigmas[last + 1], shift), unshift_sigma(full.sigmas[last], shift)

    def _shape(self, student: Student, batch: Batch, prompts: BatchPrompts) -> tuple[int, int, int, int, int]:
        backbone: Any = student.backbone
        size = self.config.latent_size
        if size is None:
            batch.need("latents")
            assert batch.latents is not None
            size = (batch.latents.shape[3], batch.latents.shape[4])
        assert prompts.states is not None
        return (prompts.states.shape[0], self.config.frames, backbone.latent_channels, *size)

    def _aligned(self, prompts: BatchPrompts) -> BatchPrompts:
        """Prompts as a rollout can follow them: one for each chunk, that of its last latent frame."""
        frames, index = self.config.frames, prompts.index
        if index is None:
            return prompts
        if index.shape[1] < frames:
            raise ValueError(f"prompts of {index.shape[1]} latent frames for a rollout of {frames}; use longer clips")
        last = torch.tensor([chunk.stop - 1 for chunk in self.config.plan.chunks(0, frames) for _ in chunk])
        return BatchPrompts(states=prompts.states, index=index.cpu()[:, last])


def told(schedule: Schedule, last: int) -> tuple[float, ...] | None:
    """What the network is told at the first steps of a schedule, up to `last`."""
    return None if schedule.conditioning is None else schedule.conditioning[: last + 1]


class _Run:
    """One rollout whose last step is the sample."""

    def __init__(self, config: OnPolicyConfig, schedule: Schedule, prompts: BatchPrompts, noise: Tensor) -> None:
        self.config, self.schedule, self.prompts = config, schedule, prompts
        self.noise = noise  # [b, steps, t, c, h, w]

    def latents(self, student: Student, solver: Solver | None = None) -> Tensor:
        """The rollout; the last denoising pass of each chunk keeps its graph where gradients are on."""
        config = self.config.rollout(self.schedule)
        if solver is not None:
            config = replace(config, solver=solver)
        last = self.schedule.num_steps - 1
        initial, renoise = self.noise[:, 0], self.noise[:, 1:].transpose(0, 1)
        backbone: Any = student.backbone
        stream = Rollout(
            backbone,
            config,
            timeline(self.prompts, self.config.plan, self.config.frames),
            noise=RecordedNoise(initial, renoise if last else None),
            latent_size=(initial.shape[-2], initial.shape[-1]),
            grad=lambda chunk, step: step == last,
        )
        count = len(list(self.config.plan.chunks(0, self.config.frames)))
        return torch.cat([stream.next_chunk().latents for _ in range(count)], dim=1)

    def replay(self, student: Student, contexts: Contexts) -> Tensor:
        """The same latents with gradients through what later chunks read: the rollout without a graph, then one
        teacher-forced forward over [its latents | its states before the last step]."""
        keeper = _Keeper()
        with torch.no_grad():
            latents = self.latents(student, keeper)
        before = torch.cat(keeper.before, dim=1)
        frames, step = before.shape[1], self.schedule.steps[-1]
        levels = torch.tensor([[self.config.sigma_commit] * frames + [step.conditioning] * frames])
        states = self.prompts.states
        assert states is not None
        both = torch.cat([latents, before], dim=1)
        prediction = student.forward(both, levels.expand(len(both), -1), self.prompts.doubled(), contexts[frames])
        return FLOW.to_x0(before, prediction[:, frames:].to(before.dtype), step.sigma)


class _Keeper:
    """The few-step solver; keeps what each chunk was before its last step (implements `Solver`)."""

    needs_noise: ClassVar[bool] = True
    process: ClassVar[FlowMatching] = FLOW

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self._solver = FewStep()

    def start(self) -> SolverState:
        return self._solver.start()

    def step(
        self, x: Tensor, x0: Tensor, sigma: float, next_sigma: float, noise: Noise, state: SolverState
    ) -> tuple[Tensor, SolverState]:
        if next_sigma == 0.0:
            self.before.append(x.detach())
        return self._solver.step(x, x0, sigma, next_sigma, noise, state)


def timeline(prompts: BatchPrompts, plan: ChunkPlan, frames: int) -> PromptTimeline:
    """The prompts of a batch in time, those of each sample; keys of the past are kept.

    Every chunk begins its own texts, changed or not: sharded networks gather weights to prepare them, and all ranks
    must do so equally often.
    """
    states, index = prompts.states, prompts.index
    assert states is not None
    if index is None:
        return PromptTimeline(states[:, 0])
    rows = torch.arange(len(states), device=states.device)
    starts = [chunk.start for chunk in plan.chunks(0, frames)]
    texts = [states[rows, to_device(index[:, start], states.device)] for start in starts]
    switches = [Switch(frame=f, text=text, policy="keep") for f, text in zip(starts[1:], texts[1:], strict=True)]
    return PromptTimeline(texts[0], switches)


__all__: Sequence[str] = [
    "NoisedData", "NoisedDataConfig", "OnPolicy", "OnPolicyConfig", "Sample", "Sampler", "StepList", "drawn_levels",
    "timeline",
]  # fmt: skip
