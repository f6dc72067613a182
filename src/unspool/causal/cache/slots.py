"""Which latent frame lies in which slot of a cache, as host integers: no tensors here.

A slot holds the keys and values of one latent frame at every site. Nothing ever moves: a new frame takes the lowest
free slot, so a full window occupies all slots and is read as it lies (attention does not care for the order of keys).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from unspool.causal.chunks import FrameSet


@dataclass
class SlotTable:
    """Slots of promoted and of staged frames, and the position to which each key was rotated."""

    capacity: int
    promoted: dict[int, int] = field(default_factory=dict)  # frame -> slot
    staged: dict[int, int] = field(default_factory=dict)
    baked: dict[int, int] = field(default_factory=dict)  # frame -> position of its rotated key
    version: int = 0  # changes whenever a plan made from this table may be out of date

    @property
    def frames(self) -> FrameSet:
        """Promoted latent frames."""
        return FrameSet.of_frames(self.promoted)

    def free(self) -> list[int]:
        used = set(self.promoted.values()) | set(self.staged.values())
        return [slot for slot in range(self.capacity) if slot not in used]

    def drop(self, frames: Iterable[int]) -> None:
        """Forget promoted frames."""
        for frame in list(frames):
            if self.promoted.pop(frame, None) is not None:
                self.baked.pop(frame, None)
                self.version += 1

    def unstage(self) -> None:
        for frame in self.staged:
            self.baked.pop(frame, None)
        if self.staged:
            self.staged = {}
            self.version += 1

    def stage(self, frames: Iterable[int]) -> list[int]:
        """Slots for new frames; the caller has made sure that enough are free."""
        frames = list(frames)
        free = self.free()
        assert len(free) >= len(frames), "stage() needs a free slot for every frame"
        # Consecutive slots where there are any: the write is then one copy.
        start = next((i for i in range(len(free)) if free[i : i + len(frames)] == _run(free[i], len(frames))), 0)
        chosen = (free[start : start + len(frames)] + free)[: len(frames)]
        self.staged.update(zip(frames, chosen, strict=True))
        self.version += 1
        return chosen

    def promote(self) -> None:
        self.promoted.update(self.staged)
        self.staged = {}
        self.version += 1

    def check(self) -> None:
        """Raise AssertionError when two frames share a slot or a slot lies outside."""
        slots = [*self.promoted.values(), *self.staged.values()]
        assert len(slots) == len(set(slots)), "two latent frames share a slot"
        assert all(0 <= slot < self.capacity for slot in slots), "a slot outside the buffers"
        assert not set(self.promoted) & set(self.staged), "a frame is both staged and promoted"


def _run(first: int, length: int) -> list[int]:
    return list(range(first, first + length))


def common_shift(wanted: list[int], baked: list[int]) -> int:
    """The shift that makes most `wanted` positions equal to the `baked` ones; the newest frame decides a tie."""
    if not wanted:
        return 0
    shifts = [b - w for w, b in zip(wanted, baked, strict=True)]
    counts: dict[int, int] = {}
    for shift in shifts:
        counts[shift] = counts.get(shift, 0) + 1
    best = max(counts.values())
    return next(shift for shift in reversed(shifts) if counts[shift] == best)
