"""What the trainings of the stage model are made of: codec, text encoder, teacher and student as recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Full, Window
from unspool.data.worlds.captions import vocabulary
from unspool.data.worlds.stage import StageConfig
from unspool.methods.codec import CodecTrainingConfig
from unspool.methods.common import SigmaLaw
from unspool.methods.flow_matching import FlowMatchingConfig
from unspool.methods.teacher_forcing import TeacherForcingConfig
from unspool.models.caption import CaptionConfig
from unspool.models.taehv import TaehvConfig
from unspool.models.wan.config import WanConfig
from unspool.recipes.stage_watch_config import WatchConfig
from unspool.train.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from unspool.data.batch import Source
    from unspool.engine.settings import RolloutSettings
    from unspool.methods.base import Method
    from unspool.methods.samples import StepList
    from unspool.models.caption import CaptionEncoder
    from unspool.models.wan.network import WanTransformer
    from unspool.train.callbacks import Callback

CLIP, CHUNK = 21, 3
"""Latent frames of a clip and of a chunk: 81 pixel frames, 5 seconds at 16 frames per second."""


@dataclass(frozen=True, kw_only=True)
class CodecRecipe(Recipe):
    """The codec, from clips rendered as they are needed. `frozen_encoder`: only the decoder learns, so latents that
    were encoded before stay valid. `start`: a codec file to go on from."""

    codec: TaehvConfig
    method: CodecTrainingConfig
    stage: StageConfig = field(default_factory=lambda: StageConfig(sprites=(0.3, 0.4, 0.3), events=(0.3, 0.5, 0.2)))
    frames: int = 13
    size_px: int = 64
    start: str = ""
    frozen_encoder: bool = False

    def __post_init__(self) -> None:
        if self.frozen_encoder and not self.start:
            raise ValueError("frozen_encoder=true without start=: a new encoder knows nothing; give the codec's file")

    def build_method(self, device: torch.device) -> Method:
        from unspool.methods.codec import CodecTraining
        from unspool.models.taehv import Taehv

        codec = Taehv.from_single_file(self.start) if self.start else Taehv(self.codec)
        if self.frozen_encoder:
            codec.encoder.requires_grad_(False)
        return CodecTraining(self.method, codec=codec.to(device))

    def build_source(self) -> Source:
        from unspool.data.stage import StageClips

        return StageClips(self.stage, frames=self.frames, size_px=self.size_px, moment=True)


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """The text encoder alone: its slots learn what a caption states."""

    text: CaptionConfig

    def build_method(self, device: torch.device) -> Method:
        from unspool.data.stage import CLASSES
        from unspool.methods.parsing import CaptionParsing, CaptionParsingConfig
        from unspool.models.caption import CaptionEncoder

        return CaptionParsing(CaptionParsingConfig(classes=CLASSES), text=CaptionEncoder(self.text).to(device))

    def build_source(self) -> Source:
        from unspool.data.stage import StageCaptions

        return StageCaptions()


@dataclass(frozen=True, kw_only=True)
class ShortClips:
    """The first legs of a training: (latent frames, steps) of ever longer clips, then whole ones."""

    legs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a training gave another network, added to the first weights: `share` times (`now` - `before`).

    A few-step student takes over what its many-step student has learnt since it was distilled, without a step of its
    own. Paths as of all weights; the networks have the sizes of the one that begins. Source: arXiv:2212.04089.
    """

    now: str = ""
    before: str = ""
    share: float = 1.0

    def __post_init__(self) -> None:
        if bool(self.now) != bool(self.before):
            raise ValueError(
                f"progress.now={self.now!r}, progress.before={self.before!r}: give both, the weights after and before "
                "a training, or neither"
            )
        if not math.isfinite(self.share):
            raise ValueError(f"progress.share={self.share}: expected a finite number")
        if not self.now and self.share != 1.0:
            raise ValueError(f"progress.share={self.share} has no effect without progress.now and progress.before")

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.now, self.before) if self.now else ()


@dataclass(frozen=True, kw_only=True)
class LatentRecipe(Recipe):
    """Base of what trains a network on encoded clips.

    Fields: `network` sizes; `text` a text encoder file; `learn_text` whether it goes on learning: at the network's
    rates it forgets what the loss does not ask for yet, shapes and motions first (read off its states after 3,000
    steps: shapes 1.00 before, .40 after); `data` a folder of latents, of which `changes` keeps the clips whose prompt
    changes; `start` weights of the student to begin with: as all weights of recipes a training's export, a model folder
    or the transformer's file in one; `progress` of another network, added to them; `mixed_codecs`: weights and data may
    come from codecs of different files, which share an encoder; `codec` file that goes into the model folder which the
    run leaves ("": it leaves none).
    """

    network: WanConfig
    text: str
    data: str
    changes: bool = False
    learn_text: bool = False
    start: str = ""
    progress: Progress = field(default_factory=Progress)
    short: ShortClips = field(default_factory=ShortClips)
    in_memory: bool = True
    size_px: int = 64
    mixed_codecs: bool = False
    codec: str = ""
    watch: WatchConfig = field(default_factory=WatchConfig)

    kind: ClassVar[Literal["causal", "bidirectional"]] = "bidirectional"
    harmless: ClassVar[tuple[str, ...]] = ("watch", "mixed_codecs", "codec")

    def __post_init__(self) -> None:
        if self.progress.now and not self.start:
            raise ValueError(
                f"progress.now={self.progress.now} without start=: expected first weights to add it to; give start="
            )
        if self.codec or self.watch.codec:
            self.rollout()  # raises now for what model.json could not say at the end

    @property
    def few(self) -> StepList | None:
        """The steps of a distilled student, None for a many-step network."""
        return None

    def rollout(self) -> RolloutSettings:
        """How the trained network is run, watched and as a model folder. Raises ValueError for a method that
        `model.json` cannot state."""
        from unspool.recipes.stage_folder import trained_rollout

        method, fewer = getattr(self, "method", None), getattr(self, "fewer", ())
        return trained_rollout(self.kind, method, few=self.few, fewer=fewer)

    def callbacks(self) -> Sequence[Callback]:
        """Samples and their scores, where `watch.codec` names the codec that decodes them; the model folder."""
        made: list[Callback] = []
        if self.watch.codec:
            from unspool.recipes.stage_watch import Watch
            from unspool.train.callbacks import Every

            watch = Watch(self.watch, kind=self.kind, size_px=self.size_px, rollout=self.rollout())
            made.append(Every(self.watch.every, watch))
        if self.codec:
            from unspool.recipes.stage_folder import StageFolder

            made.append(StageFolder())
        return made

    def check_codecs(self, *weights: str) -> None:
        """Raise ValueError for weights and data of different codecs, unless `mixed_codecs`."""
        from unspool.recipes.first_weights import check_codecs

        if not self.mixed_codecs:
            check_codecs(self.data, *weights, codec=self.codec)

    def student_parts(self, device: torch.device) -> tuple[WanTransformer, CaptionEncoder]:
        """The network and its text encoder on `device`."""
        from unspool.models.caption import CaptionEncoder
        from unspool.models.wan.network import WanTransformer

        need("text", self.text, self.size_px)
        text = CaptionEncoder.from_single_file(self.text)
        if text.text_len != self.network.text_len or text.config.out_dim != self.network.text_dim:
            raise ValueError(
                f"{self.text} gives {text.text_len} rows of {text.config.out_dim}, network expects "
                f"{self.network.text_len} of {self.network.text_dim}; set network.text_len and network.text_dim"
            )
        return WanTransformer(self.network).to(device), text.requires_grad_(self.learn_text).to(device)

    def build_source(self) -> Source:
        need("data", self.data, self.size_px)
        return latent_clips(self.data, self.short, changes=self.changes, in_memory=self.in_memory)


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(LatentRecipe):
    """The bidirectional teacher: flow matching of whole clips."""

    method: FlowMatchingConfig

    def build_method(self, device: torch.device) -> Method:
        from unspool.methods.flow_matching import FlowMatching
        from unspool.recipes.first_weights import begin_from

        self.check_codecs(self.start, *self.progress.paths)
        network, text = self.student_parts(device)
        return begin_from(FlowMatching(self.method, backbone=network, text=text), self.start, self.progress)


@dataclass(frozen=True, kw_only=True)
class StudentRecipe(LatentRecipe):
    """The causal many-step student: teacher forcing, from the teacher's weights."""

    method: TeacherForcingConfig

    kind: ClassVar[Literal["causal", "bidirectional"]] = "causal"

    def build_method(self, device: torch.device) -> Method:
        from unspool.methods.teacher_forcing import TeacherForcing
        from unspool.recipes.first_weights import begin_from

        self.check_codecs(self.start, *self.progress.paths)
        network, text = self.student_parts(device)
        return begin_from(TeacherForcing(self.method, backbone=network, text=text), self.start, self.progress)


def made_first(size_px: int) -> str:
    """What makes the files that every training on encoded clips needs, for errors."""
    parts = " --parts weights/stage-64-many-step --clips 1000" if size_px == 64 else ""
    return f"`unspool stage-model --size {size_px} --until latents{parts}` makes codec, text encoder and latents"


def need(name: str, path: str, size_px: int, made: str = "") -> None:
    """Raise FileNotFoundError, with what makes it, for a file or folder of the stage that is not there."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{name}={path} is not there; {made or made_first(size_px)}, or give another {name}=")


def latent_clips(
    data: str, short: ShortClips, *, in_memory: bool, changes: bool = False, frames: int | None = None
) -> Source:
    """Encoded clips of a folder: the short legs first, then whole ones, or the first `frames` latent frames of them.
    `changes`: only those whose prompt changes."""
    from unspool.data.curriculum import Curriculum, Leg
    from unspool.data.shards import LatentShards, LatentShardsConfig

    def clips(length: int | None) -> Source:
        prompts = 2 if changes else 1
        return LatentShards(LatentShardsConfig(path=data, frames=length, prompts=prompts, in_memory=in_memory))

    legs = [Leg(source=clips(length), steps=steps) for length, steps in short.legs]
    return Curriculum([*legs, Leg(source=clips(frames), steps=1)])


def caption_config() -> CaptionConfig:
    """The stage's text encoder: four slots (the sky and three sprites) and forty words."""
    return CaptionConfig(words=vocabulary(), dim=192, out_dim=192, layers=3, heads=4, rows=40, slots=4)


def chunks() -> ChunkPlan:
    """Chunks of three latent frames."""
    return ChunkPlan(chunk=CHUNK)


def towards_noise() -> SigmaLaw:
    """Levels of training: what a clip shows is decided at high noise, so more of it."""
    return SigmaLaw(law="logit_normal", shift=2.5, mean=0.0, std=1.2)


__all__ = [
    "CHUNK",
    "CLIP",
    "CodecRecipe",
    "Full",
    "LatentRecipe",
    "Progress",
    "ShortClips",
    "StudentRecipe",
    "TeacherRecipe",
    "TextRecipe",
    "Window",
    "caption_config",
    "chunks",
    "latent_clips",
    "made_first",
    "need",
    "towards_noise",
]
