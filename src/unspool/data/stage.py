"""The Sprite Stage as training data: clips with captions per latent frame, and captions alone with what they state."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from unspool.data.batch import Batch, ParsedBatch
from unspool.data.worlds.captions import COLOURS, SHAPES, SIZES, SKIES, Caption
from unspool.data.worlds.motion import MOTIONS
from unspool.data.worlds.stage import Scene, Split, Stage, StageConfig, frame_times

SLOTS = 4
"""The sky and up to three sprites in order of mention."""
CLASSES = (len(SKIES), len(COLOURS), len(SHAPES), len(MOTIONS), len(SIZES))
"""Values of (sky, colour, shape, motion, size), the attributes of a slot."""
ABSENT = -1


class StageClips:
    """Rendered clips (implements `Source`): sample j of step k is clip `k size + j` of the split, so none comes twice.

    Args: `frames` 1 + 4k pixel frames at `fps`; `size_px`; `first`: the clip of the split to begin with; `length`:
    clips before they come round again; `moment`: begin at a drawn time of the scene instead of its beginning.
    Raises ValueError for a number of frames that is not 1 + 4k.
    """

    def __init__(
        self,
        config: StageConfig | None = None,
        *,
        split: Split = "train",
        frames: int = 81,
        fps: float = 16.0,
        size_px: int = 64,
        first: int = 0,
        length: int | None = None,
        moment: bool = False,
    ) -> None:
        if frames < 1 or frames % 4 != 1:
            raise ValueError(f"frames={frames}: expected 1 + 4k, such as {max(frames // 4, 1) * 4 + 1}")
        self.stage, self.split, self.size_px, self.first, self.length = Stage(config), split, size_px, first, length
        self.times, self.fps, self.num_latent = frame_times(frames, fps), fps, 1 + (frames - 1) // 4
        self.moment = moment

    def __len__(self) -> int:
        """Clips, where a `length` was given (they come round again after it)."""
        if self.length is None:
            raise TypeError("an endless world has no len(); give StageClips(length=...)")
        return self.length

    def describe(self) -> dict[str, object]:
        """What of the stage and of its clips is not as usual: clips of different ones do not mix in one data set."""
        usual = StageConfig()
        values = {f.name: (getattr(self.stage.config, f.name), getattr(usual, f.name)) for f in fields(usual)}
        values |= {"split": (self.split, "train"), "first": (self.first, 0), "moment": (self.moment, False)}
        own = {name: value for name, (value, expected) in values.items() if value != expected}
        return {"source": type(self).__name__, **own}

    def scene(self, index: int) -> Scene:
        """Clip `index`, counted from `first`."""
        return self.stage.scene(self.split, self.first + (index if self.length is None else index % self.length))

    def start_of(self, index: int) -> float:
        """Seconds of the scene at which clip `index` begins, on the grid of frames."""
        room = self.stage.config.seconds - float(self.times[-1])
        if not self.moment or room <= 0:
            return 0.0
        rng = np.random.Generator(np.random.Philox(key=[self.stage.config.seed + 1, self.first + index]))
        return round(rng.random() * room * self.fps) / self.fps

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        indices = [step * size + j for j in range(rank, size, world)]
        scenes, starts = [self.scene(i) for i in indices], [self.start_of(i) for i in indices]
        pairs = list(zip(scenes, starts, strict=True))
        frames = np.stack([scene.render(self.times + start, self.size_px) for scene, start in pairs])
        prompt_index = np.stack([scene.prompt_index(self.num_latent, self.fps, start=start) for scene, start in pairs])
        return Batch(
            pixels=to_pixels(frames),
            captions=tuple(tuple(p.caption.text for p in scene.prompts) for scene in scenes),
            prompt_index=torch.from_numpy(prompt_index),
            indices=torch.tensor(indices),
        )


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 frames [..., y, x, 3] as float32 pixels [..., 3, y, x] in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -3).float().div_(127.5).sub_(1.0)


class StageCaptions:
    """Captions alone with what they state (implements `Source`; batches are `ParsedBatch`): sample j of step k is the
    first caption of clip `k size + j`."""

    def __init__(self, config: StageConfig | None = None, *, split: Split = "train", first: int = 0) -> None:
        self.stage, self.split, self.first = Stage(config), split, first

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> ParsedBatch:
        indices = [self.first + step * size + j for j in range(rank, size, world)]
        captions = [self.stage.scene(self.split, i, events=0).prompts[0].caption for i in indices]
        return ParsedBatch(
            captions=tuple((c.text,) for c in captions),
            labels=torch.tensor([stated(c) for c in captions]),
            indices=torch.tensor(indices),
        )


def stated(caption: Caption) -> list[tuple[int, ...]]:
    """What a caption states, slot by slot (sky, then sprites in order of mention), in the order of CLASSES."""
    rows: list[tuple[int, ...]] = [(caption.sky, ABSENT, ABSENT, ABSENT, ABSENT)]
    rows += [(ABSENT, *sprite) for sprite in caption.sprites]
    return rows + [(ABSENT,) * len(CLASSES)] * (SLOTS - len(rows))
