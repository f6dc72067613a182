"""A tiny training for tests: a regression whose loss draws noise per sample, run in this or in another process.

`python toy.py OUT a.b=c ...` trains in OUT and prints the step it ended at.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from unspool.config import apply_overrides
from unspool.data.batch import Batch
from unspool.methods.base import StepResult
from unspool.methods.draws import normal
from unspool.train.callbacks import Callback
from unspool.train.config import EmaConfig, OptimConfig, TrainConfig
from unspool.train.loop import Trainer
from unspool.train.recipe import Recipe

CHANNELS = 6


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.nn.functional.gelu(self.inner(self.norm(x))))


class Net(nn.Module):
    """Layers of every kind that the optimizers tell apart."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(CHANNELS, width)
        self.words = nn.Embedding(4, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.modulation = nn.Parameter(torch.randn(1, width) / width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CHANNELS)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.gradient_checkpointing = False

    def fsdp_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        """x [b, t, c] and a word per sample [b] -> [b, t, c]."""
        if self.training:
            self.calls += 1  # type: ignore[operator]
        x = self.patch_embedding(x) + self.words(word)[:, None] + self.modulation
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x))


class Regression:
    """|| net(x0 + noise) - x0 ||^2 for role "student"; role "critic" learns the noise at odd steps."""

    def __init__(self, networks: Mapping[str, nn.Module], bad: Sequence[int] = ()) -> None:
        self._networks, self.bad = dict(networks), tuple(bad)
        self.draws: list[tuple[int, str, torch.Tensor]] = []

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self._networks

    def roles(self, step: int) -> tuple[str, ...]:
        return tuple(self._networks) if step % 2 else ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        assert batch.latents is not None and batch.indices is not None
        x0 = batch.latents.flatten(2)
        noise = normal(x0.shape, rng, x0.dtype)
        self.draws.append((step, role, noise))
        target = x0 if role == "student" else noise
        out = self._networks[role](x0 + noise, batch.indices % 4)
        loss = (out.float() - target).square().mean()
        if step in self.bad:
            loss = loss * float("nan")
        return StepResult(loss=loss, metrics={"loss": loss.detach(), "number": 2.0})


class Toy:
    """Sample j of step k from a generator of its own."""

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        numbers = [step * size + j for j in range(rank, size, world)]
        clips = [torch.randn(3, CHANNELS, 1, 1, generator=torch.Generator().manual_seed(n)) for n in numbers]
        return Batch(latents=torch.stack(clips), indices=torch.tensor(numbers))


class Interfere(Callback):
    """Sleeps after each step; raises a signal at one of them; draws from the global generator."""

    def __init__(self, sleep_s: float, at: int, name: str) -> None:
        self.sleep_s, self.at, self.name = sleep_s, at, name

    def on_step(self, trainer: Trainer) -> None:
        torch.rand(3)
        time.sleep(self.sleep_s)
        if trainer.step == self.at:
            os.kill(os.getpid(), getattr(signal, self.name))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the network."""

    width: int = 8
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ToyRecipe(Recipe):
    """A small regression."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=12,
            batch=4,
            optim=OptimConfig(lr=1e-2),
            ema=EmaConfig(decay=0.9),
            dtype="fp32",
            device="cpu",
            log_every=1,
            save_minutes=0.0,
        )
    )
    sizes: Sizes = field(default_factory=Sizes)
    critic: bool = False
    bad: tuple[int, ...] = ()
    sleep_s: float = 0.0
    signal_at: int = 0
    signal: str = "SIGTERM"

    harmless = ("sleep_s", "signal_at", "signal")

    def build_method(self, device: torch.device) -> Regression:
        roles = ("student", "critic") if self.critic else ("student",)
        return Regression({role: Net(self.sizes.width, self.sizes.dropout).to(device) for role in roles}, self.bad)

    def build_source(self) -> Toy:
        return Toy()

    def callbacks(self) -> Sequence[Callback]:
        return (Interfere(self.sleep_s, self.signal_at, self.signal),)


def recipe(*overrides: str) -> ToyRecipe:
    """The toy recipe, changed."""
    return apply_overrides(ToyRecipe(), overrides)


def train(out: Path, *overrides: str, **options: object) -> Trainer:
    """Run one leg in this process."""
    trainer = Trainer(recipe(*overrides), out, show=False, **options)  # type: ignore[arg-type]
    try:
        trainer.run()
    finally:
        trainer.world.close()
    return trainer


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all that a checkpoint of it would hold."""
    return {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(train(Path(sys.argv[1]), *sys.argv[2:]).step, flush=True)
