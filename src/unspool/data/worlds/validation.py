"""Does the scorer measure what it says? Clips with exact truth, spoilt in known ways: each must move its own score.

`validate()` gives the table that stands next to every result: the row "truth" is the ceiling of the scorer, "wrong
prompt" is chance, "frozen" and "shuffled" are what motion is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.scorer import SCORES, score_clip
from unspool.data.worlds.stage import Split, Stage, StageConfig, frame_times

Frames = NDArray[np.uint8]
Spoil = Callable[[Frames, np.random.Generator], Frames]

WRONG_PROMPT = "wrong prompt"


def noise(sigma: float) -> Spoil:
    """Gaussian noise of standard deviation `sigma` of the value range."""
    return lambda frames, rng: _uint8(frames + 255 * sigma * rng.standard_normal(frames.shape, np.float32))


def blur(width_px: float) -> Spoil:
    """Gaussian blur of standard deviation `width_px` of a picture of 64 pixels."""

    def spoil(frames: Frames, rng: np.random.Generator) -> Frames:
        sigma = width_px * frames.shape[1] / 64
        reach = int(np.ceil(3 * sigma))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
        kernel /= kernel.sum()
        out = frames.astype(np.float32)
        for axis in (1, 2):
            pad = [(0, 0)] * 4
            pad[axis] = (reach, reach)
            wide, n = np.pad(out, pad, mode="edge"), out.shape[axis]
            out = sum(k * wide.take(range(i, i + n), axis) for i, k in enumerate(kernel))
        return _uint8(out)

    return spoil


def contrast(factor: float) -> Spoil:
    """Contrast that grows from 1 to `factor` over the clip."""
    return lambda frames, rng: _uint8((frames - 127.5) * _ramp(frames, 1.0, factor) + 127.5)


def brightness(shift: float) -> Spoil:
    """Brightness that grows by `shift` of the value range over the clip."""
    return lambda frames, rng: _uint8(frames + 255 * _ramp(frames, 0.0, shift))


def colour_cast(share: float) -> Spoil:
    """Red that grows and blue that fades by `share` over the clip."""
    gain = np.array([share, 0.0, -share], np.float32)
    return lambda frames, rng: _uint8(frames * (1 + _ramp(frames, 0.0, 1.0) * gain))


ROWS: dict[str, Spoil] = {
    "truth": lambda frames, rng: frames,
    "noise .02": noise(0.02),
    "noise .05": noise(0.05),
    "noise .1": noise(0.10),
    "blur 1 px": blur(1.0),
    "blur 2 px": blur(2.0),
    "frozen": lambda frames, rng: np.repeat(frames[:1], len(frames), 0),
    "shuffled": lambda frames, rng: frames[rng.permutation(len(frames))],
    "reversed": lambda frames, rng: frames[::-1],
    "contrast 1.3": contrast(1.3),
    "contrast 1.9": contrast(1.9),
    "brighter .15": brightness(0.15),
    "colour cast .15": colour_cast(0.15),
    WRONG_PROMPT: lambda frames, rng: frames,
}
"""Name -> what is done to a clip; WRONG_PROMPT scores it against the prompt of the next clip."""


def validate(
    num_clips: int = 32,
    *,
    sprites: int = 1,
    events: int = 0,
    size_px: int = 64,
    fps: float = 16.0,
    num_frames: int = 81,
    split: Split = "test",
    rows: Sequence[str] | None = None,
    config: StageConfig | None = None,
) -> dict[str, dict[str, float]]:
    """Row -> mean of every score over clips with a number of sprites. Raises ValueError for an unknown row."""
    rows = list(ROWS) if rows is None else rows
    unknown = [name for name in rows if name not in ROWS]
    if unknown or num_clips < 1:
        raise ValueError(f"rows {unknown}, num_clips={num_clips}: expected rows of {list(ROWS)}, at least one clip")
    stage = Stage(config)
    scenes = [stage.scene(split, i, sprites=sprites, events=events) for i in range(num_clips + 1)]
    collected: dict[str, list[list[float]]] = {name: [] for name in rows}
    for index, scene in enumerate(scenes[:-1]):
        frames = scene.render(frame_times(num_frames, fps), size_px)
        for name in rows:
            rng = np.random.Generator(np.random.Philox(key=[index, list(ROWS).index(name)]))
            prompts = (scenes[index + 1] if name == WRONG_PROMPT else scene).prompts
            result = score_clip(ROWS[name](frames, rng), fps, prompts)
            collected[name].append([getattr(result, score) for score in SCORES])
    return {name: _means(values) for name, values in collected.items()}


def as_table(results: dict[str, dict[str, float]]) -> str:
    """The result of `validate` as lines of text."""
    columns = {
        "presence": "present", "colour": "colour", "shape": "shape", "motion": "motion", "size": "size", "sky": "sky",
        "adherence": "mean", "strict": "strict", "permanence": "perm.", "extra": "extra", "psnr": "psnr",
        "foreground_psnr": "fg psnr", "jerk": "jerk", "speed": "speed",
    }  # fmt: skip
    digits = {"psnr": 1, "foreground_psnr": 1, "jerk": 4}
    lines = [f"{'':16}" + "".join(f"{head:>9}" for head in columns.values())]
    for name, row in results.items():
        lines.append(f"{name:16}" + "".join(f"{row[key]:9.{digits.get(key, 3)}f}" for key in columns))
    return "\n".join(lines)


def _means(values: list[list[float]]) -> dict[str, float]:
    table = np.array(values)
    known = np.isfinite(table)
    total = np.where(known, table, 0).sum(0)
    mean = np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)
    return {score: float(value) for score, value in zip(SCORES, mean, strict=True)}


def _ramp(frames: Frames, begin: float, end: float) -> NDArray[np.float32]:
    return np.linspace(begin, end, len(frames), dtype=np.float32)[:, None, None, None]


def _uint8(values: NDArray[np.floating]) -> Frames:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
