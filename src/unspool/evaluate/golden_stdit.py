"""Comparisons with recorded tensors of the published Ca2-VDM: networks, cached loops, whole samplers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unspool.causal.cache.streams import StreamCaches
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.mask import clean_prefix_mask
from unspool.causal.position import Cyclic
from unspool.causal.prefix import PrefixEnhanced
from unspool.causal.visibility import Kind, Segment, Window
from unspool.diffusion.iddpm import IDDPM
from unspool.evaluate.exactness import Row
from unspool.evaluate.golden import Golden, load
from unspool.models.base import Conditioning
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.rollout.guidance import Guidance
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.rollout import Rollout, RolloutConfig
from unspool.rollout.solvers.ancestral import Ancestral

DEEP, SAMPLED = 5e-5, 1e-4  # given with the tensors, for networks and for samplers with float64 tables
CHUNK, WINDOW, LENGTH, PREFIX, SIZE = 8, 33, 33, 3, (4, 6)
ROTATED = {"net_full_length_rotated_ids": 5}  # first position of a clip as long as the circle
GUIDANCE = 3.0


def rows(folder: Path) -> Iterator[Row]:
    """Every recorded network, loop and sampler for which the folder has tensors."""
    cases, weights = load(folder, "ca2vdm_cases", "ca2vdm_config"), load(folder, "ca2vdm_weights")
    if cases is None or weights is None:
        return
    for name, facts in cases.facts["cases"].items():
        kind = name.split("_")[0]
        if kind not in ("net", "rollout", "sampler"):
            continue
        network, case = _network(weights, facts["features"]), cases.case(name)
        if kind == "net":
            value, bound = _forward(network, case, facts, ROTATED.get(name, 0)), DEEP
        elif kind == "rollout":
            value, bound = _loop(network, case, facts), DEEP
        else:
            value, bound = _sampler(network, case, facts), SAMPLED
        yield Row(f"ca2vdm {name}", "fp32", value, bound)


def _network(weights: Golden, features: dict[str, Any]) -> STDiT:
    """The recorded network with the parts of a case; parameters of other parts stay unused."""
    with_text: dict[str, Any] = {"caption_dim": 20, "caption_len": 6} if features["text"] else {}
    config = STDiTConfig(
        dim=48,
        num_layers=3,
        num_heads=4,
        prefix_attention="separate" if features["prefix_enhanced_spatial"] else "none",
        mask_channel=features["mask_channel"],
        **with_text,
    )
    network = STDiT(config)
    network.load_state_dict({name: weights.tensors[name] for name in network.state_dict()})
    return network.eval().requires_grad_(False)


def _sees(facts: dict[str, Any]) -> PrefixEnhanced:
    is_causal = facts["features"]["temporal_attention"] == "causal"
    window = Window(window=WINDOW, within="causal" if is_causal else "full", commit_within="causal")
    return PrefixEnhanced(base=window, frames=PREFIX)


def _first(x: Tensor) -> Tensor:
    """Channels and time."""
    return x.transpose(-4, -3)


def _said(caption: Tensor, mask: Tensor) -> Tensor:
    """Text states with zeros where there is no text."""
    return caption[:, 0] * mask[..., None]


def _levels(timestep: Tensor) -> Tensor:
    return (timestep.double() + 1.0) / 1000.0


def _forward(network: STDiT, case: dict[str, Tensor], facts: dict[str, Any], offset: int) -> float:
    """Sample by sample: clean prefixes may differ in length, and a mask is for all samples of a forward."""
    worst, count = 0.0, case["x"].shape[2]
    for row in range(len(case["x"])):
        clean, timestep = case["prefix"][row : row + 1], case["t"][row : row + 1]
        prefix = int(clean.sum())
        sigma = _levels(timestep)[:, None] if timestep.ndim == 1 else torch.where(clean > 0, 0.0, _levels(timestep))
        context = FullSequence(count)
        if facts["features"]["temporal_attention"] != "bidirectional":
            plan = ChunkPlan(chunk=count - prefix, first=prefix)
            positions = Cyclic(length=LENGTH, offset=offset)
            context = FullSequence(count, clean_prefix_mask(plan, count, prefix, _sees(facts), positions))
        text = torch.ones(1, 1, 1)
        if "caption" in case:
            text = _said(case["caption"][row : row + 1], case["caption_mask"][row : row + 1])
        got = network(_first(case["x"][row : row + 1]), sigma, Conditioning(prompts=network.prepare(text)), context)
        worst = max(worst, float((_first(got) - case["out"][row : row + 1]).abs().max()))
    return worst


def _loop(network: STDiT, case: dict[str, Tensor], facts: dict[str, Any]) -> float:
    """Per chunk one evaluation from the cache and a commit; with captions, null and caption rows in one batch."""
    text, copies = torch.ones(len(case["given"]), 1, 1), 1
    if "caption" in case:
        text = torch.cat([_said(case[key], case["caption_mask"]) for key in ("null_caption", "caption")])
        copies = 2
    cond = Conditioning(prompts=network.prepare(text))
    cache = StreamCaches(
        network.sites,
        batch=len(text),
        tokens_per_frame=network.tokens_per_frame(*SIZE),
        visibility=_sees(facts),
        positions=Cyclic(length=LENGTH),
    )

    def run(kind: Kind, frames: range, x: Tensor, sigma: Tensor) -> Tensor:
        context = cache.begin((Segment(kind=kind, frames=frames),))
        return _first(network(torch.cat([_first(x)] * copies), sigma, cond, context))

    run(Kind.PREFILL, range(case["given"].shape[2]), case["given"], torch.zeros(1, 1))
    cache.promote()
    worst = 0.0
    for i, start in enumerate(facts["chunk_start"]):
        frames = range(start, start + CHUNK)
        sigma = torch.cat([_levels(case["t"][i])[:, None]] * copies)
        worst = max(worst, float((run(Kind.DENOISE, frames, case["noisy"][i], sigma) - case["out"][i]).abs().max()))
        run(Kind.COMMIT, frames, case["commit"][i], torch.zeros(1, 1))
        cache.promote()
    return worst


def _sampler(network: STDiT, case: dict[str, Tensor], facts: dict[str, Any]) -> float:
    """A whole rollout with ancestral steps and recorded noise."""
    given = _first(case["given"])
    process, count = IDDPM(predicts="x0"), given.shape[1]
    text, negative = torch.ones(1, 1, 1), None
    if "caption" in case:
        text, negative = (_said(case[key], case["caption_mask"]) for key in ("caption", "null_caption"))
    config = RolloutConfig(
        plan=ChunkPlan(chunk=CHUNK, first=count, num_frames=case["final"].shape[2]),
        schedule=process.schedule(facts["steps"]),
        visibility=_sees(facts),
        positions=Cyclic(length=LENGTH),
        process=process,
        solver=Ancestral(process=process),
        guidance=Guidance(scale=GUIDANCE) if "caption" in case else Guidance(),
        commit_noise=(facts["effective_timestep"] + 1) / 1000 if "prefix_noise_level" in facts else 0.0,
    )
    stream = Rollout(
        network, config, text, noise=_noise(case), latent_size=SIZE, prefix=given, negative=negative, cache="streams"
    )
    got = torch.cat([chunk.latents for chunk in stream], dim=1)
    return float((_first(got) - case["final_exact"][:, :, count:]).abs().max())


def _noise(case: dict[str, Tensor]) -> RecordedNoise:
    """Recorded chunk by chunk, as one source; that of the last step is not used, that of the commits follows."""
    given = torch.zeros_like(_first(case["given"]))
    steps = torch.cat(list(_first(case["step_noise"])), dim=-4)[:-1]
    initial = torch.cat([given, *_first(case["init_noise"])], dim=1)
    later = [torch.cat([given, step], dim=1) for step in steps]
    if "prefix_noise_commit" in case:
        commits = [_first(case["prefix_noise_given"]), *_first(case["prefix_noise_commit"])]
        later.append(torch.cat(commits, dim=1))
    return RecordedNoise(initial, torch.stack(later))
