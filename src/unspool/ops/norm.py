"""Norms and pointwise functions of a block, in at least fp32 whatever the activations are."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """`x` in fp32 when it is narrower, else as it is (fp64 stays fp64)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm over the last dimension, computed and returned in at least fp32."""
    wide = upcast(x)
    return torch.nn.functional.layer_norm(
        wide,
        (wide.shape[-1],),
        None if weight is None else weight.to(wide.dtype),
        None if bias is None else bias.to(wide.dtype),
        eps,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the full last dimension (all heads together, wan_causal 1.2), returned in the dtype of `x`."""
    wide = upcast(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form. Compiled for a CPU it is written with a sigmoid, the same function of one exponential:
    the vectorised tanh takes about three times as long."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        wide = upcast(x)
        return (wide * torch.sigmoid(1.5957691216057308 * wide * (1 + 0.044715 * wide * wide))).to(x.dtype)
    return torch.nn.functional.gelu(x, approximate="tanh")


def per_frame(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """View tokens [b, n, d] as [b, f, n/f, d] and rows [b|1, f|1, d] as [b|1, f|1, 1, d], f from the rows."""
    frames = rows.shape[1]
    return x.unflatten(1, (frames, x.shape[1] // frames)), rows.unsqueeze(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift with one row per latent frame (or one for all); tokens [b, n, d] of whole frames."""
    grouped, s = per_frame(x, scale)
    return torch.addcmul(shift.unsqueeze(2), grouped, 1 + s).flatten(1, 2)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y with one gate row per latent frame, summed in at least fp32 and returned in the dtype of `x`."""
    grouped, g = per_frame(upcast(y), gate)
    return (upcast(x) + (grouped * g).flatten(1, 2)).to(x.dtype)
