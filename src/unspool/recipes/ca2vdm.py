"""Ca2-VDM and ViD-GPT at small sizes: on the Sprite Stage at 64 px, and overfitted to a folder of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Full, Window
from unspool.data.videos import VideoFolderConfig
from unspool.diffusion.iddpm import IDDPM
from unspool.methods.clean_prefix import CleanPrefixConfig
from unspool.methods.codec import CodecTrainingConfig
from unspool.models.stdit.config import STDiTConfig
from unspool.recipes.ca2vdm_folder import Clip, PrefixModel, SamplingConfig, describe_prefix_model, settings_of
from unspool.recipes.finetune_video import VideosRecipe
from unspool.recipes.overfit_report import OverfitReport, OverfitReportConfig
from unspool.recipes.stage import LATENT_CHANNELS, train_config
from unspool.recipes.stage_folder import EXAMPLES, VOCABULARY
from unspool.recipes.stage_parts import CLIP, ShortClips, caption_config, latent_clips, made_first, need
from unspool.train.config import TrainConfig
from unspool.train.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from unspool.data.batch import Source
    from unspool.engine.model_folder import ModelSpec
    from unspool.methods.base import Method
    from unspool.models.caption import CaptionEncoder
    from unspool.train.callbacks import Callback

PREFIX = 3
"""Clean latent frames that prefix-enhanced attention reads, as published."""
FPS = 16.0


@dataclass(frozen=True, kw_only=True)
class PrefixStageRecipe(Recipe):
    """A causal STDiT on encoded clips of the Sprite Stage.

    Fields: `network`, `method`; `text` a text encoder file, which does not learn unless `learn_text`; `data` a folder
    of latents; `codec` the file that made them, for the model folder at the end ("": none is written); `start` weights
    to begin with; `short` legs of shorter clips first; `frames` latent frames of the longest clips, the first ones of
    each (None: all, CLIP in the stage's latents); `mixed_codecs` as of `LatentRecipe`; `sampling` of the model folder.
    Raises ValueError where network and method do not agree, or no model folder can state the method.
    """

    network: STDiTConfig
    method: CleanPrefixConfig
    text: str
    data: str
    codec: str = ""
    learn_text: bool = False
    start: str = ""
    short: ShortClips = field(default_factory=ShortClips)
    frames: int | None = None
    in_memory: bool = True
    size_px: int = 64
    mixed_codecs: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    harmless: ClassVar[tuple[str, ...]] = ("codec", "sampling", "mixed_codecs")

    def __post_init__(self) -> None:
        check_agreement(self.network, self.method)
        if self.codec:
            settings_of(self.method, self.sampling)  # raises now for what model.json could not say at the end

    def build_method(self, device: torch.device) -> Method:
        from unspool.models.caption import CaptionEncoder
        from unspool.recipes.first_weights import begin_from, check_codecs

        if not self.mixed_codecs:
            check_codecs(self.data, self.start, codec=self.codec)
        need("text", self.text, self.size_px)
        text = CaptionEncoder.from_single_file(self.text).requires_grad_(self.learn_text)
        return begin_from(clean_prefix(self.network, self.method, text, device), self.start)

    def build_source(self) -> Source:
        longer = f"{made_first(self.size_px)}, and docs/ca2vdm.md has the command for clips of 113 frames"
        need("data", self.data, self.size_px, longer)
        return latent_clips(self.data, self.short, in_memory=self.in_memory, frames=self.frames)

    def callbacks(self) -> Sequence[Callback]:
        if not self.codec:
            return ()
        from unspool.models.taehv import Taehv

        return (PrefixModel(self.describe, lambda: Taehv.from_single_file(self.codec)),)

    def describe(self) -> ModelSpec:
        """The model that this makes."""
        clip = Clip(frames=self.frames or CLIP, height_px=self.size_px, width_px=self.size_px, fps=FPS)
        name, network = "ca2vdm-stage" if self.method.circle else "vid-gpt-stage", "a causal STDiT"
        if self.method.bidirectional:
            name, network = "os-ext-stage", "a bidirectional STDiT"
        return describe_prefix_model(
            self.method, self.sampling, clip, name=name, examples=EXAMPLES, vocabulary=VOCABULARY,
            about=f"sprites under a sky from captions, by {network} behind a clean prefix",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrefixVideosRecipe(VideosRecipe):
    """A causal STDiT from nothing on the latents of a folder of videos; the text encoder learns along.

    Fields besides `VideosRecipe`'s: `network`, whose channels and text are those of `model`; `method`; `sampling` of
    the model folder. Raises ValueError as `PrefixStageRecipe`, and for clips that do not fill the circle of positions.
    """

    network: STDiTConfig
    method: CleanPrefixConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    report: OverfitReportConfig = field(default_factory=OverfitReportConfig)

    harmless: ClassVar[tuple[str, ...]] = ("sampling", "report")

    def __post_init__(self) -> None:
        check_agreement(self.network, self.method)
        settings_of(self.method, self.sampling)
        frames = 1 + (self.data.num_frames - 1) // self.data.temporal
        if self.method.circle is not None and frames < self.method.circle:
            least = 1 + (self.method.circle - 1) * self.data.temporal
            raise ValueError(
                f"clips of {frames} latent frames for circle={self.method.circle}: expected at least as many, or "
                f"positions past the wrap are never trained; use data.num_frames={least}, or a chunk more, to train "
                "windows without the first latent frame too"
            )

    def build_method(self, device: torch.device) -> Method:
        return clean_prefix(self.network, self.method, self.text_encoder(), device)

    def callbacks(self) -> Sequence[Callback]:
        from unspool.models.taehv import Taehv

        codec = Path(self.parts) / "codec.safetensors"
        return PrefixModel(self.describe, lambda: Taehv.from_single_file(codec)), OverfitReport(self.report)

    def describe(self) -> ModelSpec:
        """The model that this makes."""
        from unspool.data.videos import VideoFolder

        videos, data = VideoFolder(self.data), self.data
        captions = sorted({videos.clip(i).caption for i in range(videos.num_clips)})
        clip = Clip(
            frames=1 + (data.num_frames - 1) // data.temporal, height_px=data.height_px, width_px=data.width_px,
            fps=data.fps,
        )  # fmt: skip
        return describe_prefix_model(
            self.method, self.sampling, clip, name="overfit-ca2vdm", examples=captions[:4],
            about=f"a causal STDiT that knows {videos.num_clips} clips by heart",
        )  # fmt: skip


def check_agreement(network: STDiTConfig, method: CleanPrefixConfig) -> None:
    """Raise ValueError for a network of another process than the training's, and where one of them has prefix-enhanced
    attention and the other does not speak of it."""
    if network.process != "iddpm":
        raise ValueError(
            f"network.process={network.process!r}: expected 'iddpm', whose timesteps training behind a clean prefix "
            "has; what it predicts is method.process.predicts"
        )
    if method.process.num_steps > IDDPM().num_steps:
        raise ValueError(
            f"method.process.num_steps={method.process.num_steps}: expected at most {IDDPM().num_steps}, the levels "
            "that the network tells apart"
        )
    if (network.prefix_attention == "none") != (method.prefix_frames is None):
        raise ValueError(
            f"network.prefix_attention={network.prefix_attention!r} with method.prefix_frames={method.prefix_frames}: "
            "expected both or neither; set prefix_frames=3, or prefix_attention='none'"
        )


def clean_prefix(network: STDiTConfig, method: CleanPrefixConfig, text: CaptionEncoder, device: torch.device) -> Method:
    """The objective with a new network. Raises ValueError for a text encoder of another width or length."""
    from unspool.methods.clean_prefix import CleanPrefix
    from unspool.models.stdit.network import STDiT

    if text.text_len > network.caption_len or text.config.out_dim != network.caption_dim:
        raise ValueError(
            f"the text encoder gives {text.text_len} rows of {text.config.out_dim}, the network takes up to "
            f"{network.caption_len} of {network.caption_dim}; set network.caption_len and network.caption_dim"
        )
    return CleanPrefix(method, backbone=STDiT(network).to(device), text=text.to(device))


def small_stdit(*, prefix: bool = True) -> STDiTConfig:
    """11 M parameters for the stage's latents and captions, 16 tokens per latent frame at 64 px."""
    text = caption_config()
    return STDiTConfig(
        dim=256, num_layers=8, num_heads=4, in_channels=LATENT_CHANNELS, freq_dim=128, caption_dim=text.out_dim,
        caption_len=text.text_len, prefix_attention="joint" if prefix else "none", mask_channel=True,
    )  # fmt: skip


def cyclic_method(*, chunk: int, past_chunks: int) -> CleanPrefixConfig:
    """Ca2-VDM: chunks of `chunk` latent frames behind the first one and at most `past_chunks` more; as many positions
    as a full window has, turned by chance where a clip fills it (arXiv:2411.16375 section 3.3). From nothing a network
    of this size learns to follow text by predicting the velocity, and not by the published noise."""
    window = 1 + (past_chunks + 1) * chunk
    return CleanPrefixConfig(
        plan=ChunkPlan(chunk=chunk, first=1), visibility=Window(window=window, within="causal"), circle=window,
        prefix_frames=PREFIX, prefix_noise=0.0, drop_text=0.1, process=IDDPM(predicts="velocity"), makes_first=True,
    )  # fmt: skip


def ca2vdm_stage() -> PrefixStageRecipe:
    """Ca2-VDM on the 64 px stage, after codec, text encoder and latents: the commands are in docs/ca2vdm.md.

    11 M parameters from nothing: chunks of 4 latent frames (1 s), a past of 17, 21 cyclic positions, clips of 29 latent
    frames, so that windows without the first one, which alone stands for one pixel frame, are met in training. About
    100 minutes on two CPU cores with bf16 products. The prefix is noised (standard deviation .11) in training and
    streaming.
    """
    method = cyclic_method(chunk=4, past_chunks=4)
    return PrefixStageRecipe(
        network=small_stdit(),
        method=replace(method, prefix_noise=0.03),
        text="runs/stage-64/text.safetensors", data="runs/stage-64/latents-113", frames=29,
        codec="runs/stage-64/codec.safetensors", short=ShortClips(legs=((9, 3200),)),
        sampling=SamplingConfig(steps=25), train=_train(steps=5000, batch=32),
    )  # fmt: skip


def vid_gpt_stage() -> PrefixStageRecipe:
    """ViD-GPT on the 64 px stage (arXiv:2406.10981): as ca2vdm-stage, but all of the past is read.

    Positions never turn, and there is no prefix-enhanced attention. Good for the 113 frames of a training clip, then
    untrained.
    """
    made = ca2vdm_stage()
    return replace(
        made, network=small_stdit(prefix=False),
        method=replace(made.method, visibility=Full(within="causal"), circle=None, prefix_frames=None),
    )  # fmt: skip


def ca2vdm_overfit() -> PrefixVideosRecipe:
    """Ca2-VDM overfitted to real clips: `unspool train ca2vdm-overfit data.path=FOLDER --out runs/overfit`.

    The stage model's codec and captions are fitted to the videos first. Chunks of 4 latent frames, a past of 9, 13
    cyclic positions, clips of 65 frames (17 latent frames, of which a step sees 13); prefix noise of step 50, as
    published for three beach clips. At the end each caption is streamed past the end of its video and compared with it.
    About 40 minutes on two CPU cores; docs/ca2vdm.md has what came of four clips.
    """
    method = cyclic_method(chunk=4, past_chunks=2)
    return PrefixVideosRecipe(
        data=VideoFolderConfig(num_frames=65, fps=FPS, mode="random", num_repeats=8, short="hold", in_memory=True),
        codec=CodecTrainingConfig(
            l1=0.2, mse=2.0, noise=0.1, latent_penalty=1e-5, focus="gradient", focus_strength=2.0, crop_px=32,
            crop_share=0.8,
        ),
        codec_train=train_config(steps=2000, batch=16, lr=1e-3, decay=0.998, curve="cosine"),
        network=small_stdit(), method=replace(method, prefix_noise=0.051), sampling=SamplingConfig(guidance=1.0),
        train=_train(steps=3000, batch=8),
    )  # fmt: skip


def _train(*, steps: int, batch: int) -> TrainConfig:
    return train_config(
        steps=steps, batch=batch, lr=1e-3, muon_lr=1.5e-3, decay=0.999, curve="wsd", compile=True,
        keep_adamw=("final_layer", "t_block"),
    )  # fmt: skip


__all__ = [
    "PrefixStageRecipe",
    "PrefixVideosRecipe",
    "ca2vdm_overfit",
    "ca2vdm_stage",
    "cyclic_method",
    "small_stdit",
    "vid_gpt_stage",
]
