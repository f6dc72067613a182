"""Position tables of published files: their scales are read, and believed before a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stdit_tiny import SIZES, randomised
from torch import Tensor

from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.load import load_stdit
from unspool.models.stdit.tables import check_tables, scales_of

DIM = 48
NETWORK = randomised(STDiTConfig(**SIZES), torch.float32)


def line(places: Any, width: int) -> Any:
    """Written out: sines, then cosines, of one coordinate."""
    angles = np.outer(places, 1.0 / 10000.0 ** (np.arange(width // 2) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def tables(space: float, time: float, rows: int = 4, columns: int = 6, frames: int = 16) -> dict[str, Tensor]:
    across, down = np.meshgrid(np.arange(columns) / space, np.arange(rows) / space)
    grid = np.concatenate([line(across.reshape(-1), DIM // 2), line(down.reshape(-1), DIM // 2)], 1)
    over_time = line(np.arange(frames) / time, DIM)
    return {name: torch.tensor(t)[None].float() for name, t in (("pos_embed", grid), ("pos_embed_temporal", over_time))}


def written(path: Path, found: dict[str, Tensor]) -> Path:
    save_file({**{name: t.contiguous() for name, t in NETWORK.state_dict().items()}, **found}, path / "net.safetensors")
    return path / "net.safetensors"


@pytest.mark.parametrize(("space", "time"), [(0.5, 1.0), (1.0, 2 / 3), (0.5, 0.1), (7.3, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_read_from_the_tables(space: float, time: float, dtype: torch.dtype) -> None:
    for rows, columns in ((4, 6), (6, 4), (1, 5), (5, 1)):
        found = {name: t.to(dtype) for name, t in tables(space, time, rows, columns).items()}
        assert scales_of(found) == pytest.approx({"space_scale": space, "time_scale": time}, rel=1e-2)
        config = replace(NETWORK.config, space_scale=space, time_scale=time)
        check_tables(found, config, "file")
    assert scales_of(tables(0.5, 2 / 3)) == {"space_scale": 0.5, "time_scale": 2 / 3}
    assert scales_of(tables(0.5, 0.5, 1, 1, 1)) == {}, "one place alone is place 0"


def test_a_file_is_loaded_with_the_scales_of_its_tables(tmp_path: Path) -> None:
    path = written(tmp_path, tables(0.5, 2 / 3))
    network = load_stdit(path, num_heads=SIZES["num_heads"])
    assert network.config == replace(NETWORK.config, space_scale=0.5, time_scale=2 / 3)
    assert load_stdit(path, config=network.config).config == network.config
    with pytest.raises(ValueError, match=r"space_scale=0\.5, expected space_scale=1\.0"):
        load_stdit(path, config=NETWORK.config)
    with pytest.raises(ValueError, match=r"time_scale=0\.66.*pass config= with time_scale=0\.66"):
        load_stdit(path, config=replace(NETWORK.config, space_scale=0.5), partial=True)


def test_tables_that_are_none_are_refused(tmp_path: Path) -> None:
    real = tables(1.0, 1.0)
    for name, table, match in (
        ("pos_embed", torch.zeros(1, 24, DIM), "all zeros.*take the entry out"),
        ("pos_embed_temporal", torch.randn(1, 16, DIM, generator=torch.Generator().manual_seed(0)), "no table"),
        ("pos_embed", real["pos_embed"][:, 1:], "no table"),
        ("pos_embed_temporal", real["pos_embed_temporal"][..., :40], "no table"),
        ("pos_embed", torch.zeros(2, 24, DIM), "places, dim"),
    ):
        with pytest.raises(ValueError, match=match):
            load_stdit(written(tmp_path, {**real, name: table.contiguous()}), num_heads=SIZES["num_heads"])
