"""Seeing the Sprite Stage, second half: which shape each blob is, and where exactly, by drawing it and comparing.

A blob is fitted with every shape: centre and radius by Gauss-Newton on the pixels, first against its mask, then
against the frame itself with light and shadows. What another sprite covers is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.captions import SHAPES
from unspool.data.worlds.render import PALETTE, Drawn, draw, shadow
from unspool.data.worlds.segment import (
    LEAST_AREA,
    NOTHING,
    Blobs,
    Skies,
    empty_stage,
    find_blobs,
    find_skies,
    label_colours,
    to_float,
)
from unspool.data.worlds.templates import Crops, dilate, fit_masks, shape_moments

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST_IOU = 0.6
"""Overlap of mask and template below which a blob has no shape."""
BLOCK_PIXELS = 2**19
"""Pixels that are looked at together."""


@dataclass(frozen=True)
class Sprites:
    """What was seen, arrays [n] in order of frame. Centre and radius in stage units (x in widths), `shape` -1 where
    none fits; `iou` overlap of mask and template; `visible` share of the template that no other sprite covers."""

    frame: Ints
    colour: Ints
    shape: Ints
    x: F64
    y: F64
    radius: F64
    iou: F64
    visible: F64

    def take(self, index: Ints | Bools) -> Sprites:
        return Sprites(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Seen:
    """All that one look at the frames gives; `psnr`, `foreground_psnr` (dB, per frame) compare the frames with the best
    re-rendering; `strange` counts coherent patches per frame that it does not explain."""

    sprites: Sprites
    skies: Skies
    psnr: F64
    foreground_psnr: F64
    strange: Ints


def look(frames: NDArray[np.uint8]) -> Seen:
    """Analyse uint8 frames [f, h, w, 3], each by itself."""
    count, height, width = frames.shape[:3]
    block = max(1, BLOCK_PIXELS // (height * width))
    parts = [_look(frames[at : at + block]) for at in range(0, count, block)]
    shift = np.repeat(np.arange(0, count, block), [len(p.sprites.frame) for p in parts])
    sprites = Sprites(*(np.concatenate([getattr(p.sprites, n) for p in parts]) for n in Sprites.__dataclass_fields__))
    sprites = Sprites(sprites.frame + shift, *(getattr(sprites, n) for n in list(Sprites.__dataclass_fields__)[1:]))
    skies = Skies(np.concatenate([p.skies.weights for p in parts]), np.concatenate([p.skies.sky for p in parts]))
    rest = [np.concatenate([getattr(p, n) for p in parts]) for n in ("psnr", "foreground_psnr", "strange")]
    return Seen(sprites, skies, *rest)


def _look(frames: NDArray[np.uint8]) -> Seen:
    height, width = frames.shape[1:3]
    pixels = to_float(frames)
    skies = find_skies(pixels)
    empty = empty_stage(skies, height, width)
    labels = label_colours(pixels, empty, skies)
    blobs = find_blobs(labels, LEAST_AREA * height**2)
    sprites = fit(pixels, empty, labels, skies, blobs)
    drawn = slots(sprites, len(frames))
    again = to_float(draw(drawn, skies.weights, height=height, width=width))
    error = np.einsum("fyxc,fyxc->fyx", pixels - again, pixels - again) / 3
    inside = np.abs(again - empty).max(3) > 0.06
    psnr = decibel(error.mean((1, 2)))
    foreground = decibel((error * inside).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1))
    strange = _strange(pixels, again, inside)
    return Seen(sprites, skies, psnr, np.where(inside.any((1, 2)), foreground, np.nan), strange)


def decibel(error: F64) -> F64:
    """PSNR of mean squared errors of values in [0, 1]; at most 60 dB."""
    return -10 * np.log10(np.maximum(np.asarray(error, np.float64), 1e-6))


def slots(sprites: Sprites, frames: int) -> list[Drawn]:
    """The sprites as what `render.draw` takes, those first that others cover."""
    order = np.lexsort((sprites.visible, sprites.frame))
    frame = sprites.frame[order]
    rank = np.arange(len(frame)) - np.searchsorted(frame, frame)
    out = []
    for k in range(int(rank.max()) + 1 if len(rank) else 0):
        which = order[rank == k]
        at = sprites.frame[which]
        one = Drawn(*(np.zeros((frames, *n), np.float32) for n in ((), (), (), (3,), (len(SHAPES),))))
        one.x[at], one.y[at], one.radius[at] = sprites.x[which], sprites.y[which], sprites.radius[which]
        one.colour[at] = PALETTE[sprites.colour[which]]
        one.shape[:, 0] = 1
        one.shape[at] = np.eye(len(SHAPES), dtype=np.float32)[np.maximum(sprites.shape[which], 0)]
        out.append(one)
    return out


def fit(pixels: F32, empty: F32, labels: NDArray[np.uint8], skies: Skies, blobs: Blobs) -> Sprites:
    """Every blob with its best shape, sub-pixel centre and radius."""
    height, width = pixels.shape[1:3]
    coefficient, _ = shape_moments()
    size = np.sqrt(blobs.area / coefficient.mean())
    parts = []
    for is_big in (False, True):
        which = np.flatnonzero((size > 0.125 * height) == is_big)
        if len(which):
            parts.append(fit_masks(labels, blobs, which))
    covered = np.full(labels.shape, NOTHING, np.uint8)
    for crops in parts:
        crops.cover(covered)
    parts = [crops.without_fringes(covered) for crops in parts]
    parts = [crops for crops in parts if len(crops.which)]
    present = np.zeros((len(labels), NOTHING + 1), bool)
    for crops in parts:
        present[crops.frame, crops.colour] = True
    for crops in parts:
        crops.set_free(labels, present)
    order = [crops.which for crops in parts]
    if not parts:
        none = np.zeros(0)
        return Sprites(*(none.astype(np.int64),) * 3, *(none,) * 5)
    # Shadows of all sprites first: they darken the ground on which others stand.
    first = _assemble([_best(p, width, height, blobs) for p in parts], order)
    ground = empty.copy()
    for one in slots(first, len(pixels)):
        shadow(ground, one)
    found = []
    for crops in parts:
        crops.refine(pixels, ground, skies.tint)
        found.append(_best(crops, width, height, blobs))
    return _assemble(found, order)


def _assemble(parts: list[Sprites], order: list[Ints]) -> Sprites:
    back = np.argsort(np.concatenate(order), kind="stable")
    return Sprites(*(np.concatenate([getattr(p, n) for p in parts])[back] for n in Sprites.__dataclass_fields__))


def _best(crops: Crops, width: int, height: int, blobs: Blobs) -> Sprites:
    kind = crops.error.argmin(1)
    pick = (np.arange(len(kind)), kind)
    iou = crops.iou[pick]
    shape = np.where(iou >= LEAST_IOU, kind, -1)
    x, y, radius = crops.x[pick] / width, crops.y[pick] / height, crops.radius[pick] / height
    rest = (np.clip(x, 0, 1), np.clip(y, 0, 1), np.clip(radius, 0.02, 0.3), iou, crops.visible[pick])
    frame, colour = blobs.frame[crops.which], blobs.colour[crops.which]
    return Sprites(frame, colour, shape, *(a.astype(np.float64) for a in rest))


def _strange(pixels: F32, again: F32, inside: Bools) -> Ints:
    """Coherent patches per frame that differ from the re-rendering outside of its sprites."""
    off = pixels - again
    height = off.shape[1]
    edge = max(3, round(height * 5 / 64) | 1)
    total = np.pad(off, ((0, 0), (1, 0), (1, 0), (0, 0))).cumsum(1, dtype=np.float64).cumsum(2)
    patch = total[:, edge:, edge:] - total[:, :-edge, edge:] - total[:, edge:, :-edge] + total[:, :-edge, :-edge]
    loud = np.abs(patch / edge**2).max(3) > 0.16
    labels = np.full(pixels.shape[:3], 255, np.uint8)
    half = edge // 2
    labels[:, half : half + loud.shape[1], half : half + loud.shape[2]] = np.where(loud, 0, 255)
    labels[dilate(dilate(inside))] = 255
    blobs = find_blobs(labels, LEAST_AREA * 0.6 * height**2)
    return np.bincount(blobs.frame, minlength=len(pixels))
