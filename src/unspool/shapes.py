"""Array types of the library: one name per layout, checked at run time only in tests; and the way to a device.

Latents are `b t c h w` (t counts latent frames), pixels `b f c y x` in [-1, 1], tokens `b n heads d`.
A dimension written with `#` broadcasts: a sigma of shape [1, 1] holds for every sample and latent frame.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Latent: TypeAlias = Float[Tensor, "b t c h w"]
Prediction: TypeAlias = Float[Tensor, "b t c h w"]
WidePrediction: TypeAlias = Float[Tensor, "b t wide h w"]  # channels of a learned variance behind those of x
Pixels: TypeAlias = Float[Tensor, "b f c y x"]
Sigma: TypeAlias = Float[Tensor, "#b #t"]
Tokens: TypeAlias = Float[Tensor, "b n heads d"]
Hidden: TypeAlias = Float[Tensor, "b n width"]
TextStates: TypeAlias = Float[Tensor, "b prompts rows channels"]
PromptIndex: TypeAlias = Int[Tensor, "#b t"]
FrameVectors: TypeAlias = Float[Tensor, "#b t channels"]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; towards CUDA through pinned memory, so that the host does not wait for queued kernels."""
    if device.type == "cuda" and x.device.type == "cpu":
        # an expanded tensor shares memory between its rows, which pin_memory() refuses
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)
