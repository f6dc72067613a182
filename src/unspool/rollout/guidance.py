"""Classifier-free guidance; its convention is stated here and nowhere else.

    guided = uncond + scale * (cond - uncond)        (arXiv:2207.12598 eq. 6 with scale = 1 + w)

scale 1 is no guidance and needs no unconditional branch; 0 is the unconditional prediction. Other texts write
`cond + s * (cond - uncond)`: that s is `scale - 1`, so an s of 0 there is a scale of 1 here. A prediction that also
carries a learned variance is guided in its mean only; the variance is taken from cond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from unspool.shapes import Prediction


@dataclass(frozen=True)
class Guidance:
    """Strength of classifier-free guidance, and how its two branches are run.

    mode: "batch" puts both branches into one forward of twice the batch and one cache of twice the rows; "two_caches"
        runs two forwards, each with its own cache: half the activations, and the branches may differ in shape.

    Raises:
        ValueError: scale is negative or not finite, or mode is unknown.
    """

    scale: float = 1.0
    mode: Literal["batch", "two_caches"] = "batch"

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.mode not in ("batch", "two_caches"):
            raise ValueError(f"got guidance mode {self.mode!r}, expected 'batch' or 'two_caches'")

    @property
    def is_active(self) -> bool:
        """Whether the unconditional branch is needed at all."""
        return self.scale != 1.0


def combine(cond: Prediction, uncond: Prediction, scale: float, *, channels: int | None = None) -> Prediction:
    """`uncond + scale (cond - uncond)`, computed in at least float32, in the dtype of cond.

    scale 1 returns cond itself and 0 returns uncond, bit for bit. Only the first `channels` are guided (None: all);
    what lies behind them, a learned variance, is that of cond.

    Raises:
        ValueError: shapes differ, or scale is negative or not finite.
    """
    _check_scale(scale)
    if channels is not None and channels < cond.shape[2] and scale != 1.0:
        guided = combine(cond[:, :, :channels], uncond[:, :, :channels], scale)
        return torch.cat([guided, cond[:, :, channels:]], dim=2)
    if cond.shape != uncond.shape:
        raise ValueError(
            f"got cond {tuple(cond.shape)} and uncond {tuple(uncond.shape)}, expected one shape; run both on the same x"
        )
    if scale == 1.0:
        return cond
    if scale == 0.0:
        return uncond.to(cond.dtype)
    dtype = torch.promote_types(torch.promote_types(cond.dtype, uncond.dtype), torch.float32)
    base = uncond.to(dtype)
    return (base + scale * (cond.to(dtype) - base)).to(cond.dtype)


def _check_scale(scale: float) -> None:
    if not (scale >= 0.0 and math.isfinite(scale)):
        raise ValueError(f"got guidance scale={scale}, expected a number >= 0; 1.0 is no guidance")
