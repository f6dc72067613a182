"""Motions of the Sprite Stage: positions as closed forms of time, so any frame rate shows the same motion.

The stage is the unit square, x to the right, y downwards, time in seconds. A motion has no end and never leaves the
stage: what drifts or rises slows down before the border and stays there; nothing wraps round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOTIONS = ("bounces", "drifts left", "drifts right", "rises", "orbits", "rests")
BOUNCES, LEFT, RIGHT, RISES, ORBITS, RESTS = range(6)

FLOOR = 0.88
"""Height of the ground that things stand on."""
MARGIN = 0.03
"""What stays free between a sprite and the border."""
GRAVITY = 1.4
"""Stage heights per second squared: a bounce of 0.4 takes 1.5 s, and moves 0.3 in 4 frames at the most."""
EASE_S = 0.5
"""Seconds in which one motion passes into the next."""
EXTENT = 1.3
"""Half-extent of the widest shape in radii."""


@dataclass(frozen=True)
class Motion:
    """One motion from time `start` on. `x`, `y` where it begins (orbits: the centre); the rest depends on the kind.

    `rate`: speed of a drift or rise (1/s), or turns per second (signed) of an orbit; `reach`: height of a bounce or
    radius of an orbit; `phase` in turns; `end` where a drift or rise comes to rest.
    """

    kind: int
    start: float
    x: float
    y: float
    rate: float = 0.0
    reach: float = 0.0
    phase: float = 0.0
    end: float = 0.0

    def at(self, times: Floats) -> tuple[Floats, Floats]:
        """x and y at `times` [n]; before `start` the motion is continued backwards."""
        since = times - self.start
        x, y = np.full_like(since, self.x), np.full_like(since, self.y)
        if self.kind == BOUNCES:
            turn = np.mod(since / period_of(self.reach) + self.phase, 1.0)
            y = y - self.reach * 4.0 * turn * (1.0 - turn)
        elif self.kind == ORBITS:
            angle = 2.0 * math.pi * (self.rate * since + self.phase)
            x, y = x + self.reach * np.cos(angle), y + self.reach * np.sin(angle)
        elif self.kind in (LEFT, RIGHT):
            x = _approach(self.x, self.end, self.rate, since)
        elif self.kind == RISES:
            y = _approach(self.y, self.end, self.rate, since)
        return x, y


def period_of(height: float) -> float:
    """Seconds of one bounce of `height`."""
    return 2.0 * math.sqrt(2.0 * height / GRAVITY)


def border(radius: float) -> float:
    """The nearest that a sprite's centre comes to the left, right or upper border."""
    return EXTENT * radius + MARGIN


def floor_of(radius: float) -> float:
    """Centre height of a sprite that stands on the ground (every shape reaches about 0.85 radii down)."""
    return FLOOR - 0.85 * radius


def smoothstep(u: Floats) -> Floats:
    """0 below 0, 1 above 1, `3 u^2 - 2 u^3` between."""
    u = np.clip(u, 0.0, 1.0)
    return u * u * (3.0 - 2.0 * u)


def path(motions: tuple[Motion, ...], times: Floats) -> tuple[Floats, Floats]:
    """Positions under a sequence of motions: each passes into the next within EASE_S, position and velocity smooth."""
    x, y = motions[0].at(times)
    for motion in motions[1:]:
        weight = smoothstep((times - motion.start) / EASE_S)
        new_x, new_y = motion.at(times)
        x, y = x + weight * (new_x - x), y + weight * (new_y - y)
    return x, y


def begin(
    kind: int, start: float, radius: float, rng: np.random.Generator, where: tuple[float, float] | None
) -> Motion:
    """A motion of `kind` with random details, from `where` (its whole path stays near) or from anywhere."""
    low, high, floor = border(radius), 1.0 - border(radius), floor_of(radius)
    u = rng.random(6)
    x = low + (high - low) * u[0] if where is None else min(max(where[0], low), high)
    y = low + (floor - low) * u[1] if where is None else min(max(where[1], low), floor)
    if kind == BOUNCES:
        return _bounce(start, x, floor, floor - y if where else 0.0, 0.25 + 0.25 * u[2], u[3], where is not None)
    if kind in (LEFT, RIGHT):
        end = low if kind == LEFT else high
        if where is None:  # begin on the far side, with room to travel
            x = end + (high - low) * (0.6 + 0.4 * u[0]) * (1 if kind == LEFT else -1)
        return Motion(kind, start, x, y, rate=0.11 + 0.09 * u[2], end=end)
    if kind == RISES:
        if where is None:
            y = floor - 0.15 * u[1]
        return Motion(kind, start, x, y, rate=0.11 + 0.07 * u[2], end=low)
    if kind == ORBITS:
        reach = 0.12 + 0.07 * u[2]
        x = min(max(x, low + reach), high - reach)
        y = min(max(y, low + reach), floor - reach)
        rate = (0.28 + 0.17 * u[3]) * (1 if u[4] < 0.5 else -1)
        return Motion(kind, start, x, y, rate=rate, reach=reach, phase=u[5])
    return Motion(RESTS, start, x, floor)


def _bounce(start: float, x: float, floor: float, height: float, reach: float, phase: float, falling: bool) -> Motion:
    """A bounce; `falling` begins at `height` above the floor, on the way down."""
    if falling:
        reach = max(reach, height)
        phase = 0.5 * (1.0 + math.sqrt(max(0.0, 1.0 - height / reach)))
    return Motion(BOUNCES, start, x, floor, reach=reach, phase=phase)


def _approach(begin_at: float, end: float, speed: float, since: Floats) -> Floats:
    """From `begin_at` towards `end` at `speed`, slowing down over the last of the way."""
    way = end - begin_at
    if abs(way) < 1e-9:
        return np.full_like(since, end)
    knee = min(0.5, 0.06 / abs(way))
    z = np.maximum(since, 0.0) * speed / abs(way)
    bent = z - (z - (1.0 - knee)) ** 2 / (4.0 * knee)
    done = np.where(z < 1.0 - knee, z, np.where(z < 1.0 + knee, bent, 1.0))
    return begin_at + way * done
