"""From measurements to numbers with intervals: by row, by number of sprites, as a share of the truth row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.scorer import SCORES
from unspool.evaluate import stats
from unspool.evaluate.spread import diversity, spreads
from unspool.evaluate.stage import MANY, STUDENT, TEACHER, TRUTH, Row, Rows
from unspool.evaluate.stats import Interval

F64 = NDArray[np.float64]
Group = dict[str, Interval]
"""Metric -> estimate."""

ALL = "all"
SHARES = ("adherence", "strict")
"""Metrics that are also given as a share of the truth row ("<metric>_share")."""
COPIED = ("copy_psnr", "copy_sprite_psnr")
LENGTHS = (10, 50)
"""Lengths of streams at which drift is stated, in training lengths."""


@dataclass
class Summary:
    """The tables: split -> row -> number of sprites ("all", "1"...) -> metric -> estimate, and beside them
    `differences` ("student - teacher" -> ...; shares of the truth row, and manifold PSNR in dB) and
    `seen_minus_held_out` (row -> ..., in shares of the truth row)."""

    clips: dict[str, dict[str, dict[str, Group]]] = field(default_factory=dict)
    differences: dict[str, dict[str, Group]] = field(default_factory=dict)
    seen_minus_held_out: dict[str, dict[str, Group]] = field(default_factory=dict)
    switches: dict[str, dict[str, Group]] = field(default_factory=dict)
    streams: dict[str, list[Group]] = field(default_factory=dict)
    spread: dict[str, Group] = field(default_factory=dict)
    """Row -> how differently one prompt is arranged, over the truth; and the student's spread over the teacher's."""
    lasting: dict[str, Group] = field(default_factory=dict)
    """Streams, by row: what later segments lose, and how long what began right stays so."""
    survival: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def column(row: Row, name: str) -> F64:
    """One metric of every clip; NaN where it was not measured."""
    return np.array([values.get(name, math.nan) for values in row.values], np.float64)


def groups_of(row: Row) -> list[tuple[str, NDArray[np.bool_]]]:
    """All clips, and those of each number of sprites."""
    sprites = np.array(row.sprites)
    return [(ALL, np.ones(len(sprites), bool)), *((str(n), sprites == n) for n in sorted(set(row.sprites)))]


def aligned(truth: Row, row: Row, name: str) -> F64:
    """A metric of the truth for the prompt of every clip of `row`."""
    known = dict(zip(truth.clusters, column(truth, name).tolist(), strict=True))
    return np.array([known.get(cluster, math.nan) for cluster in row.clusters], np.float64)


def speeds(row: Row, truth: Row, name: str = "speed") -> tuple[F64, F64]:
    """Mean speeds of the sprites of a row and of the truth; where a row has lost all of them nothing moves."""
    own, true = column(row, name), aligned(truth, row, name)
    return np.where(np.isnan(own) & ~np.isnan(true), 0.0, own), true


def clip_table(rows: Rows, resamples: int) -> dict[str, dict[str, Group]]:
    """Row -> group -> metric -> estimate of clips under one prompt."""
    return {
        name: {group: _clip_group(row, rows[TRUTH], mask, resamples) for group, mask in groups_of(row)}
        for name, row in rows.items()
    }


def _clip_group(row: Row, truth: Row, mask: NDArray[np.bool_], resamples: int) -> Group:
    clusters = np.array(row.clusters)[mask]
    over = partial(stats.ratio, clusters=clusters, resamples=resamples)
    out: Group = {}
    for name in (*SCORES, *COPIED):
        values = column(row, name)[mask]
        if not np.isnan(values).all():
            out[name] = stats.mean(values, clusters, resamples=resamples)
    strict = column(row, "strict")[mask]
    if len(set(clusters.tolist())) == len(clusters):  # independent trials: an interval that is honest at 0 and 1
        judged = strict[~np.isnan(strict)]
        out["strict"] = stats.wilson(int(judged.sum()), len(judged))
    for name in SHARES:
        out[f"{name}_share"] = over(column(row, name)[mask], aligned(truth, row, name)[mask])
    own, true = speeds(row, truth)
    out["motion_over_truth"] = over(own[mask], true[mask])
    out["boundary_step"] = over(column(row, "step_boundary")[mask], column(row, "step_elsewhere")[mask])
    return out


def pairs(rows: Iterable[str]) -> list[tuple[str, str]]:
    """Which of the rows is compared with which: what was taught with what taught it."""
    have = set(rows)
    return [(a, b) for a, b in ((STUDENT, TEACHER), (STUDENT, MANY), (MANY, TEACHER)) if a in have and b in have]


def compare_arms(rows: Rows, resamples: int) -> dict[str, dict[str, Group]]:
    """ "a - b" -> group -> a minus b, paired by clip: shares of the truth row, and manifold PSNR in dB."""
    out: dict[str, dict[str, Group]] = {}
    for first, second in pairs(rows):
        a, b, truth = rows[first], rows[second], rows[TRUTH]
        table = out.setdefault(f"{first} - {second}", {})
        for group, mask in groups_of(a):
            clusters = np.array(a.clusters)[mask]
            differ = partial(_difference, rows=(a, b), mask=mask)
            found: Group = {"psnr": stats.paired_difference(*differ("psnr"), clusters, resamples=resamples)}
            for name in SHARES:
                x, y = differ(name)
                over = aligned(truth, a, name)[mask]
                found[f"{name}_share"] = stats.share_difference((x, over), (y, over), clusters, resamples=resamples)
            table[group] = found
    return out


def _difference(name: str, *, rows: tuple[Row, Row], mask: NDArray[np.bool_]) -> tuple[F64, F64]:
    first, second = (column(row, name)[mask] for row in rows)
    return first, second


def compare_splits(seen: Rows, held_out: Rows, resamples: int) -> dict[str, dict[str, Group]]:
    """Row -> group -> seen minus held-out compositions, in shares of their truth rows."""
    out: dict[str, dict[str, Group]] = {}
    for name in (TEACHER, MANY, STUDENT):
        if name not in seen or name not in held_out:
            continue
        second = dict(groups_of(held_out[name]))
        for group, mask in groups_of(seen[name]):
            if group in second:
                out.setdefault(name, {})[group] = {
                    f"{metric}_share": stats.independent_difference(
                        _share(seen, name, metric, mask), _share(held_out, name, metric, second[group]),
                        resamples=resamples,
                    )
                    for metric in SHARES
                }  # fmt: skip
    return out


def _share(rows: Rows, name: str, metric: str, mask: NDArray[np.bool_]) -> tuple[F64, F64, NDArray[np.int64]]:
    row = rows[name]
    return column(row, metric)[mask], aligned(rows[TRUTH], row, metric)[mask], np.array(row.clusters)[mask]


# ---- switches ------------------------------------------------------------------------------------------------------


def switch_table(kinds: dict[str, Rows], phases: Sequence[float], resamples: int) -> dict[str, dict[str, Group]]:
    """Kind of event ("all" first) -> row -> metric -> estimate. `phases`: waits for the chunk boundary in seconds.

    Scenes in which the truth does not visibly change (it held before, or the scorer never sees it) are left out of both
    rows; `n` says how many stay.
    """
    visible = {kind: _visible(rows) for kind, rows in kinds.items()}
    joined = {name: Row() for name in (TRUTH, STUDENT)}
    for number, rows in enumerate(visible.values()):
        for name, row in rows.items():
            joined[name].clusters += [number * 1_000_000 + c for c in row.clusters]
            joined[name].sprites += row.sprites
            joined[name].values += row.values
    out: dict[str, dict[str, Group]] = {}
    for kind, rows in {ALL: joined, **visible}.items():
        truth = rows[TRUTH]
        out[kind] = {TRUTH: _switch_group(truth, truth, [0.0], resamples)}
        out[kind][STUDENT] = _switch_group(rows[STUDENT], truth, phases, resamples)
    return out


def _visible(rows: Rows) -> Rows:
    truth = rows[TRUTH]
    seen = (column(truth, "before") == 0) & np.isfinite(column(truth, "delay"))
    keep = np.flatnonzero(seen)
    return {
        name: Row([row.clusters[k] for k in keep], [row.sprites[k] for k in keep], [row.values[k] for k in keep])
        for name, row in rows.items()
    }


def _switch_group(row: Row, truth: Row, phases: Sequence[float], resamples: int) -> Group:
    clusters, wait = np.repeat(row.clusters, len(phases)), np.tile(phases, len(row.clusters))
    delay = np.repeat(column(row, "delay"), len(phases)) + wait
    own = delay - np.repeat(column(truth, "delay"), len(phases))
    at = partial(stats.quantile, clusters=clusters, resamples=resamples)
    average = partial(stats.mean, clusters=row.clusters, resamples=resamples)
    never = np.isinf(column(row, "delay"))
    return {
        "p50": at(delay, share=0.5),
        "p90": at(delay, share=0.9),
        "p50_minus_truth": at(own, share=0.5),
        "p90_minus_truth": at(own, share=0.9),
        "never": stats.wilson(int(never.sum()), len(never)),
        "before": average(column(row, "before")),
        "untouched": average(column(row, "untouched")),
        "untouched_all": average(column(row, "untouched_all")),
    }


# ---- streams -------------------------------------------------------------------------------------------------------


def stream_table(rows: Rows, resamples: int) -> dict[str, list[Group]]:
    """Row -> segments in order -> metric -> estimate."""
    out: dict[str, list[Group]] = {}
    for name, row in rows.items():
        out[name] = []
        for k in range(num_segments(row)):
            group: Group = {}
            for score in SCORES:
                values = column(row, f"{score}.{k}")
                if not np.isnan(values).all():
                    group[score] = stats.mean(values, row.clusters, resamples=resamples)
            speed, true_speed = speeds(row, rows[TRUTH], f"speed.{k}")
            group["motion_over_truth"] = stats.ratio(speed, true_speed, row.clusters, resamples=resamples)
            group["boundary_step"] = stats.ratio(
                column(row, f"step_boundary.{k}"), column(row, f"step_elsewhere.{k}"), row.clusters,
                resamples=resamples,
            )  # fmt: skip
            out[name].append(group)
    return out


def lasting_table(rows: Rows, segment_s: float, clip_s: float, resamples: int) -> dict[str, Group]:
    """Row -> what long streams lose: adherence and manifold PSNR of the last segment minus the first, and of those that
    end at 10 and 50 times `clip_s` (the training length) where the streams are as long ("adherence_10x", "psnr_50x");
    the lowest adherence of a segment as a share of the truth, and the lowest and highest motion over truth of one; how
    many streams are right in their first segment, and of these how long they stay so (see `survival_table`)."""
    out: dict[str, Group] = {}
    streams = stream_table(rows, resamples)
    for name, row in rows.items():
        count, own = num_segments(row), {}
        places = {"last_minus_first": count - 1}
        for times in LENGTHS:
            place = math.floor(times * clip_s / segment_s + 1e-9) - 1
            if 0 < place < count:
                places[f"{times}x"] = place
        for label, place in places.items():
            for score in ("adherence", "psnr"):
                after, before = column(row, f"{score}.{place}"), column(row, f"{score}.0")
                own[f"{score}_{label}"] = stats.paired_difference(after, before, row.clusters, resamples=resamples)
        shares = [
            stats.ratio(column(row, f"adherence.{k}"), aligned(rows[TRUTH], row, f"adherence.{k}"), row.clusters,
                        resamples=resamples)
            for k in range(count)
        ]  # fmt: skip
        motion = [segment["motion_over_truth"] for segment in streams[name]]
        own["adherence_lowest"] = _ordered(shares)[0]
        own["motion_lowest"], own["motion_highest"] = _ordered(motion)[0], _ordered(motion)[-1]
        ends, has_failed, right = _ends(row, segment_s)
        own["right_at_first"] = stats.wilson(len(ends), right)
        lasting = stats.kaplan_meier(ends, has_failed).quantile(0.5) if ends else math.nan
        own["then_right_for_s_p50"] = Interval(lasting, math.nan, math.nan, len(ends))
        own["then_never_failed"] = stats.wilson(len(ends) - sum(has_failed), len(ends))
        out[name] = own
    return out


def survival_table(rows: Rows, segment_s: float) -> dict[str, dict[str, list[float]]]:
    """Row -> share of streams that have been right in every segment so far ("alive" after "seconds"), by Kaplan and
    Meier: what never fails is censored at its end. Of those that are strictly right in their first segment; a row
    without any is left out."""
    out: dict[str, dict[str, list[float]]] = {}
    for name, row in rows.items():
        ends, has_failed, _ = _ends(row, segment_s)
        if not ends:
            continue
        life = stats.kaplan_meier(ends, has_failed)
        alive = [1.0, *life.alive]
        out[name] = {"seconds": [0.0, *life.times, num_segments(row) * segment_s], "alive": [*alive, alive[-1]]}
    return out


def _ends(row: Row, segment_s: float) -> tuple[list[float], list[bool], int]:
    """Of the streams that begin right: when each fails or is last seen, and whether it failed; and how many streams."""
    strict = np.stack([column(row, f"strict.{k}") for k in range(num_segments(row))], 1)
    wrong = strict[strict[:, 0] == 1] == 0
    ends = np.where(wrong.any(1), wrong.argmax(1), wrong.shape[1]) * segment_s
    return ends.tolist(), wrong.any(1).tolist(), len(strict)


def _ordered(values: Iterable[Interval]) -> list[Interval]:
    """What was measured, the lowest first; one that was not where nothing was."""
    return sorted((v for v in values if not math.isnan(v.value)), key=lambda v: v.value) or [stats.NOTHING]


def spread_table(rows: Rows, resamples: int) -> dict[str, Group]:
    """Row -> diversity over the truth; "student / teacher" where both are there (and so on)."""
    found = {name: spreads(row.values, row.clusters) for name, row in rows.items()}
    out = {name: diversity(own, found[TRUTH], resamples) for name, own in found.items() if name != TRUTH}
    for a, b in pairs(found):
        out[f"{a} / {b}"] = diversity(found[a], found[b], resamples)
    return out


def num_segments(row: Row) -> int:
    """Segments of the streams of a row."""
    return 1 + max((int(name.rpartition(".")[2]) for name in row.values[0]), default=-1)
