"""Whole rollouts of published implementations, commit passes separate and fused: recorded noise, fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Absolute, WindowRelative
from unspool.causal.visibility import Full, Window
from unspool.diffusion.schedule import few_step, few_step_on_grid
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout, RolloutConfig

TOLERANCE = 2e-5  # max abs difference: latents have a std of about 1, the references ran in fp32
Golden = Callable[[str], Any]

ROLLOUTS = (
    "self_forcing_4step", "self_forcing_4step_chunk1_window4_sink1", "causvid_3step", "self_forcing_i2v_1_4_4",
    "self_forcing_t2v_1_4_4",
)  # fmt: skip
SWITCHES = (
    "rollout_no_switch", "relative_rollout_no_switch",
    "switch_sink_kept", "switch_sink_replaced", "relative_switch_sink_kept", "relative_switch_sink_replaced",
    "early_switch_sink_kept", "early_switch_sink_replaced",
    "compat_switch_full_recache_sink_kept", "compat_switch_full_recache_sink_replaced",
    "compat_relative_switch_full_recache_sink_kept", "compat_relative_switch_full_recache_sink_replaced",
    "compat_early_switch_full_recache_sink_kept", "compat_early_switch_full_recache_sink_replaced",
)  # fmt: skip


def joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under original names, with q, k, v (and the text's k, v) as one matrix."""
    result = {}
    for name, value in weights.items():
        if ".self_attn.q." in name:
            parts = [weights[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            result[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif ".cross_attn.k." in name:
            result[name.replace(".k.", ".kv.")] = torch.cat([value, weights[name.replace(".k.", ".v.")]])
        elif not any(part in name for part in (".self_attn.k.", ".self_attn.v.", ".cross_attn.v.")):
            result[name] = value
    return result


@lru_cache(maxsize=4)
def make_network(golden: Golden, source: str) -> WanTransformer:
    if source == "longlive":
        weights = {n[8:]: t for n, t in golden("longlive").items() if n.startswith("weights/")}
    else:
        weights = golden("wan_tiny_weights")
    dim = weights["blocks.0.norm3.weight"].shape[0]
    layers = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
    config = WanConfig(
        dim=dim, ffn_dim=weights["blocks.0.ffn.0.weight"].shape[0], num_layers=layers,
        num_heads=2, in_channels=4, out_channels=4, text_dim=24, text_len=12, freq_dim=32,
    )  # fmt: skip
    network = WanTransformer(config)
    network.load_state_dict(joined(weights))
    return network.requires_grad_(False)


def latents_of(stream: Rollout) -> Tensor:
    return torch.cat([chunk.latents for chunk in stream], 1)


def check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert want.std() >= 0.5
    assert (got - want).abs().max() <= TOLERANCE


# ---- Self-Forcing and CausVid -------------------------------------------------------------------------------------


def test_every_case_is_run(golden_json: Golden) -> None:
    """A case added to the files must be added here."""
    assert set(golden_json("rollout_cases")) == set(ROLLOUTS)


def test_every_switch_is_run(golden_json: Golden) -> None:
    cases = golden_json("longlive")["cases"]
    assert {name for name, case in cases.items() if "switch_frame_indices" in case} == set(SWITCHES)


def published(golden: Golden, golden_json: Golden, name: str, commit: Any, **changes: Any) -> tuple[Tensor, Tensor]:
    """Latents of the library and of the recorded run."""
    facts = golden_json("rollout_cases")[name]
    case = {n.split("/")[1]: t for n, t in golden("rollout_cases").items() if n.startswith(name + "/")}
    network = make_network(golden, "wan_tiny")
    steps, shift = facts["denoising_steps"], facts["shift"]
    schedule = few_step(steps, shift=shift) if facts["warp"] else few_step_on_grid(steps, shift=shift)
    prefix, want = case.get("initial_latents"), case["latents"]
    given = 0 if prefix is None else prefix.shape[1]
    window, sink = facts["window_frames"], facts["sink_frames"]
    first = 1 if facts["independent_first_frame"] else None
    settings: dict[str, Any] = {
        "plan": ChunkPlan(chunk=facts["chunk_frames"], first=first, num_frames=want.shape[1]),
        "schedule": schedule,
        "visibility": Full() if window < 0 else Window(window=window, sink=sink),
        "commit": commit,
    }
    stream = Rollout(
        network, RolloutConfig(**{**settings, **changes}), case["context"],
        noise=RecordedNoise(case["noise"], case["renoise"], first_frame=given),
        latent_size=(want.shape[3], want.shape[4]), prefix=prefix,
    )  # fmt: skip
    return latents_of(stream), want[:, given:]


@pytest.mark.parametrize("commit", ["separate", "fused"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_published_rollouts(golden: Golden, golden_json: Golden, name: str, commit: str) -> None:
    check(*published(golden, golden_json, name, commit))


def test_causvid_needs_both_levels(golden: Golden, golden_json: Golden) -> None:
    """The network is told 0.757 while the algebra uses the grid's 0.756757: one number for both is off."""
    steps = golden_json("rollout_cases")["causvid_3step"]["denoising_steps"]
    snapped = few_step_on_grid(steps, shift=8.0)
    assert snapped.conditioning is not None and snapped.conditioning != snapped.sigmas[:-1]
    for schedule in (few_step(steps, warp=False), type(snapped)(snapped.sigmas)):
        got, want = published(golden, golden_json, "causvid_3step", "separate", schedule=schedule)
        assert (got - want).abs().max() > 1e-4


def test_the_comparison_can_fail(golden: Golden, golden_json: Golden) -> None:
    """A window of one frame more or less does not pass."""
    for window in (3, 5):
        changed = Window(window=window, sink=1)
        name = "self_forcing_4step_chunk1_window4_sink1"
        got, want = published(golden, golden_json, name, "separate", visibility=changed)
        assert (got - want).abs().max() > 100 * TOLERANCE


# ---- LongLive: prompt switches ------------------------------------------------------------------------------------


def longlive(golden: Golden, facts: dict[str, Any], commit: Any, policy: Any) -> Tensor:
    tensors = golden("longlive")
    noise = RecordedNoise(tensors["rollout_inputs/noise"], tensors["rollout_inputs/renoise"])
    frames, size = noise.initial.shape[1], tuple(noise.initial.shape[3:])
    switches = [
        Switch(frame=f, text=tensors[f"prompts/p{i + 1}"], policy=policy, sink=facts["sink_after_switch"])
        for i, f in enumerate(facts["switch_frame_indices"])
    ]
    config = RolloutConfig(
        plan=ChunkPlan(chunk=facts["chunk"], num_frames=frames),
        schedule=few_step(facts["denoising_steps"], shift=facts["shift"]),
        visibility=Window(window=facts["window"], sink=facts["sink"]),
        positions=Absolute() if facts["positions"].startswith("absolute") else WindowRelative(),
        sigma_commit=facts["context_noise"] / 1000, commit=commit,
    )  # fmt: skip
    timeline = PromptTimeline(tensors["prompts/p0"], switches)
    network = make_network(golden, "longlive")
    return latents_of(Rollout(network, config, timeline, noise=noise, latent_size=size))  # type: ignore[arg-type]


def policy_of(facts: dict[str, Any]) -> str:
    return "recache_bidirectional" if facts["recache_attention"] == "full" else "recache"


@pytest.mark.parametrize("commit", ["separate", "fused"])
@pytest.mark.parametrize("name", SWITCHES)
def test_longlive_switches(golden: Golden, golden_json: Golden, name: str, commit: str) -> None:
    """Block-causal recaches, and the published bidirectional ones under their own policy."""
    facts = golden_json("longlive")["cases"][name]
    check(longlive(golden, facts, commit, policy_of(facts)), golden("longlive")[f"{name}/latents"])


def sibling(name: str) -> str:
    return name.removeprefix("compat_").replace("_full_recache", "")


@pytest.mark.parametrize("name", [n for n in SWITCHES if n.startswith("compat_")])
def test_compat_cases_are_not_the_default(golden: Golden, golden_json: Golden, name: str) -> None:
    """What is published differs from its block-causal sibling, and policy 'recache' must not reproduce it."""
    tensors, facts = golden("longlive"), golden_json("longlive")["cases"][name]
    want = tensors[f"{name}/latents"]
    assert sibling(name) in SWITCHES
    apart = (want - tensors[f"{sibling(name)}/latents"]).abs().max()
    assert apart > 10 * TOLERANCE  # a switch moves these latents by 0.1, its form by 0.001 at least
    assert (longlive(golden, facts, "separate", "recache") - want).abs().max() > 10 * TOLERANCE
