"""When a leg ends before the training: a signal or the clock. The loop asks between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """`reason` is None while the leg may go on. The first SIGTERM or SIGINT is remembered, a second one interrupts.

    Signals are taken between `__enter__` and `__exit__`, and only in the main thread, where Python delivers them.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._began = time.monotonic()
        self._limit_s = None if max_minutes is None else 60.0 * max_minutes
        self._signal: str | None = None
        self._previous: dict[int, object] = {}

    @property
    def reason(self) -> str | None:
        """Why the leg is to end now."""
        if self._signal is not None:
            return self._signal
        if self._limit_s is not None and time.monotonic() - self._began >= self._limit_s:
            return f"max_minutes={self._limit_s / 60:g} are over"
        return None

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended it; its sender gives little time."""
        return self._signal is not None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
