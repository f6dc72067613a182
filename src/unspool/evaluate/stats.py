"""Uncertainty: bootstrap over prompts, proportions, quantiles and survival when some never arrive. No networks.

Several values of one prompt (seeds, phases) are not independent, so whole prompts are drawn again: every bootstrap here
takes the number of the prompt ("cluster") of each value. All are seeded and so give the same interval each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959963984540054  # of the normal distribution, for LEVEL


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, from `n` prompts. NaN where nothing could be judged; bounds are NaN where one
    prompt is all there is."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def mean(values: ArrayLike, clusters: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of what is not NaN, with the percentile bootstrap over clusters."""
    values = np.asarray(values, np.float64)
    return ratio(values, np.where(np.isnan(values), np.nan, 1.0), clusters, resamples=resamples, seed=seed)


def ratio(
    numerator: ArrayLike, denominator: ArrayLike, clusters: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Sum of `numerator` over sum of `denominator`, both of the same clips; clips with a NaN on either side are left
    out. A ratio of sums and not a mean of ratios: clips in which nothing happens must not decide it."""
    a, b, groups = _known(clusters, numerator, denominator)
    if not len(a) or b.sum() == 0:
        return NOTHING
    names, sums = _sums(groups, np.stack([a, b], 1))
    drawn = _weights(len(names), resamples, seed) @ sums
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(float(a.sum() / b.sum()), drawn[:, 0] / drawn[:, 1], len(names))


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of `a - b` of the same clips."""
    return mean(np.asarray(a, np.float64) - np.asarray(b, np.float64), clusters, resamples=resamples, seed=seed)


def share_difference(
    a: tuple[ArrayLike, ArrayLike], b: tuple[ArrayLike, ArrayLike], clusters: ArrayLike, *,
    resamples: int = RESAMPLES, seed: int = 0,
) -> Interval:  # fmt: skip
    """`ratio(*a) - ratio(*b)` where all four are of the same clips, drawn together."""
    x, y, u, v, groups = _known(clusters, *a, *b)
    if not len(x) or y.sum() == 0 or v.sum() == 0:
        return NOTHING
    names, sums = _sums(groups, np.stack([x, y, u, v], 1))
    drawn = _weights(len(names), resamples, seed) @ sums
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3]
    return _interval(float(x.sum() / y.sum() - u.sum() / v.sum()), differences, len(names))


def independent_difference(
    a: tuple[ArrayLike, ArrayLike, ArrayLike], b: tuple[ArrayLike, ArrayLike, ArrayLike], *,
    resamples: int = RESAMPLES, seed: int = 0,
) -> Interval:  # fmt: skip
    """`ratio(*a) - ratio(*b)` of different prompts: each is (numerator, denominator, clusters)."""
    parts = []
    for number, (numerator, denominator, clusters) in enumerate((a, b)):
        x, y, groups = _known(clusters, numerator, denominator)
        if not len(x) or y.sum() == 0:
            return NOTHING
        names, sums = _sums(groups, np.stack([x, y], 1))
        drawn = _weights(len(names), resamples, seed + number) @ sums
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append((float(x.sum() / y.sum()), drawn[:, 0] / drawn[:, 1], len(names)))
    return _interval(parts[0][0] - parts[1][0], parts[0][1] - parts[1][1], min(parts[0][2], parts[1][2]))


def quantile(
    values: ArrayLike, clusters: ArrayLike, share: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The smallest value that at least `share` of the values do not exceed. What never arrived is infinity and counts,
    so the result is infinity where more than 1 - share never did; NaN is left out."""
    if not 0 < share < 1:
        raise ValueError(f"share={share}: expected a share between 0 and 1, such as 0.9")
    known, groups = _known(clusters, values)
    if not len(known):
        return NOTHING
    order = np.argsort(known, kind="stable")
    names, which = np.unique(groups[order], return_inverse=True)
    weights = np.concatenate([np.ones((1, len(names))), _weights(len(names), resamples, seed)])[:, which]
    reached = weights.cumsum(1)
    found = known[order][(reached >= share * reached[:, -1:] - 1e-9).argmax(1)]
    return _interval(float(found[0]), found[1:], len(names))


def wilson(successes: int, trials: int) -> Interval:
    """A proportion of independent trials with Wilson's interval, which is not empty at 0 and 1 (E. B. Wilson, 1927)."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials}: expected 0 <= successes <= trials")
    if trials == 0:
        return NOTHING
    share, room = successes / trials, Z * Z / trials
    centre = (share + room / 2) / (1 + room)
    half = Z / (1 + room) * math.sqrt(share * (1 - share) / trials + room / (4 * trials))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(share, min(share, low), max(share, high), trials)  # rounding must not leave the share outside


@dataclass(frozen=True)
class Survival:
    """The share that is still `alive` after each of `times`, which ascend."""

    times: tuple[float, ...]
    alive: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """The first time by which `share` of them have ended; infinity where that was never seen."""
        ended = [time for time, alive in zip(self.times, self.alive, strict=True) if alive <= 1 - share + 1e-12]
        return ended[0] if ended else math.inf


def kaplan_meier(times: Sequence[float], has_ended: Sequence[bool]) -> Survival:
    """Survival when some were watched only until `times[i]` without an end (`has_ended[i]` False: censored).

    E. L. Kaplan and P. Meier (1958): the product over times of (1 - ended / still watched).
    """
    if len(times) != len(has_ended) or any(math.isnan(t) for t in times):
        raise ValueError(f"{len(times)} times, {len(has_ended)} ends: expected as many, and no NaN")
    at, alive, share = [], [], 1.0
    for time in sorted({t for t, end in zip(times, has_ended, strict=True) if end}):
        watched = sum(t >= time for t in times)
        ended = sum(t == time and end for t, end in zip(times, has_ended, strict=True))
        share *= 1 - ended / watched
        at.append(time)
        alive.append(share)
    return Survival(tuple(at), tuple(alive))


def _known(clusters: ArrayLike, *columns: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    """The columns, and the clusters last, without the rows in which a column is NaN."""
    arrays = [np.asarray(column, np.float64) for column in columns]
    groups = np.asarray(clusters)
    if any(array.shape != (len(groups),) for array in arrays):
        raise ValueError(f"{[a.shape for a in arrays]} values of {groups.shape} clusters: expected one cluster each")
    good = ~np.isnan(arrays).any(0) if len(groups) else np.zeros(0, bool)
    return (*(array[good] for array in arrays), groups[good])


def _sums(groups: NDArray[np.float64], columns: F64) -> tuple[NDArray[np.float64], F64]:
    """Sums of the columns [n, k] in each cluster [clusters, k]."""
    names, which = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, which, columns)
    return names, sums


@lru_cache(maxsize=16)
def _weights(clusters: int, resamples: int, seed: int) -> F64:
    """How often each cluster is drawn in each resample [resamples, clusters]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, clusters]))
    weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)
    weights.flags.writeable = False
    return weights


def _interval(value: float, drawn: F64, clusters: int) -> Interval:
    drawn = np.sort(drawn[~np.isnan(drawn)])
    if clusters < 2 or not len(drawn):
        return Interval(value, math.nan, math.nan, clusters)
    tail = (1 - LEVEL) / 2  # by rank and not interpolated, because infinities may be among them
    low, high = drawn[int(tail * len(drawn))], drawn[min(len(drawn) - 1, math.ceil((1 - tail) * len(drawn)) - 1)]
    return Interval(value, float(low), float(high), clusters)
