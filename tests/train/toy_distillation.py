"""Distillation at toy width: each method over small Wan networks, trained in this or in another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Window
from unspool.config import apply_overrides
from unspool.data.batch import Batch, TrajectoryBatch
from unspool.methods.base import Method
from unspool.methods.consistency import CausalConsistency, ConsistencyConfig
from unspool.methods.dmd import DistributionMatching, Dmd, DmdConfig
from unspool.methods.gan import Adversarial, GanConfig
from unspool.methods.ode_regression import OdeRegression, OdeRegressionConfig
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.samples import NoisedDataConfig, StepList
from unspool.methods.scores import ScoreConfig, ScoreLevels
from unspool.methods.sid import Sid
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.train.config import EmaConfig, OptimConfig, TrainConfig
from unspool.train.loop import Trainer
from unspool.train.recipe import Recipe

CHANNELS, SIZE, FRAMES, TEXT_ROWS, TEXT_DIM = 4, (2, 4), 4, 3, 8
STEPS = StepList(steps=(1000.0, 500.0), shift=2.0)
PLAN = ChunkPlan(chunk=2)
Kind = Literal["causvid", "self_forcing", "through_kv", "sid", "gan", "consistency", "ode"]


def network(seed: int) -> WanTransformer:
    """Two layers; the same weights for the same seed, none of them zero."""
    config = WanConfig(
        dim=16, ffn_dim=32, num_layers=2, num_heads=2, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_DIM, text_len=TEXT_ROWS, freq_dim=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = WanTransformer(config)
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return made


class Clips:
    """Sample j of step k from a generator of its own, with a text of its own and a path to it."""

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        numbers = [step * size + j for j in range(rank, size, world)]
        draws = [torch.Generator().manual_seed(n) for n in numbers]
        states = torch.stack([torch.randn(3, FRAMES, CHANNELS, *SIZE, generator=g) for g in draws])
        text = torch.stack([torch.randn(2, TEXT_ROWS, TEXT_DIM, generator=g) for g in draws])
        index = torch.tensor([[0, 0, 1, 1] if n % 2 else [0] * 4 for n in numbers])
        return TrajectoryBatch(trajectory=states, sigmas=STEPS.schedule.sigmas, latents=states[:, -1], text=text,
                               prompt_index=index, indices=torch.tensor(numbers))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistilRecipe(Recipe):
    """Any of the methods."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=6,
            batch=4,
            optim=OptimConfig(lr=2e-3),
            critic=OptimConfig(lr=4e-3),
            ema=EmaConfig(decay=0.9),
            dtype="fp32",
            device="cpu",
            log_every=1,
            save_minutes=0.0,
            max_minutes=None,
        )
    )
    kind: Kind = "self_forcing"

    def build_method(self, device: torch.device) -> Method:
        null = torch.zeros(TEXT_ROWS, TEXT_DIM)
        student, teacher = network(1).to(device), network(2).to(device)
        if self.kind == "ode":
            config = OdeRegressionConfig(steps=STEPS, plan=PLAN)
            return OdeRegression(config, backbone=student, null_text=null)
        if self.kind == "consistency":
            made = ConsistencyConfig(grid=8, shift=2.0, guidance_from_uncond=2.0, plan=PLAN, decay=0.9)
            return CausalConsistency(made, backbone=student, teacher=teacher, average=network(1), null_text=null)
        window = Window(window=4, sink=1)
        sample: NoisedDataConfig | OnPolicyConfig = NoisedDataConfig(steps=STEPS, plan=PLAN, visibility=window)
        if self.kind != "causvid":
            sample = OnPolicyConfig(
                steps=STEPS, plan=PLAN, frames=FRAMES, visibility=window, through_kv=self.kind == "through_kv"
            )
        if self.kind == "gan":
            gan = GanConfig(sample=sample, levels=ScoreLevels(shift=2.0), ratio=2, r1=1.0, r2=1.0, probe=0.5)
            return Adversarial(gan, backbone=student, critic=teacher, null_text=null)
        dmd = DmdConfig(
            sample=sample, levels=ScoreLevels(shift=2.0), teacher=ScoreConfig(guidance_from_uncond=3.0), ratio=2,
            loss=Sid() if self.kind == "sid" else Dmd(),
        )  # fmt: skip
        return DistributionMatching(
            dmd, backbone=student, teacher=teacher, critic=network(2).to(device), null_text=null
        )

    def build_source(self) -> Clips:
        return Clips()


def recipe(*overrides: str) -> DistilRecipe:
    """The recipe, changed; methods without a critic have no optimizer for one."""
    made = apply_overrides(DistilRecipe(), [o for o in overrides if o.startswith("kind=")])
    if made.kind in ("ode", "consistency"):
        made = apply_overrides(made, ["train.critic=none"])
    return apply_overrides(made, [o for o in overrides if not o.startswith("kind=")])


def train(out: Path, *overrides: str) -> Trainer:
    """Run one leg in this process."""
    trainer = Trainer(recipe(*overrides), out, show=False)
    try:
        trainer.run()
    finally:
        trainer.world.close()
    return trainer


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a checkpoint of it would hold."""
    return {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}
