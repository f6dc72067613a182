"""The whole evaluation on models whose result is known, interrupted and continued, and as a command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from perfect_model import PROTOCOL, SMALL, Oracle, save
from PIL import Image

from unspool.cli.main import main
from unspool.data.worlds.motion import MOTIONS
from unspool.data.worlds.stage import Scene
from unspool.evaluate import report
from unspool.evaluate.frozen import measure_frozen_stream
from unspool.evaluate.goals import Goal, goals
from unspool.evaluate.measures import Format
from unspool.evaluate.protocol import StageProtocol, StreamProtocol, stream_cases
from unspool.evaluate.runner import Arm, ClipStore, Measures, Request, plain
from unspool.evaluate.stage import FROZEN, STUDENT, TEACHER, TRUTH, WRONG, Evaluation, Results, waits
from unspool.evaluate.stats import Interval
from unspool.evaluate.tables import ALL, Summary, column

Shown = tuple[Evaluation, Results, Summary]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A model that does all it is told, and one that does so until the prompt changes as its teacher."""
    arms = [Arm(name=name, pipeline=Oracle()) for name in (STUDENT, TEACHER)]
    evaluation = Evaluation(PROTOCOL, *arms, folder=tmp_path_factory.mktemp("shown"))
    results = evaluation.run()
    return evaluation, results, report.summarise(evaluation, results)


def test_a_perfect_model_equals_the_truth(shown: Shown) -> None:
    _, results, summary = shown
    for split in ("test", "heldout"):
        rows = results.clips[split]
        for name in ("adherence", "psnr", "jerk", "step_elsewhere"):
            assert np.array_equal(column(rows[STUDENT], name), column(rows[TRUTH], name), equal_nan=True)
        own = summary.clips[split][STUDENT][ALL]
        assert own["adherence"].value >= 0.97 and own["adherence_share"].value == own["motion_over_truth"].value == 1
    assert summary.differences["student - teacher"][ALL]["strict_share"].value == 0
    assert set(summary.clips["test"][STUDENT]) == {ALL, "1", "2"}


def test_reference_rows_are_what_they_must_be(shown: Shown) -> None:
    rows = shown[2].clips["test"]
    assert rows[TRUTH][ALL]["adherence"].value >= 0.97 and rows[TRUTH][ALL]["motion"].value >= 0.97
    assert rows[FROZEN][ALL]["motion"].value <= 0.4 and rows[FROZEN][ALL]["motion_over_truth"].value == 0
    assert rows[FROZEN][ALL]["shape"].value >= 0.97
    assert rows[WRONG][ALL]["strict"].value == 0 and rows[WRONG][ALL]["adherence"].value < 0.6
    codec = rows["codec round trip"][ALL]
    assert codec["copy_psnr"].value == codec["copy_sprite_psnr"].value == 60, "the identity loses nothing"
    assert rows["student, empty prompt"][ALL]["adherence"].value == 0
    assert next(iter(rows)) == TRUTH and list(rows)[-1] == STUDENT


def test_a_switch_takes_the_truths_own_time_and_the_wait_for_its_chunk(shown: Shown) -> None:
    evaluation, results, summary = shown
    wait = waits(PROTOCOL, evaluation.clock)
    assert wait[0] == 0 and len(wait) == 8 and wait[-1] < 1.5, "a chunk of 12 frames lasts 1.5 s at 8 per second"
    for kind, rows in results.switches.items():
        own, true = column(rows[STUDENT], "delay"), column(rows[TRUTH], "delay")
        assert np.isfinite(true).all() and np.abs(own - true).max() <= 0.13, kind
        group = summary.switches[kind][STUDENT]
        assert group["never"].value == 0 and group["untouched"].value == 1
        assert group["p90"].value >= true.max() + wait[6] - 0.13
    assert set(summary.switches) == {ALL, *PROTOCOL.switches.kinds}


def test_every_phase_takes_effect_at_the_same_chunk(shown: Shown) -> None:
    """What allows one clip to stand for all phases: a session that is told at any of them makes the same frames."""
    evaluation = shown[0]
    pipeline, clock = evaluation.student.pipeline, evaluation.clock
    times = set()
    for wait in waits(PROTOCOL, clock):
        session = pipeline.session("a red ball bounces", steps=1)
        times.add(session.set(prompt="a blue star rests", at=clock.seconds(2) - wait))
    assert times == {clock.seconds(2)}


def test_a_deaf_model_fails_every_switch(tmp_path: Path) -> None:
    config = replace(PROTOCOL, switches=replace(PROTOCOL.switches, kinds=("recolour",)))
    evaluation = Evaluation(config, Arm(name=STUDENT, pipeline=Oracle(config, deaf=True)), folder=tmp_path)
    results = evaluation.run(["switches"])
    summary = report.summarise(evaluation, results)
    group = summary.switches["recolour"][STUDENT]
    assert group["p50"].value == math.inf and group["never"].value == 1
    missed = [goal for goal in goals(summary) if goal.what == "prompt switch (recolour), p50"]
    assert missed[0].is_met is False and "never" in report.goal_lines(missed)[-1]


def test_streams_are_scored_by_segment(shown: Shown) -> None:
    _, _, summary = shown
    assert {name: len(segments) for name, segments in summary.streams.items()} == {TRUTH: 2, FROZEN: 2, STUDENT: 2}
    for segment, true in zip(summary.streams[STUDENT], summary.streams[TRUTH], strict=True):
        assert segment["adherence"] == true["adherence"] and segment["adherence"].value >= 0.9
    assert summary.lasting[STUDENT] == summary.lasting[TRUTH]
    assert [segment["motion_over_truth"].value for segment in summary.streams[FROZEN]] == [0.0, 0.0]


@pytest.mark.parametrize("motions", [None, MOTIONS])
def test_a_frozen_stream_is_seen_at_any_age(motions: tuple[str, ...] | None) -> None:
    """Motions that come to rest would hide it: its last segment would be right but for few sprites."""
    streams = StreamProtocol(prompts=12, seconds=24.0, segment_s=4.0)
    streams = streams if motions is None else replace(streams, motions=motions)
    cases = stream_cases(StageProtocol(streams=streams), 24.0)
    form = Format(height=64, width=64, fps=8.0, boundaries=())
    found = [measure_frozen_stream(case.scene, 32, 192, form) for case in cases]
    moving = [np.nanmean([one[f"motion.{k}"] for one in found]) for k in range(6)]
    if motions is None:
        assert max(moving) <= 0.1 and {k for case in cases for k in kinds(case.scene)} == {"bounces", "orbits"}
    else:
        assert moving[0] <= 0.4 <= moving[-1]


def kinds(scene: Scene) -> set[str]:
    return {MOTIONS[motion.kind] for actor in scene.actors for motion in actor.motions}


def test_a_model_with_one_clip_per_prompt_is_not_diverse(shown: Shown) -> None:
    spread = shown[2].spread
    assert set(spread) >= {STUDENT, TEACHER}
    assert spread[STUDENT]["diversity"].value < 1e-6 and spread[STUDENT]["diversity"].n == 2


def test_the_report_parses_and_says_what_it_says(shown: Shown, tmp_path: Path) -> None:
    evaluation, results, summary = shown
    facts = report.results_of(evaluation, results, summary, report.Cost())
    written = report.write(tmp_path, facts, summary)
    back = report.read(tmp_path / report.RESULTS_FILE)
    assert back == json.loads(json.dumps(facts)), "everything in it is plain JSON"
    assert back["tables"]["clips"]["test"][STUDENT][ALL]["adherence_share"]["value"] == 1.0
    assert back["models"][STUDENT]["weights"] == evaluation.student.pipeline.weights
    assert set(back["cost"]) == {"seconds", "cpu_s", "cpu_over_wall"} and back["environment"]["threads"] >= 1
    text = (tmp_path / report.TABLE_FILE).read_text()
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) > 8
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "not measured" not in tables[0] or "2 sprites" in tables[0]
    assert all(path.stat().st_size > 200 for path in written)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="evaluate again"):
        report.read(tmp_path / "x.json")


def test_goals_without_numbers_are_not_measured() -> None:
    found = goals(Summary())
    assert len(found) > 15 and all(goal.is_met is None for goal in found)
    assert all("not measured" in line for line in report.goal_lines(found)[2:])


@pytest.mark.parametrize(
    ("value", "is_met", "is_sure"),
    [((0.95, 0.92, 0.98), True, True), ((0.95, 0.85, 0.98), True, False), ((0.85, 0.8, 0.95), False, False),
     ((0.85, 0.8, 0.89), False, True), ((0.95, math.nan, math.nan), True, True),
     ((math.inf, 0.5, math.inf), False, False)],
)  # fmt: skip
def test_a_goal_says_whether_its_interval_agrees(
    value: tuple[float, float, float], is_met: bool, is_sure: bool
) -> None:
    goal = Goal("share", Interval(*value, n=16), low=0.9, high=1.1)
    assert (goal.is_met, goal.is_sure) == (is_met, is_sure)
    assert ("(not sure)" in report.goal_lines([goal])[-1]) == (not is_sure)


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_continues_with_the_same_numbers(tmp_path: Path) -> None:
    config = replace(PROTOCOL, clips=replace(PROTOCOL.clips, prompts=2, held_out=0, unconditional=0), batch=1)

    def run(folder: Path, pipeline: Oracle) -> Any:
        return Evaluation(config, Arm(name=STUDENT, pipeline=pipeline), folder=folder).run(["clips"]).clips["test"]

    whole, stopped = Oracle(config), Oracle(config)
    expected = run(tmp_path / "whole", whole)
    make: Callable[..., Any] = stopped.generate_many

    def interrupted(*args: Any, **options: Any) -> Any:
        if stopped.calls == 1:
            raise KeyboardInterrupt
        return make(*args, **options)

    stopped.generate_many = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stopped)
    with (tmp_path / "cut" / "measures.jsonl").open("a") as file:
        file.write('{"key": "torn')
    again = Oracle(config)
    found = run(tmp_path / "cut", again)
    assert again.calls == 1 and whole.calls == 2, "the batch that was there is not made again"
    for name, row in expected.items():
        assert [{k: plain(v) for k, v in own.items()} for own in row.values] == [
            {k: plain(v) for k, v in own.items()} for own in found[name].values
        ]
    third = Oracle(config)
    run(tmp_path / "cut", third)
    assert third.calls == 0, "the torn line did not spoil the ones after it"


def test_a_torn_file_of_clips_is_made_again(tmp_path: Path) -> None:
    pipeline = Oracle()
    arm, store = Arm(name=STUDENT, pipeline=pipeline), ClipStore(tmp_path)
    prompts = next(texts for texts in pipeline.scenes if len(texts) == 1)
    request = Request(prompts=prompts, samples=(0,), seed=0, frames=9)
    frames = store.clips(arm, request)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-300])
    assert np.array_equal(store.clips(arm, request), frames) and pipeline.calls == 2
    store.clips(arm, request)
    assert pipeline.calls == 2
    for changed in (replace(request, seed=1), replace(request, frames=13)):
        assert store.key(arm, changed) != store.key(arm, request)
    assert store.key(replace(arm, guidance=3.0), request) != store.key(arm, request)


def test_measures_are_kept_with_what_is_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    values = {"a": 0.1, "b": math.nan, "c": math.inf}
    Measures(path).get(["k"], lambda: [lambda: values])
    (found,) = Measures(path).get(["k"], lambda: pytest.fail("it is there"))
    assert found["a"] == 0.1 and math.isnan(found["b"]) and found["c"] == math.inf


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.log.setup_console", lambda: None)


CHANGES = (
    "clips.prompts=2", "clips.held_out=0", "clips.frames=25", "clips.sprites=1", "clips.unconditional=0",
    "switches.kinds=sky", "streams.prompts=1", "streams.seconds=4", "batch=2", "resamples=100",
)  # fmt: skip


def test_one_command_prints_the_table(command: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network with random weights: nothing is right, and the table says so."""
    save(tmp_path / "model", SMALL)
    out, page = tmp_path / "out", tmp_path / "README.md"
    page.write_text("# model\n<!-- table: begin -->\nstale\n<!-- table: end -->\nrest\n")
    args = ["evaluate", "stage", *CHANGES, "--model", str(tmp_path / "model"), "--preset", "smoke", "--out", str(out)]
    assert main([*args, "--sheet", "--markdown", str(page)]) == 0
    text = capsys.readouterr().out
    assert "**not met**" in text and "prompt switch (sky)" in text and "Streams, student" in text
    facts = report.read(out / report.RESULTS_FILE)
    assert facts["tables"]["clips"]["test"][STUDENT][ALL]["strict"]["value"] == 0
    assert facts["generation"][STUDENT]["frames"] > 0
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > 500
    assert (out / "samples.mp4").stat().st_size > 1000
    content = page.read_text()
    assert content.startswith("# model\n") and content.endswith("rest\n") and "stale" not in content
    assert "**Goals**" in content
    assert main([*args, "--quiet"]) == 0
    again = report.read(out / report.RESULTS_FILE)
    assert again["tables"] == facts["tables"], "from what was kept"


def test_the_many_step_network_is_measured_too(
    command: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model", SMALL)
    save(tmp_path / "whole", replace(SMALL, kind="bidirectional"))
    args = ["evaluate", "stage", *CHANGES, "--model", str(tmp_path / "model"), "--preset", "smoke", "--parts", "clips"]
    args += ["--quiet", "--out", str(tmp_path / "out")]
    assert main([*args, "--sheet", "--many-step", str(tmp_path / "model"), "--teacher", str(tmp_path / "whole")]) == 0
    with Image.open(tmp_path / "out" / "beside.png") as page, Image.open(tmp_path / "out" / "samples.png") as alone:
        assert page.width == alone.width and page.height > alone.height, "a strip for each of three models"
    facts = report.read(tmp_path / "out" / report.RESULTS_FILE)
    assert set(facts["models"]) == {"teacher", "many-step", "student"}
    assert facts["tables"]["differences"]["student - many-step"][ALL]["strict_share"]["value"] == 0, "one network"
    assert {goal["what"]: goal["met"] for goal in facts["goals"]}["student minus many-step, manifold PSNR"] is True
    capsys.readouterr()
    assert main([*args, "--many-step", str(tmp_path / "whole")]) == 2
    assert "bidirectional" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere"], "no model"),
        (["--out", "file/x"], "expected a folder"),
        (["--workers", "0"], "expected 1 to 256"),
        (["clips.prompts=0"], "expected at least 2"),
        (["clips.nothing=1"], "unknown key"),
        (["--teacher-steps", "4"], "without --teacher"),
        (["--markdown", "file"], "expected a file with the lines"),
        (["streams.seconds=1e9"], "at most an hour"),
    ],
)
def test_impossible_wishes_are_one_line(
    command: None, args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert main(["evaluate", "stage", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("unspool: error:") and error.count("\n") == 1 and message in error


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    student, other = Oracle(), Oracle()
    other.spec = replace(other.spec, height_px=64)
    with pytest.raises(ValueError, match="two models of one format"):
        Evaluation(PROTOCOL, Arm(name=STUDENT, pipeline=student), Arm(name=TEACHER, pipeline=other), folder=tmp_path)
    other.spec = replace(SMALL, kind="bidirectional", clip=4)
    with pytest.raises(ValueError, match=r"set clips\.frames=13"):
        Evaluation(PROTOCOL, Arm(name=STUDENT, pipeline=student), Arm(name=TEACHER, pipeline=other), folder=tmp_path)
