"""Typed configuration: frozen keyword-only dataclasses are the truth; YAML and `a.b=c` overrides are thin layers.

Strict: what does not fit raises a ValueError that names the full key, what was found, what is expected and the nearest
names. Each dataclass's `__post_init__` validates its values.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from unspool.annotations import (
    by_name,
    configs_of,
    defaults_of,
    fields_of,
    is_config,
    item_hint,
    members_of,
    name_of,
    required_of,
)

Config = TypeVar("Config")

TYPE_KEY = "_type"
"""In a dict, the class name of a dataclass that stands where a union of dataclasses is allowed."""

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_NONE = {"none", "null", "~"}
_INTEGER = re.compile(r"[+-]?\d+(_\d+)*")


def to_dict(config: object, *, where: str = "") -> dict[str, Any]:
    """The init fields of a dataclass as plain data for JSON or YAML, nested ones included.

    Tuples become lists, paths and enums strings. Where a union of several dataclasses is annotated, the chosen class is
    kept under `_type`. `from_dict(type(config), to_dict(config)) == config`. Raises ValueError for other values.
    """
    hints = fields_of(type(config))
    return {name: _plain(getattr(config, name), hint, _join(where, name)) for name, hint in hints.items()}


def from_dict(cls: type[Config], data: Mapping[str, Any], *, where: str = "") -> Config:
    """Build the dataclass `cls` from plain data. `where` is the key under which `data` stood, for messages.

    Raises ValueError for an unknown or missing key and for a value that does not fit the annotation.
    """
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{where or cls.__name__}: got {_show(data)}, expected a mapping of the fields of {cls.__name__}"
        )
    hints = fields_of(cls)
    for name in data:
        if name not in hints:
            raise ValueError(_unknown(_join(where, str(name)), str(name), hints))
    values = {name: _convert(data[name], hints[name], _join(where, name)) for name in hints if name in data}
    missing = [name for name in required_of(cls) if name not in values]
    if missing:
        raise ValueError(f"{where or cls.__name__}: missing {', '.join(missing)}; {cls.__name__} has no default for it")
    return cls(**values)


def load_yaml(cls: type[Config], path: str | Path) -> Config:
    """Read a YAML file into `cls`. Raises FileNotFoundError, or ValueError for bad YAML or bad content."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return from_dict(cls, {} if data is None else data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_yaml(config: object) -> str:
    """The resolved configuration as YAML text, in field order, to be saved beside every output.

    Non-ASCII letters are escaped: PyYAML writes some of them (U+0085) so that it cannot read them back.
    """
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of `config` with `key=value` strings applied, e.g. `["model.layers=8", "window=none"]`.

    Values are read by the annotation of the field: numbers, true/false, none, text as it stands, `1,2` or `[1,2]` for
    tuples and lists, one of a Literal. Several overrides of one dataclass are applied together, so `__post_init__`
    never sees a half-changed one; of two for the same key the last wins. Where a field may be one of several
    dataclasses, its class name chooses one: `loss=Sid`, or with fields of it `loss._type=Sid loss.alpha=0.5`; what both
    have is kept where it was set to something else than its default.
    """
    tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ValueError(f"override {item!r}: expected key=value with a dotted key, such as model.layers=8")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {item!r}: {part} was already set as a whole")
        if isinstance(node.get(parts[-1]), dict):
            raise ValueError(f"override {item!r}: fields of {key.strip()} were already set one by one")
        node[parts[-1]] = text.strip()
    return _replace(config, tree, "")


def locate(name: str, table: Mapping[str, str]) -> Any:
    """The object behind a name of one of the package's tables, or behind a user's own "module:Class".

    `locate("euler", SOLVERS)()` and `locate("my_project.solvers:Mine", SOLVERS)()` make a solver each.
    Raises ValueError with the nearest names, or with what could not be imported.
    """
    target = table.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ValueError(f"{name!r}: expected a known name or your own 'module:Class'; {nearest(name, table)}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}; expected 'module:Class' on the Python path") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known ones first, else the whole list. Ready to append to a message."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"


def _replace(config: Any, tree: Mapping[str, Any], where: str) -> Any:
    hints = fields_of(type(config))
    changes: dict[str, Any] = {}
    for name, value in tree.items():
        key = _join(where, name)
        if name not in hints:
            raise ValueError(_unknown(key, name, hints))
        changes[name] = _member(getattr(config, name), hints[name], value, key)
    return dataclasses.replace(config, **changes)


def _member(current: Any, hint: Any, value: Any, key: str) -> Any:
    """The value of one field: text, a tree of changes to the dataclass that is there, or another dataclass."""
    choices = by_name(hint)
    if isinstance(value, str) and len(choices) > 1 and value in choices:
        value = {TYPE_KEY: value}
    if isinstance(value, Mapping) and current is None and len(choices) == 1:
        value = {TYPE_KEY: next(iter(choices)), **value}  # its first fields make it
    if isinstance(value, Mapping) and TYPE_KEY in value:
        return _chosen(current, hint, value, key)
    if not isinstance(value, Mapping):
        return _parse(value, hint, key)
    if not is_config(current):
        told = f"is {_show(current)}, which has no fields to set ({key}.{next(iter(value))}=...)"
        raise ValueError(f"{key}: {told}")
    return _replace(current, value, key)


def _chosen(current: Any, hint: Any, tree: Mapping[str, Any], where: str) -> Any:
    """Another dataclass of a union, by its name. What was set of the present one, and both have, is kept."""
    choices = by_name(hint)
    cls = choices.get(tree[TYPE_KEY])
    if cls is None:
        raise ValueError(f"{where}.{TYPE_KEY}={tree[TYPE_KEY]}: expected one of {', '.join(choices) or 'none'}")
    own, theirs = fields_of(cls), fields_of(type(current)) if is_config(current) else {}
    usual = {} if isinstance(current, cls) else defaults_of(type(current)) if theirs else {}
    values = {
        name: getattr(current, name)
        for name, kind in own.items()
        if theirs.get(name) == kind and (name not in usual or getattr(current, name) != usual[name])
    }
    defaults = defaults_of(cls)
    for name, value in tree.items():
        if name == TYPE_KEY:
            continue
        if name not in own:
            raise ValueError(_unknown(_join(where, name), name, own))
        values[name] = _member(values.get(name, defaults.get(name)), own[name], value, _join(where, name))
    missing = [name for name in required_of(cls) if name not in values]
    if missing:
        raise ValueError(f"{where}: {cls.__name__} also needs {where}.{missing[0]}=...")
    return cls(**values)


def _plain(value: Any, hint: Any, where: str) -> Any:
    if is_config(value):
        tag = {TYPE_KEY: type(value).__name__} if len(configs_of(hint)) > 1 else {}
        return {**tag, **to_dict(value, where=where)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        inner = (typing.get_args(hint) or (None, None))[-1]
        return {str(key): _plain(item, inner, _join(where, str(key))) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, item_hint(hint, i), _join(where, str(i))) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: got {_show(value)}; to be kept, {type(value).__name__} must be a frozen dataclass")


def _first_fit(hint: Any, value: Any, where: str, attempt: Callable[[Any], Any]) -> Any:
    """`attempt` with each alternative of `hint` until one raises no ValueError; str, which takes any text, last."""
    errors = []
    for member in sorted(members_of(hint), key=lambda member: member is str):
        try:
            return attempt(member)
        except ValueError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ValueError(f"{where}: got {_show(value)}, expected {name_of(hint)}")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Plain data (as JSON or YAML gives it) to the annotated type; ValueError where it does not fit."""
    configs = configs_of(hint)
    if isinstance(value, Mapping) and configs:
        return (
            from_dict(configs[0], value, where=where) if len(configs) == 1 else _convert_tagged(value, configs, where)
        )
    return _first_fit(hint, value, where, lambda member: _convert_one(value, member, where))


def _convert_tagged(value: Mapping[str, Any], configs: list[type], where: str) -> Any:
    choices = {config.__name__: config for config in configs}
    chosen = value.get(TYPE_KEY)
    if chosen not in choices:
        raise ValueError(f"{where}: {TYPE_KEY} is {_show(chosen)}, expected one of {', '.join(choices)}")
    return from_dict(choices[chosen], {k: v for k, v in value.items() if k != TYPE_KEY}, where=where)


def _convert_one(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{where}: got {_show(value)}, expected {name_of(hint)}")
    if hint is Any:
        return value
    if origin is Literal:
        for choice in args:
            if type(choice) is type(value) and choice == value:
                return choice
        raise wrong
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where)
    if origin in (tuple, list, Sequence):
        return _convert_items(value, hint, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        return {_convert(k, args[0], where): _convert(v, args[1], _join(where, str(k))) for k, v in value.items()}
    if hint is None or hint is type(None):
        if value is not None:
            raise wrong
        return None
    return _convert_scalar(value, hint, wrong)


def _convert_scalar(value: Any, hint: Any, wrong: ValueError) -> Any:
    if hint is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                return float(value)
            except ValueError:
                raise wrong from None
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise wrong from None
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint not in (int, float, bool, str, Path):
        raise TypeError(f"{wrong}; this annotation is not supported in a configuration")
    raise wrong


def _convert_items(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: got {_show(value)}, expected {name_of(hint)}")
    args = typing.get_args(hint)
    is_fixed = typing.get_origin(hint) is tuple and not (len(args) == 2 and args[1] is Ellipsis)
    if is_fixed and len(value) != len(args):
        raise ValueError(f"{where}: got {len(value)} values {_show(value)}, expected {len(args)}: {name_of(hint)}")
    items = [_convert(item, item_hint(hint, index), f"{where}[{index}]") for index, item in enumerate(value)]
    return items if typing.get_origin(hint) is list else tuple(items)


def _parse(text: str, hint: Any, where: str) -> Any:
    """Text of a command line to the annotated type."""
    if type(None) in members_of(hint) and text.lower() in _NONE:
        return None
    configs = configs_of(hint)
    if configs:
        example = f"{where}.{next(iter(fields_of(configs[0])), '...')}=..."
        raise ValueError(f"{where}: set the fields of {name_of(hint)} one by one, e.g. {example}")
    return _first_fit(hint, text, where, lambda member: _parse_one(text, member, where))


def _parse_one(text: str, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    value: Any = text
    if hint is bool and text.lower() in _TRUE | _FALSE:
        value = text.lower() in _TRUE
    elif hint is int and _INTEGER.fullmatch(text):
        value = int(text)
    elif origin is Literal:
        value = next((choice for choice in args if str(choice) == text), text)
    elif origin in (tuple, list, Sequence):
        parts = _split(text)
        value = [_parse(part, item_hint(hint, index), f"{where}[{index}]") for index, part in enumerate(parts)]
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        value = next((member.value for member in hint if str(member.value) == text), text)
    return _convert_one(value, hint, where)


def _split(text: str) -> list[str]:
    """`1,2`, `(1,2)`, `[1,2]` and `[[1,2],[3,4]]` at the outermost commas."""
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    stripped = [part.strip() for part in parts]
    return stripped if stripped[-1] else stripped[:-1]  # a trailing comma, or nothing at all


def _unknown(key: str, name: str, known: Iterable[str]) -> str:
    return f"{key}: unknown key; {nearest(name, known)}"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
