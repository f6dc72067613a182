"""Sizes and parts of one STDiT; imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class STDiTConfig:
    """Everything that fixes the parameter shapes and the arithmetic of one network.

    Sizes: `dim`, `num_layers`, `num_heads`, `mlp_ratio`, `freq_dim` of the noise level's features, `patch_size` (latent
    frames, rows, columns), `in_channels` of the latents.
    Text: `caption_dim` channels of the text states (0: no text), `caption_len` most rows.
    Parts: `prefix_attention` "joint" (the paper: the spatial attention of a noisy frame also reads the last clean
    frames), "separate" (the published code: a second attention over these alone) or "none"; `mask_channel` tells the
    first temporal attention which latent frames are clean.
    Noise: `process` the network was trained for, which fixes what it is told of a sigma: "iddpm" (noise prediction,
    steps 0..999) or "flow" (velocity, 1000 sigma); `learned_variance` doubles the output channels.
    `space_scale`, `time_scale` divide the coordinates of the position features.

    Raises ValueError (got, expected, fix) for sizes that no network can be built from.
    Sources: arXiv:2411.16375 section 3 and appendix C; Open-Sora v1 STDiT-XL/2.
    """

    dim: int
    num_layers: int
    num_heads: int
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    mlp_ratio: int = 4
    freq_dim: int = 256
    caption_dim: int = 0
    caption_len: int = 120
    prefix_attention: Literal["none", "joint", "separate"] = "none"
    mask_channel: bool = False
    process: Literal["iddpm", "flow"] = "iddpm"
    learned_variance: bool = True
    space_scale: float = 1.0
    time_scale: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # JSON hands over a list
        for name in ("dim", "num_layers", "num_heads", "in_channels", "mlp_ratio", "caption_len"):
            _check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "at least 1")
        _check(self.dim % self.num_heads == 0, f"dim={self.dim}, num_heads={self.num_heads}", "heads that divide dim")
        _check(self.dim % 4 == 0, f"dim={self.dim}", "a multiple of 4: sines and cosines of rows and columns")
        _check(self.freq_dim >= 2 and self.freq_dim % 2 == 0, f"freq_dim={self.freq_dim}", "an even number from 2 up")
        _check(self.caption_dim >= 0, f"caption_dim={self.caption_dim}", "0 (no text) or the channels of text states")
        patch = self.patch_size
        _check(
            len(patch) == 3 and patch[0] == 1 and min(patch) >= 1,
            f"patch_size={patch}",
            "(1, rows, columns): causality and the cache count single latent frames",
        )
        for name, choices in (("prefix_attention", ("none", "joint", "separate")), ("process", ("iddpm", "flow"))):
            _check(getattr(self, name) in choices, f"{name}={getattr(self, name)!r}", f"one of {choices}")
        _check(
            self.process == "iddpm" or not self.learned_variance,
            "process='flow' with learned_variance=True",
            "learned_variance=False: flow matching has no variance to learn",
        )
        for name in ("space_scale", "time_scale", "eps"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}", "a positive number")

    @classmethod
    def xl(cls, **parts: Any) -> STDiTConfig:
        """STDiT-XL/2: 28 layers, width 1152, 16 heads; `parts` are the other fields."""
        return cls(dim=1152, num_layers=28, num_heads=16, **parts)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def out_channels(self) -> int:
        """Channels of a prediction."""
        return (2 if self.learned_variance else 1) * self.in_channels

    def to_dict(self) -> dict[str, object]:
        """JSON-ready; `from_dict` reads it back."""
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> STDiTConfig:
        """Inverse of `to_dict`; keys starting with `_` are notes. Raises ValueError for unknown keys."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if not name.startswith("_")}
        _check(set(given) <= known, f"config keys {sorted(set(given) - known)}", f"some of {sorted(known)}")
        absent = {"dim", "num_layers", "num_heads"} - set(given)
        _check(not absent, f"a config without {sorted(absent)}", "dim, num_layers and num_heads in every config")
        return cls(**given)


def _check(is_true: bool, got: str, expected: str) -> None:
    if not is_true:
        raise ValueError(f"got {got}; expected {expected}")
