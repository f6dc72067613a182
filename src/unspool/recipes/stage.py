"""The trainings of the stage model: at 64 px for two CPU cores, at 128 px for one large GPU.

Each is one part of `unspool stage-model`, which runs them in order (codec, text, encoding, teacher, student, motion)
and writes the model; each can be run, continued and changed for itself with `unspool train`.
"""

from __future__ import annotations

from dataclasses import replace

from unspool.methods.codec import CodecTrainingConfig
from unspool.methods.common import SigmaLaw
from unspool.methods.flow_matching import FlowMatchingConfig
from unspool.methods.teacher_forcing import ContextNoise, TeacherForcingConfig
from unspool.models.taehv import TaehvConfig
from unspool.models.wan.config import WanConfig
from unspool.recipes.stage_parts import (
    CLIP,
    CodecRecipe,
    Full,
    ShortClips,
    StudentRecipe,
    TeacherRecipe,
    TextRecipe,
    caption_config,
    chunks,
    towards_noise,
)
from unspool.train.config import EmaConfig, LrSchedule, OptimConfig, TrainConfig

LATENT_CHANNELS = 16
Names = tuple[str, ...]


def codec_64() -> CodecRecipe:
    """Codec of the 64 px stage: 4x in time, 8x in space, 16 channels, 2.1 M parameters.

    Mostly 32 px crops around sprites, which cost a quarter of a frame. Muon on the convolutions: at 300 steps 25.5 dB
    where AdamW (its best of two rates) had 23.8.
    """
    return CodecRecipe(
        codec=TaehvConfig(
            encoder_widths=(16, 32, 64, 96), decoder_widths=(160, 96, 32, 16), latent_channels=LATENT_CHANNELS,
            padding="start", num_blocks=1,
        ),
        method=CodecTrainingConfig(
            l1=0.2, mse=2.0, noise=0.1, latent_penalty=1e-5, focus="deviation", focus_strength=2.0,
            crop_px=32, crop_share=0.8,
        ),
        train=train_config(
            steps=14_000, batch=16, lr=2e-3, decay=0.998, curve="cosine", keep_adamw=("encoder.0", "decoder.16")
        ),
    )  # fmt: skip


def text_64() -> TextRecipe:
    """Text encoder of the stage: slots that state the sky and each sprite, from captions alone."""
    return TextRecipe(
        text=caption_config(), train=train_config(steps=2500, batch=64, lr=1e-3, decay=0.99, curve="linear")
    )


def teacher_64() -> TeacherRecipe:
    """Bidirectional teacher of the 64 px stage: 9.1 M parameters, 21 latent frames of 16 tokens.

    Legs of 3 and 9 latent frames first: what a scene looks like is learnt where a clip costs least.
    """
    return TeacherRecipe(
        network=network_64(),
        text="runs/stage-64/text.safetensors", data="runs/stage-64/latents",
        codec="runs/stage-64/codec.safetensors",
        short=ShortClips(legs=((3, 1000), (9, 4500))),
        method=FlowMatchingConfig(sigma=towards_noise(), weight="none", drop_text=0.1),
        train=train_config(steps=6300, batch=32, lr=1e-3, muon_lr=1.5e-3, decay=0.999, curve="wsd", compile=True),
    )  # fmt: skip


def student_64() -> StudentRecipe:
    """Causal many-step student of the 64 px stage: the teacher's weights, teacher forcing over chunks of 3."""
    return StudentRecipe(
        network=network_64(),
        text="runs/stage-64/text.safetensors", data="runs/stage-64/latents",
        codec="runs/stage-64/codec.safetensors",
        start="runs/stage-64/teacher/student.safetensors",
        short=ShortClips(legs=((9, 1500),)),
        method=_teacher_forcing(),
        train=train_config(steps=2200, batch=32, lr=5e-4, muon_lr=1e-3, decay=0.999, curve="wsd", compile=True),
    )  # fmt: skip


def motion_64() -> StudentRecipe:
    """The many-step student learns how things move on: levels near 1, and hardly any loss of the first chunk.

    Where a sprite will be is decided near pure noise, and there the first chunk, which has no past, has ten times the
    error of the others (docs/stage-model.md). Two CPU cores: 65 minutes."""
    return replace(
        student_64(), start="runs/stage-64/student/student.safetensors", method=_motion(),
        short=ShortClips(legs=((9, 3000),)),
        train=train_config(steps=3600, batch=16, lr=4e-4, muon_lr=8e-4, decay=0.999, curve="wsd", compile=True),
    )  # fmt: skip


def codec_128() -> CodecRecipe:
    """Codec of the 128 px stage, for one GPU, not run yet: the published width at the lower resolutions."""
    return CodecRecipe(
        size_px=128, frames=17,
        codec=TaehvConfig(
            encoder_widths=(32, 64, 64, 96), decoder_widths=(192, 128, 64, 32), latent_channels=LATENT_CHANNELS,
            padding="start", num_blocks=2,
        ),
        method=CodecTrainingConfig(
            l1=0.2, mse=2.0, noise=0.1, latent_penalty=1e-5, focus="deviation", focus_strength=2.0,
            crop_px=64, crop_share=0.8,
        ),
        train=train_config(steps=12_000, batch=64, lr=2e-3, decay=0.998, curve="cosine"),
    )  # fmt: skip


def teacher_128() -> TeacherRecipe:
    """Bidirectional teacher of the 128 px stage: 20 M parameters, 64 tokens per latent frame, one GPU."""
    return TeacherRecipe(
        size_px=128, network=network_128(),
        text="runs/stage-128/text.safetensors", data="runs/stage-128/latents",
        codec="runs/stage-128/codec.safetensors",
        short=ShortClips(legs=((3, 4000), (9, 3000))),
        method=FlowMatchingConfig(sigma=towards_noise(), weight="none", drop_text=0.1),
        train=train_config(steps=16_000, batch=64, lr=1.5e-3, decay=0.999, curve="wsd", compile=True),
    )  # fmt: skip


def student_128() -> StudentRecipe:
    """Causal many-step student of the 128 px stage."""
    return StudentRecipe(
        size_px=128, network=network_128(),
        text="runs/stage-128/text.safetensors", data="runs/stage-128/latents",
        codec="runs/stage-128/codec.safetensors",
        start="runs/stage-128/teacher/student.safetensors",
        method=_teacher_forcing(),
        train=train_config(steps=6000, batch=48, lr=1e-3, decay=0.999, curve="wsd", compile=True),
    )  # fmt: skip


def motion_128() -> StudentRecipe:
    """The many-step student of the 128 px stage learns how things move on; for one GPU, not run yet."""
    return replace(
        student_128(), start="runs/stage-128/student/student.safetensors", method=_motion(),
        train=train_config(steps=4000, batch=48, lr=4e-4, muon_lr=8e-4, decay=0.999, curve="wsd", compile=True),
    )  # fmt: skip


def network_64() -> WanConfig:
    """Sizes of all networks of the 64 px stage."""
    return network(dim=256, layers=8, heads=4)


def network_128() -> WanConfig:
    """Sizes of all networks of the 128 px stage."""
    return network(dim=384, layers=8, heads=6)


def train_config(
    *, steps: int, batch: int, lr: float, decay: float, curve: LrSchedule, muon_lr: float | None = None,
    compile: bool = False, keep_adamw: Names = (),
) -> TrainConfig:  # fmt: skip
    """How every training of the stage is run."""
    return TrainConfig(
        steps=steps, batch=batch, compile=compile, log_every=50, save_minutes=10.0, ema=EmaConfig(decay=decay),
        optim=OptimConfig(
            kind="muon+adamw", lr=lr, muon_lr=muon_lr, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=200,
            schedule=curve, final=0.02, decay_share=0.35, adamw_names=(*OptimConfig(lr=lr).adamw_names, *keep_adamw),
        ),
    )  # fmt: skip


def network(*, dim: int, layers: int, heads: int) -> WanConfig:
    """A Wan network for the stage's latents and captions."""
    text = caption_config()
    return WanConfig(
        dim=dim, ffn_dim=4 * dim, num_layers=layers, num_heads=heads, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=text.out_dim, text_len=text.text_len, freq_dim=128,
    )  # fmt: skip


def _teacher_forcing() -> TeacherForcingConfig:
    # Half of the chunks that are read carry noise that the network is not told: what a rollout leaves wrong.
    return TeacherForcingConfig(
        plan=chunks(), visibility=Full(), sigma=towards_noise(), weight="none", drop_text=0.1,
        context=ContextNoise(share=0.5, max_sigma=0.3, told="commit"),
    )  # fmt: skip


def _motion() -> TeacherForcingConfig:
    return replace(
        _teacher_forcing(), sigma=SigmaLaw(law="uniform", shift=10.0), first_weight=0.1,
        context=ContextNoise(share=0.3, max_sigma=0.3, told="true"),
    )  # fmt: skip


__all__ = [
    "CLIP",
    "codec_64",
    "codec_128",
    "motion_64",
    "motion_128",
    "network",
    "network_64",
    "network_128",
    "student_64",
    "student_128",
    "teacher_64",
    "teacher_128",
    "text_64",
    "train_config",
]  # fmt: skip
