"""Key maps as data: a list of rules, each `one tensor here <-> its parts there`, exact in both directions.

A template writes `{i}` for a number and `{p}` for `weight` or `bias`. Several parts are the equal slices of the whole
along dimension 0, in order. A name that no rule knows passes unchanged; strict loading judges it afterwards.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch


@dataclasses.dataclass(frozen=True)
class Rule:
    """`whole` on this side of the map, `parts` on the other; one part is a plain rename."""

    whole: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Rules between two namings of one network: `split` goes from whole to parts, `join` goes back."""

    rules: tuple[Rule, ...]

    @cached_property
    def _wholes(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_compile(rule.whole), rule) for rule in self.rules]

    @cached_property
    def _parts(self) -> list[tuple[re.Pattern[str], Rule, int]]:
        return [(_compile(part), rule, n) for rule in self.rules for n, part in enumerate(rule.parts)]

    def split_name(self, name: str) -> tuple[str, ...]:
        """The names on the parts side; the name itself where no rule knows it."""
        for pattern, rule in self._wholes:
            if found := pattern.fullmatch(name):
                return tuple(part.format(**found.groupdict()) for part in rule.parts)
        return (name,)

    def join_name(self, name: str) -> tuple[str, int, int]:
        """The name of the whole, which slice of it this is, and how many slices it has."""
        for pattern, rule, n in self._parts:
            if found := pattern.fullmatch(name):
                return rule.whole.format(**found.groupdict()), n, len(rule.parts)
        return name, 0, 1

    def split_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """What `split` would return, as shapes."""
        out: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            parts = self.split_name(name)
            if len(parts) > 1:
                _check_divides(name, shape, len(parts))
                shape = (shape[0] // len(parts), *shape[1:])
            for part in parts:
                _put(out, part, tuple(shape))
        return out

    def split(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename and cut; the slices are views of the given tensors.

        Raises ValueError when a tensor does not divide or two names collide.
        """
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            parts = self.split_name(name)
            if len(parts) > 1:
                _check_divides(name, tuple(tensor.shape), len(parts))
            for part, piece in zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True):
                _put(out, part, piece)
        return out

    def join(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename and concatenate; only joined tensors are new memory.

        Raises ValueError when a part is missing, the parts differ in shape, or two names collide.
        """
        groups: dict[str, list[torch.Tensor | None]] = {}
        for name, tensor in tensors.items():
            whole, n, count = self.join_name(name)
            slots = groups.setdefault(whole, [None] * count)
            if len(slots) != count or slots[n] is not None:
                raise ValueError(
                    f"got two tensors for {whole!r} (the second is {name!r}); expected one naming throughout"
                )
            slots[n] = tensor
        out: dict[str, torch.Tensor] = {}
        for whole, slots in groups.items():
            pieces = [piece for piece in slots if piece is not None]
            if len(pieces) != len(slots):
                missing = [n for n, part in zip(self.split_name(whole), slots, strict=True) if part is None]
                raise ValueError(f"got only some parts of {whole!r}; missing {missing}; the checkpoint is incomplete")
            if len({tuple(piece.shape) for piece in pieces}) != 1:
                raise ValueError(
                    f"got parts of {whole!r} of shapes {[tuple(p.shape) for p in pieces]}; expected equal ones"
                )
            out[whole] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out


def detect_format(names: Iterable[str], formats: Mapping[str, Sequence[str]]) -> str | None:
    """Which format's templates know the most of these names; None when not even half of the names fit any.

    `formats` maps a format's name to its templates; on a tie the earlier format wins.
    """
    names = list(names)
    patterns = {fmt: [_compile(template) for template in templates] for fmt, templates in formats.items()}
    known = {fmt: sum(any(p.fullmatch(name) for p in pats) for name in names) for fmt, pats in patterns.items()}
    best = max(known, key=lambda fmt: known[fmt])
    return best if 2 * known[best] >= len(names) > 0 else None


def _compile(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)")
    return re.compile(escaped)


def _check_divides(name: str, shape: tuple[int, ...], count: int) -> None:
    if not shape or shape[0] % count:
        raise ValueError(
            f"got {name!r} of shape {tuple(shape)}; expected a first dimension that {count} parts divide evenly"
        )


def _put(out: dict, name: str, value: object) -> None:
    if name in out:
        raise ValueError(f"got two tensors for {name!r}; expected one naming throughout the checkpoint")
    out[name] = value
