"""Data: one source per file; every source gives the same `Batch` and is a pure function of the step.

`SOURCES` maps a name to "module:Class"; a user's own "module:Class" stands beside them.
"""

from __future__ import annotations

SOURCES: dict[str, str] = {}
"""Name -> "module:Class"."""
