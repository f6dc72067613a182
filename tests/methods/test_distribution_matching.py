"""DMD and SiD where the answer is known: Gaussian data, student, teacher and critic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distribution_stubs import Gaussian, GaussianSampler
from torch import nn

from unspool.causal.chunks import ChunkPlan
from unspool.data.batch import Batch
from unspool.methods.base import Method
from unspool.methods.dmd import DistributionMatching, Dmd, DmdConfig
from unspool.methods.samples import NoisedDataConfig, StepList
from unspool.methods.scores import ScoreConfig, ScoreLevels
from unspool.methods.sid import Sid

PLAN = ChunkPlan(chunk=1)
UNUSED = NoisedDataConfig(steps=StepList(steps=(1000.0,), shift=1.0), plan=PLAN)
LEVELS = ScoreLevels(shift=2.0, low=0.02, high=0.98)
LOSSES: list[Dmd | Sid] = [Dmd(), Sid()]


def method(
    student: Gaussian, teacher: Gaussian, critic: Gaussian, *, loss: Dmd | Sid | None = None, scale: float = 1.0,
    ratio: int = 1, alone: int = 0,
) -> DistributionMatching:  # fmt: skip
    config = DmdConfig(
        sample=UNUSED, levels=LEVELS, teacher=ScoreConfig(guidance_from_uncond=scale), ratio=ratio, alone=alone,
        loss=loss or Dmd(),
    )  # fmt: skip
    return DistributionMatching(
        config, backbone=student, teacher=teacher, critic=critic, null_text=torch.zeros(1, 1),
        sampler=GaussianSampler(),
    )  # fmt: skip


def batch(size: int) -> Batch:
    return Batch(text=torch.ones(size, 1, 1, 1))


def gradients(loss: Dmd | Sid, student: tuple[float, float], teacher: tuple[float, float], size: int = 20000) -> Any:
    """d loss / d (mean, log std) of the student, with the critic at its optimum."""
    networks = Gaussian(*student), Gaussian(*teacher), Gaussian(*student)
    made = method(*networks, loss=loss)
    made.step(batch(size), "student", 0, torch.Generator().manual_seed(0)).loss.backward()
    own = made.student.backbone
    return own.mean.grad.item(), own.log_std.grad.item(), networks


@pytest.mark.parametrize("loss", LOSSES, ids=["dmd", "sid"])
def test_no_gradient_at_the_optimum(loss: Dmd | Sid) -> None:
    mean, log_std, _ = gradients(loss, (0.5, 0.7), (0.5, 0.7))
    assert abs(mean) < 1e-12 and abs(log_std) < 1e-12


@pytest.mark.parametrize("loss", LOSSES, ids=["dmd", "sid"])
@pytest.mark.parametrize("off", [-0.4, 0.4])
def test_a_step_goes_towards_the_teacher(loss: Dmd | Sid, off: float) -> None:
    mean, _, _ = gradients(loss, (off, 1.0), (0.0, 1.0))
    assert mean * off > 0
    _, log_std, _ = gradients(loss, (0.0, 1.0 + off), (0.0, 1.0))
    assert log_std * off > 0


def test_dmd_reaches_the_student_alone() -> None:
    *_, (student, teacher, critic) = gradients(Dmd(), (0.3, 1.0), (0.0, 1.0), 64)
    assert student.mean.grad is not None
    assert all(p.grad is None for p in [*teacher.parameters(), *critic.parameters()])


@pytest.mark.parametrize("loss", LOSSES, ids=["dmd", "sid"])
def test_the_critics_loss_reaches_the_critic_alone(loss: Dmd | Sid) -> None:
    networks = Gaussian(0.3, 1.0), Gaussian(0.0, 1.0), Gaussian(0.0, 1.0)
    made = method(*networks, loss=loss)
    made.step(batch(64), "critic", 0, torch.Generator().manual_seed(0)).loss.backward()
    assert networks[2].mean.grad is not None
    assert all(p.grad is None for net in networks[:2] for p in net.parameters())


def test_guidance_is_counted_from_the_unconditional_estimate() -> None:
    """Means 0 without and 1 with the prompt: guided 3 times they ask for about 3, and a student at 1 is drawn on."""
    teacher = Gaussian(0.0, 1.0, shift_said=1.0)
    made = method(Gaussian(1.0, 1.0), teacher, Gaussian(1.0, 1.0), scale=3.0)
    prompts, uncond = made.conditioner(batch(4))
    x, sigma = torch.zeros(4, 2, 1, 1, 1, dtype=torch.float64), torch.full((4, 1), 0.5, dtype=torch.float64)
    guided = made.teacher.x0(x, sigma, prompts, uncond, x)
    one = method(Gaussian(1.0, 1.0), teacher, Gaussian(1.0, 1.0), scale=1.0)
    plain, free = one.teacher.x0(x, sigma, prompts, uncond, x), one.teacher.x0(x, sigma, uncond, uncond, x)
    torch.testing.assert_close(guided, free + 3 * (plain - free))
    made.step(batch(512), "student", 0, torch.Generator().manual_seed(0)).loss.backward()
    assert made.student.backbone.mean.grad.item() < 0  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("loss", LOSSES, ids=["dmd", "sid"])
def test_alternating_updates_find_the_teachers_distribution(loss: Dmd | Sid) -> None:
    student, critic = Gaussian(-1.0, 0.3), Gaussian(0.0, 1.0)
    made = method(student, Gaussian(0.8, 0.6), critic, loss=loss, ratio=3)
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=0.02),
        "critic": torch.optim.Adam(critic.parameters(), lr=0.04),
    }
    rng = torch.Generator().manual_seed(0)
    for step in range(450):
        for role in made.roles(step):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            made.step(batch(128), role, step, rng).loss.backward()
            optimizers[role].step()
    assert student.mean.item() == pytest.approx(0.8, abs=0.08)
    assert student.log_std.exp().item() == pytest.approx(0.6, abs=0.08)


def test_roles() -> None:
    made = method(Gaussian(0, 1), Gaussian(0, 1), Gaussian(0, 1), ratio=5, alone=3)
    assert isinstance(made, Method) and set(made.networks) == {"student", "critic"}
    acting = [step for step in range(14) if "student" in made.roles(step)]
    assert acting == [3, 8, 13] and all("critic" in made.roles(step) for step in range(14))
    assert made.roles(3) == ("student", "critic")
    with pytest.raises(ValueError, match="expected 'student' or 'critic'"):
        made.step(batch(2), "teacher", 0, torch.Generator())


class Other(nn.Module):
    latent_channels = 16


def test_networks_of_other_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher: 16 channels"):
        method(Gaussian(0, 1), Other(), Gaussian(0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [{"low": 0.0}, {"low": 0.5, "high": 0.4}, {"high": 1.5}, {"points": -1}, {"shift": 0.0}]
)
def test_bad_levels(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ScoreLevels(**{"shift": 1.0, **values})  # type: ignore[arg-type]


def test_clamped_draws_at_published_shifts() -> None:
    """9 and 14 draws in a hundred end at the upper bound (a property of the published law, kept)."""
    for shift, share in ((5.0, 0.09), (8.0, 0.14)):
        drawn = ScoreLevels(shift=shift).draw(20000, torch.Generator().manual_seed(0))
        assert (drawn == 0.98).double().mean().item() == pytest.approx(share, abs=0.01)
