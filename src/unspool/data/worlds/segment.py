"""Seeing the Sprite Stage, first half: which sky a frame has, what stands out against it, and its connected blobs.

Frames are float32 `[f, h, w, 3]` in [0, 1]; positions and lengths are in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.render import AMBIENT, PALETTE, background

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

NOTHING, UNKNOWN = 255, 254
"""Labels of pixels that show the empty stage, and of those that show neither it nor a colour of the palette."""
STANDS_OUT = 0.09
"""Difference from the empty stage, in one channel, from which a pixel is looked at."""
NEAR = 0.20
"""Distance within which a pixel has a colour of the palette."""
LIGHT = (0.60, 1.25)
"""Range of the lighting that is allowed for a colour."""
EDGE_COST, EDGE_MOST = 0.15, 0.6
"""What it costs that a pixel is mixed with the ground behind it, and how much of it may be."""
SKY_PURE = 0.7
"""Share of one sky from which a frame has that sky."""
SKY_GATE = 0.25
"""Typical difference from every mixture of skies above which a frame has none."""
LEAST_AREA = 0.0055
"""Area of the smallest blob that counts, in squared stage heights: a quarter of a small star."""


@dataclass(frozen=True)
class Skies:
    """Per frame: the weights of the skies `[f, 3]`, and which it is (-1: a fade, or none of them) `[f]`."""

    weights: F32
    sky: Ints

    @property
    def tint(self) -> F32:
        return (self.weights @ AMBIENT).astype(np.float32)


@dataclass(frozen=True)
class Blobs:
    """Connected regions of one colour, arrays [n], in order of frame: frame, colour, area (px), centroid (px)."""

    frame: Ints
    colour: Ints
    area: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def to_float(frames: NDArray[np.uint8]) -> F32:
    return frames.astype(np.float32) * np.float32(1 / 255)


def find_skies(frames: F32) -> Skies:
    """The mixture of two skies that is nearest to each frame's row medians, robust against rows full of sprites."""
    height, width = frames.shape[1:3]
    rows = np.median(frames, axis=2)  # (f, h, 3): the empty stage depends on the row alone
    empty = background(height, width)[:, :, 0]  # (3, h, 3)
    best = np.full(len(frames), np.inf)
    weights = np.zeros((len(frames), 3), np.float32)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        way = empty[b] - empty[a]
        trust = np.ones((len(frames), height), np.float32)
        for _ in range(4):
            along = np.einsum("fhc,hc,fh->f", rows - empty[a], way, trust)
            share = np.clip(along / np.einsum("hc,fh->f", way * way, trust), 0, 1)
            off = np.abs(rows - empty[a] - share[:, None, None] * way).mean(2)
            trust = (1 / (1 + (off / 0.03) ** 2)).astype(np.float32)
        cost = np.minimum(off, 0.3).mean(1)
        better = cost < best - 1e-6
        best[better] = cost[better]
        share = np.where(share < 0.02, 0, np.where(share > 0.98, 1, share))
        weights[better] = 0
        weights[better, a], weights[better, b] = 1 - share[better], share[better]
    known = (weights.max(1) >= SKY_PURE) & (best < SKY_GATE)
    return Skies(weights, np.where(known, weights.argmax(1), -1))


def empty_stage(skies: Skies, height: int, width: int) -> F32:
    """The stage without sprites, `[f, h, w, 3]`."""
    column = np.tensordot(skies.weights, background(height, width)[:, :, :1], 1)
    return np.broadcast_to(column, (len(column), height, width, 3)).astype(np.float32)


def label_colours(frames: F32, empty: F32, skies: Skies) -> NDArray[np.uint8]:
    """Per pixel the colour of the palette, NOTHING or UNKNOWN: the nearest of what light may make of each."""
    smooth = _box3(frames)
    labels = np.full(frames.shape[:3], NOTHING, np.uint8)
    off = np.abs(smooth - empty)
    found = (off[..., 0] > STANDS_OUT) | (off[..., 1] > STANDS_OUT) | (off[..., 2] > STANDS_OUT)
    which = np.nonzero(found)
    pixel, ground = smooth[which], empty[which]
    paints = (PALETTE[None] * skies.tint[:, None])[which[0]]  # (n, 8, 3)
    far = np.sqrt(np.maximum(_mixture_cost(pixel, ground, paints), 0))
    # A shadow darkens the ground and never the sky; the empty stage counts with what it may darken to.
    shade = np.clip((pixel * ground).sum(1) / np.maximum((ground**2).sum(1), 1e-6), 0.5, 1.0)
    plain = np.sqrt(((pixel - shade[:, None] * ground) ** 2).sum(1))
    nearest = far.argmin(1)
    least = far.min(1)
    label = np.where(least < NEAR, nearest, UNKNOWN)
    labels[which] = np.where((plain < 0.10) | (plain < 0.9 * least), NOTHING, label).astype(np.uint8)
    return labels


def _mixture_cost(pixel: F32, ground: F32, paints: F32) -> F32:
    """Square distance of pixels [n, 3] to lit colours [n, 8, 3], mixed with the ground behind them as at the edge of a
    sprite; much of the ground costs as well, or every edge would be the colour that happens to lie between."""
    gg, pp = (ground**2).sum(1)[:, None], (paints**2).sum(2)
    gp, sg = np.einsum("nc,nkc->nk", ground, paints), (pixel * ground).sum(1)[:, None]
    sp = np.einsum("nc,nkc->nk", pixel, paints)
    ridge = np.float32(EDGE_COST**2)
    edge = np.clip((sg * pp - sp * gp) / ((gg + ridge) * pp - gp**2), 0, EDGE_MOST)
    light = np.clip((sp - edge * gp) / pp, LIGHT[0] * (1 - edge), LIGHT[1])
    power = (pixel**2).sum(1)[:, None]
    off = power - 2 * (edge * sg + light * sp) + edge**2 * gg + 2 * edge * light * gp + light**2 * pp
    return off + ridge * edge**2


def find_blobs(labels: NDArray[np.uint8], least_px: float) -> Blobs:
    """Connected regions (8 neighbours) of one colour and at least `least_px` pixels, parts of one sprite joined."""
    count, height, width = labels.shape
    flat = np.where(labels < len(PALETTE), labels, NOTHING).reshape(count * height, width)
    starts, stops, row = runs(flat)
    if not len(row):
        none = np.zeros(0, np.int64)
        return Blobs(none, none, *(none.astype(np.float64),) * 3)
    colour = flat[row, starts]
    root = connect(row, starts, stops, colour, height)
    index, inverse = np.unique(root, return_inverse=True)
    length = (stops - starts).astype(np.float64)
    area = np.bincount(inverse, length).astype(np.float64)
    core = np.pad(_core(labels).reshape(len(flat), width), ((0, 0), (1, 0))).cumsum(1)
    has_core = np.bincount(inverse, core[row, stops] - core[row, starts]) >= least_px / 4
    x = np.bincount(inverse, length * (starts + stops) / 2) / area
    y = np.bincount(inverse, length * (row % height + 0.5)) / area
    blobs = Blobs(row[index] // height, colour[index].astype(np.int64), area, x, y)
    order = np.lexsort((-blobs.area, blobs.frame))
    blobs = _take(blobs, order[(blobs.area >= least_px / 6)[order] & has_core[order]])
    blobs = _join(blobs, height)
    return _take(blobs, np.flatnonzero(blobs.area >= least_px))


def _core(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours have their label: the fringe of a sprite, mixed with the sky, has none."""
    core = np.zeros(labels.shape, bool)
    middle = labels[:, 1:-1, 1:-1]
    core[:, 1:-1, 1:-1] = (
        (labels[:, :-2, 1:-1] == middle) & (labels[:, 2:, 1:-1] == middle)
        & (labels[:, 1:-1, :-2] == middle) & (labels[:, 1:-1, 2:] == middle)
    )  # fmt: skip
    return core


def runs(flat: NDArray[np.uint8]) -> tuple[Ints, Ints, Ints]:
    """Horizontal runs of one colour: first pixel, first pixel after it, row."""
    edge = np.ones((len(flat), flat.shape[1] + 1), bool)
    edge[:, 1:-1] = flat[:, 1:] != flat[:, :-1]
    row, at = np.nonzero(edge)
    is_last = at == flat.shape[1]
    start, stop, of = at[~is_last], at[1:][~is_last[:-1]], row[~is_last]
    keep = flat[of, start] != NOTHING
    return start[keep], stop[keep], of[keep]


def connect(row: Ints, starts: Ints, stops: Ints, colour: NDArray[np.uint8], height: int) -> Ints:
    """The least run of each component: labels flow along touching runs and jump to their own label until all agree."""
    first_of_row = np.searchsorted(row, np.arange(row[-1] + 3))
    here, above = [], []
    most = int(np.diff(first_of_row).max())
    for k in range(most):  # the k-th run of the next row, against all runs of this one
        other = first_of_row[row + 1] + k
        is_there = other < first_of_row[row + 2]
        mine = np.flatnonzero(is_there & (row % height != height - 1))
        other = other[mine]
        touch = (colour[mine] == colour[other]) & (starts[mine] <= stops[other]) & (starts[other] <= stops[mine])
        here.append(mine[touch])
        above.append(other[touch])
    a, b = np.concatenate(here), np.concatenate(above)
    label = np.arange(len(row))
    while True:
        low = np.minimum(label[a], label[b])
        new = label.copy()
        np.minimum.at(new, label[a], low)
        np.minimum.at(new, label[b], low)
        new = new[new]
        if np.array_equal(new, label):
            return label
        label = new


def _join(blobs: Blobs, height: int) -> Blobs:
    """A sprite behind another one may show as two parts: small blobs go to a near bigger one of their colour."""
    area, x, y = blobs.area.copy(), blobs.x.copy(), blobs.y.copy()
    key = blobs.frame * 16 + blobs.colour
    keep = np.ones(len(key), bool)
    order = np.lexsort((-area, key))
    big = -1
    for i in order:
        if big < 0 or key[i] != key[big]:
            big = i
            continue
        is_part = area[i] < 2.2 * LEAST_AREA * height**2 and np.hypot(x[i] - x[big], y[i] - y[big]) < 0.2 * height
        if is_part:
            total = area[i] + area[big]
            x[big] += (x[i] - x[big]) * area[i] / total
            y[big] += (y[i] - y[big]) * area[i] / total
            area[big], keep[i] = total, False
    return _take(Blobs(blobs.frame, blobs.colour, area, x, y), np.flatnonzero(keep))


def _take(blobs: Blobs, index: Ints) -> Blobs:
    return Blobs(*(getattr(blobs, name)[index] for name in ("frame", "colour", "area", "x", "y")))


def _box3(frames: F32) -> F32:
    """Mean over 3 x 3 pixels, the border repeated."""
    out = frames
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        wide = np.pad(out, pad, mode="edge")
        n = out.shape[axis]
        parts = [wide.take(range(k, k + n), axis) if axis == 1 else wide[:, :, k : k + n] for k in range(3)]
        out = (parts[0] + parts[1] + parts[2]) * np.float32(1 / 3)
    return out
