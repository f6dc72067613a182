"""Caches belong to one stream of one batch: another batch or a second video is refused by name, or begins anew."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.causal.cache import CACHES
from unspool.causal.chunks import ChunkPlan, FrameSet
from unspool.causal.position import Cyclic
from unspool.causal.visibility import Kind, Segment
from unspool.config import locate
from unspool.models.base import Conditioning
from unspool.models.stdit.config import STDiTConfig
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from stdit_tiny import randomised, sees

NETWORK = randomised(STDiTConfig(dim=24, num_layers=2, num_heads=2, freq_dim=16, prefix_attention="separate"))
PLAN, SIZE = ChunkPlan(chunk=3, first=1), (2, 4)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(name: str, batch: int = 2) -> Any:
    return locate(name, CACHES)(
        NETWORK.sites, batch=batch, tokens_per_frame=2, visibility=sees(chunk=3, pmax=7, prefix=2),
        positions=Cyclic(length=10), dtype=torch.float64,
    )  # fmt: skip


def video(cache: Any, seed: int, chunks: int, batch: int = 2) -> list[Tensor]:
    """Predictions of a stream whose every chunk is denoised at one level and then kept."""
    draw = torch.Generator().manual_seed(seed)
    cond, outs = Conditioning(prompts=NETWORK.prepare(torch.ones(batch, 1, 1))), []
    for index in range(chunks):
        frames = PLAN.frames(index)
        x = torch.randn(batch, len(frames), 4, *SIZE, generator=draw, dtype=torch.float64)
        kinds = [(Kind.PREFILL, 0.0)] if index == 0 else [(Kind.DENOISE, 0.5), (Kind.COMMIT, 0.0)]
        for kind, level in kinds if not hasattr(cache, "levels") else kinds[:1]:
            context = cache.begin((Segment(kind=kind, frames=frames, sigma=level),))
            out = NETWORK(x, torch.full((1, len(frames)), level, dtype=torch.float64), cond, context)
            outs += [out] if kind is Kind.DENOISE else []
        cache.promote()
    return outs


@pytest.mark.parametrize("chunks", [3, 7])
@pytest.mark.parametrize("name", ["streams", "steps"])
def test_a_second_video_in_the_same_cache(name: str, chunks: int) -> None:
    """Refused while the first one is held, before anything was evicted and after; as in a new cache once dropped."""
    cache = made(name)
    video(cache, 1, chunks)
    with pytest.raises(ValueError, match=r"another stream begins|after the first chunk"):
        video(cache, 2, 3)
    cache.drop(FrameSet.of((0, 100)))
    assert all(map(torch.equal, video(cache, 2, chunks), video(made(name), 2, chunks)))


@pytest.mark.parametrize("name", ["streams", "steps"])
def test_a_smaller_last_batch(name: str) -> None:
    """Another batch than the cache was made for is refused by its numbers, and so is a larger one."""
    for batch in (1, 3):
        with pytest.raises(ValueError, match=r"another batch"):
            video(made(name), 1, 2, batch=batch)
    assert len(video(made(name, 1), 1, 3, batch=1)) == 2


def test_a_smaller_batch_after_a_larger_one_on_the_same_network() -> None:
    """What a network remembers of sizes and positions serves any batch: bit for bit as on a new network."""
    from unspool.evaluate.ca2vdm import ExtensionConfig, ways

    way = ways(ExtensionConfig(chunk=3, pmax=7, num_chunks=4, steps=2, prefix_frames=2))["ca2vdm"]

    def latents(network: Any, samples: tuple[int, ...]) -> Tensor:
        given = torch.ones(len(samples), 1, 4, *SIZE)
        stream = Rollout(
            network, way.config, torch.ones(len(samples), 1, 1), noise=CounterNoise(seed=0, sample_ids=samples),
            latent_size=SIZE, prefix=given, cache=way.cache,
        )  # fmt: skip
        return torch.cat([chunk.latents for chunk in stream], 1)

    latents(NETWORK, (0, 1))
    new = randomised(NETWORK.config)
    assert torch.equal(latents(NETWORK, (1,)), latents(new, (1,)))
