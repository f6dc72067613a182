"""Diversity: how differently a model arranges one prompt, against the stage's own arrangements of it.

A caption leaves open where sprites stand and in which phase they move. A distilled model can lose that and show one
clip per prompt while every other score stays high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.scorer import analyse
from unspool.data.worlds.stage import Scene, Stage, frame_times
from unspool.evaluate import stats
from unspool.evaluate.measures import Format, Frames, Values
from unspool.evaluate.stats import Interval

F64 = NDArray[np.float64]

START_S, COURSE_S = 0.5, 1.0
"""Seconds within which a sprite must first be seen, and after which its course is read."""
FIXED = 1e-9
"""Variance up to which a state counts as fixed, so that nothing is divided by rounding."""
STATES = ("start_x", "start_y", "course_x", "course_y")
"""Where a sprite is first seen, and how far it has come after `COURSE_S`, in stage units."""


def measure_states(frames: Frames, scene: Scene, form: Format) -> Values:
    """The states of each prompted sprite as "<state>.<colour>", as the scorer sees them in pixels; NaN for a sprite
    that is not seen where it is needed."""
    lag = round(COURSE_S * form.fps)
    tracks = {track.colour: track for track in analyse(frames, form.fps).tracks}
    out: Values = {}
    for colour in (actor.look(0.0).colour for actor in scene.actors):  # no two of them are alike
        values = [math.nan] * len(STATES)
        track = tracks.get(colour)
        if track is not None and track.seen[: round(START_S * form.fps)].any():
            first = int(track.seen.argmax())
            if first + lag < len(frames):
                x, y = (float(place[first]) for place in (track.x, track.y))
                values = [x, y, float(track.x[first + lag]) - x, float(track.y[first + lag]) - y]
        out.update({f"{name}.{colour}": value for name, value in zip(STATES, values, strict=True)})
    return out


def drawn_states(stage: Stage, scene: Scene, count: int) -> list[Values]:
    """The same of `count` other arrangements that the stage makes of the scene's prompt, without noise of a scorer."""
    out: list[Values] = []
    for number in range(count):
        values: Values = {}
        for actor in stage.rearranged(scene, number).actors:
            x, y = actor.path(frame_times(2, 1.0 / COURSE_S))
            course = (x[1] - x[0], y[1] - y[0])
            found = (x[0], y[0], *course)
            values.update(
                {f"{name}.{actor.look(0.0).colour}": float(value) for name, value in zip(STATES, found, strict=True)}
            )
        out.append(values)
    return out


def spreads(values: Sequence[Values], clusters: Sequence[int]) -> dict[int, F64]:
    """Prompt -> variance of each of `STATES` over its clips [4], the mean over its sprites; sprites that fewer than
    three clips show, and prompts without any other, are left out."""
    out: dict[int, F64] = {}
    for cluster in sorted(set(clusters)):
        own = [v for v, c in zip(values, clusters, strict=True) if c == cluster]
        sprites = {name.rpartition(".")[2] for name in own[0]}
        found = []
        for sprite in sorted(sprites):
            states = np.array([[v[f"{name}.{sprite}"] for name in STATES] for v in own])
            states = states[~np.isnan(states).any(1)]
            if len(states) >= 3:
                found.append(states.var(0, ddof=1))
        if found:
            out[cluster] = np.mean(found, 0)
    return out


def diversity(own: dict[int, F64], truth: dict[int, F64], resamples: int) -> dict[str, Interval]:
    """ "start", "course" and both ("diversity"): the model's spread over that of the truth, as a ratio of standard
    deviations over the prompts that both have. 1 is as diverse as the stage, 0 one clip per prompt; above 1 what should
    be fixed by the prompt is not."""
    both = sorted(own.keys() & truth.keys())
    if not both:
        return {}
    a, b = (np.stack([rows[cluster] for cluster in both]) for rows in (own, truth))
    scale = np.where(b.mean(0) > FIXED, b.mean(0), np.inf)
    parts = {"start": slice(0, 2), "course": slice(2, 4), "diversity": slice(0, 4)}
    return {name: _root_ratio((a / scale)[:, part], (b / scale)[:, part], both, resamples)
            for name, part in parts.items()}  # fmt: skip


def _root_ratio(a: F64, b: F64, clusters: list[int], resamples: int) -> Interval:
    found = stats.ratio(a.sum(1), b.sum(1), clusters, resamples=resamples)
    value, low, high = np.sqrt([found.value, found.low, found.high]).tolist()  # NaN stays
    return Interval(value, low, high, found.n)
