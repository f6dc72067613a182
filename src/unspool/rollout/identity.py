"""What makes two streams the same stream besides their settings: noise and weights, as marks that fit into JSON."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from unspool.models.base import Backbone
from unspool.rollout.noise import NoiseSource


def noise_facts(noise: NoiseSource) -> dict[str, Any]:
    """The state of a noise source, tensors replaced by a hash of their content."""
    return {name: _mark(value) for name, value in noise.state().items()}


def weights_mark(backbone: Backbone) -> str:
    """A short hash over a few numbers of every parameter: tells weights apart without reading all of them."""
    digest = hashlib.sha256()
    for parameter in backbone.parameters():
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, min(flat.numel(), 16), device=flat.device).long()
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[index].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _mark(value: object) -> object:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]
    return list(value) if isinstance(value, tuple) else value
