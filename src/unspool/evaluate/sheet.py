"""Samples in the order of their numbers, good and bad, each with its caption and with what the scorer says of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unspool.data.worlds.scorer import RIGHT
from unspool.evaluate.measures import Frames, Values

if TYPE_CHECKING:
    from PIL.Image import Image

TILES = 8
TILE_PX = 96
WORDS = 4
"""Lines under a strip."""
LINE_PX, FONT_PX, LETTER_PX, GAP_PX = 15, 12, 6.4, 8
PAPER, INK, GOOD, BAD = (24, 24, 24), (235, 235, 235), (120, 220, 130), (250, 130, 120)
JUDGED = ("presence", "colour", "shape", "motion", "size", "sky")
MANY = 0.1
"""Objects per frame beyond which they are worth a word."""


@dataclass(frozen=True)
class Sample:
    """One clip, what was asked for, and what was measured on it."""

    title: str
    caption: str
    frames: Frames
    values: Values

    @property
    def is_right(self) -> bool:
        return self.values["strict"] == 1

    @property
    def verdict(self) -> str:
        """All right or not, the manifold PSNR, and what is wrong."""
        wrong = [f"{name} {self.values[name]:.2f}" for name in JUDGED if self.values[name] < RIGHT]
        wrong += [f"{n} {self.values[n]:.1f}/frame" for n in ("extra", "missing") if self.values[n] > MANY]
        return ", ".join([f"{'all right' if self.is_right else 'wrong'}, {self.values['psnr']:.1f} dB", *wrong])


def sheet(samples: Sequence[Sample]) -> Image:
    """One strip of frames per sample, caption and verdict under it, two strips beside each other."""
    return _page([_strip(sample) for sample in samples])


def _strip(sample: Sample, *, lines: int = WORDS, with_caption: bool = True) -> Image:
    from PIL import Image

    at = np.linspace(0, len(sample.frames) - 1, TILES).round().astype(int)
    shown = enlarged(sample.frames[at])
    tiles = np.concatenate([np.pad(f, ((0, 0), (0, 2), (0, 0)), constant_values=PAPER[0]) for f in shown], 1)
    page = Image.new("RGB", (tiles.shape[1], tiles.shape[0] + LINE_PX * lines + 2), PAPER)
    page.paste(Image.fromarray(tiles), (0, 0))
    words = (
        _lines(sample, tiles.shape[1], lines) if with_caption else [(f"{sample.title}: {sample.verdict}", _ink(sample))]
    )
    _write(page, words, 2, tiles.shape[0])
    return page


def beside(groups: Sequence[Sequence[Sample]]) -> Image:
    """Several models on the same prompts and noise: a block per prompt with its caption, and in it a strip per model,
    `title` and verdict under each."""
    from PIL import Image

    blocks = []
    for group in groups:
        strips = [_strip(sample, lines=1, with_caption=False) for sample in group]
        width, height = strips[0].size
        block = Image.new("RGB", (width, 2 * LINE_PX + len(strips) * (height + 2)), PAPER)
        caption = textwrap.wrap(group[0].caption, max(12, int(width / LETTER_PX)))[:2]
        _write(block, [(line, INK) for line in caption], 2, 0)
        for k, strip in enumerate(strips):
            block.paste(strip, (0, 2 * LINE_PX + k * (height + 2)))
        blocks.append(block)
    return _page(blocks)


def _page(blocks: Sequence[Image]) -> Image:
    from PIL import Image

    width, height = blocks[0].size
    columns = min(2, len(blocks))
    rows = -(-len(blocks) // columns)
    page = Image.new("RGB", (columns * (width + GAP_PX), rows * (height + GAP_PX)), PAPER)
    for k, block in enumerate(blocks):
        page.paste(block, (k % columns * (width + GAP_PX), k // columns * (height + GAP_PX)))
    return page


def wall(samples: Sequence[Sample], *, columns: int = 6) -> Iterator[Frames]:
    """All samples beside each other as a film, uint8 [1, y, x, 3] frame by frame, for viewing and never for scoring."""
    from PIL import Image

    clips = [enlarged(sample.frames) for sample in samples]
    side_y, side_x = clips[0].shape[1:3]
    words = 6
    cell = (side_x + GAP_PX, side_y + words * LINE_PX + GAP_PX)
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    page = Image.new("RGB", (columns * cell[0], rows * cell[1]), PAPER)
    for k, sample in enumerate(samples):
        left, top = k % columns * cell[0], k // columns * cell[1]
        _write(page, _lines(sample, side_x, words), left + 2, top + side_y)
    empty = np.asarray(page)
    for f in range(min(len(clip) for clip in clips)):
        frame = empty.copy()
        for k, clip in enumerate(clips):
            left, top = k % columns * cell[0], k // columns * cell[1]
            frame[top : top + side_y, left : left + side_x] = clip[f]
        yield frame[None]


def enlarged(frames: Frames) -> Frames:
    """Small frames by whole factors, so that pixels stay what they are."""
    factor = max(1, round(TILE_PX / frames.shape[1]))
    return frames.repeat(factor, 1).repeat(factor, 2)


def _ink(sample: Sample) -> tuple[int, int, int]:
    return GOOD if sample.is_right else BAD


def _lines(sample: Sample, width_px: int, most: int) -> list[tuple[str, tuple[int, int, int]]]:
    letters = max(12, int(width_px / LETTER_PX))
    verdict = textwrap.wrap(sample.verdict, letters)[: most // 2]
    words = textwrap.wrap(f"{sample.title}: {sample.caption}", letters)[: most - len(verdict)]
    return [(line, INK) for line in words] + [(line, _ink(sample)) for line in verdict]


def _write(page: Image, lines: Sequence[tuple[str, tuple[int, int, int]]], left: int, top: int) -> None:
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_PX)
    for k, (line, colour) in enumerate(lines):
        draw.text((left, top + k * LINE_PX), line, fill=colour, font=font)
