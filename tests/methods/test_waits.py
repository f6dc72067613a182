"""No step of any method waits for its device in the middle, seen on an emulated one (`emulated_device.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unspool.shapes import to_device

QUICK = ("teacher_forcing", "ode", "consistency", "long_rollouts", "ca2vdm")
SLOW = ("causvid", "self_forcing", "through_kv", "sid", "gan")


@pytest.mark.parametrize("cases", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_a_training_step_does_not_wait(cases: tuple[str, ...]) -> None:
    """In a process of its own: the emulation replaces methods of torch.Tensor."""
    backends = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot emulate a device from Python")
    script = Path(__file__).with_name("emulated_device.py")
    done = subprocess.run([sys.executable, str(script), *cases], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {case: [] for case in cases}


def test_memory_is_pinned_once_for_each_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an expanded tensor share memory, which pin_memory() refuses to write."""
    pinned, real = [], torch.Tensor.to

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **_: real(x, "cpu"))
    to_device(torch.arange(3.0)[:, None].expand(3, 2), torch.device("cuda"))
    assert pinned[0].is_contiguous() and pinned[0].shape == (3, 2)
