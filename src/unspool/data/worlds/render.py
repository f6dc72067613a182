"""Drawing the Sprite Stage: shaded, antialiased shapes with soft shadows under a sky, only the pixels they touch.

Every quantity is a smooth function of the state, in units of the stage, so one scene looks the same at any resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.motion import EXTENT, FLOOR

F32 = NDArray[np.float32]

PALETTE: F32 = np.array(
    [
        (222, 40, 46), (242, 130, 24), (246, 214, 40), (52, 168, 66),
        (40, 190, 190), (44, 92, 226), (136, 62, 190), (242, 108, 178),
    ], np.float32,
) / np.float32(255)  # fmt: skip
"""RGB of the colours, in the order of `captions.COLOURS`."""
AMBIENT: F32 = np.array([(1.0, 1.0, 1.0), (1.0, 0.95, 0.92), (0.86, 0.86, 0.95)], np.float32)
"""What each sky does to a colour."""
RADII: F32 = np.array([0.10, 0.15], np.float32)
"""Radius of the named sizes, in stage heights."""
HORIZON = 0.80
# Per sky: top of the sky, sky at the horizon, ground at the horizon, ground at the bottom. Little saturation, so that
# every sprite colour stands out against every sky.
_SKIES: F32 = np.array(
    [
        [(126, 170, 206), (208, 222, 228), (152, 160, 138), (124, 132, 110)],
        [(96, 86, 118), (222, 178, 156), (128, 106, 98), (98, 80, 78)],
        [(14, 17, 36), (44, 50, 78), (38, 42, 52), (26, 29, 37)],
    ], np.float32,
) / np.float32(255)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One sprite over n frames, arrays [n]: centre, radius (0: not there), colour [n, 3] before the sky's tint, and
    the weight of each shape [n, 4] (a reshape in progress mixes two)."""

    x: F32
    y: F32
    radius: F32
    colour: F32
    shape: F32


@lru_cache(maxsize=32)
def background(height: int, width: int) -> F32:
    """The three empty skies [3, height, width, 3] in [0, 1]."""
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    up = np.clip(y / HORIZON, 0, 1)[:, None]
    down = np.clip((y - HORIZON) / (1 - HORIZON), 0, 1)[:, None]
    is_ground = np.clip((y - HORIZON) * 64 + 0.5, 0, 1)[:, None]  # a horizon as wide as a pixel of 64
    out = np.empty((3, height, width, 3), np.float32)
    for sky, (top, low, near, far) in enumerate(_SKIES):
        column = (1 - is_ground) * (top + (low - top) * up**1.3) + is_ground * (near + (far - near) * down)
        out[sky] = column[:, None]
    out.flags.writeable = False
    return out


def draw(sprites: list[Drawn], sky: F32, *, height: int, width: int) -> NDArray[np.uint8]:
    """Frames uint8 [n, height, width, 3]. `sky` [n, 3] weight of each sky (a fade mixes two)."""
    frames = len(sky)
    canvas = np.empty((frames, height, width, 3), np.float32)
    empty = background(height, width)
    pure = sky.argmax(1)
    is_pure = sky[np.arange(frames), pure] == 1
    for f in range(frames):
        canvas[f] = empty[pure[f]] if is_pure[f] else np.tensordot(sky[f], empty, 1)
    tint = sky @ AMBIENT
    for sprite in sprites:
        shadow(canvas, sprite)
    for sprite in sprites:
        _sprite(canvas, sprite, tint)
    canvas *= 255
    canvas += 0.5
    return canvas.astype(np.uint8)


def coverage(u: F32, v: F32, shape: int) -> F32:
    """Signed distance (in radii, negative inside) of one shape at local coordinates in radii, v downwards."""
    if shape == 0:
        return np.sqrt(u * u + v * v) - np.float32(0.96)
    if shape == 1:
        return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.84)
    if shape == 2:
        v = v + np.float32(-0.2)  # its centre of mass lies low; this centres the box
        return np.maximum(v, np.float32(0.8660254) * np.abs(u) - np.float32(0.5) * v) - np.float32(0.66)
    angle = np.arctan2(u, -v)
    sector = np.float32(2 * np.pi / 5)
    folded = np.abs(angle - sector * np.round(angle / sector))
    rho = np.sqrt(u * u + v * v)
    # Half-plane through a tip (radius 1.25) and the neighbouring inner corner (radius 0.58 at 36 degrees).
    tip, ix, iy = 1.25, 0.58 * np.cos(np.pi / 5), 0.58 * np.sin(np.pi / 5)
    nx, ny = iy, tip - ix
    norm = np.hypot(nx, ny)
    reach = rho * (np.cos(folded) * np.float32(nx / norm) + np.sin(folded) * np.float32(ny / norm))
    return np.asarray(reach - np.float32(tip * nx / norm), np.float32)


def _patch(centre: F32, size: int, limit: int) -> tuple[NDArray[np.int64], F32]:
    """Pixel indexes [n, size] around `centre` (in pixels), kept inside, and their offsets from it."""
    first = np.clip(np.round(centre - size / 2).astype(np.int64), 0, limit - size)
    index = first[:, None] + np.arange(size)
    return index, (index + np.float32(0.5)) - centre[:, None]


def _there(sprite: Drawn) -> NDArray[np.int64]:
    return np.flatnonzero(sprite.radius > 1e-3)


def _sprite(canvas: F32, sprite: Drawn, tint: F32) -> None:
    n = _there(sprite)
    if not len(n):
        return
    height, width = canvas.shape[1:3]
    radius = sprite.radius[n, None, None] * height
    size = min(int(np.ceil(2 * EXTENT * float(sprite.radius.max()) * height)) + 2, height, width)
    ys, dy = _patch(sprite.y[n] * height, size, height)
    xs, dx = _patch(sprite.x[n] * width, size, width)
    u, v = dx[:, None, :] / radius, dy[:, :, None] / radius
    weights = sprite.shape[n]
    if (weights.max(1) == 1).all():
        distance = np.empty(np.broadcast_shapes(u.shape, v.shape), np.float32)
        kinds = weights.argmax(1)
        for kind in np.unique(kinds):
            rows = kinds == kind
            distance[rows] = coverage(u[rows], v[rows], int(kind))
    else:
        distance = np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)
        for kind in np.flatnonzero(weights.any(0)):
            distance += weights[:, kind, None, None] * coverage(u, v, int(kind))
    alpha = np.clip(0.5 - distance * radius, 0, 1)
    light = np.clip(np.float32(0.94) - np.float32(0.09) * u - np.float32(0.17) * v, 0.6, 1.15)
    shine = weights[:, 0, None, None] * np.float32(0.35) * np.exp(-((u + 0.35) ** 2 + (v + 0.4) ** 2) * np.float32(9))
    paint = (sprite.colour[n] * tint[n])[:, None, None, :] * light[..., None]
    paint += shine[..., None] * (1 - paint)
    np.clip(paint, 0, 1, out=paint)
    at = (n[:, None, None], ys[:, :, None], xs[:, None, :])
    below = canvas[at]
    below += alpha[..., None] * (paint - below)
    canvas[at] = below


def shadow(canvas: F32, sprite: Drawn) -> None:
    """Darken the ground under a sprite, in place; canvas [n, height, width, 3]."""
    n = _there(sprite)
    if not len(n):
        return
    height, width = canvas.shape[1:3]
    radius = sprite.radius[n]
    altitude = np.clip((FLOOR - sprite.y[n]) - radius, 0, 1)
    wide = (radius * (0.9 + 0.7 * altitude))[:, None, None] * width
    deep = (0.026 + 0.03 * altitude)[:, None, None] * height
    strength = (0.45 * np.exp(-2.2 * altitude)).astype(np.float32)[:, None, None]
    cols = min(int(np.ceil(4.4 * float(wide.max()))) + 2, width)
    rows = min(int(np.ceil(4.4 * float(deep.max()))) + 2, height)
    ys, dy = _patch(np.full(len(n), (FLOOR + 0.01) * height, np.float32), rows, height)
    xs, dx = _patch(sprite.x[n] * width, cols, width)
    ground = np.clip(((ys + 0.5) / height - HORIZON) * 40, 0, 1).astype(np.float32)[:, :, None]
    dark = 1 - strength * ground * np.exp(-((dx[:, None, :] / wide) ** 2) - (dy[:, :, None] / deep) ** 2)
    at = (n[:, None, None], ys[:, :, None], xs[:, None, :])
    canvas[at] *= dark[..., None].astype(np.float32)
