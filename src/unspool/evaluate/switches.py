"""A change of prompt in a running stream: when the new attributes hold, and whether the rest stays as it was.

The delay counts from the moment at which the prompt is given. It takes effect at the first chunk that begins then or
later, so one clip serves all phases of the chunk grid: the wait for the boundary is added to the delay from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.captions import Caption, Look
from unspool.data.worlds.scorer import ATTRIBUTES, HOLD_S, RIGHT, Analysis, agreement, analyse, first_held, score
from unspool.data.worlds.stage import Prompt, Scene, frame_times
from unspool.evaluate.measures import Format, Frames, Values


@dataclass(frozen=True)
class Wanted:
    """What a new caption changes. `new`: the attributes that change and nothing else; `alone`: the number of sprites or
    a colour changes, so that nothing beside the caption's sprites may be left; `kept`: (sprite of the old caption,
    sprite of the new one, attribute) that both state and that stays; `keeps_sky`."""

    old: Caption
    full: Caption
    new: Caption
    alone: bool
    kept: tuple[tuple[int, int, str], ...]
    keeps_sky: bool

    @property
    def says_something(self) -> bool:
        """Whether the new caption states a change."""
        return self.alone or bool(self.new.sprites) or self.new.sky >= 0


def wanted(scene: Scene) -> Wanted:
    """What the second prompt of `scene` changes."""
    old, full = scene.prompts[0].caption, scene.prompts[1].caption
    before, after = dict(scene.looks(0.0)), dict(scene.looks(scene.prompts[1].time))
    rows_before, rows_after = _rows(old, before), _rows(full, after)
    sprites, kept = [], []
    for actor, look in after.items():
        stated = full.sprites[rows_after[actor]]
        earlier = before.get(actor)
        changed = [a for a in ATTRIBUTES if earlier is None or getattr(look, a) != getattr(earlier, a)]
        if changed:  # the colour is how a sprite is found, so it is always asked for
            kept_open = (v if a in changed or a == "colour" else -1 for a, v in zip(ATTRIBUTES, stated, strict=True))
            colour, shape, motion, size = kept_open
            sprites.append((colour, shape, motion, size))
        if earlier is not None:
            first = old.sprites[rows_before[actor]]
            for a, was, now in zip(ATTRIBUTES, first, stated, strict=True):
                if a not in changed and was >= 0 and now >= 0:
                    kept.append((rows_before[actor], rows_after[actor], a))
    has_new_sky = full.sky >= 0 and scene.sky(0.0) != scene.sky(scene.prompts[1].time)
    return Wanted(
        old=old,
        full=full,
        new=Caption("", full.sky if has_new_sky else -1, tuple(sprites)),
        alone={k.colour for k in before.values()} != {k.colour for k in after.values()},
        kept=tuple(kept),
        keeps_sky=old.sky >= 0 and full.sky == old.sky,
    )


def measure_switch(frames: Frames | None, scene: Scene, at_s: float, num_frames: int, form: Format) -> Values:
    """Seconds from the change at `at_s` until it holds (`delay`, infinity for never), whether it held before already
    (`before`), and shares of what should stay: `untouched` of what was right before, `untouched_all` of all.

    Without frames the truth is measured, whose change begins at the scene's own time.
    """
    if frames is None:
        at_s = scene.prompts[1].time
        count = round(at_s * form.fps) + num_frames
        frames = scene.render(frame_times(count, form.fps), form.height, form.width)
    analysis, goal = analyse(frames, form.fps), wanted(scene)
    good, start = holds(analysis, goal), round(at_s * form.fps)
    earlier = good[max(0, start - round(HOLD_S * form.fps)) : start]
    was, still = _kept(analysis, goal, start)
    return {
        "delay": first_held(good, form.fps, start_s=at_s),
        "before": float(earlier.mean() > 0.5),
        "untouched": _mean([s for w, s in zip(was, still, strict=True) if w]),
        "untouched_all": _mean(still),
    }


def holds(analysis: Analysis, goal: Wanted) -> NDArray[np.bool_]:
    """Per frame, whether it shows all that is new."""
    good = agreement(analysis, goal.new)
    names = ("sky", *ATTRIBUTES)
    shown = np.logical_and.reduce([good[name] for name in names])
    return shown & agreement(analysis, goal.full)["alone"] if goal.alone else shown


def _kept(analysis: Analysis, goal: Wanted, start: int) -> tuple[list[bool], list[bool]]:
    """Whether each attribute that should stay was right before frame `start`, and whether it is after it."""
    prompts = [Prompt(0.0, goal.old), Prompt(start / analysis.fps, goal.full)]
    before = score(analysis, prompts, span=(0, start))
    after = score(analysis, prompts, span=(start, analysis.frames))
    was, still = [], []
    for i, j, name in goal.kept:
        first, second = before.sprites[i][name], after.sprites[j][name]
        if math.isfinite(first) and math.isfinite(second):
            was.append(first >= RIGHT)
            still.append(second >= RIGHT)
    if goal.keeps_sky and math.isfinite(before.sky) and math.isfinite(after.sky):
        was.append(before.sky >= RIGHT)
        still.append(after.sky >= RIGHT)
    return was, still


def _rows(caption: Caption, looks: dict[int, Look]) -> dict[int, int]:
    """Actor -> its place in the caption; colours tell the sprites of a scene apart."""
    places = {sprite[0]: place for place, sprite in enumerate(caption.sprites)}
    return {actor: places[look.colour] for actor, look in looks.items()}


def _mean(values: list[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")
