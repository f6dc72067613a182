"""What a stage model has to reach, as data: each goal with the number that was measured, or "not measured"."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from unspool.evaluate.stage import CODEC, MANY, STUDENT, TEACHER, TRUTH
from unspool.evaluate.stats import Interval
from unspool.evaluate.tables import ALL, Group, Summary


@dataclass(frozen=True)
class Goal:
    """`value` must lie within [low, high]; None: not measured."""

    what: str
    value: Interval | None
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""

    @property
    def is_met(self) -> bool | None:
        """By the estimate itself; its interval stands beside it. None where there is none."""
        if self.value is None or math.isnan(self.value.value):
            return None
        return self.low <= self.value.value <= self.high

    @property
    def is_sure(self) -> bool:
        """Whether the whole 95 % interval is on the side of the estimate; True where there is none."""
        if self.value is None or self.is_met is None:
            return True
        at, low, high = self.value.value, self.value.low, self.value.high
        low, high = (at if math.isnan(end) else end for end in (low, high))
        return self.low <= low and high <= self.high if self.is_met else high < self.low or low > self.high

    @property
    def bound(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if math.isinf(self.high):
            return f">= {low}{self.unit}"
        return f"<= {high}{self.unit}" if math.isinf(self.low) else f"{low} to {high}{self.unit}"


ONE, TWO = "1", "2"
TEACHER_SHARES = {(ONE, "adherence"): 0.97, (ONE, "strict"): 0.90, (TWO, "adherence"): 0.95, (TWO, "strict"): 0.80}
NAMES = {"adherence": "mean attribute adherence", "strict": "all attributes right"}


def goals(summary: Summary) -> list[Goal]:
    """Every goal of the stage model, in the order of the table."""
    return [
        *_codec(summary),
        *_teacher(summary),
        *_student(summary),
        *_switches(summary),
        *_streams(summary),
        *_held_out(summary),
        *_spread(summary),
    ]


def _codec(summary: Summary) -> Iterator[Goal]:
    copy, truth = _clips(summary, CODEC, ALL), _clips(summary, TRUTH, ALL)
    yield Goal("codec round trip, PSNR", copy.get("copy_psnr"), low=34, unit=" dB")
    yield Goal("codec round trip, PSNR of sprite pixels", copy.get("copy_sprite_psnr"), low=28, unit=" dB")
    lost = None
    if "adherence" in copy and "adherence" in truth:
        a, b = copy["adherence"], truth["adherence"]
        lost = Interval(b.value - a.value, math.nan, math.nan, a.n)
    yield Goal("codec round trip, adherence below truth", lost, low=-0.01, high=0.01)


def _teacher(summary: Summary) -> Iterator[Goal]:
    for (group, metric), low in TEACHER_SHARES.items():
        value = _clips(summary, TEACHER, group).get(f"{metric}_share")
        yield Goal(f"teacher, {NAMES[metric]}, {_sprites(group)} (share of truth)", value, low=low)


def _student(summary: Summary) -> Iterator[Goal]:
    yield from _taught(summary)
    own = _clips(summary, STUDENT, ALL)
    yield Goal("student, permanence", own.get("permanence"), low=0.97)
    true = _clips(summary, TRUTH, ALL).get("boundary_step")
    beside = "" if true is None or math.isnan(true.value) else f" (truth: {true.value:.2f})"
    yield Goal(f"student, boundary step over steps elsewhere{beside}", own.get("boundary_step"), low=0.85, high=1.15)
    yield Goal("student, motion over truth", own.get("motion_over_truth"), low=0.9, high=1.1)


def _taught(summary: Summary) -> Iterator[Goal]:
    """Each network against what taught it. A student of few steps may lose more than one of many."""
    few = MANY in summary.clips.get("test", {})
    for a, b in ((MANY, TEACHER), (STUDENT, MANY), (STUDENT, TEACHER)) if few else ((STUDENT, TEACHER),):
        found = summary.differences.get(f"{a} - {b}", {})
        lowest = {"adherence": -0.03, "strict": -0.06 if a == STUDENT and few else -0.03}
        for group in (ONE, TWO):
            for metric, low in lowest.items():
                value = found.get(group, {}).get(f"{metric}_share")
                yield Goal(f"{a} minus {b}, {NAMES[metric]}, {_sprites(group)}", value, low=low)
        if a == STUDENT and few:
            yield Goal(f"{a} minus {b}, manifold PSNR", found.get(ALL, {}).get("psnr"), low=-1, unit=" dB")


def _streams(summary: Summary) -> Iterator[Goal]:
    found = summary.lasting.get(STUDENT, {})
    yield Goal("stream at 10 training lengths, adherence minus the first segment's", found.get("adherence_10x"), -0.03)
    yield Goal("the same, manifold PSNR", found.get("psnr_10x"), low=-1.5, unit=" dB")
    yield Goal("lowest adherence of a segment (share of truth)", found.get("adherence_lowest"), low=0.85)
    yield Goal("lowest motion of a segment over truth", found.get("motion_lowest"), low=0.9, high=1.1)
    yield Goal("highest motion of a segment over truth", found.get("motion_highest"), low=0.9, high=1.1)


def _switches(summary: Summary) -> Iterator[Goal]:
    for kind, rows in summary.switches.items() or [(ALL, {})]:
        group = rows.get(STUDENT, {})
        yield Goal(f"prompt switch ({kind}), p50", group.get("p50"), high=0.8, unit=" s")
        yield Goal(f"prompt switch ({kind}), p90", group.get("p90"), high=1.5, unit=" s")
        yield Goal(f"prompt switch ({kind}), untouched things still right", group.get("untouched"), low=0.95)


def _held_out(summary: Summary) -> Iterator[Goal]:
    for name in (TEACHER, MANY, STUDENT):
        if name == MANY and MANY not in summary.clips.get("test", {}):
            continue
        for metric in ("adherence", "strict"):
            value = summary.seen_minus_held_out.get(name, {}).get(ALL, {}).get(f"{metric}_share")
            yield Goal(f"{name}, seen minus held-out compositions, {NAMES[metric]}", value, high=0.10)


def _spread(summary: Summary) -> Iterator[Goal]:
    for other in (TEACHER, MANY) if MANY in summary.spread else (TEACHER,):
        value = summary.spread.get(f"{STUDENT} / {other}", {}).get("diversity")
        yield Goal(f"diversity, student over {other}", value, low=0.9)


def _clips(summary: Summary, row: str, group: str) -> Group:
    return summary.clips.get("test", {}).get(row, {}).get(group, {})


def _sprites(group: str) -> str:
    return f"{group} sprite{'s' * (group != ONE)}"
