"""The Wan distillation recipes at toy width, over random latents with text states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unspool.config import apply_overrides, locate
from unspool.data.shard_format import ShardHeader
from unspool.data.shard_writer import ShardWriter
from unspool.data.trajectories import TRAJECTORY
from unspool.models.wan.config import WanConfig
from unspool.recipes import RECIPES
from unspool.train.loop import Trainer

NAMES = ("wan-1.3b-causvid-ode", "wan-1.3b-causvid", "wan-1.3b-consistency", "wan-1.3b-self-forcing")
TOY = WanConfig(dim=24, ffn_dim=48, num_layers=2, num_heads=2, text_dim=8, text_len=4, freq_dim=16)
LARGER = replace(TOY, dim=32, num_heads=2)
SIZE, FRAMES = (2, 4), 21


def data(folder: Path) -> None:
    """Clips, and paths at CausVid's three steps; the states of the empty caption."""
    for name in ("latents", "paths"):
        source = {"source": "trajectories", "sigmas": [1.0, 0.756757, 0.521739, 0.0]} if name == "paths" else {}
        import json

        header = ShardHeader(
            codec="none", codec_sha256=None, normalisation="none", dtype="float32", fps=16.0, num_frames=81,
            height_px=16, width_px=32, latent_shape=(16, *SIZE), frames_rule="1 + 4k", text_encoder="none",
            text_rows=TOY.text_len, source=json.dumps(source),
        )  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        with ShardWriter(folder / name, header) as writer:
            for item in range(4):
                states = torch.randn(4, FRAMES, 16, *SIZE, generator=draw)
                text = torch.randn(1, TOY.text_len, TOY.text_dim, generator=draw)
                extra = {TRAJECTORY: states.half()} if name == "paths" else {}
                writer.add(item, states[-1], ["a clip"], text=text, extra=extra)
    save_file({"null": torch.zeros(TOY.text_len, TOY.text_dim)}, folder / "null.safetensors")


def train(out: Path, folder: str, name: str, *overrides: str) -> Trainer:
    """Two steps of a recipe, its networks of random weights that are alike on every rank."""
    made: Any = locate(name, RECIPES)()
    large = LARGER if name.endswith("self-forcing") else None
    made = replace(made, network=TOY, teacher_network=large, null_text=f"{folder}/null.safetensors",
                   data=f"{folder}/{'paths' if name.endswith('ode') else 'latents'}")  # fmt: skip
    given = (
        "train.optim.lr=1e-3",
        "train.steps=2",
        "train.batch=2",
        "train.device=cpu",
        "train.dtype=fp32",
        "train.frozen_dtype=fp32",
    )
    trainer = Trainer(apply_overrides(made, [*given, *overrides]), out, show=False)
    try:
        trainer.run()
    finally:
        trainer.world.close()
    return trainer
