"""Schedules: the descending sigmas of a denoising loop, as plain Python floats. No torch, no grid look-ups.

`shift` maps u to `shift u / (1 + (shift - 1) u)` (arXiv:2403.03206 eq. 23): it moves the steps towards noise and
leaves 0 and 1 in place. Lists of denoising steps are on the 0..1000 timestep scale; sigma is `timestep / 1000`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Level = TypeVar("Level", float, "torch.Tensor")


@dataclass(frozen=True)
class Step:
    """One solver move: from `sigma` to `next_sigma`, while the network is told `conditioning` in place of sigma."""

    index: int
    sigma: float
    next_sigma: float
    conditioning: float


@dataclass(frozen=True)
class Schedule:
    """The noise levels of one denoising loop.

    sigmas: strictly descending, in [0, 1], the last exactly 0.0; n steps have n + 1 sigmas. The first may lie below 1
        (denoising of an input video starts there).
    conditioning: the sigma that the network is told at each step (n values), where a published model was run with
        other levels than the algebra used; None tells the truth.

    Raises:
        ValueError: sigmas or conditioning are not of that form.
    """

    sigmas: tuple[float, ...]
    conditioning: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        sigmas = tuple(float(sigma) for sigma in self.sigmas)
        object.__setattr__(self, "sigmas", sigmas)
        if len(sigmas) < 2 or sigmas[-1] != 0.0:
            raise ValueError(f"got sigmas={sigmas}, expected at least one step and a final 0.0; append 0.0")
        if not all(0.0 <= sigma <= 1.0 for sigma in sigmas):
            raise ValueError(f"got sigmas={sigmas}, expected every sigma in [0, 1]; divide timesteps by 1000")
        if any(low >= high for high, low in pairwise(sigmas)):
            raise ValueError(f"got sigmas={sigmas}, expected strictly descending; sort them and drop repeats")
        if self.conditioning is None:
            return
        told = tuple(float(sigma) for sigma in self.conditioning)
        object.__setattr__(self, "conditioning", told)
        if len(told) != len(sigmas) - 1:
            raise ValueError(
                f"got {len(told)} conditioning sigmas, expected {len(sigmas) - 1}, one per step; give none for the end"
            )
        if not all(0.0 <= sigma <= 1.0 for sigma in told):
            raise ValueError(f"got conditioning={told}, expected every value in [0, 1]; divide timesteps by 1000")

    @property
    def num_steps(self) -> int:
        """Number of solver moves, which is also the number of denoising passes per chunk."""
        return len(self.sigmas) - 1

    @property
    def steps(self) -> tuple[Step, ...]:
        """The moves in order; the last one has `next_sigma == 0.0`."""
        told = self.conditioning if self.conditioning is not None else self.sigmas[:-1]
        moves = zip(pairwise(self.sigmas), told, strict=True)
        return tuple(Step(index, sigma, after, level) for index, ((sigma, after), level) in enumerate(moves))


def shift_sigma(sigma: Level, shift: float) -> Level:
    """`shift sigma / (1 + (shift - 1) sigma)`; exact at 0 and 1. Takes a float or a tensor (for training draws).

    Raises:
        ValueError: shift is not a positive number, or a float sigma is outside [0, 1].
    """
    if not (shift > 0.0 and math.isfinite(shift)):
        raise ValueError(f"got shift={shift}, expected a positive number; 1.0 leaves sigma as it is")
    if isinstance(sigma, (int, float)) and not 0.0 <= sigma <= 1.0:
        raise ValueError(f"got sigma={sigma}, expected 0 <= sigma <= 1; a timestep is divided by 1000 first")
    # Not `1 + (shift - 1) sigma`: that rounds to something else than shift at sigma 1 for shifts below 1.
    return shift * sigma / (shift * sigma + (1.0 - sigma))


def unshift_sigma(sigma: Level, shift: float) -> Level:
    """The u with `shift_sigma(u, shift) == sigma`. Raises as `shift_sigma`."""
    if not (shift > 0.0 and math.isfinite(shift)):
        raise ValueError(f"got shift={shift}, expected a positive number; 1.0 leaves sigma as it is")
    return shift_sigma(sigma, 1.0 / shift)


def uniform(num_steps: int, *, shift: float) -> Schedule:
    """Sigmas 1, 1 - 1/n, ..., 0, shifted: the many-step schedule of Wan-type models.

    Raises:
        ValueError: num_steps < 1 or shift <= 0.
    """
    if num_steps < 1:
        raise ValueError(f"got num_steps={num_steps}, expected at least 1")
    return Schedule((*(shift_sigma(1.0 - index / num_steps, shift) for index in range(num_steps)), 0.0))


def few_step(steps: Sequence[int | float], *, shift: float | None = None, warp: bool = True) -> Schedule:
    """The schedule of a distilled model from its published step list (timesteps, descending, a final 0 is optional).

    warp: the list indexes the shifted grid, so `sigma = shift_sigma(step / 1000, shift)`: 1000, 750, 500, 250 at shift
        5 are the timesteps 1000, 937.5, 833.3, 625. Without warp, `sigma = step / 1000` and shift must be None.

    Raises:
        ValueError: the list is empty, not descending or out of range, or shift and warp contradict each other.
    """
    levels = _levels(steps)
    if not warp:
        if shift is not None:
            raise ValueError(
                f"got shift={shift} with warp=False, which has no use for it; pass shift=None, "
                "or few_step_on_grid(steps, shift=...) to snap the list to the shifted grid"
            )
        return Schedule((*levels, 0.0))
    if shift is None:
        raise ValueError("got shift=None with warp=True, expected the model's shift, e.g. shift=5.0")
    return Schedule((*(shift_sigma(level, shift) for level in levels), 0.0))


def few_step_on_grid(steps: Sequence[int | float], *, shift: float, num_points: int = 1000) -> Schedule:
    """Compatibility: the network is told `step / 1000`, while the algebra uses the nearest sigma of the shifted grid.

    This is what CausVid's published loop does with 1000, 757, 522 at shift 8 (0.756757 and 0.521739). Where two grid
    points are equally near, the noisier one is taken. New models use `few_step`.

    Raises:
        ValueError: as `few_step`; or two steps fall on one grid point.
    """
    levels = _levels(steps)
    grid = reference_grid(num_points, shift=shift)
    snapped = tuple(min(grid, key=lambda point: abs(point - level)) for level in levels)
    return Schedule((*snapped, 0.0), conditioning=levels)


@lru_cache(maxsize=16)
def reference_grid(num_points: int = 1000, *, shift: float) -> tuple[float, ...]:
    """The sigmas that published training code draws from: `uniform(num_points)` without its final 0.

    Raises:
        ValueError: num_points < 1 or shift <= 0.
    """
    return uniform(num_points, shift=shift).sigmas[:-1]


def bell_weight(sigma: Level, *, shift: float, num_points: int = 1000) -> Level:
    """Training weight of the many-step causal trainer: a bell around timestep 500, 0 at sigma 1, mean 1 on the grid.

    `y = exp(-2 (sigma - 0.5)^2)` less its value at sigma 1, divided by the mean over `reference_grid`, so shift enters
    through the normalisation alone. Takes a float or a tensor; any sigma, not only those of the grid.

    Raises:
        ValueError: num_points < 1 or shift <= 0.
    """
    return (_bell(sigma) - _bell(1.0)) / _bell_mean(num_points, shift)


@lru_cache(maxsize=16)
def _bell_mean(num_points: int, shift: float) -> float:
    grid = reference_grid(num_points, shift=shift)
    mean = math.fsum(_bell(sigma) - _bell(1.0) for sigma in grid) / num_points
    if mean <= 0.0:
        raise ValueError(f"got num_points={num_points}, expected at least 2: the weight is 0 at sigma 1")
    return mean


def _bell(sigma: Level) -> Level:
    if isinstance(sigma, (int, float)):
        return math.exp(-2.0 * (sigma - 0.5) ** 2)
    return (-2.0 * (sigma - 0.5) ** 2).exp()


def _levels(steps: Sequence[int | float]) -> tuple[float, ...]:
    """Steps on the timestep scale as sigmas, without a trailing 0."""
    listed = tuple(steps[:-1] if len(steps) and steps[-1] == 0 else steps)
    descending = all(high > low for high, low in pairwise(listed))
    if not listed or not descending or not all(0.0 < step <= 1000.0 for step in listed):
        raise ValueError(
            f"got steps={list(steps)}, expected descending timesteps in (0, 1000] with an optional final 0, "
            "e.g. (1000, 750, 500, 250)"
        )
    return tuple(step / 1000.0 for step in listed)
