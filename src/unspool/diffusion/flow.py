"""Flow matching on the straight path: `x = (1 - sigma) x0 + sigma noise`, `velocity = noise - x0`.

Source: arXiv:2209.03003 eq. 1, written so that sigma = 1 is noise. The prediction is the
velocity. Every conversion runs in float32 or, where any argument is float64, in float64, and is returned in the dtype
of the first argument. No sigma is looked up in a grid, none is read back from the device, and the ends are exact bit
for bit (which `(1 - sigma) * x0 + sigma * noise` alone is not: it turns -0.0 into 0.0 and a stray NaN into NaN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from unspool.shapes import Latent, Prediction, Sigma, to_device


@dataclass(frozen=True)
class FlowMatching:
    """Straight-path flow matching, the process of Wan-type networks (implements `Process`).

    sigma is a float in [0, 1] or a floating tensor `[b, t]` of at least float32 whose dimensions may be 1. The values
    of a tensor are not checked: that would make the host wait for the device.
    """

    def add_noise(self, x0: Latent, noise: Latent, sigma: float | Sigma) -> Latent:
        """`(1 - sigma) x0 + sigma noise`; x0 itself at sigma 0, the noise itself at sigma 1.

        Raises:
            ValueError: shapes differ, or sigma is out of range, of half precision, or not `[b, t]`.
        """
        return interpolate(x0, noise, sigma)

    def to_x0(self, x: Latent, prediction: Prediction, sigma: float | Sigma) -> Latent:
        """`x - sigma velocity`; x itself at sigma 0. Raises as `add_noise`."""
        if isinstance(sigma, Tensor):
            return _shifted(x, prediction, -_per_frame(sigma, x))
        return _shifted(x, prediction, -check_sigma(sigma))

    def to_noise(self, x: Latent, prediction: Prediction, sigma: float | Sigma) -> Latent:
        """`x + (1 - sigma) velocity`; x itself at sigma 1. Raises as `add_noise`."""
        if isinstance(sigma, Tensor):
            return _shifted(x, prediction, 1.0 - _per_frame(sigma, x))
        return _shifted(x, prediction, 1.0 - check_sigma(sigma))

    def from_x0(self, x: Latent, x0: Latent, sigma: float | Sigma) -> Prediction:
        """Velocity `(x - x0) / sigma`.

        At sigma 0 the noise has left x and the velocity is undefined: a float raises; in a tensor those latent frames
        become NaN, on every device, so that they cannot pass for an answer. Training wants `target` instead.

        Raises:
            ValueError: as `add_noise`, and for the float 0.
        """
        _check_same_shape(x, x0)
        dtype = _compute_dtype(x, x0, sigma)
        difference = x.to(dtype) - x0.to(dtype)
        if isinstance(sigma, Tensor):
            level = _per_frame(sigma, x)
            return (difference / torch.where(level == 0, math.nan, level)).to(x.dtype)
        if check_sigma(sigma) == 0.0:
            raise ValueError(
                "got sigma=0.0, expected sigma > 0: the velocity is undefined there; use target(x0, noise, sigma)"
            )
        return (difference / sigma).to(x.dtype)

    def target(self, x0: Latent, noise: Latent, sigma: float | Sigma) -> Prediction:
        """Velocity `noise - x0`, the same at every sigma. Raises as `add_noise`."""
        _check_same_shape(x0, noise)
        if isinstance(sigma, Tensor):
            _per_frame(sigma, x0)
        else:
            check_sigma(sigma)
        dtype = _compute_dtype(x0, noise, 1.0)
        return (noise.to(dtype) - x0.to(dtype)).to(x0.dtype)

    @overload
    def timestep(self, sigma: float) -> float: ...
    @overload
    def timestep(self, sigma: Sigma) -> Sigma: ...
    def timestep(self, sigma: float | Sigma) -> float | Sigma:
        """`1000 sigma`, unrounded."""
        return 1000.0 * sigma


def interpolate(start: Latent, end: Latent, weight: float | Sigma) -> Latent:
    """`(1 - weight) start + weight end` in at least float32, in the dtype of start.

    weight 0 returns start bit for bit and weight 1 returns end bit for bit; either may be the input tensor itself.

    Raises:
        ValueError: shapes differ, or weight is outside [0, 1], of half precision, or not `[b, t]`.
    """
    _check_same_shape(start, end)
    dtype = _compute_dtype(start, end, weight)
    if not isinstance(weight, Tensor):
        if check_sigma(weight) == 0.0:
            return start
        if weight == 1.0:
            return end.to(start.dtype)
        return ((1.0 - weight) * start.to(dtype) + weight * end.to(dtype)).to(start.dtype)
    level = _per_frame(weight, start)
    mixed = ((1.0 - level) * start.to(dtype) + level * end.to(dtype)).to(start.dtype)
    return torch.where(level == 0, start, torch.where(level == 1, end.to(start.dtype), mixed))


def check_sigma(sigma: float) -> float:
    """sigma, if it lies in [0, 1].

    Raises:
        ValueError: it does not, or it is NaN.
    """
    if not 0.0 <= sigma <= 1.0:
        raise ValueError(f"got sigma={sigma}, expected 0 <= sigma <= 1; a timestep is divided by 1000 first")
    return sigma


def _shifted(x: Latent, velocity: Prediction, factor: float | Tensor) -> Latent:
    """`x + factor velocity`, x itself where factor is 0; a tensor factor is already broadcast over `b t c h w`."""
    _check_same_shape(x, velocity)
    dtype = _compute_dtype(x, velocity, factor)
    if not isinstance(factor, Tensor):
        if factor == 0.0:
            return x
        return (x.to(dtype) + factor * velocity.to(dtype)).to(x.dtype)
    return torch.where(factor == 0, x, (x.to(dtype) + factor * velocity.to(dtype)).to(x.dtype))


def _compute_dtype(a: Tensor, b: Tensor, sigma: float | Tensor) -> torch.dtype:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.promote_types(dtype, sigma.dtype) if isinstance(sigma, Tensor) else dtype


def _per_frame(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma `[b, t]` as `[b, t, 1, 1, 1]`. A sigma `[b]` is refused: it would broadcast over the wrong axis."""
    if sigma.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"got a sigma of {sigma.dtype}, expected float32 or float64; keep sigma out of autocast")
    expected = tuple(x.shape[:2])
    if sigma.ndim != 2 or any(size not in (1, full) for size, full in zip(sigma.shape, expected, strict=True)):
        raise ValueError(
            f"got a sigma of shape {tuple(sigma.shape)}, expected [b, t] = {list(expected)} with 1 allowed for either; "
            "use sigma[:, None] for one level per sample"
        )
    # The levels may lie on the host, where a network looks for equal ones.
    return to_device(sigma, x.device).reshape(*sigma.shape, *(1,) * (x.ndim - 2))


def _check_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"got latents of shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same [b, t, c, h, w]; "
            "expand or slice one of them first"
        )
