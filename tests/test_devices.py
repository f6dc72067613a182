"""The same test bodies on the CPU and, with `make test-gpu`, on a CUDA device: training steps, caches, generation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
sys.path.insert(0, str(Path(__file__).parent / "models"))
sys.path.insert(0, str(Path(__file__).parent / "engine"))
sys.path.insert(0, str(Path(__file__).parent / "evaluate"))
import perfect_model
import toy_methods
from stdit_tiny import randomised, sees
from test_stage_evaluation import CHANGES
from test_stdit_cache import FORMS, SMALL, Clip, worst

import unspool
from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Cyclic
from unspool.cli.main import main
from unspool.methods.draws import SampleRng
from unspool.models.stdit.config import STDiTConfig
from unspool.shapes import to_device

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Without tf32, whose products have ten bits."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield torch.device(request.param)
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


def losses(name: str, device: torch.device | str) -> dict[str, tuple[float, float]]:
    """Loss and norm of the gradient of one step of each role, all drawn as on the CPU."""
    torch.manual_seed(0)
    method = toy_methods.CASES[name]()
    for network in toy_methods.networks_of(method):
        network.to(device)
    batch, found = toy_methods.batch(name, device), {}
    for role, network in method.networks.items():
        result = method.step(batch, role, 0, SampleRng(0, (1, 2), 3))
        assert result.loss.device.type == torch.device(device).type
        result.loss.backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert gradients and all(g.device.type == torch.device(device).type for g in gradients)
        found[role] = (result.loss.item(), torch.nn.utils.get_total_norm(gradients).item())
    return found


@pytest.mark.parametrize("name", toy_methods.CASES)
def test_a_training_step_is_that_of_the_cpu(name: str, device: torch.device) -> None:
    found = losses(name, device)
    assert np.isfinite(list(found.values())).all()
    if device.type != "cpu":
        expected = losses(name, "cpu")
        assert found.keys() == expected.keys()
        for role in found:
            assert found[role] == pytest.approx(expected[role], rel=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("form", ["joint", "text"])
def test_ca2vdms_cache_equals_its_mask(form: str, device: torch.device) -> None:
    """Past eviction and around the circle of positions, keys of both attentions in a cache of streams."""
    network = randomised(STDiTConfig(**SMALL, **FORMS[form])).to(device)
    clip = Clip(network, ChunkPlan(chunk=3, first=1), 6, 2, text=form == "text")
    visibility, positions = sees(chunk=3, pmax=7, prefix=2), Cyclic(length=10)
    assert worst(torch.cat(clip.cached(visibility, positions), 1), clip.masked(visibility, positions)) <= 1e-9


def test_the_shipped_model_generates(device: torch.device) -> None:
    model = unspool.load("stage", device=device)
    assert model.device.type == device.type
    video = model.generate("a red ball bounces", chunks=2, seed=3)
    assert video.frames.shape[1:] == (64, 64, 3) and video.frames.std() > 5
    again = model.generate("a red ball bounces", chunks=2, seed=3).frames.astype(int)
    assert np.abs(again - video.frames).max() <= (0 if device.type == "cpu" else 2)


def test_an_evaluation_runs(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.log.setup_console", lambda: None)
    perfect_model.save(tmp_path / "model", perfect_model.SMALL)
    arguments = ["--model", str(tmp_path / "model"), "--preset", "smoke", "--out", str(tmp_path / "out"), "--quiet",
                 "--parts", "clips", "--device", str(device)]  # fmt: skip
    assert main(["evaluate", "stage", *CHANGES, *arguments]) == 0
    assert (tmp_path / "out" / "results.json").stat().st_size > 0


def test_expanded_tensors_reach_the_device(device: torch.device) -> None:
    moved = to_device(torch.arange(3.0)[:, None].expand(3, 2), device)
    assert moved.device.type == device.type and moved.cpu().tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
