"""`unspool stage-model`: train the shipped model from nothing, in legs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Build the stage model: codec, text encoder, latents, bidirectional teacher, causal student, its distillation to
    few steps, model folders.

    No download and no data are needed: the clips are rendered. Run it again to go on where it stopped; every part is
    kept under --out and made once. An estimated ten hours on two CPU cores at 64 px.
    """

    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Changes of the parts' recipes, such as teacher.train.steps=100 or codec.train.batch=8, and of the stage that is
    rendered for the networks, such as latents.motions=[bounces,orbits,orbits,rests] (twice: twice as often)."""
    size: int = 64
    """Side of the video in pixels: 64 for a CPU, 128 for a GPU."""
    out: Path = Path("runs")
    """Folder of the runs."""
    clips: int = 24_000
    """Clips that are rendered and encoded for training."""
    max_minutes: float | None = None
    """End this leg with everything saved after so many minutes."""
    until: str = "models"
    """Last part to do: codec, text, latents, teacher, student, motion, few, distil, long or models."""
    parts: Path | None = None
    """Model folder whose codec and text encoder are taken instead of training them, such as weights/stage-64-many-step:
    with --until latents all that other recipes for the stage need."""
    assets: Path | None = None
    """Folder to write the student's model into, such as src/unspool/assets/stage."""
    weights: Path | None = None
    """Folder for the model folders of the teacher and the many-step student, such as weights."""


def run(args: Args) -> int:
    """Build; 0 also when the time of the leg ran out with everything saved."""
    from unspool.recipes.stage_model import StageModel, StageModelConfig

    config = StageModelConfig(
        size_px=args.size, out=args.out, clips=args.clips, max_minutes=args.max_minutes, until=args.until,
        parts=args.parts, assets=args.assets, weights=args.weights, overrides=args.overrides,
    )  # fmt: skip
    StageModel(config, tell=lambda line: print(line, flush=True)).run()
    return 0
