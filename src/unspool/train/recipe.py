"""A recipe: a complete named training. A function returns one; its docstring holds command, hardware and results."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from unspool.config import apply_overrides, locate
from unspool.train.config import TrainConfig

if TYPE_CHECKING:
    from unspool.data.batch import Source
    from unspool.methods.base import Method
    from unspool.train.callbacks import Callback


class LegOver(Exception):
    """What `Recipe.prepare` raises where a signal or the clock ended the leg in it; all is kept for the next one."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Base of all recipes: a configuration that knows how to build what it describes.

    A subclass adds its own fields (plain data and nested frozen dataclasses, which `a.b=c` overrides reach) and writes
    the three methods. `harmless` names dotted fields that may change when a run is resumed, beside the loop's own.
    """

    train: TrainConfig

    harmless: ClassVar[tuple[str, ...]] = ()

    def may_differ(self) -> tuple[str, ...]:
        """`harmless`, where that depends on the configuration."""
        return self.harmless

    def prepare(self, out: Path) -> Recipe:
        """What must be there before anything is built (a codec fitted to the data, clips encoded with it), made once
        and kept in the run's folder `out`; returns the recipe that names it. Called by every leg, not by a dry run; by
        several ranks one after the other, before they know each other."""
        return self

    def build_method(self, device: torch.device) -> Method:
        """The objective with its networks on `device`, in fp32; the global generator was seeded before the call."""
        raise NotImplementedError(f"{type(self).__name__} has no build_method")

    def build_source(self) -> Source:
        """Where the batches come from."""
        raise NotImplementedError(f"{type(self).__name__} has no build_source")

    def callbacks(self) -> Sequence[Callback]:
        """What happens beside the steps: sample sheets, scores, exports."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Named:
    """A recipe with the name it was asked for by and its description."""

    name: str
    recipe: Recipe
    description: str


def load_recipe(name: str, table: Mapping[str, str], overrides: Iterable[str] = ()) -> Named:
    """The recipe behind a name of `table` or a user's own "module:function", with `a.b=c` applied.

    Raises ValueError for an unknown name, for something that is no recipe, and for overrides that do not fit.
    """
    made = locate(name, table)
    if not callable(made):
        raise ValueError(f"{name!r}: got a {type(made).__name__}; expected a function that returns a Recipe")
    _check_signature(name, made)
    recipe = made()
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"{name!r}: got a {type(recipe).__name__} from it; expected a Recipe (unspool.train.recipe:Recipe)"
        )
    text = inspect.getdoc(made) or inspect.getdoc(type(recipe)) or ""
    return Named(name=name, recipe=apply_overrides(recipe, overrides), description=text)


def _check_signature(name: str, made: Any) -> None:
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise ValueError(f"{name!r}: {error}; expected a function of no arguments that returns a Recipe") from None
    except ValueError:  # no signature to look at
        return


def with_defaults(config: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """`saved`, the plain data of an earlier dataclass like `config`, with the fields that it lacks at their defaults.

    A field added later has the earlier behaviour as its default, so its absence means that. A nested dataclass is
    filled only where both have one: None is not a dataclass of defaults.
    """
    from unspool.config import to_dict

    found, twin, absent = dict(saved), copy.copy(config), []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in found:
            if dataclasses.is_dataclass(value) and isinstance(found[field.name], Mapping):
                found[field.name] = with_defaults(value, found[field.name])
        elif field.init and field.default is not dataclasses.MISSING:
            object.__setattr__(twin, field.name, field.default)
            absent.append(field.name)
        elif field.init and field.default_factory is not dataclasses.MISSING:
            object.__setattr__(twin, field.name, field.default_factory())
            absent.append(field.name)
    plain = to_dict(twin)
    return found | {name: plain[name] for name in absent}


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """Every leaf field of nested dataclasses, or of the plain data made of them, under its dotted key."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        from unspool.config import to_dict

        config = to_dict(config)
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    found: dict[str, object] = {}
    for key, value in config.items():
        found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found
