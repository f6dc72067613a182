"""Rotary position embedding for tokens of (time, row, column), with angles computed for any position.

Adjacent features form a pair; each axis has its own base-10000 ladder over its own width (wan_causal 1.2). Angles are
computed in fp64 on the host, so a position of 10^6 latent frames is as exact as position 0; no table, no limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotation of one attention: pairs per axis and the grid of tokens in a latent frame.

    Fields: `pairs` complex pairs of a head for (time, rows, columns), their sum is head_dim / 2; `grid` rows and
    columns of tokens in a latent frame; `base` of the frequency ladder.
    """

    pairs: tuple[int, int, int]
    grid: tuple[int, int]
    base: float = 10000.0

    @staticmethod
    def for_head(head_dim: int, grid: tuple[int, int]) -> Rope:
        """Wan's split: a third of the pairs for rows and columns each, the rest for time (22, 21, 21 of 64)."""
        half = head_dim // 2
        return Rope((half - 2 * (half // 3), half // 3, half // 3), grid)

    def tables(self, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [len(positions) * rows * columns, head_dim / 2] on the CPU, time outermost."""
        rows, columns = self.grid
        angles = [
            _ladder(self.pairs[0], self.base, torch.tensor(positions, dtype=torch.float64)),
            _ladder(self.pairs[1], self.base, torch.arange(rows, dtype=torch.float64)),
            _ladder(self.pairs[2], self.base, torch.arange(columns, dtype=torch.float64)),
        ]
        n = len(positions)
        full = torch.cat(
            [
                angles[0][:, None, None].expand(n, rows, columns, -1),
                angles[1][None, :, None].expand(n, rows, columns, -1),
                angles[2][None, None, :].expand(n, rows, columns, -1),
            ],
            dim=-1,
        ).reshape(n * rows * columns, -1)
        return full.cos().to(dtype), full.sin().to(dtype)

    def time_tables(self, deltas: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables [len(deltas) * tokens, head_dim / 2] that move already rotated keys by `deltas` latent frames."""
        rows, columns = self.grid
        time = _ladder(self.pairs[0], self.base, torch.tensor(deltas, dtype=torch.float64))
        still = torch.zeros(len(deltas), self.pairs[1] + self.pairs[2], dtype=torch.float64)
        full = torch.cat([time, still], dim=-1).repeat_interleave(rows * columns, 0)
        return full.cos().to(dtype), full.sin().to(dtype)


def _ladder(pairs: int, base: float, positions: Tensor) -> Tensor:
    """Angles [positions, pairs] = position * base^(-j / pairs)."""
    exponents = torch.arange(pairs, dtype=torch.float64) / max(pairs, 1)
    return positions[:, None] * base**-exponents


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision in which activations of `dtype` are rotated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of `x` [b, n, heads, d] by tables [n, d / 2]; at least fp32 inside, dtype of `x` out.

    Eager code multiplies complex numbers: the same values in a fifth of the time on a CPU, backward pass included. A
    compiler does not know them and fuses the real form, which is also for features that do not lie side by side.
    """
    wide = x.to(cos.dtype)
    if torch.compiler.is_compiling() or wide.stride(-1) != 1:
        pairs = wide.unflatten(-1, (-1, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        c, s = cos[:, None], sin[:, None]
        return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2).to(x.dtype)
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_and_stage(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, index: Tensor
) -> Tensor:
    """Rotate q and k, write k and v into the token slots `index` of a cache in place, return the rotated q.

    Shapes: q, k, v [b, n, heads, d]; cos, sin [n, d / 2]; keys, values [b, capacity, heads, d]; index [n] int64.
    """
    keys.index_copy_(1, index, rotate(k, cos, sin).to(keys.dtype))
    values.index_copy_(1, index, v.to(values.dtype))
    return rotate(q, cos, sin).transpose(1, 2).contiguous().transpose(1, 2)  # head by head, as attention reads it
