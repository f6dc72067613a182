"""What the annotations of a configuration say: fields, alternatives, items, names for people."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union


def check_word(name: str, value: object, words: Any) -> None:
    """Raise ValueError unless `value` is one of the words of a Literal: where they are told apart by comparing, another
    word would quietly pass for the last of them."""
    choices = typing.get_args(words)
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def fields_of(cls: type) -> dict[str, Any]:
    """Init fields and their resolved annotations."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def required_of(cls: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def defaults_of(cls: type) -> dict[str, Any]:
    """What the fields are that nobody sets, where they have such a value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.init and field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def members_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: those of a union, else the annotation alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def configs_of(hint: Any) -> list[type]:
    return [member for member in members_of(hint) if isinstance(member, type) and dataclasses.is_dataclass(member)]


def is_config(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def item_hint(hint: Any, index: int) -> Any:
    for member in members_of(hint):
        args = typing.get_args(member)
        if typing.get_origin(member) is tuple and not (len(args) == 2 and args[1] is Ellipsis):
            return args[index] if index < len(args) else None
        if typing.get_origin(member) in (tuple, list, Sequence):
            return args[0]
    return None


def by_name(hint: Any) -> dict[str, type]:
    return {config.__name__: config for config in configs_of(hint)}


def name_of(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(name_of(member) for member in args)
    if hint in (None, type(None)):
        return "none"
    return str(hint) if args or not isinstance(hint, type) else hint.__name__
