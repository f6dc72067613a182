"""Clips of the Sprite Stage with their captions, as one picture or as a film of a wall of clips."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.stage import Scene, frame_times

if TYPE_CHECKING:
    from PIL.Image import Image

Frames = NDArray[np.uint8]

LINE_PX = 15
FONT_PX = 12
GAP_PX = 8
LETTER_PX = 6.2
"""Mean width of a letter at FONT_PX."""
PAPER, INK, FAINT = (24, 24, 24), (235, 235, 235), (150, 150, 150)


def sheet(
    scenes: Sequence[Scene], titles: Sequence[str], *, frames: int, fps: float, size_px: int, tiles: int = 9
) -> Image:
    """One row of `tiles` frames per scene with its captions, and the times from which they hold, underneath."""
    from PIL import Image

    rows = []
    for scene, title in zip(scenes, titles, strict=True):
        at = np.unique(np.linspace(0, frames - 1, min(tiles, frames)).round().astype(int))
        shown = _enlarged(scene.render(frame_times(frames, fps)[at], size_px))
        strip = np.concatenate([np.pad(f, ((0, 0), (0, 2), (0, 0)), constant_values=PAPER[0]) for f in shown], 1)
        lines = [(f"{title}   every {frames / fps / max(len(at) - 1, 1):.2f} s", FAINT)]
        for prompt in scene.prompts:
            lines += [(line, INK) for line in _wrapped(f"{prompt.time:.2f} s  {prompt.caption.text}", strip.shape[1])]
        rows.append((strip, lines))
    width = max(strip.shape[1] for strip, _ in rows)
    height = sum(strip.shape[0] + LINE_PX * len(lines) + GAP_PX for strip, lines in rows)
    page, top = Image.new("RGB", (width, height), PAPER), 0
    for strip, lines in rows:
        page.paste(Image.fromarray(strip), (0, top))
        _write(page, lines, 2, top + strip.shape[0])
        top += strip.shape[0] + LINE_PX * len(lines) + GAP_PX
    return page


def film(
    scenes: Sequence[Scene], titles: Sequence[str], *, frames: int, fps: float, size_px: int, columns: int = 4
) -> Iterator[Frames]:
    """All scenes beside each other, uint8 [n, h, w, 3] second by second; the caption that holds stands under each."""
    times = frame_times(frames, fps)
    block = max(1, round(fps))
    for first in range(0, frames, block):
        part = times[first : first + block]
        clips = [_enlarged(scene.render(part, size_px)) for scene in scenes]
        yield np.stack(
            [_wall([clip[k] for clip in clips], scenes, titles, time, columns) for k, time in enumerate(part)]
        )


def _wall(
    tiles: Sequence[NDArray[np.uint8]], scenes: Sequence[Scene], titles: Sequence[str], time: float, columns: int
) -> NDArray[np.uint8]:
    from PIL import Image

    side = tiles[0].shape[0]
    texts = [[p.caption.text for p in scene.prompts if p.time <= time + 1e-9][-1] for scene in scenes]
    most = max(len(_wrapped(p.caption.text, side)) for scene in scenes for p in scene.prompts) + 1
    cell = side + most * LINE_PX + GAP_PX
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (side + GAP_PX), rows * cell), PAPER)
    for index, (tile, title, text) in enumerate(zip(tiles, titles, texts, strict=True)):
        left, top = index % columns * (side + GAP_PX), index // columns * cell
        page.paste(Image.fromarray(tile), (left, top))
        _write(page, [(title, FAINT), *((line, INK) for line in _wrapped(text, side))], left + 2, top + side)
    return np.asarray(page)


def _write(page: Image, lines: Sequence[tuple[str, tuple[int, int, int]]], left: int, top: int) -> None:
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_PX)
    for k, (line, colour) in enumerate(lines):
        draw.text((left, top + k * LINE_PX), line, fill=colour, font=font)


def _wrapped(text: str, width_px: int) -> list[str]:
    return textwrap.wrap(text, max(12, int(width_px / LETTER_PX)))


def _enlarged(frames: Frames) -> Frames:
    """Small frames by whole factors, so that pixels stay exact and captions find room."""
    factor = max(1, round(160 / frames.shape[1]))
    return frames.repeat(factor, 1).repeat(factor, 2)
