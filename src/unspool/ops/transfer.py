"""Small host tensors to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; towards CUDA through pinned memory, so that the host does not wait for queued kernels."""
    if device.type == "cuda" and x.device.type == "cpu":
        # an expanded tensor shares memory between its rows, which pin_memory() refuses
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)
