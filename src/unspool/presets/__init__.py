"""Known models as data: sizes, chunk, schedule, window, sink, files, licence; imports no torch.

A fact that no public source states stays None, so that nobody mistakes a guess for a setting.
"""

from __future__ import annotations

import difflib

from unspool.presets import data
from unspool.presets.model import Preset, WeightFile

PRESETS: dict[str, Preset] = {preset.name: preset for preset in data.ALL}


def names() -> tuple[str, ...]:
    """All preset names."""
    return tuple(PRESETS)


def get(name: str) -> Preset:
    """The preset of that name. Raises ValueError with the nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    raise ValueError(
        f"got preset {name!r}; expected one of {sorted(PRESETS)}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


__all__ = ["PRESETS", "Preset", "WeightFile", "get", "names"]
