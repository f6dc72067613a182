"""Strict loading: what was missing, unexpected or of another shape, said in one error before any work is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
    "fp64": torch.float64,
}
_PLAIN = frozenset(_DTYPES.values())
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """One tensor whose shape is not the network's."""

    name: str
    got: tuple[int, ...]
    expected: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a checkpoint compares with a network; names are those of the checkpoint's own format.

    `format` is the naming found, `wrapper` the container key taken out of `offered`, `stripped` the prefixes removed,
    `ignored` the entries that were no tensors, `num_merged` how many weights a LoRA changed.
    """

    source: str
    format: str
    wrapper: str
    num_tensors: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    offered: tuple[str, ...] = ()
    stripped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    num_merged: int = 0

    @property
    def is_exact(self) -> bool:
        """Every tensor of the network is there in its shape, and nothing else is."""
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """The report for people, several lines."""
        others = [name for name in self.offered if name != self.wrapper]
        lines = [
            f"source      {self.source}",
            f"format      {self.format} names, {self.num_tensors} tensors",
            f"taken from  {self.wrapper}" + (f" (also there: {', '.join(others)})" if others else ""),
            f"missing {len(self.missing)}, unexpected {len(self.unexpected)}, of another shape {len(self.mismatched)}",
        ]
        if self.stripped:
            lines.insert(3, f"prefixes    removed {', '.join(self.stripped)}")
        if self.ignored:
            lines.append(
                f"ignored     {len(self.ignored)} entries that are no tensors: {', '.join(self.ignored[:_SHOWN])}"
            )
        if self.num_merged:
            lines.append(f"LoRA        merged into {self.num_merged} weights")
        return "\n".join(lines)

    def require_exact(self, *, expected: str, fix: str) -> None:
        """Raise ValueError unless `is_exact`; `expected` names the network, `fix` says what to try."""
        if self.is_exact:
            return
        faults = []
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                faults.append(
                    f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
                )
        if self.mismatched:
            shown = ", ".join(f"{m.name} {list(m.got)} instead of {list(m.expected)}" for m in self.mismatched[:_SHOWN])
            faults.append(
                f"{len(self.mismatched)} of another shape: {shown}{', ...' if len(self.mismatched) > _SHOWN else ''}"
            )
        raise ValueError(
            f"got {self.source} ({self.format} names, {self.num_tensors} tensors, taken from {self.wrapper!r}) with "
            f"{'; '.join(faults)}; expected {expected}; {fix}"
        )


def compare(got: Shapes, expected: Shapes) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Mismatch, ...]]:
    """`(missing, unexpected, mismatched)` of a state dict against what a network needs, each in a stable order."""
    missing = tuple(name for name in expected if name not in got)
    unexpected = tuple(name for name in got if name not in expected)
    wrong = (name for name in expected if name in got and tuple(got[name]) != tuple(expected[name]))
    return missing, unexpected, tuple(Mismatch(name, tuple(got[name]), tuple(expected[name])) for name in wrong)


def load_into(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Put a state dict in the module's own names into the module, strictly.

    A module on the meta device gets fresh copies (nothing stays tied to the file), in `dtype` (None keeps each
    tensor's) on `device` (None: where the tensors are). A module that already has memory is filled in place and keeps
    its own dtype and device, so optimisers stay valid; `dtype` and `device` are refused then.

    Raises ValueError for names or shapes that differ, or quantised tensors without a `dtype`.
    """
    own = module.state_dict()
    missing, unexpected, mismatched = compare(
        {name: tuple(t.shape) for name, t in tensors.items()}, {name: tuple(t.shape) for name, t in own.items()}
    )
    report = LoadReport(
        source="a state dict",
        format="own",
        wrapper="flat",
        num_tensors=len(tensors),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
    )
    report.require_exact(
        expected=f"the {len(own)} tensors of {type(module).__name__}", fix="build the module from the same config"
    )
    check_dtypes(tensors, dtype)
    if not any(tensor.is_meta for tensor in own.values()):
        if dtype is not None or device is not None:
            raise ValueError(
                "got dtype or device for a module that has memory; expected neither; call module.to() instead"
            )
        module.load_state_dict(dict(tensors), strict=True)
        return
    copies = {
        name: tensor.detach().to(device=device, dtype=dtype, copy=True).contiguous() for name, tensor in tensors.items()
    }
    module.load_state_dict(copies, strict=True, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:
        raise ValueError(
            f"got buffers {left} that no checkpoint fills still on the meta device; compute them in forward instead"
        )


def check_dtypes(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Raise ValueError for tensors that are no plain floats: quantised weights mean nothing without their scales."""
    odd = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in _PLAIN}
    # fp8 saved without scales is only a narrow float, and a stated dtype widens it
    if dtype is not None:
        odd = {name: kind for name, kind in odd.items() if not kind.is_floating_point}
    if odd:
        name, kind = next(iter(odd.items()))
        raise ValueError(
            f"got {len(odd)} tensors such as {name!r} in {kind}; expected float32, float16 or bfloat16 weights; "
            "use an unquantised checkpoint, or pass dtype= for fp8 weights without scales"
        )


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name (`bfloat16`, `bf16`, `torch.bfloat16`, ...); a dtype or None passes."""
    if name is None or isinstance(name, torch.dtype):
        return name
    found = _DTYPES.get(name.removeprefix("torch."))
    if found is None:
        raise ValueError(f"got dtype {name!r}; expected one of {sorted(_DTYPES)}")
    return found
