"""Models for tests of the evaluation: one that shows exactly what its prompt says, and one with random weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_model import SPEC, parts, save

from unspool.data.worlds.stage import EVENTS, Scene, StageConfig, frame_times
from unspool.engine.pipeline import Pipeline
from unspool.evaluate.protocol import (
    ClipProtocol,
    SpreadProtocol,
    StageProtocol,
    StreamProtocol,
    SwitchProtocol,
    clip_cases,
    stream_cases,
    switch_cases,
)
from unspool.models.identity import IdentityCodec

FPS, SIZE = 8.0, 32
SMALL = replace(SPEC, height_px=SIZE, width_px=SIZE, fps=FPS, clip=7)
KINDS = ("recolour", "sky", "remove")
PROTOCOL = StageProtocol(
    clips=ClipProtocol(prompts=3, held_out=2, sprites=(0.5, 0.5), frames=25, unconditional=1),
    switches=SwitchProtocol(per_kind=1, kinds=KINDS, before=2, after=2),
    streams=StreamProtocol(prompts=1, seconds=6.0, segment_s=3.0),
    spread=SpreadProtocol(prompts=2, seeds=3, frames=25),
    stage=StageConfig(fps=FPS),
    batch=2,
    resamples=200,
)
__all__ = ["EVENTS", "PROTOCOL", "SMALL", "Oracle", "save"]


class Lossless(IdentityCodec):
    """Copies clips exactly, and decodes the streams of another codec's latents."""

    def __init__(self, other: Taehv) -> None:
        self.decode_stream = other.decode_stream  # type: ignore[assignment, method-assign]


class Oracle(Pipeline):
    """Knows the scene of every prompt of a protocol and renders it; a change of prompt takes effect at its chunk."""

    def __init__(self, config: StageProtocol = PROTOCOL, *, deaf: bool = False) -> None:
        modules: dict[str, Any] = {name: m.eval().requires_grad_(False) for name, m in parts().items()}
        super().__init__(SMALL, **{**modules, "codec": Lossless(modules["codec"])}, source="oracle")
        self.deaf, self.calls = deaf, 0
        clips, switches = config.clips, config.switches
        cases = [*clip_cases(config, "test", clips.prompts), *clip_cases(config, "heldout", clips.held_out)]
        cases += stream_cases(config, config.streams.seconds)
        frames = self._clock().first_frame(switches.before + switches.after)
        follow_s = (frames - self._clock().first_frame(switches.before)) / FPS
        for kind in switches.kinds:
            cases += switch_cases(config, kind, follow_s)
        self.scenes: dict[tuple[str, ...], Scene] = {}
        for case in cases:
            texts = tuple(prompt.caption.text for prompt in case.scene.prompts)
            assert self.scenes.setdefault(texts, case.scene) == case.scene, "two scenes of one caption"

    def _clock(self) -> Any:
        from unspool.engine.clock import Clock

        return Clock(geometry=SMALL.geometry, plan=SMALL.rollout.config().plan, fps=FPS)

    def generate_many(self, prompts: Sequence[str], **options: Any) -> list[Any]:
        self.calls += 1
        videos = super().generate_many(prompts, **{**options, "steps": 1, "guidance": 1.0})
        times, switches = frame_times(options["frames"], FPS), options["switches"]
        out = []
        for k, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
            texts = (prompt, *(later[k] for _, later in switches))
            scene = self.scenes.get(texts)
            if scene is None:
                frames = np.zeros((len(times), SIZE, SIZE, 3), np.uint8)
            else:
                start = self._clock().seconds(self._clock().chunk_at(switches[0][0])) if switches else 0.0
                own = scene.prompts[1].time if switches else 0.0
                shifted = times - start + own
                frames = scene.render(np.minimum(shifted, own - 0.01) if self.deaf and switches else shifted, SIZE)
            out.append(replace(video, frames=frames))
        return out
