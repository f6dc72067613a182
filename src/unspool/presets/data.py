"""The published models, one value each; every number is from the model's repository, configuration or paper."""

from __future__ import annotations

import dataclasses

from unspool.models.wan.config import WanConfig
from unspool.presets.model import Preset, WeightFile

_WAN = "Wan-Video/Wan2.1 @9737cba"
_SELF_FORCING = "guandeh17/Self-Forcing @33593df"
_CAUSVID = "tianweiy/CausVid @ca21150"

WAN21_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_layers=30, num_heads=12)
WAN21_14B = WanConfig(dim=5120, ffn_dim=13824, num_layers=40, num_heads=40)

wan_1_3b = Preset(
    name="wan2.1-t2v-1.3b",
    network=WAN21_1_3B,
    is_causal=False,
    chunk=None,
    steps=None,
    num_steps=None,
    warp=None,
    shift=None,
    window=None,
    sink=None,
    sigma_commit=None,
    num_latent_frames=21,
    files=(WeightFile(role="network", repository=None, path=None, which="flat"),),
    licence="Apache-2.0",
    licence_scope="repository",
    source=_WAN,
    paper=None,
    notes="the bidirectional teacher; its repository keeps the network under wan_models/Wan2.1-T2V-1.3B/",
)
wan_14b = dataclasses.replace(
    wan_1_3b,
    name="wan2.1-t2v-14b",
    network=WAN21_14B,
    notes="the bidirectional teacher; its repository keeps the network under wan_models/Wan2.1-T2V-14B/",
)

causvid_3step = Preset(
    name="causvid-3step",
    network=WAN21_1_3B,
    is_causal=True,
    chunk=3,
    steps=(1000.0, 757.0, 522.0),
    num_steps=3,
    warp=False,
    shift=8.0,
    window="full",
    sink=0,
    sigma_commit=0.0,
    num_latent_frames=21,
    files=(
        WeightFile(
            role="network", repository="tianweiy/CausVid", path="autoregressive_checkpoint/model.pt", which="generator"
        ),
    ),
    licence="CC-BY-NC-SA-4.0",
    licence_scope="code and weights",
    source=_CAUSVID,
    paper="arXiv:2412.07772",
    notes="the listed steps lie on the shift-8 grid already: 757 and 522 stand for 756.757 and 521.739",
)
causvid_4step = dataclasses.replace(
    causvid_3step,
    name="causvid-4step",
    steps=(1000.0, 750.0, 500.0, 250.0),
    num_steps=4,
    warp=True,
    files=(
        WeightFile(
            role="network",
            repository="tianweiy/CausVid",
            path="autoregressive_checkpoint_warp_4step_cfg2/model.pt",
            which="generator",
        ),
    ),
    notes="warped list: 1000, 960, 888.9, 727.3",
)


def _self_forcing_file(name: str, which: str) -> tuple[WeightFile, ...]:
    return (WeightFile(role="network", repository="gdhe17/Self-Forcing", path=f"checkpoints/{name}", which=which),)


self_forcing_dmd = Preset(
    name="self-forcing-dmd",
    network=WAN21_1_3B,
    is_causal=True,
    chunk=3,
    steps=(1000.0, 750.0, 500.0, 250.0),
    num_steps=4,
    warp=True,
    shift=5.0,
    window=21,
    sink=0,
    sigma_commit=0.0,
    num_latent_frames=21,
    files=_self_forcing_file("self_forcing_dmd.pt", "generator_ema"),
    licence="Apache-2.0",
    licence_scope="repository",
    source=_SELF_FORCING,
    paper="arXiv:2506.08009",
    notes="warped list: 1000, 937.5, 833.3, 625; trained on 21 latent frames, longer clips flicker",
)
self_forcing_sid = dataclasses.replace(
    self_forcing_dmd,
    name="self-forcing-sid",
    files=_self_forcing_file("self_forcing_sid.pt", "generator_ema"),
)
self_forcing_sid_v2 = dataclasses.replace(
    self_forcing_dmd,
    name="self-forcing-sid-v2",
    files=_self_forcing_file("self_forcing_sid_v2.pt", "generator_ema"),
)
self_forcing_gan = dataclasses.replace(
    self_forcing_dmd,
    name="self-forcing-gan",
    files=_self_forcing_file("self_forcing_gan.pt", "generator_ema"),
)
self_forcing_10s = dataclasses.replace(
    self_forcing_dmd,
    name="self-forcing-10s",
    window=None,
    sink=None,
    num_latent_frames=None,
    files=_self_forcing_file("self_forcing_10s.pt", "generator_ema"),
    notes="its window was not published: give it explicitly",
)
self_forcing_ode_init = dataclasses.replace(
    self_forcing_dmd,
    name="self-forcing-ode-init",
    steps=None,
    num_steps=None,
    warp=None,
    files=_self_forcing_file("ode_init.pt", "generator"),
    notes="the initialisation before distillation, not a finished student",
)

longlive_1 = Preset(
    name="longlive-1.0",
    network=WAN21_1_3B,
    is_causal=True,
    chunk=3,
    steps=None,
    num_steps=4,
    warp=None,
    shift=None,
    window=12,
    sink=3,
    sigma_commit=0.0,
    num_latent_frames=None,
    files=(
        WeightFile(role="base", repository=None, path=None, which=None),
        WeightFile(role="lora", repository=None, path="lora.pt", which=None),
    ),
    lora_rank=256,
    lora_alpha=256.0,
    licence="Apache-2.0",
    licence_scope="repository",
    source="NVlabs/LongLive, branch v1.0",
    paper="arXiv:2509.22622",
    notes="base (generator or generator_ema) plus a LoRA (generator_lora or bare) that has to be merged",
)

ALL: tuple[Preset, ...] = (
    wan_1_3b,
    wan_14b,
    causvid_3step,
    causvid_4step,
    self_forcing_dmd,
    self_forcing_sid,
    self_forcing_sid_v2,
    self_forcing_gan,
    self_forcing_10s,
    self_forcing_ode_init,
    longlive_1,
)
