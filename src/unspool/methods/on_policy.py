"""Samples of a student's own rollout: Self-Forcing, and long streams of which the end is scored.

What a chunk may read is cut from the graph by construction: commit passes keep none (arXiv:2506.08009 says so; its
published code lets gradients through the exit step's keys). `through_kv` asks for them instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Window
from unspool.data.batch import Batch
from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.schedule import Schedule
from unspool.methods.common import FLOW, BatchPrompts, Student
from unspool.methods.draws import normal, shared_integer
from unspool.methods.past import Clean, CleanPast, Positions, chunk_numbers
from unspool.methods.samples import Sample, StepList
from unspool.models.base import Codec
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.prompts import PromptTimeline, Switch, SwitchPolicy
from unspool.rollout.rollout import Rollout
from unspool.rollout.settings import RolloutConfig
from unspool.rollout.solvers.base import Noise, Solver, SolverState
from unspool.rollout.solvers.fewstep import FewStep
from unspool.shapes import to_device


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Self-Forcing's samples (arXiv:2506.08009 algorithm 1): the student's own rollout through its cache.

    Fields: `steps`; `plan` chunks; `frames` latent frames of the rollout; `latent_size` (rows, columns), None takes
    that of the batch; `visibility`, `positions`, `sigma_commit` as the student will stream; `exit` "random": all chunks
    and samples end at one drawn step, whose estimate is the sample, "last": the last; `restrict` draws the score's
    level between the exit step's and the next one's only (`ts_schedule` of the published code); `through_kv` gradients
    reach what later chunks read: the rollout is replayed in one parallel forward over its own latents (SGF,
    arXiv:2607.20368).

    Long tuning (arXiv:2509.22622): with `longest` above `frames` each step draws a length in whole chunks between the
    two; the last `frames` latent frames are the sample, what came before has no graph. Scores know clips from their
    beginning only, so latent frame 0 of a later window is made anew from the last pixel frame that it stands for
    (`opening`), and its first chunk carries no loss. `switch`: probability that the prompt of a long rollout changes,
    to the next prompt of the same clip where it has one, at one of the scored chunks or the one before them, where a
    change teaches most; `switch_policy` what is done to the past then.
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
    longest: int = 0
    switch: float = 0.0
    switch_policy: SwitchPolicy = "keep"
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        for name, frames in (("frames", self.frames), ("longest", max(self.longest, self.frames))):
            chunk_numbers(self.plan, frames)
            ends = [c.stop for c in self.plan.chunks(0, frames)]
            if not ends or ends[-1] != frames:
                raise ValueError(f"{name}={frames} ends inside a chunk of {self.plan}; use whole chunks")
        if self.is_long and (self.plan.first not in (None, self.plan.chunk) or self.through_kv):
            raise ValueError("longest above frames: expected chunks of one length, and through_kv=false")
        if self.is_long and self.frames < 2 * self.plan.chunk:
            raise ValueError(f"longest above frames={self.frames}: expected at least two chunks, the first has no loss")
        if not 0.0 <= self.switch <= 1.0 or (self.switch and not self.is_long):
            raise ValueError(f"switch={self.switch}: expected a probability, and longest above frames to change in")
        if self.exit not in ("random", "last"):
            raise ValueError(f"exit={self.exit!r}: expected 'random' or 'last'")
        self.rollout(self.steps.schedule)

    def rollout(self, schedule: Schedule) -> RolloutConfig:
        """The rollout with another schedule."""
        return RolloutConfig(
            plan=self.plan, schedule=schedule, visibility=self.visibility, positions=self.positions,
            sigma_commit=self.sigma_commit,
        )  # fmt: skip

    @property
    def is_long(self) -> bool:
        """Whether rollouts may be longer than what is scored."""
        return self.longest > self.frames

    def build(self, codec: Codec[Any] | None = None) -> OnPolicy:
        return OnPolicy(self, codec)


class OnPolicy:
    """The student's rollout, ended at a random step (implements `Sampler`)."""

    def __init__(self, config: OnPolicyConfig, codec: Codec[Any] | None = None) -> None:
        if config.is_long and codec is None:
            raise ValueError(
                "rollouts longer than what is scored need the codec, for the window's first latent frame; pass codec="
            )
        if config.is_long and getattr(getattr(codec, "config", None), "padding", "start") != "start":
            raise ValueError(
                "longest above frames: latent frame 0 of this codec has seen later frames (it pads at the end), so a "
                "window inside a stream cannot be opened; use a codec that pads at the start"
            )
        self.config, self.codec = config, codec
        self._predict = CleanPast(config)

    @property
    def steps(self) -> StepList:
        return self.config.steps

    def __call__(
        self, student: Student, batch: Batch, prompts: BatchPrompts, uncond: BatchPrompts, rng: torch.Generator
    ) -> Sample:
        c = self.config
        full = c.steps.schedule
        # what all ranks draw alike: ranks that made different numbers of forwards would wait for each other for ever
        drawn = shared_integer(full.num_steps, rng)
        last = full.num_steps - 1 if c.exit == "last" else drawn
        lead = self._lead(rng)
        turn = self._turn(lead, rng)
        shape = self._shape(student, batch, prompts)
        prompts, uncond = (self._aligned(p, lead, turn) for p in (prompts, uncond))
        noise = normal((shape[0], last + 1, lead + shape[1], *shape[2:]), rng)
        noise = to_device(noise, next(student.parameters()).device)
        run = _Run(c, Schedule((*full.sigmas[: last + 1], 0.0), told(full, last)), prompts, noise, lead, turn)
        replays = c.through_kv and torch.is_grad_enabled()  # its values are those of the rollout
        latents = student(lambda: run.replay(student, self._predict) if replays else run.latents(student))
        sample = Sample(latents=latents, prompts=prompts, uncond=uncond, bounds=self._bounds(full, last))
        return self._window(sample, lead) if lead else sample

    # ---- long rollouts -----------------------------------------------------------------------------------------

    def _lead(self, rng: torch.Generator) -> int:
        """Latent frames before the scored ones."""
        c = self.config
        chunks = (c.longest - c.frames) // c.plan.chunk if c.is_long else 0
        return c.plan.chunk * shared_integer(chunks + 1, rng) if chunks else 0

    def _turn(self, lead: int, rng: torch.Generator) -> int | None:
        """The latent frame at which prompts change, None for none; both draws are made in any case."""
        c = self.config
        if not c.is_long:
            return None
        changes = shared_integer(1 << 20, rng) < c.switch * (1 << 20)
        first = max(lead // c.plan.chunk - 1, 1)
        chunk = first + shared_integer((lead + c.frames) // c.plan.chunk - first, rng)
        return c.plan.chunk * chunk if changes and lead else None

    def _window(self, sample: Sample, lead: int) -> Sample:
        """The last latent frames as a clip of their own."""
        assert self.codec is not None
        latents, frames = sample.latents, self.config.frames
        with torch.no_grad():
            first = opening(self.codec, latents[:, : lead + 1].detach())
        window = torch.cat([first.to(latents.dtype), latents[:, lead + 1 :]], dim=1)
        counted = (torch.arange(frames) >= self.config.plan.chunk).expand(len(latents), -1)
        cut = [p if p.index is None else replace(p, index=p.index[:, lead:]) for p in (sample.prompts, sample.uncond)]
        return replace(sample, latents=window, counted=counted, prompts=cut[0], uncond=cut[1])

    def _bounds(self, full: Schedule, last: int) -> tuple[float, float]:
        if not self.config.restrict:
            return 0.0, 1.0
        return full.sigmas[last + 1], full.sigmas[last]

    def _shape(self, student: Student, batch: Batch, prompts: BatchPrompts) -> tuple[int, int, int, int, int]:
        backbone: Any = student.backbone
        size = self.config.latent_size
        if size is None:
            batch.need("latents")
            assert batch.latents is not None
            size = (batch.latents.shape[3], batch.latents.shape[4])
        assert prompts.states is not None
        return (prompts.states.shape[0], self.config.frames, backbone.latent_channels, *size)

    def _aligned(self, prompts: BatchPrompts, lead: int, turn: int | None) -> BatchPrompts:
        """Prompts as a rollout can follow them: one for each chunk, that of its last latent frame. A long one follows
        the first prompt, and from `turn` on the next one."""
        frames, index = self.config.frames, prompts.index
        assert prompts.states is not None
        size, count = prompts.states.shape[:2]
        if index is None and lead and count > 1:  # data without latents: the prompts in order of time
            index = torch.full((size, 1), count - 1)
        if index is None:
            return prompts
        if self.config.is_long and lead:
            later = torch.arange(lead + frames, device=index.device) >= (lead + frames if turn is None else turn)
            return replace(prompts, index=later[None].long() * index.amax(1, keepdim=True).clamp(max=1))
        if index.shape[1] < frames:
            raise ValueError(f"prompts of {index.shape[1]} latent frames for a rollout of {frames}; use longer clips")
        last = torch.tensor([chunk.stop - 1 for chunk in self.config.plan.chunks(0, frames) for _ in chunk])
        return BatchPrompts(states=prompts.states, index=index.index_select(1, to_device(last, index.device)))


OPENING_CONTEXT = 8
"""Latent frames that are decoded to see the last one's pixels; the codec's memory is shorter."""


def opening(codec: Codec[Any], latents: Tensor) -> Tensor:
    """What latent frame 0 of a clip is that begins with the last pixel frame of `latents` [b, t, c, h, w].

    A codec that pads at the start encodes one frame there and four in every later one, so the two are unlike.
    """
    return codec.encode(codec.decode(latents[:, -OPENING_CONTEXT:])[:, -1:])


def told(schedule: Schedule, last: int) -> tuple[float, ...] | None:
    """What the network is told at the first steps of a schedule, up to `last`."""
    return None if schedule.conditioning is None else schedule.conditioning[: last + 1]


class _Run:
    """One rollout whose last step is the sample."""

    def __init__(
        self, config: OnPolicyConfig, schedule: Schedule, prompts: BatchPrompts, noise: Tensor, lead: int,
        turn: int | None,
    ) -> None:  # fmt: skip
        self.config, self.schedule, self.prompts = config, schedule, prompts
        self.noise, self.lead = noise, lead  # [b, steps, t, c, h, w]; latent frames that keep no graph
        self.turn = turn

    def latents(self, student: Student, solver: Solver | None = None) -> Tensor:
        """The rollout; the last denoising pass of each chunk keeps its graph where gradients are on."""
        config = self.config.rollout(self.schedule)
        if solver is not None:
            config = replace(config, solver=solver)
        last = self.schedule.num_steps - 1
        initial, renoise = self.noise[:, 0], self.noise[:, 1:].transpose(0, 1)
        first = self.config.plan.chunk_of(self.lead)
        backbone: Any = student.backbone
        stream = Rollout(
            backbone,
            config,
            timeline(self.prompts, self.config.plan, self.noise.shape[2], {self.turn: self.config.switch_policy}),
            noise=RecordedNoise(initial, renoise if last else None),
            latent_size=(initial.shape[-2], initial.shape[-1]),
            cache=partial(KVCache, block_frames=initial.shape[1]),  # where no window bounds it: what it will ever hold
            grad=lambda chunk, step: step == last and chunk >= first,
        )
        count = len(self.config.plan.chunks(0, self.noise.shape[2]))
        return torch.cat([stream.next_chunk().latents for _ in range(count)], dim=1)

    def replay(self, student: Student, past: CleanPast) -> Tensor:
        """The same latents with gradients through what later chunks read: the rollout without a graph, then one
        teacher-forced forward over [its latents | its states before the last step]."""
        keeper = _Keeper()
        with torch.no_grad():
            latents = self.latents(student, keeper)
        torch.clear_autocast_cache()  # see `Rollout._grad_mode`
        before, step = torch.cat(keeper.before, dim=1), self.schedule.steps[-1]
        levels = torch.full(before.shape[:2], step.conditioning)
        clean = Clean(latents, self.config.sigma_commit)
        prediction = past(student.forward, before, levels, self.prompts, clean)
        return FLOW.to_x0(before, prediction.to(before.dtype), step.sigma)


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


def timeline(
    prompts: BatchPrompts, plan: ChunkPlan, frames: int, policies: Mapping[int | None, SwitchPolicy] | None = None
) -> PromptTimeline:
    """The prompts of a batch in time, those of each sample; keys of the past are kept, or as `policies` of a latent
    frame say.

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
    how = policies or {}
    switches = [
        Switch(frame=f, text=text, policy=how.get(f, "keep")) for f, text in zip(starts[1:], texts[1:], strict=True)
    ]
    return PromptTimeline(texts[0], switches)
