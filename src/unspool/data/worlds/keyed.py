"""Values that change at given times: keys (time, value) in order of time, the first of them at minus infinity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.motion import Floats, smoothstep

Keys = tuple[tuple[float, int], ...]


def value_at(keys: Keys, time: float) -> int:
    """The value that holds at `time`: that of the last key that has begun."""
    return [value for start, value in keys if start <= time][-1]


def weights_at(keys: Keys, times: Floats, size: int, over: float) -> NDArray[np.float32]:
    """Weights [n, size] of the values at `times`; each change takes `over` seconds."""
    weights = np.zeros((len(times), size), np.float32)
    weights[:, keys[0][1]] = 1
    for start, value in keys[1:]:
        turn = smoothstep((times - start) / over).astype(np.float32)[:, None]
        weights *= 1 - turn
        weights[:, value] += turn[:, 0]
    return weights
