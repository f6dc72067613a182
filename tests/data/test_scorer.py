"""The scorer of the Sprite Stage: exact on true clips, and each way of spoiling a clip moves its own score."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.data.worlds.captions import Caption
from unspool.data.worlds.motion import LEFT, MOTIONS, RESTS, RISES, begin, border
from unspool.data.worlds.render import RADII
from unspool.data.worlds.scorer import (
    SCORES,
    Settle,
    agreement,
    analyse,
    attributes_over_time,
    first_held,
    score,
    score_clip,
)
from unspool.data.worlds.segment import NOTHING, connect, find_skies, runs, to_float
from unspool.data.worlds.stage import EVENTS, Prompt, Scene, Stage, StageConfig, frame_times
from unspool.data.worlds.trajectories import best_motion, consistent, misfits
from unspool.data.worlds.validation import ROWS, WRONG_PROMPT, as_table, validate

STAGE = Stage()
Table = dict[str, dict[str, float]]


def clip(scene: Scene, frames: int = 25, fps: float = 8.0, size: int = 64) -> np.ndarray:
    return scene.render(frame_times(frames, fps), size)


# ---- the validation table ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Table:
    """One sprite, four clips of 3 s at 8 fps, every row."""
    return validate(4, sprites=1, fps=8, num_frames=25)


def test_true_clips_are_right_in_everything(table: Table) -> None:
    more = validate(3, sprites=2, fps=8, num_frames=25, rows=["truth"])
    for row, strict in ((table["truth"], 1.0), (more["truth"], 0.75)):
        assert row["presence"] >= 0.99 and row["colour"] >= 0.99 and row["sky"] == 1.0
        assert min(row["shape"], row["motion"], row["size"]) >= 0.97
        assert row["strict"] >= strict and row["extra"] <= 0.01 and row["missing"] <= 0.01 and row["permanence"] >= 0.97
        assert row["psnr"] > 50 and row["foreground_psnr"] > 40


@pytest.mark.parametrize(("name", "psnr"), [("noise .02", 34), ("noise .05", 26), ("noise .1", 20)])
def test_noise_costs_exactly_its_power_and_little_else(table: Table, name: str, psnr: float) -> None:
    row = table[name]
    assert abs(row["psnr"] - psnr) < 1.2 and row["sky"] == 1
    assert row["presence"] >= 0.98 and row["motion"] >= 0.9 and row["extra"] <= 0.1
    assert row["shape"] >= (0.97 if psnr > 21 else 0.75)


def test_blur_costs_shapes_and_foreground(table: Table) -> None:
    one, two = table["blur 1 px"], table["blur 2 px"]
    assert one["shape"] >= 0.97 and 22 < one["foreground_psnr"] < 32
    assert two["shape"] < 0.97 and two["foreground_psnr"] < one["foreground_psnr"] - 3
    assert two["motion"] >= 0.9 and two["presence"] >= 0.95


def test_frozen_and_shuffled_clips_do_not_move_as_asked(table: Table) -> None:
    frozen, shuffled, truth = table["frozen"], table["shuffled"], table["truth"]
    assert frozen["motion"] <= 0.4 and shuffled["motion"] <= 0.4, "only what rests may pass"
    assert frozen["speed"] == 0 and frozen["jerk"] == 0
    assert shuffled["speed"] > 2 * truth["speed"] and shuffled["jerk"] > 5 * truth["jerk"]
    for row in (frozen, shuffled):
        assert row["shape"] >= 0.99 and row["psnr"] > 50 and row["permanence"] == 1


def test_backwards_only_drifts_and_rises_are_wrong(table: Table) -> None:
    row, truth = table["reversed"], table["truth"]
    assert row["motion"] < truth["motion"] and row["motion"] > table["frozen"]["motion"]
    for name in ("jerk", "speed"):
        assert row[name] == pytest.approx(truth[name], rel=0.05)


def test_drift_of_contrast_brightness_or_colour_shows_in_psnr(table: Table) -> None:
    truth = table["truth"]["psnr"]
    for name, most in (("contrast 1.3", 36), ("contrast 1.9", 27), ("brighter .15", 32), ("colour cast .15", 36)):
        assert table[name]["psnr"] < most < truth
    assert table["contrast 1.3"]["strict"] >= 0.8 > table["contrast 1.9"]["strict"]


def test_the_wrong_prompt_is_chance(table: Table) -> None:
    row = table[WRONG_PROMPT]
    assert row["strict"] == 0 and row["adherence"] < 0.5 and row["presence"] < 0.7 and row["extra"] > 0.3
    assert row["psnr"] == table["truth"]["psnr"], "quality does not depend on the prompt"


def test_the_table_prints_every_row(table: Table) -> None:
    lines = as_table(table).splitlines()
    assert len(lines) == 1 + len(ROWS) and all(set(row) == set(SCORES) for row in table.values())
    with pytest.raises(ValueError, match="expected rows of"):
        validate(1, rows=["upside down"])


# ---- one thing at a time -------------------------------------------------------------------------------------------


def altered(scene: Scene, **changes: int) -> tuple[Prompt, ...]:
    """The prompt of a clip of one sprite with other attributes."""
    names = ("colour", "shape", "motion", "size")
    caption = scene.prompts[0].caption
    sprite = tuple(changes.get(n, v) for n, v in zip(names, caption.sprites[0], strict=True))
    return (Prompt(0.0, Caption("", changes.get("sky", caption.sky), (sprite,))),)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["colour", "shape", "motion", "size", "sky"])
def test_a_wrong_attribute_lowers_its_own_score_only(name: str) -> None:
    for index in (3, 4):
        scene = STAGE.scene("test", index, sprites=1, events=0)
        look, sky = scene.actors[0].look(0), scene.sky(0)
        true = {"colour": look.colour, "shape": look.shape, "motion": look.motion, "size": look.size, "sky": sky}
        size = {"colour": 8, "shape": 4, "motion": 6, "size": 2, "sky": 3}[name]
        frames = clip(scene)
        right = score_clip(frames, 8, altered(scene, **true))
        wrong = score_clip(frames, 8, altered(scene, **{**true, name: (true[name] + 1) % size}))
        assert right.strict == 1 and wrong.strict == 0
        assert getattr(wrong, name) <= 0.2
        assert all(getattr(wrong, other) == 1 for other in true if other != name)
        assert wrong.adherence == pytest.approx(0.8, abs=0.05) and wrong.permanence == 1


def test_what_is_not_stated_is_not_judged() -> None:
    scene = STAGE.scene("test", 3, sprites=1, events=0)
    result = score_clip(clip(scene), 8, altered(scene, size=-1, sky=-1, shape=-1))
    assert math.isnan(result.size) and math.isnan(result.sky) and math.isnan(result.shape) and result.adherence == 1


def test_extra_and_missing_sprites_are_counted() -> None:
    scene = STAGE.scene("test", 5, sprites=2, events=0)
    both, alone = clip(scene), clip(replace(scene, actors=scene.actors[:1]))
    sky = scene.sky(0)
    looks = [actor.look(0) for actor in scene.actors]
    wanted = [tuple(getattr(k, n) for n in ("colour", "shape", "motion", "size")) for k in looks]
    one = (Prompt(0.0, Caption("", sky, (wanted[0],))),)  # type: ignore[arg-type]
    two = (Prompt(0.0, Caption("", sky, tuple(wanted))),)  # type: ignore[arg-type]
    assert score_clip(both, 8, one).extra == pytest.approx(1, abs=0.05) and score_clip(both, 8, one).strict == 1
    missing = score_clip(alone, 8, two)
    assert missing.missing == pytest.approx(1, abs=0.05) and missing.presence == pytest.approx(0.5, abs=0.05)
    assert missing.strict == 0 and missing.permanence == 0.5
    nothing = score_clip(clip(replace(scene, actors=())), 8, two)
    assert nothing.presence == 0 and nothing.missing == 2 and nothing.extra == 0 and nothing.sky == 1


def test_an_object_of_no_known_colour_is_extra() -> None:
    scene = STAGE.scene("test", 3, sprites=1, events=0)
    frames = clip(replace(scene, actors=()))[:8]
    frames[:, 10:26, 40:56] = (5, 5, 5) if scene.sky(0) != 2 else (250, 250, 250)
    assert analyse(frames, 8).seen.strange.min() == 1


def test_a_sprite_that_changes_or_vanishes_is_not_permanent() -> None:
    scene = STAGE.scene("test", 3, sprites=1, events=0)
    frames, empty = clip(scene), clip(replace(scene, actors=()))
    actor = scene.actors[0]
    other = replace(actor, shape=((-math.inf, (actor.look(0).shape + 1) % 4),))
    gone, changed = frames.copy(), frames.copy()
    gone[15:] = empty[15:]
    changed[15:] = clip(replace(scene, actors=(other,)))[15:]
    assert score_clip(frames, 8, scene.prompts).permanence == 1
    assert score_clip(gone, 8, scene.prompts).permanence == 0
    assert score_clip(changed, 8, scene.prompts).permanence == 0


def test_spans_show_where_a_clip_goes_wrong() -> None:
    scene = STAGE.scene("test", 4, sprites=1, events=0)
    frames = clip(scene, 48)
    frames[24:] = frames[24]
    frames[24:] = np.clip(frames[24:].astype(int) + 40, 0, 255)
    seen = analyse(frames, 8)
    first, last = score(seen, scene.prompts, span=(0, 24)), score(seen, scene.prompts, span=(24, 48))
    assert first.strict == 1 and first.psnr > 50 and last.psnr < 25
    with pytest.raises(ValueError, match="span"):
        score(seen, scene.prompts, span=(40, 60))


# ---- over time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVENTS)
def test_events_are_followed_and_their_transition_is_no_failure(kind: str) -> None:
    stage = Stage(StageConfig(event_kinds=(kind,), sprites=(0.3, 0.7)))
    index = next(i for i in range(30) if len(stage.scene("test", i, events=1).prompts) == 2)
    scene = stage.scene("test", index, events=1)
    frames = scene.render(frame_times(81, 16), 64)
    seen = analyse(frames, 16)
    result = score(seen, scene.prompts)
    assert result.strict == 1 and result.permanence == 1 and result.extra < 0.05 and result.missing < 0.05
    before, after = (agreement(seen, p.caption)["all"] for p in scene.prompts)
    time = scene.prompts[1].time
    assert before[4 : int(time * 16) - 6].mean() > 0.9, "the old caption holds before the event"
    assert not after[: int(time * 16) - 6].any(), "the new one does not"
    assert 0 <= first_held(after, 16, start_s=time) < 1.4
    late = score(seen, scene.prompts, settle=Settle.after(0.2))
    assert late.strict == 1


def test_what_is_seen_frame_by_frame() -> None:
    scene = STAGE.scene("test", 5, sprites=2, events=0)
    looks = {a.look(0).colour: (a.look(0), a.path(frame_times(41, 16))) for a in scene.actors}
    states = attributes_over_time(clip(scene, 41, 16), 16)
    assert len(states) == 41
    for f, state in enumerate(states):
        assert state["sky"] == scene.sky(0)
        for sprite in state["sprites"]:  # type: ignore[attr-defined]
            look, (x, y) = looks[sprite["colour"]]
            assert (sprite["shape"], sprite["size"]) == (look.shape, look.size)
            assert abs(sprite["x"] - x[f]) < 0.003 and abs(sprite["y"] - y[f]) < 0.003
    motions = [s["motion"] == looks[s["colour"]][0].motion for state in states for s in state["sprites"]]  # type: ignore
    assert np.mean(motions) > 0.9


def test_first_held() -> None:
    good = np.array([0, 1, 0, 0, 1, 1, 1, 1, 0, 1], bool)
    assert first_held(good, 8, hold_s=0.25) == 0.5
    assert first_held(good, 8, hold_s=0.125) == 0.125
    assert first_held(good, 8, start_s=0.25, hold_s=0.5) == 0.25
    assert first_held(good, 8, hold_s=0.75) == math.inf and first_held(good[:1], 8) == math.inf


# ---- parts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.sampled_from([0.10, 0.15]), st.integers(0, 10**9), st.sampled_from([(8, 1.0), (16, 2.5)]))
def test_every_true_path_is_its_own_motion(kind: int, radius: float, seed: int, window: tuple[int, float]) -> None:
    fps, seconds = window
    motion = begin(kind, 0.0, radius, np.random.default_rng(seed), None)
    start = np.random.default_rng(seed).random() * 3
    x, y = motion.at(start + np.arange(round(fps * seconds)) / fps)
    misfit = misfits(x[None], y[None], np.array([radius]), fps)
    assert consistent(misfit)[0, kind], (MOTIONS[kind], misfit)
    if seconds > 2 and np.hypot(np.ptp(x), np.ptp(y)) > 0.15:
        assert best_motion(misfit)[0] == kind and consistent(misfit).sum() == 1


def test_what_rests_at_the_border_may_have_drifted_or_risen_there() -> None:
    radius = float(RADII[0])
    still = np.ones((1, 40))
    for x, y, allowed in (
        (border(radius), 0.5, {RESTS, LEFT}), (0.5, 0.5, {RESTS}), (0.5, border(radius), {RESTS, RISES}),
    ):  # fmt: skip
        misfit = misfits(x * still, y * still, np.array([radius]), 16)
        assert set(np.flatnonzero(consistent(misfit)[0])) == allowed and best_motion(misfit)[0] == RESTS


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 14), st.integers(1, 14), st.floats(0.1, 0.9))
def test_connected_regions_are_those_of_a_flood_fill(seed: int, height: int, width: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((2, height, width)) < density, rng.integers(0, 3, (2, height, width)), NOTHING)
    labels[0, 0, 0] = 1
    flat = labels.reshape(2 * height, width).astype(np.uint8)
    starts, stops, row = runs(flat)
    root = connect(row, starts, stops, flat[row, starts], height)
    found = np.full(flat.shape, -1)
    for r, start, stop, name in zip(row, starts, stops, root, strict=True):
        found[r, start:stop] = name
    want, todo = np.full(labels.shape, -1), deque[tuple[int, int, int]]()
    for first in zip(*np.nonzero(labels != NOTHING), strict=True):
        if want[first] < 0:
            want[first] = found.reshape(labels.shape)[first]  # the same name, if the regions are the same
            todo.append(first)
        while todo:
            f, r, c = todo.popleft()
            for s, d in ((r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                if 0 <= s < height and 0 <= d < width and want[f, s, d] < 0 and labels[f, s, d] == labels[f, r, c]:
                    want[f, s, d] = want[f, r, c]
                    todo.append((f, s, d))
    assert np.array_equal(found, want.reshape(flat.shape))
    names = [want[f][labels[f] != NOTHING] for f in (0, 1)]
    assert not set(names[0].tolist()) & set(names[1].tolist()), "frames do not touch"


def test_a_sky_that_fades_is_no_sky_in_the_middle_and_each_at_its_end() -> None:
    stage = Stage(StageConfig(event_kinds=("sky",)))
    scene = next(s for s in (stage.scene("test", i, events=1) for i in range(20)) if s.events)
    time = scene.events[0].time
    frames = scene.render(time + np.array([-0.1, 0.25, 0.6]), 64)
    found = find_skies(to_float(frames))
    assert found.sky.tolist() == [scene.sky(0), -1, scene.sky(time)]
    assert found.weights[1].max() < 0.6 and np.allclose(found.weights.sum(1), 1)


@pytest.mark.parametrize("shape", [(48, 48), (128, 128), (64, 96)])
def test_other_frame_sizes(shape: tuple[int, int]) -> None:
    scene = STAGE.scene("test", 3, sprites=1, events=0)
    frames = scene.render(frame_times(16, 8), *shape)
    result = score_clip(frames, 8, scene.prompts)
    assert result.presence == 1 and result.psnr > 45
    assert shape[0] != shape[1] or result.strict == 1


@pytest.mark.parametrize(
    "frames",
    [np.zeros((8, 64, 64, 3), np.float32), np.zeros((8, 64, 64), np.uint8), np.zeros((2, 64, 64, 3), np.uint8),
     np.zeros((8, 8, 8, 3), np.uint8)],
)  # fmt: skip
def test_what_is_no_clip_is_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        analyse(frames, 16)


def test_any_picture_gets_a_score() -> None:
    prompts = STAGE.scene("test", 0, sprites=2, events=0).prompts
    rng = np.random.default_rng(0)
    for frames in (rng.integers(0, 256, (6, 32, 32, 3)), np.zeros((6, 32, 32, 3)), np.full((6, 32, 32, 3), 255)):
        result = score_clip(frames.astype(np.uint8), 16, prompts)
        assert result.strict == 0 and 0 <= result.adherence <= 0.5 and result.psnr < 25
    with pytest.raises(ValueError, match="times in order"):
        score_clip(np.zeros((6, 32, 32, 3), np.uint8), 16, ())
