"""Ways of extending a video: recomputed pasts against the cache, one cache per step against one forward per level."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.mask import clean_prefix_mask
from unspool.causal.position import Absolute, Cyclic
from unspool.causal.visibility import Full
from unspool.diffusion.iddpm import IDDPM
from unspool.evaluate.ca2vdm import ExtensionConfig, HeldBytes, Way, held_bytes, kv_bytes, ways
from unspool.models.base import Conditioning
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.rollout.guidance import Guidance
from unspool.rollout.noise import CounterNoise
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout
from unspool.rollout.settings import Cancelled

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from stdit_tiny import randomised

SMALL: dict[str, Any] = dict(dim=24, num_layers=3, num_heads=2, freq_dim=32)
SIZE, BOUND = (2, 4), 1e-9
X0 = IDDPM(predicts="x0")  # a random network that predicts noise has no bounded output
SHARED = ExtensionConfig(chunk=3, pmax=7, num_chunks=8, steps=3, process=X0)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Counted:
    """A network that notes the inputs of every forward."""

    def __init__(self, network: STDiT) -> None:
        self.network = network
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        out = self.network(x, sigma, cond, context)
        self.calls.append((x, sigma.expand(1, x.shape[1]), out))
        return out


def made(
    way: Way, *, form: dict[str, Any] | None = None, guided: bool = False, **options: Any
) -> tuple[Rollout, Counted]:
    network = Counted(randomised(STDiTConfig(**SMALL, **(form or {}))))
    draw = torch.Generator().manual_seed(4)
    text = torch.randn(2, 4, network.config.caption_dim or 1, generator=draw)
    given = torch.randn(2, way.given, 4, *SIZE, generator=draw)
    config = replace(way.config, guidance=Guidance(scale=2.0)) if guided else way.config
    stream = Rollout(
        network, config, options.pop("timeline", text), noise=CounterNoise(seed=3, sample_ids=(0, 1)), latent_size=SIZE,
        prefix=given, cache=way.cache, negative=text.flip(0) if guided else None, **options,
    )  # fmt: skip
    return stream, network


def latents(stream: Rollout) -> Tensor:
    return torch.cat([chunk.latents for chunk in stream], 1)


def worst(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and want.std() > 0.1
    return float((got - want).abs().max() / want.std())


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "joint": dict(prefix_attention="joint", mask_channel=True),
    "separate": dict(prefix_attention="separate", mask_channel=True, caption_dim=6, caption_len=4),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache", ["recompute", "streams"])
def test_recomputed_equals_cached_until_a_frame_is_evicted(form: str, cache: str) -> None:
    """Causal in time, the past in every forward: to 1e-9 while the window holds all, and not afterwards."""
    prefix = None if form == "plain" else 2
    guided = form == "separate"
    way = ways(replace(SHARED, prefix_frames=prefix, pmax=10))["ca2vdm"]
    cached, _ = made(way, form=FORMS[form], guided=guided)
    again, _ = made(
        replace(way, config=replace(way.config, commit="recompute"), cache=cache), form=FORMS[form], guided=guided
    )
    want, got = latents(cached), latents(again)
    assert worst(got[:, :12], want[:, :12]) <= BOUND  # chunks 1..4: 1 + 12 frames in a window of 13
    assert (got[:, 12:] - want[:, 12:]).abs().max() > 1e-3


def test_the_growing_past_of_vid_gpt_equals_its_cache_for_good() -> None:
    way = ways(replace(SHARED, prefix_frames=2))["ca2vdm"]
    config = replace(way.config, visibility=replace(way.config.visibility, base=Full(within="causal")),
                     positions=Absolute(), commit_noise=0.05)  # fmt: skip
    cached, _ = made(replace(way, config=config), form=FORMS["joint"])
    again, _ = made(replace(way, config=replace(config, commit="recompute"), cache="recompute"), form=FORMS["joint"])
    assert worst(latents(again), latents(cached)) <= BOUND
    assert again.num_bytes == 0 < cached.num_bytes


@pytest.mark.parametrize("name", ["os_fix", "os_ext"])
def test_a_recomputed_forward_is_the_whole_bidirectional_clip(name: str) -> None:
    """What the last forward computed, written out: the last clean frames and the chunk, all of each other, at 0.."""
    way = ways(SHARED)[name]
    stream, network = made(way)
    whole = torch.cat([stream.history.take(range(way.given)), latents(stream)], 1)
    x, sigma, out = network.calls[-1]
    past = {"os_fix": 3, "os_ext": 7}[name]
    assert x.shape[1] == past + 3 and torch.equal(x[:, :past], whole[:, -past - 3 : -3])
    assert sigma[0, :past].abs().max() == 0 and sigma[0, past:].min() > 0
    cond = Conditioning(prompts=network.prepare(torch.ones(2, 1, 1)))
    assert worst(out, network.network(x, sigma, cond, FullSequence(past + 3))) <= BOUND


def test_forwards_and_frames() -> None:
    """80 frames, l = 8, Pmax = 25: 80, 160 and 282 latent frames per denoising step (arXiv:2411.16375 section 3.4)."""
    steps, frames, forwards = 2, {}, {}
    for name, way in ways(ExtensionConfig(steps=steps, process=X0)).items():
        stream, network = made(way)
        network.calls.clear()  # what is given enters before
        latents(stream)
        denoised = [x.shape[1] for x, sigma, _ in network.calls if sigma.max() > 0]
        frames[name], forwards[name] = sum(denoised) // steps, len(network.calls)
    assert frames == {"ca2vdm": 80, "os_fix": 160, "os_ext": 282, "step_caches": 80}
    assert forwards == {"ca2vdm": 10 * steps + 9, "os_fix": 20, "os_ext": 20, "step_caches": 20}


def test_an_unbounded_past_grows_by_a_chunk_each_time() -> None:
    stream, network = made(ways(replace(SHARED, unbounded=True))["os_ext"])
    latents(stream)
    assert [x.shape[1] for x, _, _ in network.calls[::3]] == [4 + 3 * i for i in range(8)]


@pytest.mark.parametrize("form", ["plain", "joint", "separate"])
def test_each_step_reads_what_was_computed_at_that_step(form: str) -> None:
    """One forward over all chunks as they were at a level, the given frame clean, gives every chunk's prediction there:
    through eviction and wrap, to 1e-9."""
    way = ways(replace(SHARED, prefix_frames=None if form == "plain" else 2))["step_caches"]
    stream, network = made(way, form=FORMS[form])
    given = network.calls[0][0]
    network.calls.clear()
    latents(stream)
    plan, total = way.config.plan, 25
    mask = clean_prefix_mask(plan, total, 1, way.config.visibility, way.config.positions)
    draw = torch.Generator().manual_seed(4)
    text = torch.randn(2, 4, network.config.caption_dim or 1, generator=draw)
    cond = Conditioning(prompts=network.prepare(text))
    for step in range(3):
        calls = network.calls[step::3]
        assert len(calls) == 8 and len({float(sigma[0, 0]) for _, sigma, _ in calls}) == 1
        x = torch.cat([given, *(x for x, _, _ in calls)], 1)
        sigma = torch.cat([torch.zeros(1, 1), *(sigma for _, sigma, _ in calls)], 1)
        want = network.network(x, sigma, cond, FullSequence(total, mask))[:, 1:]
        assert worst(torch.cat([out for _, _, out in calls], 1), want) <= BOUND


def test_one_cache_per_step_is_as_many_times_the_bytes() -> None:
    sizes = {}
    for name in ("ca2vdm", "step_caches"):
        stream, _ = made(ways(SHARED)[name])
        latents(stream)
        sizes[name] = stream.num_bytes
    assert sizes["step_caches"] == 3 * sizes["ca2vdm"]


GIB = 2.0**30


def held(name: str, prefix_frames: int | None) -> HeldBytes:
    network = STDiTConfig.xl(prefix_attention="none" if prefix_frames is None else "separate")
    return held_bytes(ways(ExtensionConfig(steps=50, prefix_frames=prefix_frames))[name], network, tokens=256)


@pytest.mark.parametrize(("prefix_frames", "bytes_held"), [(None, 825_753_600), (3, 924_844_032)])
def test_bytes_of_the_paper(prefix_frames: int | None, bytes_held: int) -> None:
    """0.77 and 0.86 GiB of arXiv:2411.16375 table 6, in caches that ran six chunks, beside the closed form; 252 MiB of
    staging for each stream of attentions besides."""
    found = held("ca2vdm", prefix_frames)
    assert found.readable == bytes_held == kv_bytes(layers=28, dim=1152, tokens=256, frames=25 + (prefix_frames or 0))
    assert found.staging == (264_241_152 if prefix_frames is None else 528_482_304)


def test_bytes_of_one_cache_per_step() -> None:
    """38.5 GiB at 50 steps, and 12.3 GiB of staging."""
    found = held("step_caches", None)
    assert found.readable == 50 * 825_753_600 and round(found.readable / GIB, 1) == 38.5
    assert round(found.staging / GIB, 1) == 12.3
    assert held("os_ext", 3) == HeldBytes(readable=0, staging=0)


@pytest.mark.parametrize("name", ["os_ext", "step_caches"])
def test_streams_stop_and_go_on(name: str) -> None:
    """A cancelled chunk is made again, and a stream goes on from a snapshot: bit for bit."""
    way = ways(SHARED)[name]
    want = latents(made(way)[0])
    calls: list[int] = []
    stream, _ = made(way, cancel=lambda: calls.append(0) or len(calls) == 9)  # type: ignore[func-returns-value]
    early = []
    while len(early) < 4:
        try:
            early.append(stream.next_chunk().latents)
        except Cancelled:
            calls.append(0)
    other, _ = made(way)
    other.restore(stream.snapshot())
    assert len(calls) > 9 and torch.equal(torch.cat([*early, latents(other)], 1), want)


@pytest.mark.parametrize("policy", ["recache", "flush"])
def test_a_switch_of_the_prompt_without_a_cache(policy: Any) -> None:
    """The past is computed anew under the new prompt in any case; a flush forgets it."""
    way = ways(replace(SHARED, prefix_frames=2))["os_ext"]
    draw = torch.Generator().manual_seed(4)
    first, second = torch.randn(2, 2, 4, 6, generator=draw)
    timeline = PromptTimeline(first, [Switch(frame=10, text=second, policy=policy)])
    stream, network = made(way, form=FORMS["separate"], timeline=timeline)
    latents(stream)
    lengths = [x.shape[1] for x, _, _ in network.calls[::3]]
    assert lengths == ([4, 7, 10, 4, 7, 10, 10, 10] if policy == "flush" else [4, 7, 10, 10, 10, 10, 10, 10])


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    config = ways(SHARED)["ca2vdm"].config
    for cache, commit, match in (
        ("recompute", "separate", "commit='recompute'"), ("steps", "separate", "commit='none'"),
        ("steps", "recompute", "commit='none'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            made(Way(config=replace(config, commit=commit), cache=cache, given=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 10"):
        replace(config, positions=Cyclic(length=9))
    with pytest.raises(ValueError, match="past of at least a chunk"):
        ExtensionConfig(pmax=7)
    other = replace(ways(SHARED)["step_caches"].config, first_schedule=X0.schedule(2),
                    plan=ChunkPlan(chunk=3, num_frames=9))  # fmt: skip
    stream = Rollout(
        randomised(STDiTConfig(**SMALL)), other, torch.ones(1, 1, 1), noise=CounterNoise(seed=0), latent_size=SIZE,
        cache="steps",
    )  # fmt: skip
    with pytest.raises(ValueError, match="the same schedule for every chunk"):
        latents(stream)
