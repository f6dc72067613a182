"""Layers of STDiT: spatial, prefix-enhanced, temporal and text attention of one block, head, position features.

Names of parameters are those of Open-Sora v1. Only the norms in front of the spatial attention and of the MLP exist:
the other attentions read the residual stream as it is (arXiv:2411.16375 section 3; the published network).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from unspool.causal.context import Context, Site
from unspool.causal.prefix import JOINT, SEPARATE
from unspool.models.stdit.config import STDiTConfig
from unspool.ops.attention import sdpa
from unspool.ops.norm import gated_add, gelu_tanh, layer_norm, modulate


def position_features(positions: Tensor, width: int, scale: float) -> Tensor:
    """[sin | cos] features [n, width] of coordinates [n] / scale, in fp64 where `positions` lie."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angles = (positions.double() / scale)[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache(maxsize=16)
def spatial_features(rows: int, columns: int, width: int, scale: float) -> Tensor:
    """Features [rows * columns, width] of a grid on the CPU: the first half tells the column, the second the row."""
    with torch.inference_mode(False):  # it is remembered, and what is made inside that mode can never be trained with
        across = position_features(torch.arange(columns, device="cpu"), width // 2, scale)
        down = position_features(torch.arange(rows, device="cpu"), width // 2, scale)
        return torch.cat([across.repeat(rows, 1), down.repeat_interleave(columns, 0)], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """What a block knows of the latent frames of one forward.

    `count` latent frames; `time` [b|1, t|1, 6, dim] modulation; `positions` [t, dim] features of the temporal
    positions; `clean` [b|1, t|1] 1 where a frame is clean, else 0.
    """

    count: int
    time: Tensor
    positions: Tensor
    clean: Tensor


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Keys and values [b g, rows, heads, d] of one layer, g = 1 or one group per latent frame; `mask` [b g, rows]."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class Attention(nn.Module):
    """Projections of one self-attention; rows of `qkv` are q, k, v, each head by head. No norm of q and k."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [b, n, heads, d] of x [b, n, dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v


class CrossAttention(nn.Module):
    """Attention over the text rows that are read."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., rows, heads, d] of embedded text [..., rows, dim]."""
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return k, v

    def forward(self, x: Tensor, text: Captions) -> Tensor:
        """x [b, n, dim]: the tokens of a sample are as many equal groups as it has captions."""
        groups = text.keys.shape[0] // x.shape[0]
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).unflatten(1, (groups, -1)).flatten(0, 1)
        mask = None if text.mask is None else text.mask[:, None, None]
        out = sdpa(q, text.keys.to(q.dtype), text.values.to(q.dtype), mask)
        return self.proj(out.flatten(2).unflatten(0, (x.shape[0], groups)).flatten(1, 2))


class Mlp(nn.Module):
    """Two layers with GELU in its tanh form."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, inner)
        self.fc2 = nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_tanh(self.fc1(x)))


class CaptionEmbedder(nn.Module):
    """Text states to the width of the network; `y_embedding` [rows, channels] is the learned null caption."""

    y_embedding: Tensor

    def __init__(self, channels: int, rows: int, dim: int) -> None:
        super().__init__()
        self.y_proj = Mlp(channels, dim, dim)
        self.register_buffer("y_embedding", torch.randn(rows, channels) / channels**0.5)

    def forward(self, states: Tensor) -> Tensor:
        return self.y_proj(states)


class TimestepEmbedder(nn.Module):
    """Two layers over the features of a timestep; called through `wide_linear`, so it only holds them."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))


class Block(nn.Module):
    """One block. Rows of the modulation: shift, scale, gate of the attentions, then of the MLP."""

    compiled_methods = (
        "before_spatial", "after_spatial", "after_prefix", "before_temporal", "after_temporal", "feed_forward",
    )  # fmt: skip

    def __init__(self, config: STDiTConfig, index: int) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.eps, self.is_first = config.eps, index == 0
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn = Attention(dim, heads)
        self.attn_temp = Attention(dim, heads)
        self.mlp = Mlp(dim, config.mlp_ratio * dim, dim)
        name = f"blocks.{index}."
        self.temporal = Site(
            index=2 * index, heads=heads, head_dim=config.head_dim, name=name + "attn_temp", rows=None,
            tokens_per_frame=1,
        )  # fmt: skip
        self.attn_temp_pre_merge: nn.Linear | None = None
        self.joint: Site | None = None
        self.separate: Site | None = None
        if config.prefix_attention == "joint":
            self.joint = Site(
                index=2 * index + 1, heads=heads, head_dim=config.head_dim, name=name + "attn", stream=JOINT
            )
        if config.prefix_attention == "separate":
            self.attn_cf = Attention(dim, heads)
            self.separate = Site(
                index=2 * index + 1, heads=heads, head_dim=config.head_dim, name=name + "attn_cf", stream=SEPARATE
            )
        if config.mask_channel and self.is_first:
            self.attn_temp_pre_merge = nn.Linear(dim + 1, dim)
        if config.caption_dim:
            self.cross_attn = CrossAttention(dim, heads)

    @property
    def sites(self) -> list[Site]:
        return [site for site in (self.temporal, self.joint, self.separate) if site is not None]

    def _rows(self, time: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three modulation rows [b|1, t|1, dim] from `first` on, in the precision of `time`."""
        shift, scale, gate = (time[:, :, first : first + 3] + self.scale_shift_table[first : first + 3]).unbind(2)
        return shift, scale, gate

    def forward(self, x: Tensor, frames: Frames, text: Captions | None, context: Context) -> Tensor:
        """x [b, t n, dim], n tokens per latent frame."""
        time = frames.time
        x = self.after_spatial(x, self._spatial(self.before_spatial(x, time), frames.count, context), time)
        if self.separate is not None:
            prefix = context.attend(self.separate, *self.attn_cf.project(x), None)
            x = self.after_prefix(x, prefix.flatten(2), time)
        q, k, v = self.before_temporal(x, frames.positions, frames.clean)
        out = context.attend(self.temporal, q, k, v, None)
        x = self.after_temporal(x, out, time)
        if text is not None:
            x = x + self.cross_attn(x, text)
        return self.feed_forward(x, time)

    # What lies between two attentions, without them: compiled, it is fused into few kernels.

    def before_spatial(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [b, t n, heads, d] of the spatial attention."""
        shift, scale, _ = self._rows(time, 0)
        return self.attn.project(modulate(layer_norm(x, self.eps), shift, scale).to(x.dtype))

    def after_spatial(self, x: Tensor, out: Tensor, time: Tensor) -> Tensor:
        """x [b, t n, dim] with the attention's `out`, of the same shape, projected and gated."""
        return gated_add(x, self.attn.proj(out), self._rows(time, 0)[2])

    def after_prefix(self, x: Tensor, out: Tensor, time: Tensor) -> Tensor:
        """As `after_spatial`, for an attention over the prefix alone."""
        return gated_add(x, self.attn_cf.proj(out), self._rows(time, 0)[2])

    def before_temporal(self, x: Tensor, positions: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [b n, t, heads, d]: attention over time at every spatial position alone. Positions [t, dim] and
        `clean` enter once, in front of the first layer's."""
        count = positions.shape[0]
        if self.is_first:
            grouped = x.unflatten(1, (count, -1)) + positions[None, :, None].to(x.dtype)
            if self.attn_temp_pre_merge is not None:
                told = clean[:, :, None, None].to(x.dtype).expand(*grouped.shape[:3], 1)
                grouped = self.attn_temp_pre_merge(torch.cat([grouped, told], dim=-1))
            x = grouped.flatten(1, 2)
        q, k, v = (part.unflatten(1, (count, -1)).transpose(1, 2).flatten(0, 1) for part in self.attn_temp.project(x))
        return q, k, v

    def after_temporal(self, x: Tensor, out: Tensor, time: Tensor) -> Tensor:
        """As `after_spatial`, of `out` [b n, t, heads, d]."""
        out = out.flatten(2).unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(1, 2)
        return gated_add(x, self.attn_temp.proj(out), self._rows(time, 0)[2])

    def feed_forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [b, t n, dim] after the normed, modulated and gated MLP."""
        shift, scale, gate = self._rows(time, 3)
        return gated_add(x, self.mlp(modulate(layer_norm(x, self.eps), shift, scale).to(x.dtype)), gate)

    def _spatial(self, parts: tuple[Tensor, Tensor, Tensor], count: int, context: Context) -> Tensor:
        """Attention [b, t n, dim] within each latent frame, or with the last clean frames beside it."""
        q, k, v = parts
        if self.joint is not None:
            return context.attend(self.joint, q, k, v, None).flatten(2)
        q, k, v = (rearrange(part, "b (t n) h d -> (b t) n h d", t=count) for part in parts)
        return rearrange(sdpa(q, k, v), "(b t) n h d -> b (t n) (h d)", t=count)


class FinalLayer(nn.Module):
    """Final modulated norm and projection to patches, channels fastest."""

    def __init__(self, dim: int, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, features)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Patches [b, n, features] of x [b, n, dim]; `embedding` [b|1, t|1, dim] is that of the timestep itself."""
        shift, scale = (embedding[:, :, None] + self.scale_shift_table).unbind(2)
        return self.linear(modulate(layer_norm(x, self.eps), shift, scale).to(x.dtype))
