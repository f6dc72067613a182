"""At the end of a training on a few videos: each is streamed from its caption, longer than it is, and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unspool.data.shard_format import replace_text
from unspool.engine.export import contact_sheet
from unspool.train.callbacks import Callback

if TYPE_CHECKING:
    from unspool.engine.pipeline import Pipeline
    from unspool.evaluate.recall import Frames
    from unspool.train.loop import Trainer

TILES = 8


@dataclass(frozen=True, kw_only=True)
class OverfitReportConfig:
    """Fields: `seconds` of each stream, `seed` of its noise."""

    seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds < 2:
            raise ValueError(f"report.seconds={self.seconds:g}: expected at least 2")


class OverfitReport(Callback):
    """Loads `model/`, writes `streams.png` and `report.json` and prints what they say; after `PrefixModel`."""

    def __init__(self, config: OverfitReportConfig) -> None:
        self.config = config

    def on_end(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        from unspool.engine.load import load
        from unspool.recipes.finetune_report import captioned_videos

        recipe: Any = trainer.recipe
        videos = captioned_videos(recipe.data)
        pipeline = load(trainer.out / "model", device=trainer.device)
        with trainer.autocast():
            found = self.report(pipeline, videos, trainer.out / "streams.png")
        replace_text(trainer.out / "report.json", json.dumps(found, indent=1) + "\n")
        print(f"streams     {trainer.out / 'streams.png'}: {np.mean(found['nearest_own']):.0%} of the frames of "
              f"{self.config.seconds:g} s are nearest to their own video (by chance {1 / len(videos):.0%}), "
              f"{np.mean(found['first_psnr']):.1f} dB in the first second and {np.mean(found['last_psnr']):.1f} in the "
              f"last (codec {np.mean(found['codec_psnr']):.1f}); motion {np.mean(found['motion']):.2f} of the "
              "videos'")  # fmt: skip

    def report(self, pipeline: Pipeline, videos: Sequence[tuple[str, Frames]], sheet: Path) -> dict[str, Any]:
        """Of every video, in the order of `captions`: the share of the stream's frames that are nearest to it; PSNR of
        a frame against its nearest, by second, and the codec's copy of the video likewise; change from frame to frame
        over the video's. A video that repeats a caption counts as the same one."""
        captions = list(dict.fromkeys(caption for caption, _ in videos))
        groups = [[frames for caption, frames in videos if caption == name] for name in captions]
        # streamed one after the other: 20 s of several at once would hold all their frames and caches
        streams = [pipeline.generate(name, seconds=self.config.seconds, seed=self.config.seed).frames
                   for name in captions]  # fmt: skip
        found: dict[str, Any] = {"captions": captions, "seconds": self.config.seconds, "fps": pipeline.spec.fps}
        rows = [_of_stream(made, groups, k, pipeline) for k, made in enumerate(streams)]
        found |= {name: [row[name] for row in rows] for name in rows[0]}
        tiles = [_spread(frames) for made, group in zip(streams, groups, strict=True) for frames in (group[0], made)]
        contact_sheet(np.concatenate(tiles), columns=TILES).save(sheet)
        return found


def _of_stream(made: Frames, groups: Sequence[Sequence[Frames]], own: int, pipeline: Pipeline) -> dict[str, Any]:
    from unspool.evaluate.recall import mean_change, nearest_frame_psnr

    table = np.stack([nearest_frame_psnr(made, group).max(1) for group in groups], 1)
    fps, near = round(pipeline.spec.fps), table[:, own]
    seconds = [float(near[k : k + fps].mean()) for k in range(0, len(near) - fps + 1, fps)]
    copies = [_codec_copy(frames, pipeline) for frames in groups[own]]
    codec = [float(nearest_frame_psnr(copy, [frames]).mean()) for copy, frames in zip(copies, groups[own], strict=True)]
    moves = np.mean([mean_change(frames) for frames in groups[own] if len(frames) > 1] or [np.nan])
    return {
        "nearest_own": float((table.argmax(1) == own).mean()),
        "first_psnr": seconds[0], "last_psnr": seconds[-1], "psnr_by_second": seconds,
        "codec_psnr": float(np.mean(codec)),
        "motion": float(mean_change(made) / moves) if moves > 0 else None,
    }  # fmt: skip


def _codec_copy(frames: Frames, pipeline: Pipeline) -> Frames:
    from unspool.evaluate.stage import round_trip

    count = 1 + (len(frames) - 1) // pipeline.spec.geometry.temporal * pipeline.spec.geometry.temporal
    return round_trip(pipeline, [frames[:count]])[0]


def _spread(frames: Frames) -> Frames:
    return frames[np.linspace(0, len(frames) - 1, TILES).astype(int)]


__all__ = ["OverfitReport", "OverfitReportConfig"]
