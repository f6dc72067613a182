"""Layers of the Wan2.1 transformer: time embedding, text and self attention, block, head (wan_causal 1.2).

Time embedding and modulation run in at least fp32, norms too; the residual stream has the dtype of the weights. A
block is cut in two methods around the attention over the past, so that both can be compiled with static shapes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.causal.context import Context, Site
from unspool.ops.attention import sdpa
from unspool.ops.norm import gated_add, gelu_tanh, layer_norm, modulate, per_frame, rms_norm, upcast
from unspool.ops.rope import Rope


class RMSNorm(nn.Module):
    """RMS norm over all heads together."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def wide_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` in at least fp32, whatever its weights are and whether or not autocast is on."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if layer.bias is None else upcast(layer.bias)
        return F.linear(upcast(x), upcast(layer.weight), bias)


def place_features(count: int, octaves: int) -> Tensor:
    """[count, 1 + 2 octaves] in fp64 for `count` tokens along one side of the picture: the coordinate u of each centre
    in (-1, 1), sin(pi 2^k u) and cos(pi 2^k u). They are of the picture, not of the grid: another resolution has the
    same places."""
    u = (2.0 * torch.arange(count, dtype=torch.float64) + 1.0) / count - 1.0
    angles = math.pi * u[:, None] * 2.0 ** torch.arange(octaves)
    return torch.cat([u[:, None], angles.sin(), angles.cos()], dim=1)


def time_features(timestep: Tensor, width: int) -> Tensor:
    """[cos | sin] features [..., width] of a float timestep = 1000 sigma, in fp64."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SelfAttention(nn.Module):
    """Projections of one self-attention; q, k and v are one matrix product."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed q, k and v [b, n, heads, d], not rotated."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        split = (self.heads, -1)
        return self.norm_q(q).unflatten(-1, split), self.norm_k(k).unflatten(-1, split), v.unflatten(-1, split)


class CrossAttention(nn.Module):
    """Attention over all text rows, padding included and without a mask, as the published weights expect."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., rows, heads, d] of embedded text [..., rows, dim]."""
        k, v = self.kv(text).chunk(2, dim=-1)
        return self.norm_k(k).unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x [b, n, dim] over k, v [b g, rows, heads, d]: the tokens of a sample are g equal groups of queries."""
        groups = k.shape[0] // x.shape[0]
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        q = q.unflatten(1, (groups, -1)).flatten(0, 1)
        out = sdpa(q, k.to(q.dtype), v.to(q.dtype))
        return self.o(out.flatten(2).unflatten(0, (x.shape[0], groups)).flatten(1, 2))


class Block(nn.Module):
    """One transformer block. `modulation` holds (shift1, scale1, gate1, shift2, scale2, gate2)."""

    compiled_methods = ("before_attention", "after_attention")

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float, index: int) -> None:
        super().__init__()
        self.eps = eps
        self.site = Site(index=index, heads=heads, head_dim=dim // heads, name=f"blocks.{index}.self_attn")
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def _rows(self, time: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three modulation rows [b|1, f|1, dim] from `first` on, in the precision of `time`."""
        rows = time[:, :, first : first + 3] + self.modulation[:, None, first : first + 3].to(time.dtype)
        shift, scale, gate = rows.unbind(2)
        return shift, scale, gate

    def before_attention(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of hidden states x [b, n, dim]; `time` [b|1, f|1, 6, dim]."""
        shift, scale, _ = self._rows(time, 0)
        return self.self_attn.project(modulate(layer_norm(x, self.eps), shift, scale).to(x.dtype))

    def after_attention(self, x: Tensor, attended: Tensor, time: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rest of the block: output projection, text, feed-forward."""
        _, _, gate = self._rows(time, 0)
        x = gated_add(x, self.self_attn.o(attended.flatten(2)), gate)
        normed = layer_norm(x, self.eps, self.norm3.weight, self.norm3.bias).to(x.dtype)
        x = x + self.cross_attn(normed, k, v).to(x.dtype)
        shift, scale, gate = self._rows(time, 3)
        inner, _, outer = self.ffn
        widened = inner(modulate(layer_norm(x, self.eps), shift, scale).to(x.dtype))
        return gated_add(x, outer(gelu_tanh(widened)), gate)

    def forward(self, x: Tensor, time: Tensor, k: Tensor, v: Tensor, context: Context, rope: Rope) -> Tensor:
        queries, keys, values = self.before_attention(x, time)
        attended = context.attend(self.site, queries, keys, values, rope)
        return self.after_attention(x, attended, time, k, v)


class Head(nn.Module):
    """Final modulated norm and projection to patches."""

    compiled_methods = ("project",)

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def project(self, x: Tensor, time: Tensor) -> Tensor:
        """Patches [b, n, out_features] of x [b, n, dim]; `time` [b|1, f|1, dim] is the embedding itself."""
        rows = time[:, :, None] + self.modulation[:, None].to(time.dtype)
        shift, scale = rows.unbind(2)
        return self.head(modulate(layer_norm(x, self.eps), shift, scale).to(x.dtype))


__all__ = ["Block", "CrossAttention", "Head", "RMSNorm", "SelfAttention", "per_frame", "time_features", "wide_linear"]
