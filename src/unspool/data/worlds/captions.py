"""What the Sprite Stage is called: a small grammar with synonyms and word orders, and its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unspool.data.worlds.motion import MOTIONS

COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
SHAPES = ("ball", "square", "triangle", "star")
SIZES = ("small", "big")
SKIES = ("day", "sunset", "night")

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "golden"),
    "green": ("green", "green", "emerald"),
    "teal": ("teal", "cyan", "turquoise"),
    "blue": ("blue", "blue", "cobalt"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "magenta"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "ball", "sphere", "circle"),
    "square": ("square", "square", "box", "cube"),
    "triangle": ("triangle", "triangle", "pyramid"),
    "star": ("star",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
FINITE: dict[str, tuple[str, ...]] = {
    "bounces": ("bounces", "is bouncing", "hops", "jumps up and down"),
    "drifts left": ("drifts left", "drifts to the left", "moves left", "glides to the left", "is drifting left"),
    "drifts right": ("drifts right", "drifts to the right", "moves right", "glides to the right", "is drifting right"),
    "rises": ("rises", "is rising", "floats up", "goes up", "climbs"),
    "orbits": ("orbits", "is circling", "moves in circles", "goes round and round", "circles around"),
    "rests": ("rests", "is resting", "stays still", "sits still", "does not move"),
}
PARTICIPLE: dict[str, tuple[str, ...]] = {
    "bounces": ("bouncing", "hopping", "jumping"),
    "drifts left": ("drifting left", "moving left", "gliding left"),
    "drifts right": ("drifting right", "moving right", "gliding right"),
    "rises": ("rising", "climbing", "floating up"),
    "orbits": ("orbiting", "circling"),
    "rests": ("resting", "motionless", "still"),
}
SKY_WORDS: dict[str, tuple[str, ...]] = {
    "day": ("by day", "in daylight", "on a sunny day", "in the daytime", "under a bright sky"),
    "sunset": ("at sunset", "at dusk", "in the evening", "under a sunset sky"),
    "night": ("at night", "in the dark", "under a night sky", "by moonlight"),
}
_OPENINGS = ("", "", "", "", "a video of ", "there is ", "we see ")
_JOINS = (" and ", " and ", ", ", " while ", " next to ")


@dataclass(frozen=True, order=True)
class Look:
    """What a caption can say of one sprite, as indexes into COLOURS, SHAPES, MOTIONS, SIZES."""

    colour: int
    shape: int
    motion: int
    size: int

    @property
    def name(self) -> str:
        return f"{SIZES[self.size]} {COLOURS[self.colour]} {SHAPES[self.shape]} {MOTIONS[self.motion]}"


@dataclass(frozen=True)
class Caption:
    """A caption and what it states: `sky` and each sprite in order of mention, -1 for what is left open."""

    text: str
    sky: int
    sprites: tuple[tuple[int, int, int, int], ...]


def describe(looks: Sequence[Look], sky: int, rng: np.random.Generator, order: Sequence[int] | None = None) -> Caption:
    """A random wording of a scene. `order`: indexes of `looks` in order of mention (random when None).

    The size is left out of two captions in five, the sky of one in twelve; colour, shape and motion are always said.
    """
    order = [int(i) for i in rng.permutation(len(looks))] if order is None else order
    sized = rng.random() < 0.6
    opening = _pick(rng, _OPENINGS)
    parts, said = [], []
    for index in order:
        look = looks[index]
        parts.append(_noun_phrase(look, sized, rng, is_sentence=not opening))
        said.append((look.colour, look.shape, look.motion, look.size if sized else -1))
    join = _pick(rng, _JOINS)
    text = (", ".join(parts[:-1]) + join + parts[-1]) if len(parts) > 1 else parts[0] if parts else "nothing"
    text = opening + text
    if rng.random() < 1 / 12:
        return Caption(text, -1, tuple(said))
    words = _pick(rng, SKY_WORDS[SKIES[sky]])
    text = f"{words}, {text}" if rng.random() < 0.3 else f"{text} {words}"
    return Caption(text, sky, tuple(said))


def plain(looks: Sequence[Look], sky: int, *, sized: bool = False) -> str:
    """The one fixed wording, as in the examples: "a red ball bounces and a blue star rests at night"."""
    parts = []
    for look in looks:
        words = [SIZES[look.size]] * sized + [COLOURS[look.colour], SHAPES[look.shape]]
        parts.append(f"{_article(words[0])} {' '.join(words)} {MOTIONS[look.motion]}")
    return " and ".join(parts or ["nothing"]) + " " + {"day": "by day"}.get(SKIES[sky], f"at {SKIES[sky]}")


def vocabulary() -> tuple[str, ...]:
    """Every word that the grammar can say, the commonest first where it matters for correcting typos, then by name."""
    texts: list[str] = ["a", "an", "the", "one", "and", "while", "next", "to", "that", "which", "nothing", "with", "in"]
    for table in (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, FINITE, PARTICIPLE, SKY_WORDS):
        for phrases in table.values():
            texts += phrases
    texts += [*_OPENINGS, "moving", "of", "sky", "ground", "two", "three", "then", "now", "scene", "sun", "moon"]
    words = [word for text in texts for word in re.findall(r"[a-z]+", text)]
    return tuple(dict.fromkeys(words))


def _noun_phrase(look: Look, sized: bool, rng: np.random.Generator, *, is_sentence: bool) -> str:
    """One sprite; only in a sentence of its own does it get a finite verb."""
    words = [_pick(rng, COLOUR_WORDS[COLOURS[look.colour]]), _pick(rng, SHAPE_WORDS[SHAPES[look.shape]])]
    if sized:
        words.insert(0, _pick(rng, SIZE_WORDS[SIZES[look.size]]))
    motion = MOTIONS[look.motion]
    form = rng.random() if is_sentence else 0.6 + 0.4 * rng.random()
    if form < 0.6:
        return f"{_article(words[0])} {' '.join(words)} {_pick(rng, FINITE[motion])}"
    if form < 0.75:
        return f"{_article(words[0])} {' '.join(words)} that {_pick(rng, FINITE[motion])}"
    participle = _pick(rng, PARTICIPLE[motion])
    if form < 0.9 and " " not in participle:
        return f"{_article(participle)} {participle} {' '.join(words)}"
    return f"{_article(words[0])} {' '.join(words)} {participle}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.random() * len(choices))]
