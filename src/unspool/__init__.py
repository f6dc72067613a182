"""Streaming autoregressive video diffusion: one causal network, one exact cache, one rollout.

Importing this package imports nothing else: the names below are loaded at first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY: dict[str, str] = {
    "contact_sheet": "unspool.engine.export:contact_sheet",
    "read_metadata": "unspool.engine.export:read_metadata",
    "write_video": "unspool.engine.export:write_video",
}
"""Public name -> "module:attribute"."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("unspool")
        except PackageNotFoundError:  # run from a source tree that was never installed
            value = "0+unknown"
    elif name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'unspool' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})
