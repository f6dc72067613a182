"""Counts between pixels, latents and tokens: the only home of a codec's 8, 4 and "1 + 4k" and of a network's patch.

Wan-type codecs make 1 + 4k pixel frames of 1 + k latent frames (wan_causal: stride (4, 8, 8), patch (1, 2, 2)).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a codec and a network divide a clip.

    Fields: `temporal` pixel frames per latent frame after the first; `spatial` pixels per latent row or column;
    `patch` latent rows/columns per token; `first_alone`: the first latent frame stands for one pixel frame.
    """

    temporal: int = 4
    spatial: int = 8
    patch: int = 2
    first_alone: bool = True

    def __post_init__(self) -> None:
        for name in ("temporal", "spatial", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"Geometry.{name}={getattr(self, name)}: expected a count of at least 1")

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of `num_frames` pixel frames. Raises ValueError naming the nearest valid counts."""
        lead = 1 if self.first_alone else 0
        rest = num_frames - lead
        if num_frames < 1 or rest < 0 or rest % self.temporal:
            low = max(rest, 0) // self.temporal * self.temporal + lead
            low = max(low, lead or self.temporal)
            raise ValueError(
                f"num_frames={num_frames} cannot be encoded: expected {lead} + {self.temporal} k; "
                f"try {low} or {low + self.temporal}"
            )
        return lead + rest // self.temporal

    def pixel_frames(self, latent_frames: int, *, start: int = 0) -> int:
        """Pixel frames that latent frames [start, start + latent_frames) decode to (9 then 12 for chunks of 3)."""
        if latent_frames < 0 or start < 0:
            raise ValueError(f"latent_frames={latent_frames}, start={start}: expected counts of at least 0")
        total = latent_frames * self.temporal
        return total - (self.temporal - 1) if self.first_alone and start == 0 and latent_frames else total

    def latent_size(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Latent rows and columns. Raises ValueError when a side is not a multiple of `spatial * patch`."""
        step = self.spatial * self.patch
        for name, value in (("height_px", height_px), ("width_px", width_px)):
            if value < 1 or value % step:
                low = max(value // step, 1) * step
                raise ValueError(f"{name}={value} is not a positive multiple of {step}; try {low} or {low + step}")
        return height_px // self.spatial, width_px // self.spatial

    def tokens_per_frame(self, rows: int, columns: int) -> int:
        """Tokens per latent frame of a latent of `rows` x `columns`. Raises ValueError off the patch grid."""
        if rows < 1 or columns < 1 or rows % self.patch or columns % self.patch:
            raise ValueError(
                f"latent size {rows}x{columns} is off the patch grid: expected multiples of {self.patch}; "
                f"pad or crop to {-(-rows // self.patch) * self.patch}x{-(-columns // self.patch) * self.patch}"
            )
        return (rows // self.patch) * (columns // self.patch)
