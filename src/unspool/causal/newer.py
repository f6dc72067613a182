"""Fields that a policy gained after snapshots of it were written: unsaid while they hold their default."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

NEWER = {"newer": True}
"""Metadata of such a field: `field(default=..., metadata=NEWER)`; its default is what was done before there was one."""


def stated(config: Any) -> dict[str, object]:
    """The fields of a dataclass by name, without newer ones at their default."""
    values = {f.name: (f, getattr(config, f.name)) for f in fields(config) if f.repr}
    return {
        name: value for name, (f, value) in values.items() if not (f.metadata.get("newer") and value == _default(f))
    }


def _default(f: Field[Any]) -> object:
    return f.default if f.default_factory is MISSING else f.default_factory()


def brief(config: Any) -> str:
    """The text that `@dataclass` makes, of what is `stated`; a class takes it as its `__repr__`, so that a snapshot of
    before the field still fits."""
    return f"{type(config).__qualname__}({', '.join(f'{name}={value!r}' for name, value in stated(config).items())})"
