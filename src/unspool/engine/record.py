"""What a video carries in its metadata so that it can be made again: prompts, seed, settings, weights, a hash."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unspool.config import from_dict, to_dict
from unspool.engine.export import read_metadata
from unspool.engine.settings import RolloutSettings, SinkPolicy, SwitchPolicy

FORMAT, VERSION = "unspool-video", 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """A prompt that takes over at the start of chunk `chunk`, shown at `seconds`; the rest as `Switch`."""

    chunk: int
    seconds: float
    prompt: str
    policy: SwitchPolicy
    sink: SinkPolicy
    over: int = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a video was made. `model` is what `load` was given, `weights` tells its weights apart; `frames_sha256` is
    that of the raw uint8 frames, before any enlargement or compression."""

    model: str
    name: str
    weights: str
    prompt: str
    negative: str
    events: tuple[Event, ...]
    seed: int
    sample: int
    num_frames: int
    fps: float
    settings: RolloutSettings
    whole: int | None
    device: str
    dtype: str
    torch: str
    unspool: str
    frames_sha256: str = ""
    format: str = FORMAT
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON data; `parse` reads it back."""
        return to_dict(self)

    @staticmethod
    def parse(data: dict[str, Any], *, where: str) -> Record:
        """The record in a video's metadata. Raises ValueError where there is none that this release can read."""
        if data.get("format") != FORMAT:
            raise ValueError(
                f"{where}: no unspool record in its metadata; expected a video written by unspool generate or stream"
            )
        if data.get("version") != VERSION:
            raise ValueError(
                f"{where}: a record of version {data.get('version')}, expected {VERSION}; use the unspool release that "
                f"wrote it ({data.get('unspool', 'unknown')})"
            )
        return from_dict(Record, data, where=where)


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record of a video file. Raises FileNotFoundError, or ValueError where there is none."""
    return Record.parse(read_metadata(os.fspath(path)), where=os.fspath(path))


class FrameHash:
    """SHA-256 over frames as they come: size, then the raw bytes; how they were cut into chunks does not matter."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.num_frames = 0

    def add(self, frames: NDArray[np.uint8]) -> None:
        if self.num_frames == 0:
            self._digest.update(f"{frames.shape[1]}x{frames.shape[2]}\n".encode())
        self._digest.update(np.ascontiguousarray(frames).data)
        self.num_frames += len(frames)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
