"""Reader for published ODE pairs: the LMDB files of CausVid and Self-Forcing, an extra (`pip install unspool[data]`).

Layout (CausVid `causvid/ode_data/create_lmdb_iterative.py`): `latents_shape` is text, "n steps frames C H W" separated
by spaces; `latents_{i}_data` are the float16 values of trajectory i from noise to clean; `prompts_{i}_data` is UTF-8
text. A folder of such environments is read as one list, in the order of their names.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from unspool.data.batch import TrajectoryBatch
from unspool.data.listing import EpochOrder, check_seed, global_samples

if TYPE_CHECKING:
    import lmdb

_DATA = "data.mdb"
_opened: WeakValueDictionary[Path, lmdb.Environment] = WeakValueDictionary()
"""LMDB refuses to open an environment twice in a process, which two sources of the same pairs would do."""


@dataclass(frozen=True, kw_only=True)
class OdeLmdbConfig:
    """`path`: an LMDB folder (with data.mdb), or a folder of several. `timesteps` of the stored states, from 1000 down
    to 0: the files do not say (CausVid's: 1000, 757, 522, 0). `shuffle`: a new order in each epoch."""

    path: str = ""
    timesteps: tuple[float, ...] = ()
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)


class OdeLmdb:
    """A `Source` of `TrajectoryBatch`es in float32 with `captions` and `indices`.

    Raises FileNotFoundError, or ValueError where lmdb is not installed or the content is something else.
    """

    def __init__(self, config: OdeLmdbConfig) -> None:
        if not config.path:
            raise ValueError("got no path; expected a folder with data.mdb, or of such folders; set path=...")
        self.config = config
        folders = _environments(Path(config.path).expanduser())
        self._environments = [_open(folder) for folder in folders]
        shapes = [_shape(environment, folder) for environment, folder in zip(self._environments, folders, strict=True)]
        if len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(
                f"{config.path}: got trajectories of {sorted({s[1:] for s in shapes})}; expected one shape"
            )
        self.shape: tuple[int, ...] = shapes[0][1:]
        """(steps, t, c, h, w) of every trajectory."""
        if config.timesteps and len(config.timesteps) != self.shape[0]:
            raise ValueError(f"{len(config.timesteps)} timesteps for trajectories of {self.shape[0]} states")
        self._ends = list(accumulate(shape[0] for shape in shapes))
        self._order = EpochOrder(len(self), config.seed, shuffle=config.shuffle)

    def __len__(self) -> int:
        return self._ends[-1]

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> TrajectoryBatch:
        """Trajectories of the samples of `rank` at `step`; see `Source`."""
        samples = global_samples(step, size, rank=rank, world=world)
        return self.clips([self._order.at(sample)[1] for sample in samples])

    def clips(self, entries: Sequence[int]) -> TrajectoryBatch:
        """The trajectories with these numbers."""
        read = [self._read(entry) for entry in entries]
        trajectory = torch.stack([values for values, _ in read])
        return TrajectoryBatch(
            trajectory=trajectory,
            sigmas=tuple(t / 1000 for t in self.config.timesteps) or None,
            latents=trajectory[:, -1],
            captions=tuple((prompt,) for _, prompt in read),
            indices=torch.tensor(entries, dtype=torch.int64),
        )

    def describe(self) -> dict[str, object]:
        """Provenance: name of the folder, number and shape of the trajectories."""
        return {"source": "ode-lmdb", "folder": Path(self.config.path).name, "num": len(self), "shape": [*self.shape]}

    def _read(self, entry: int) -> tuple[Tensor, str]:
        if not 0 <= entry < len(self):
            raise ValueError(f"entry {entry}: expected a number in [0, {len(self)})")
        place = bisect_right(self._ends, entry)
        row = entry - (self._ends[place - 1] if place else 0)
        with self._environments[place].begin() as transaction:
            values = transaction.get(f"latents_{row}_data".encode())
            prompt = transaction.get(f"prompts_{row}_data".encode())
        if values is None or prompt is None or len(values) != 2 * int(np.prod(self.shape)):
            got = "no latents" if values is None else "no prompt" if prompt is None else f"{len(values)} bytes"
            raise ValueError(
                f"{self.config.path}: got {got} for trajectory {row}; expected {2 * int(np.prod(self.shape))} bytes of "
                f"float16 [{', '.join(map(str, self.shape))}] and a prompt; the download is not complete"
            )
        array = np.frombuffer(values, np.float16).reshape(self.shape).astype(np.float32)
        return torch.from_numpy(array), prompt.decode("utf-8")


def _environments(path: Path) -> list[Path]:
    if (path / _DATA).is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of trajectories")
    folders = sorted(file.parent for file in path.glob(f"*/{_DATA}"))
    if not folders:
        raise ValueError(f"{path}: got a folder without {_DATA}; expected an LMDB environment or a folder of them")
    return folders


def _open(folder: Path) -> lmdb.Environment:
    try:
        import lmdb
    except ImportError:
        raise ValueError(f"{folder}: reading LMDB needs the package lmdb; pip install 'unspool[data]'") from None
    key = folder.resolve()
    environment = _opened.get(key)
    if environment is not None:
        return environment
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(f"{folder}: not a readable LMDB environment ({error}); fetch it again") from None
    _opened[key] = environment
    return environment


def _shape(environment: lmdb.Environment, folder: Path) -> tuple[int, ...]:
    """(n, steps, t, c, h, w); files of clean latents alone have no steps and get one."""
    with environment.begin() as transaction:
        text = transaction.get(b"latents_shape")
    try:
        shape = tuple(int(part) for part in (text or b"").decode("ascii").split())
    except (UnicodeDecodeError, ValueError):
        shape = ()
    if len(shape) == 5:
        shape = (shape[0], 1, *shape[1:])
    if len(shape) != 6 or min(shape) < 1:
        raise ValueError(f"{folder}: got latents_shape {text!r}; expected 'n steps frames C H W' as text")
    return shape
