"""The frames of a session into a file as they come, with the record that makes them again in its metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unspool.engine.export import check_target, write_video
from unspool.engine.record import FrameHash, Record
from unspool.engine.session import Session
from unspool.engine.video import Filter, enlarged, scale_for

HELD_IN_MEMORY = (".gif", ".webp", ".npy")
"""Formats whose writers hold all frames until the end."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file to be written: checked, and the frames' size in it known. `bytes_per_pixel` held in memory per frame."""

    path: Path
    scale: int
    filter: Filter
    bytes_per_pixel: int

    @staticmethod
    def check(path: Path, size: tuple[int, int], *, scale: int | None, filter: Filter) -> Target:
        """Refuse what cannot be written before any work. Raises ValueError."""
        check_target(path)
        factor = scale_for(path, size, scale)
        held = 3 * factor**2 if path.suffix.lower() in HELD_IN_MEMORY else 0
        return Target(path=path, scale=factor, filter=filter, bytes_per_pixel=held)


def write_session(session: Session, frames: Iterable[NDArray[np.uint8]], target: Target) -> Record:
    """Write `frames`, which `session` makes from its start, and return the record that the file carries.

    The file appears whole when `frames` ends, also early, or not at all.
    """
    digest = FrameHash()

    def record() -> Record:
        return session.record(num_frames=digest.num_frames, frames_sha256=digest.hexdigest())

    chunks = enlarged(hashed(frames, digest), target.scale, target.filter)
    write_video(target.path, chunks, session.fps, metadata=lambda: record().to_dict())
    return record()


def hashed(chunks: Iterable[NDArray[np.uint8]], digest: FrameHash) -> Iterator[NDArray[np.uint8]]:
    """The same chunks, each added to `digest` on its way."""
    for chunk in chunks:
        digest.add(chunk)
        yield chunk
