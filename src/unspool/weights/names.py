"""Undo what training wrappers do to key names: container keys (`generator_ema`, ...) and module prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

WRAPPERS = ("generator_ema", "generator", "model")
"""Container keys tried in this order when the caller names none; the averaged student is the one to run."""

INFIXES = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""Module names that FSDP, activation checkpointing and torch.compile insert, at any depth."""

LEADING = frozenset({"model", "module", "diffusion_model"})
"""Module names that pipelines, DataParallel and ComfyUI put in front."""

FLAT = "flat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unwrapped:
    """Tensors found under one container key; `ignored` are the entries beside them that are no tensors."""

    wrapper: str
    offered: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    ignored: tuple[str, ...]


def choose_wrapper(
    content: Mapping[str, object], which: str | None, *, preferred: tuple[str, ...] = WRAPPERS
) -> Unwrapped:
    """Pick the state dict inside a loaded checkpoint.

    `which` names a container key, or `flat` for tensors at the top level; None takes the first of `preferred` that
    holds tensors, else the top level. Raises ValueError when the choice is not there or nothing can be chosen.
    """
    offered = [name for name, value in content.items() if isinstance(value, Mapping) and _tensors(value)]
    at_top = _tensors(content)
    choices = [*offered, *([FLAT] if at_top else [])]
    if which is None:
        which = next((name for name in (*preferred, FLAT) if name in choices), None)
        if which is None:
            hint = f"pass which= one of {choices}" if choices else "this file holds no state dict"
            raise ValueError(
                f"got a checkpoint with the keys {list(content)[:8]}; expected tensors or one of {preferred}; {hint}"
            )
    elif which not in choices:
        raise ValueError(f"got which={which!r}; expected one of {choices}, which this checkpoint holds")
    inner = content if which == FLAT else content[which]
    assert isinstance(inner, Mapping)
    tensors = _tensors(inner)
    rest = tuple(str(name) for name in inner if name not in tensors)
    nested = [name for name in rest if isinstance(inner[name], Mapping) and inner[name]]
    if nested and which != FLAT:
        raise ValueError(
            f"got nested containers {nested[:4]} under {which!r}; expected tensors only; unwrap the file first"
        )
    return Unwrapped(wrapper=which, offered=tuple(choices), tensors=tensors, ignored=rest)


def strip_prefixes(names: Iterable[str], *, leading: frozenset[str] = LEADING) -> dict[str, str]:
    """Map each name to itself without wrapper modules, in whatever order and nesting they occur.

    Raises ValueError when two names become one.
    """
    out: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in INFIXES]
        while len(parts) > 1 and parts[0] in leading:
            parts = parts[1:]
        short = ".".join(parts) or name
        if short in seen:
            raise ValueError(
                f"got both {seen[short]!r} and {name!r}, which are one name without their prefixes; expected one"
            )
        seen[short] = name
        out[name] = short
    return out


def stripped_parts(stripped: Mapping[str, str]) -> tuple[str, ...]:
    """Which wrapper modules `strip_prefixes` removed, for the report."""
    removed: dict[str, None] = {}
    for name, short in stripped.items():
        if name != short:
            head = name.split(".")
            removed |= dict.fromkeys(part for part in head if part in INFIXES)
            bare = [part for part in head if part not in INFIXES]
            removed |= dict.fromkeys(bare[: len(bare) - len(short.split("."))])
    return tuple(removed)


def _tensors(values: Mapping[str, object]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
