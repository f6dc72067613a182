"""STDiT files: own ones with the config in the header, and those of Open-Sora v1 and Ca2-VDM, whose names are ours.

Position tables in published files are compared and left out: they are computed for any size and any position.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.models.stdit.tables import check_tables, scales_of
from unspool.weights.read import Checkpoint, read_checkpoint
from unspool.weights.report import LoadReport, Mismatch, Shapes, compare, load_into
from unspool.weights.write import save_file

CLASS_NAME = "STDiT"
DERIVED = ("pos_embed", "pos_embed_temporal", "bov_token")
"""Published entries that hold nothing learned; the tables among them tell the scales of positions."""

ADDED = ("attn_cf", "attn_temp_pre_merge")
"""Parts that a causal network has and the bidirectional one that it starts from has not."""

TEXT = ("y_embedder", "cross_attn")
"""Parts of a network with text."""

_PUBLISHED_HEADS = {1152: 16}


def save_stdit(network: STDiT, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write one safetensors file atomically; the header carries the config."""
    config = json.dumps({"_class_name": CLASS_NAME, **network.config.to_dict()})
    return save_file(network.state_dict(), path, metadata={**(metadata or {}), "config": config})


def load_stdit(
    path: str | os.PathLike[str],
    *,
    config: STDiTConfig | None = None,
    num_heads: int | None = None,
    which: str | None = None,
    partial: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> STDiT:
    """The network in a file of `save_stdit`, or in a published .safetensors or .pth.

    `config` None: the file's header, else its shapes (which do not show `num_heads`; 16 at width 1152) and the scales
    of its position tables. `which` picks the container key. `partial` starts one network from another: prefix-enhanced
    attention and mask merge that the file lacks keep their first values, text and prefix parts that the network lacks
    are left out, and an output without variance takes the rows of the mean. `dtype` None keeps the file's.

    Raises FileNotFoundError, or ValueError for a damaged file, another kind of network, missing, unexpected or
    misshapen tensors, or position tables of other scales than the config's.
    """
    found = read_checkpoint(path, which=which)
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in DERIVED}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if config is None:
        config = _config_of(found, shapes, num_heads)
    check_tables(found.tensors, config, found.source)
    with torch.device("meta"):
        network = STDiT(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if partial:
        tensors = _fitting(tensors, expected, config)
    missing, unexpected, mismatched = compare({n: tuple(t.shape) for n, t in tensors.items()}, expected)
    started = tuple(name for name in missing if partial and _is_part(name, ADDED))
    _require(found, tuple(name for name in missing if name not in started), unexpected, mismatched)
    if started:
        first = STDiT(config).state_dict()
        kind = next(iter(tensors.values())).dtype
        tensors |= {name: first[name].to(kind) for name in started}
    load_into(network, tensors, dtype=dtype, device=device)
    return network


def infer_config(shapes: Shapes, *, num_heads: int | None = None) -> STDiTConfig:
    """The sizes and parts of a state dict, whose shapes show no scale of positions (1 here).

    Raises ValueError when a tensor is absent or the heads are undecidable.
    """
    wanted = (
        "x_embedder.proj.weight",
        "final_layer.linear.weight",
        "t_embedder.mlp.0.weight",
        "blocks.0.mlp.fc1.weight",
    )
    absent = [name for name in wanted if name not in shapes]
    if absent:
        raise ValueError(
            f"got a checkpoint without {absent} ({len(shapes)} tensors, such as {sorted(shapes)[:3]}); expected an "
            "STDiT in the names of Open-Sora v1; use such a file"
        )
    dim, channels, *patch = shapes["x_embedder.proj.weight"]
    heads = num_heads or _PUBLISHED_HEADS.get(dim)
    if heads is None:
        raise ValueError(f"got a network of width {dim} and no head count, which shapes do not show; pass num_heads=")
    null = shapes.get("y_embedder.y_embedding")
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    return STDiTConfig(
        dim=dim,
        num_layers=max(blocks) + 1,
        num_heads=heads,
        in_channels=channels,
        patch_size=(patch[0], patch[1], patch[2]),
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] // dim,
        freq_dim=shapes["t_embedder.mlp.0.weight"][1],
        caption_dim=null[1] if null else 0,
        caption_len=null[0] if null else 120,
        prefix_attention="separate" if "blocks.0.attn_cf.qkv.weight" in shapes else "none",
        mask_channel="blocks.0.attn_temp_pre_merge.weight" in shapes,
        learned_variance=shapes["final_layer.linear.weight"][0] == 2 * channels * patch[1] * patch[2],
    )


def _config_of(found: Checkpoint, shapes: Shapes, num_heads: int | None) -> STDiTConfig:
    stated = found.config if "config" in found.metadata else None
    if stated is None:
        return replace(infer_config(shapes, num_heads=num_heads), **cast("Any", scales_of(found.tensors)))
    if stated.get("_class_name") != CLASS_NAME:
        raise ValueError(
            f"{found.source} holds {stated.get('_class_name', 'an unnamed network')}, expected {CLASS_NAME}"
        )
    return STDiTConfig.from_dict(stated)


def _fitting(tensors: dict[str, Tensor], expected: Shapes, config: STDiTConfig) -> dict[str, Tensor]:
    """Without the parts that the network does not have, and with the outputs that it has."""
    kept = {n: t for n, t in tensors.items() if n in expected or not _is_part(n, (*ADDED, *TEXT))}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name not in kept or config.learned_variance or len(kept[name]) != 2 * expected[name][0]:
            continue
        # Rows lie patch place by patch place, the channels of each together: mean first, then variance.
        by_place = kept[name].unflatten(0, (-1, 2 * config.in_channels))
        kept[name] = by_place[:, : config.in_channels].flatten(0, 1)
    return kept


def _is_part(name: str, parts: tuple[str, ...]) -> bool:
    return bool(set(name.split(".")) & set(parts))


def _require(
    found: Checkpoint, missing: tuple[str, ...], unexpected: tuple[str, ...], mismatched: tuple[Mismatch, ...]
) -> None:
    report = LoadReport(
        source=found.source,
        format="Open-Sora v1",
        wrapper=found.wrapper,
        num_tensors=len(found.tensors),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
    )
    report.require_exact(
        expected="an STDiT of the same config",
        fix="use such a file, or partial=True to start a network from one with other parts",
    )
