"""Checkpoints of a run: torch's distributed format in a folder that appears whole or not at all.

    <run>/checkpoints/step-00000100/   .metadata, *.distcp   every tensor, sharded as it was
                                       state.json            step, counters, configuration, versions, checksums
    <run>/checkpoints/latest           name of the newest

The format stores its index as a pickle: read only checkpoints that you made.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from unspool.train.parallel import World

FOLDER, LATEST, STATE = "checkpoints", "latest", "state.json"
FORMAT = 1
_NAME = re.compile(r"step-\d{8,}")
_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint on disk. `state` is what `save` was given beside tensors, with versions and checksums."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save(
    run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object], world: World, *, keep: int
) -> Path:
    """Write a checkpoint; on return it is on disk and `latest` names it. Only the newest `keep` stay.

    Called by all ranks. A failure leaves the checkpoints before as they were. Returns its folder.
    """
    folder = run / FOLDER
    final, hidden = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
    world.agree(None)
    with _alone_is_fine():
        dcp.save(dict(tensors), checkpoint_id=hidden, no_dist=world.mesh is None)
    world.agree(None)
    names = sorted(path.name for path in hidden.iterdir())
    mine = {name: _measure(hidden / name) for name in names[world.rank :: world.size]}
    files: dict[str, list[int]] = {}
    for part in world.gather(mine):
        files.update(part)
    if world.is_main:
        whole = {"format": FORMAT, "step": step, "world": world.size, **state, "versions": versions(), "files": files}
        _write(hidden / STATE, json.dumps(whole, indent=1, allow_nan=False) + "\n")
        _sync(hidden)
        shutil.rmtree(final, ignore_errors=True)  # the same step once more: after a resume from an earlier one
        os.replace(hidden, final)
        _write(folder / LATEST, final.name + "\n")
        _sync(folder)
        _prune(folder, final.name, keep)
    world.agree(None)
    return final


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("unspool")
    except PackageNotFoundError:
        own = "not installed"
    return {"unspool": own, "torch": torch.__version__, "python": platform.python_version()}


def find(path: Path) -> Saved | None:
    """The checkpoint that `path` means: itself, or the newest of a run; None where a run has none.

    Raises ValueError or FileNotFoundError for a path that holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint or run")
    if (path / STATE).is_file():
        return _open(path)
    folder = path if path.name == FOLDER else path / FOLDER
    if not folder.is_dir():
        return None
    pointer = folder / LATEST
    name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    if _NAME.fullmatch(name) and (folder / name).is_dir():
        return _open(folder / name)
    there = sorted(entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name))
    return _open(there[-1]) if there else None


def _open(path: Path) -> Saved:
    fix = "take another checkpoint with --resume PATH, or another --out"
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        missing = {"format", "step", "files", "config"} - state.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {STATE} cannot be read ({' '.join(str(error).split())[:80]}); {fix}") from None
    if missing or state["format"] != FORMAT:
        raise ValueError(f"{path}: {STATE} is not that of a training checkpoint of format {FORMAT}; {fix}")
    return Saved(path=path, state=state)


def check_files(saved: Saved, world: World) -> None:
    """Raise ValueError on all ranks unless every file is there as it was written. Each rank reads its share."""
    wrong = None
    for name in sorted(saved.state["files"])[world.rank :: world.size]:
        path = saved.path / name
        if not path.is_file():
            wrong = f"{path} is missing"
        elif _measure(path) != list(saved.state["files"][name]):
            wrong = f"{path} is damaged: its size or checksum is not what was written"
    world.agree(wrong and f"{wrong}; take another checkpoint with --resume PATH, or another --out")


def stored(saved: Saved) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of every tensor in a checkpoint. Raises ValueError when its index cannot be read."""
    try:
        metadata = dcp.FileSystemReader(saved.path).read_metadata()
    except Exception as error:  # an unreadable pickle raises whatever it likes
        raise ValueError(f"{saved.path}: its index cannot be read ({type(error).__name__}: {error})") from None
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def fill(saved: Saved, tensors: Mapping[str, Tensor], world: World | None = None) -> None:
    """Read a checkpoint into these tensors, in place. Raises ValueError for names or shapes that differ."""
    there = stored(saved)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    lacking = [name for name in wanted if name not in there]
    if lacking:
        raise ValueError(f"{saved.path} has no {lacking[0]} ({len(lacking)} tensors lack); it is of another network")
    for name, shape in wanted.items():
        if there[name][0] != shape:
            raise ValueError(
                f"{saved.path}: {name} is {list(there[name][0])}, expected {list(shape)}; it is of another network"
            )
    try:
        with _alone_is_fine():
            dcp.load(dict(tensors), checkpoint_id=saved.path, no_dist=world is None or world.mesh is None)
    except Exception as error:  # the format wraps whatever failed on any rank
        reason = str(error).strip().splitlines()
        raise ValueError(f"{saved.path} cannot be read: {reason[-1] if reason else type(error).__name__}") from error


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Torch warns of every save and load in one process; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _measure(path: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    total = checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total += len(block)
            checksum = zlib.crc32(block, checksum)
    return [total, checksum]


def _prune(folder: Path, newest: str, keep: int) -> None:
    old = sorted(e.name for e in folder.iterdir() if _NAME.fullmatch(e.name) and e.name != newest)
    later = [name for name in old if name > newest]  # of a run that was resumed from before them
    for name in [*later, *old[: max(len(old) - len(later) - (keep - 1), 0)]]:
        shutil.rmtree(folder / name, ignore_errors=True)
    for left in folder.glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
