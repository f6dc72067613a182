"""STDiT (Open-Sora v1), bidirectional and causal in one class: what an attention may read is the context's.

Causal temporal attention, cyclic positions and the cache of ViD-GPT (arXiv:2406.10981) and Ca2-VDM (arXiv:2411.16375)
are a `Window(..., within="causal")`, `Cyclic` and a cache; prefix-enhanced attention wants `PrefixEnhanced`. Positions
are added to the hidden state, so they are baked into cached keys: policies that move keys are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unspool.causal.context import Context, Site
from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.iddpm import IDDPM
from unspool.models.base import Conditioning, Prompts, Text, patch_grid
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.layers import (
    Block,
    CaptionEmbedder,
    Captions,
    FinalLayer,
    Frames,
    TimestepEmbedder,
    position_features,
    spatial_features,
)
from unspool.models.wan.layers import time_features, wide_linear
from unspool.shapes import to_device


class PatchEmbedder(nn.Module):
    """Patches to tokens; holds the convolution whose kernel is its stride."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.dim, config.patch_size, config.patch_size)


class STDiT(nn.Module):
    """The factorised transformer of any size.

    A latent frame told sigma 0 is a clean one: it has timestep 0 and, with `config.mask_channel`, its mask is 1.
    `gradient_checkpointing` (attribute) recomputes blocks in the backward. Raises ValueError on shapes that do not fit.
    """

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.process: IDDPM | FlowMatching = IDDPM() if config.process == "iddpm" else FlowMatching()
        dim = config.dim
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(config.freq_dim, dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.caption_dim:
            self.y_embedder = CaptionEmbedder(config.caption_dim, config.caption_len, dim)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        patch = config.patch_size[1] * config.patch_size[2]
        self.final_layer = FinalLayer(dim, config.out_channels * patch, config.eps)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier, and zero where a part is added to a working image network: it starts as that network."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        small = [self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]]
        if self.config.caption_dim:
            small += [self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2]
        for layer in small:
            # The published std of 0.02 is about this at 1152 inputs; at 128 it leaves text and noise level next to
            # nothing to say, and the network does not learn to listen.
            nn.init.normal_(layer.weight, std=max(0.02, layer.in_features**-0.5))  # type: ignore[arg-type, operator]
        for name, module in self.named_modules():
            is_added = name.endswith(("attn_temp.proj", "attn_cf.proj", "cross_attn.proj"))
            if is_added or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
            if name.endswith("attn_temp_pre_merge"):
                nn.init.eye_(module.weight)  # [I | 0]: the mask changes nothing yet

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> Path:
        """Write one safetensors file atomically; the header carries the config."""
        from unspool.models.stdit.load import save_stdit

        return save_stdit(self, path, metadata=metadata)

    @classmethod
    def from_single_file(cls, path: str | os.PathLike[str], **options: Any) -> STDiT:
        """The network in a file of `save` or in a published one; options and errors as `load_stdit`."""
        from unspool.models.stdit.load import load_stdit

        return load_stdit(path, **options)

    # ---- what caches and rollouts ask --------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        return [site for block in self.blocks for site in block.sites]  # type: ignore[union-attr]

    def fsdp_units(self) -> list[Any]:
        """What is sharded together: each block, and apart from it what `prepare` calls outside the block's forward."""
        if not self.config.caption_dim:
            return list(self.blocks)
        return [unit for block in self.blocks for unit in (block.cross_attn.kv_linear, block)]  # type: ignore[union-attr]

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels

    def tokens_per_frame(self, rows: int, columns: int) -> int:
        grid = patch_grid(rows, columns, self.config.patch_size)
        return grid[0] * grid[1]

    def null_text(self, batch: int, *, like: Tensor | None = None) -> Tensor:
        """States [batch, rows, caption_dim] of the learned null caption, for the unconditional branch.

        All its rows are read, unless `like`, states [batch, rows, channels] of the captions it stands beside, is given:
        then as many rows as each caption has, as the published sampler reads the null caption through the mask of the
        caption (there `negative=network.null_text(b, like=text)`). Raises ValueError without text in the network, or
        for captions of another batch or of more rows.
        """
        if not self.config.caption_dim:
            raise ValueError("this network has no text; it needs no null caption, and guidance has no meaning")
        null = self.y_embedder.y_embedding.expand(batch, -1, -1)
        if like is None:
            return null
        if like.ndim != 3 or like.shape[0] != batch or not 1 <= like.shape[1] <= null.shape[1]:
            raise ValueError(
                f"captions of shape {tuple(like.shape)}: expected [{batch}, 1..{null.shape[1]} rows, channels]"
            )
        read = (like != 0).any(-1, keepdim=True).to(null.device)
        return torch.where(read, null[:, : like.shape[1]], 0.0)

    def prepare(self, text: Text | Tensor) -> Prompts:
        """Keys and values of every cross-attention for text states [b, prompts, rows, caption_dim].

        Rows of zeros are no text and are not read. Without text in the network only the numbers of samples and prompts
        count. Raises ValueError for another width, too many rows, and, asked only of states on the CPU, as a GPU would
        be waited for at every step of a training, no text at all or states that are not finite.
        """
        states = Text.of(text).states
        weight = self.x_embedder.proj.weight
        if not self.config.caption_dim:
            nothing = torch.zeros(*states.shape[:2], 1, 1, 1, device=weight.device, dtype=weight.dtype)
            return Prompts(keys=(nothing,), values=(nothing,))
        rows, width = states.shape[2:]
        if width != self.config.caption_dim or not 1 <= rows <= self.config.caption_len:
            raise ValueError(
                f"text states [b, prompts, rows, channels] = {tuple(states.shape)}: expected 1.."
                f"{self.config.caption_len} rows of {self.config.caption_dim} channels; encode the prompt with this "
                "model's text encoder"
            )
        is_known = states.device.type == "cpu"
        if is_known and not bool(torch.isfinite(states).all()):
            raise ValueError("text states hold NaN or infinity; expected finite values: check the text encoder's dtype")
        mask = (states != 0).any(-1)
        if is_known and not bool(mask.any(-1).all()):
            raise ValueError("text states hold a prompt of zeros only; expected text, or null_text() for none")
        embedded = self.y_embedder(states.to(weight.device, weight.dtype))
        pairs = [block.cross_attn.prepare(embedded) for block in self.blocks]  # type: ignore[union-attr, operator]
        read = None if is_known and bool(mask.all()) else to_device(mask, weight.device)
        return Prompts(keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs), mask=read)

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Context) -> Tensor:
        """Prediction [b, t, out_channels, h, w] (at least fp32) of latents `x` at noise levels `sigma` [b|1, t|1]."""
        self._check(x, sigma, cond)
        batch, count = x.shape[:2]
        grid = patch_grid(x.shape[3], x.shape[4], self.config.patch_size)
        hidden = self._embed(x, grid)
        embedding, time = self._time(sigma)
        positions = position_features(context.positions, self.config.dim, self.config.time_scale)
        frames = Frames(
            count=count,
            time=time,
            positions=to_device(positions.to(embedding.dtype), hidden.device),
            clean=to_device(self._is_clean(sigma).to(embedding.dtype), hidden.device),
        )
        index = self._caption_rows(cond, batch, count)
        for number, block in enumerate(self.blocks):
            text = self._captions(cond.prompts, number, index)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, frames, text, context, use_reentrant=False)
            else:
                hidden = block(hidden, frames, text, context)
        out = self.final_layer(hidden, embedding)
        _, ph, pw = self.config.patch_size
        out = rearrange(out, "b (t h w) (p q c) -> b t c (h p) (w q)", t=count, h=grid[0], w=grid[1], p=ph, q=pw)
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out

    def _embed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [b, t n, dim] with their place in the frame added."""
        weight, (_, ph, pw) = self.x_embedder.proj.weight, self.config.patch_size
        patches = rearrange(x.to(weight.dtype), "b t c (h p) (w q) -> b t (h w) (c p q)", p=ph, q=pw)
        tokens = F.linear(patches, weight.flatten(1), self.x_embedder.proj.bias)
        table = spatial_features(*grid, self.config.dim, self.config.space_scale).to(weight.dtype)
        return (tokens + to_device(table, tokens.device)).flatten(1, 2).to(weight.dtype)

    def _is_clean(self, sigma: Tensor) -> Tensor:
        return self.process.is_clean(sigma) if isinstance(self.process, IDDPM) else sigma == 0

    def _time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding [b|1, t|1, dim] and modulation [b|1, t|1, 6, dim], in at least fp32 whatever the weights are."""
        first, second, projection = self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and isinstance(projection, nn.Linear)
        features = time_features(self.process.timestep(sigma.double()), self.config.freq_dim)
        wide = torch.float64 if first.weight.dtype == torch.float64 else torch.float32
        features = to_device(features.to(wide), first.weight.device)
        embedding = wide_linear(F.silu(wide_linear(features, first)), second)
        return embedding, wide_linear(F.silu(embedding), projection).unflatten(-1, (6, -1))

    def _caption_rows(self, cond: Conditioning, batch: int, count: int) -> Tensor | None:
        """Flat indices of the prompt of every latent frame, or None when all follow the only prompt."""
        index = cond.prompt_index
        if index is not None:
            fits = index.ndim == 2 and index.shape[0] in (1, batch) and index.shape[1] in (1, count)
            # On a GPU the values are not looked at: that would wait for it.
            known = not fits or index.device.type != "cpu" or index.numel() == 0
            if not fits or not (known or bool(((index >= 0) & (index < cond.prompts.num_prompts)).all())):
                raise ValueError(
                    f"prompt_index of shape {tuple(index.shape)}: expected [{batch} or 1, {count} or 1] with values "
                    f"0..{cond.prompts.num_prompts - 1}, the number of a prompt for every latent frame"
                )
        if cond.prompts.num_prompts == 1:
            return None
        if index is None:
            index = torch.zeros(1, 1, dtype=torch.int64)
        device = cond.prompts.keys[0].device
        first = torch.arange(batch, device=device)[:, None] * cond.prompts.num_prompts
        return (first + to_device(index, device).expand(batch, count)).flatten()

    def _captions(self, prompts: Prompts, layer: int, index: Tensor | None) -> Captions | None:
        if not self.config.caption_dim:
            return None
        parts = [prompts.keys[layer].flatten(0, 1), prompts.values[layer].flatten(0, 1)]
        mask = None if prompts.mask is None else prompts.mask.flatten(0, 1)
        if index is not None:
            parts = [part.index_select(0, index) for part in parts]
            mask = None if mask is None else mask.index_select(0, index)
        return Captions(keys=parts[0], values=parts[1], mask=mask)

    def _check(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> None:
        channels = self.config.in_channels
        if x.ndim != 5 or x.shape[2] != channels:
            raise ValueError(
                f"latents of shape {tuple(x.shape)}: expected [b, t, {channels}, h, w] (time before channels)"
            )
        batch, count = x.shape[:2]
        if sigma.ndim != 2 or sigma.shape[0] not in (1, batch) or sigma.shape[1] not in (1, count):
            raise ValueError(f"sigma of shape {tuple(sigma.shape)}: expected [{batch} or 1, {count} or 1]")
        layers = self.config.num_layers if self.config.caption_dim else 1
        if cond.prompts.batch != batch or len(cond.prompts.keys) != layers:
            raise ValueError(
                f"prompts of {cond.prompts.batch} samples and {len(cond.prompts.keys)} layers: expected {batch} and "
                f"{layers}; make them with this network's prepare()"
            )
        if cond.channels is not None or cond.vectors is not None:
            raise ValueError(
                "conditioning channels or vectors: this network has no such input; expected neither (which latent "
                "frames are clean it sees by their sigma of 0)"
            )
