"""Fine-tuning on a folder of videos from end to end at toy size, and the measures of its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unspool.evaluate.recall import distances, psnr_by_frame, share_nearest_own

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from small_clips import write_clip
from tiny_model import save

TOY = (
    "data.height_px=16", "data.width_px=32", "data.num_frames=21", "data.num_repeats=2", "codec.crop_px=null",
    "codec.crop_share=0", "codec_train.steps=2", "codec_train.batch=2", "train.steps=2", "train.batch=2",
    "report.steps=2",
)  # fmt: skip


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name, frames in (("wave", 30), ("bow", 45)):
        write_clip(tmp_path / "videos" / f"{name}.mp4", frames)
        (tmp_path / "videos" / f"{name}.txt").write_text(f"a person who {name}s at night")
    return tmp_path / "videos"


def train(out: Path, *overrides: str) -> int:
    from unspool.cli.main import main

    return main(["train", "finetune-video", "--out", str(out), "--quiet", *TOY, *overrides])


def test_a_folder_of_videos_becomes_a_model_and_a_report(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unspool.engine.load import load

    save(tmp_path / "tiny")
    arguments = (f"data.path={videos}", f"model={tmp_path / 'tiny'}")
    assert train(tmp_path / "run", *arguments) == 0
    out = capsys.readouterr().out
    assert "nearest to their own video (by chance 50%)" in out and "held-out" in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["captions"]) == {"a person who waves at night", "a person who bows at night"}
    assert len(report["tail"]["model"]) == 9  # a fifth of 45 frames
    assert report["tail"]["clips"][0] == 2 and report["tail"]["clips"][-1] == 1
    assert (tmp_path / "run" / "samples.png").is_file() and (tmp_path / "run" / "tail.png").is_file()

    model = load(tmp_path / "run" / "model")
    assert not model.wording.notes("a person who waves at night")
    assert model.generate("a person who waves", seconds=1, steps=2).frames.shape[1:] == (16, 32, 3)

    made = {path: path.read_bytes() for path in (tmp_path / "run" / "parts").rglob("*") if path.is_file()}
    assert train(tmp_path / "run", *arguments, "train.steps=4", "train.log_every=1") == 0  # what was prepared is kept
    assert made == {path: path.read_bytes() for path in made}


def test_a_folder_without_videos_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert train(tmp_path / "run", f"data.path={tmp_path / 'empty'}", "model=nothing") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_before_the_clips_are_encoded_says_so(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "tiny")
    assert train(tmp_path / "run", f"data.path={videos}", f"model={tmp_path / 'tiny'}", "--dry-run") == 2
    assert "not encoded yet" in capsys.readouterr().err


def test_a_clip_is_nearest_to_where_it_was_cut_out() -> None:
    draw = np.random.default_rng(0)
    videos = [draw.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8) for n in (9, 12, 7)]
    cuts = [videos[0][3:8], videos[1], np.concatenate([videos[2], videos[2][-1:]])]  # inside, all of it, longer
    table = distances(cuts, videos)
    assert table.shape == (3, 3) and np.allclose(np.diag(table), 0.0)
    assert share_nearest_own(table, [0, 1, 2]) == 1.0 and share_nearest_own(table, [0, 2, 1]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="one size"):
        distances([videos[0]], [videos[1][:, :2]])


def test_psnr_is_a_mean_over_the_clips_that_are_long_enough() -> None:
    true = [np.zeros((2, 1, 1, 3), np.uint8), np.zeros((1, 1, 1, 3), np.uint8)]
    made = [np.full((2, 1, 1, 3), 255, np.uint8), np.full((1, 1, 1, 3), 255, np.uint8)]
    made[0][1] = 0
    curve, counts = psnr_by_frame(made, true)
    assert curve[0] == pytest.approx(0.0) and curve[1] > 90 and counts.tolist() == [2, 1]


def test_an_encoder_learns_new_words_and_keeps_the_old_ones() -> None:
    from unspool.models.caption import CaptionConfig, CaptionEncoder

    torch.manual_seed(0)
    old = CaptionEncoder(CaptionConfig(words=("star", "night"), dim=8, out_dim=4, layers=1, heads=2, rows=6))
    new = old.knowing(["Stars at night", "a person stars at starboard"])
    assert new.config.words == ("star", "night", "at", "a", "person", "starboard")
    assert torch.equal(old(["star night"]), new(["star night"]))
    assert new.unknown("a person at night") == [] and old.unknown("a person at night") == ["a", "person", "at"]
    assert not torch.equal(new(["a person"]), new(["person"]))
