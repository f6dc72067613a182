"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from types import TracebackType


class replacing:
    """`with replacing(target) as file:` gives a hidden file beside `target` that takes its place when the block
    succeeds and else disappears, also at KeyboardInterrupt."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._part = beside(target)

    def __enter__(self) -> Path:
        create(self._part)
        return self._part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            os.replace(self._part, self._target)
        else:
            self._part.unlink(missing_ok=True)


def beside(target: Path) -> Path:
    """A new hidden name in the folder of `target`."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"


def create(path: Path) -> None:
    """An empty new file. Not tempfile: that makes files which only the owner may read, and the result would keep those
    rights."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def check_writable(target: Path) -> None:
    """Raise ValueError unless `target` could be written: a missing folder, a folder in its place, no permission."""
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give a file name in it")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist; create it first")
    # Trying is the only test that also sees read-only file systems and full quotas.
    probe = beside(target)
    try:
        create(probe)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{target}: cannot write into {target.parent}: {error.strerror or error}") from error
