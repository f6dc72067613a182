"""Several sources one after another: short clips first, longer ones later, from one pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unspool.data.batch import Batch, Source


@dataclass(frozen=True, kw_only=True)
class Leg:
    """`steps` steps from `source`."""

    source: Source
    steps: int


class Curriculum:
    """Legs in order (implements `Source`); the last one goes on for ever. Raises ValueError without any leg."""

    def __init__(self, legs: Sequence[Leg]) -> None:
        if not legs or any(leg.steps < 1 for leg in legs):
            raise ValueError(f"{len(legs)} legs: expected at least one, each with at least 1 step")
        self.legs = tuple(legs)

    @property
    def codec_sha256(self) -> str | None:
        """Of the codec that made the last leg's latents; None where it does not say."""
        return getattr(self.legs[-1].source, "codec_sha256", None)

    def leg_at(self, step: int) -> tuple[int, int]:
        """(number of the leg, step within it)."""
        for number, leg in enumerate(self.legs[:-1]):
            if step < leg.steps:
                return number, step
            step -= leg.steps
        return len(self.legs) - 1, step

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        number, inside = self.leg_at(step)
        return self.legs[number].source.batch(inside, size, rank=rank, world=world)
