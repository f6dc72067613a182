"""The TAEHV codec: pixels [-1, 1] to normalised latents and back, whole or as a stream with an explicit state."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unspool.models.taehv.config import GEOMETRY, POOLING, Padding, TaehvConfig
from unspool.models.taehv.layers import Stack, decoder, encoder, initialise
from unspool.ops.norm import upcast
from unspool.shapes import Latent, Pixels, to_device

PIXELS_PER_CALL = 2**20
"""Pixels of one piece of a long clip where the caller does not say: about 1 GB of activations at full width."""


@dataclass(frozen=True, kw_only=True)
class EncodeState:
    """Where an encoding stream stands: the memory blocks' last inputs [b, c, h, w] (None: no group has gone through)
    and the frames [b, 0 to 3, 3, y, x] that wait for the rest of their group."""

    memory: tuple[Tensor, ...] | None
    pending: Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Where a decoding stream stands: the memory blocks' last inputs [b, c, h, w]."""

    memory: tuple[Tensor, ...]


class Taehv(nn.Module):
    """TAEHV (implements `Codec`, and `encode_stream`): 1 + 4k frames are 1 + k latent frames of 1/8 of the size.

    Source: the layout of madebyollin/taehv `taew2_1`. What comes out is at least fp32; what goes in is converted to the
    dtype of the weights. Only `forward`, `encode_raw` and `decode_raw` carry gradients.
    """

    temporal, spatial = GEOMETRY.temporal, GEOMETRY.spatial

    def __init__(self, config: TaehvConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config.encoder, config.latent_channels, config.num_blocks, POOLING)
        self.decoder = decoder(config.decoder_widths, config.latent_channels, config.num_blocks, config.growth)
        initialise(self.encoder, self.decoder)
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    # ---- training ----------------------------------------------------------------------------------------------

    def forward(self, pixels: Pixels, noise: Tensor | None = None) -> tuple[Pixels, Latent]:
        """Reconstruction, not clamped, and latents, in one pass with gradients.

        `noise` [b, t, c, h, w] is added to the latents that the decoder sees, in units of each channel's standard
        deviation over the batch (a constant to the gradient).
        """
        latents = self.encode_raw(pixels)
        if noise is None:
            return self.decode_raw(latents), latents
        scale = latents.detach().std(dim=(0, 1, 3, 4), correction=0, keepdim=True)
        return self.decode_raw(latents + scale * noise), latents

    def encode_raw(self, pixels: Pixels) -> Latent:
        """`encode` in one parallel pass and with gradients."""
        self._check_pixels(pixels)
        self._check_count(pixels)
        before, after = self._repeats(pixels.shape[1])
        padded = torch.cat([pixels[:, :1]] * before + [pixels] + [pixels[:, -1:]] * after, dim=1)
        return self._run_encoder(padded, None, keep=False)[0]

    def decode_raw(self, latents: Latent) -> Pixels:
        """`decode` in one parallel pass, with gradients and not clamped."""
        self._check_latents(latents)
        return self._run_decoder(latents, None, keep=False)[0][:, self.config.frames_per_latent - 1 :]

    # ---- whole clips -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pixels: Pixels, *, frames_per_call: int | None = None) -> Latent:
        """Latents [b, 1 + k, c, y / 8, x / 8] of pixels [b, 1 + 4k, 3, y, x] in [-1, 1].

        With end padding any number of frames is taken; the last one is repeated up to a multiple of 4.
        `frames_per_call` bounds the memory: a long clip goes through in pieces, with the same result.
        Raises ValueError for another shape, integers, or sides that are no multiples of 8.
        """
        self._check_pixels(pixels)
        self._check_count(pixels)
        state, parts = None, []
        for piece in pixels.split(self._piece(pixels[:, 0, 0], frames_per_call), dim=1):
            latents, state = self.encode_stream(piece, state)
            parts.append(latents)
        assert state is not None
        return torch.cat([*parts, self.encode_rest(state)], dim=1)

    @torch.no_grad()
    def decode(self, latents: Latent, *, frames_per_call: int | None = None) -> Pixels:
        """Pixels [b, 1 + 4k, 3, 8 h, 8 w] in [-1, 1] of latents [b, 1 + k, c, h, w], in pieces like `encode`."""
        self._check_latents(latents)
        enlarged = self.spatial**2 * latents[:, 0, 0].numel()
        per_call = frames_per_call or max(PIXELS_PER_CALL // enlarged, 1)
        state, parts = None, []
        for piece in latents.split(max(per_call // self.config.frames_per_latent, 1), dim=1):
            pixels, state = self.decode_stream(piece, state)
            parts.append(pixels)
        return torch.cat(parts, dim=1)

    # ---- streams -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_stream(self, pixels: Pixels, state: EncodeState | None = None) -> tuple[Latent, EncodeState]:
        """The latents [b, 0 or more, c, h, w] that the next frames complete, and the state for the call after.

        With end padding the last frames of a clip wait for `encode_rest`.
        """
        self._check_pixels(pixels)
        if state is None:
            before, _ = self._repeats(1)
            ready = torch.cat([pixels[:, :1]] * before + [pixels], dim=1)
        else:
            self._check_same(pixels, state.pending)
            ready = torch.cat([state.pending, pixels.to(state.pending)], dim=1)
        whole = len(ready[0]) // self.temporal * self.temporal
        latents, memory = self._run_encoder(ready[:, :whole], None if state is None else state.memory)
        return latents, EncodeState(memory=memory, pending=ready[:, whole:].clone())

    @torch.no_grad()
    def encode_rest(self, state: EncodeState) -> Latent:
        """The latents [b, 0 or 1, c, h, w] of the frames that wait at the end of a clip; the state stays valid.

        Raises ValueError with start padding where the clip was not of 1 + 4k frames.
        """
        waiting = state.pending.shape[1]
        if waiting and self.config.padding == "start":
            raise ValueError(f"{waiting} frames are left over: with start padding a clip has 1 + {self.temporal} k "
                             "frames; cut it or go on")  # fmt: skip
        padding = [state.pending[:, -1:]] * (-waiting % self.temporal)
        return self._run_encoder(torch.cat([state.pending, *padding], dim=1), state.memory)[0]

    @torch.no_grad()
    def decode_stream(self, latents: Latent, state: DecodeState | None = None) -> tuple[Pixels, DecodeState]:
        """The pixels [b, f, 3, y, x] of the next latents (1 frame of a clip's first, else 4 of each), and the state."""
        self._check_latents(latents)
        memory = None if state is None else state.memory
        if memory is not None:
            self._check_same(latents, memory[0])
        pixels, memory = self._run_decoder(latents, memory)
        if state is None:
            pixels = pixels[:, self.config.frames_per_latent - 1 :]
        return pixels.clamp_(-1, 1), DecodeState(memory=memory)

    # ---- files, normalisation ----------------------------------------------------------------------------------

    def with_normalisation(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Taehv:
        """A copy whose latents leave as (own latent - mean) / std, whatever this one's normalisation is."""
        found = copy.deepcopy(self)
        found.config = replace(
            self.config, latent_mean=tuple(float(v) for v in mean), latent_std=tuple(float(v) for v in std)
        )
        found._constants = {}
        return found

    def save(self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> Path:
        """Write one safetensors file atomically; the header carries the config."""
        from unspool.models.taehv.load import save_taehv

        return save_taehv(self, path, metadata=metadata)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        padding: Padding | None = None,
        growth: tuple[int, int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Taehv:
        """Read what `save` wrote, or a published `taew2_1` file; arguments and errors as `load_taehv`."""
        from unspool.models.taehv.load import load_taehv

        return load_taehv(path, padding=padding, growth=growth, dtype=dtype, device=device)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _run_encoder(
        self, pixels: Tensor, memory: tuple[Tensor, ...] | None, *, keep: bool = True
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Latents of whole groups of frames [b, 4t, 3, y, x], t may be 0."""
        batch, frames, _, height, width = pixels.shape
        if not frames:
            size = (batch, 0, self.latent_channels, height // self.spatial, width // self.spatial)
            return upcast(pixels.new_empty(size, dtype=self._dtype(self.encoder))), memory
        x, kept = self.encoder(self._fold(pixels, self.encoder) * 0.5 + 0.5, batch, memory, keep=keep)
        latents = upcast(x).unflatten(0, (-1, batch)).transpose(0, 1)
        if self.config.latent_mean is not None:
            mean, std = self._normalisation(latents)
            latents = (latents - mean) / std
        return latents.contiguous(), kept

    def _run_decoder(
        self, latents: Tensor, memory: tuple[Tensor, ...] | None, *, keep: bool = True
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pixels of latents, not clamped, with the frames that a clip's beginning drops."""
        if self.config.latent_mean is not None:
            mean, std = self._normalisation(latents)
            latents = latents * std + mean
        x, kept = self.decoder(self._fold(latents, self.decoder), len(latents), memory, keep=keep)
        return upcast(x).mul(2).sub(1).unflatten(0, (-1, len(latents))).transpose(0, 1), kept

    def _fold(self, x: Tensor, half: Stack) -> Tensor:
        folded = x.to(self._dtype(half)).transpose(0, 1).flatten(0, 1)
        return folded.contiguous(memory_format=torch.channels_last)

    def _dtype(self, half: Stack) -> torch.dtype:
        return next(half.parameters()).dtype

    def _normalisation(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std [c, 1, 1] beside `latents`; kept, because a copy to the device would make every call wait."""
        key = (latents.device, torch.promote_types(latents.dtype, torch.float32))
        if key not in self._constants:
            with torch.inference_mode(False):  # what inference mode makes could not be used in training later
                values = torch.tensor([self.config.latent_mean, self.config.latent_std], dtype=key[1], device="cpu")
                mean, std = to_device(values, key[0])[..., None, None]
            self._constants[key] = mean, std
        return self._constants[key]

    def _repeats(self, frames: int) -> tuple[int, int]:
        """How often a clip's first frame is repeated before it and its last one after it."""
        if self.config.padding == "start":
            return self.temporal - 1, 0
        return 0, -frames % self.temporal

    def _piece(self, plane: Tensor, frames_per_call: int | None) -> int:
        frames = frames_per_call or PIXELS_PER_CALL // plane.numel()
        return max(frames // self.temporal, 1) * self.temporal

    # ---- refusals ----------------------------------------------------------------------------------------------

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"pixels of shape {tuple(pixels.shape)}: expected [b, f, 3, y, x], none of them 0")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels in {pixels.dtype}: expected floats in [-1, 1]; convert bytes with x / 127.5 - 1")
        GEOMETRY.latent_size(*pixels.shape[-2:])

    def _check_count(self, pixels: Tensor) -> None:
        if self.config.padding == "start":
            GEOMETRY.latent_frames(pixels.shape[1])

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels or 0 in latents.shape:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected [b, t, {self.latent_channels}, h, w], none of them "
                "0; these may be another codec's"
            )
        if not latents.is_floating_point():
            raise ValueError(f"latents in {latents.dtype}: expected floats")

    def _check_same(self, given: Tensor, kept: Tensor) -> None:
        if len(given) != len(kept) or given.shape[-2:] != kept.shape[-2:]:
            raise ValueError(
                f"{len(given)} clips of {tuple(given.shape[-2:])} in a stream of {len(kept)} clips of "
                f"{tuple(kept.shape[-2:])}; start a new one with state=None"
            )
