"""Adversarial distillation: closed forms of its losses, who learns when, and a student that finds the data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distribution_stubs import Formula, GaussianSampler, said
from torch import Tensor, nn

from unspool.causal.chunks import ChunkPlan
from unspool.data.batch import Batch
from unspool.methods.base import Method
from unspool.methods.gan import Adversarial, Discriminator, GanConfig, judged, penalty
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.samples import NoisedDataConfig, StepList
from unspool.methods.scores import ScoreLevels
from unspool.models.base import Conditioning

STEPS = StepList(steps=(1000.0,), shift=1.0)
UNUSED = NoisedDataConfig(steps=STEPS, plan=ChunkPlan(chunk=1))
LEVELS = ScoreLevels(shift=1.0, low=0.02, high=0.3)


class Layered(Formula):
    """A token per latent frame and a few layers; what a discriminator reads. `asked` counts forwards."""

    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.config = SimpleNamespace(dim=width)
        self.embed = nn.Linear(1, width, dtype=torch.float64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width, dtype=torch.float64), nn.SiLU()) for _ in range(layers)
        )
        self.asked = 0

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        self.asked += 1
        hidden = self.embed(x.flatten(2))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return x


class Shift(nn.Module):
    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())


def method(mean: float, std: float = 1.0, **options: Any) -> Adversarial:
    torch.manual_seed(0)
    config = GanConfig(sample=UNUSED, levels=LEVELS, **{"ratio": 1, "r1": 0.1, "r2": 0.1, **options})
    made = Adversarial(
        config, backbone=Shift(mean, std), critic=Layered(), null_text=torch.zeros(1, 1), sampler=GaussianSampler()
    )
    made.discriminator.double()
    return made


def data(size: int, seed: int, mean: float = 0.8, std: float = 0.5, frames: int = 2) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x0 = mean + std * torch.randn(size, frames, 1, 1, 1, generator=draw, dtype=torch.float64)
    return Batch(latents=x0, text=torch.ones(size, 1, 1, 1))


def test_losses_in_closed_form() -> None:
    real, own = torch.tensor([0.0, 2.0]).double(), torch.tensor([0.0, -1.0]).double()
    log = torch.log1p
    found = judged(real, own, relativistic=True)
    gap = torch.tensor([0.0, 3.0]).double()
    torch.testing.assert_close(found[0], log((-gap).exp()).mean())
    torch.testing.assert_close(found[1], log(gap.exp()).mean())
    alone = judged(real, own, relativistic=False)
    torch.testing.assert_close(alone[0], (log((-real).exp()) + log(own.exp())).mean())
    torch.testing.assert_close(alone[1], log((-own).exp()).mean())


def test_the_penalty_is_the_squared_gradient_in_expectation() -> None:
    slope, draw = torch.tensor([0.3, -1.2, 0.5]).double(), torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=draw, dtype=torch.float64)
    probe = torch.randn(4000, 3, generator=draw, dtype=torch.float64)
    found = penalty(x @ slope, (x + 0.01 * probe) @ slope, 0.01)
    torch.testing.assert_close(found, (probe @ slope).square().mean())
    assert found.item() == pytest.approx(slope.square().sum().item(), rel=0.05)


def test_each_role_reaches_its_own_network_and_regularisation_asks_again() -> None:
    made = method(0.0)
    assert isinstance(made, Method)
    made.step(data(8, 0), "critic", 0, torch.Generator().manual_seed(0)).loss.backward()
    assert all(p.grad is None for p in made.student.parameters())
    assert all(p.grad is not None for p in made.discriminator.heads.parameters())
    network: Any = made.discriminator.backbone
    assert network.asked == 4, "data, samples, and each of them beside itself"
    result = made.step(data(8, 0), "student", 0, torch.Generator().manual_seed(0))
    assert network.asked == 6 and set(result.metrics) == {"loss", "margin"}
    result.loss.backward()
    assert made.student.backbone.mean.grad is not None  # type: ignore[union-attr]
    plain = method(0.0, r1=0.0, r2=0.0)
    result = plain.step(data(8, 0), "critic", 0, torch.Generator().manual_seed(0))
    assert set(result.metrics) == {"loss", "margin"}


@pytest.mark.parametrize("relativistic", [True, False])
def test_the_student_finds_the_data(relativistic: bool) -> None:
    made = method(-1.0, 1.2, relativistic=relativistic, r1=0.3, r2=0.3)
    optimizers = {
        "student": torch.optim.Adam(made.student.parameters(), lr=0.01, betas=(0.0, 0.99)),
        "critic": torch.optim.Adam(made.discriminator.parameters(), lr=0.01, betas=(0.0, 0.99)),
    }
    rng = torch.Generator().manual_seed(0)
    for step in range(500):
        for role in made.roles(step):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            made.step(data(64, step), role, step, rng).loss.backward()
            optimizers[role].step()
    own: Any = made.student.backbone
    assert own.mean.item() == pytest.approx(0.8, abs=0.15)
    assert own.log_std.exp().item() == pytest.approx(0.5, abs=0.2)


def test_depths_are_shares_of_the_blocks_and_hooks_do_not_stay() -> None:
    network = Layered(layers=30)
    found = Discriminator(network, (0.45, 0.72, 1.0))
    assert found._places == [13, 21, 29], "as published"
    found.double()
    logits = found(torch.randn(3, 2, 1, 1, 1).double(), torch.ones(3, 2), said(3), None)
    assert logits.shape == (3,) and not any(block._forward_hooks for block in network.blocks)


def test_heads_are_made_where_the_network_is() -> None:
    made = Discriminator(Layered().to("meta"), (0.5, 1.0))
    assert all(p.is_meta for p in made.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, "ratio"), ({"taps": ()}, "depths"), ({"taps": (1.5,)}, "depths"), ({"r1": -1.0}, "negative"),
        ({"probe": 0.0}, "above 0"), ({"weight": 0.0}, "above 0"),
    ],
)  # fmt: skip
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(0.0, **options)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="clips of 3 latent frames, samples of 2"):
        method(0.0).step(data(4, 0, frames=3), "student", 0, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="expected 'student' or 'critic'"):
        method(0.0).step(data(4, 0), "teacher", 0, torch.Generator())
    long = OnPolicyConfig(steps=STEPS, plan=ChunkPlan(chunk=3), frames=6, longest=12)
    with pytest.raises(ValueError, match="leave longest at 0"):
        GanConfig(sample=long, levels=LEVELS)
