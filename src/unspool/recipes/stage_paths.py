"""Paths of a stage teacher's sampler for the prompts of encoded clips: what `stage-64-ode` learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unspool.causal.visibility import Full
from unspool.data.shards import LatentShards, LatentShardsConfig
from unspool.data.trajectories import TrajectoryConfig, sample_trajectory, write_trajectories
from unspool.diffusion.schedule import uniform
from unspool.methods.samples import StepList
from unspool.methods.scores import Conditioner
from unspool.models.caption import CaptionEncoder
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.ops.compile import compile_backbone
from unspool.recipes.first_weights import check_text, load_network, weights_file
from unspool.recipes.stage import network_64
from unspool.recipes.stage_distil import FEW_STEPS, GRID
from unspool.recipes.stage_folder import GUIDANCE, SHIFT
from unspool.recipes.stage_parts import chunks
from unspool.rollout.noise import CounterNoise

SEED = 7_000_000


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """What is sampled. Fields: `weights` of the teacher; `kind` of it; `text`, `data` files of the stage; `count` clips
    whose prompts are used; `steps` of the student that shall learn; `grid` steps of the teacher."""

    weights: str
    data: str
    text: str
    kind: Literal["bidirectional", "causal"] = "bidirectional"
    count: int = 1000
    batch: int = 32
    frames: int | None = None
    network: WanConfig = field(default_factory=network_64)
    steps: StepList = FEW_STEPS
    grid: int = GRID
    guidance_from_uncond: float = GUIDANCE
    compile: bool = True

    def trajectory(self) -> TrajectoryConfig:
        """How the paths are sampled."""
        causal = self.kind == "causal"
        return TrajectoryConfig(
            schedule=uniform(self.grid, shift=SHIFT), keep=self.steps.schedule.sigmas,
            guidance_from_uncond=self.guidance_from_uncond, plan=chunks() if causal else None,
            visibility=Full() if causal else None,
        )  # fmt: skip


def write_stage_paths(config: PathsConfig, folder: Path, tell: Callable[[int, int], None] | None = None) -> int:
    """Sample and write; continues what is there. How many were written.

    The noise of clip j is that of sample j, whatever the batch. A causal teacher reads the clip itself; its paths are
    stored beside that clip's latents, those of a bidirectional one beside their own end point.
    """
    clips = LatentShards(LatentShardsConfig(path=config.data, frames=config.frames))
    network = WanTransformer(config.network)
    load_network(network, config.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval().requires_grad_(False)
    if config.compile:
        compile_backbone(network)
    text = CaptionEncoder.from_single_file(config.text)
    check_text(text, config.text, config.weights)
    conditioner = Conditioner(text.to(device))
    how = config.trajectory()

    def sample(latents: Tensor, numbers: range) -> tuple[Tensor, Tensor]:
        prompts, uncond = conditioner(clips.clips(list(numbers)))
        assert prompts.states is not None and uncond.states is not None
        source = CounterNoise(SEED, sample_ids=tuple(numbers))
        shape = (len(numbers), *latents.shape[2:])
        noise = source.draw(range(latents.shape[1]), 0, shape, torch.float32, device)
        with torch.autocast(device.type, torch.bfloat16):
            states = sample_trajectory(
                network, how, noise, prompts.states, uncond.states, prompt_index=prompts.index,
                clean=latents.to(device) if config.kind == "causal" else None,
            )  # fmt: skip
        return states.cpu(), latents if config.kind == "causal" else states[:, -1].cpu()

    teacher = {"sha256": hashlib.sha256(weights_file(config.weights).read_bytes()).hexdigest(), "kind": config.kind}
    return write_trajectories(
        sample, clips, folder, how, count=config.count, batch=config.batch, teacher=teacher, progress=tell
    )
