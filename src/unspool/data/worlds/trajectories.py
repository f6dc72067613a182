"""Which motion a path shows: its best fit within each family of `motion`, over windows of time.

Every family is a bank of curves over the window; coefficients that enter linearly (places, heights, radii) are solved
for, the rest (speed, period, phase, when a drift slows down) is searched on a grid, all windows at once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.motion import BOUNCES, GRAVITY, LEFT, MOTIONS, ORBITS, RESTS, RIGHT, RISES, border, floor_of

F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

GATE = 0.02
"""Root mean square distance (stage heights) up to which a path follows a curve."""
CLOSE = 0.006
"""Distance up to which a path follows a curve, however well another one fits; beyond it, twice the best counts."""
AT_BORDER = 0.07
"""How far from the border a drift or rise may come to rest."""
AT_FLOOR = 0.12
"""How far from the ground a bounce may land."""
_SPEEDS = np.geomspace(0.05, 0.36, 40)
_KNEES = (0.06, 0.03)
_PERIODS = np.geomspace(0.72, 1.95, 68)
_PHASES = np.arange(64) / 64
_TURNS = np.geomspace(0.18, 0.66, 44)


def misfits(x: F64, y: F64, radius: F64, fps: float) -> F64:
    """Root mean square distance of the paths x, y [windows, n] (stage units) to the nearest curve of each motion,
    [windows, motions]; `radius` [windows]. Not even one curve that is allowed: infinity."""
    n = x.shape[1]
    out = np.full((len(x), len(MOTIONS)), np.inf)
    still_x, still_y = x.var(1), y.var(1)
    out[:, RESTS] = still_x + still_y
    near = np.vectorize(border)(radius) if len(radius) else radius
    out[:, LEFT] = _slide(x, near, n, fps) + still_y
    out[:, RIGHT] = _slide(1 - x, near, n, fps) + still_y
    out[:, RISES] = _slide(y, near, n, fps) + still_x
    out[:, BOUNCES] = _bounce(y, np.vectorize(floor_of)(radius) if len(radius) else radius, n, fps) + still_x
    out[:, ORBITS] = _orbit(x, y, n, fps)
    return np.sqrt(np.maximum(out, 0))


def consistent(misfit: F64) -> Bools:
    """Which motions a path may be called, [windows, motions]: what rests at the left border may have drifted there."""
    best = misfit.min(1, keepdims=True)
    return (misfit <= GATE) & (misfit <= np.maximum(2 * best, CLOSE))


def best_motion(misfit: F64) -> NDArray[np.int64]:
    """The motion of the best fit per window, the simpler one where several are as good; -1 for none."""
    cost = misfit + np.where(np.arange(len(MOTIONS)) == RESTS, 0.0, 0.003)
    return np.where(misfit.min(1) <= GATE, cost.argmin(1), -1)


def _slide(along: F64, end: F64, n: int, fps: float) -> F64:
    """Mean square distance to motions towards a border that `along` approaches from above."""
    curves, mean, square, stops = _slides(n, fps)
    middle = along.mean(1)
    centred = along - middle[:, None]
    miss = (centred**2).mean(1)[:, None] - 2 * centred @ curves.T / n + square
    place = middle[:, None] - mean  # where the curve comes to rest
    allowed = ~stops | (np.abs(place - end[:, None]) < AT_BORDER)
    return np.where(allowed, miss, np.inf).min(1)


@lru_cache(maxsize=64)
def _slides(n: int, fps: float) -> tuple[F64, F64, F64, Bools]:
    """Centred distances to the end [curves, n], their means and mean squares, and whether each slows down."""
    t = np.arange(n) / fps
    rows, stops = [np.zeros((1, n))], [np.ones(1, bool)]
    for speed in _SPEEDS:
        rows.append((-speed * t)[None])
        stops.append(np.zeros(1, bool))
        for knee in _KNEES:
            begin = np.arange(-2 * knee / speed, t[-1], 0.05)[:, None]  # when it begins to slow down
            u = (t - begin) * speed
            way = np.where(u < 0, knee - u, np.where(u < 2 * knee, knee - u + u**2 / (4 * knee), 0.0))
            rows.append(way)
            stops.append(np.ones(len(way), bool))
    curves = np.concatenate(rows)
    mean = curves.mean(1)
    curves = curves - mean[:, None]
    return curves, mean, (curves**2).mean(1), np.concatenate(stops)


def _bounce(y: F64, floor: F64, n: int, fps: float) -> F64:
    """Mean square distance to bounces of a free height on a floor near `floor`, gravity within a factor of 1.75."""
    curves, mean, square, periods = _bounces(n, fps)
    middle = y.mean(1)
    centred = y - middle[:, None]
    dot = centred @ curves.T / n
    reach = -dot / square
    miss = (centred**2).mean(1)[:, None] - dot**2 / square
    gravity = 8 * reach / periods**2
    land = middle[:, None] + reach * mean
    allowed = (gravity > GRAVITY / 1.75) & (gravity < GRAVITY * 1.75) & (np.abs(land - floor[:, None]) < AT_FLOOR)
    return np.where(allowed, miss, np.inf).min(1)


@lru_cache(maxsize=64)
def _bounces(n: int, fps: float) -> tuple[F64, F64, F64, F64]:
    """Centred height curves of bounces of height 1 [curves, n], their means and mean squares, and periods."""
    t = np.arange(n) / fps
    period, phase = (a.ravel() for a in np.meshgrid(_PERIODS, _PHASES))
    turn = np.mod(t / period[:, None] + phase[:, None], 1.0)
    curves = 4 * turn * (1 - turn)
    mean = curves.mean(1)
    curves = curves - mean[:, None]
    return curves, mean, np.maximum((curves**2).mean(1), 1e-9), period


def _orbit(x: F64, y: F64, n: int, fps: float) -> F64:
    """Mean square distance to circles of a free centre, radius (in bounds) and phase."""
    bases, back = _orbits(n, fps)
    path = np.concatenate([x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)], 1)
    coefficients = np.einsum("gnk,wn->wgk", bases, path)
    miss = ((path**2).sum(1)[:, None] - (coefficients**2).sum(2)) / n
    circle = np.einsum("gkl,wgl->wgk", back, coefficients)
    reach = np.hypot(circle[..., 0], circle[..., 1])
    return np.where((reach > 0.06) & (reach < 0.28), miss, np.inf).min(1)


@lru_cache(maxsize=64)
def _orbits(n: int, fps: float) -> tuple[F64, F64]:
    """Orthonormal bases [rates, 2 n, 4] of circles and their centres, and what turns coefficients into a circle's."""
    t = np.arange(n) / fps
    angle = 2 * np.pi * np.concatenate([_TURNS, -_TURNS])[:, None] * t
    cos, sin, one, zero = np.cos(angle), np.sin(angle), np.ones_like(angle), np.zeros_like(angle)
    columns = [np.concatenate(pair, 1) for pair in ((cos, sin), (-sin, cos), (one, zero), (zero, one))]
    q, r = np.linalg.qr(np.stack(columns, -1))
    return q, np.linalg.inv(r)[:, :2]
