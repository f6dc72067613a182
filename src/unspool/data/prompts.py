"""Prompts without videos, one per line: what data-free distillation trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unspool.data.batch import Batch
from unspool.data.captions_io import read_text
from unspool.data.listing import EpochOrder, global_samples


@dataclass(frozen=True, kw_only=True)
class PromptListConfig:
    """A text file with one prompt per line; empty lines are left out. `shuffle`: a new order in each epoch."""

    path: str = ""
    shuffle: bool = True
    seed: int = 0


class PromptList:
    """A `Source` of `captions` and `indices` alone. Raises ValueError for a file without prompts."""

    def __init__(self, config: PromptListConfig) -> None:
        if not config.path:
            raise ValueError("got no path; expected a text file with one prompt per line; set path=...")
        file = Path(config.path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file of prompts")
        self.config = config
        self.prompts = tuple(line.strip() for line in read_text(file).split("\n") if line.strip())
        if not self.prompts:
            raise ValueError(f"{file}: got no prompts; expected one per line")
        self._order = EpochOrder(len(self.prompts), config.seed, shuffle=config.shuffle)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        """Prompts of the samples of `rank` at `step`; see `Source`."""
        samples = global_samples(step, size, rank=rank, world=world)
        return self.clips([self._order.at(sample)[1] for sample in samples])

    def clips(self, entries: Sequence[int]) -> Batch:
        """The prompts with these numbers."""
        captions = tuple((self.prompts[entry],) for entry in entries)
        return Batch(captions=captions, indices=torch.tensor(entries, dtype=torch.int64))

    def describe(self) -> dict[str, object]:
        """Provenance: name of the file, number and digest of the prompts."""
        digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {"source": "prompts", "file": Path(self.config.path).name, "num": len(self), "sha256": digest}
