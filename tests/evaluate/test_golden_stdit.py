"""The rows of the printed table that stand for Ca2-VDM: all of them, within their bounds, and able to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import golden_path
from unspool.evaluate import golden_stdit
from unspool.models.stdit.network import STDiT


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_recorded_case_has_a_row_within_its_bound(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("ca2vdm_config")["cases"]
    wanted = {f"ca2vdm {name}" for name in cases if name.split("_")[0] in ("net", "rollout", "sampler")}
    rows = list(golden_stdit.rows(golden_path("ca2vdm_cases.safetensors").parent))
    assert {row.what for row in rows} == wanted and len(rows) == 21
    assert [row for row in rows if not row.ok] == []


def test_a_network_that_is_a_little_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden_path("ca2vdm_cases.safetensors").parent
    embed = STDiT._embed

    def off(self: STDiT, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return embed(self, x, grid) + 1e-3

    monkeypatch.setattr(STDiT, "_embed", off)
    for row, _ in zip(golden_stdit.rows(folder), range(3), strict=False):
        assert not row.ok


def test_without_the_tensors_there_are_no_rows(tmp_path: Path) -> None:
    assert list(golden_stdit.rows(tmp_path)) == []
