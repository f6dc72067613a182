"""What a dry run says of trainings whose steps are not alike: roles that alternate, and legs of a curriculum."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from unspool.data.batch import Batch
from unspool.data.curriculum import Curriculum, Leg
from unspool.methods.base import StepResult
from unspool.methods.scores import alternating_roles
from unspool.train.config import OptimConfig, TrainConfig
from unspool.train.dryrun import estimate, step_kinds
from unspool.train.recipe import Named, Recipe

SECONDS = {"student": 0.06, "critic": 0.01}


class Alternating:
    """A critic at every step, a student at every third; a step takes SECONDS for each latent frame."""

    def __init__(self) -> None:
        self.networks: Mapping[str, nn.Module] = {"student": nn.Linear(4, 4), "critic": nn.Linear(4, 4)}

    def roles(self, step: int) -> tuple[str, ...]:
        return alternating_roles(step, ratio=3, alone=0)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        latents = batch.latents
        assert latents is not None
        time.sleep(SECONDS[role] * latents.shape[1])
        return StepResult(loss=self.networks[role](latents).square().mean())


class Clips:
    """Clips of `frames` latent frames."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        return Batch(latents=torch.ones(size, self.frames, 4), indices=torch.arange(size))


@dataclass(frozen=True, kw_only=True)
class AlternatingRecipe(Recipe):
    """As many steps with one latent frame as with two."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=12, batch=1, optim=OptimConfig(lr=0.1), critic=OptimConfig(lr=0.1), dtype="fp32", device="cpu"
        )
    )

    def build_method(self, device: torch.device) -> Alternating:
        return Alternating()

    def build_source(self) -> Curriculum:
        return Curriculum([Leg(source=Clips(1), steps=6), Leg(source=Clips(2), steps=6)])


def test_steps_are_told_apart_by_roles_and_legs() -> None:
    kinds = step_kinds(Alternating(), AlternatingRecipe().build_source(), 12)
    both, critic = ("student", "critic"), ("critic",)
    assert kinds == {(both, 0): [0, 3], (critic, 0): [1, 2, 4, 5], (both, 1): [6, 9], (critic, 1): [7, 8, 10, 11]}


def test_a_dry_run_weighs_each_kind_of_step_by_how_often_it_comes() -> None:
    found = estimate(Named(name="toy", recipe=AlternatingRecipe(), description="")).measured
    assert found is not None
    mean = sum(SECONDS["critic"] + SECONDS["student"] * (step % 3 == 0) for step in range(3)) / 3 * 1.5
    assert found.step_s > 0.99 * mean  # a busy machine takes longer, never less
    assert [(kind.roles[0], kind.leg, kind.share) for kind in found.kinds] == [
        ("student", 0, pytest.approx(1 / 6)), ("critic", 0, pytest.approx(1 / 3)),
        ("student", 1, pytest.approx(1 / 6)), ("critic", 1, pytest.approx(1 / 3)),
    ]  # fmt: skip
    assert found.kinds[0].flops == 2 * found.kinds[1].flops < found.flops * 2
    text = estimate(Named(name="toy", recipe=AlternatingRecipe(), description=""), timed_steps=1).text()
    assert "16.7%" in text and "student and critic, leg 2" in text
