"""Trainings in other processes: forked from a server that has imported torch once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from unspool.train.checkpoint import fill, find, stored

DEADLINE_S = 120.0


def context() -> Any:
    """Processes that start at once."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["toy", "torch._dynamo"])
    return made


def _leg(out: Path, overrides: tuple[str, ...], environment: dict[str, str], module: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        importlib.import_module(module).train(out, *overrides)
    except ValueError as error:
        print(f"unspool: error: {error}", file=sys.stderr)
        sys.exit(2)


def start(out: Path, *overrides: str, environment: dict[str, str] | None = None, module: str = "toy") -> Any:
    """Train in a process of its own: `train` of `module`."""
    process = context().Process(target=_leg, args=(out, overrides, environment or {}, module))
    process.start()
    return process


def wait(process: Any) -> int:
    """The exit code; negative for a signal."""
    process.join(DEADLINE_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError("the process did not end in time")
    return int(process.exitcode)


def ranks(number: int, out: Path, *overrides: str, module: str = "toy") -> list[int]:
    """Train on several gloo ranks; their exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        start(out, *overrides, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, module=module)
        for rank in range(number)
    ]
    return [wait(process) for process in started]


def wait_for_step(out: Path, step: int) -> None:
    """Until a checkpoint of `step` or later is there."""
    began = time.monotonic()
    while time.monotonic() - began < DEADLINE_S:
        if (out / "checkpoints" / "latest").is_file():
            name = (out / "checkpoints" / "latest").read_text().strip()
            if int(name.removeprefix("step-")) >= step:
                return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} in time")


def stored_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint of a run holds, whole."""
    saved = find(run)
    assert saved is not None
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored(saved).items()}
    fill(saved, found)
    return found
