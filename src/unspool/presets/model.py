"""What a preset states about a published model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from unspool.models.wan.config import WanConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One published file: hub repository and path in it (None where not known), and the container key to read."""

    role: Literal["network", "base", "lora"]
    repository: str | None
    path: str | None
    which: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A published model: its network, how it was trained to be rolled out, and where it comes from.

    `chunk`, `window`, `sink` and `num_latent_frames` count latent frames; the window includes the current chunk and
    the sink, and `"full"` means that a chunk reads all of the past. `steps` are listed timesteps on the 0..1000 scale
    without the trailing 0: with `warp` they are put through `shift` (sigma' = s x / (1 + (s - 1) x)), without it they
    are used as listed. `num_steps` may be known where the list is not. `licence_scope` says whether the licence is
    stated for the weights too or for the repository that published them. None means not known, or not applicable to a
    bidirectional network.
    """

    name: str
    network: WanConfig
    is_causal: bool
    chunk: int | None
    steps: tuple[float, ...] | None
    num_steps: int | None
    warp: bool | None
    shift: float | None
    window: int | Literal["full"] | None
    sink: int | None
    sigma_commit: float | None
    num_latent_frames: int | None
    files: tuple[WeightFile, ...]
    lora_rank: int | None = None
    lora_alpha: float | None = None
    licence: str | None
    licence_scope: Literal["code and weights", "repository"] | None
    source: str
    paper: str | None
    notes: str = ""

    def __post_init__(self) -> None:
        if self.steps is not None and len(self.steps) != self.num_steps:
            raise ValueError(
                f"got {len(self.steps)} steps in preset {self.name!r}; expected num_steps={self.num_steps}"
            )
        if self.chunk and isinstance(self.window, int) and self.window < self.chunk + (self.sink or 0):
            raise ValueError(
                f"got window={self.window} in preset {self.name!r}; expected room for the sink and one chunk"
            )
