"""What is measured on one clip: each number on clips for which it is known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from unspool.data.worlds.captions import COLOURS
from unspool.data.worlds.scorer import ATTRIBUTES
from unspool.data.worlds.stage import EVENTS, Scene, Stage, StageConfig, frame_times
from unspool.evaluate.measures import Format, measure_clip, measure_copy, measure_truth, psnr, sprite_mask, steps
from unspool.evaluate.protocol import PRESETS, StageProtocol, clip_cases, protocol, switch_cases
from unspool.evaluate.runner import Measures
from unspool.evaluate.switches import measure_switch, wanted

FORM = Format(height=32, width=32, fps=8.0, boundaries=(9, 21, 33))


def event(kind: str, index: int = 0) -> Scene:
    config = StageProtocol(stage=StageConfig(fps=8.0))
    return switch_cases(replace(config, switches=replace(config.switches, per_kind=index + 1)), kind, 2.0)[index].scene


def test_steps_at_boundaries_are_told_from_others() -> None:
    frames = np.zeros((12, 24, 24, 3), np.uint8)
    frames[9:] = 50
    found = steps(frames, (9,))
    assert found == {"step_boundary": 50.0, "step_elsewhere": 0.0}
    assert math.isnan(steps(frames, ())["step_boundary"])
    ramp = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.full((1, 24, 24, 3), 3, np.uint8)
    assert steps(ramp, (4, 8)) == {"step_boundary": 3.0, "step_elsewhere": 3.0}


def test_psnr_is_that_of_the_error() -> None:
    truth = np.full((4, 8, 8, 3), 100, np.uint8)
    assert psnr(truth, truth) == 60
    assert psnr(truth + np.uint8(10), truth) == pytest.approx(20 * math.log10(25.5))


def test_the_mask_covers_the_sprite_and_not_the_stage() -> None:
    scene = Stage().scene("test", 0, sprites=1, events=0)
    truth = FORM.render(scene, 5)
    mask = sprite_mask(scene, truth, FORM)
    empty = FORM.render(replace(scene, actors=()), 5)
    assert 0.01 < mask.mean() < 0.15
    assert np.array_equal(truth[~mask & (truth == empty).all(-1)], empty[~mask & (truth == empty).all(-1)])
    inside = np.abs(truth.astype(int) - empty).max(-1) > 60
    assert (mask & inside).sum() >= 0.9 * inside.sum(), "what differs much is the sprite"
    spoilt = truth.copy()
    spoilt[~mask] = 255 - spoilt[~mask]
    found = measure_copy(spoilt, scene, FORM)
    assert found["copy_sprite_psnr"] == 60 > 15 > found["copy_psnr"]


def test_truth_is_near_one_and_another_prompt_near_chance() -> None:
    one, two = (Stage().scene("test", i, sprites=1, events=0) for i in (0, 1))
    found = measure_truth(one, two.prompts, 25, FORM)
    assert found["adherence"] >= 0.97 and found["strict"] == 1
    assert found["wrong.adherence"] < 0.6 and found["wrong.strict"] == 0
    same = measure_clip(FORM.render(one, 25), one.prompts, FORM)
    assert all(found[name] == value or math.isnan(value) for name, value in same.items())


# ---- changes of prompt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVENTS)
def test_what_is_wanted_is_what_changed(kind: str) -> None:
    for index in range(3):
        scene = event(kind, index)
        goal, time = wanted(scene), scene.prompts[1].time
        before, after = dict(scene.looks(0)), dict(scene.looks(time))
        assert goal.says_something
        assert goal.alone == ({k.colour for k in before.values()} != {k.colour for k in after.values()})
        assert (goal.new.sky >= 0) <= (scene.sky(0) != scene.sky(time))
        assert (kind in ("sky", "remove")) <= (goal.new.sprites == ())
        for i, j, name in goal.kept:
            place = ATTRIBUTES.index(name)
            assert goal.old.sprites[i][place] == goal.full.sprites[j][place] >= 0
        if kind == "reshape":
            (sprite,) = goal.new.sprites
            assert sprite[1] >= 0 and sprite[2] == sprite[3] == -1, "only its shape is new"
            assert COLOURS[sprite[0]] in {COLOURS[k.colour] for k in before.values()}
        if kind == "add":
            assert len(goal.kept) >= 3 * len(before) and len(goal.new.sprites) == 1


def test_the_truth_changes_within_its_own_transition() -> None:
    for kind, most in (("recolour", 0.5), ("sky", 1.2), ("remove", 0.6)):
        found = measure_switch(None, event(kind), 0.0, 16, FORM)
        assert 0 <= found["delay"] <= most and found["before"] == 0
        assert found["untouched"] == found["untouched_all"] == 1


def test_a_stream_that_ignores_its_prompt_never_adheres() -> None:
    scene = event("recolour")
    times = frame_times(33, 8.0)
    deaf = scene.render(np.minimum(times, scene.prompts[1].time - 0.1), 32)
    found = measure_switch(deaf, scene, 2.0, 33, FORM)
    assert found["delay"] == math.inf and found["before"] == 0
    late = scene.render(times - 2.5 + scene.prompts[1].time, 32)
    on_time = measure_switch(None, scene, 0.0, 16, FORM)["delay"]
    assert measure_switch(late, scene, 2.0, 33, FORM)["delay"] == pytest.approx(on_time + 0.5, abs=0.13)


# ---- protocol ------------------------------------------------------------------------------------------------------


def test_the_prompts_of_the_table_are_balanced_at_any_length() -> None:
    cases = clip_cases(PRESETS["standard"], "test", 256)
    counts = [sum(case.sprites == n for case in cases) for n in (1, 2, 3)]
    assert counts == [96, 96, 64] and all(len(case.scene.actors) == case.sprites for case in cases)
    assert [c.scene for c in clip_cases(PRESETS["smoke"], "test", 8)] == [c.scene for c in cases[:8]]
    assert len({case.caption for case in cases}) > 250


def test_presets_take_changes_and_refuse_nonsense() -> None:
    assert protocol("smoke", ("clips.prompts=4", "stage.sprites=1")).clips.prompts == 4
    for preset, overrides, message in (
        ("smok", (), "did you mean smoke"),
        ("smoke", ("clips.promts=4",), "did you mean"),
        ("smoke", ("clips.frames=80",), "1 \\+ 4k"),
        ("smoke", ("clips.prompts=1",), "at least 2"),
        ("smoke", ("switches.kinds=explode",), "expected some of"),
        ("smoke", ("streams.segment_s=0",), "at least 1 s"),
        ("smoke", ("batch=0",), "expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            protocol(preset, overrides)
    with pytest.raises(ValueError, match=r"lower switches\.per_kind"):
        switch_cases(protocol("smoke", ("switches.scan=1", "switches.per_kind=9")), "sky", 2.0)


def test_other_processes_measure_the_same(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (9, 24, 24, 3), np.uint8)
    jobs = [partial(steps, frames, (k,)) for k in (2, 5)]
    alone = Measures(tmp_path / "a.jsonl").get(["a", "b"], lambda: jobs)
    shared = Measures(tmp_path / "b.jsonl", workers=2)
    try:
        assert shared.get(["a", "b"], lambda: jobs) == alone
    finally:
        shared.close()
    with pytest.raises(ValueError, match="expected at least 1"):
        Measures(tmp_path / "c.jsonl", workers=0)
