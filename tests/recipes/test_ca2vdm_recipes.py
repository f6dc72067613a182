"""Ca2-VDM's recipes at toy size: they train, go on, and end in a model folder that streams past eviction and wrap."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unspool.causal.chunks import ChunkPlan
from unspool.config import apply_overrides
from unspool.recipes.ca2vdm import ca2vdm_overfit, ca2vdm_stage, vid_gpt_stage

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from small_clips import write_clip
from tiny_model import CHANNELS, ROWS, TEXT_DIM, save, scatter

TOY = (
    f"network.in_channels={CHANNELS}", f"network.caption_dim={TEXT_DIM}", f"network.caption_len={ROWS + 1}",
    "network.dim=32", "network.num_layers=2", "network.num_heads=2", "network.freq_dim=16", "sampling.steps=2",
    "train.batch=2", "train.optim.warmup_steps=0", "train.compile=false",
)  # fmt: skip
SMALL = ("method.plan.chunk=3", "method.visibility.window=7", "method.circle=7")  # Pmax 4


def train(name: str, out: Path, *overrides: str) -> int:
    from unspool.cli.main import main

    return main(["train", name, "--out", str(out), "--quiet", *TOY, *overrides])


def stage_files(folder: Path) -> tuple[str, ...]:
    """Codec, text encoder and a few latents of 16 px."""
    from unspool.data.encoding import encode_source, load_file_or_name
    from unspool.data.stage import StageClips

    save(folder / "tiny")
    codec = load_file_or_name(str(folder / "tiny/codec.safetensors"), {"Taehv": "unspool.models.taehv:Taehv"})
    encode_source(StageClips(frames=25, size_px=16), codec, folder / "latents", fps=16.0, limit=6)
    tiny = folder / "tiny"
    return (f"text={tiny}/text.safetensors", f"codec={tiny}/codec.safetensors", f"data={folder}/latents", "size_px=16",
            "frames=null", "short.legs=[[4,1]]")  # fmt: skip


def test_the_stage_recipe_trains_goes_on_and_streams(tmp_path: Path) -> None:
    """A window of 7 latent frames; twelve of them are streamed, twice around the circle and well past eviction."""
    from unspool.engine.load import load

    files = stage_files(tmp_path)
    assert train("ca2vdm-stage", tmp_path / "run", *files, *SMALL, "train.steps=2") == 0
    assert (tmp_path / "run/model/model.json").is_file()
    assert train("ca2vdm-stage", tmp_path / "run", *files, *SMALL, "train.steps=4") == 0
    assert train("ca2vdm-stage", tmp_path / "whole", *files, *SMALL, "train.steps=4") == 0
    models = [load(tmp_path / name / "model") for name in ("run", "whole")]
    for one, other in zip(*(model.transformer.state_dict().values() for model in models), strict=True):
        assert one.equal(other), "a run that was continued is the run"
    model = models[0]
    spec = json.loads((tmp_path / "run/model/model.json").read_text())
    assert spec["transformer"]["kind"] == "stdit" and spec["rollout"]["process"] == "iddpm"
    assert spec["rollout"]["process_options"] == {"predicts": "velocity"}
    assert spec["provenance"]["recipe"] == "ca2vdm-stage" and spec["provenance"]["config"]["train"]["steps"] == 4
    assert "unspool train ca2vdm-stage`: 4 steps" in (tmp_path / "run/model/README.md").read_text()
    assert model.settings().steps == 2 and model.settings(steps=3).steps == 3
    session = model.session("a red ball bounces")
    frames = [session.next_chunk() for _ in range(6)]
    assert [len(f) for f in frames] == [1, 12, 12, 12, 12, 12] and frames[0].shape[1:] == (16, 16, 3)
    sizes = []
    for _ in range(3):
        frames.append(session.next_chunk())
        sizes.append(session.stream.num_bytes)
    assert len(set(sizes)) == 1
    again = model.generate("a red ball bounces", chunks=9)
    assert np.array_equal(again.frames, np.concatenate(frames)), "a second video on the same objects is the same video"
    both = model.generate_many(["a red ball bounces", "a blue star drifts left"], chunks=4)
    assert both[0].frames.shape == both[1].frames.shape and not np.array_equal(both[0].frames, both[1].frames)
    for window, match in ((8, "two of them meet"), (2, "longer than window")):
        with pytest.raises(ValueError, match=match):
            model.generate("a red ball", chunks=2, window=window)


def test_a_bidirectional_network_streams_by_computing_its_past_anew(tmp_path: Path) -> None:
    """OS-Ext on the first 6 latent frames of each clip; its model folder says how it is rolled out, and a causal one
    can be rolled out so too: as with its cache until a frame is evicted."""
    from unspool.engine.load import load
    from unspool.engine.pipeline import Pipeline

    files, chunk = stage_files(tmp_path), "method.plan.chunk=3"
    wide = ("method.bidirectional=true", "method.circle=null", "method.visibility.within=full", "frames=6")
    assert train("ca2vdm-stage", tmp_path / "open", *files, chunk, "method.visibility.window=7", *wide,
                 "train.steps=2") == 0  # fmt: skip
    model = load(tmp_path / "open/model")
    settings = model.settings()
    assert (settings.commit, settings.cache, settings.positions) == ("recompute", "recompute_bidirectional", "relative")
    assert model.spec.name == "os-ext-stage" and model.spec.clip == 6
    session = model.session("a red ball bounces")
    frames = [session.next_chunk() for _ in range(5)]
    assert [len(f) for f in frames] == [1, 12, 12, 12, 12] and session.stream.num_bytes == 0
    assert train("ca2vdm-stage", tmp_path / "run", *files, *SMALL, "train.steps=1") == 0
    cached = load(tmp_path / "run/model")
    scatter(cached.transformer, 3)  # type: ignore[arg-type]  # what a training begins as reads nothing of the past
    spec = replace(cached.spec, rollout=replace(cached.spec.rollout, commit="recompute"))
    parts = {"transformer": cached.transformer, "codec": cached.codec, "text": cached.wording.encoder}
    anew = Pipeline(spec, **parts, source="anew")  # type: ignore[arg-type]
    own, other = (each.generate("a red ball bounces", chunks=5, guidance=2.0).frames for each in (cached, anew))
    close = np.abs(own.astype(int) - other).max((1, 2, 3)) <= 1
    assert close[:25].all() and not close[25:].all()  # 1 + 3 + 3 latent frames fill the window


def test_the_command_line_streams_the_folder(tmp_path: Path) -> None:
    from unspool.cli.main import main

    files = stage_files(tmp_path)
    assert train("vid-gpt-stage", tmp_path / "run", *files, "method.plan.chunk=3", "train.steps=1") == 0
    out = tmp_path / "out.mp4"
    arguments = ["generate", "a red ball", "--model", str(tmp_path / "run/model"), "--seconds", "2", "-o", str(out)]
    assert main(arguments) == 0 and out.stat().st_size > 0


def test_real_clips_are_overfitted(tmp_path: Path) -> None:
    from unspool.engine.load import load

    save(tmp_path / "tiny")
    for name, frames in (("wave", 30), ("bow", 45)):
        write_clip(tmp_path / "videos" / f"{name}.mp4", frames)
        (tmp_path / "videos" / f"{name}.txt").write_text(f"a person who {name}s")
    options = (
        f"data.path={tmp_path / 'videos'}", f"model={tmp_path / 'tiny'}", "data.height_px=16", "data.width_px=32",
        "data.num_frames=25", "data.num_repeats=2", "codec.crop_px=null", "codec.crop_share=0", "codec_train.steps=2",
        "codec_train.batch=2", "report.seconds=3",
    )  # fmt: skip
    assert train("ca2vdm-overfit", tmp_path / "run", *options, *SMALL, "train.steps=2") == 0
    model = load(tmp_path / "run/model")
    assert model.spec.examples == ("a person who bows", "a person who waves")
    assert model.generate("a person who waves", chunks=5).frames.shape == (49, 16, 32, 3)
    found = json.loads((tmp_path / "run/report.json").read_text())
    assert found["captions"] == ["a person who bows", "a person who waves"] and len(found["psnr_by_second"][0]) == 3
    assert all(0 <= share <= 1 for share in found["nearest_own"]) and all(moves >= 0 for moves in found["motion"])
    assert (tmp_path / "run/streams.png").stat().st_size > 0


def test_the_report_knows_a_right_stream_a_still_one_and_a_wrong_one(tmp_path: Path) -> None:
    """Two videos, "streamed" as themselves twice over, as one picture, and each as the other."""
    from types import SimpleNamespace

    from unspool.engine.load import load
    from unspool.recipes.overfit_report import OverfitReport, OverfitReportConfig

    save(tmp_path / "tiny")
    model, rng = load(tmp_path / "tiny"), np.random.default_rng(0)
    videos = [(name, rng.integers(0, 256, (33, 16, 16, 3), np.uint8)) for name in ("one", "two")]
    of = dict(videos)

    def report(made: Callable[[str], np.ndarray]) -> dict[str, list[float]]:
        pipeline = SimpleNamespace(
            generate=lambda name, **_: SimpleNamespace(frames=made(name)), spec=model.spec, codec=model.codec,
            device=model.device, transformer=model.transformer,
        )  # fmt: skip
        return OverfitReport(OverfitReportConfig()).report(pipeline, videos, tmp_path / "sheet.png")  # type: ignore[arg-type]

    right = report(lambda name: np.concatenate([of[name], of[name]]))
    assert right["nearest_own"] == [1, 1] and right["first_psnr"] == right["last_psnr"] == pytest.approx([100, 100])
    assert right["motion"] == pytest.approx([1, 1], abs=0.05) and max(right["codec_psnr"]) < 20
    still = report(lambda name: np.repeat(of[name][:1], 66, 0))
    assert still["nearest_own"] == [1, 1] and still["motion"] == [0, 0]
    wrong = report(lambda name: of["two" if name == "one" else "one"])
    assert wrong["nearest_own"] == [0, 0] and max(wrong["first_psnr"]) < 12


def test_what_does_not_fit_is_refused_by_name() -> None:
    made = ca2vdm_stage()
    assert made.method.circle == 21 and made.method.visibility.window == 21  # type: ignore[union-attr]
    for overrides, match in (
        (("method.plan.chunk=2",), "chunk of 2 latent frames is shorter than prefix_frames=3"),
        (("method.circle=20",), "length=20 cyclic positions for a window of 21"),
        (("method.prefix_frames=null",), "expected both or neither"),
        (("network.process=flow", "network.learned_variance=false"), r"network\.process='flow': expected 'iddpm'"),
        (("method.process.num_steps=2000",), r"method\.process\.num_steps=2000: expected at most 1000"),
        (("method.visibility.commit_window=9",), "expected one that model.json can state"),
        (("method.visibility.sink=1",), r"sink frames \[0, 1\), which are kept for good"),
    ):
        with pytest.raises(ValueError, match=match):
            apply_overrides(made, overrides)
    with pytest.raises(ValueError, match=r"data\.num_frames=49"):
        apply_overrides(ca2vdm_overfit(), ("data.num_frames=33",))
    with pytest.raises(ValueError, match="chunk of 2"):
        replace(made.describe().rollout, chunk=2)
    with pytest.raises(ValueError, match="bidirectional_past=True with commit='separate'"):
        replace(made.describe().rollout, bidirectional_past=True)
    partial = ("method.visibility.within=full", "method.visibility.commit_within=causal")
    rollout = apply_overrides(made, partial).describe().rollout
    assert (rollout.within, rollout.commit_within) == ("full", "causal")
    assert apply_overrides(made, ("method.visibility.commit_window=9", "codec=")).codec == ""
    assert vid_gpt_stage().describe().rollout.window == "full"
    assert made.method.plan == ChunkPlan(chunk=4, first=1)
