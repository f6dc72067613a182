"""Fine-tuning the model on a folder of captioned videos: codec, words, latents, then the causal network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from unspool.data.videos import VideoFolderConfig
from unspool.methods.codec import CodecTrainingConfig
from unspool.methods.teacher_forcing import ContextNoise, TeacherForcingConfig
from unspool.recipes.finetune_report_config import FinetuneReportConfig
from unspool.recipes.stage_parts import Full, chunks, towards_noise
from unspool.train.config import EmaConfig, OptimConfig, TrainConfig
from unspool.train.recipe import LegOver, Recipe

if TYPE_CHECKING:
    import torch

    from unspool.data.batch import Source
    from unspool.methods.base import Method
    from unspool.models.caption import CaptionEncoder
    from unspool.train.callbacks import Callback


@dataclass(frozen=True, kw_only=True)
class VideoCodecRecipe(Recipe):
    """The codec of a model, fitted to a folder of videos."""

    data: VideoFolderConfig
    method: CodecTrainingConfig
    start: str

    def build_method(self, device: torch.device) -> Method:
        from unspool.methods.codec import CodecTraining
        from unspool.models.taehv import Taehv

        return CodecTraining(self.method, codec=Taehv.from_single_file(self.start).to(device))

    def build_source(self) -> Source:
        from unspool.data.videos import VideoFolder

        return VideoFolder(self.data)


@dataclass(frozen=True, kw_only=True)
class VideosRecipe(Recipe):
    """Base of what trains a network on the latents of a folder of videos.

    Fields: `data` the videos; `model` a shipped model or a model folder, whose codec and text encoder are fitted to
    them; `codec`, `codec_train` the fitting of the codec; `parts` folder of what was prepared.
    """

    data: VideoFolderConfig
    codec: CodecTrainingConfig
    codec_train: TrainConfig
    model: str = "stage"
    parts: str = ""

    def prepare(self, out: Path) -> Self:
        """Fit the codec, teach the text encoder the captions' words, and encode the clips; each once."""
        from unspool.data.videos import VideoFolder

        videos = VideoFolder(self.data)  # first, so that nothing is written for a folder without videos
        parts = out / "parts"
        self._fit_codec(out, parts / "codec.safetensors", videos.fps)
        self._add_words(parts / "text.safetensors", [videos.clip(i).caption for i in range(videos.num_clips)])
        self._encode(videos, parts)
        return replace(self, parts=str(parts))

    def _fit_codec(self, out: Path, target: Path, fps: float) -> None:
        if target.is_file():
            return
        from unspool.data.videos import VideoFolder
        from unspool.methods.codec import measure_latents
        from unspool.models.taehv import Taehv
        from unspool.train.export import read_weights
        from unspool.train.loop import Trainer
        from unspool.train.parallel import alone

        start = self._file("codec")
        data = replace(self.data, num_frames=1 + 3 * self.data.temporal, mode="random")
        recipe = VideoCodecRecipe(train=self.codec_train, method=self.codec, start=str(start), data=data)
        world = alone(recipe.train.device)
        trained = Trainer(recipe, out / "codec", name="finetune-video codec", world=world).run()
        if not trained.is_done:
            raise LegOver(f"in the codec, {trained.reason}")
        codec = Taehv.from_single_file(start)
        codec.load_state_dict(read_weights(out / "codec"))
        clips = VideoFolder(self.data)
        mean, std = measure_latents(codec, (clips.clips([i]) for i in range(min(len(clips), 64))))
        target.parent.mkdir(parents=True, exist_ok=True)
        codec.with_normalisation(mean, std).save(target)

    def _add_words(self, target: Path, captions: Sequence[str]) -> None:
        if target.is_file():
            return
        import torch

        from unspool.models.caption import CaptionEncoder

        torch.manual_seed(self.train.seed)
        CaptionEncoder.from_single_file(self._file("text")).knowing(captions).save(target)

    def _encode(self, videos: Source, parts: Path) -> None:
        from unspool.data.encoding import encode_source, load_file_or_name

        codec = load_file_or_name(str(parts / "codec.safetensors"), {"Taehv": "unspool.models.taehv:Taehv"})
        encode_source(videos, codec, parts / "latents", fps=self.data.fps, batch=8)

    def text_encoder(self) -> CaptionEncoder:
        """The text encoder that knows the captions' words, or the model's own before it was prepared; trainable."""
        from unspool.models.caption import CaptionEncoder

        text = CaptionEncoder.from_single_file(
            Path(self.parts) / "text.safetensors" if self.parts else self._file("text")
        )
        return text.train().requires_grad_(True)

    def build_source(self) -> Source:
        from unspool.data.shards import LatentShards, LatentShardsConfig

        if not self.parts:
            raise ValueError(
                "the clips are not encoded yet, which the run itself does first; begin it, or give parts=RUN/parts of "
                "one that was begun"
            )
        return LatentShards(LatentShardsConfig(path=str(Path(self.parts) / "latents"), in_memory=True))

    def _file(self, role: str) -> Path:
        """A component's file of the model that this begins with. Raises ValueError where it has none."""
        from unspool.engine.load import find_model
        from unspool.engine.model_folder import read_model_folder

        folder = find_model(self.model)
        part = read_model_folder(folder, verify=False).parts[role]
        kinds = {"codec": "taehv", "text": "caption"}
        if part.kind != kinds[role] or part.file is None:
            raise ValueError(f"model={self.model!r} has a {role} of kind {part.kind}; expected {kinds[role]}, which is "
                             "what this recipe can train")  # fmt: skip
        return folder / part.file


@dataclass(frozen=True, kw_only=True)
class FinetuneVideoRecipe(VideosRecipe):
    """A shipped model, or a model folder, trained further on videos.

    Fields: `model` what to begin with; `method`, `train` the training of its network; `report` what is measured at the
    end.
    """

    method: TeacherForcingConfig
    report: FinetuneReportConfig = field(default_factory=FinetuneReportConfig)

    harmless: ClassVar[tuple[str, ...]] = ("report",)

    def build_method(self, device: torch.device) -> Method:
        from unspool.engine.load import load
        from unspool.methods.teacher_forcing import TeacherForcing

        network: Any = load(self.model, device=device, dtype="float32", verify=False).transformer
        network.train().requires_grad_(True)
        return TeacherForcing(self.method, backbone=network, text=self.text_encoder().to(device))

    def callbacks(self) -> Sequence[Callback]:
        from unspool.recipes.finetune_report import FinetuneReport

        return (FinetuneReport(self.report),)


def finetune_video() -> FinetuneVideoRecipe:
    """The stage model on a folder of videos: `unspool train finetune-video data.path=FOLDER`.

    Captions from sidecar .txt files, a metadata file, or file names (data.caption_pattern="a person signs {word}"
    data.name_pattern="asl_{word}"). Writes a model folder, samples and a report. Two CPU cores: about 26 minutes.
    """
    return FinetuneVideoRecipe(
        data=VideoFolderConfig(
            num_frames=33, fps=16.0, mode="random", num_repeats=8, short="hold", tail=0.2, in_memory=True
        ),
        codec=CodecTrainingConfig(
            l1=0.2, mse=2.0, noise=0.1, latent_penalty=1e-5, focus="gradient", focus_strength=2.0, crop_px=32,
            crop_share=0.8,
        ),
        codec_train=_train(steps=2000, batch=16, lr=1e-3, decay=0.998),
        method=TeacherForcingConfig(
            plan=chunks(), visibility=Full(), sigma=towards_noise(), weight="none", drop_text=0.1,
            context=ContextNoise(share=0.5, max_sigma=0.3, told="commit"),
        ),
        train=_train(steps=2000, batch=8, lr=5e-4, decay=0.998),
    )  # fmt: skip


def _train(*, steps: int, batch: int, lr: float, decay: float) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch=batch, log_every=50, save_minutes=5.0, ema=EmaConfig(decay=decay),
        optim=OptimConfig(kind="muon+adamw", lr=lr, muon_lr=2 * lr, betas=(0.9, 0.98), weight_decay=0.01,
                          warmup_steps=50, schedule="cosine", final=0.02),
    )  # fmt: skip


__all__ = ["FinetuneVideoRecipe", "VideoCodecRecipe", "VideosRecipe", "finetune_video"]
