"""The command line: help, mistakes and user errors are answered briefly; the metrics log and doctor keep their word."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest

from unspool import log
from unspool.cli import doctor
from unspool.cli.doctor import DEFAULT, Installed, torch_family_problems
from unspool.cli.main import COMMANDS, main


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """A command for tests."""

    fail: str = ""
    """What to raise."""
    code: int = 0


def run(args: Args) -> int:
    if args.fail == "value":
        raise ValueError("height_px=500 is not a multiple of 16;\n  try 496 or 512")
    if args.fail == "missing":
        Path("/no/such/file").read_text()
    if args.fail == "bug":
        raise ZeroDivisionError("a bug")
    if args.fail == "stop":
        raise KeyboardInterrupt
    return args.code


@pytest.fixture
def try_command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("unspool_test_command")
    module.Args, module.run = Args, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unspool_test_command", module)
    monkeypatch.setitem(COMMANDS, "try", ("unspool_test_command:run", "a command for tests"))
    monkeypatch.delenv("UNSPOOL_DEBUG", raising=False)
    monkeypatch.setattr("unspool.log.setup_console", lambda: None)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and line in out for name, (_, line) in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().err == out


def test_every_listed_command_exists() -> None:
    for target, _ in COMMANDS.values():
        module, _, function = target.partition(":")
        path = Path(__file__).parents[1] / "src" / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"{target}: no {path}"
        assert f"def {function}(" in path.read_text("utf-8") and "class Args" in path.read_text("utf-8")


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dcotor"]) == 2
    assert capsys.readouterr().err == "unspool: error: unknown command 'dcotor'; did you mean doctor?\n"


@pytest.mark.usefixtures("try_command")
def test_the_exit_code_is_the_command_s() -> None:
    assert main(["try"]) == 0
    assert main(["try", "--code", "7"]) == 7


@pytest.mark.usefixtures("try_command")
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("value", "unspool: error: height_px=500 is not a multiple of 16; try 496 or 512\n"),
        ("missing", "unspool: error: /no/such/file: No such file or directory\n"),
    ],
)
def test_a_user_error_is_one_line_and_2(kind: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "--fail", kind]) == 2
    captured = capsys.readouterr()
    assert captured.err == line and captured.out == ""


@pytest.mark.usefixtures("try_command")
def test_debug_shows_the_traceback_and_bugs_always_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["try", "--fail", "bug"])
    monkeypatch.setenv("UNSPOOL_DEBUG", "1")
    with pytest.raises(ValueError, match="multiple of 16"):
        main(["try", "--fail", "value"])


@pytest.mark.usefixtures("try_command")
def test_interruption_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "--fail", "stop"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.usefixtures("try_command")
def test_bad_options_and_command_help_leave_by_system_exit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as bad:
        main(["try", "--cod", "7"])
    assert bad.value.code == 2
    with pytest.raises(SystemExit) as asked:
        main(["try", "--help"])
    assert asked.value.code == 0 and "What to raise." in capsys.readouterr().out


def family(torch: str, torch_cuda: str, other_cuda: str | None, requires: str = "torch==2.13.0") -> list[str]:
    return torch_family_problems(
        {"torch": Installed(torch, torch_cuda), "torchvision": Installed("0.28.0", other_cuda, ("numpy", requires))}
    )


def test_doctor_finds_a_torchvision_for_another_torch() -> None:
    assert family("2.13.0+cpu", "", "") == []
    assert family("2.13.0", "13.0", DEFAULT) == []
    assert family("2.13.0+cpu", "", None) == []
    assert "needs torch 2.12.0" in family("2.13.0", "13.0", "13.0", "torch (==2.12.0)")[0]
    assert "built for CUDA 13.0, torch 2.13.0+cpu for the CPU" in family("2.13.0+cpu", "", "13.0")[0]
    assert "CUDA (the default on Linux)" in family("2.13.0+cpu", "", DEFAULT)[0]
    assert "pip uninstall torchvision" in family("2.13.0", "12.6", "13.0")[0]
    assert torch_family_problems({}) == []


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = None\n", ""),
        ("cuda: Optional[str] = '13.0'\n", "13.0"),
        ("__version__ = '0.28.0+cu130'\nfrom x import y\nif y() > 0:\n    cuda = y()\n", "13.0"),
        ("__version__ = '0.28.0+cpu'\n", ""),
        ("__version__ = '0.28.0'\n", None),
        ("", None),
    ],
)
def test_doctor_reads_the_build_from_version_files(text: str, cuda: str | None) -> None:
    assert doctor.cuda_in_version_file(text) == cuda


def test_doctor_reads_cpu_flags() -> None:
    assert doctor.cpu_flags("model: x\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16\n") == [
        "avx2",
        "avx512_bf16",
        "amx_bf16",
    ]
    assert doctor.cpu_flags("Features : fp asimd bf16\n") == ["asimd", "bf16"]
    assert doctor.cpu_flags("") == []


def test_doctor_reports_a_problem_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real environment is used except for torchvision; the tests must not depend on what else is installed."""
    monkeypatch.setattr(doctor, "TORCH_FAMILY", ())
    assert doctor.run(doctor.Args()) == 0
    assert "all good" in capsys.readouterr().out
    wrong = {"torch": Installed("2.13.0+cpu", ""), "torchvision": Installed("0.28.0", "13.0")}
    monkeypatch.setattr(doctor, "TORCH_FAMILY", ("torchvision",))
    monkeypatch.setattr(doctor, "_installed", wrong.get)
    assert doctor.run(doctor.Args()) == 1
    assert "PROBLEM: torchvision" in capsys.readouterr().out


def test_doctor_notes_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "TORCH_FAMILY", ())
    assert doctor.run(doctor.Args()) == 0
    out = capsys.readouterr().out
    assert "not usable; eager code runs instead" in out and "a C++ compiler" in out


def test_a_notice_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log, "_told", set())
    with caplog.at_level(logging.WARNING, logger="unspool"):
        for _ in range(3):
            log.notice_once("a", "first")
        log.notice_once("b", "second")
    assert caplog.messages == ["first", "second"]


def test_metrics_survive_and_append(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.jsonl"
    with log.MetricsLog(path) as sink:
        sink.write(0, {"loss": 1.5, "nan": math.nan, "down": -math.inf})
        assert len(log.read_metrics(path)) == 1  # readable while the run goes on
    with log.MetricsLog(path) as sink:
        sink.write(1, {"loss": 1})
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = log.read_metrics(path)
    assert first["step"] == 0 and first["loss"] == 1.5 and math.isnan(first["nan"]) and first["down"] == -math.inf
    assert second["step"] == 1 and second["loss"] == 1.0 and second["time_s"] >= 0
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert len(log.read_metrics(path)) == 2
    with path.open("a") as file:
        file.write('\n{"step": 3, "time_s": 0}\n')
    with pytest.raises(ValueError, match="line 3: not a metrics line"):
        log.read_metrics(path)


def test_metrics_console_and_reserved_names(caplog: pytest.LogCaptureFixture) -> None:
    sink = log.MetricsLog(None, console_every=2)
    with caplog.at_level(logging.INFO, logger="unspool"):
        for step in range(4):
            sink.write(step, {"loss": step / 3})
    assert caplog.messages == ["step 0  loss 0", "step 2  loss 0.6667"]
    with pytest.raises(ValueError, match="may not be called step"):
        sink.write(4, {"step": 1.0})
    with pytest.raises(ValueError, match="console_every=-1"):
        log.MetricsLog(None, console_every=-1)


def test_the_package_runs_as_a_module() -> None:
    """As `torchrun -m unspool train ...` does."""
    done = subprocess.run([sys.executable, "-m", "unspool", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "unspool train" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "unspool", "tarin"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "train" in wrong.stderr
