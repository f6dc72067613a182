"""Trainings that the arms of a comparison share: each is run once and continued where it stopped."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from unspool.config import apply_overrides
from unspool.train.loop import Trainer


class Trainings:
    """The trainings under `home`, all with `seed`. `overrides`: "train.steps=3" changes all of them,
    "dmd:train.steps=3" those of one part."""

    def __init__(self, home: Path, seed: int, overrides: list[str]) -> None:
        self.home, self.seed, self.overrides = home, seed, overrides
        self._checked: set[Path] = set()  # done, and as they are asked for

    def own(self, part: str) -> list[str]:
        """The changes that the command line makes to a part."""
        pairs = [o.partition(":") for o in self.overrides]
        return [whole[2] if whole[1] else whole[0] for whole in pairs if not whole[1] or whole[0] == part]

    def run(self, name: str, part: str, recipe: Any, *, last: str = "student.safetensors") -> Path:
        """The folder of a training, run where `last` of it is missing.

        Raises ValueError for a folder of other settings, and SystemExit where the training was stopped.
        """
        folder = self.home / name
        if folder in self._checked:
            return folder
        recipe = apply_overrides(replace(recipe, train=replace(recipe.train, seed=self.seed)), self.own(part))
        trainer, began = Trainer(recipe, folder, name=name), time.monotonic()
        if trainer.step < recipe.train.steps or not (folder / last).is_file():
            ended = trainer.run()
            if not ended.is_done:
                raise SystemExit(f"{self.home.name}: {name} stopped at step {ended.step}; run the same again to go on")
            print(f"{self.home.name}: {name} in {(time.monotonic() - began) / 60:.1f} min", flush=True)
        self._checked.add(folder)
        return folder
