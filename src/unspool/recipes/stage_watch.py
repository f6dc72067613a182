"""What one looks at while a stage network trains: a sheet of samples with their prompts, and their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unspool.data.stage import StageClips
from unspool.data.worlds.scorer import score_clip
from unspool.data.worlds.stage import Scene, StageConfig
from unspool.engine.export import contact_sheet
from unspool.engine.model_folder import Part
from unspool.engine.pipeline import Pipeline
from unspool.recipes.stage_folder import describe_model
from unspool.recipes.stage_watch_config import WatchConfig

if TYPE_CHECKING:
    from unspool.engine.settings import RolloutSettings
    from unspool.train.loop import Trainer

WATCHED = ("adherence", "strict", "colour", "shape", "motion", "size", "sky", "presence", "extra", "permanence", "psnr")


class Watch:
    """Called with the trainer: samples, writes `samples/step-N.png` and `samples/step-N.txt`, returns the scores."""

    def __init__(
        self,
        config: WatchConfig,
        *,
        kind: Literal["causal", "bidirectional"],
        size_px: int,
        rollout: RolloutSettings,
    ) -> None:
        from unspool.models.taehv import Taehv

        if config.clips < 2 or config.clips % 2:
            raise ValueError(f"watch.clips={config.clips}: expected an even number of at least 2")
        self.config, self.has_fixed_steps = config, rollout.shift is None
        self.spec = describe_model(kind=kind, size_px=size_px, transformer=Part(kind="wan"), rollout=rollout)
        self.codec = Taehv.from_single_file(config.codec)
        self.scenes = watched_scenes(config.clips)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        student: Any = trainer.method.networks["student"]
        text = student.text if student.encodes else trainer.method.conditioner.text  # type: ignore[attr-defined]
        pipeline = Pipeline(
            self.spec, transformer=student.backbone, codec=self.codec.to(trainer.device), text=text, source="watched"
        )
        prompts = [scene.prompts[0].caption.text for scene in self.scenes]
        with trainer.autocast():
            videos = pipeline.generate_many(
                prompts,
                frames=self.config.frames,
                steps=None if self.has_fixed_steps else self.config.steps,
                guidance=None if self.has_fixed_steps else self.config.guidance,
                seed=1,
            )
        frames = [video.frames for video in videos]
        if trainer.world.is_main:
            self._write(trainer, frames, prompts)
        return self._scores(frames)

    def _scores(self, frames: list[np.ndarray]) -> dict[str, float]:
        half = len(frames) // 2
        found: dict[str, float] = {}
        for name, part in (("one", slice(0, half)), ("two", slice(half, None))):
            scores = [
                score_clip(clip, self.spec.fps, scene.prompts[:1])
                for clip, scene in zip(frames[part], self.scenes[part], strict=True)
            ]
            for score in WATCHED:
                found[f"score/{name}/{score}"] = float(np.nanmean([getattr(s, score) for s in scores]))
        return found

    def _write(self, trainer: Trainer, frames: list[np.ndarray], prompts: list[str]) -> None:
        folder = trainer.out / "samples"
        folder.mkdir(exist_ok=True)
        picked = np.concatenate([clip[np.linspace(0, len(clip) - 1, 8).astype(int)] for clip in frames])
        contact_sheet(picked, columns=8, scale=1).save(folder / f"step-{trainer.step:08d}.png")
        (folder / f"step-{trainer.step:08d}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def watched_scenes(clips: int) -> list[Scene]:
    """Scenes of split "dev" without events: one sprite in the first half, two in the second."""
    source = StageClips(StageConfig(), split="dev")
    half = clips // 2
    return [source.stage.scene("dev", i, sprites=1 + (i >= half), events=0) for i in range(clips)]
