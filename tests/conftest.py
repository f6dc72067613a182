"""Shared fixtures: golden tensors of published implementations, seeding, one thread per test process."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from safetensors.torch import load_file

SHAPE_CHECKED = ["unspool.diffusion", "unspool.rollout.solvers", "unspool.rollout.guidance", "unspool.rollout.noise"]
"""Modules whose jaxtyping annotations are checked at every call in tests. Code that torch.compile traces with
fullgraph=True cannot be among them: the checks break the trace."""

CARRIED = Path(__file__).parent / "golden"
"""The golden files that the repository carries; the others are found through UNSPOOL_GOLDEN."""


def pytest_configure(config: pytest.Config) -> None:
    if not os.environ.get("UNSPOOL_NO_SHAPE_CHECK"):
        install_import_hook(SHAPE_CHECKED, "beartype.beartype")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same state of the global generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def golden_path(file_name: str) -> Path:
    """A golden file from UNSPOOL_GOLDEN or from tests/golden; the test is skipped, visibly, where neither has it."""
    folders = [Path(os.environ["UNSPOOL_GOLDEN"])] if os.environ.get("UNSPOOL_GOLDEN") else []
    for folder in [*folders, CARRIED]:
        if (folder / file_name).is_file():
            return folder / file_name
    reason = "is not in the folder named by it" if folders else "is not set"
    pytest.skip(f"golden file {file_name}: UNSPOOL_GOLDEN {reason}, and tests/golden does not carry it")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """`golden("wan_tiny_cases")` -> flat dict of the tensors in `wan_tiny_cases.safetensors`, read anew each time."""
    return lambda name: load_file(golden_path(f"{name}.safetensors"))


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """`golden_json("rollout_cases")` -> the content of `rollout_cases.json`."""
    return lambda name: json.loads(golden_path(f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def clips_folder() -> Path:
    """The folder of real video clips named by UNSPOOL_CLIPS; skipped, visibly, where it is not set."""
    folder = os.environ.get("UNSPOOL_CLIPS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real clips: UNSPOOL_CLIPS is not set to a folder")
    return Path(folder)
