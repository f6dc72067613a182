"""What a training tells: metrics to JSONL and, where it is installed, TensorBoard; progress to people."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unspool.log import MetricsLog, get_logger
from unspool.train.parallel import World

METRICS = "metrics.jsonl"


class Window:
    """Means of the metrics since the last log, over steps, micro-batches and ranks; NaN values do not count.

    Adding never waits for the device; `means` does, once.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Take in the metrics of one micro-batch."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else float(value))

    def means(self, world: World) -> dict[str, float]:
        """The means, and begin anew. All ranks must have had the same names; what was NaN throughout is left out."""
        names = sorted(self._values)
        if not names:
            return {}
        columns = [_column(self._values[name]) for name in names]
        counted = [~torch.isnan(column) for column in columns]
        sums = torch.stack([column[mask].sum() for column, mask in zip(columns, counted, strict=True)])
        counts = torch.stack([mask.sum().double() for mask in counted])
        total = world.sum(torch.cat([sums, counts]))
        self._values = {}
        means = (total[: len(names)] / total[len(names) :]).tolist()
        return {name: mean for name, mean in zip(names, means, strict=True) if not math.isnan(mean)}


def _column(values: list[Tensor | float]) -> Tensor:
    """Float64 on the CPU; tensors of the device come over in one transfer."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    plain = torch.tensor([value for value in values if not isinstance(value, Tensor)], dtype=torch.float64)
    return torch.cat([torch.stack([t.float() for t in tensors]).double().cpu(), plain]) if tensors else plain


class Sink:
    """Numbers of a run: `metrics.jsonl` in the run's folder and TensorBoard events where the package is there."""

    def __init__(self, folder: Path | None, *, start: int = 0) -> None:
        """`start`: lines of steps after it are dropped, since they will be written again. None keeps nothing."""
        self._log = MetricsLog(None)
        self._board: Any = None
        if folder is None:
            return
        drop_after(folder / METRICS, start)
        self._log = MetricsLog(folder / METRICS)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of `step`, which counts finished steps."""
        self._log.write(step, metrics)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        if self._board is not None:
            self._board.close()


def drop_after(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to `step`; a torn last line goes, too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


class Display:
    """Progress for people: a bar with the time to the end on a terminal, else a line every half minute."""

    LINE_S = 30.0

    def __init__(self, name: str, steps: int, start: int, *, shown: bool) -> None:
        self._name, self._steps, self._start = name, steps, start
        self._began = self._told = time.perf_counter()
        self._bar: Any = None
        self._text = ""
        self._shown = shown
        if shown and sys.stderr.isatty():
            self._bar, self._task = _rich_bar(name, steps, start)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` steps are done; `metrics` where new ones were logged."""
        if not self._shown:
            return
        if metrics:
            names = ("loss", "grad_norm", "samples_per_s")
            self._text = "  ".join(f"{n} {metrics[n]:.4g}" for n in names if n in metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text)
            return
        now = time.perf_counter()
        if metrics and (now - self._told >= self.LINE_S or step >= self._steps or self._told == self._began):
            self._told = now
            left = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            get_logger(__name__).info(
                "%s step %d of %d  %s  %s to go", self._name, step, self._steps, self._text, duration(left)
            )

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def _rich_bar(name: str, steps: int, start: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
    bar.start()
    return bar, bar.add_task(name, total=steps, completed=start, text="")


def duration(seconds: float) -> str:
    """`95` -> `1m35s`, `7260` -> `2h01m`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
