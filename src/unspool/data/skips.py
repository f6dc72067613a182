"""What a source had to leave out, and why: collected while it works, told in one piece."""

from __future__ import annotations

import threading
from collections import defaultdict


class SkipReport:
    """Names that were left out, each once, under a kind ("broken", "too short", ...) with a reason. Thread-safe."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, kind: str, reason: str) -> None:
        """Record one name; a second record of the same name is dropped."""
        with self._lock:
            self._found.setdefault(name, (kind, reason))

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(name, kind, reason), in order of record."""
        return [(name, *why) for name, why in list(self._found.items())]

    def summary(self, *, most: int = 3) -> str:
        """One line: how many of each kind, with the first `most` names and reasons; empty if nothing was skipped."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for name, kind, reason in self.rows:
            kinds[kind].append(f"{name}: {reason}")
        parts = []
        for kind, items in kinds.items():
            more = f", and {len(items) - most} more" if len(items) > most else ""
            parts.append(f"{len(items)} {kind} ({', '.join(items[:most])}{more})")
        return f"skipped {len(self)}: {'; '.join(parts)}" if parts else ""
