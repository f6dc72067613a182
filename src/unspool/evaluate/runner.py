"""The machinery of an evaluation: clips that a model makes and what was measured on them, both kept on disk.

Each is found again by a hash of all that it depends on (weights, settings, prompts, noise; for measurements also the
code of the scorer), so an interrupted evaluation continues where it stopped, and a changed one measures only what
changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unspool.engine.files import replacing
from unspool.engine.pipeline import Pipeline
from unspool.engine.settings import RolloutSettings
from unspool.evaluate.measures import Frames, Measure, Values, call
from unspool.evaluate.own_code import own_code, settings_facts


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model under test, and what is changed of its own settings."""

    name: str
    pipeline: Pipeline
    steps: int | None = None
    guidance: float | None = None

    @property
    def settings(self) -> RolloutSettings:
        return self.pipeline.settings(steps=self.steps, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch of clips: prompt j with the noise of (seed, samples[j]); `switches`: (seconds, prompts)."""

    prompts: tuple[str, ...]
    samples: tuple[int, ...]
    seed: int
    frames: int
    switches: tuple[tuple[float, tuple[str, ...]], ...] = ()


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+" where files differ from it; None elsewhere."""
    folder = Path(__file__).parents[1]
    try:
        head, changed = (
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


def mark(*facts: object) -> str:
    """24 hex digits that tell facts (JSON data) apart."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@lru_cache(maxsize=1)
def scorer_mark() -> str:
    """A hash of the code that measures: of the world with its scorer, and of what is built on it here."""
    import unspool.data.worlds as worlds

    folder = Path(worlds.__file__).parent
    files = [*sorted(folder.glob("*.py")), *(Path(__file__).with_name(f"{n}.py") for n in ("measures", "switches"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def code_mark(name: str) -> str:
    """A hash of a module of this folder, for what only some rows are measured by."""
    return hashlib.sha256(Path(__file__).with_name(f"{name}.py").read_bytes()).hexdigest()[:16]


class ClipStore:
    """Generated batches in a folder, one compressed file each, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made_by: set[str] = set()
        """Commits whose code made the clips that were asked for; the key of a clip does not hold it."""
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, arm: Arm, request: Request) -> str:
        """All that the frames depend on."""
        pipeline, own = arm.pipeline, own_code(arm.pipeline, arm.settings)
        facts = (pipeline.weights, settings_facts(arm.settings), asdict(request), pipeline.device.type,
                 str(pipeline.dtype))  # fmt: skip
        return mark(*facts, *([own] if own else []))

    def clips(self, arm: Arm, request: Request) -> Frames:
        """Frames [b, f, y, x, 3], made unless they are there."""
        path = self.folder / f"{arm.name}-{self.key(arm, request)}.npz"
        kept = _read(path)
        if kept is not None:
            return kept
        videos = arm.pipeline.generate_many(
            list(request.prompts), frames=request.frames, seed=request.seed, samples=request.samples,
            switches=request.switches, steps=arm.steps, guidance=arm.guidance,
        )  # fmt: skip
        frames = np.stack([video.frames for video in videos])
        with replacing(path) as file, open(file, "wb") as stream:
            np.savez_compressed(stream, frames=frames, work_s=videos[0].timing.work_s, commit=commit() or "")
        return frames

    def seconds(self, arm: Arm, request: Request) -> float:
        """How long the batch took to generate; NaN where it is not there."""
        path = self.folder / f"{arm.name}-{self.key(arm, request)}.npz"
        if not path.is_file():
            return math.nan
        with np.load(path) as content:
            self.made_by.add(str(content["commit"]) if "commit" in content else "")
            return float(content["work_s"])


def _read(path: Path) -> NDArray[np.uint8] | None:
    """The frames of a file; None where there is none, or one that a crash of the machine has torn."""
    try:
        with path.open("rb") as file, np.load(file) as content:
            frames: NDArray[np.uint8] = content["frames"]
            return frames
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
        return None


class Measures:
    """Measurements by key in one growing file; what is missing is measured, by several processes where asked for."""

    def __init__(self, path: Path, *, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: expected at least 1")
        self.path, self.workers = path, workers
        self._pool: ProcessPoolExecutor | None = None
        self._kept: dict[str, Values] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = b""
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            try:
                row = json.loads(line)
                self._kept[row["key"]] = {name: _number(value) for name, value in row["values"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line torn by a crash: measured again
            finally:
                torn = b"" if line.endswith(b"\n") else line
        if torn:
            with path.open("ab") as file:
                file.write(b"\n")  # so that the next line does not become a part of the torn one

    def get(self, keys: Sequence[str], make: Callable[[], Sequence[Measure]]) -> list[Values]:
        """Values of every key; `make` gives their measurements and is asked only where one is missing."""
        missing = [k for k, key in enumerate(keys) if key not in self._kept]
        if missing:
            jobs = make()
            found = self._run([jobs[k] for k in missing])
            with self.path.open("a", encoding="utf-8") as file:
                for k, values in zip(missing, found, strict=True):
                    self._kept[keys[k]] = values
                    row = {"key": keys[k], "values": {name: plain(value) for name, value in values.items()}}
                    file.write(json.dumps(row, allow_nan=False) + "\n")
        return [self._kept[key] for key in keys]

    def _run(self, jobs: Sequence[Measure]) -> list[Values]:
        if self.workers == 1 or len(jobs) == 1:
            return [job() for job in jobs]
        if self._pool is None:  # spawned: a process with threads of its own must not be forked
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        return list(self._pool.map(call, jobs, chunksize=1))

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def plain(value: float) -> float | str | None:
    """A number as JSON can hold it: None for NaN, "inf" and "-inf"."""
    return None if math.isnan(value) else str(value) if math.isinf(value) else value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


class Progress:
    """One line about what is being done, with the time left, on stderr: in place on a terminal, else now and then."""

    EVERY_S = 15.0

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet, self._is_live = quiet, sys.stderr.isatty()
        self._what, self._total, self._done = "", 0, 0
        self._began = self._told = time.perf_counter()

    def start(self, what: str, total: int) -> None:
        """A new part of `total` clips."""
        self._what, self._total, self._done = what, total, 0
        self._began = self._told = time.perf_counter()

    def advance(self, count: int, doing: str) -> None:
        """`count` more clips are done."""
        self._done += count
        now = time.perf_counter()
        is_last = self._done >= self._total
        if self.quiet or not (self._is_live or is_last or now - self._told >= self.EVERY_S):
            return
        self._told = now
        left = (now - self._began) / max(self._done, 1) * (self._total - self._done)
        took = f"{_clock(now - self._began)} gone, {_clock(left)} left"
        line = f"{self._what}: {self._done}/{self._total} clips, {took}  ({doing})"
        end = "\n" if is_last or not self._is_live else ""
        print(("\r\x1b[K" if self._is_live else "") + line, end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"
