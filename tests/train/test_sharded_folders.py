"""A training on two ranks ends in the model folder of its weights, as one on a single rank does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy_folders
from processes import ranks
from small_clips import write_clip
from tiny_model import save

from unspool.engine.load import load
from unspool.train.export import read_weights


def check(run: Path, dtype: torch.dtype) -> None:
    """The folder holds what the run's last checkpoint does."""
    model, weights = load(run / "model"), read_weights(run)
    for part, module in (("backbone", model.transformer), ("text", model.wording.encoder)):
        own = {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}  # type: ignore[attr-defined]
        assert own.keys() == {name for name in weights if name.startswith(f"{part}.")}
        kept = dtype if part == "backbone" else torch.float32
        assert all(torch.equal(tensor, weights[name].to(kept).to(tensor.dtype)) for name, tensor in own.items())


@pytest.mark.dist
def test_ca2vdm_writes_its_model_from_shards(tmp_path: Path) -> None:
    files = toy_folders.stage_files(tmp_path)
    arguments = ("ca2vdm-stage", *files, *toy_folders.TOY, *toy_folders.SMALL, "learn_text=true", "train.steps=2")
    assert ranks(2, tmp_path / "run", *arguments, module="toy_folders") == [0, 0]
    check(tmp_path / "run", torch.bfloat16)


@pytest.mark.dist
def test_a_fine_tuning_writes_model_and_report_from_shards(tmp_path: Path) -> None:
    """Codec, words and latents are prepared by one of the ranks, while the other waits."""
    save(tmp_path / "tiny")
    write_clip(tmp_path / "videos" / "wave.mp4", 30)
    (tmp_path / "videos" / "wave.txt").write_text("a person who waves")
    arguments = ("finetune-video", f"data.path={tmp_path / 'videos'}", f"model={tmp_path / 'tiny'}",
                 *toy_folders.FINETUNE)  # fmt: skip
    assert ranks(2, tmp_path / "run", *arguments, "train.steps=2", module="toy_folders") == [0, 0]
    check(tmp_path / "run", torch.float32)
    assert (tmp_path / "run" / "report.json").is_file()
