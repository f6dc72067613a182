"""Splits of the Sprite Stage, and the compositions that the training split never shows."""

from __future__ import annotations

import zlib
from itertools import combinations
from typing import Literal

from unspool.data.worlds.captions import COLOURS, SHAPES, Look
from unspool.data.worlds.motion import MOTIONS

Split = Literal["train", "dev", "test", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test", "heldout")

HELD_OUT_SHARE = 0.15


def is_held_out(looks: list[Look]) -> bool:
    """Whether a composition is never shown in training: by its (colour, shape, motion) triples and by its pairs."""
    triples = [f"{COLOURS[k.colour]} {SHAPES[k.shape]} {MOTIONS[k.motion]}" for k in looks]
    things = sorted(f"{COLOURS[k.colour]} {SHAPES[k.shape]}" for k in looks)
    pairs = [" + ".join(pair) for pair in combinations(things, 2)]
    return any(_share(name) < HELD_OUT_SHARE for name in triples + pairs)


def _share(name: str) -> float:
    # crc32 is linear, so names that differ in one letter would fall together: a multiplication spreads them.
    return (zlib.crc32(name.encode()) * 2654435761 % 2**32) / 2**32
