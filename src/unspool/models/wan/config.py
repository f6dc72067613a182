"""Sizes of one Wan2.1-type transformer, readable from every public config spelling; imports no torch.

The published names differ: the original files say `in_dim` / `num_heads`, diffusers says `in_channels` /
`num_attention_heads`. Both end here, and whatever this network cannot represent is refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TypeAlias

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

# Wan2.1 1.3B and 14B both use heads of 128; a narrower network is somebody's own and must say its head count.
_PUBLISHED_HEAD_DIM = 128
_PUBLISHED_MIN_DIM = 1536

_ORIGINAL_NAMES = {"in_dim": "in_channels", "out_dim": "out_channels"}
_ORIGINAL_SAME = ("dim", "ffn_dim", "num_layers", "num_heads", "text_dim", "text_len", "freq_dim", "eps", "patch_size")
_DIFFUSERS_SAME = ("ffn_dim", "num_layers", "in_channels", "out_channels", "text_dim", "freq_dim", "eps", "patch_size")
# Keys of the diffusers config that only image-conditioned relatives fill in.
_DIFFUSERS_IMAGE_KEYS = {
    "image_dim": "an image-conditioned (i2v) network",
    "added_kv_proj_dim": "an image-conditioned (i2v) network",
    "pos_embed_seq_len": "a first-and-last-frame (flf2v) network",
    "vace_layers": "a VACE network",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Everything that fixes the parameter shapes and the arithmetic of one network.

    `in_channels` are the latent channels of the video; `extra_channels` are further input channels (masks, a
    conditioning image) concatenated after them, so the patch embedding sees `in_channels + extra_channels`.
    `frame_vector_dim` is the width of an optional vector per latent frame (actions, camera); 0 means none.
    `text_len` rows of text states of width `text_dim` are attended, padding included. `place_octaves` > 0 adds a
    learned map of a token's row and column to it: rotary positions alone tell attention how far two
    tokens are apart, but what it fetches does not say where it was, and a narrow network has few heads to find out.
    0 means none, as in every published network.

    Raises ValueError (got, expected, fix) for sizes that no network can be built from.
    Source: Wan2.1 `wan/configs/wan_t2v_1_3B.py`, `wan/configs/shared_config.py`.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    frame_vector_dim: int = 0
    extra_channels: int = 0
    place_octaves: int = 0

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "ffn_dim",
            "num_layers",
            "num_heads",
            "in_channels",
            "out_channels",
            "text_dim",
            "text_len",
        ):
            _check_int(name, getattr(self, name), at_least=1)
        _check_int("freq_dim", self.freq_dim, at_least=2)
        _check_int("frame_vector_dim", self.frame_vector_dim, at_least=0)
        _check_int("extra_channels", self.extra_channels, at_least=0)
        _check_int("place_octaves", self.place_octaves, at_least=0)
        if self.dim % self.num_heads:
            raise ValueError(
                f"got dim={self.dim}, num_heads={self.num_heads}; expected a dim that the heads divide evenly; "
                f"try dim={self.num_heads * max(1, round(self.dim / self.num_heads))}"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"got head_dim={self.head_dim} (dim={self.dim} / num_heads={self.num_heads}); expected an even number "
                "of "
                "at least 6, so that time, height and width each rotate one pair; choose another num_heads"
            )
        if self.freq_dim % 2:
            raise ValueError(
                f"got freq_dim={self.freq_dim}; expected an even number (cos | sin); try {self.freq_dim + 1}"
            )
        patch = tuple(self.patch_size)
        if len(patch) != 3 or any(not isinstance(p, int) or p < 1 for p in patch):
            raise ValueError(
                f"got patch_size={self.patch_size!r}; expected three positive ints (t, h, w) such as (1, 2, 2)"
            )
        if patch[0] != 1:
            raise ValueError(
                f"got patch_size={patch}: {patch[0]} latent frames per token; expected 1, because causality and the "
                "cache "
                "count single latent frames; use a patch of (1, h, w)"
            )
        object.__setattr__(self, "patch_size", patch)  # JSON hands over a list
        if not self.eps > 0:
            raise ValueError(f"got eps={self.eps}; expected a positive number; Wan2.1 uses 1e-6")

    @property
    def place_features(self) -> int:
        """Inputs of the map of places: a coordinate, its sines and its cosines, for rows and for columns."""
        return 2 * (1 + 2 * self.place_octaves)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> WanConfig:
        """Read a config in whichever of the three spellings it is written in.

        Raises ValueError for an unknown spelling or a network of another kind.
        """
        if "num_attention_heads" in values:
            return cls.from_diffusers(values)
        if "in_dim" in values or "model_type" in values:
            return cls.from_original(values)
        if {"dim", "num_heads", "num_layers"} <= set(values):
            return cls.from_dict(values)
        raise ValueError(
            f"got a config with the keys {sorted(values)[:12]}; expected a Wan config: unspool's own (dim, num_heads, "
            "num_layers), the original one (dim, in_dim, ...) or diffusers' (num_attention_heads, ...); pass config= "
            "explicitly"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> WanConfig:
        """Read unspool's own spelling (`to_dict`); keys starting with `_` are notes, other unknown keys are refused."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if not name.startswith("_") and name not in known:
                near = difflib.get_close_matches(name, known, n=2)
                raise ValueError(
                    f"got config key {name!r}; expected one of {known}" + (f"; did you mean {near}?" if near else "")
                )
        return cls._build({name: value for name, value in values.items() if name in known})

    @classmethod
    def from_original(cls, values: Mapping[str, object]) -> WanConfig:
        """Read the original Wan spelling; unknown harmless keys (`_class_name`, `window_size`, ...) are ignored.

        Raises ValueError for a `model_type` other than t2v and for switched-off norms.
        """
        kind = values.get("model_type", "t2v")
        if kind != "t2v":
            raise ValueError(
                f"got model_type={kind!r}; expected 't2v': image-conditioned and other variants (i2v, flf2v, vace, "
                "ti2v) "
                "are not supported; use a t2v checkpoint"
            )
        for name in ("qk_norm", "cross_attn_norm"):
            if values.get(name, True) is not True:
                raise ValueError(
                    f"got {name}={values[name]!r}; expected true, as in every published Wan2.1 t2v network"
                )
        found = {ours: values[theirs] for theirs, ours in _ORIGINAL_NAMES.items() if theirs in values}
        found |= {name: values[name] for name in _ORIGINAL_SAME if name in values}
        return cls._build(_refuse_extra_inputs(found))

    @classmethod
    def from_diffusers(cls, values: Mapping[str, object]) -> WanConfig:
        """Read the config of a diffusers `WanTransformer3DModel`, or of a third-party class with the same fields.

        `text_len` is no field there and defaults to 512. Raises ValueError for image-conditioned relatives.
        """
        for name, kind in _DIFFUSERS_IMAGE_KEYS.items():
            if values.get(name) is not None:
                raise ValueError(
                    f"got {name}={values[name]!r}: this is {kind}; expected a t2v network with {name}=null"
                )
        norm = values.get("qk_norm", "rms_norm_across_heads")
        if norm != "rms_norm_across_heads":
            raise ValueError(
                f"got qk_norm={norm!r}; expected 'rms_norm_across_heads', as in every published Wan2.1 network"
            )
        if values.get("cross_attn_norm", True) is not True:
            raise ValueError(f"got cross_attn_norm={values['cross_attn_norm']!r}; expected true")
        if "attention_head_dim" not in values or "num_attention_heads" not in values:
            raise ValueError("got a diffusers config without attention_head_dim or num_attention_heads; expected both")
        found = {name: values[name] for name in (*_DIFFUSERS_SAME, "text_len") if name in values}
        heads, head_dim = values["num_attention_heads"], values["attention_head_dim"]
        _check_int("num_attention_heads", heads, at_least=1)
        _check_int("attention_head_dim", head_dim, at_least=1)
        found |= {"num_heads": heads, "dim": heads * head_dim}  # type: ignore[operator]
        return cls._build(_refuse_extra_inputs(found))

    @classmethod
    def _build(cls, found: Mapping[str, object]) -> WanConfig:
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        absent = [name for name in required if name not in found]
        if absent:
            raise ValueError(
                f"got a Wan config without {absent}; expected all of {required}; complete it or pass config="
            )
        patch = found.get("patch_size")
        if patch is not None and not isinstance(patch, (list, tuple)):
            raise ValueError(f"got patch_size={patch!r}; expected three ints such as [1, 2, 2]")
        return cls(**found)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """The own spelling, JSON-ready; `from_dict` reads it back."""
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    def to_original(self) -> dict[str, object]:
        """The original Wan spelling. Raises ValueError for options that it has no key for."""
        self._refuse_own_options("original")
        same = {name: self.to_dict()[name] for name in _ORIGINAL_SAME}
        renamed = {theirs: getattr(self, ours) for theirs, ours in _ORIGINAL_NAMES.items()}
        return {
            "_class_name": "WanModel",
            "model_type": "t2v",
            **renamed,
            **same,
            "qk_norm": True,
            "cross_attn_norm": True,
        }

    def to_diffusers(self) -> dict[str, object]:
        """The diffusers spelling; a `text_len` other than 512 is kept as an additional key that diffusers ignores."""
        self._refuse_own_options("diffusers")
        values: dict[str, object] = {"_class_name": "WanTransformer3DModel"}
        values |= {name: self.to_dict()[name] for name in _DIFFUSERS_SAME}
        values |= {"num_attention_heads": self.num_heads, "attention_head_dim": self.head_dim}
        values |= {
            "qk_norm": "rms_norm_across_heads",
            "cross_attn_norm": True,
            "image_dim": None,
            "added_kv_proj_dim": None,
        }
        return values if self.text_len == 512 else values | {"text_len": self.text_len}

    def _refuse_own_options(self, spelling: str) -> None:
        for name in ("frame_vector_dim", "extra_channels", "place_octaves"):
            if getattr(self, name):
                raise ValueError(
                    f"got {name}={getattr(self, name)}; the {spelling} format cannot hold it; expected 0; write format "
                    "'own'"
                )


def infer_config(
    shapes: Shapes, *, num_heads: int | None = None, text_len: int = 512, num_latent_channels: int | None = None
) -> WanConfig:
    """Read the sizes off a state dict in *original* names; what no shape shows is an argument.

    The head count is not visible in any shape: without `num_heads`, heads of 128 are assumed for widths >= 1536 (every
    published Wan2.1) and refused below. `text_len` leaves no trace either. Input channels beyond
    `num_latent_channels` (default: the output channels) are `extra_channels`.

    Raises ValueError when a needed tensor is absent, has a wrong rank, or the head count is undecidable.
    """
    patch = _shape(shapes, "patch_embedding.weight", rank=5)
    text = _shape(shapes, "text_embedding.0.weight", rank=2)
    time = _shape(shapes, "time_embedding.0.weight", rank=2)
    ffn = _shape(shapes, "blocks.0.ffn.0.weight", rank=2)
    head = _shape(shapes, "head.head.weight", rank=2)
    dim = patch[0]
    if num_heads is None:
        if dim < _PUBLISHED_MIN_DIM or dim % _PUBLISHED_HEAD_DIM:
            raise ValueError(
                f"got a network of width {dim} and no head count; shapes do not show it, and heads of 128 are assumed "
                "only "
                f"from width {_PUBLISHED_MIN_DIM} on; pass num_heads= or config="
            )
        num_heads = dim // _PUBLISHED_HEAD_DIM
    voxels = patch[2] * patch[3] * patch[4]
    out_channels, rest = divmod(head[0], voxels)
    if rest:
        raise ValueError(f"got head.head.weight with {head[0]} rows; expected a multiple of the patch volume {voxels}")
    latent = out_channels if num_latent_channels is None else num_latent_channels
    frame, place = shapes.get("frame_embedding.0.weight"), shapes.get("place_embedding.weight")
    return WanConfig(
        dim=dim,
        ffn_dim=ffn[0],
        num_layers=_count_blocks(shapes),
        num_heads=num_heads,
        in_channels=min(latent, patch[1]),
        out_channels=out_channels,
        patch_size=(patch[2], patch[3], patch[4]),
        text_dim=text[1],
        text_len=text_len,
        freq_dim=time[1],
        frame_vector_dim=frame[1] if frame is not None and len(frame) == 2 else 0,
        extra_channels=max(0, patch[1] - latent),
        place_octaves=(place[1] - 2) // 4 if place is not None and len(place) == 2 else 0,
    )


def _count_blocks(shapes: Shapes) -> int:
    indices = {
        int(parts[1]) for parts in (name.split(".") for name in shapes) if parts[0] == "blocks" and parts[1].isdecimal()
    }
    return max(indices) + 1


def _shape(shapes: Shapes, name: str, *, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(
            f"got a checkpoint without {name!r}; expected it in every Wan2.1 network; the file is incomplete"
        )
    if len(shapes[name]) != rank:
        raise ValueError(
            f"got {name!r} of shape {tuple(shapes[name])}; expected {rank} dimensions; not a Wan2.1 network"
        )
    return tuple(shapes[name])


def _refuse_extra_inputs(found: dict[str, object]) -> dict[str, object]:
    # Wan2.2 i2v networks carry no image keys at all: 36 input channels against 16 output channels give them away.
    inputs, outputs = found.get("in_channels", 16), found.get("out_channels", 16)
    if inputs != outputs:
        raise ValueError(
            f"got {inputs} input and {outputs} output channels: this is an image-conditioned (i2v) network; "
            "expected as many inputs as outputs; use a t2v checkpoint"
        )
    return found


def _check_int(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"got {name}={value!r}; expected an int of at least {at_least}")
