"""The recorded STDiT and small random ones, and the ways in which the tests run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unspool.causal.context import Context
from unspool.causal.position import Cyclic
from unspool.causal.prefix import PrefixEnhanced
from unspool.causal.visibility import Visibility, Window, Within
from unspool.models.base import Conditioning
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.load import ADDED, DERIVED, TEXT
from unspool.models.stdit.network import STDiT

Golden = Callable[[str], dict[str, Tensor]]

SIZES = dict(dim=48, num_layers=3, num_heads=4)
CAPTION = dict(caption_dim=20, caption_len=6)
CHUNK, PMAX, LENGTH, PREFIX = 8, 25, 33, 3
CYCLIC = Cyclic(length=LENGTH)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + "/")}
    assert found, f"no recorded tensor starts with {prefix}/"
    return found


def swap(x: Tensor) -> Tensor:
    """Channels and time, counted from the end so that leading dimensions may differ."""
    return x.transpose(-4, -3)


def config_of(features: dict[str, Any]) -> STDiTConfig:
    """The parts that a recorded case was run with."""
    parts: dict[str, Any] = dict(CAPTION) if features["text"] else {}
    parts["prefix_attention"] = "separate" if features["prefix_enhanced_spatial"] else "none"
    return STDiTConfig(**SIZES, mask_channel=features["mask_channel"], **parts)


def recorded(golden: Golden, features: dict[str, Any]) -> STDiT:
    """The recorded network with these parts; parameters of other parts are left out."""
    network = STDiT(config_of(features))
    own = network.state_dict()
    spare = (*ADDED, *TEXT)
    weights = {
        name: tensor
        for name, tensor in golden("ca2vdm_weights").items()
        if name in own or not (name in DERIVED or set(name.split(".")) & set(spare))
    }
    network.load_state_dict(weights, strict=True)
    return network.eval().requires_grad_(False)


def randomised(config: STDiTConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> STDiT:
    """A network in which all is random, and the same for a seed: no error can hide behind a zero."""
    network = STDiT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*network.parameters(), *network.buffers()):
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data = noise * (0.3 if parameter.ndim == 1 or fan_in < 2 else fan_in**-0.5)
    return network.to(dtype).eval().requires_grad_(False)


def sees(chunk: int = CHUNK, pmax: int = PMAX, within: Within = "causal", prefix: int | None = PREFIX) -> Visibility:
    """What Ca2-VDM reads: the last `pmax` frames before the chunk, causally; the commit is causal in every form."""
    window = Window(window=pmax + chunk, within=within, commit_within="causal")
    return window if prefix is None else PrefixEnhanced(base=window, frames=prefix)


def levels(timestep: Tensor, clean: Tensor | None = None) -> Tensor:
    """sigma [b, t] of recorded timesteps [b] or [b, t]; `clean` [b, t] is 1 in the prefix."""
    timestep = timestep[:, None] if timestep.ndim == 1 else timestep
    sigma = (timestep.double() + 1.0) / 1000.0
    return sigma if clean is None else torch.where(clean.bool(), 0.0, sigma)


def captions(network: STDiT, case: dict[str, Tensor], batch: int) -> Conditioning:
    """Recorded captions, or nothing for a network without text."""
    if "caption" not in case:
        return Conditioning(prompts=network.prepare(torch.ones(batch, 1, 1)))
    return Conditioning(prompts=network.prepare(masked(case["caption"], case["caption_mask"])))


def masked(caption: Tensor, mask: Tensor) -> Tensor:
    """States [b, rows, channels] with zeros where there is no text."""
    return caption[:, 0] * mask[..., None]


def call(network: STDiT, x: Tensor, sigma: Tensor, cond: Conditioning, context: Context) -> Tensor:
    """A forward on recorded latents [b, c, t, h, w]."""
    return swap(network(swap(x), sigma, cond, context))
