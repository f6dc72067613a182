"""A source from its name and `key=value` settings, as the command line gives them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable
from typing import Any

from unspool.config import apply_overrides, locate
from unspool.data import SOURCES
from unspool.data.batch import Source


def build_source(name: str, settings: Iterable[str] = ()) -> Source:
    """Make the source behind a name of `SOURCES` or a "module:Class".

    Settings reach the arguments of the class, and the fields of arguments that are configuration dataclasses: with or
    without the argument's name before them (`fps=8` or `config.fps=8`). Raises ValueError for one that fits nothing.
    """
    made = locate(name, SOURCES)
    try:
        signature = inspect.signature(made)
        hints = typing.get_type_hints(made.__init__ if isinstance(made, type) else made)  # type: ignore[misc]
    except (TypeError, ValueError, NameError) as error:
        raise ValueError(
            f"{name!r}: got something that cannot be made with settings ({error}); expected a class"
        ) from None
    arguments: list[tuple[str, Any, Any]] = []
    configs: dict[str, set[str]] = {}
    for argument, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(argument, str)
        config = next((member for member in (hint, *typing.get_args(hint)) if _is_config(member)), None)
        default = None if parameter.default is parameter.empty else parameter.default
        if config is not None:
            configs[argument] = {field.name for field in dataclasses.fields(config) if field.init}
            default = config() if default is None else default
        elif parameter.default is parameter.empty:
            raise ValueError(f"{name!r}: its argument {argument} has no default; expected a class whose arguments have")
        arguments.append((argument, hint, _field(default)))
    table = dataclasses.make_dataclass("Settings", arguments, frozen=True, kw_only=True)
    values = apply_overrides(table(), [_placed(item, configs, {a for a, _, _ in arguments}) for item in settings])
    source = made(**{argument: getattr(values, argument) for argument, _, _ in arguments})
    if not isinstance(source, Source):
        raise ValueError(f"{name!r}: got a {type(source).__name__}, which gives no batches; expected a Source")
    return source


def _placed(item: str, configs: dict[str, set[str]], arguments: set[str]) -> str:
    """`fps=8` -> `config.fps=8`, where only a configuration has such a field."""
    head = item.partition("=")[0].strip().partition(".")[0]
    homes = [argument for argument, fields in configs.items() if head in fields]
    if head not in arguments and len(homes) == 1:
        return f"{homes[0]}.{item.strip()}"
    if head not in arguments and len(configs) == 1 and len(arguments) == 1:
        return f"{next(iter(configs))}.{item.strip()}"  # unknown: the message then lists the fields
    return item


def _field(default: object) -> Any:
    return dataclasses.field(default_factory=lambda: default)


def _is_config(hint: object) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)
