"""Where numbers and notices go: metrics as one JSON object per line, messages through the standard `logging`.

A library must not configure logging: `setup_console` is for programs. Until it is called, warnings and notices still
reach stderr through Python's own fallback.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

_told: set[str] = set()


def get_logger(name: str = "unspool") -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`."""
    return logging.getLogger(name)


def setup_console(level: int = logging.INFO) -> None:
    """Print the library's messages on stderr, once however often it is called. For programs, never for modules."""
    logger = get_logger()
    logger.setLevel(level)
    if not any(handler.get_name() == "unspool-console" for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.set_name("unspool-console")
        handler.setFormatter(logging.Formatter("unspool: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def notice_once(key: str, message: str) -> None:
    """Tell the user something one time per process: a fallback taken, a backend chosen. `key` identifies the notice."""
    if key not in _told:
        _told.add(key)
        get_logger().warning(message)


class MetricsLog:
    """Metrics sink: appends `{"step": 3, "time_s": 1.2, "loss": 0.5}` lines to a file and, if asked, to the console.

    `time_s` counts from the creation of this object. Every line is flushed, so a killed run loses nothing; not-finite
    values are written as the strings "nan", "inf", "-inf" because JSON has no such numbers. Not thread-safe.
    """

    def __init__(self, path: str | Path | None, *, console_every: int = 0) -> None:
        """`path` None keeps nothing on disk; `console_every` n logs each n-th step (0: never)."""
        if console_every < 0:
            raise ValueError(f"console_every={console_every}: expected 0 (never) or a positive number of steps")
        self._start = time.perf_counter()
        self._console_every = console_every
        self._file: IO[str] | None = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step. Values are plain numbers: turning a tensor into one is the caller's sync."""
        reserved = {"step", "time_s"} & metrics.keys()
        if reserved:
            raise ValueError(f"metrics may not be called {', '.join(sorted(reserved))}; the sink writes these itself")
        values = {name: float(value) for name, value in metrics.items()}
        if self._file is not None:
            line: dict[str, int | float | str] = {
                "step": int(step),
                "time_s": round(time.perf_counter() - self._start, 3),
            }
            line.update({name: value if math.isfinite(value) else str(value) for name, value in values.items()})
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._console_every and step % self._console_every == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            get_logger().info("step %d  %s", step, shown)

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics file as dicts of numbers. A last line torn by a crash is dropped, any other raises."""
    rows: list[dict[str, float]] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({name: int(value) if name == "step" else float(value) for name, value in row.items()})
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a metrics line: {line[:60]!r}") from error
    return rows
