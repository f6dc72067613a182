"""What is measured on one clip of uint8 frames: numbers by name, NaN where nothing could be judged. Imports no torch,
so that other processes can measure while a network generates."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.motion import EXTENT
from unspool.data.worlds.scorer import SCORES, ClipScore, analyse, score
from unspool.data.worlds.stage import Prompt, Scene, frame_times
from unspool.data.worlds.validation import ROWS

Frames = NDArray[np.uint8]
Values = dict[str, float]
Measure = Callable[[], Values]

DIFFERS = 2
"""Levels of 255 by which a sprite's pixel differs from the empty stage: more than rounding."""
MOST_DB = 60.0
"""What an exact copy counts as."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What all clips of an evaluation have in common; `boundaries`: numbers of the frames that begin a chunk."""

    height: int
    width: int
    fps: float
    boundaries: tuple[int, ...]

    def render(self, scene: Scene, frames: int) -> Frames:
        """The truth."""
        return scene.render(frame_times(frames, self.fps), self.height, self.width)


def measure_clip(frames: Frames, prompts: Sequence[Prompt], form: Format) -> Values:
    """Scores of a clip against its prompts, and how large its steps are at chunk boundaries and elsewhere."""
    result = score(analyse(frames, form.fps), prompts)
    return {**_scores(result), **steps(frames, form.boundaries)}


def measure_truth(scene: Scene, others: Sequence[Prompt], num_frames: int, form: Format) -> Values:
    """The truth under its own prompts, and as "wrong.<score>" under the prompts of another scene: chance."""
    frames = form.render(scene, num_frames)
    analysis = analyse(frames, form.fps)
    wrong = {f"wrong.{name}": value for name, value in _scores(score(analysis, others)).items()}
    return {**_scores(score(analysis, scene.prompts)), **steps(frames, form.boundaries), **wrong}


def measure_spoilt(row: str, index: int, scene: Scene, num_frames: int, form: Format) -> Values:
    """The truth spoilt in a known way (a name of `validation.ROWS`)."""
    rng = np.random.Generator(np.random.Philox(key=[index, zlib.crc32(row.encode())]))
    return measure_clip(ROWS[row](form.render(scene, num_frames), rng), scene.prompts, form)


def measure_copy(frames: Frames, scene: Scene, form: Format) -> Values:
    """A clip that should equal the truth: also its PSNR, over all and over the sprites' pixels."""
    truth = form.render(scene, len(frames))
    mask = sprite_mask(scene, truth, form)
    return {
        **measure_clip(frames, scene.prompts, form),
        "copy_psnr": psnr(frames, truth),
        "copy_sprite_psnr": psnr(frames[mask], truth[mask]) if mask.any() else float("nan"),
    }


def measure_stream(frames: Frames | None, scene: Scene, segment: int, num_frames: int, form: Format) -> Values:
    """Scores of each `segment` frames as "<score>.<number>"; without frames those of the truth."""
    shown = form.render(scene, num_frames) if frames is None else frames
    analysis = analyse(shown, form.fps)
    out: Values = {}
    for number, first in enumerate(range(0, len(shown) - segment + 1, segment)):
        span = (first, first + segment)
        inside = tuple(b - first for b in form.boundaries if first < b < first + segment)
        values = {**_scores(score(analysis, scene.prompts, span=span)), **steps(shown[slice(*span)], inside)}
        out.update({f"{name}.{number}": value for name, value in values.items()})
    return out


def steps(frames: Frames, boundaries: Sequence[int]) -> Values:
    """Mean absolute difference of neighbouring frames (levels of 255) where a chunk begins and elsewhere."""
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
    is_boundary = np.isin(np.arange(1, len(frames)), boundaries)
    return {
        "step_boundary": float(change[is_boundary].mean()) if is_boundary.any() else float("nan"),
        "step_elsewhere": float(change[~is_boundary].mean()) if (~is_boundary).any() else float("nan"),
    }


def psnr(frames: Frames, truth: Frames) -> float:
    """Of uint8 values over all of them together, in dB; MOST_DB for equal ones."""
    error = float(np.square(frames.astype(np.float64) - truth).mean())
    return min(MOST_DB, 10 * float(np.log10(255**2 / max(error, 1e-9))))


def sprite_mask(scene: Scene, truth: Frames, form: Format) -> NDArray[np.bool_]:
    """Pixels [f, y, x] that sprites cover: they differ from the empty stage and lie within a sprite's reach, which
    leaves out most of the shadows (smooth, and so easier than what casts them)."""
    times = frame_times(len(truth), form.fps)
    empty = replace(scene, actors=(), prompts=()).render(times, form.height, form.width)
    differs = (np.abs(truth.astype(np.int16) - empty) > DIFFERS).any(-1)
    y = ((np.arange(form.height) + 0.5) / form.height)[None, :, None]
    x = ((np.arange(form.width) + 0.5) / form.width)[None, None, :]
    near = np.zeros(differs.shape, bool)
    for actor in scene.actors:
        drawn = actor.drawn(times)
        centre_x, centre_y, reach = (v[:, None, None] for v in (drawn.x, drawn.y, EXTENT * drawn.radius))
        # x is measured in widths and radii in heights: on a wide stage a sprite is narrower in these units.
        near |= ((x - centre_x) * form.width / form.height) ** 2 + (y - centre_y) ** 2 <= reach**2
    return differs & near


def _scores(result: ClipScore) -> Values:
    return {name: float(getattr(result, name)) for name in SCORES}


def call(job: Measure) -> Values:
    """Run one measurement, for process pools."""
    return job()
