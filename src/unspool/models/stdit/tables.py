"""Position tables of published files: nothing learned, but they tell by what the coordinates were divided.

Open-Sora v1 divides by `space_scale` and `time_scale`, which no shape shows: 0.5 in space at 16x256x256, 2/3 in time at
64x512x512. Positions of another scale load without a complaint and give noise, so a file is believed before a config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.layers import position_features, spatial_features

TABLES = {"pos_embed": "space_scale", "pos_embed_temporal": "time_scale"}
"""Published tables [1, n, dim] and the field of `STDiTConfig` with which they are computed."""


def scales_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Fields of `STDiTConfig` that the tables of a file show; none where it has no table, or one of a single place."""
    found = {}
    for name, field in TABLES.items():
        if name in tensors and (scale := _scale(_rows(name, tensors[name]), spatial=name == "pos_embed")) is not None:
            found[field] = scale
    return found


def check_tables(tensors: Mapping[str, Tensor], config: STDiTConfig, source: str) -> None:
    """Raise ValueError where the tables of a file are not those that a network of `config` computes."""
    shown = scales_of(tensors)
    for name, field in TABLES.items():
        if name not in tensors:
            continue
        table, stated = _rows(name, tensors[name]), getattr(config, field)
        if not table.any():
            raise ValueError(
                f"{source}: {name} is all zeros, a network without positions or a table that was never filled; "
                f"expected sines and cosines; take the entry out of the file if {field}={stated} is what was trained"
            )
        if _equal(table, stated, spatial=name == "pos_embed", width=config.dim):
            continue
        scale = shown.get(field)
        if scale is not None and _equal(table, scale, spatial=name == "pos_embed", width=config.dim):
            raise ValueError(
                f"{source}: {name} was computed with {field}={scale}, expected {field}={stated} of the config; pass "
                f"config= with {field}={scale}"
            )
        raise ValueError(
            f"{source}: {name} of shape {tuple(tensors[name].shape)} is no table of {config.dim} sines and cosines at "
            "any scale; expected positions as in Open-Sora v1; use such a file"
        )


def _rows(name: str, table: Tensor) -> Tensor:
    """A table [n, dim]."""
    rows = table[0] if table.ndim == 3 and len(table) == 1 else table
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"{name} of shape {tuple(table.shape)}: expected [1, places, dim]; use a file of Open-Sora v1")
    return rows


def _columns(table: Tensor) -> int:
    """Width of the grid of a spatial table: its first row of places shares the second half of the features."""
    half = table.shape[1] // 2
    other = (table[:, half:] != table[0, half:]).any(-1).nonzero()
    return int(other[0]) if len(other) else len(table)


def _scale(table: Tensor, *, spatial: bool) -> float | None:
    """By what the coordinates were divided, from the second place; None where there is none or its table is empty."""
    if len(table) < 2 or not table.any():
        return None
    place, half = table[1], table.shape[1] // 2
    if spatial:
        columns = _columns(table)
        place = table[1, :half] if columns > 1 else table[columns, half:]
    count = len(place) // 2
    sines, cosines = place.double()[:count].tolist(), place.double()[count : 2 * count].tolist()
    angle = 0.0  # of the highest frequency, from the lowest on: each says how often the next one has turned
    for i in reversed(range(count)):
        frequency = 10000.0 ** (-i / count)
        off = math.atan2(sines[i], cosines[i]) - angle * frequency
        angle += math.remainder(off, 2 * math.pi) / frequency
    if not math.isfinite(angle) or angle <= 0:
        return None
    simple = float(Fraction(1 / angle).limit_denominator(64))
    return simple if math.isclose(simple * angle, 1.0, rel_tol=_bound(table)) else 1 / angle


def _bound(table: Tensor) -> float:
    return max(1e-4, torch.finfo(table.dtype).eps)


def _equal(table: Tensor, scale: float, *, spatial: bool, width: int) -> bool:
    if table.shape[1] != width:
        return False
    count = len(table)
    if spatial:
        columns = _columns(table)
        if count % columns:
            return False
        want = spatial_features(count // columns, columns, width, scale)
    else:
        want = position_features(torch.arange(count, device="cpu"), width, scale)
    return bool(((table.double().cpu() - want).abs() <= _bound(table)).all())
