"""`unspool data preview` writes whole files that show what they say; `unspool data validate` prints its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unspool.cli.main import COMMANDS, main
from unspool.data.worlds.preview import film, sheet
from unspool.data.worlds.stage import Stage
from unspool.engine.export import read_metadata


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "data", ("unspool.cli.data:run", "look at the training world"))
    monkeypatch.setattr("unspool.log.setup_console", lambda: None)


def test_preview_writes_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert main(["data", "preview", "--clips", "3", "--size", "32", "--seconds", "1", "-o", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as page:
        assert page.width > 9 * 32 and page.height > 3 * 32
    assert [p.name for p in out.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_preview_writes_a_film(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"wall{suffix}"
    args = ["data", "preview", "--clips", "2", "--size", "32", "--seconds", "1", "--fps", "4", "--split", "heldout"]
    assert main([*args, "--sprites", "2", "--events", "1", "--out", str(out)]) == 0
    assert out.stat().st_size > 500
    assert read_metadata(out)["clips"] == ["heldout 0", "heldout 1"]


def test_the_sheet_shows_the_frames_and_the_film_the_clips() -> None:
    stage = Stage()
    scenes = [stage.scene("train", i) for i in range(2)]
    page = np.asarray(sheet(scenes, ["a", "b"], frames=17, fps=8, size_px=64, tiles=3))
    frame = scenes[0].render(np.array([1.0]), 64)[0]
    factor = 2
    tile = page[: 64 * factor, 64 * factor + 2 :][:, : 64 * factor]
    assert np.array_equal(tile[::factor, ::factor], frame)
    walls = list(film(scenes, ["a", "b"], frames=17, fps=8, size_px=64))
    assert [len(w) for w in walls] == [8, 8, 1]
    assert np.array_equal(walls[1][0][: 64 * factor : factor, : 64 * factor : factor], frame)


@pytest.mark.parametrize(
    "args",
    [
        ["--sprites", "4"], ["--events", "7"], ["--clips", "0"], ["--size", "8"], ["--seconds", "0"],
        ["--seconds", "1e6"], ["--fps", "-1"], ["--out", "x.txt"], ["--first", "-1"],
    ],
)  # fmt: skip
def test_impossible_wishes_are_one_line(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "preview", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("unspool: error:") and err.count("\n") == 1 and "expected" in err
    assert not list(tmp_path.rglob("*.p*"))


def test_validate_prints_the_table_and_writes_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scorer.json"
    args = ["data", "validate", "--clips", "1", "--sprites", "1", "--size", "32", "--fps", "4", "--json", str(out)]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "truth" in text and "wrong prompt" in text and "1 clips" in text
    rows = json.loads(out.read_text())["rows"]["1"]
    assert rows["truth"]["presence"] > 0.9 and rows["noise .1"]["psnr"] < rows["noise .02"]["psnr"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (("preview", ("heldout", "caption")), ("validate", ("ceiling", "chance"))):
        with pytest.raises(SystemExit) as stop:
            main(["data", command, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and all(word in out for word in words)
