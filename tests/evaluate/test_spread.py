"""Diversity: what is read off pixels, and the ratio for models whose spread is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from unspool.data.worlds.stage import Stage, StageConfig
from unspool.evaluate.measures import Format, Values
from unspool.evaluate.protocol import SpreadProtocol
from unspool.evaluate.spread import STATES, diversity, drawn_states, measure_states, spreads

FORM = Format(height=64, width=64, fps=16.0, boundaries=())
STAGE = Stage()


def rows(arrangements: int, first: int = 0, prompts: int = 6) -> tuple[list[Values], list[int]]:
    """States of `arrangements` arrangements of each prompt, from number `first` on."""
    values: list[Values] = []
    for index in range(prompts):
        scene = STAGE.scene("test", index, sprites=2, events=0)
        values += drawn_states(STAGE, scene, first + arrangements)[first:]
    return values, [index for index in range(prompts) for _ in range(arrangements)]


@pytest.mark.parametrize("index", [0, 3, 5])
def test_states_are_read_off_pixels(index: int) -> None:
    scene = STAGE.scene("test", index, sprites=2, events=0)
    other = STAGE.rearranged(scene, 4)
    found = measure_states(FORM.render(other, 25), other, FORM)
    drawn = drawn_states(STAGE, scene, 5)[4]
    assert set(found) == set(drawn) == {f"{name}.{a.look(0).colour}" for name in STATES for a in scene.actors}
    for name, value in found.items():
        # a sprite that is hidden at first has moved on by the time that it is seen
        assert math.isnan(value) or abs(value - drawn[name]) < 0.05, name
    assert sum(math.isnan(value) for value in found.values()) <= len(STATES), "at most one sprite is hidden"


def test_another_arrangement_is_of_the_same_prompt() -> None:
    scene = STAGE.scene("test", 1, sprites=2, events=0)
    first, again, second = (STAGE.rearranged(scene, number) for number in (0, 0, 1))
    assert first.actors == again.actors != second.actors != scene.actors
    assert first.prompts == scene.prompts and [look for _, look in first.looks(0)] == [x for _, x in scene.looks(0)]
    with pytest.raises(ValueError, match="expected one without"):
        STAGE.rearranged(Stage(StageConfig(events=(0, 1, 0))).scene("test", 0), 0)


def test_the_truth_against_itself_is_one_and_a_single_clip_zero() -> None:
    truth = spreads(*rows(48))
    assert set(truth) == set(range(6)) and all(len(v) == len(STATES) for v in truth.values())
    own = diversity(spreads(*rows(48, first=48)), truth, 200)
    assert own.keys() == {"start", "course", "diversity"}
    assert all(abs(value.value - 1) < 0.15 and value.low <= value.value <= value.high for value in own.values()), own
    values, clusters = rows(48)
    same = [values[48 * cluster] for cluster in clusters]
    assert all(value.value < 1e-9 for value in diversity(spreads(same, clusters), truth, 200).values())
    half = [{name: v[name] / 2 for name in v} for v in values]
    assert math.isclose(diversity(spreads(half, clusters), truth, 200)["diversity"].value, 0.5, rel_tol=1e-9)


def test_clips_without_the_sprite_do_not_count() -> None:
    values, clusters = rows(5, prompts=2)
    gone = [{name: math.nan for name in v} if c == 1 and k % 5 < 3 else v
            for k, (v, c) in enumerate(zip(values, clusters, strict=True))]  # fmt: skip
    assert set(spreads(gone, clusters)) == {0}, "two clips are not enough for a spread"
    assert diversity({}, spreads(values, clusters), 200) == {}


def test_a_sprite_of_another_colour_is_not_the_prompted_one() -> None:
    scene = STAGE.scene("test", 2, sprites=1, events=0)
    actor = scene.actors[0]
    wrong = replace(scene, actors=(replace(actor, colour=((-math.inf, (actor.look(0).colour + 3) % 8),)),))
    assert all(np.isnan(v) for v in measure_states(FORM.render(wrong, 25), scene, FORM).values())


@pytest.mark.parametrize("wrong", [{"prompts": 1}, {"seeds": 2}, {"frames": 24}, {"frames": 21}, {"truths": 2}])
def test_nonsense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        SpreadProtocol(**wrong)
