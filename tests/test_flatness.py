"""A stream does not grow: bytes, live tensors and forgotten prompts over hundreds of chunks with every kind of switch.

Time and resident memory over 10,000 chunks are measured by bench/flatness.py; no time is asserted here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def flatness() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "flatness.py"
    spec = importlib.util.spec_from_file_location("flatness", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bytes_and_live_tensors_are_constant(flatness: ModuleType) -> None:
    result: dict[str, Any] = flatness.flat(600)
    assert len(result["cache_bytes"]) == 1
    low, high = result["live_tensors"]
    assert high - low <= 3, "a tensor stays behind: a blended text or a pending chunk may, a growing number may not"
    assert result["live_bytes"][1] - result["live_bytes"][0] <= 16_384


@pytest.mark.slow
def test_ten_thousand_chunks(flatness: ModuleType) -> None:
    result: dict[str, Any] = flatness.flat(10_000)
    assert len(result["cache_bytes"]) == 1
    assert result["live_tensors"][1] - result["live_tensors"][0] <= 3
    assert result["rss_kib_per_1000_chunks"] <= 50


def test_a_leak_would_be_seen(flatness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a rollout that keeps every chunk it has handed out."""
    kept: list[Any] = []
    real = flatness.Rollout.next_chunk

    def leaking(self: Any) -> Any:
        kept.append(real(self))
        return kept[-1]

    monkeypatch.setattr(flatness.Rollout, "next_chunk", leaking)
    low, high = flatness.flat(600)["live_tensors"]
    assert high - low > 100
