"""A method of every kind over toy networks, and a batch that all of them take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import toy_distillation as toy

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Full, Window
from unspool.data.batch import TrajectoryBatch
from unspool.diffusion.iddpm import IDDPM
from unspool.methods.clean_prefix import CleanPrefix, CleanPrefixConfig
from unspool.methods.common import SigmaLaw
from unspool.methods.dmd import DistributionMatching
from unspool.methods.teacher_forcing import ContextNoise, TeacherForcing, TeacherForcingConfig
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.models.taehv import Taehv, TaehvConfig

NULL = torch.zeros(toy.TEXT_ROWS, toy.TEXT_DIM)


def distil(kind: str) -> Any:
    return toy.recipe(f"kind={kind}").build_method(torch.device("cpu"))


def long_rollouts() -> Any:
    """Latent frames before the scored ones, a change of prompt, and a first chunk without loss."""
    config = distil("self_forcing").config
    config = replace(config, sample=replace(config.sample, longest=2 * toy.FRAMES, switch=1.0))
    codec = Taehv(TaehvConfig(encoder_widths=4, decoder_widths=(8, 8, 4, 4), latent_channels=toy.CHANNELS,
                              padding="start", num_blocks=1))  # fmt: skip
    networks: Any = {name: toy.network(1) for name in ("backbone", "teacher", "critic")}
    return DistributionMatching(config, **networks, null_text=NULL, codec=codec)


def teacher_forcing() -> Any:
    config = TeacherForcingConfig(
        plan=toy.PLAN, visibility=Full(), sigma=SigmaLaw(law="uniform", shift=2.0), weight="none", drop_text=0.5,
        context=ContextNoise(share=0.5, max_sigma=0.3, told="commit"),
    )  # fmt: skip
    return TeacherForcing(config, backbone=toy.network(1), null_text=NULL)


def ca2vdm() -> Any:
    network = STDiTConfig(
        dim=24, num_layers=2, num_heads=2, in_channels=toy.CHANNELS, caption_dim=toy.TEXT_DIM, caption_len=4,
        prefix_attention="joint", mask_channel=True,
    )  # fmt: skip
    config = CleanPrefixConfig(
        plan=ChunkPlan(chunk=2, first=1), visibility=Window(window=5, within="causal"), circle=5, prefix_frames=1,
        prefix_noise=0.03, drop_text=0.5, process=IDDPM(), makes_first=True,
    )  # fmt: skip
    return CleanPrefix(config, backbone=STDiT(network), null_text=torch.ones_like(NULL))


KINDS = ("causvid", "self_forcing", "through_kv", "sid", "gan", "consistency", "ode")
CASES: dict[str, Callable[[], Any]] = {
    **{kind: partial(distil, kind) for kind in KINDS},
    "long_rollouts": long_rollouts,
    "teacher_forcing": teacher_forcing,
    "ca2vdm": ca2vdm,
}


def batch(name: str, device: torch.device | str) -> TrajectoryBatch:
    """Of the case `name`, as the loop hands it to a method."""
    frames = {"ca2vdm": 5, "long_rollouts": 2 * toy.FRAMES}.get(name, toy.FRAMES)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, frames, toy.CHANNELS, *toy.SIZE, generator=draw).to(device)
    text = torch.randn(2, 2, toy.TEXT_ROWS, toy.TEXT_DIM, generator=draw).to(device)
    index = (torch.arange(frames) >= frames // 2).long().expand(2, -1).to(device)
    sigmas = toy.STEPS.schedule.sigmas
    return TrajectoryBatch(trajectory=states, sigmas=sigmas, latents=states[:, -1], text=text, prompt_index=index)


def networks_of(method: Any) -> list[torch.nn.Module]:
    """All that the loop would place on the device."""
    found = [*method.networks.values(), *getattr(method, "frozen", {}).values()]
    found += [follower.network for follower in getattr(method, "followers", {}).values()]
    codec = getattr(getattr(method, "sampler", None), "codec", None)
    return found if codec is None else [*found, codec]
