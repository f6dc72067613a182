"""Regression on a teacher's sampler paths: what initialises a few-step causal student before distribution matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Backend
from unspool.causal.position import Absolute
from unspool.causal.visibility import Full, Window, check_window
from unspool.data.batch import Batch, TrajectoryBatch
from unspool.methods.base import StepResult
from unspool.methods.common import FLOW, Student, student_only
from unspool.methods.draws import uniform
from unspool.methods.past import Clean, CleanPast, NoisyPast, Positions, check_commit_level, chunk_numbers
from unspool.methods.samples import StepList
from unspool.methods.scores import Conditioner
from unspool.shapes import to_device


@dataclass(frozen=True, kw_only=True)
class OdeRegressionConfig:
    """What decides the objective.

    Fields: `steps` of the student, whose sigmas must be among those of the stored states; `plan`, `visibility`,
    `positions` of the causal mask; `past` "noisy": a chunk reads the earlier ones of the same path at their own drawn
    levels (arXiv:2412.07772), "clean": it reads the clean clip that the path was sampled with (arXiv:2602.02214);
    `clean` whether a chunk may be drawn at sigma 0, where it carries no loss (for "noisy"); `per` draw of a level;
    `sigma_commit` the level that the network is told for a clean past, that of the rollout's commit pass.
    """

    steps: StepList
    plan: ChunkPlan
    visibility: Full | Window = field(default_factory=Full)
    positions: Positions = field(default_factory=Absolute)
    past: Literal["noisy", "clean"] = "noisy"
    clean: bool = True
    per: Literal["chunk", "sample"] = "chunk"
    sigma_commit: float = 0.0
    backend: Backend = "slices"

    def __post_init__(self) -> None:
        check_window(self.visibility, self.plan.longest)
        check_commit_level(self.sigma_commit, read=self.past == "clean")
        if self.past not in ("noisy", "clean"):
            raise ValueError(f"past={self.past!r}: expected 'noisy' or 'clean'")
        if self.per not in ("chunk", "sample"):
            raise ValueError(f"per={self.per!r}: expected 'chunk' or 'sample'")
        if self.past == "clean" and self.clean:
            raise ValueError(
                "clean=true draws chunks that carry no loss; with past='clean' they teach nothing: set false"
            )


def regression_loss(prediction: Tensor, target: Tensor, counted: Tensor, expected: float | None = None) -> Tensor:
    """Mean of (prediction - target)^2 over the values of all `counted` [b, t] latent frames, in at least float32.

    `expected` divides by that many latent frames instead of the counted ones: then the mean over parts of a batch is
    that of the batch. 0 with its graph where none is counted.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(wide) - target.to(wide)).square().flatten(2).mean(2)
    share = counted.double() / (counted.sum().clamp(min=1) if expected is None else expected)
    return (error * to_device(share.to(wide), error.device)).sum()


class OdeRegression:
    """E || x0(x_sigma) - x_end ||^2 over stored states x_sigma of a path that ends at x_end.

    Source: arXiv:2412.07772 section 4.2 (implements `Method`; role "student"). Arguments as `DistributionMatching`.
    Paths that were stored for more steps serve fewer: states between the student's sigmas are passed over.
    Raises ValueError at the first step where one of the student's sigmas is not stored.
    """

    def __init__(
        self,
        config: OdeRegressionConfig,
        *,
        backbone: nn.Module,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        self.config = config
        self.student = Student(backbone)
        self.conditioner = Conditioner(text, null_text)
        self._predict = NoisyPast(config) if config.past == "noisy" else CleanPast(config)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        student_only(role)
        states, sigmas = self._states(batch)
        size, frames = states.shape[0], states.shape[2]
        chunk_of = chunk_numbers(self.config.plan, frames)
        count = len(sigmas) - (not self.config.clean)
        draws = (size, int(chunk_of[-1]) + 1 if self.config.per == "chunk" else 1)
        which = (uniform(draws, rng) * count).long()
        which = which[:, chunk_of] if self.config.per == "chunk" else which.expand(size, frames)
        prediction, x, sigma = self.predict(batch, states, which)
        # drawn at 0 with probability 1 / count, a latent frame carries no loss
        expected = size * frames * (len(sigmas) - 1) / count
        loss = regression_loss(FLOW.to_x0(x, prediction.to(x.dtype), sigma), states[:, -1], sigma > 0, expected)
        return StepResult(loss=loss, metrics={"loss": loss.detach()})

    def predict(self, batch: Batch, states: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(prediction, input, sigma [b, t]) for the numbers `which` [b, t] of the stored states."""
        prompts = self.conditioner.given(batch)
        device = states.device
        rows, columns = (torch.arange(states.shape[d], device=device) for d in (0, 2))
        x = states[rows[:, None], to_device(which, device), columns]
        sigma, told = (table[which] for table in self.config.steps.levels)
        if isinstance(self._predict, NoisyPast):
            return self._predict(self.student, x, told, prompts), x, sigma
        assert batch.latents is not None
        return self._predict(self.student, x, told, prompts, Clean(batch.latents, self.config.sigma_commit)), x, sigma

    def _states(self, batch: Batch) -> tuple[Tensor, tuple[float, ...]]:
        wanted = self.config.steps.schedule.sigmas
        trajectory = batch.trajectory if isinstance(batch, TrajectoryBatch) else None
        if trajectory is None:
            raise ValueError("the batch has no trajectory; use a source of a teacher's trajectories")
        assert isinstance(batch, TrajectoryBatch)
        got = batch.sigmas or ()
        places = [next((i for i, own in enumerate(got) if abs(own - sigma) <= 1e-4), None) for sigma in wanted]
        if None in places or places[-1] != len(got) - 1:
            told = ", ".join(f"{s:.4f}" for s in got) or "unknown"
            raise ValueError(
                f"trajectories of sigmas {told}; expected at least those of the student's steps, "
                f"{', '.join(f'{s:.4f}' for s in wanted)}: give the data's shift and steps, or sample them again"
            )
        if trajectory.shape[1] != len(got):
            raise ValueError(f"trajectories of {trajectory.shape[1]} states for {len(got)} sigmas")
        trajectory = trajectory.index_select(1, to_device(torch.tensor(places), trajectory.device))
        return trajectory.to(torch.promote_types(trajectory.dtype, torch.float32)), wanted
