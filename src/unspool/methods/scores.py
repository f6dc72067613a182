"""What distribution losses share: noise levels of the scores, and networks that estimate clean latents.

Levels follow arXiv:2311.18828 and its video successors (arXiv:2412.07772, arXiv:2506.08009): one per sample for all of
its latent frames, uniform, shifted towards noise, and only then clamped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from unspool.annotations import check_word
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend, FullSequence
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Window
from unspool.data.batch import Batch
from unspool.diffusion.schedule import shift_sigma, unshift_sigma
from unspool.methods.common import FLOW, BatchPrompts, Contexts, Student
from unspool.methods.draws import uniform
from unspool.methods.past import Clean, CleanPast, Masked, NoisyPast, Positions, check_commit_level
from unspool.methods.samples import Sample, Sampler
from unspool.rollout.guidance import combine

Reads = Literal["all", "noisy_past", "clean_past"]
"""What a score network sees: the whole clip; the chunks so far, all at one level (diffusion forcing); or its chunk and
the sample's own clean chunks before it (teacher forcing)."""


@dataclass(frozen=True, kw_only=True)
class ScoreLevels:
    """The law of a score's noise level.

    Fields: `shift` of the uniform draw; `low`, `high` bounds of sigma, applied after the shift (published: 0.02 and
    0.98; at shift 5 nine draws in a hundred end at the upper one); `points` > 0 draws u from the grid 0, 1/points, ...
    as published code does, 0 from the whole interval.
    """

    shift: float
    low: float = 0.02
    high: float = 0.98
    points: int = 1000

    def __post_init__(self) -> None:
        shift_sigma(0.5, self.shift)
        if not 0.0 < self.low < self.high <= 1.0:
            raise ValueError(f"low={self.low}, high={self.high}: expected 0 < low < high <= 1")
        if self.points < 0:
            raise ValueError(f"points={self.points}: expected a number of grid points, or 0 for none")

    def of(self, level: Tensor) -> Tensor:
        """Sigma of draws `level` in [0, 1), before shift and clamp."""
        return shift_sigma(level.double(), self.shift).clamp(self.low, self.high)

    def draw(self, size: int, rng: torch.Generator, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Sigmas [size, 1], float64 on the CPU; `bounds` of sigma before the clamp, the upper one excluded."""
        if not 0.0 <= bounds[0] < bounds[1] <= 1.0:
            raise ValueError(f"bounds={bounds}: expected 0 <= low < high <= 1")
        low, high = (unshift_sigma(bound, self.shift) for bound in bounds)
        u = uniform((size, 1), rng)
        if self.points:
            first, last = round(low * self.points), max(round(high * self.points), round(low * self.points) + 1)
            u = (first + (u * (last - first)).floor()) / self.points
        else:
            u = low + u * (high - low)
        return self.of(u)


class Conditioner:
    """Prompts of a batch as text states, from an encoder that does not learn or as the batch brings them.

    Args: `text` maps captions to states [n, rows, channels], frozen here; `null_text` [rows, channels] the empty
    caption's states, for batches with ready-made text.
    """

    def __init__(self, text: nn.Module | None = None, null_text: Tensor | None = None) -> None:
        if text is not None:
            text.requires_grad_(False)
        self._reader = Student(nn.Identity(), text, null_text)

    def __call__(self, batch: Batch) -> tuple[BatchPrompts, BatchPrompts]:
        """(prompts, the unconditional ones), both as states [b, prompts, rows, channels] with the batch's index."""
        return self.given(batch), self.uncond(batch)

    def given(self, batch: Batch) -> BatchPrompts:
        """The batch's prompts."""
        return self._states(batch, torch.zeros(len(batch), dtype=torch.bool))

    def uncond(self, batch: Batch) -> BatchPrompts:
        """The empty caption for every sample. Raises ValueError for ready-made text without `null_text`."""
        return self._states(batch, torch.ones(len(batch), dtype=torch.bool))

    @torch.no_grad()
    def _states(self, batch: Batch, dropped: Tensor) -> BatchPrompts:
        prompts = self._reader.prompts_of(batch, dropped)
        # the index stays even where each sample has one prompt: all ranks shall do the same work
        return BatchPrompts(states=self._reader.states_of(prompts), index=batch.prompt_index)

    @property
    def text(self) -> nn.Module:
        """The encoder. Raises AttributeError where batches bring their text states."""
        return self._reader.text


def alternating_roles(step: int, *, ratio: int, alone: int) -> tuple[str, ...]:
    """The critic learns at every step; the student before it at every `ratio`-th one, after `alone` steps."""
    acts = step >= alone and (step - alone) % ratio == 0
    return ("student", "critic") if acts else ("critic",)


def sample_for(
    role: str, sampler: Sampler, student: Student, conditioner: Conditioner, batch: Batch, rng: torch.Generator
) -> Sample:
    """The student's samples for the step of a role, with a graph where that is the student. Raises ValueError for
    another role than "student" and "critic"."""
    if role not in ("student", "critic"):
        raise ValueError(f"role={role!r}: expected 'student' or 'critic'")
    prompts, uncond = conditioner(batch)
    with torch.set_grad_enabled(role == "student"):
        return sampler(student, batch, prompts, uncond, rng)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How a network is asked for its estimate of clean latents.

    Fields: `guidance_from_uncond`: s in uncond + s (cond - uncond), 1 for none. Published DMD code states g of
    cond + g (cond - uncond), which is s = 1 + g. `reads`; for a causal one `plan`, `visibility`, `positions` as it was
    trained, and `sigma_commit`, the level that it is told for a clean past; `backend` of the masked attention.
    """

    guidance_from_uncond: float = 1.0
    reads: Reads = "all"
    plan: ChunkPlan | None = None
    visibility: Full | Window = field(default_factory=Full)
    positions: Positions = field(default_factory=Absolute)
    sigma_commit: float = 0.0
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        check_word("reads", self.reads, Reads)
        if (self.plan is None) != (self.reads == "all"):
            raise ValueError(
                f"reads={self.reads!r} with plan={self.plan}: a causal score needs a plan, 'all' takes none"
            )
        check_commit_level(self.sigma_commit, read=self.reads == "clean_past")
        if not self.guidance_from_uncond >= 0.0:
            raise ValueError(f"guidance_from_uncond={self.guidance_from_uncond}: expected 0 or more, 1 for none")


class Score:
    """Clean latents as a network estimates them from noised ones, with guidance."""

    def __init__(self, config: ScoreConfig, network: Student) -> None:
        self.config, self.network = config, network
        self._whole = Contexts(FullSequence)
        if config.plan is not None:
            past = NoisyPast if config.reads == "noisy_past" else CleanPast
            self._past = past(cast(Masked, config))  # the config has a plan

    def velocity(self, x: Tensor, sigma: Tensor, prompts: BatchPrompts, clean: Tensor) -> Tensor:
        """The network's prediction for `x` [b, t, c, h, w] at `sigma` [b, 1], in the dtype of x. `clean`, the sample
        that was noised, is read by `clean_past` alone."""
        levels = sigma.expand(-1, x.shape[1]).to(torch.float32)
        if self.config.plan is None:
            prediction = self.network(x, levels, prompts, self._whole[x.shape[1]])
        elif isinstance(self._past, CleanPast):
            prediction = self._past(self.network, x, levels, prompts, Clean(clean, self.config.sigma_commit))
        else:
            prediction = self._past(self.network, x, levels, prompts)
        return prediction.to(x.dtype)

    def x0(self, x: Tensor, sigma: Tensor, prompts: BatchPrompts, uncond: BatchPrompts, clean: Tensor) -> Tensor:
        """The guided estimate, both branches in one forward."""
        scale = self.config.guidance_from_uncond
        if scale == 1.0:
            return FLOW.to_x0(x, self.velocity(x, sigma, prompts, clean), sigma)
        twice = [torch.cat([value, value]) for value in (x, sigma, clean)]
        cond_part, uncond_part = self.velocity(twice[0], twice[1], joined(prompts, uncond), twice[2]).chunk(2)
        return FLOW.to_x0(x, combine(cond_part, uncond_part, scale), sigma)


def joined(first: BatchPrompts, second: BatchPrompts) -> BatchPrompts:
    """Two batches of prompts behind each other; states of fewer prompts or rows are padded with zeros."""
    assert first.states is not None and second.states is not None
    prompts, rows = (max(first.states.shape[i], second.states.shape[i]) for i in (1, 2))
    parts = [
        nn.functional.pad(s, (0, 0, 0, rows - s.shape[2], 0, prompts - s.shape[1]))
        for s in (first.states, second.states)
    ]
    index = None if first.index is None or second.index is None else torch.cat([first.index, second.index])
    if index is None and (first.index is not None or second.index is not None):
        raise ValueError("one batch of prompts has an index of latent frames and the other has none")
    return replace(first, states=torch.cat(parts), index=index)
