"""How often and how a stage training is looked at; see `stage_watch`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """How a training is watched. Fields: `every` steps; `clips` of split "dev", one sprite in the first half of them
    and two in the rest; `frames` of each; `steps` of denoising; `guidance`; `codec` file that decodes."""

    every: int = 1000
    clips: int = 16
    frames: int = 81
    steps: int = 24
    guidance: float = 3.0
    codec: str = ""
