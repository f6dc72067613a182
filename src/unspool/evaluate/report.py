"""The results of an evaluation as files: numbers (JSON), tables (Markdown), curves where matplotlib is installed."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unspool.config import to_dict
from unspool.engine.files import replacing
from unspool.evaluate.goals import Goal, goals
from unspool.evaluate.protocol import PARTS
from unspool.evaluate.runner import Arm, commit, plain, scorer_mark
from unspool.evaluate.stage import CODEC, STUDENT, TRUTH, Evaluation, Results, waits
from unspool.evaluate.stats import Interval
from unspool.evaluate.tables import (
    Group,
    Summary,
    clip_table,
    compare_arms,
    compare_splits,
    lasting_table,
    spread_table,
    stream_table,
    survival_table,
    switch_table,
)

FORMAT, VERSION = "unspool-evaluation", 1
RESULTS_FILE, TABLE_FILE, CURVES_FILE = "results.json", "table.md", "curves.png"

FOLLOWING = {
    "adherence": "adherence", "strict": "all right", "adherence_share": "adherence / truth",
    "strict_share": "all right / truth", "presence": "present", "colour": "colour", "shape": "shape",
    "motion": "motion", "size": "size", "sky": "sky",
}  # fmt: skip
QUALITY = {
    "permanence": "permanence", "extra": "extra / frame", "missing": "missing / frame", "psnr": "manifold dB",
    "foreground_psnr": "of sprites dB", "jerk": "jerk", "motion_over_truth": "motion / truth",
    "boundary_step": "boundary step / elsewhere",
}  # fmt: skip
LONG = {
    "adherence": "adherence", "strict": "all right", "extra": "extra / frame", "psnr": "manifold dB",
    "motion_over_truth": "motion / truth", "boundary_step": "boundary step / elsewhere",
}  # fmt: skip
SWITCH_COLUMNS = {
    "p50": "p50 s", "p90": "p90 s", "p50_minus_truth": "p50 - truth s", "p90_minus_truth": "p90 - truth s",
    "never": "never", "untouched": "untouched right", "untouched_all": "of all", "before": "held before",
}  # fmt: skip
DIGITS = {"psnr": 1, "foreground_psnr": 1, "copy_psnr": 1, "copy_sprite_psnr": 1, "jerk": 4}


class Cost:
    """Wall and processor seconds since it was made (processes that have ended included)."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_s()

    def facts(self) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._wall, _cpu_s() - self._cpu
        return {"seconds": round(wall, 1), "cpu_s": round(cpu, 1), "cpu_over_wall": round(cpu / max(wall, 1e-9), 3)}


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def summarise(evaluation: Evaluation, results: Results) -> Summary:
    """All tables of what was measured."""
    config, resamples = evaluation.config, evaluation.config.resamples
    summary = Summary()
    for split, rows in results.clips.items():
        summary.clips[split] = clip_table(rows, resamples)
    if "test" in results.clips:
        summary.differences = compare_arms(results.clips["test"], resamples)
    if "heldout" in results.clips:
        summary.seen_minus_held_out = compare_splits(results.clips["test"], results.clips["heldout"], resamples)
    if results.switches:
        summary.switches = switch_table(results.switches, waits(config, evaluation.clock), resamples)
    if results.streams:
        summary.streams = stream_table(results.streams, resamples)
        summary.lasting = lasting_table(
            results.streams, config.streams.segment_s, config.clips.frames / evaluation.form.fps, resamples
        )
        summary.survival = survival_table(results.streams, config.streams.segment_s)
    if results.spread:
        summary.spread = spread_table(results.spread, resamples)
    return summary


def results_of(evaluation: Evaluation, results: Results, summary: Summary, cost: Cost) -> dict[str, Any]:
    """The content of the results file."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "protocol": to_dict(evaluation.config),
        "parts": [part for part in PARTS if getattr(results, part)],
        "models": {arm.name: _arm_facts(arm) for arm in evaluation.arms},
        "environment": environment(evaluation.student),
        "cost": cost.facts(),
        "generation": {  # compiling and the first chunks included: no measure of speed
            name: {"frames": t.frames, "seconds": round(t.seconds, 2)} for name, t in evaluation.times.items()
        },
        "clips_made_by": sorted(evaluation.store.made_by),
        "goals": [_goal_facts(goal) for goal in goals(summary)],
        "tables": _tree({name: getattr(summary, name) for name in Summary.__dataclass_fields__}),
    }


def environment(arm: Arm) -> dict[str, Any]:
    """Where the numbers were made."""
    from unspool import __version__

    device = arm.pipeline.device
    return {
        "unspool": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(arm.pipeline.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "scorer": scorer_mark(),
    }


def _arm_facts(arm: Arm) -> dict[str, Any]:
    spec = arm.pipeline.spec
    return {
        "name": spec.name, "kind": spec.kind, "weights": arm.pipeline.weights, "settings": to_dict(arm.settings),
        "size": f"{spec.width_px}x{spec.height_px} px, {spec.fps:g}/s", "provenance": spec.provenance,
    }  # fmt: skip


def _goal_facts(goal: Goal) -> dict[str, Any]:
    value = None if goal.value is None else _tree(goal.value)
    return {"what": goal.what, "goal": goal.bound, "value": value, "met": goal.is_met, "sure": goal.is_sure}


def _tree(value: Any) -> Any:
    """Nested tables with each interval as {"value", "low", "high", "n"}."""
    if isinstance(value, Interval):
        return {name: plain(number) for name, number in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _tree(item) for key, item in value.items()}
    return [_tree(item) for item in value] if isinstance(value, list) else value


# ---- words ---------------------------------------------------------------------------------------------------------


def shown(value: Interval | None, digits: int = 3) -> str:
    """`0.953 [0.93, 0.97]`; "not measured" or "-" where there is nothing."""
    if value is None or math.isnan(value.value):
        return "-"
    text = _number(value.value, digits)
    if math.isnan(value.low) or value.low == value.value == value.high:
        return text  # one prompt, or all of them alike
    return f"{text} [{_number(value.low, digits)}, {_number(value.high, digits)}]"


def _number(value: float, digits: int) -> str:
    return "never" if value == math.inf else f"{value:.{digits}f}"


def goal_lines(found: Iterable[Goal]) -> list[str]:
    """The table of goals as Markdown."""
    lines = ["| | goal | measured, 95 % interval | prompts | |", "|---|---|---|---|---|"]
    for goal in found:
        verdict = {True: "met", False: "**not met**", None: ""}[goal.is_met] + ("" if goal.is_sure else " (not sure)")
        value = "not measured" if goal.is_met is None else shown(goal.value, 1 if "dB" in goal.unit else 3)
        count = "" if goal.value is None or goal.is_met is None else str(goal.value.n)
        lines.append(f"| {goal.what} | {goal.bound} | {value} | {count} | {verdict} |")
    return lines


def table_lines(rows: Mapping[str, Group], columns: Mapping[str, str], first: str) -> list[str]:
    """A table with one line per row as Markdown."""
    used = {name: head for name, head in columns.items() if any(name in group for group in rows.values())}
    lines = [f"| {first} | n | {' | '.join(used.values())} |", "|---" * (len(used) + 2) + "|"]
    for label, group in rows.items():
        cells = [shown(group.get(name), DIGITS.get(name, 3)) for name in used]
        count = max((value.n for value in group.values()), default=0)
        lines.append(f"| {label} | {count} | {' | '.join(cells)} |")
    return lines


def markdown(summary: Summary, facts: Mapping[str, Any]) -> str:
    """All tables for a document, the goals first."""
    lines = [f"**Goals** ({_conditions(facts)})", "", *goal_lines(goals(summary)), ""]
    for split, rows in summary.clips.items():
        title = {"test": "Unseen prompts", "heldout": "Compositions that training never shows"}[split]
        for group in sorted({g for groups in rows.values() for g in groups}, key=lambda g: (g != "all", g)):
            of = "all numbers of sprites" if group == "all" else f"{group} sprite{'s' * (group != '1')}"
            table = {name: groups[group] for name, groups in rows.items() if group in groups}
            lines += [f"**{title}, {of}**", "", *table_lines(table, FOLLOWING, "row"), ""]
            lines += [*table_lines(table, QUALITY, "row"), ""]
    copy = summary.clips.get("test", {}).get(CODEC, {})
    if copy:
        lines += ["**Codec round trip against truth**", ""]
        columns = {"copy_psnr": "psnr dB", "copy_sprite_psnr": "sprite pixels dB"}
        lines += [*table_lines(copy, columns, "sprites"), ""]
    if summary.switches:
        table = {f"{kind}, {row}": group for kind, rows in summary.switches.items() for row, group in rows.items()}
        lines += ["**Change of prompt in a stream**, from the moment it is given, waiting for the chunk boundary"]
        lines += ["included; what never came counts as infinite", "", *table_lines(table, SWITCH_COLUMNS, "event"), ""]
    for name, segments in summary.streams.items():
        table = {str(number): group for number, group in enumerate(segments)}
        seconds = facts["protocol"]["streams"]["segment_s"]
        lines += [
            f"**Streams, {name}**, by segment of {seconds:g} s",
            "",
            *_folded(table_lines(table, LONG, "segment")),
        ]
    if summary.lasting:
        columns = {name: name.replace("_", " ") for name in summary.lasting[TRUTH]}
        lines += ["**How long streams last**: segments against the first one; the last four columns of those that"]
        lines += ["begin right, by Kaplan and Meier", "", *table_lines(summary.lasting, columns, "row"), ""]
    if summary.spread:
        count, seeds = (facts["protocol"]["spread"][name] for name in ("prompts", "seeds"))
        lines += [f"**Diversity**: spread of {seeds} clips of one prompt over that of the stage's own arrangements"]
        lines += [f"of it, {count} prompts; 1 is as diverse, 0 one clip per prompt", ""]
        columns = {"start": "where sprites begin", "course": "their course over 1 s", "diversity": "both"}
        lines += [*table_lines(summary.spread, columns, "row"), ""]
    return "\n".join(lines)


def _folded(table: list[str]) -> list[str]:
    """A long table, out of the way until somebody opens it."""
    is_long = len(table) > 20
    return ["<details><summary>the table</summary>", "", *table, "", "</details>", ""] if is_long else [*table, ""]


def _conditions(facts: Mapping[str, Any]) -> str:
    arm, where = facts["models"][STUDENT], facts["environment"]
    return (
        f"Sprite Stage, {arm['size']}, {facts['protocol']['clips']['prompts']} prompts, weights {arm['weights']}, "
        f"{where['device']} {where['dtype']}, scorer {where['scorer']}"
    )


# ---- files ---------------------------------------------------------------------------------------------------------


def write(folder: Path, facts: Mapping[str, Any], summary: Summary) -> list[Path]:
    """Write numbers, tables, and curves where they can be drawn; the paths written."""
    content = {
        RESULTS_FILE: json.dumps(facts, indent=1, allow_nan=False) + "\n",
        TABLE_FILE: markdown(summary, facts),
    }
    for name, text in content.items():
        with replacing(folder / name) as file:
            file.write_text(text, encoding="utf-8")
    written = [folder / name for name in content]
    return [*written, folder / CURVES_FILE] if curves(folder / CURVES_FILE, summary, facts) else written


def read(path: Path) -> dict[str, Any]:
    """A results file. Raises FileNotFoundError, or ValueError for anything else."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a results file: {error}") from None
    if not isinstance(facts, dict) or (facts.get("format"), facts.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected {FORMAT} version {VERSION}; evaluate again with this release")
    return facts


def curves(path: Path, summary: Summary, facts: Mapping[str, Any]) -> bool:
    """What becomes of a stream: adherence, manifold PSNR, motion, and how many are still right, against its time; False
    where matplotlib or the streams are missing."""
    if not summary.streams:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    segment_s = facts["protocol"]["streams"]["segment_s"]
    colours = {name: f"C{number}" for number, name in enumerate(summary.streams)}
    shown = {"adherence": "adherence", "psnr": "manifold PSNR, dB", "motion_over_truth": "motion over truth"}
    for place, (metric, label) in enumerate(shown.items()):
        axes = figure.add_subplot(2, 2, place + 1)
        for name, segments in summary.streams.items():
            _curve(axes, name, [group[metric] for group in segments if metric in group], segment_s, colours[name])
        axes.set_ylabel(label)
    axes = figure.add_subplot(2, 2, 4)
    for name, life in summary.survival.items():
        axes.step(life["seconds"], life["alive"], where="post", label=name, color=colours[name])
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("still right, of those right at first")
    for axes in figure.axes:
        axes.set_xlabel("seconds of the stream")
        axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return True


def _curve(axes: Any, name: str, values: Sequence[Interval], segment_s: float, colour: str) -> None:
    at = [(k + 0.5) * segment_s for k in range(len(values))]
    axes.plot(at, [v.value for v in values], marker="o", label=name, color=colour)
    axes.fill_between(at, [v.low for v in values], [v.high for v in values], alpha=0.2, color=colour)
