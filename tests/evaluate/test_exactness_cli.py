"""`unspool exactness` with recorded tensors that are not there: said, and no table that would look complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import CARRIED
from unspool.cli.exactness import BEGIN, END, Args, run
from unspool.evaluate import exactness
from unspool.evaluate.exactness import Row
from unspool.evaluate.golden import RECORDED, missing


@pytest.fixture(autouse=True)
def _one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "all_rows", lambda golden: iter([("A section", Row("a row", "fp32", 1e-7, 1e-5))]))


def test_a_clone_carries_every_recorded_file() -> None:
    assert missing(CARRIED) == []


def test_what_a_folder_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RECORDED[:-1]:
        (tmp_path / name).touch()
    assert run(Args(golden=str(tmp_path))) == 0
    assert f"left out, for want of recorded tensors: {RECORDED[-1]}" in capsys.readouterr().out


def test_no_table_is_written_without_all_of_them(tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    target.write_text(f"{BEGIN}\nold\n{END}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"not found in .*wan_tiny_cases"):
        run(Args(golden=str(tmp_path), markdown=str(target)))
    assert "old" in target.read_text(encoding="utf-8")
    run(Args(golden=str(CARRIED), markdown=str(target)))
    assert "| a row | fp32 | 1.0e-07 |" in target.read_text(encoding="utf-8")
