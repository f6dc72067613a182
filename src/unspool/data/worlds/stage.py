"""The Sprite Stage: one to three shaded sprites that move under a sky, with captions, events and exact truth.

A scene is a pure function of (split, index): clip i of a split is always the same clip, whatever was asked before. Its
state is a closed form of time in seconds, so any frame rate and resolution shows the same motion. Compositions that
the training split never shows are the split "heldout".
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds import motion as moves
from unspool.data.worlds.captions import COLOURS, SHAPES, SIZES, SKIES, Caption, Look, describe
from unspool.data.worlds.keyed import value_at, weights_at
from unspool.data.worlds.motion import MOTIONS, Motion
from unspool.data.worlds.render import PALETTE, RADII, Drawn, draw
from unspool.data.worlds.splits import SPLITS, Split, is_held_out

EVENTS = ("recolour", "reshape", "move", "add", "remove", "sky", "swap", "scene")
"""Kinds of event; "swap" changes colour, shape and motion of a sprite together, "scene" that of all and the sky."""

MORPH_S = 0.25
"""Seconds that a new colour or shape takes."""
GROW_S = 0.3
"""Seconds in which a sprite grows in or shrinks away."""
SKY_FADE_S = 0.5
_TRIES = 24
MOST_CROWDED = 0.12  # largest share of a clip in which sprites may cover each other


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Which stages are drawn. Fields: `sprites` weights of 1, 2, 3 sprites; the attributes in use (names); `events`
    weights of 0, 1, 2 events in a clip; `event_kinds`; `on_grid` share of events that begin with a chunk of `chunk`
    latent frames; `seconds` over which sprites keep clear of each other and events fall.

    Raises ValueError for unknown names or weights that are no weights.
    """

    sprites: tuple[float, ...] = (0.5, 0.38, 0.12)
    colours: tuple[str, ...] = COLOURS
    shapes: tuple[str, ...] = SHAPES
    motions: tuple[str, ...] = MOTIONS
    sizes: tuple[str, ...] = SIZES
    skies: tuple[str, ...] = SKIES
    events: tuple[float, ...] = (0.45, 0.4, 0.15)
    event_kinds: tuple[str, ...] = EVENTS
    on_grid: float = 0.75
    seconds: float = 5.0
    fps: float = 16.0
    chunk: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("colours", COLOURS), ("shapes", SHAPES), ("motions", MOTIONS), ("sizes", SIZES), ("skies", SKIES),
            ("event_kinds", EVENTS),
        ):  # fmt: skip
            given = getattr(self, name)
            if not given or any(item not in known for item in given):
                raise ValueError(f"StageConfig.{name}={given}: expected some of {known}")
        for name, most in (("sprites", 3), ("events", 2)):
            weights = getattr(self, name)
            limit = most + (name == "events")
            if not 1 <= len(weights) <= limit or min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(f"StageConfig.{name}={weights}: expected up to {limit} weights, not all zero")
        if self.seconds <= 0 or self.fps <= 0 or self.chunk < 1:
            raise ValueError(f"seconds={self.seconds}, fps={self.fps}, chunk={self.chunk}: expected positive values")


@dataclass(frozen=True)
class Actor:
    """One sprite over the whole clip: what it is from which time on, each key (time, value) in order of time."""

    colour: tuple[tuple[float, int], ...]
    shape: tuple[tuple[float, int], ...]
    size: int
    motions: tuple[Motion, ...]
    born: float = -math.inf
    gone: float = math.inf

    def look(self, time: float) -> Look:
        """What a caption says at `time`: the last change that has begun."""
        motion = [m.kind for m in self.motions if m.start <= time] or [self.motions[0].kind]
        return Look(value_at(self.colour, time), value_at(self.shape, time), motion[-1], self.size)

    def exists(self, time: float) -> bool:
        return self.born <= time < self.gone

    def path(self, times: moves.Floats) -> tuple[moves.Floats, moves.Floats]:
        """Centre x and y at `times` [n] in stage units."""
        return moves.path(self.motions, times)

    def drawn(self, times: moves.Floats) -> Drawn:
        """The same as arrays for `render.draw`."""
        x, y = self.path(times)
        grown = moves.smoothstep((times - self.born) / GROW_S) * moves.smoothstep((self.gone + GROW_S - times) / GROW_S)
        colour = weights_at(self.colour, times, len(COLOURS), MORPH_S) @ PALETTE
        shape = weights_at(self.shape, times, len(SHAPES), MORPH_S)
        f32 = np.float32
        return Drawn(x.astype(f32), y.astype(f32), (RADII[self.size] * grown).astype(f32), colour, shape)


@dataclass(frozen=True)
class Event:
    """One change: its kind, when it begins, and which actor it concerns (None: the sky or all)."""

    kind: str
    time: float
    actor: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption with what it states, and the time from which it holds."""

    time: float
    caption: Caption


@dataclass(frozen=True)
class Scene:
    """One clip: actors, sky keys (time, sky), events, and the prompts that describe it in order of time."""

    actors: tuple[Actor, ...]
    skies: tuple[tuple[float, int], ...]
    events: tuple[Event, ...] = ()
    prompts: tuple[Prompt, ...] = field(default=(), compare=False)

    def looks(self, time: float) -> list[tuple[int, Look]]:
        """(actor, look) of every sprite that is on the stage at `time` or about to come."""
        return [(i, actor.look(time)) for i, actor in enumerate(self.actors) if actor.exists(time)]

    def sky(self, time: float) -> int:
        return value_at(self.skies, time)

    def render(self, times: moves.Floats, height: int, width: int | None = None) -> NDArray[np.uint8]:
        """Frames uint8 [n, height, width, 3] at `times` [n] seconds."""
        times = np.asarray(times, np.float64)
        sprites = [actor.drawn(times) for actor in self.actors]
        sky = weights_at(self.skies, times, len(SKIES), SKY_FADE_S)
        return draw(sprites, sky, height=height, width=width or height)

    def prompt_index(self, num_latent: int, fps: float, temporal: int = 4, *, start: float = 0.0) -> NDArray[np.int64]:
        """Which of `prompts` each latent frame follows: the one that holds at its last pixel frame (1 + 4k frames, of
        a clip that begins at `start` seconds)."""
        last = start + np.arange(num_latent) * temporal / fps
        starts = np.array([p.time for p in self.prompts[1:]])
        return np.searchsorted(starts, last + 1e-9, side="right")


def frame_times(num_frames: int, fps: float) -> moves.Floats:
    """Times in seconds of `num_frames` frames from 0 on."""
    return np.arange(num_frames) / fps


class Stage:
    """All clips of one configuration: `stage.scene("test", 7)`."""

    def __init__(self, config: StageConfig | None = None) -> None:
        self.config = config or StageConfig()

    def scene(self, split: Split, index: int, *, sprites: int | None = None, events: int | None = None) -> Scene:
        """Clip `index` of `split`, with captions; `sprites`, `events` fix their numbers. Raises ValueError for an
        unknown split or a negative index."""
        if split not in SPLITS or index < 0:
            raise ValueError(f"split={split!r}, index={index}: expected one of {SPLITS} and an index of at least 0")
        key = zlib.crc32(f"{split}/{sprites}/{events}".encode()) | self.config.seed << 32
        rng = np.random.Generator(np.random.Philox(key=[key, index]))
        count = 1 + _choose(rng, self.config.sprites) if sprites is None else sprites
        num_events = _choose(rng, self.config.events) if events is None else events
        for _ in range(64):
            director = _Director(self.config, rng, held_out=split == "heldout")
            scene = director.direct(count, num_events)
            if scene is not None:
                return scene
        raise ValueError(
            f"{count} sprites of {self.config.colours} leave no scene of split {split!r}; allow more of them"
        )

    def rearranged(self, scene: Scene, number: int) -> Scene:
        """Arrangement `number` of the sprites of a scene without events: the same prompt, other places and phases.
        Raises ValueError for a scene with events."""
        if scene.events:
            raise ValueError(f"a scene with {len(scene.events)} events; expected one without")
        looks = [look for _, look in scene.looks(0.0)]
        key = zlib.crc32(repr((scene.actors, scene.skies)).encode()) | self.config.seed << 32
        rng = np.random.Generator(np.random.Philox(key=[key, number]))
        for _ in range(64):
            actors = _Director(self.config, rng, held_out=False)._place(looks)
            if actors is not None:
                return replace(scene, actors=actors)
        raise ValueError(f"no arrangement of {len(looks)} sprites in which they do not hide each other")


class _Director:
    """Makes up one scene: what is on the stage, where, and what happens."""

    def __init__(self, config: StageConfig, rng: np.random.Generator, *, held_out: bool) -> None:
        self.config, self.rng, self.held_out = config, rng, held_out

    def direct(self, count: int, num_events: int) -> Scene | None:
        looks = self._composition(count)
        if looks is None:
            return None
        actors = self._place(looks)
        if actors is None:
            return None
        scene = Scene(actors, ((-math.inf, self._pick(self.config.skies, SKIES)),))
        for time in self._event_times(num_events):
            scene = self._happen(scene, time)
        if self.held_out != any(is_held_out([k for _, k in scene.looks(t)]) for t in self._moments(scene)):
            return None
        return replace(scene, prompts=self._describe(scene))

    # ---- the beginning -----------------------------------------------------------------------------------------

    def _composition(self, count: int) -> list[Look] | None:
        """Looks of different colours that belong to the split."""
        for _ in range(_TRIES):
            colours = self.rng.permutation(len(self.config.colours))[:count]
            looks = [self._look(COLOURS.index(self.config.colours[c])) for c in colours]
            if count == 3 and sum(SIZES[look.size] == "big" for look in looks) > 1:
                continue  # three sprites stand clear of each other only if most of them are small
            if len(looks) == count and is_held_out(looks) == self.held_out:
                return looks
        return None

    def _look(self, colour: int) -> Look:
        config = self.config
        shape, motion = self._pick(config.shapes, SHAPES), self._pick(config.motions, MOTIONS)
        return Look(colour, shape, motion, self._pick(config.sizes, SIZES))

    def _place(self, looks: list[Look]) -> tuple[Actor, ...] | None:
        """The arrangement of the fewest encounters out of some; None where sprites hide each other all the same."""
        best: tuple[float, tuple[Actor, ...]] | None = None
        for _ in range(_TRIES):
            actors = tuple(self._actor(look, 0.0) for look in looks)
            cost = crowding(actors, self._times())
            if best is None or cost < best[0]:
                best = (cost, actors)
            if cost <= 0.02:
                break
        assert best is not None
        return best[1] if best[0] <= MOST_CROWDED else None

    def _actor(self, look: Look, time: float, *, born: float = -math.inf) -> Actor:
        motion = moves.begin(look.motion, time, float(RADII[look.size]), self.rng, None)
        return Actor(((-math.inf, look.colour),), ((-math.inf, look.shape),), look.size, (motion,), born=born)

    def _times(self) -> moves.Floats:
        return np.arange(0.0, self.config.seconds, 0.2)

    # ---- events ------------------------------------------------------------------------------------------------

    def _event_times(self, count: int) -> list[float]:
        """Times at least 1.2 s apart; most begin with a chunk (its first pixel frame)."""
        config = self.config
        times: list[float] = []
        per_chunk = 4 * config.chunk
        for _ in range(8 * count):
            if len(times) == count:
                break
            time = 0.7 + self.rng.random() * (config.seconds - 1.7)
            frame = round(time * config.fps)
            if self.rng.random() < config.on_grid:
                frame = max(round((frame + 3) / per_chunk), 1) * per_chunk - 3
            time = frame / config.fps
            if time < config.seconds - 0.7 and all(abs(time - other) >= 1.2 for other in times):
                times.append(time)
        return sorted(times)

    def _happen(self, scene: Scene, time: float) -> Scene:
        """The scene with one more event that is possible in it."""
        for _ in range(_TRIES):
            kind = self.config.event_kinds[int(self.rng.integers(len(self.config.event_kinds)))]
            present = [i for i, _ in scene.looks(time)]
            if kind == "add":
                changed = self._add(scene, time) if len(present) < min(3, len(self.config.colours)) else None
            elif kind == "sky":
                changed = self._new_sky(scene, time)
            elif kind == "scene":
                changed = self._new_scene(scene, time)
            else:
                changed = self._change(scene, time, kind, present[int(self.rng.integers(len(present)))])
            if changed is not None and is_held_out([k for _, k in changed.looks(time)]) <= self.held_out:
                return changed
        return scene

    def _change(self, scene: Scene, time: float, kind: str, which: int) -> Scene | None:
        actor = scene.actors[which]
        if kind == "remove":
            if len(scene.looks(time)) < 2:
                return None
            new = replace(actor, gone=time)
        else:
            new = self._altered(actor, scene, time, kind)
        if new == actor:
            return None
        actors = (*scene.actors[:which], new, *scene.actors[which + 1 :])
        after = self._times()[self._times() >= time]
        if kind in ("move", "swap") and crowding(actors, after) > max(0.1, crowding(scene.actors, after)):
            return None
        return replace(scene, actors=actors, events=(*scene.events, Event(kind, time, which)))

    def _altered(self, actor: Actor, scene: Scene, time: float, kind: str) -> Actor:
        """The actor with another colour, shape, motion, or ("swap") all three."""
        look = actor.look(time)
        if kind in ("recolour", "swap"):
            taken = {k.colour for _, k in scene.looks(time)}
            free = [COLOURS.index(c) for c in self.config.colours if COLOURS.index(c) not in taken]
            if free:
                actor = replace(actor, colour=(*actor.colour, (time, free[int(self.rng.integers(len(free)))])))
        if kind in ("reshape", "swap"):
            shape = self._pick(self.config.shapes, SHAPES)
            if shape != look.shape:
                actor = replace(actor, shape=(*actor.shape, (time, shape)))
        if kind in ("move", "swap"):
            motion = self._pick(self.config.motions, MOTIONS)
            if motion != look.motion:
                x, y = actor.path(np.array([time]))
                where = (float(x[0]), float(y[0]))
                begun = moves.begin(motion, time, float(RADII[actor.size]), self.rng, where)
                actor = replace(actor, motions=(*actor.motions, begun))
        return actor

    def _add(self, scene: Scene, time: float) -> Scene | None:
        taken = {k.colour for _, k in scene.looks(time)}
        free = [c for c in self.config.colours if COLOURS.index(c) not in taken]
        look = self._look(COLOURS.index(free[int(self.rng.integers(len(free)))]))
        after = self._times()[self._times() >= time]
        for _ in range(_TRIES):
            actors = (*scene.actors, self._actor(look, time, born=time))
            if crowding(actors, after) <= max(0.02, crowding(scene.actors, after)):
                return replace(scene, actors=actors, events=(*scene.events, Event("add", time, len(actors) - 1)))
        return None

    def _new_sky(self, scene: Scene, time: float) -> Scene | None:
        sky = self._pick(self.config.skies, SKIES)
        if sky == scene.sky(time):
            return None
        return replace(scene, skies=(*scene.skies, (time, sky)), events=(*scene.events, Event("sky", time)))

    def _new_scene(self, scene: Scene, time: float) -> Scene | None:
        """Every sprite becomes another one and the sky may change: a prompt that has nothing to do with the last."""
        changed = self._new_sky(scene, time) or scene
        for which, _ in scene.looks(time):
            changed = self._change(changed, time, "swap", which) or changed
        if changed is scene:
            return None
        return replace(changed, events=(*scene.events, Event("scene", time)))

    # ---- words -------------------------------------------------------------------------------------------------

    def _moments(self, scene: Scene) -> list[float]:
        return [0.0, *(event.time for event in scene.events)]

    def _describe(self, scene: Scene) -> tuple[Prompt, ...]:
        prompts: list[Prompt] = []
        order: list[int] | None = None
        for time in self._moments(scene):
            looks = scene.looks(time)
            known = order is not None and self.rng.random() < 0.7
            order = [i for i in order or [] if i in dict(looks)] if known else []
            order += [int(i) for i in self.rng.permutation([i for i, _ in looks]) if i not in order]
            names = [i for i, _ in looks]
            caption = describe([k for _, k in looks], scene.sky(time), self.rng, [names.index(i) for i in order])
            prompts.append(Prompt(time, caption))
        return tuple(prompts)

    def _pick(self, allowed: tuple[str, ...], names: tuple[str, ...]) -> int:
        return names.index(allowed[int(self.rng.integers(len(allowed)))])


def crowding(actors: tuple[Actor, ...], times: moves.Floats) -> float:
    """Share of `times` at which two sprites are nearer than 0.95 of the sum of their radii."""
    if len(actors) < 2 or not len(times):
        return 0.0
    close = np.zeros(len(times), bool)
    paths = [actor.path(times) for actor in actors]
    for i, j in combinations(range(len(actors)), 2):
        a, b = actors[i], actors[j]
        together = (times >= max(a.born, b.born)) & (times < min(a.gone, b.gone))
        reach = 0.95 * float(RADII[a.size] + RADII[b.size])
        near = np.hypot(paths[i][0] - paths[j][0], paths[i][1] - paths[j][1]) < reach
        close |= near & together
    return float(close.mean())


def _choose(rng: np.random.Generator, weights: tuple[float, ...]) -> int:
    return int(np.searchsorted(np.cumsum(weights) / sum(weights), rng.random(), side="right"))
