"""Templates of the Sprite Stage: cut-outs around blobs, to which every shape is fitted by Gauss-Newton on the pixels.

Positions and lengths are in pixels. What another sprite covers is left out of every comparison.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.captions import SHAPES
from unspool.data.worlds.motion import EXTENT
from unspool.data.worlds.render import PALETTE, RADII, coverage
from unspool.data.worlds.segment import NOTHING, UNKNOWN, Blobs

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

WELL = 0.72
"""Overlap of mask and template from which a blob is surely a sprite."""
FRINGE = 0.04
"""Width (stage heights) of the band round a sprite in which its mixture with the sky may look like another colour."""
MASK_STEPS, PIXEL_STEPS, LAST_STEPS = 3, 2, 4
"""Gauss-Newton steps towards the mask, towards the frame, and of the best shape alone."""


@lru_cache(maxsize=1)
def shape_moments() -> tuple[F64, F64]:
    """Area and height of the centroid of each shape, in radii, from its drawing."""
    step = 0.005
    axis = np.arange(-1.4, 1.4, step, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    inside = [coverage(u, v, k) < 0 for k in range(len(SHAPES))]
    return np.array([m.sum() * step**2 for m in inside]), np.array([v[m].mean() for m in inside])


STATE = ("x", "y", "radius", "error", "iou", "visible")


class Crops:
    """Square cut-outs around blobs of about one size; state [n, shapes] of the fits, in pixels."""

    def __init__(self, which: Ints, frame: Ints, ys: Ints, xs: Ints, mask: F32, free: F32) -> None:
        self.which, self.frame, self.ys, self.xs, self.mask, self.free = which, frame, ys, xs, mask, free
        n = (len(which), len(SHAPES))
        self.x, self.y, self.radius, self.error, self.iou = (np.zeros(n, np.float32) for _ in range(5))
        self.visible = np.ones(n, np.float32)
        self.colour = np.zeros(len(which), np.int64)

    def local(self, kind: int) -> tuple[F32, F32, F32]:
        """Offsets from the centre (px) and signed distance (px)."""
        dx = self.xs[:, None, :] + np.float32(0.5) - self.x[:, kind, None, None]
        dy = self.ys[:, :, None] + np.float32(0.5) - self.y[:, kind, None, None]
        radius = self.radius[:, kind, None, None]
        return dx, dy, coverage(dx / radius, dy / radius, kind) * radius

    def cover(self, covered: NDArray[np.uint8]) -> None:
        """Write the colour of those that fit well into the map of what they and their fringes take up."""
        kind = self.error.argmin(1)
        for k in range(len(SHAPES)):
            good = np.flatnonzero((kind == k) & (self.iou[:, k] >= WELL))
            near = self.local(k)[2][good] < FRINGE * covered.shape[1]
            n, y, x = np.nonzero(near)
            covered[self.frame[good][n], self.ys[good][n, y], self.xs[good][n, x]] = self.colour[good][n]

    def without_fringes(self, covered: NDArray[np.uint8]) -> Crops:
        """Those that are more than the edge of another sprite, whose mixture with the sky looks like a colour."""
        at = (self.frame[:, None, None], self.ys[:, :, None], self.xs[:, None, :])
        own = self.colour[:, None, None]
        elsewhere = (covered[at] != NOTHING) & (covered[at] != own)
        share = (self.mask * elsewhere).sum((1, 2)) / np.maximum(self.mask.sum((1, 2)), 1)
        keep = (self.iou[np.arange(len(own)), self.error.argmin(1)] >= WELL) | (share < 0.5)
        return self.take(np.flatnonzero(keep))

    def set_free(self, labels: NDArray[np.uint8], present: Bools) -> None:
        """Leave out what other sprites cover; `present` [f, labels]: which colours are those of a sprite."""
        seen = labels[self.frame[:, None, None], self.ys[:, :, None], self.xs[:, None, :]]
        mine = seen == self.colour[:, None, None]
        others = ~mine & present[self.frame[:, None, None], seen]
        self.free = (~dilate(others) | mine).astype(np.float32)

    def take(self, index: Ints) -> Crops:
        out = Crops(*(getattr(self, n)[index] for n in ("which", "frame", "ys", "xs", "mask", "free")))
        for name in (*STATE, "colour"):
            setattr(out, name, getattr(self, name)[index])
        return out

    def step(self, kind: int, target: F32, weight: F32, soft: float, distance: F32, dx: F32, dy: F32) -> None:
        """One Gauss-Newton step of (x, y, radius) towards `target` coverage."""
        template = np.clip(0.5 - distance / soft, 0, 1)
        grad_y, grad_x = np.gradient(distance, axis=(1, 2))
        band = (np.abs(distance) < 0.5 * soft + 0.25) / np.float32(soft)
        radius = self.radius[:, kind, None, None]
        grad_r = (distance - dx * grad_x - dy * grad_y) / radius
        jacobian = np.stack([grad_x * band, grad_y * band, -grad_r * band], -1).reshape(len(dx), -1, 3)
        miss = (target - template).reshape(len(dx), -1, 1)
        weighted = jacobian * weight.reshape(len(dx), -1, 1)
        normal = weighted.transpose(0, 2, 1) @ jacobian
        normal += np.eye(3, dtype=np.float32) * (1e-3 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-6)
        move = np.linalg.solve(normal, weighted.transpose(0, 2, 1) @ miss)[..., 0]
        most = 0.3 * self.radius[:, kind, None]
        move = np.clip(move, -most, most)
        self.x[:, kind] += move[:, 0]
        self.y[:, kind] += move[:, 1]
        self.radius[:, kind] = np.maximum(self.radius[:, kind] + move[:, 2], 1.0)

    def refine(self, pixels: F32, ground: F32, tint: F32) -> None:
        """Fit to the frame itself: light as it is drawn, over the ground with its shadows."""
        at = (self.frame[:, None, None], self.ys[:, :, None], self.xs[:, None, :])
        seen, below = pixels[at], ground[at]
        colour = (PALETTE[self.colour] * tint[self.frame])[:, None, None, :]
        for kind in range(len(SHAPES)):
            self.approach(kind, PIXEL_STEPS, seen, below, colour)
        best = self.error.argmin(1)
        for kind in np.unique(best).tolist():
            rows = np.flatnonzero(best == kind)
            some = self.take(rows)
            some.approach(kind, LAST_STEPS, seen[rows], below[rows], colour[rows])
            for name in STATE:
                getattr(self, name)[rows] = getattr(some, name)

    def approach(self, kind: int, steps: int, seen: F32, below: F32, colour: F32) -> None:
        """Fit one shape to the pixels `seen` over those `below` it, and measure what is left."""
        for turn in range(steps + 1):
            dx, dy, distance = self.local(kind)
            paint = _paint(dx, dy, self.radius[:, kind, None, None], kind, colour) - below
            power = _dot(paint, paint)
            target = _dot(seen - below, paint) / np.maximum(power, 1e-4)
            if turn < steps:
                self.step(kind, np.clip(target, -0.5, 1.5), power * self.free, 1.0, distance, dx, dy)
        template = np.clip(0.5 - distance, 0, 1)
        off = seen - below - template[..., None] * paint
        self.error[:, kind] = (_dot(off, off) * self.free).sum((1, 2))
        self.measure(kind, template, (target > 0.5).astype(np.float32))

    def measure(self, kind: int, template: F32, mask: F32) -> None:
        low = (np.minimum(mask, template) * self.free).sum((1, 2))
        high = (np.maximum(mask, template) * self.free).sum((1, 2))
        self.iou[:, kind] = low / np.maximum(high, 1e-6)
        whole = np.maximum(template.sum((1, 2)), 1e-6)
        self.visible[:, kind] = (template * self.free).sum((1, 2)) / whole


def fit_masks(labels: NDArray[np.uint8], blobs: Blobs, which: Ints) -> Crops:
    """Cut-outs around the blobs `which`, every shape fitted to their masks."""
    height, width = labels.shape[1:]
    frame, colour = blobs.frame[which], blobs.colour[which]
    coefficient, below = shape_moments()
    radius = np.sqrt(blobs.area[which, None] / coefficient)  # (n, shapes)
    edge = int(2 * EXTENT * min(float(np.median(radius)) * 1.25, RADII.max() * 1.3 * height)) + 5
    edge = min(edge, height, width)
    ys = _window(blobs.y[which], edge, height)
    xs = _window(blobs.x[which], edge, width)
    seen = labels[frame[:, None, None], ys[:, :, None], xs[:, None, :]]
    mine = seen == colour[:, None, None]
    others = ~mine & (seen < UNKNOWN)
    crops = Crops(which, frame, ys, xs, mine.astype(np.float32), (~dilate(others) | mine).astype(np.float32))
    crops.colour = colour
    crops.radius[:] = radius
    crops.x[:] = blobs.x[which, None]
    crops.y[:] = blobs.y[which, None] - below * radius
    for kind in range(len(SHAPES)):
        for turn in range(MASK_STEPS + 1):
            dx, dy, distance = crops.local(kind)
            if turn < MASK_STEPS:
                crops.step(kind, crops.mask, crops.free, 2.0, distance, dx, dy)
        template = np.clip(0.5 - distance, 0, 1)
        crops.measure(kind, template, crops.mask)
        crops.error[:, kind] = 1 - crops.iou[:, kind]
    return crops


def _paint(dx: F32, dy: F32, radius: F32, kind: int, colour: F32) -> F32:
    """What `render` paints at an offset from the centre, [n, s, s, 3]."""
    u, v = dx / radius, dy / radius
    light = np.clip(np.float32(0.94) - np.float32(0.09) * u - np.float32(0.17) * v, 0.6, 1.15)
    paint = colour * light[..., None]
    if kind == 0:
        shine = np.float32(0.35) * np.exp(-((u + 0.35) ** 2 + (v + 0.4) ** 2) * np.float32(9))
        paint += shine[..., None] * (1 - paint)
    return np.clip(paint, 0, 1)


def _dot(a: F32, b: F32) -> F32:
    return np.einsum("nyxc,nyxc->nyx", a, b)  # many times faster than a sum over an axis of three


def _window(centre: F64, size: int, limit: int) -> Ints:
    first = np.clip(np.round(centre - size / 2).astype(np.int64), 0, limit - size)
    return first[:, None] + np.arange(size)


def dilate(mask: Bools) -> Bools:
    out = mask.copy()
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    out[:, :, 1:] |= mask[:, :, :-1]
    out[:, :, :-1] |= mask[:, :, 1:]
    return out
