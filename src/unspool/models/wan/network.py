"""The Wan2.1 transformer (arXiv:2503.20314), bidirectional and causal in one class: what it may read is the context's.

Public layout is `b t c h w`; weights are interchangeable one to one with published ones, except that q, k, v (and the
text's k, v) are stored as one matrix. `sigma` is a float per latent frame; timestep = 1000 sigma exists only in here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unspool.causal.context import Context, Site
from unspool.models.base import Conditioning, Prompts, Text, patch_grid
from unspool.models.wan.config import WanConfig
from unspool.models.wan.layers import Block, Head, place_features, time_features, wide_linear
from unspool.ops.rope import Rope
from unspool.shapes import to_device

if TYPE_CHECKING:
    from pathlib import Path


class WanTransformer(nn.Module):
    """Wan2.1 text-to-video transformer of any size.

    Args: `config` sizes. `gradient_checkpointing` (attribute) recomputes blocks in the backward.
    Raises ValueError on shapes that do not fit, before any work.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim = config.dim
        channels = config.in_channels + config.extra_channels
        self.patch_embedding = nn.Conv3d(channels, dim, config.patch_size, config.patch_size)
        if config.place_octaves:
            self.place_embedding = nn.Linear(config.place_features, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.frame_vector_dim:
            vectors = nn.Linear(config.frame_vector_dim, dim)
            self.frame_embedding = nn.Sequential(vectors, nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.num_heads, config.eps, i) for i in range(config.num_layers)
        )
        patch = config.patch_size[1] * config.patch_size[2]
        self.head = Head(dim, config.out_channels * patch, config.eps)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for matrices, zero output, text and time embeddings by their inputs (as Wan2.1 at its own sizes)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for sequence in (self.text_embedding, self.time_embedding):
            for layer in sequence:
                if isinstance(layer, nn.Linear):
                    # The published std of 0.02 is about this at 4096 inputs. At 192 it leaves text and noise level two
                    # orders below the latents, and a small network hardly learns to heed them.
                    nn.init.normal_(layer.weight, std=max(0.02, layer.in_features**-0.5))
        nn.init.zeros_(self.head.head.weight)
        if self.config.frame_vector_dim:
            last = self.frame_embedding[2]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    # ---- what caches and rollouts ask --------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        return [block.site for block in self.blocks]  # type: ignore[misc]

    def fsdp_units(self) -> list[Any]:
        """What is sharded together: each block, and apart from it what `prepare` calls outside the block's forward."""
        return [unit for b in self.blocks for unit in ([b.cross_attn.kv, b.cross_attn.norm_k], b)]  # type: ignore[union-attr]

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels

    def tokens_per_frame(self, rows: int, columns: int) -> int:
        grid = patch_grid(rows, columns, self.config.patch_size)
        return grid[0] * grid[1]

    def prepare(self, text: Text | Tensor) -> Prompts:
        """Keys and values of every cross-attention for text states [b, prompts, rows, text_dim].

        Fewer than `config.text_len` rows are padded with zeros, which the published weights attend to.
        Raises ValueError for more rows, another width, or states that are not finite (asked only of those on the CPU: a
        GPU would be waited for, at every step of a training).
        """
        states = Text.of(text).states
        rows, width = states.shape[2:]
        if width != self.config.text_dim or rows > self.config.text_len or rows < 1:
            raise ValueError(
                f"text states [b, prompts, rows, channels] = {tuple(states.shape)}: expected 1..{self.config.text_len} "
                f"rows of {self.config.text_dim} channels; encode the prompt with this model's text encoder"
            )
        if states.device.type == "cpu" and not bool(torch.isfinite(states).all()):
            raise ValueError("text states hold NaN or infinity; expected finite values: check the text encoder's dtype")
        weight = self.patch_embedding.weight
        states = F.pad(states.to(weight.device, weight.dtype), (0, 0, 0, self.config.text_len - rows))
        embedded = self.text_embedding(states)
        pairs = [block.cross_attn.prepare(embedded) for block in self.blocks]  # type: ignore[union-attr, operator]
        return Prompts(keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Context) -> Tensor:
        """Velocity [b, t, c, h, w] (at least fp32) of noisy latents `x` at noise levels `sigma` [b|1, t|1]."""
        self._check(x, sigma, cond)
        batch, frames = x.shape[:2]
        grid = patch_grid(x.shape[3], x.shape[4], self.config.patch_size)
        hidden = self._embed(x, cond)
        embedding, modulation = self._time(sigma, cond)
        rope = Rope.for_head(self.config.dim // self.config.num_heads, grid)
        index = self._prompt_rows(cond, batch, frames, x.device)
        for number, block in enumerate(self.blocks):
            k, v = _select(cond.prompts, number, index)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, modulation, k, v, context, rope, use_reentrant=False)
            else:
                hidden = block(hidden, modulation, k, v, context, rope)
        out = self.head.project(hidden, embedding)
        _, ph, pw = self.config.patch_size
        out = rearrange(out, "b (t h w) (p q c) -> b t c (h p) (w q)", t=frames, h=grid[0], w=grid[1], p=ph, q=pw)
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out

    def _embed(self, x: Tensor, cond: Conditioning) -> Tensor:
        weight = self.patch_embedding.weight
        x = x.to(weight.dtype)
        if cond.channels is not None:
            extra = cond.channels.to(x.device, x.dtype).expand(*x.shape[:2], *cond.channels.shape[2:])
            x = torch.cat([x, extra], dim=2)
        _, ph, pw = self.config.patch_size
        patches = rearrange(x, "b t c (h p) (w q) -> b (t h w) (c p q)", p=ph, q=pw)
        # A convolution whose kernel is its stride is a matrix product. The stream keeps the dtype of the weights.
        hidden = F.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        if self.config.place_octaves:
            grid = patch_grid(x.shape[3], x.shape[4], self.config.patch_size)
            hidden = (hidden.unflatten(1, (x.shape[1], -1)) + self._places(grid)).flatten(1, 2)
        return hidden.to(weight.dtype)

    def _places(self, grid: tuple[int, int]) -> Tensor:
        """What is added to the tokens [rows * columns, dim] of every latent frame for where they are."""
        weight, bias = self.place_embedding.weight, self.place_embedding.bias
        of_row, of_column = weight.chunk(2, dim=1)
        rows, columns = (
            to_device(place_features(count, self.config.place_octaves).to(weight.dtype), weight.device)
            for count in grid
        )
        return (F.linear(rows, of_row, bias)[:, None] + F.linear(columns, of_column)).flatten(0, 1)

    def _time(self, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Embedding [b|1, t|1, dim] and modulation [b|1, t|1, 6, dim], computed once per distinct sigma.

        Equal levels are found on the host: a sigma that lies on a GPU is taken as it is, to look would wait for it.
        """
        first, second = self.time_embedding[0], self.time_embedding[2]
        projection = self.time_projection[1]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and isinstance(projection, nn.Linear)
        inverse = None
        if sigma.numel() > 1 and sigma.device.type == "cpu" and cond.vectors is None:
            values, inverse = torch.unique(sigma, return_inverse=True)
            sigma = values[None]
        features = to_device(time_features(1000.0 * sigma.double(), self.config.freq_dim), first.weight.device)
        wide = torch.float64 if first.weight.dtype == torch.float64 else torch.float32
        embedding = wide_linear(F.silu(wide_linear(features.to(wide), first)), second)
        if self.config.frame_vector_dim and cond.vectors is not None:
            inner, outer = self.frame_embedding[0], self.frame_embedding[2]
            assert isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)
            embedding = embedding + wide_linear(
                F.silu(wide_linear(cond.vectors.to(embedding.device, wide), inner)), outer
            )
        modulation = wide_linear(F.silu(embedding), projection).unflatten(-1, (6, -1))
        if inverse is None:
            return embedding, modulation
        inverse = to_device(inverse, embedding.device)
        return embedding[0][inverse], modulation[0][inverse]

    def _prompt_rows(self, cond: Conditioning, batch: int, frames: int, device: torch.device) -> Tensor | None:
        """Flat indices of the prompt of every latent frame, or None when all follow the only prompt."""
        index = cond.prompt_index
        if index is not None:
            fits = index.ndim == 2 and index.shape[0] in (1, batch) and index.shape[1] in (1, frames)
            # On a GPU the values are not looked at: that would wait for it.
            known = not fits or index.device.type != "cpu" or index.numel() == 0
            if not fits or not (known or bool(((index >= 0) & (index < cond.prompts.num_prompts)).all())):
                raise ValueError(
                    f"prompt_index of shape {tuple(index.shape)}: expected [{batch} or 1, {frames} or 1] with values "
                    f"0..{cond.prompts.num_prompts - 1}, the number of a prompt for every latent frame"
                )
        if cond.prompts.num_prompts == 1:
            return None
        if index is None:
            index = torch.zeros(1, 1, dtype=torch.int64)
        index = to_device(index, device).expand(batch, frames)
        first = torch.arange(batch, device=device)[:, None] * cond.prompts.num_prompts
        return (first + index).flatten()

    def _check(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[2] != config.in_channels:
            raise ValueError(
                f"latents of shape {tuple(x.shape)}: expected [b, t, {config.in_channels}, h, w] (time before channels)"
            )
        batch, frames = x.shape[:2]
        if sigma.ndim != 2 or sigma.shape[0] not in (1, batch) or sigma.shape[1] not in (1, frames):
            raise ValueError(f"sigma of shape {tuple(sigma.shape)}: expected [{batch} or 1, {frames} or 1]")
        if cond.prompts.batch != batch or len(cond.prompts.keys) != config.num_layers:
            raise ValueError(
                f"prompts of {cond.prompts.batch} samples and {len(cond.prompts.keys)} layers: expected {batch} and "
                f"{config.num_layers}; make them with this network's prepare()"
            )
        extra = 0 if cond.channels is None else cond.channels.shape[2]
        if extra != config.extra_channels:
            raise ValueError(f"{extra} conditioning channels: expected config.extra_channels={config.extra_channels}")
        if cond.channels is not None:
            shape = tuple(cond.channels.shape)
            sizes = len(shape) == 5 and shape[0] in (1, batch) and shape[1] in (1, frames) and shape[3:] == x.shape[3:]
            if not sizes:
                raise ValueError(
                    f"conditioning channels of shape {shape}: expected [{batch} or 1, {frames} or 1, "
                    f"{config.extra_channels}, {x.shape[3]}, {x.shape[4]}]"
                )
        width = 0 if cond.vectors is None else cond.vectors.shape[-1]
        if cond.vectors is not None:
            shape = tuple(cond.vectors.shape)
            fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, frames)
            if not fits or width != config.frame_vector_dim:
                raise ValueError(
                    f"conditioning vectors of shape {shape}: expected [{batch} or 1, {frames} or 1, "
                    f"frame_vector_dim={config.frame_vector_dim}]"
                )

    # ---- files -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> WanTransformer:
        """Load from a directory or a hub repository; options as `unspool.models.wan.load.from_pretrained`."""
        return _loader("from_pretrained")(source, **options)

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> WanTransformer:
        """Load one checkpoint file of any known format; options as `unspool.models.wan.load.load_wan`."""
        return _loader("load_wan")(path, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write config.json and safetensors; options as `unspool.models.wan.load.save_wan`."""
        _loader("save_wan")(self, directory, **options)


def _loader(name: str) -> Callable[..., Any]:
    from unspool.models.wan import load

    return getattr(load, name)


def _select(prompts: Prompts, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values [b g, rows, heads, d] of one layer: g = 1, or one group per latent frame."""
    k, v = prompts.keys[layer].flatten(0, 1), prompts.values[layer].flatten(0, 1)
    return (k, v) if index is None else (k.index_select(0, index), v.index_select(0, index))
