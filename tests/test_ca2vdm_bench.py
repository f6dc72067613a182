"""The comparison of ways to extend a video runs, counts the right frames and states the paper's bytes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest


def test_it_runs_at_a_tiny_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "bench" / "ca2vdm.py"
    spec = importlib.util.spec_from_file_location("ca2vdm_bench", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ca2vdm_bench", module)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    options = ["--size", "tiny", "--chunk", "2", "--pmax", "5", "--chunks", "3", "--long", "4", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["ca2vdm", *options, "--repeats", "1", "--prefix-frames", "1"])
    module.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    frames = {name: row["frames_per_step"] for name, row in result["ways"].items()}
    assert frames == {"ca2vdm": 6, "os_fix": 12, "os_ext": 3 + 5 + 7, "step_caches": 6}
    assert {name: len(row) for name, row in result["ms_per_chunk"].items()} == {"ca2vdm": 4, "vid_gpt": 4, "os_ext": 4}
    for row in result["bytes"]["paper"].values():
        assert row["readable"] == row["formula"]
    assert module.frames_of(module.ways(module.ExtensionConfig())["os_ext"]) == 282
