"""`unspool generate`, `stream`, `replay`, `models`, `demo` from end to end, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unspool.cli.main import COMMANDS, main
from unspool.engine.record import read_record

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from tiny_model import SPEC, save

RED, BLUE = "a red ball bounces at sunset", "a blue star drifts left at night"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNSPOOL_DEBUG", raising=False)
    monkeypatch.setattr("unspool.log.setup_console", lambda: None)


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_generate_prints_one_line_of_json_that_holds(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", RED, "-o", "a.npy", "--seconds", "5", "--at", "2", BLUE, "--at", "3", RED, "--model", model]
    assert main([*command, "--seed", "4", "--json"]) == 0
    told = summary(capsys)
    assert told["frames"] == 80 == len(np.load("a.npy")) and told["seconds"] == 5 and told["chunks"] == 7
    assert [s["at_s"] for s in told["switches"]] == [33 / 16, 57 / 16] and told["switches"][0]["asked_s"] == 2
    assert told["fps"] > 0 and told["first_frame_ms"] > 0 and told["notes"] == [] and told["path"] == "a.npy"
    assert told["hash"] == read_record("a.npy").frames_sha256 and told["weights"] == read_record("a.npy").weights


def test_generate_says_when_a_switch_takes_effect(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", RED, "--seconds", "3", "--at", "2", BLUE, "--model", model]) == 0
    out = capsys.readouterr().out
    assert "takes effect at 2.0625 s (chunk 3): a blue star" in out and "out/video.mp4 (3 s" in out
    assert Path("out/video.mp4").is_file()


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_replay_makes_the_same_frames(model: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"a{suffix}"
    assert main(["generate", RED, "-o", file, "--seconds", "2", "--at", "1", BLUE, "--model", model]) == 0
    capsys.readouterr()
    assert main(["replay", file, "-o", f"b{suffix}"]) == 0
    captured = capsys.readouterr()
    assert "identical: 32 frames" in captured.out and "other weights" not in captured.err
    assert replace(read_record(f"b{suffix}"), model="") == replace(read_record(file), model="")


def test_replay_notices_other_weights(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(Path("other"), replace(SPEC, name="other"), seed=3)
    assert main(["generate", RED, "-o", "a.npy", "--seconds", "1", "--model", model]) == 0
    assert main(["replay", "a.npy", "--model", "other"]) == 1
    captured = capsys.readouterr()
    assert "DIFFERENT: 16 frames" in captured.out and "other weights than recorded" in captured.err


def test_stream_without_a_terminal_writes_a_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", RED, "--seconds", "2", "--model", model]) == 0
    assert "not a terminal" in capsys.readouterr().err and read_record("out/stream.mp4").num_frames == 32
    assert main(["generate", RED, "-o", "a.npy", "--seconds", "2", "--model", model]) == 0
    assert read_record("a.npy").frames_sha256 == read_record("out/stream.mp4").frames_sha256


def test_models(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.engine.shipped.shipped_models", lambda: {"tiny": Path(model)})
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "32x16" in out and "self-forcing-dmd" in out and "CC-BY-NC-SA-4.0" in out and "random weights" in out
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["name"] == "tiny"
    assert main(["models", model]) == 0
    assert "chunks of 3 latent frames, window 9, sink 3, 2 steps" in capsys.readouterr().out


def test_demo_with_a_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", model, "--seconds", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("takes effect") == 2 and "frames/s" in out
    assert read_record("out/demo.mp4").num_frames == 64 and Path("out/demo_sheet.png").is_file()


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("", "unconditional"),
        ("\n ", "unconditional"),
        ("x" * 10_000, "does not know"),
        ("ball " * 2000, "no room"),
        ("\N{BALLOON}\u2764\ufe0f", "does not know"),
        ("красный шар 赤い玉 كرة", "does not know"),
        ("\x00\x1b[31m red", "31m"),
    ],
)
def test_any_prompt_is_taken_and_what_is_ignored_is_said(
    model: str, prompt: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", prompt, "-o", "a.mp4", "--seconds", "0.5", "--model", model, "--json"]) == 0
    told = summary(capsys)
    assert note in told["notes"][0] and len(told["notes"][0]) < 400
    assert read_record("a.mp4").prompt == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "expected a length above 0"),
        (["--seconds", "-3"], "expected a length above 0"),
        (["--seconds", "nan"], "expected a length above 0"),
        (["--seconds", "1e6"], "at most 3600 s; use `unspool stream`"),
        (["--seconds", "3", "--at", "2.9", "x"], "when the clip of 3 s is over"),
        (["--at", "-1", "x"], "at least 0"),
        (["-o", "nowhere/a.mp4"], "does not exist; create it first"),
        (["-o", "a.webm"], "cannot write .webm"),
        (["-o", "."], "without suffix"),
        (["--model", "nothing"], "no model 'nothing'"),
        (["--model", "spoilt"], "codec.safetensors"),
        (["--window", "4"], "window=4"),
        (["--steps", "0"], "num_steps=0"),
        (["--seed", "-1"], "seed -1"),
        (["--scale", "0"], "scale=0"),
        (["-o", "a.npy", "--scale", "2"], "holds frames as they are"),
        (["--transition", "smooth", "--switch", "recache", "--seconds", "3", "--at", "1", "x"], "blends prompts"),
    ],
)
def test_bad_input_is_one_line_and_2_and_leaves_nothing(
    model: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "spoilt" in options:
        save(Path("spoilt"))
        weights = Path("spoilt/codec.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1])
    before = sorted(Path(".").rglob("*"))
    given = {"--model": model, "-o": "a.mp4"}
    base = [part for name, value in given.items() if name not in options for part in (name, value)]
    assert main(["generate", RED, *base, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("unspool: error: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == ""
    assert sorted(Path(".").rglob("*")) == before


def test_an_interrupted_video_is_not_half_written(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from unspool.engine.session import Session

    whole = Session.next_chunk

    def interrupted(self: Session) -> Any:
        if self.chunk == 2:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Session, "next_chunk", interrupted)
    assert main(["generate", RED, "-o", "a.mp4", "--seconds", "4", "--model", model]) == 130
    assert not list(Path(".").iterdir())


def test_replay_of_other_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.mp4").write_bytes(b"no video")
    Path("a.txt").write_text("x")
    for file, message in (("a.mp4", "not a readable"), ("a.txt", "no metadata in .txt"), ("b.mp4", "no such file")):
        assert main(["replay", file]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "stream", "replay", "models", "demo"])
def test_help_of_commands_answers_without_torch(command: str) -> None:
    code = (
        "import sys\nfrom unspool.cli.main import main\n"
        f"try:\n    main([{command!r}, '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower() and command in COMMANDS


def test_the_list_of_models_needs_no_torch() -> None:
    code = (
        "import sys\nfrom unspool.cli.main import main\nassert main(['models']) == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert result.returncode == 0, result.stderr
