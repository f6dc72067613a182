"""The whole sampler of Ca2-VDM: given frames, cached chunks, ancestral steps with learned variance, guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from stdit_tiny import masked, part, recorded, swap
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Absolute, Cyclic
from unspool.causal.prefix import PrefixEnhanced
from unspool.causal.visibility import Window
from unspool.diffusion.iddpm import IDDPM
from unspool.rollout.guidance import Guidance
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.rollout import Rollout
from unspool.rollout.settings import RolloutConfig
from unspool.rollout.solvers.ancestral import Ancestral
from unspool.rollout.solvers.base import SolverState

TOLERANCE = 1e-4  # stated, for tables in float64
FLOAT32_TABLES = 3e-3  # stated, for what was recorded with tables in float32
Golden = Callable[[str], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def stream_of(name: str, golden: Golden, facts: dict[str, Any], **changed: Any) -> tuple[Rollout, dict[str, Tensor]]:
    """A rollout of a recorded sampler; `changed` settings of it."""
    case, network = part(golden("ca2vdm_cases"), name), recorded(golden, facts["features"])
    process = IDDPM(predicts="x0")
    given = case["given"].shape[2]
    settings: dict[str, Any] = dict(
        plan=ChunkPlan(chunk=8, first=given, num_frames=case["final"].shape[2]),
        schedule=process.schedule(facts["steps"]),
        visibility=PrefixEnhanced(base=Window(window=33, within="causal"), frames=3),
        positions=Cyclic(length=33),
        process=process,
        solver=Ancestral(process=process),
        guidance=Guidance(scale=3.0) if "caption" in case else Guidance(),
    )
    # [chunks, ..., b, c, l, h, w] -> [..., b, frames, c, h, w]; the noise of the last step is not used
    first = torch.cat([swap(chunk) for chunk in case["init_noise"]], dim=1)
    later = torch.cat(list(case["step_noise"].transpose(-4, -3)), dim=-4)[:-1]
    text, negative = torch.ones(1, 1, 1), None
    if "caption" in case:
        text, negative = (masked(case[key], case["caption_mask"]) for key in ("caption", "null_caption"))
    stream = Rollout(
        network,
        RolloutConfig(**{**settings, **changed}),
        text,
        negative=negative,
        noise=RecordedNoise(first, later, first_frame=given),
        latent_size=(4, 6),
        prefix=swap(case["given"]),
        cache="streams",
    )
    return stream, case


@pytest.mark.parametrize("commit", ["separate", "fused"])
@pytest.mark.parametrize("name", ["sampler", "sampler_plain", "sampler_text_guided"])
def test_sampler(name: str, commit: str, golden: Golden, golden_json: Callable[[str], Any]) -> None:
    """Through eviction; a commit in one forward with the next chunk's first step gives the same."""
    facts = golden_json("ca2vdm_config")["cases"][name]
    stream, case = stream_of(name, golden, facts, commit=commit)
    assert [stream.config.process.timestep(s.sigma) for s in stream.config.schedule.steps] == [
        float(t) for t in reversed(facts["timestep_map"])
    ]
    got = swap(torch.cat([chunk.latents for chunk in stream], dim=1))
    want = case["final_exact"][:, :, case["given"].shape[2] :]
    assert want.std() > 0.5
    assert (got - want).abs().max() <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Recording(Ancestral):
    """Ancestral sampling that keeps the latents after each step."""

    kept: list[Tensor] = field(default_factory=list, compare=False)

    def step(self, x: Tensor, *args: Any, **how: Any) -> tuple[Tensor, SolverState]:
        after, state = super().step(x, *args, **how)
        self.kept.append(after)
        return after, state


@pytest.mark.parametrize("name", ["sampler", "sampler_plain"])
def test_latents_after_every_step(name: str, golden: Golden, golden_json: Callable[[str], Any]) -> None:
    """Recorded with tables in float32, which bounds the agreement."""
    solver = Recording(process=IDDPM(predicts="x0"))
    stream, case = stream_of(name, golden, golden_json("ca2vdm_config")["cases"][name], solver=solver)
    chunks, steps = case["traj"].shape[:2]
    assert len(list(stream)) == chunks and len(solver.kept) == chunks * steps
    got = torch.stack([swap(x) for x in solver.kept]).unflatten(0, (chunks, steps))
    assert got.shape == case["traj"].shape
    assert (got - case["traj"]).abs().max() <= FLOAT32_TABLES


def test_branches_of_guidance_keep_their_own_past(golden: Golden, golden_json: Callable[[str], Any]) -> None:
    """In one cache of twice the rows, or in two: keys differ from the second layer on, what comes out does not."""
    facts = golden_json("ca2vdm_config")["cases"]["sampler_text_guided"]
    stream, case = stream_of("sampler_text_guided", golden, facts, guidance=Guidance(scale=3.0, mode="two_caches"))
    got = swap(torch.cat([chunk.latents for chunk in stream], dim=1))
    assert (got - case["final_exact"][:, :, 1:]).abs().max() <= TOLERANCE
    pairs = zip(*(cache.caches["self"].entries.values() for cache in stream.branches.caches), strict=True)  # type: ignore[attr-defined]
    differ = [not torch.equal(a.keys, b.keys) for a, b in pairs]
    assert differ == [False, True, True]


@pytest.mark.parametrize("commit", ["separate", "fused"])
def test_a_noised_commit(commit: str, golden: Golden, golden_json: Callable[[str], Any]) -> None:
    """Given and finished latents are noised for their commit, are told to be clean, and are handed out clean."""
    facts = golden_json("ca2vdm_config")["cases"]["sampler_prefix_noise"]
    stream, case = stream_of("sampler_prefix_noise", golden, facts)
    nothing = torch.zeros_like(swap(case["given"]))
    commits = [swap(case["prefix_noise_given"]), *(swap(noise) for noise in case["prefix_noise_commit"])]
    initial = torch.cat([nothing, stream.noise.initial], 1)  # type: ignore[attr-defined]
    steps = [torch.cat([nothing, noise], 1) for noise in stream.noise.renoise]  # type: ignore[attr-defined]
    noise = RecordedNoise(initial, torch.stack([*steps, torch.cat(commits, 1)]))
    outs = []
    for level in (0.0, (facts["effective_timestep"] + 1) / 1000):
        config = replace(stream.config, commit_noise=level, commit=commit)
        noised = Rollout(
            stream.backbone, config, torch.ones(1, 1, 1), noise=noise, latent_size=(4, 6), prefix=swap(case["given"]),
            cache="streams",
        )  # fmt: skip
        outs.append(swap(torch.cat([chunk.latents for chunk in noised], dim=1)) - case["final_exact"][:, :, 1:])
    assert outs[1].abs().max() <= TOLERANCE and outs[0].abs().max() > 1e-2


def test_positions_that_do_not_turn_give_another_result(golden: Golden, golden_json: Callable[[str], Any]) -> None:
    """The test above would notice: until the ids wrap nothing differs, then all does."""
    facts = golden_json("ca2vdm_config")["cases"]["sampler_plain"]
    stream, case = stream_of("sampler_plain", golden, facts, positions=Absolute())
    got = swap(torch.cat([chunk.latents for chunk in stream], dim=1))
    worst = (got - case["final_exact"][:, :, 1:]).abs().amax((0, 1, 3, 4))
    assert worst[:32].max() <= TOLERANCE and worst[32:].min() > 1e-3
