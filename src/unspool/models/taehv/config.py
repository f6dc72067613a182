"""Sizes of a TAEHV codec, and what its published files leave to be inferred from shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from unspool.geometry import Geometry

Widths: TypeAlias = tuple[int, int, int, int]
Padding = Literal["end", "start"]
"""Where a clip of 1 + 4k frames is filled up to whole groups of four: its first frame repeated before it ("start",
latent frame k stands for frames 4k - 3 to 4k), or its last one after it ("end", latent frame k for frames 4k to
4k + 3: what TAEHV's published weights were trained with)."""

STAGES = 3
POOLING = (2, 2, 1)
"""Frames that each stage of the encoder merges into one."""
GEOMETRY = Geometry(temporal=math.prod(POOLING), spatial=2**STAGES, patch=1)


@dataclass(frozen=True, kw_only=True)
class TaehvConfig:
    """Sizes of a `Taehv`; `taew2_1` is the one with the defaults of every field and decoder_widths 256, 128, 64, 64.

    Fields: `encoder_widths` channels at 1, 1/2, 1/4, 1/8 of the resolution (one number: the same everywhere);
    `decoder_widths` channels at 1/8, 1/4, 1/2, 1; `latent_channels`; `padding` (see `Padding`); `latent_mean`,
    `latent_std` per channel of the network's own latents, which leave the codec as (latent - mean) / std (None: as they
    are); `num_blocks` memory blocks per stage; `growth` frames that each stage of the decoder makes of one. Growth
    (1, 1, 2) decodes at half the frame rate with the same weights.
    """

    decoder_widths: Widths
    padding: Padding
    encoder_widths: int | Widths = 64
    latent_channels: int = 16
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    num_blocks: int = 3
    growth: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "decoder_widths"):
            value = getattr(self, name)
            widths = (value,) * 4 if isinstance(value, int) and name == "encoder_widths" else value
            if not isinstance(widths, tuple) or len(widths) != STAGES + 1 or any(w < 1 for w in widths):
                raise ValueError(f"{name}={value}: expected four widths of at least 1, such as 64,64,64,64")
        if self.latent_channels < 1 or self.num_blocks < 1:
            raise ValueError(
                f"latent_channels={self.latent_channels}, num_blocks={self.num_blocks}: expected at least 1 of each"
            )
        if self.padding not in ("end", "start"):
            raise ValueError(f"padding={self.padding!r}: expected 'end' (published weights) or 'start'")
        if len(self.growth) != STAGES or any(g not in (1, 2) for g in self.growth):
            raise ValueError(f"growth={self.growth}: expected 1 or 2 for each of {STAGES} stages, such as 1,2,2")
        self._check_normalisation()

    def _check_normalisation(self) -> None:
        mean, std = self.latent_mean, self.latent_std
        if mean is None and std is None:
            return
        if mean is None or std is None or len(mean) != self.latent_channels or len(std) != self.latent_channels:
            raise ValueError(
                f"latent_mean={mean}, latent_std={std}: expected both with {self.latent_channels} values, one per "
                "latent channel, or neither"
            )
        if not all(map(math.isfinite, mean)) or not all(0.0 < s < math.inf for s in std):
            raise ValueError(f"latent_mean={mean}, latent_std={std}: expected finite means and stds above 0")

    @property
    def encoder(self) -> Widths:
        """Channels of the encoder at 1, 1/2, 1/4, 1/8 of the resolution."""
        width = self.encoder_widths
        return (width, width, width, width) if isinstance(width, int) else width

    @property
    def frames_per_latent(self) -> int:
        """Pixel frames that a latent frame decodes to; the first `frames_per_latent - 1` of a clip are dropped."""
        return math.prod(self.growth)


def infer_config(shapes: Mapping[str, tuple[int, ...]], *, padding: Padding) -> TaehvConfig:
    """The config of a state dict without one. Raises ValueError for what is no TAEHV of this layout."""
    if "decoder.1.weight" not in shapes or "encoder.0.weight" not in shapes:
        raise ValueError(
            f"got {len(shapes)} tensors such as {', '.join(list(shapes)[:3]) or 'none'}; expected TAEHV names, "
            "encoder.0.weight to decoder.22.weight; use a taew2_1 file"
        )
    blocks = [int(m[1]) for name in shapes if (m := re.fullmatch(r"encoder\.(\d+)\.conv\.0\.weight", name))]
    num_blocks, rest = divmod(len(blocks), STAGES)
    if rest or not num_blocks:
        raise ValueError(f"got {len(blocks)} memory blocks in the encoder; expected as many in each of {STAGES} stages")
    down, up = (3, 5 + num_blocks, 7 + 2 * num_blocks), (5 + num_blocks, 8 + 2 * num_blocks, 11 + 3 * num_blocks)
    try:
        width = {half: [shapes[f"{half}.{i}.weight"][0] for i in at] for half, at in
                 (("encoder", (0, *down)), ("decoder", (1, *up)))}  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{error} is not among the tensors; expected a whole TAEHV; fetch the file again") from None
    if shapes["encoder.0.weight"][1] != 3:
        raise ValueError(
            f"encoder.0.weight takes {shapes['encoder.0.weight'][1]} channels; expected 3: a codec that sees patches "
            "instead of pixels (taew2_2 and others) is not supported; use taew2_1"
        )
    return TaehvConfig(
        encoder_widths=_four(width["encoder"]),
        decoder_widths=_four(width["decoder"]),
        latent_channels=shapes["decoder.1.weight"][1],
        num_blocks=num_blocks,
        padding=padding,
    )


def _four(widths: list[int]) -> Widths:
    first, second, third, fourth = widths
    return first, second, third, fourth
