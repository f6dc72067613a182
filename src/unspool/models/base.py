"""What a network must offer to be trained, distilled, streamed and served here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from unspool.causal.context import Context, Site
from unspool.shapes import Latent, Pixels


def patch_grid(rows: int, columns: int, patch_size: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns of tokens of a latent frame, for patches (frames, rows, columns). Raises ValueError where the
    patches do not fit."""
    _, ph, pw = patch_size
    if rows < 1 or columns < 1 or rows % ph or columns % pw:
        up = (max(-(-rows // ph), 1) * ph, max(-(-columns // pw), 1) * pw)
        raise ValueError(f"latents of {rows}x{columns}: expected multiples of the patch {ph}x{pw}; use {up[0]}x{up[1]}")
    return rows // ph, columns // pw


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text states of one or more prompts per sample.

    `states` [b, prompts, rows, channels]; rows past the end of a prompt are zero. A plain [b, rows, channels] tensor is
    accepted by `Text.of`.
    """

    states: Tensor

    @staticmethod
    def of(states: Tensor | Text) -> Text:
        """One prompt per sample from [b, rows, channels], or several from [b, prompts, rows, channels]."""
        if isinstance(states, Text):
            return states
        if states.ndim == 3:
            states = states[:, None]
        if states.ndim != 4:
            raise ValueError(
                f"text states of shape {tuple(states.shape)}: expected [b, rows, channels] or "
                "[b, prompts, rows, channels]"
            )
        return Text(states=states)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """All that a network can compute from the prompts alone: keys and values of every cross-attention.

    `keys`, `values` per layer [b, prompts, rows, heads, head_dim]; `mask` [b, prompts, rows] is True where a row is
    read (None: all are).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_prompts(self) -> int:
        return self.keys[0].shape[1]

    @staticmethod
    def join(parts: list[Prompts], dim: int) -> Prompts:
        """Concatenate along the batch (0) or along the prompts (1); shorter texts get rows that are not read."""
        rows = max(part.keys[0].shape[2] for part in parts)
        parts = [part._padded(rows) for part in parts]
        layers = range(len(parts[0].keys))
        masks = [part._rows_read() for part in parts] if any(p.mask is not None for p in parts) else []
        return Prompts(
            mask=torch.cat(masks, dim) if masks else None,
            keys=tuple(torch.cat([p.keys[i] for p in parts], dim) for i in layers),
            values=tuple(torch.cat([p.values[i] for p in parts], dim) for i in layers),
        )

    def _rows_read(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.keys[0].shape[:3], dtype=torch.bool, device=self.keys[0].device)

    def _padded(self, rows: int) -> Prompts:
        missing = rows - self.keys[0].shape[2]
        if not missing:
            return self
        keys, values = (tuple(pad(t, (0, 0, 0, 0, 0, missing)) for t in each) for each in (self.keys, self.values))
        return Prompts(keys=keys, values=values, mask=pad(self._rows_read(), (0, missing)))


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a forward is conditioned on besides noise level and past.

    Fields: `prompts`; `prompt_index` [b, t] which prompt each latent frame follows (None: prompt 0); `channels`
    [b, t, c, h, w] extra input channels (clean/noisy mask, image); `vectors` [b, t, c] one conditioning vector per
    latent frame (actions, camera).
    """

    prompts: Prompts
    prompt_index: Tensor | None = None
    channels: Tensor | None = None
    vectors: Tensor | None = None

    def with_prompts(self, prompts: Prompts, prompt_index: Tensor | None = None) -> Conditioning:
        return replace(self, prompts=prompts, prompt_index=prompt_index)


@runtime_checkable
class Backbone(Protocol):
    """One forward for training and inference: no mode flags, no state of its own."""

    @property
    def sites(self) -> list[Site]:
        """Every self-attention that a cache must serve."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that come in and go out."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights; device and dtype of caches follow the first."""
        ...

    def tokens_per_frame(self, rows: int, columns: int) -> int:
        """Tokens of a latent frame of `rows` x `columns`. Raises ValueError off the patch grid."""
        ...

    def prepare(self, text: Text) -> Prompts: ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Context) -> Tensor:
        """Prediction [b, t, c, h, w] for latents `x` [b, t, c, h, w] at noise levels `sigma` [b|1, t|1].

        `sigma` may lie on the host while `x` is on a device: bring it over by `sigma.to(...)`, which waits for nothing.
        With a learned variance its fraction takes c further channels; the process knows.
        """
        ...


State = TypeVar("State")


@runtime_checkable
class Codec(Protocol[State]):
    """Pixels to latents and back, whole and as a stream whose state the caller keeps (None starts a stream).

    Decoding chunk by chunk gives the pixels of decoding at once (1e-5 in fp32), for any chunks and interleaved streams.
    """

    def encode(self, pixels: Pixels) -> Latent: ...

    def decode(self, latents: Latent) -> Pixels: ...

    def decode_stream(self, latents: Latent, state: State | None) -> tuple[Pixels, State]:
        """Pixels that the next latents complete, and the state for the call after."""
        ...
