"""Tables of values that are known: who is compared with whom, and what becomes of a stream."""

from __future__ import annotations

import math

import pytest

from unspool.evaluate.goals import goals
from unspool.evaluate.stage import MANY, STUDENT, TEACHER, TRUTH, Row
from unspool.evaluate.tables import ALL, Summary, compare_arms, lasting_table, pairs, survival_table

RESAMPLES = 200


def clips(adherence: float, strict: tuple[float, ...], psnr: float) -> Row:
    values = [{"adherence": adherence, "strict": s, "psnr": psnr} for s in strict]
    return Row(list(range(len(strict))), [1] * len(strict), values)


def test_each_network_is_compared_with_what_taught_it() -> None:
    rows = {
        TRUTH: clips(1.0, (1, 1, 1, 1), 60.0),
        TEACHER: clips(0.8, (1, 0, 0, 0), 30.0),
        MANY: clips(0.9, (1, 1, 1, 0), 32.0),
        STUDENT: clips(0.85, (1, 1, 0, 0), 31.5),
    }
    assert pairs(rows) == [(STUDENT, TEACHER), (STUDENT, MANY), (MANY, TEACHER)] and pairs([STUDENT, TRUTH]) == []
    found = compare_arms(rows, RESAMPLES)
    assert set(found) == {"student - teacher", "student - many-step", "many-step - teacher"}
    own = found["student - many-step"][ALL]
    assert own["adherence_share"].value == pytest.approx(-0.05) and own["strict_share"].value == pytest.approx(-0.25)
    assert own["psnr"].value == pytest.approx(-0.5) and found["student - teacher"]["1"]["psnr"].value == 1.5

    summary = Summary(clips={"test": {name: {} for name in rows}}, differences=found)
    verdicts = {goal.what: goal.is_met for goal in goals(summary)}
    assert verdicts["student minus many-step, mean attribute adherence, 1 sprite"] is False
    assert verdicts["student minus many-step, manifold PSNR"] is True
    assert verdicts["many-step minus teacher, all attributes right, 1 sprite"] is True
    assert verdicts["student minus teacher, mean attribute adherence, 2 sprites"] is None
    without = {goal.what for goal in goals(Summary(clips={"test": {STUDENT: {}, TEACHER: {}}}))}
    assert not any(
        "many-step" in what or what.endswith("manifold PSNR") for what in without - {"the same, manifold PSNR"}
    )


def stream(adherence: list[float], strict: list[float], psnr: list[float], speed: list[float]) -> dict[str, float]:
    out: dict[str, float] = {}
    for k, values in enumerate(zip(adherence, strict, psnr, speed, strict=True)):
        named = dict(zip(("adherence", "strict", "psnr", "speed"), values, strict=True))
        out |= {f"{name}.{k}": value for name, value in named.items()}
        out |= {f"step_boundary.{k}": 1.0, f"step_elsewhere.{k}": 1.0}
    return out


def test_a_stream_that_has_lost_its_sprites_does_not_move() -> None:
    """Not: is left out, as if those that still move were all."""
    truth = Row([0, 1], [1, 1], [stream([1.0], [1.0], [60.0], [2.0])] * 2)
    own = Row([0, 1], [1, 1], [stream([1.0], [1.0], [60.0], [2.0]), stream([0.0], [0.0], [60.0], [float("nan")])])
    assert lasting_table({TRUTH: truth, STUDENT: own}, 5.0, 1.0, RESAMPLES)[STUDENT]["motion_lowest"].value == 0.5


def test_what_a_stream_loses_and_when_it_fails() -> None:
    """Segments of 5 s, training clips of 1 s: ten of them end with segment 1, fifty with segment 9."""
    ten, still = [1.0] * 10, [2.0] * 10
    truth = Row([0, 1, 2], [1, 1, 1], [stream(ten, ten, [60.0] * 10, still)] * 3)
    fails = [1.0] * 4 + [0.0] * 6  # right until 20 s
    values = [
        stream([1.0, 0.9, *[0.8] * 8], fails, [30.0, 29.0, *[27.0] * 8], still),
        stream([0.8, 0.7, *[0.6] * 8], [0.0] * 10, [30.0, 29.0, *[27.0] * 8], still),
        stream(ten, ten, [30.0, 29.0, *[27.0] * 8], [*[2.0] * 9, 8.0]),
    ]
    rows = {TRUTH: truth, STUDENT: Row([0, 1, 2], [1, 1, 1], values)}
    found = lasting_table(rows, 5.0, 1.0, RESAMPLES)[STUDENT]
    assert found["adherence_10x"].value == pytest.approx(-0.2 / 3)
    assert found["adherence_50x"].value == found["adherence_last_minus_first"].value == pytest.approx(-0.4 / 3)
    assert (found["psnr_10x"].value, found["psnr_50x"].value) == (-1.0, -3.0)
    assert found["adherence_lowest"].value == pytest.approx(0.8)
    assert found["motion_lowest"].value == 1.0 and found["motion_highest"].value == pytest.approx(2.0)
    assert found["right_at_first"].value == pytest.approx(2 / 3) and found["then_never_failed"].value == 0.5
    assert found["then_right_for_s_p50"].value == 20.0
    life = survival_table(rows, 5.0)
    assert life[STUDENT] == {"seconds": [0.0, 20.0, 50.0], "alive": [1.0, 0.5, 0.5]}
    assert life[TRUTH] == {"seconds": [0.0, 50.0], "alive": [1.0, 1.0]}
    assert "adherence_50x" not in lasting_table(rows, 5.0, 1.2, RESAMPLES)[STUDENT], "the streams are shorter than that"


def test_streams_that_never_were_right_have_no_time_to_fail() -> None:
    rows = {TRUTH: Row([0], [1], [stream([1, 1], [1, 1], [60, 60], [1, 1])])}
    rows[STUDENT] = Row([0], [1], [stream([0.5, 0.5], [0, 0], [math.nan] * 2, [math.nan] * 2)])
    found = lasting_table(rows, 5.0, 5.0, RESAMPLES)[STUDENT]
    assert found["right_at_first"].value == 0 and found["then_never_failed"].n == 0
    assert math.isnan(found["then_right_for_s_p50"].value) and found["motion_lowest"].value == 0
    assert set(survival_table(rows, 5.0)) == {TRUTH}


def test_goals_of_streams_need_ten_training_lengths() -> None:
    of = {goal.what: goal for goal in goals(Summary(lasting={STUDENT: {}}))}
    assert of["lowest adherence of a segment (share of truth)"].is_met is None
