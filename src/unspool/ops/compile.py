"""torch.compile where it pays, with one notice and plain eager code where no compiler is at hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from unspool.log import notice_once


def compiler_works(device: torch.device | str = "cpu") -> bool:
    """True when torch.compile can build and run a kernel here for `device`; else the reason is told once and eager code
    runs. A CPU's kernels want a C++ compiler and CUDA's want Triton: one may work without the other."""
    return _works("cuda" if torch.device(device).type == "cuda" else "cpu")


@lru_cache(maxsize=2)
def _works(kind: str) -> bool:
    try:
        _probe(kind)
    except Exception as error:  # inductor raises many kinds for one cause: no C++ compiler, no Triton
        reason = str(error).strip().splitlines()
        notice_once(
            f"no-compiler-{kind}",
            f"torch.compile is not usable here ({reason[0] if reason else type(error).__name__}); {_REMEDIES[kind]}",
        )
        return False
    return True


_REMEDIES = {
    "cpu": "running uncompiled, about 1.3x slower on a CPU. A C++ compiler (g++ or clang) enables it.",
    "cuda": "running uncompiled on the GPU. Triton, as torch brings it for CUDA, and a C compiler (gcc) enable it.",
}


def _probe(kind: str) -> None:
    """Build and run a kernel of its own: the answer must not depend on what was compiled before."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1).sin()

    torch.compile(probe, fullgraph=True)(torch.zeros(3, device=kind))


@lru_cache(maxsize=64)
def compiled(name: str, kind: str = "cpu") -> Callable[..., Any]:
    """The function `module:name`, compiled once per process, or as it is where no compiler works for devices of type
    `kind`."""
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    return _compile(function) if compiler_works(kind) else function


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with room for many shapes and modes: the limit counts all networks of a process together, and past
    it dynamo runs a new variant as it is instead of failing."""
    for limit, value in (("recompile_limit", 128), ("accumulated_recompile_limit", 1024)):
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, max(value, getattr(torch._dynamo.config, limit)))
    return torch.compile(function)


@lru_cache(maxsize=64)
def _compiled_method(kind: Any, method: str) -> Callable[..., Any]:
    return _compile(getattr(kind, method))


def compile_backbone(network: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Compile the methods that the network's blocks name in `compiled_methods`, in place, and return it; for `device`,
    by default that of its weights.

    Of a backbone, attention over the past stays outside: its sizes change from chunk to chunk while the rest is static,
    so nothing is compiled twice for a growing cache. Weights and results keep their meaning; only rounding may differ.
    """
    if device is None:
        device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    if not compiler_works(device):
        return network
    for module in network.modules():
        for method in getattr(type(module), "compiled_methods", ()):
            # Bound to the instance and not closed over it: a deep copy then computes with its own weights.
            setattr(module, method, MethodType(_compiled_method(cast(Any, type(module)), method), module))
    return network
