"""Complete named trainings as functions. `RECIPES` maps a name to "module:function"; a user's own stands beside them."""

from __future__ import annotations

RECIPES: dict[str, str] = {}
"""Name -> "module:function"."""
