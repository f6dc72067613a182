"""Code from outside the package that decides what a model under test makes: a solver, a policy, a network of one's own.

Clips are kept and found again by what they depend on; for such code that is its source.
"""

from __future__ import annotations

import hashlib
import inspect
import uuid
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from unspool.causal.newer import stated
from unspool.config import to_dict

if TYPE_CHECKING:
    from unspool.engine.pipeline import Pipeline
    from unspool.engine.settings import RolloutSettings

KNOWN = ("unspool", "torch", "numpy", "builtins", "abc", "typing", "collections", "enum")
"""Packages whose classes are not asked for their source."""


def own_code(pipeline: Pipeline, settings: RolloutSettings) -> dict[str, str]:
    """Class -> hash of the file that it lies in, of every class outside the package that a rollout uses, and under
    "values" what it is configured with; empty where there is none.

    What has no source, as a class typed into an interpreter, is never the same twice. Modules that such a file imports
    are not looked at.
    """
    config = settings.config(whole=None if pipeline.spec.is_causal else pipeline.spec.clip)
    objects = [pipeline, settings, config, pipeline.transformer, pipeline.codec, pipeline.wording.encoder]
    found = {cls for one in objects for cls in _classes(one)}
    own = {f"{cls.__module__}:{cls.__qualname__}": _source(cls) for cls in found if _is_own(cls)}
    if any(_is_own(cls) for one in (settings, config) for cls in _classes(one)):
        own["values"] = _values(config)
    return dict(sorted(own.items()))


def settings_facts(settings: RolloutSettings) -> dict[str, object]:
    """The settings as plain data, without those that did not exist when older clips were made and are unchanged."""
    stating = stated(settings)
    return {name: value for name, value in to_dict(settings).items() if name in stating}


def _classes(value: object) -> Iterator[type]:
    """The classes of an object, of the fields of a dataclass, of the modules of a network, and their bases."""
    yield from type(value).__mro__
    if isinstance(value, nn.Module):
        for module in value.modules():
            yield from type(module).__mro__
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _classes(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _classes(item)


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in KNOWN


def _values(config: object) -> str:
    text = repr(config)
    return _never_again() if " at 0x" in text else hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _source(cls: type) -> str:
    try:
        file = inspect.getsourcefile(cls)
        text = Path(file).read_bytes() if file is not None else inspect.getsource(cls).encode()
    except (OSError, TypeError):
        return _never_again()
    return hashlib.sha256(text).hexdigest()[:16]


@lru_cache(maxsize=1)
def _never_again() -> str:
    """The same throughout a process, and in no other."""
    return uuid.uuid4().hex


__all__ = ["own_code", "settings_facts"]
