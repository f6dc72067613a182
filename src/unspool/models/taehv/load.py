"""TAEHV files: own ones with the config in the header, and published ones whose sizes their shapes tell."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unspool.config import from_dict, to_dict
from unspool.models.taehv.config import Padding, TaehvConfig, infer_config
from unspool.models.taehv.network import Taehv
from unspool.weights.read import Checkpoint, read_checkpoint
from unspool.weights.report import LoadReport, compare, load_into
from unspool.weights.write import save_file

CLASS_NAME = "Taehv"
PUBLISHED_PADDING: Padding = "end"


def save_taehv(codec: Taehv, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write one safetensors file atomically; the header carries the config."""
    config = json.dumps({"_class_name": CLASS_NAME, **to_dict(codec.config)})
    return save_file(codec.state_dict(), path, metadata={**(metadata or {}), "config": config})


def load_taehv(
    path: str | os.PathLike[str],
    *,
    padding: Padding | None = None,
    growth: tuple[int, int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Taehv:
    """The codec in a file of `save_taehv`, or in a published .safetensors or .pth, whose sizes are inferred.

    `padding` is for files without a config (None: "end", as published). `growth` decodes at another rate than the
    file's, (1, 1, 2) at half of it: of growth layers that make more frames, the last rows are used. `dtype` None keeps
    the file's.

    Raises FileNotFoundError, or ValueError for a damaged file, another kind of network, or missing, unexpected or
    misshapen tensors.
    """
    found = read_checkpoint(path)
    config = _config_of(found, padding)
    if growth is not None:
        config = replace(config, growth=growth)
    with torch.device("meta"):
        codec = Taehv(config)
    expected = {name: tuple(tensor.shape) for name, tensor in codec.state_dict().items()}
    tensors = _last_rows(found.tensors, expected)
    missing, unexpected, mismatched = compare({n: tuple(t.shape) for n, t in tensors.items()}, expected)
    report = LoadReport(
        source=found.source,
        format="TAEHV",
        wrapper=found.wrapper,
        num_tensors=len(found.tensors),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
    )
    report.require_exact(expected="a whole TAEHV in the layout of taew2_1", fix="use such a file, or fetch it again")
    load_into(codec, tensors, dtype=dtype, device=device)
    return codec


def _config_of(found: Checkpoint, padding: Padding | None) -> TaehvConfig:
    stated = found.config if "config" in found.metadata else None
    if stated is None:
        return infer_config(found.shapes, padding=padding or PUBLISHED_PADDING)
    if stated.get("_class_name") != CLASS_NAME:
        raise ValueError(
            f"{found.source} holds {stated.get('_class_name', 'an unnamed network')}, expected a {CLASS_NAME}; use the "
            "codec.safetensors of a model folder"
        )
    if padding is not None:
        raise ValueError(f"padding={padding!r} beside {found.source}, which states its own; leave it out")
    return from_dict(TaehvConfig, {k: v for k, v in stated.items() if not k.startswith("_")}, where=found.source)


def _last_rows(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors, growth layers cut to the rows of their last frames."""
    cut = dict(tensors)
    for name, shape in expected.items():
        tensor = tensors.get(name)
        is_growth = name.startswith("decoder.") and len(shape) == 4 and shape[2:] == (1, 1)
        if is_growth and tensor is not None and tensor.shape[1:] == shape[1:] and len(tensor) % shape[1] == 0:
            cut[name] = tensor[-shape[0] :]
    return cut
