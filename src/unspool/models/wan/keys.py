"""Parameter names of the Wan transformer in three formats, as data.

`original` is what the Wan2.1 release, CausVid, Self-Forcing and LongLive write; `own` is the same with two fusions (q,
k, v of the self-attention and k, v of the cross-attention, concatenated along dimension 0); `diffusers` renames
`original`. Source: Wan2.1 `wan/modules/model.py` @9737cba and the attribute names of diffusers `WanTransformer3DModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from unspool.models.wan.config import WanConfig
from unspool.weights.keymap import KeyMap, Rule, detect_format

if TYPE_CHECKING:
    import torch

KeyFormat: TypeAlias = Literal["own", "original", "diffusers"]

_BLOCK = "blocks.{i}."
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}

FUSIONS = KeyMap(
    (
        Rule(_BLOCK + "self_attn.qkv.{p}", tuple(_BLOCK + f"self_attn.{x}." + "{p}" for x in "qkv")),
        Rule(_BLOCK + "cross_attn.kv.{p}", tuple(_BLOCK + f"cross_attn.{x}." + "{p}" for x in "kv")),
    )
)
"""own (whole) <-> original (parts)."""

_RENAMES = {
    "patch_embedding.{p}": "patch_embedding.{p}",
    "text_embedding.0.{p}": "condition_embedder.text_embedder.linear_1.{p}",
    "text_embedding.2.{p}": "condition_embedder.text_embedder.linear_2.{p}",
    "time_embedding.0.{p}": "condition_embedder.time_embedder.linear_1.{p}",
    "time_embedding.2.{p}": "condition_embedder.time_embedder.linear_2.{p}",
    "time_projection.1.{p}": "condition_embedder.time_proj.{p}",
    "head.modulation": "scale_shift_table",
    "head.head.{p}": "proj_out.{p}",
    _BLOCK + "modulation": _BLOCK + "scale_shift_table",
    _BLOCK + "norm3.{p}": _BLOCK + "norm2.{p}",
    _BLOCK + "ffn.0.{p}": _BLOCK + "ffn.net.0.proj.{p}",
    _BLOCK + "ffn.2.{p}": _BLOCK + "ffn.net.2.{p}",
}
for _ours, _theirs in _ATTENTIONS.items():
    for _x in "qkv":
        _RENAMES[f"{_BLOCK}{_ours}.{_x}." + "{p}"] = f"{_BLOCK}{_theirs}.to_{_x}." + "{p}"
    _RENAMES[f"{_BLOCK}{_ours}.o." + "{p}"] = f"{_BLOCK}{_theirs}.to_out.0." + "{p}"
    for _x in "qk":
        _RENAMES[f"{_BLOCK}{_ours}.norm_{_x}.weight"] = f"{_BLOCK}{_theirs}.norm_{_x}.weight"

DIFFUSERS = KeyMap(tuple(Rule(ours, (theirs,)) for ours, theirs in _RENAMES.items()))
"""original (whole) <-> diffusers (part)."""

MAPS: dict[str, tuple[KeyMap, ...]] = {"own": (), "original": (FUSIONS,), "diffusers": (FUSIONS, DIFFUSERS)}
"""For each format, the maps that lead from `own` to it, in order."""

_FUSED_PARTS = {part for rule in FUSIONS.rules for part in rule.parts}
_OPTIONAL = ("frame_embedding.{i}.{p}", "place_embedding.{p}")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "own": (*(t for t in _RENAMES if t not in _FUSED_PARTS), *(rule.whole for rule in FUSIONS.rules), *_OPTIONAL),
    "original": (*_RENAMES, *_OPTIONAL),
    "diffusers": (*_RENAMES.values(), *_OPTIONAL),
}
"""Every name that a format knows."""

# Fragments of key names that belong to other networks only, the most specific first.
FOREIGN: tuple[tuple[str, str], ...] = (
    (".lora_A.", "LoRA weights without their base: give the base as the source and this file as lora="),
    (
        ".lora_down.",
        "LoRA weights in another naming than PEFT's: expected keys ending in lora_A.weight / lora_B.weight",
    ),
    ("vace_blocks.", "a Wan VACE network"),
    ("img_emb.", "an image-conditioned (i2v) Wan network"),
    (".k_img.", "an image-conditioned (i2v) Wan network"),
    ("condition_embedder.image_embedder.", "an image-conditioned (i2v) Wan network in diffusers names"),
    (".attn2.add_k_proj.", "an image-conditioned (i2v) Wan network in diffusers names"),
    ("single_blocks.", "a HunyuanVideo or FLUX network"),
    ("single_transformer_blocks.", "a HunyuanVideo or FLUX network in diffusers names"),
    ("transformer_blocks.", "a transformer in diffusers names that is not Wan (CogVideoX, LTX, SD3, ...)"),
    ("input_blocks.", "a latent-diffusion UNet"),
    ("down_blocks.", "a diffusers UNet or image VAE"),
    ("decoder.middle.", "a video autoencoder in Wan VAE names"),
    ("decoder.mid_block.", "an autoencoder in diffusers names"),
    ("encoder.block.", "a T5-type text encoder"),
    ("text_model.", "a CLIP text encoder"),
    ("token_embedding.", "a text encoder"),
)


def to_own(tensors: Mapping[str, torch.Tensor], source: KeyFormat) -> dict[str, torch.Tensor]:
    """Rename and fuse from `source` to the network's own names. Raises ValueError when a part is missing."""
    out = dict(tensors)
    for key_map in reversed(MAPS[source]):
        out = key_map.join(out)
    return out


def from_own(tensors: Mapping[str, torch.Tensor], target: KeyFormat) -> dict[str, torch.Tensor]:
    """Cut and rename from the network's own names to `target`; slices are views."""
    out = dict(tensors)
    for key_map in MAPS[target]:
        out = key_map.split(out)
    return out


def shapes_as(shapes: Mapping[str, tuple[int, ...]], target: KeyFormat) -> dict[str, tuple[int, ...]]:
    """`from_own` on shapes."""
    out = dict(shapes)
    for key_map in MAPS[target]:
        out = key_map.split_shapes(out)
    return out


def detect(names: Iterable[str]) -> KeyFormat:
    """The format of a Wan t2v state dict.

    Raises ValueError that names the architecture when the keys belong to another network.
    """
    names = list(names)
    for fragment, kind in FOREIGN:
        hits = [name for name in names if fragment in f".{name}"]
        if hits:
            raise ValueError(
                f"got {kind} ({len(hits)} of {len(names)} keys, such as {hits[0]!r}); expected a Wan2.1 text-to-video "
                "transformer; use a t2v checkpoint in original, diffusers or unspool names"
            )
    found = detect_format(names, TEMPLATES)
    if found is None:
        raise ValueError(
            f"got a checkpoint of an unknown architecture ({len(names)} tensors, such as {names[:4]}); expected a "
            "Wan2.1 "
            "text-to-video transformer in original, diffusers or unspool names; check the file, or pass which= "
            "if the network lies under another key"
        )
    return found  # type: ignore[return-value]


def own_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the network, in own names."""
    d, inputs = config.dim, config.in_channels + config.extra_channels
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (d, inputs, *config.patch_size),
        "patch_embedding.bias": (d,),
    }
    _linear(shapes, "text_embedding.0", config.text_dim, d)
    _linear(shapes, "text_embedding.2", d, d)
    _linear(shapes, "time_embedding.0", config.freq_dim, d)
    _linear(shapes, "time_embedding.2", d, d)
    _linear(shapes, "time_projection.1", d, 6 * d)
    if config.frame_vector_dim:
        _linear(shapes, "frame_embedding.0", config.frame_vector_dim, d)
        _linear(shapes, "frame_embedding.2", d, d)
    if config.place_octaves:
        _linear(shapes, "place_embedding", config.place_features, d)
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, d)
        _linear(shapes, f"{block}.self_attn.qkv", d, 3 * d)
        _linear(shapes, f"{block}.cross_attn.q", d, d)
        _linear(shapes, f"{block}.cross_attn.kv", d, 2 * d)
        for attention in _ATTENTIONS:
            _linear(shapes, f"{block}.{attention}.o", d, d)
            for x in "qk":
                shapes[f"{block}.{attention}.norm_{x}.weight"] = (d,)
        shapes |= {f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,)}
        _linear(shapes, f"{block}.ffn.0", d, config.ffn_dim)
        _linear(shapes, f"{block}.ffn.2", config.ffn_dim, d)
    shapes["head.modulation"] = (1, 2, d)
    pt, ph, pw = config.patch_size
    _linear(shapes, "head.head", d, config.out_channels * pt * ph * pw)
    return shapes


def _linear(shapes: dict[str, tuple[int, ...]], name: str, inputs: int, outputs: int) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs)
    shapes[f"{name}.bias"] = (outputs,)
