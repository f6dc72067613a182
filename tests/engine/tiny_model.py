"""A model folder with random weights: small enough for tests, with every part that a real one has."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from unspool.diffusion.schedule import uniform
from unspool.engine.load import load
from unspool.engine.model_folder import ModelSpec, Part, save_model_folder
from unspool.engine.pipeline import Pipeline
from unspool.engine.settings import RolloutSettings
from unspool.geometry import Geometry
from unspool.models.caption import CaptionConfig, CaptionEncoder
from unspool.models.taehv import Taehv, TaehvConfig
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer

CHANNELS, TEXT_DIM, ROWS = 4, 8, 10
WORDS = ("a", "red", "blue", "ball", "star", "bounces", "drifts", "left", "at", "night", "sunset")
SETTINGS = RolloutSettings(
    chunk=3, window=9, sink=3, positions="relative", sigmas=uniform(2, shift=3.0).sigmas, shift=3.0, solver="euler",
    guidance_scale=2.0, sigma_commit=0.0, switch_policy="keep",
)  # fmt: skip
SPEC = ModelSpec(
    name="tiny", kind="causal", about="random weights for tests", transformer=Part(kind="wan"),
    codec=Part(kind="taehv"), text=Part(kind="caption"), height_px=16, width_px=32, fps=16.0, geometry=Geometry(),
    clip=7, rollout=SETTINGS, seconds=1.5, examples=("a red ball bounces at sunset",), licence="Apache-2.0",
)  # fmt: skip


def scatter(module: torch.nn.Module, seed: int) -> None:
    """Random values for every parameter, so that nothing is zero and everything has an effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            values = torch.randn(weight.shape, generator=draw)
            if weight.ndim > 1 and "modulation" not in name:
                values = values / math.sqrt(weight[0].numel())
            else:
                values = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.3 * values
            weight.copy_(values)


def parts(seed: int = 0) -> dict[str, Any]:
    """transformer, codec and text with seeded random weights."""
    transformer = WanTransformer(
        WanConfig(
            dim=24, ffn_dim=32, num_layers=2, num_heads=2, in_channels=CHANNELS, out_channels=CHANNELS,
            text_dim=TEXT_DIM, text_len=ROWS + 1, freq_dim=16,
        )
    )  # fmt: skip
    codec = Taehv(
        TaehvConfig(
            encoder_widths=4, decoder_widths=(8, 8, 4, 4), latent_channels=CHANNELS, padding="start", num_blocks=1
        )
    )
    text = CaptionEncoder(CaptionConfig(words=WORDS, dim=8, out_dim=TEXT_DIM, layers=1, heads=2, rows=ROWS, slots=1))
    for number, module in enumerate((transformer, codec, text)):
        scatter(module, 10 * seed + number)
    return {"transformer": transformer, "codec": codec, "text": text}


def save(folder: Path, spec: ModelSpec = SPEC, *, seed: int = 0) -> ModelSpec:
    return save_model_folder(folder, spec, **parts(seed), card="# tiny\n")


def pipeline(spec: ModelSpec = SPEC, *, seed: int = 0) -> Pipeline:
    """The tiny model without a folder."""
    return Pipeline(spec, **{name: m.eval().requires_grad_(False) for name, m in parts(seed).items()}, source="tiny")


@lru_cache(maxsize=1)
def shared() -> Pipeline:
    """One pipeline for all tests that only generate."""
    return pipeline()


def bidirectional() -> Pipeline:
    rollout = replace(SETTINGS, window="full", sink=0, positions="absolute")
    return pipeline(replace(SPEC, name="tiny-teacher", kind="bidirectional", rollout=rollout))


__all__ = ["SETTINGS", "SPEC", "bidirectional", "load", "parts", "pipeline", "save", "shared"]
