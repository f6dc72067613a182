"""Sprites over time: one track per colour, its gaps, what hides it, and the motion that it shows in a window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.captions import COLOURS
from unspool.data.worlds.fitting import Sprites
from unspool.data.worlds.motion import MOTIONS
from unspool.data.worlds.render import RADII
from unspool.data.worlds.trajectories import best_motion, consistent, misfits

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CLEAR = 0.75
"""Visible share from which the shape of a sprite is judged."""
LEAST_SEEN = 0.7
"""Share of a window's frames in which a sprite must be seen for its motion to be judged."""
WINDOW_S = 3.0
"""Longest window whose motion is judged in one piece."""
SHORTEST_S = 0.55
"""Shortest window in which motions differ enough."""
SLIDING_S = 0.75
"""Window of the motion at an instant."""


@dataclass(frozen=True)
class Track:
    """One colour over all frames, arrays [f]; places in stage units, NaN where it is not seen. `hidden`: not seen, or
    seen in part only, where another sprite stands in its way."""

    colour: int
    seen: Bools
    x: F64
    y: F64
    radius: F64
    shape: Ints
    visible: F64
    hidden: Bools

    @property
    def size(self) -> Ints:
        """Nearest named size, -1 where not seen."""
        between = float(np.sqrt(RADII.prod()))
        return np.where(self.seen, (np.nan_to_num(self.radius) > between).astype(np.int64), -1)

    def speed(self, fps: float, frames: slice) -> float:
        """Mean speed in stage heights per second over an eighth of a second; NaN where it is never seen so long."""
        lag = max(1, round(fps / 8))
        x, y = self.x[frames], self.y[frames]
        if len(x) <= lag:
            return float("nan")
        way = np.hypot(x[lag:] - x[:-lag], y[lag:] - y[:-lag]) * fps / lag
        return _mean(way)

    def jerk(self, frames: slice) -> float:
        """Mean length of the third difference of the path, in stage heights per frame cubed."""
        x, y = self.x[frames], self.y[frames]
        return _mean(np.hypot(np.diff(x, 3), np.diff(y, 3)))

    def motions(self, windows: list[slice], fps: float) -> tuple[Bools, Ints]:
        """Over windows of one length: which motions each is consistent with [w, motions], and the best [w] or -1."""
        if not windows:
            return np.zeros((0, len(MOTIONS)), bool), np.zeros(0, np.int64)
        seen = np.array([self.seen[w].mean() for w in windows])
        frames = np.arange(len(self.seen))
        where = np.flatnonzero(self.seen)
        if not len(where):
            return np.zeros((len(windows), len(MOTIONS)), bool), np.full(len(windows), -1)
        x, y = np.interp(frames, where, self.x[where]), np.interp(frames, where, self.y[where])
        radius = np.array([np.nanmedian(self.radius[w]) if self.seen[w].any() else RADII[0] for w in windows])
        misfit = misfits(np.stack([x[w] for w in windows]), np.stack([y[w] for w in windows]), radius, fps)
        misfit[seen < LEAST_SEEN] = np.inf
        return consistent(misfit), best_motion(misfit)


def follow(sprites: Sprites, frames: int) -> tuple[list[Track], Ints]:
    """Tracks of all colours that are seen at all, and how many further sprites of a colour there are per frame."""
    tracks, spare = [], np.zeros(frames, np.int64)
    for colour in range(len(COLOURS)):
        index = np.flatnonzero(sprites.colour == colour)
        if not len(index):
            continue
        chosen, others = _choose(sprites, index)
        np.add.at(spare, sprites.frame[others], 1)
        tracks.append(_track(sprites.take(chosen), colour, frames))
    return _with_hidden(tracks), spare


def split(start: int, stop: int, fps: float) -> list[slice]:
    """Windows of one length that cover the frames; none if there are too few."""
    count = stop - start
    if count < round(SHORTEST_S * fps):
        return []
    parts = int(np.ceil(count / (WINDOW_S * fps) - 0.25))
    parts = max(1, parts)
    length = count // parts
    return [slice(start + k * length, start + (k + 1) * length) for k in range(parts)]


def sliding(frames: int, fps: float, stride: int = 2) -> tuple[list[slice], Ints]:
    """Short windows over all frames, and for each frame the one whose middle is nearest."""
    length = min(max(4, round(SLIDING_S * fps)), frames)
    starts = np.arange(0, frames - length + 1, stride)
    middle = starts + (length - 1) / 2
    nearest = np.abs(np.arange(frames)[:, None] - middle).argmin(1)
    return [slice(s, s + length) for s in starts.tolist()], nearest


def _choose(sprites: Sprites, index: Ints) -> tuple[Ints, Ints]:
    """One sprite per frame: the one nearest to the last place, else the biggest; and the others."""
    frame = sprites.frame[index]
    if len(np.unique(frame)) == len(frame):
        return index, index[:0]
    chosen: list[int] = []
    for at in np.unique(frame):
        here = index[frame == at]
        best = int(here[sprites.radius[here].argmax()])
        if chosen and len(here) > 1:
            last = chosen[-1]
            way = np.hypot(sprites.x[here] - sprites.x[last], sprites.y[here] - sprites.y[last])
            if at - sprites.frame[last] <= 4 and way.min() < 0.12:
                best = int(here[way.argmin()])
        chosen.append(best)
    taken = np.array(chosen)
    return taken, np.setdiff1d(index, taken)


def _track(sprites: Sprites, colour: int, frames: int) -> Track:
    seen = np.zeros(frames, bool)
    seen[sprites.frame] = True
    places = []
    for values in (sprites.x, sprites.y, sprites.radius, sprites.visible):
        place = np.full(frames, np.nan)
        place[sprites.frame] = values
        places.append(place)
    shape = np.full(frames, -1)
    shape[sprites.frame] = sprites.shape
    x, y, radius, visible = places
    return Track(colour, seen, x, y, radius, shape, visible, np.zeros(frames, bool))


def _with_hidden(tracks: list[Track]) -> list[Track]:
    """Where another sprite is in the way: little of it is visible, or it is gone where the other one stands."""
    out = []
    for track in tracks:
        hidden = track.seen & (np.nan_to_num(track.visible, nan=1.0) < CLEAR)
        where = np.flatnonzero(track.seen)
        frames = np.arange(len(track.seen))
        x, y = np.interp(frames, where, track.x[where]), np.interp(frames, where, track.y[where])
        for other in tracks:
            if other is not track:
                way = np.hypot(other.x - x, other.y - y)  # NaN, and so not less, where the other is not seen
                hidden |= ~track.seen & (way < 0.8 * (other.radius + np.nanmedian(track.radius)))
        hidden &= (frames >= where[0]) & (frames <= where[-1])
        out.append(Track(**{**track.__dict__, "hidden": hidden}))
    return out


def _mean(values: F64) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
