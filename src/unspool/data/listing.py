"""Sources that know how many clips they have: the order in which an epoch visits them, and draws that need no state.

Every number here is a pure function of a seed and of counters (Philox-4x64, whose stream numpy guarantees across
versions), so the clip behind sample j of step k is the same on any rank and after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from unspool.data.batch import Batch

_WORD = 1 << 64
_ORDER, _DRAW = 0, 1


@runtime_checkable
class Listed(Protocol):
    """A source whose clips are countable, so that they can be encoded once each and in order.

    `len(source)` clips per epoch; what `clips` gives depends on the numbers alone.
    """

    def __len__(self) -> int: ...

    def clips(self, entries: Sequence[int]) -> Batch:
        """The clips with these numbers in [0, len). Unreadable ones are left out: `indices` says which are there."""
        ...

    def describe(self) -> dict[str, object]:
        """JSON values that say what the clips are made of, without paths of this machine: the provenance."""
        ...


def global_samples(step: int, size: int, *, rank: int = 0, world: int = 1) -> range:
    """Running numbers, over all steps, of the samples that `rank` of `world` takes from the batch of `size` at `step`.

    Raises ValueError for counts that make no batch, or for a batch too small to give every rank a sample.
    """
    if step < 0 or size < 1 or not 0 <= rank < world:
        raise ValueError(f"step={step}, size={size}, rank={rank}, world={world}: expected step >= 0, 0 <= rank < world")
    if size < world:
        raise ValueError(f"size={size}: expected at least one sample for each of {world} ranks; try size={world}")
    return range(step * size + rank, (step + 1) * size, world)


class EpochOrder:
    """Which entry each running sample is: every entry once per epoch, in an order drawn anew for each epoch.

    `shuffle` False keeps the order of the list. Raises ValueError for no entries or a seed that is no 64-bit number.
    """

    def __init__(self, num_entries: int, seed: int, *, shuffle: bool = True) -> None:
        if num_entries < 1:
            raise ValueError(f"got {num_entries} entries; expected at least one")
        self._num, self._seed, self._shuffle = num_entries, check_seed(seed), shuffle
        self._kept: dict[int, NDArray[np.int64]] = {}

    def at(self, sample: int) -> tuple[int, int]:
        """(epoch, entry) of a running sample number."""
        epoch, position = divmod(sample, self._num)
        return epoch, int(self._permutation(epoch)[position])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        order = self._kept.get(epoch)
        if order is None:
            if self._shuffle:
                # sorted random words and not Generator.permutation, whose algorithm may change with numpy
                words = _philox(self._seed, _ORDER, epoch, 0).random_raw(self._num)
                order = np.argsort(words, kind="stable")
            else:
                order = np.arange(self._num)
            # a batch may lie across the border of two epochs; replaced whole, because threads read it meanwhile
            self._kept = {number: kept for number, kept in self._kept.items() if number == epoch - 1} | {epoch: order}
        return order


def draw_below(limit: int, seed: int, epoch: int, entry: int) -> int:
    """A uniform integer in [0, limit) that depends on (seed, epoch, entry) alone."""
    if limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1")
    return int(_philox(seed, _DRAW, epoch, entry).random_raw()) % limit


def check_seed(seed: int) -> int:
    """The seed, or ValueError when it is not in [0, 2^64)."""
    if not 0 <= seed < _WORD:
        raise ValueError(f"seed={seed}: expected a number in [0, 2^64)")
    return seed


def _philox(seed: int, stream: int, major: int, minor: int) -> np.random.Philox:
    key = np.array([seed, stream], np.uint64)
    # the generator itself counts in the lowest word
    return np.random.Philox(key=key, counter=np.array([0, 0, minor, major], np.uint64))
