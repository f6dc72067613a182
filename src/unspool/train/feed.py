"""Batches ahead of the loop: prepared by threads, delivered in the order of the steps whatever the threads do."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from unspool.data.batch import Batch, Source
from unspool.train.parallel import World


def _stay_single() -> None:
    """A second team of OpenMP threads would be more threads than cores: then GNU's runtime lets all of them sleep
    between any two operations, and on two cores the loop's own operations take a quarter longer."""
    torch.set_num_threads(1)


class Feed:
    """The micro-batches of each step on this rank, from `start` on, `ahead` steps in advance.

    A global batch of `size` samples is dealt to world x accumulate parts; micro-batch m of rank r is part
    r + world m, samples r + world m, r + world m + world accumulate, ...
    `waited_s` is the time that `next` had to wait.
    """

    def __init__(
        self,
        source: Source,
        world: World,
        *,
        size: int,
        accumulate: int = 1,
        start: int = 0,
        stop: int | None = None,
        workers: int = 1,
        ahead: int = 2,
    ) -> None:
        self._source, self._world, self._size, self._accumulate = source, world, size, accumulate
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="unspool-feed", initializer=_stay_single)
        self._queue: deque[Future[list[Batch]]] = deque()
        self._next, self._stop, self._ahead = start, stop, max(ahead, workers)
        self.waited_s = 0.0

    def samples(self, micro: int) -> range:
        """Numbers within the global batch of the samples in micro-batch `micro`."""
        return range(self._part(micro), self._size, self._parts)

    @property
    def _parts(self) -> int:
        return self._world.size * self._accumulate

    def _part(self, micro: int) -> int:
        return self._world.rank + self._world.size * micro

    def next(self) -> list[Batch]:
        """The micro-batches of the next step, on the CPU (pinned for CUDA). Errors of the source are raised here."""
        while len(self._queue) <= self._ahead and (self._stop is None or self._next < self._stop):
            self._queue.append(self._pool.submit(self._prepare, self._next))
            self._next += 1
        assert self._queue, "the feed was asked for a step past its end"
        began = time.perf_counter()
        batches = self._queue.popleft().result()
        self.waited_s += time.perf_counter() - began
        return batches

    def _prepare(self, step: int) -> list[Batch]:
        batches = []
        for micro in range(self._accumulate):
            batch = self._source.batch(step, self._size, rank=self._part(micro), world=self._parts)
            if len(batch) != len(self.samples(micro)):
                raise ValueError(
                    f"the source gave {len(batch)} samples at step {step}, expected {len(self.samples(micro))} for "
                    f"part {self._part(micro)} of {self._parts}"
                )
            batches.append(_pinned(batch) if self._world.device.type == "cuda" else batch)
        return batches

    def close(self) -> None:
        """Drop what was prepared and end the threads."""
        for future in self._queue:
            future.cancel()
        self._queue.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _pinned(batch: Batch) -> Batch:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    pinned: dict[str, Any] = {k: v.pin_memory() for k, v in values.items() if isinstance(v, Tensor)}
    return replace(batch, **pinned)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; the host does not wait for pinned memory."""
    return batch if device.type == "cpu" else batch.to(device)
