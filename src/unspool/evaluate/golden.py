"""Comparisons with recorded inputs and outputs of the published reference implementations (absolute differences)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.mask import causal_mask, teacher_forcing_mask
from unspool.causal.position import Absolute, WindowRelative
from unspool.causal.visibility import Full, Kind, Segment, Visibility, Window
from unspool.diffusion.schedule import few_step, few_step_on_grid
from unspool.evaluate.exactness import Row
from unspool.models.base import Conditioning
from unspool.models.wan.config import WanConfig
from unspool.models.wan.keys import KeyFormat, to_own
from unspool.models.wan.network import WanTransformer
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.prompts import PromptTimeline, Switch, SwitchPolicy
from unspool.rollout.rollout import Rollout, RolloutConfig

TOLERANCE = 1e-4  # given with the tensors; outputs have a standard deviation of about 1.6
TIGHT = 2e-5  # of the later systems


@dataclass(frozen=True)
class Golden:
    """One file of recorded tensors and what describes them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def case(self, name: str) -> dict[str, Tensor]:
        return {k.removeprefix(name + "/"): t for k, t in self.tensors.items() if k.startswith(name + "/")}


def load(folder: Path, name: str, facts: str | None = None) -> Golden | None:
    """Tensors and json of one topic; None where the file is not there."""
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    if not path.exists():
        return None
    described = folder / f"{facts or name}.json"
    return Golden(load_file(path), json.loads(described.read_text()) if described.exists() else {})


RECORDED = (
    *("wan_tiny_cases.safetensors", "wan_tiny_weights.safetensors", "rollout_cases.safetensors"),
    *("diffusers_wan.safetensors", "longlive.safetensors", "ca2vdm_cases.safetensors", "ca2vdm_weights.safetensors"),
)
"""The files that the rows of published networks are made of."""


def missing(folder: Path) -> list[str]:
    """Which of the recorded files `folder` lacks: their rows are left out."""
    return [name for name in RECORDED if not (folder / name).is_file()]


def wan_from(weights: dict[str, Tensor], config: WanConfig, source: KeyFormat = "original") -> WanTransformer:
    """A network with given weights under published names."""
    net = WanTransformer(config)
    net.load_state_dict(to_own(weights, source))
    return net.eval().requires_grad_(False)


def rows(folder: Path) -> Iterator[Row]:
    """Every published case for which the folder has tensors."""
    with torch.no_grad():
        yield from _wan_tiny(folder)
        yield from _rollouts(folder)
        yield from _diffusers(folder)
        yield from _longlive(folder)


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(-4, -3)


def _largest(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())


MASKED: dict[str, tuple[ChunkPlan, Visibility] | None] = {
    "bidirectional": None,
    "block_causal_3": (ChunkPlan(chunk=3), Full()),
    "block_causal_1": (ChunkPlan(chunk=1), Full()),
    "block_causal_3_window_6": (ChunkPlan(chunk=3), Window(window=6)),
    "block_causal_1_4_4": (ChunkPlan(chunk=4, first=1), Full()),
}
LOOPS: dict[str, tuple[int, Visibility]] = {
    "kv_rollout_chunk3": (3, Full()),
    "kv_rollout_chunk1": (1, Full()),
    "kv_rollout_chunk3_window6": (3, Window(window=6)),
    "kv_rollout_chunk3_window9_sink3": (3, Window(window=9, sink=3)),
    "kv_rollout_chunk1_window4_sink1": (1, Window(window=4, sink=1)),
}


def _wan_tiny(folder: Path) -> Iterator[Row]:
    cases, weights = load(folder, "wan_tiny_cases", "wan_tiny_config"), load(folder, "wan_tiny_weights")
    if cases is None or weights is None:
        return
    net = wan_from(weights.tensors, WanConfig.from_original(cases.facts))
    for name, how in MASKED.items():
        d = cases.case(name)
        mask = None if how is None else causal_mask(how[0], 9, how[1], Absolute())
        sigma = d["timestep"].double() / 1000
        sigma = sigma[:, None] if sigma.ndim == 1 else sigma
        cond = Conditioning(prompts=net.prepare(d["context"]))
        got = net(_time_first(d["latents"]), sigma, cond, FullSequence(9, mask))
        yield Row(f"wan_tiny {name}", "fp32", _largest(_time_first(got), d["flow"]), TOLERANCE)
    for name in ("teacher_forcing_3", "teacher_forcing_3_context_noise"):
        d = cases.case(name)
        x = torch.cat([_time_first(d["clean_latents"]), _time_first(d["latents"])], 1)
        clean = d.get("context_timestep", torch.zeros_like(d["timestep"]))
        sigma = torch.cat([clean, d["timestep"]], 1).double() / 1000
        mask = teacher_forcing_mask(ChunkPlan(chunk=3), 9, Full(), Absolute())
        got = net(x, sigma, Conditioning(prompts=net.prepare(d["context"])), FullSequence(18, mask))[:, 9:]
        yield Row(f"wan_tiny {name}", "fp32", _largest(_time_first(got), d["flow"]), TOLERANCE)
    for name, (chunk, visibility) in LOOPS.items():
        value = loop(net, cases.case(name), chunk, visibility, Absolute(), (937.5, 625.0))
        yield Row(f"wan_tiny {name}", "fp32", value, TOLERANCE)


def loop(
    net: WanTransformer,
    d: dict[str, Tensor],
    chunk: int,
    visibility: Visibility,
    positions: Absolute | WindowRelative,
    timesteps: tuple[float, float],
) -> float:
    """Largest difference of a recorded cached loop: two denoising passes and a commit per chunk."""
    rows, columns = d["clean"].shape[-2:]
    tokens = net.tokens_per_frame(rows, columns)
    cache = KVCache(
        net.sites, batch=d["clean"].shape[1], tokens_per_frame=tokens, visibility=visibility, positions=positions
    )
    cond = Conditioning(prompts=net.prepare(d["context"]))
    worst = 0.0
    for i, clean in enumerate(d["clean"]):
        frames = range(i * chunk, (i + 1) * chunk)
        for j, timestep in enumerate(timesteps):
            context = cache.begin((Segment(kind=Kind.DENOISE, frames=frames),))
            sigma = torch.tensor([[timestep / 1000]], dtype=torch.float64)
            got = net(_time_first(d["noisy"][i, j]), sigma, cond, context)
            worst = max(worst, _largest(_time_first(got), d["flow_noisy"][i, j]))
        context = cache.begin((Segment(kind=Kind.COMMIT, frames=frames),))
        got = net(_time_first(clean), torch.zeros(1, 1), cond, context)
        cache.promote()
        worst = max(worst, _largest(_time_first(got), d["flow_clean"][i]))
    return worst


def _rollouts(folder: Path) -> Iterator[Row]:
    recorded, weights = load(folder, "rollout_cases"), load(folder, "wan_tiny_weights", "wan_tiny_config")
    if recorded is None or weights is None:
        return
    net = wan_from(weights.tensors, WanConfig.from_original(weights.facts))
    for name, facts in recorded.facts.items():
        d = recorded.case(name)
        make = few_step if facts["warp"] else few_step_on_grid
        first = 1 if facts["independent_first_frame"] else None
        prefix = d.get("initial_latents")
        given = 0 if prefix is None else prefix.shape[1]
        window, sink = facts["window_frames"], facts["sink_frames"]
        config = RolloutConfig(
            plan=ChunkPlan(chunk=facts["chunk_frames"], first=first, num_frames=d["latents"].shape[1]),
            schedule=make(facts["denoising_steps"], shift=facts["shift"]),
            visibility=Full() if window < 0 else Window(window=window, sink=sink),
        )
        noise = RecordedNoise(d["noise"], d["renoise"], first_frame=given)
        size = (d["noise"].shape[-2], d["noise"].shape[-1])
        stream = Rollout(net, config, d["context"], noise=noise, latent_size=size, prefix=prefix)
        got = torch.cat([c.latents for c in stream], dim=1)
        yield Row(f"rollout {name}", "fp32", _largest(got, d["latents"][:, given:]), TOLERANCE)


def _diffusers(folder: Path) -> Iterator[Row]:
    recorded = load(folder, "diffusers_wan")
    if recorded is None:
        return
    original = WanConfig.from_original(recorded.facts["config_original"])
    # diffusers' configuration does not know the number of text rows, all of which are attended.
    translated = replace(WanConfig.from_diffusers(recorded.facts["config_diffusers"]), text_len=original.text_len)
    sources: tuple[tuple[KeyFormat, WanConfig], ...] = (("original", original), ("diffusers", translated))
    for source, config in sources:
        net = wan_from(recorded.case(f"weights_{source}"), config, source)
        for name in recorded.facts["cases"]:
            d = recorded.case(name)
            sigma = d["timestep"].double() / 1000
            sigma = sigma[:, None] if sigma.ndim == 1 else sigma
            cond = Conditioning(prompts=net.prepare(d["context"]))
            got = _time_first(net(_time_first(d["latents"]), sigma, cond, FullSequence(5)))
            yield Row(f"diffusers_wan {name}, {source} names", "fp32", _largest(got, d["flow_original"]), TIGHT)


def _longlive(folder: Path) -> Iterator[Row]:
    recorded = load(folder, "longlive")
    if recorded is None:
        return
    net = wan_from(recorded.case("weights"), WanConfig.from_original(recorded.facts["config"]))
    tensors = recorded.tensors
    for name, facts in recorded.facts["cases"].items():
        visibility = Window(window=facts["window"], sink=facts["sink"])
        if "passes_per_chunk" in facts:
            if name.endswith("_stale"):
                continue  # a defect of the reference that must not be reproduced
            relative = name.startswith("relative")
            d = {**recorded.case("loop_inputs"), **recorded.case(name), "context": tensors["prompts/p0"]}
            positions = WindowRelative() if relative else Absolute()
            yield Row(f"longlive {name}", "fp32", loop(net, d, 3, visibility, positions, (937.5, 500.0)), TIGHT)
            continue
        policy: SwitchPolicy = "recache" if facts["recache_attention"] == "blockwise" else "recache_bidirectional"
        switches = [
            Switch(frame=frame, text=tensors[f"prompts/p{i + 1}"], policy=policy, sink=facts["sink_after_switch"])
            for i, frame in enumerate(facts["switch_frame_indices"])
        ]
        config = RolloutConfig(
            plan=ChunkPlan(chunk=facts["chunk"], num_frames=24),
            schedule=few_step(facts["denoising_steps"], shift=facts["shift"]),
            visibility=visibility,
            positions=Absolute() if facts["positions"].startswith("absolute") else WindowRelative(),
        )
        noise = RecordedNoise(tensors["rollout_inputs/noise"], tensors["rollout_inputs/renoise"])
        timeline = PromptTimeline(tensors["prompts/p0"], switches)
        stream = Rollout(net, config, timeline, noise=noise, latent_size=(4, 6))
        got = torch.cat([c.latents for c in stream], dim=1)
        yield Row(f"longlive {name}", "fp32", _largest(got, tensors[f"{name}/latents"]), TIGHT)
