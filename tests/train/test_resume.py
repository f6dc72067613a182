"""Stopping anywhere and going on gives the bits of never stopping; what does not fit is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import start, stored_tensors, wait, wait_for_step
from toy import recipe, tensors, train

from unspool.log import read_metrics
from unspool.train.checkpoint import find
from unspool.train.export import export_weights, read_weights
from unspool.train.loop import Trainer
from unspool.weights.read import read_checkpoint


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


KINDS = {
    "adamw": (),
    "muon": ("train.optim.kind=muon+adamw", "train.optim.weight_decay=0.1", "train.optim.schedule=cosine"),
    "two roles": ("critic=true", "train.ema.roles=student,critic", "train.accumulate=2"),
    "bf16": ("train.dtype=bf16", "train.workers=3", "train.optim.warmup_steps=8"),
    "skipped steps": ("bad=3,4,7",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *KINDS[kind], "train.steps=9")
    legs = tmp_path / "legs"
    for stop in ("train.steps=1", "train.steps=4", "train.steps=9"):
        # the schedules depend on the number of steps, so a leg is cut short by a signal instead
        number = stop.removeprefix("train.steps=")
        last = train(legs, *KINDS[kind], "train.steps=9", f"signal_at={number}")
        assert last.step == int(number)
    assert same(tensors(whole), tensors(last))
    assert whole.state.counters() == last.state.counters()
    lines = [[{k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "lr")} for row in read_metrics(f)]
             for f in (tmp_path / "whole/metrics.jsonl", legs / "metrics.jsonl")]  # fmt: skip
    assert lines[0] == lines[1]
    assert same(read_weights(tmp_path / "whole"), read_weights(legs))


def test_a_run_knows_the_time_of_all_its_legs(tmp_path: Path) -> None:
    first = train(tmp_path, "train.steps=6", "signal_at=3")
    second = Trainer(recipe("train.steps=6"), tmp_path, show=False)
    assert 0 < second.seconds <= first.seconds, "a new leg begins with the time of the checkpoint"
    before = second.seconds
    second.run()
    assert second.seconds > before
    saved = find(tmp_path)
    assert saved is not None and saved.state["seconds"] > before


def test_the_test_can_fail(tmp_path: Path) -> None:
    one, other = train(tmp_path / "a", "train.steps=2"), train(tmp_path / "b", "train.steps=2", "train.seed=1")
    assert not same(tensors(one), tensors(other))


@pytest.mark.dist
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    overrides = ("train.steps=8", "train.save_every=2")
    killed = start(tmp_path / "killed", *overrides, "sleep_s=0.05")
    wait_for_step(tmp_path / "killed", 4)
    os.kill(killed.pid, signal.SIGKILL)
    assert wait(killed) == -signal.SIGKILL
    saved = find(tmp_path / "killed")
    assert saved is not None and 4 <= saved.step < 8
    assert wait(start(tmp_path / "killed", *overrides)) == 0
    train(tmp_path / "whole", *overrides)
    assert same(stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "killed"))


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "train.steps=100000", "train.save_every=3", "sleep_s=0.02")
    wait_for_step(tmp_path, 3)
    os.kill(process.pid, number)
    assert wait(process) == 0
    saved = find(tmp_path)
    assert saved is not None and 3 <= saved.step < 100000
    assert not (tmp_path / "student.safetensors").exists()


def test_the_clock_ends_a_leg_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(recipe("train.max_minutes=0.001", "sleep_s=0.03", "train.steps=1000"), tmp_path, show=False)
    outcome = trainer.run()
    assert not outcome.is_done and "max_minutes" in outcome.reason and 0 < outcome.step < 1000
    assert outcome.checkpoint.name == f"step-{outcome.step:08d}"


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    train(tmp_path, "train.steps=7", "train.save_every=1", "train.keep=3")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000005", "step-00000006", "step-00000007"]
    earlier = tmp_path / "checkpoints/step-00000005"
    other = train(tmp_path, "train.steps=7", "train.save_every=1", "train.keep=3", resume=earlier)
    assert other.step == 7


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(folder, "train.steps=3")
    return folder


def refused(run: Path, *overrides: str, **options: object) -> str:
    with pytest.raises((ValueError, OSError)) as found:
        train(run, "train.steps=3", *overrides, **options)
    text = str(found.value)
    assert "\n" not in text
    return text


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("override", "field"),
    [("train.optim.lr=0.5", "train.optim.lr"), ("train.ema=none", "train.ema"), ("sizes.width=4", "sizes.width"),
     ("train.batch=8", "train.batch"), ("critic=true", "critic"), ("train.seed=3", "train.seed")],
)  # fmt: skip
def test_another_configuration_is_refused_by_name(finished: Path, override: str, field: str) -> None:
    assert f"{field} was" in refused(finished, override).replace(f"{field}.decay", field)


@pytest.mark.parametrize("override", ["train.log_every=7", "train.max_minutes=9", "sleep_s=0.001", "train.keep=5"])
def test_a_harmless_change_is_not(copy: Path, override: str) -> None:
    assert train(copy, "train.steps=4", override).step == 4


def test_a_damaged_checkpoint_is_refused_in_one_line(copy: Path) -> None:
    saved = find(copy)
    assert saved is not None
    data = next(saved.path.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "damaged" in refused(copy)
    data.write_bytes(content[: len(content) // 2])
    assert "damaged" in refused(copy)
    data.unlink()
    assert "missing" in refused(copy)
    (saved.path / "state.json").write_text("{")
    assert "state.json cannot be read" in refused(copy)
    (saved.path / "state.json").write_text(json.dumps({"step": 1}))
    assert "format" in refused(copy)


def test_an_unfinished_checkpoint_is_not_seen(copy: Path) -> None:
    saved = find(copy)
    assert saved is not None
    shutil.copytree(saved.path, saved.path.with_name(".step-00000009.tmp"))
    (copy / "checkpoints/latest").unlink()  # as after a kill between the two renames
    again = find(copy)
    assert again is not None and again.step == 3
    train(copy, "train.steps=4")
    assert not list((copy / "checkpoints").glob(".*"))


def test_what_resume_may_mean(copy: Path, tmp_path: Path) -> None:
    assert "already holds a run" in refused(copy, resume="never")
    assert "no such checkpoint" in refused(tmp_path / "new", resume=tmp_path / "nothing")
    assert "no checkpoint" in refused(tmp_path / "new", resume=tmp_path)
    moved = train(tmp_path / "new", "train.steps=4", resume=copy)
    assert moved.step == 4 and same(tensors(moved), tensors(train(copy, "train.steps=4")))
    assert "another run" in refused(copy, resume=tmp_path / "new")
    (tmp_path / "file").write_text("")
    assert "got a file" in refused(tmp_path / "file")


def test_weights_come_out_and_go_in(finished: Path, tmp_path: Path) -> None:
    file = export_weights(finished, tmp_path / "ema.safetensors")
    checkpoint = read_checkpoint(file)
    assert checkpoint.metadata["step"] == "3" and checkpoint.metadata["weights"] == "ema"
    raw, average = read_weights(finished, which="raw"), read_weights(finished)
    assert same(average, checkpoint.tensors) and same(average, read_weights(finished / "student.safetensors"))
    assert not same(raw, average)
    heads = export_weights(finished, tmp_path / "head.safetensors", prefix="head.")
    assert set(read_checkpoint(heads).tensors) == {"weight", "bias"}
    begun = Trainer(recipe(), tmp_path / "begun", init_from=file, show=False)
    own = {name: t for name, t in begun.state.networks["student"].state_dict().items()}
    assert same(own, average)
    assert all(torch.equal(t, average[name]) for name, t in begun.state.averages["student"].average.items())
    with pytest.raises(ValueError, match=r"\[8, 6\] instead of \[4, 6\]"):
        Trainer(recipe("sizes.width=4"), tmp_path / "begun", init_from=file, show=False)
    with pytest.raises(ValueError, match="no role 'critic'; it has student"):
        read_weights(finished, role="critic")
