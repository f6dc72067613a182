"""At the end of a fine-tuning on videos: a model folder, samples beside the videos, and what was learned in numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unspool.data.shard_format import replace_text
from unspool.data.videos import VideoFolder, VideoFolderConfig
from unspool.engine.decode import to_uint8
from unspool.engine.export import contact_sheet
from unspool.engine.load import find_model
from unspool.engine.model_folder import ModelSpec, read_model_folder, save_model_folder
from unspool.engine.pipeline import Pipeline
from unspool.evaluate.recall import Frames, distances, psnr_by_frame, share_nearest_own
from unspool.models.taehv import Taehv
from unspool.recipes.finetune_report_config import FinetuneReportConfig
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout
from unspool.train.callbacks import Callback
from unspool.train.export import read_weights, rebuilt

if TYPE_CHECKING:
    from unspool.recipes.finetune_video import FinetuneVideoRecipe
    from unspool.train.loop import Trainer

TILES = 6


class FinetuneReport(Callback):
    """Writes `model/`, `samples.png`, `tail.png`, `report.json` and prints what they say."""

    def __init__(self, config: FinetuneReportConfig) -> None:
        self.config = config

    @torch.no_grad()
    def on_end(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        recipe: Any = trainer.recipe
        student: Any = trainer.method.networks["student"]
        codec = Taehv.from_single_file(Path(recipe.parts) / "codec.safetensors")
        videos = captioned_videos(recipe.data)
        spec = _describe(recipe, sorted({caption for caption, _ in videos}))
        model = trainer.out / "model"
        weights = read_weights(trainer.out)
        network, text = (rebuilt(getattr(student, n), weights, f"{n}.") for n in ("backbone", "text"))
        save_model_folder(model, spec, transformer=network, codec=codec, text=text)
        parts = {"transformer": network, "codec": codec, "text": text}
        pipeline = Pipeline(spec, **{n: part.to(trainer.device) for n, part in parts.items()}, source=str(model))
        with trainer.autocast():
            found = self._samples(pipeline, videos, recipe, trainer.out) | self._tails(pipeline, recipe, trainer.out)
        replace_text(trainer.out / "report.json", json.dumps(found, indent=1) + "\n")
        print(f"model       {model} (unspool generate --model {model} {spec.examples[0]!r})")
        print(f"samples     {trainer.out / 'samples.png'}: {found['nearest_own']:.0%} of {len(videos)} are nearest to "
              f"their own video (by chance {1 / len(videos):.0%})")  # fmt: skip
        if tail := found["tail"]:
            first = {name: curve[0] for name, curve in tail.items() if name != "clips"}
            print(f"tails       {trainer.out / 'tail.png'}: dB of the first held-out frame: "
                  + ", ".join(f"{name} {value:.1f}" for name, value in first.items()))  # fmt: skip

    def _samples(
        self, pipeline: Pipeline, videos: Sequence[tuple[str, Frames]], recipe: FinetuneVideoRecipe, out: Path
    ) -> dict[str, Any]:
        """One clip per video from its caption alone, and which video each is nearest to."""
        made = pipeline.generate_many(
            [caption for caption, _ in videos], frames=recipe.data.num_frames, steps=self.config.steps,
            guidance=self.config.guidance, seed=self.config.seed,
        )  # fmt: skip
        generated = [video.frames for video in made]
        table = distances(generated, [frames for _, frames in videos])
        same = np.array([[a == b for b, _ in videos] for a, _ in videos])  # videos may share a caption
        own = np.where(same, table, np.inf).argmin(axis=1)
        rows = [_spread(frames) for (_, real), fake in zip(videos, generated, strict=True) for frames in (real, fake)]
        contact_sheet(np.concatenate(rows), columns=2 * TILES).save(out / "samples.png")
        return {
            "nearest_own": share_nearest_own(table, own.tolist()),
            "captions": [caption for caption, _ in videos],
            "nearest": [videos[int(k)][0] for k in table.argmin(axis=1)],
            "mse_own": [float(row[k]) for row, k in zip(table, own, strict=True)],
        }

    def _tails(self, pipeline: Pipeline, recipe: FinetuneVideoRecipe, out: Path) -> dict[str, Any]:
        """Each video goes on from the frames before its held-out tail; PSNR against what really came."""
        context, made = self.config.context, _tail_frames(pipeline, self.config)
        data = replace(recipe.data, split="tail", tail_context=context, num_frames=context + made, mode="head",
                       num_repeats=1) if recipe.data.tail else None  # fmt: skip
        if data is None:
            return {"tail": {}}
        tails = VideoFolder(data)
        kept = [i for i in range(tails.num_clips) if tails.clip(i).held_out_from(tails.start_of(i)) == context]
        batch = tails.clips(kept)
        assert batch.pixels is not None and batch.captions is not None
        pixels = batch.pixels.to(pipeline.device)
        prefix = pipeline.codec.encode(pixels[:, :context])
        chunk = self._continue(pipeline, prefix, [prompts[0] for prompts in batch.captions])
        predicted = to_uint8(pipeline.codec.decode(torch.cat([prefix, chunk], dim=1)))[:, context:]
        codec = to_uint8(pipeline.codec.decode(pipeline.codec.encode(pixels)))[:, context:]
        true = to_uint8(pixels)
        real = [min(tails.clip(i).end - tails.start_of(i), context + made) - context for i in kept]
        arms = {"model": predicted, "last frame held": np.repeat(true[:, context - 1 : context], made, 1),
                "codec round trip": codec}  # fmt: skip
        found: dict[str, Any] = {}
        for name, frames in arms.items():
            curve, counts = psnr_by_frame(
                [f[:n] for f, n in zip(frames, real, strict=True)],
                [t[context : context + n] for t, n in zip(true, real, strict=True)],
            )
            found |= {name: curve.tolist(), "clips": counts.tolist()}
        _plot(found, pipeline.spec.fps, out / "tail.png")
        return {"tail": found}

    def _continue(self, pipeline: Pipeline, prefix: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        settings = pipeline.settings(steps=self.config.steps, guidance=self.config.guidance)
        rollout = Rollout(
            pipeline.transformer, settings.config(), pipeline.wording.states(captions),
            noise=CounterNoise(self.config.seed, sample_ids=tuple(range(len(captions)))),
            latent_size=(prefix.shape[-2], prefix.shape[-1]), prefix=prefix,
            negative=pipeline.wording.states([""] * len(captions)),
        )  # fmt: skip
        return rollout.next_chunk().latents


def captioned_videos(data: VideoFolderConfig) -> list[tuple[str, Frames]]:
    """(caption, frames) of the part of every video that was trained on."""
    found = []
    source = VideoFolder(replace(data, num_frames=1, mode="head", num_repeats=1))
    for i in range(source.num_clips):
        clip = source.clip(i)
        found.append((clip.caption, to_uint8(source.frames_of(clip)[None])[0]))
    return found


def _describe(recipe: FinetuneVideoRecipe, captions: Sequence[str]) -> ModelSpec:
    base, data = read_model_folder(find_model(recipe.model), verify=False), recipe.data
    return replace(
        base, name="finetuned", height_px=data.height_px, width_px=data.width_px, fps=data.fps,
        seconds=data.num_frames / data.fps, examples=tuple(captions[:4]), vocabulary="; ".join(captions),
        about=f"{base.name}, trained further on {len(captions)} captions of {Path(data.path).name}",
    )  # fmt: skip


def _spread(frames: Frames) -> Frames:
    return frames[np.linspace(0, len(frames) - 1, TILES).astype(int)]


def _tail_frames(pipeline: Pipeline, config: FinetuneReportConfig) -> int:
    """Pixel frames of one chunk. Raises ValueError for a context that is no whole number of chunks."""
    geometry, chunk = pipeline.spec.geometry, pipeline.spec.rollout.config().plan.chunk
    if geometry.latent_frames(config.context) % chunk:
        raise ValueError(f"report.context={config.context}: expected whole chunks, such as "
                         f"{geometry.pixel_frames(chunk)} frames")  # fmt: skip
    return chunk * geometry.temporal


def _plot(found: dict[str, Any], fps: float, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in found.items():
        if name != "clips":
            axes.plot(1 + np.arange(len(curve)), curve, marker="o", markersize=3, label=name)
    axes.set_xlabel(f"frames past what was trained on ({fps:g} per second)")
    axes.set_ylabel("PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
