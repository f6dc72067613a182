"""`bench/continuation.py`: what it says about places that are known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unspool.engine.load import load

BENCH = Path(__file__).parents[1] / "bench" / "continuation.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("continuation_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drifts(speeds: np.ndarray, frames: int) -> np.ndarray:
    """Places [clips, frames, 2] of what moves along x at a constant speed, in stage units a frame."""
    x = 0.2 + speeds[:, None] * np.arange(frames)
    return np.stack([x, np.full_like(x, 0.5)], axis=2)


def test_the_speed_that_is_kept(bench: Any) -> None:
    first, frames = 21, 33
    speeds = np.linspace(0.005, 0.02, 12)
    truth = drifts(speeds, frames)
    assert bench.speed_kept(truth, truth, first) == 1.0
    for kept in (0.0, 0.5, -0.25):
        seen = truth.copy()
        own = speeds.mean() + kept * (speeds - speeds.mean())
        seen[:, first:, 0] = truth[:, first - 1, None, 0] + own[:, None] * np.arange(1, frames - first + 1)
        # of the eight frames between the middles of what is compared, the first one is of the true past
        assert bench.speed_kept(truth, seen, first) == pytest.approx((1 + 7 * kept) / 8, abs=0.006)
    unseen = np.full_like(truth, np.nan)
    assert bench.speed_kept(truth, unseen, first) is None
    assert bench.speed_kept(truth[:, : first + 8], truth[:, : first + 8], first) is None  # not half a second
    assert bench.speed_kept(drifts(np.full(12, 0.01), frames), truth, first) is None  # nothing to tell apart


def test_a_past_is_continued_by_all_causal_stage_models(bench: Any) -> None:
    for name, past in (("stage", 6), ("ca2vdm-stage", 5)):
        pipe = load(name, dtype="float32")
        _, scenes = bench.scenes_of("rests", 1, 5)
        latents = torch.randn(1, past, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        made = bench.continued(pipe, latents, scenes, past, 1)
        assert made.shape[1] == past + pipe.spec.rollout.config().plan.chunk
        assert torch.equal(made[:, :past], latents) and torch.isfinite(made).all()
