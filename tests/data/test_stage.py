"""The Sprite Stage: clips are pure functions of (split, index), motion is smooth and stays inside, captions hold."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.data.worlds import captions as words
from unspool.data.worlds.captions import COLOURS, SHAPES, SIZES, SKIES, Look, plain, vocabulary
from unspool.data.worlds.motion import BOUNCES, EASE_S, EXTENT, FLOOR, MOTIONS, begin, path
from unspool.data.worlds.render import AMBIENT, PALETTE, RADII, background
from unspool.data.worlds.stage import EVENTS, SPLITS, Scene, Stage, StageConfig, crowding, frame_times, is_held_out

STAGE = Stage()
INDEX = st.integers(0, 10**9)
SPLIT = st.sampled_from(SPLITS)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(float(((a.astype(float) - b) ** 2).mean()) / 255**2 + 1e-12)


# ---- one clip is always the same clip ------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SPLIT, INDEX, st.lists(INDEX, max_size=3))
def test_a_clip_is_the_same_whatever_was_asked_before(split: str, index: int, before: list[int]) -> None:
    fresh = Stage().scene(split, index)  # type: ignore[arg-type]
    stage = Stage()
    for other in before:
        stage.scene("train", other, sprites=1 + other % 3)
    again = stage.scene(split, index)  # type: ignore[arg-type]
    assert again == fresh and again.prompts == fresh.prompts


def test_clips_differ_between_indices_splits_and_seeds() -> None:
    other = Stage(StageConfig(seed=1))
    scenes = [STAGE.scene(split, i) for split in SPLITS for i in range(20)]
    scenes += [other.scene("train", i) for i in range(20)]
    assert len({repr(scene) for scene in scenes}) == len(scenes)


def test_the_number_of_sprites_and_events_can_be_asked_for() -> None:
    for sprites in (1, 2, 3):
        assert all(len(STAGE.scene("dev", i, sprites=sprites, events=0).actors) == sprites for i in range(20))
    assert all(STAGE.scene("dev", i, events=0).events == () for i in range(20))
    assert np.mean([len(STAGE.scene("dev", i, events=2).prompts) for i in range(40)]) > 2.7


def test_a_scene_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        STAGE.scene("validation", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index=-1"):
        STAGE.scene("train", -1)
    for wrong in ({"colours": ("mauve",)}, {"sprites": ()}, {"sprites": (0.0,)}, {"events": (1, 1, 1, 1)}, {"fps": 0}):
        with pytest.raises(ValueError, match="expected"):
            StageConfig(**wrong)  # type: ignore[arg-type]


# ---- motion --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SPLIT, INDEX)
def test_sprites_stay_inside_for_a_minute(split: str, index: int) -> None:
    """Nothing leaves the stage or wraps round: the step between two frames is always small."""
    times = np.arange(0, 60, 1 / 32)
    for actor in STAGE.scene(split, index).actors:  # type: ignore[arg-type]
        x, y = actor.path(times)
        reach = EXTENT * float(RADII[actor.size])
        assert reach <= x.min() and x.max() <= 1 - reach and reach <= y.min() and y.max() <= FLOOR
        assert np.hypot(np.diff(x), np.diff(y)).max() < 3.0 / 32


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from([0.10, 0.15]), INDEX)
def test_motions_pass_into_each_other_without_a_jump(first: int, second: int, radius: float, seed: int) -> None:
    """Position and velocity are continuous where a new motion begins and where the old one has ended."""
    rng, dt = np.random.default_rng(seed), 1e-5
    old = begin(first, 0.0, radius, rng, None)
    x, y = path((old,), np.array([2.0]))
    new = begin(second, 2.0, radius, rng, (float(x[0]), float(y[0])))
    for time in (2.0, 2.0 + EASE_S):
        around = time + dt * np.array([-2, -1, 1, 2])
        for axis, place in enumerate(path((old, new), around)):
            assert abs(place[2] - place[1]) < 2 * dt * 3.5
            before, after = (place[1] - place[0]) / dt, (place[3] - place[2]) / dt
            is_impact = axis == 1 and BOUNCES in (first, second) and abs(place[1] - (FLOOR - 0.85 * radius)) < 1e-3
            assert is_impact or abs(after - before) < 5e-3


def test_each_motion_does_what_it_is_called() -> None:
    times = np.arange(0, 5, 1 / 16)
    ways: dict[str, list[tuple[float, float]]] = {name: [] for name in MOTIONS}
    for i in range(150):
        for actor in STAGE.scene("train", i, events=0).actors:
            x, y = actor.path(times)
            ways[MOTIONS[actor.look(0).motion]].append((x[-1] - x[0], y[-1] - y[0]))
            spread = (float(np.ptp(x)), float(np.ptp(y)))
            match MOTIONS[actor.look(0).motion]:
                case "rests":
                    assert spread == (0, 0)
                case "bounces":
                    assert spread[0] == 0 and spread[1] > 0.24
                case "orbits":
                    assert min(spread) > 0.23 and abs(spread[0] - spread[1]) < 0.01
    assert max(dx for dx, _ in ways["drifts left"]) < -0.2 and min(dx for dx, _ in ways["drifts right"]) > 0.2
    assert max(dy for _, dy in ways["rises"]) < -0.2


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(6))
def test_any_frame_rate_shows_the_same_motion(index: int) -> None:
    scene = STAGE.scene("train", index)
    fast = scene.render(frame_times(64, 32), 32)
    assert np.array_equal(fast[::2], scene.render(frame_times(32, 16), 32))
    assert np.array_equal(fast[40:41], scene.render(np.array([40 / 32]), 32))


def test_any_resolution_shows_the_same_scene() -> None:
    for index in range(6):
        scene = STAGE.scene("train", index)
        large = scene.render(frame_times(8, 4), 128).astype(float)
        small = scene.render(frame_times(8, 4), 64)
        assert psnr(large.reshape(8, 64, 2, 64, 2, 3).mean((2, 4)), small) > 34
    assert scene.render(frame_times(2, 4), 32, 48).shape == (2, 32, 48, 3)


def test_every_colour_stands_apart_under_every_sky() -> None:
    """Colours keep 12 degrees of each other, as directions that light does not turn, and none is that of the sky."""

    def directions(colours: np.ndarray) -> np.ndarray:
        return colours / np.linalg.norm(colours, axis=-1, keepdims=True)

    empty = background(64, 64)[:, :, 0]
    for sky in range(len(SKIES)):
        tinted = PALETTE * AMBIENT[sky]
        angles = np.degrees(np.arccos(np.clip(directions(tinted) @ directions(tinted).T, -1, 1)))
        assert angles[~np.eye(len(COLOURS), dtype=bool)].min() > 12
        for light in (0.7, 0.9, 1.1):
            lit = np.clip(tinted * light, 0, 1)
            assert np.linalg.norm(lit[:, None] - empty[sky][None], axis=-1).min() > 0.15


def test_a_sprite_touches_only_its_own_pixels() -> None:
    scene = STAGE.scene("train", 4, sprites=1, events=0)
    empty = replace(scene, actors=())
    times = frame_times(9, 2)
    with_it, without = scene.render(times, 64), empty.render(times, 64)
    x, y = scene.actors[0].path(times)
    grid = (np.arange(64) + 0.5) / 64
    far = np.hypot(grid - x[:, None, None], grid[:, None] - y[:, None, None])
    changed = (with_it != without).any(3)
    above_ground = (np.arange(64) < 0.8 * 64 - 1)[:, None]
    assert changed.any() and not (changed & above_ground & (far > EXTENT * RADII[scene.actors[0].size] + 2 / 64)).any()


# ---- events --------------------------------------------------------------------------------------------------------


def without_events(scene: Scene) -> Scene:
    """How the clip would go on if nothing happened."""
    actors = tuple(
        replace(a, colour=a.colour[:1], shape=a.shape[:1], motions=a.motions[:1], gone=math.inf)
        for a in scene.actors
        if a.born == -math.inf
    )
    return replace(scene, actors=actors, skies=scene.skies[:1], events=())


def differing(before: dict[int, Look], after: dict[int, Look]) -> set[tuple[int, str]]:
    fields = ("colour", "shape", "motion", "size")
    both = before.keys() & after.keys()
    return {(i, f) for i in both for f in fields if getattr(before[i], f) != getattr(after[i], f)}


EXPECTED = {"recolour": {"colour"}, "reshape": {"shape"}, "move": {"motion"}, "add": set(), "remove": set()}
EXPECTED["sky"] = set()


@pytest.mark.parametrize("kind", EVENTS)
def test_an_event_alters_what_it_should_and_nothing_else(kind: str) -> None:
    stage = Stage(StageConfig(event_kinds=(kind,)))
    seen = 0
    for index in range(12):
        scene = stage.scene("train", index, events=1)
        if not scene.events:
            continue
        seen += 1
        event = next(e for e in scene.events if e.kind == kind)
        times = frame_times(81, 16)
        before = times <= event.time
        plan = without_events(scene)
        assert np.array_equal(scene.render(times[before], 32), plan.render(times[before], 32))
        assert not np.array_equal(scene.render(times, 32)[-1], plan.render(times, 32)[-1])
        was, now = dict(scene.looks(event.time - 1e-6)), dict(scene.looks(event.time))
        changes = differing(was, now)
        assert (scene.sky(event.time) != scene.sky(event.time - 1e-6)) == (kind == "sky") or kind == "scene"
        assert now.keys() - was.keys() == ({event.actor} if kind == "add" else set())
        assert was.keys() - now.keys() == ({event.actor} if kind == "remove" else set())
        if kind in EXPECTED:
            assert {f for _, f in changes} == EXPECTED[kind]
            assert {i for i, _ in changes} <= {event.actor}
        else:
            assert changes or kind == "scene"
            assert all(f != "size" for _, f in changes)
            assert kind == "scene" or {i for i, _ in changes} == {event.actor}
        for old, new in zip(plan.actors, scene.actors, strict=False):
            moved = any((i, "motion") in changes for i in (scene.actors.index(new),))
            assert moved or np.array_equal(old.path(times), new.path(times))
    assert seen >= 6, f"{kind} hardly ever happens"


def test_prompts_begin_with_their_event_and_most_with_a_chunk() -> None:
    on_grid = Stage(StageConfig(on_grid=1.0))
    for index in range(40):
        scene = on_grid.scene("train", index, events=2)
        times = [p.time for p in scene.prompts]
        assert times[0] == 0 and times == sorted(set(times)) and len(times) <= 3
        assert set(times[1:]) == {e.time for e in scene.events}
        which = scene.prompt_index(21, 16.0)
        last = np.arange(21) * 4 / 16  # the last pixel frame of each latent frame
        assert which.tolist() == [sum(t <= at for t in times) - 1 for at in last]
        assert all(k % 3 == 0 for k in np.flatnonzero(np.diff(which)) + 1)


# ---- captions ------------------------------------------------------------------------------------------------------


def matches(text: str, tables: list[tuple[dict[str, tuple[str, ...]], tuple[str, ...]]]) -> list[int]:
    """Indexes of the names whose phrases stand in the text, in order; the longest phrase wins."""
    phrases = {phrase: names.index(name) for table, names in tables for name, all_ in table.items() for phrase in all_}
    pattern = "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))
    return [phrases[m] for m in re.findall(rf"\b(?:{pattern})\b", text)]


def test_captions_say_what_the_scene_shows() -> None:
    for split in SPLITS:
        for index in range(60):
            scene = STAGE.scene(split, index)
            for prompt in scene.prompts:
                text, caption = prompt.caption.text, prompt.caption
                sky = matches(text, [(words.SKY_WORDS, SKIES)])
                for phrases in words.SKY_WORDS.values():
                    for phrase in phrases:
                        text = text.replace(phrase, "")
                read = [
                    matches(text, [(words.COLOUR_WORDS, COLOURS)]),
                    matches(text, [(words.SHAPE_WORDS, SHAPES)]),
                    matches(text, [(words.FINITE, MOTIONS), (words.PARTICIPLE, MOTIONS)]),
                ]
                sizes = matches(text, [(words.SIZE_WORDS, SIZES)]) or [-1] * len(read[0])
                assert list(zip(*read, sizes, strict=True)) == list(caption.sprites), prompt.caption
                assert (sky or [-1]) == [caption.sky]
                assert caption.sky in (-1, scene.sky(prompt.time))
                shown = [(k.colour, k.shape, k.motion, k.size) for _, k in scene.looks(prompt.time)]
                stated = [(c, s, m, next(z for a, b, d, z in shown if (a, b, d) == (c, s, m)))
                          for c, s, m, _ in caption.sprites]  # fmt: skip
                assert sorted(stated) == sorted(shown)
                assert all(z in (-1, true[3]) for (*_, z), true in zip(caption.sprites, stated, strict=True))


def test_the_vocabulary_covers_every_caption() -> None:
    known = set(vocabulary())
    texts = [p.caption.text for i in range(400) for p in STAGE.scene("train", i).prompts]
    texts += [plain([Look(c, s, m, z)], k, sized=True) for c in range(8) for s in range(4)
              for m in range(6) for z in range(2) for k in range(3)]  # fmt: skip
    said = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    assert said <= known, said - known
    assert all(text == text.strip() and "  " not in text for text in texts)
    assert len(known) == len(vocabulary())


def test_the_plain_wording() -> None:
    looks = [Look(0, 0, 0, 0), Look(1, 3, 5, 1)]
    assert plain(looks, 1) == "a red ball bounces and an orange star rests at sunset"
    assert plain(looks[:1], 0, sized=True) == "a small red ball bounces by day"


# ---- compositions --------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["train", "dev", "test"]), INDEX)
def test_training_never_shows_a_held_out_composition(split: str, index: int) -> None:
    scene = STAGE.scene(split, index)  # type: ignore[arg-type]
    for time in np.arange(0, 5, 0.1):
        assert not is_held_out([look for _, look in scene.looks(float(time))])


def test_held_out_clips_show_one_and_their_share_is_as_stated() -> None:
    for index in range(40):
        scene = STAGE.scene("heldout", index)
        assert any(is_held_out([k for _, k in scene.looks(t)]) for t in (0.0, *(e.time for e in scene.events)))
    triples = [is_held_out([Look(c, s, m, 0)]) for c in range(8) for s in range(4) for m in range(6)]
    assert 0.08 < np.mean(triples) < 0.24
    by_motion = np.array(triples).reshape(32, 6).mean(0)
    assert by_motion.max() < 0.5, "one motion alone must not be held out"


def test_two_sprites_rarely_meet() -> None:
    times = np.arange(0, 5, 0.1)
    share = np.array([crowding(STAGE.scene("test", i, sprites=2, events=0).actors, times) for i in range(60)])
    assert share.mean() < 0.03 and (share > 0.1).mean() < 0.06
