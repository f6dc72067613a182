"""Checkpoints of before a configuration gained a field: they had its default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from unspool.causal.position import Absolute, Cyclic
from unspool.config import to_dict
from unspool.train.checkpoint import Saved
from unspool.train.config import EmaConfig, OptimConfig, TrainConfig
from unspool.train.recipe import Recipe
from unspool.train.state import require_same


@dataclass(frozen=True, kw_only=True)
class Turning(Recipe):
    """A recipe with positions."""

    train: TrainConfig
    positions: Cyclic | Absolute


def turning(positions: Cyclic | Absolute, ema: EmaConfig | None = None) -> Turning:
    return Turning(train=TrainConfig(steps=2, batch=1, optim=OptimConfig(lr=0.1), ema=ema), positions=positions)


def saved(recipe: Turning, *missing: str) -> Saved:
    """A checkpoint of `recipe` without the dotted fields."""
    config = to_dict(recipe)
    for key in missing:
        *parents, name = key.split(".")
        inner: dict[str, Any] = config
        for parent in parents:
            inner = inner[parent]
        del inner[name]
    return Saved(path=Path("step-00000001"), state={"config": config})


def test_a_field_that_a_checkpoint_lacks_had_its_default() -> None:
    old = saved(turning(Cyclic(length=6)), "positions.offset")
    assert "offset" not in old.state["config"]["positions"]
    require_same(turning(Cyclic(length=6)), old)
    with pytest.raises(ValueError, match=r"positions\.offset was 0 and is now 2"):
        require_same(turning(Cyclic(length=6, offset=2)), old)
    with pytest.raises(ValueError, match="_type"):
        require_same(turning(Absolute()), saved(turning(Cyclic(length=6)), "positions.offset"))


def test_whole_parts_are_filled_and_none_is_not_a_part_of_defaults() -> None:
    averaged = EmaConfig(decay=0.9)
    require_same(turning(Absolute(), averaged), saved(turning(Absolute(), averaged), "train.ema.warmup"))
    require_same(turning(Absolute()), saved(turning(Absolute()), "train.optim.betas"))
    with pytest.raises(ValueError, match=r"train\.ema"):
        require_same(turning(Absolute(), EmaConfig(decay=0.9)), saved(turning(Absolute())))
    with pytest.raises(ValueError, match=r"positions\.length was None and is now 6"):
        require_same(turning(Cyclic(length=6)), saved(turning(Cyclic(length=6)), "positions.length"))
