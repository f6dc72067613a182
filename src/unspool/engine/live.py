"""Playing a session while it is made: one thread makes frames, bounded ahead, another shows them at their time."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import numpy as np
from numpy.typing import NDArray

from unspool.engine.session import Session, Transition
from unspool.engine.terminal import Keyboard, Screen
from unspool.rollout.settings import Cancelled

LEAD = 1
"""Chunks made ahead of the one that is shown: more would let a new prompt wait for longer. With 1 it waits for the rest
of the chunk on the screen and, when the next one is made already, for that one."""
POLL_S, AT_ONCE_S = 0.02, 0.002


class Ahead:
    """Makes the frames of a session in a thread of its own, at most `LEAD` chunks ahead of who takes them.

    `stop` ends it between two passes when the session was made with `cancel=stop.is_set`.
    """

    def __init__(self, session: Session, stop: threading.Event, *, frames: int | None = None) -> None:
        self._session, self._stop, self._frames = session, stop, frames
        self._queue: queue.Queue[NDArray[np.uint8] | None] = queue.Queue()
        self._has_taken = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._make, name="unspool-chunks", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def take(self, timeout_s: float) -> NDArray[np.uint8] | None:
        """The next frames, those of a latent frame; None at the end. Raises queue.Empty when none are ready, else what
        the thread raised."""
        piece = self._queue.get(timeout=timeout_s)
        if piece is None and self._error is not None:
            raise self._error
        self._has_taken.set()
        return piece

    def _make(self) -> None:
        left = self._frames
        try:
            for piece in self._pieces():
                self._queue.put(piece if left is None else piece[:left])
                left = None if left is None else left - len(piece)
                if left is not None and left <= 0:
                    break
        except Cancelled:
            pass
        except BaseException as error:  # handed to the thread that takes the frames
            self._error = error
        self._queue.put(None)

    def _pieces(self) -> Iterator[NDArray[np.uint8]]:
        """Until the clip is over, the session paused, or `stop` set. What is left of a chunk is decoded between the
        passes of the next one, unless that has to wait."""
        session = self._session
        most = LEAD * session.stream.clock.plan.chunk
        while not (session.is_finished or session.is_paused or self._stop.is_set()):
            left = session.stream.num_undecoded
            if self._queue.qsize() + left < most:
                yield from session.pieces()
            elif not self._was_taken(AT_ONCE_S if left else POLL_S) and left:
                yield next(session.rest())
        if not self._stop.is_set():
            yield from session.rest()

    def _was_taken(self, timeout_s: float) -> bool:
        """Whether frames are taken within that time."""
        found = self._has_taken.wait(timeout_s)
        self._has_taken.clear()
        return found


def play(
    session: Session,
    screen: Screen,
    keyboard: Keyboard,
    stop: threading.Event,
    *,
    frames: int | None = None,
    transition: Transition = "cut",
) -> Iterator[NDArray[np.uint8]]:
    """Show a session until `stop`, Ctrl-D or its end, and yield its frames as they come on, some at a time.

    Every frame is shown at its time; a frame that is late is not drawn, and when no chunk is ready the clock waits. A
    typed line becomes the prompt.
    """
    show = _Show(session, screen, keyboard, transition)
    with Ahead(session, stop, frames=frames) as ahead:
        while not (stop.is_set() or keyboard.line.is_closed):
            try:
                piece = ahead.take(POLL_S)
            except queue.Empty:
                show.wait()
                continue
            if piece is None:
                return
            yield piece
            for frame in piece:
                if stop.is_set() or keyboard.line.is_closed:
                    break
                show.frame(frame)


class _Show:
    """When which frame is drawn, and what stands under it."""

    def __init__(self, session: Session, screen: Screen, keyboard: Keyboard, transition: Transition) -> None:
        self._session, self._screen, self._keyboard, self._transition = session, screen, keyboard, transition
        self._due_s = 0.0
        self._number = 0
        self._message = "type a prompt and Enter; Ctrl-C ends"

    def wait(self) -> None:
        """No chunk is ready: keep the picture, take what is typed."""
        self._read()
        self._screen.draw(None, self._status(), self._keyboard.line.text)

    def frame(self, frame: NDArray[np.uint8]) -> None:
        """Draw a frame at its time, or not at all when the one after it is due already."""
        period = 1 / self._session.fps
        now = time.monotonic()
        if now - self._due_s > 0.5:  # the stream did not keep up: its clock starts anew
            self._due_s = now
        while (left := self._due_s - time.monotonic()) > 0:
            self._read()
            time.sleep(min(left, POLL_S))
        if time.monotonic() - self._due_s < period:
            self._read()
            self._screen.draw(frame, self._status(), self._keyboard.line.text)
        self._number += 1
        self._due_s += period

    def _read(self) -> None:
        for prompt in self._keyboard.poll():
            notes = len(self._session.notes)
            try:
                at = self._session.set(prompt=prompt, transition=self._transition)
            except ValueError as error:  # of a model whose prompt cannot change
                self._message = str(error)
                continue
            told = "; ".join(self._session.notes[notes:])
            self._message = f"from {at:.1f} s on: {prompt}" + (f"  ({told})" if told else "")

    def _status(self) -> str:
        timing = self._session.timing
        speed = "" if timing.fps is None else f"  {timing.fps:.1f} frames/s ({timing.realtime:.2f} x)"
        return f"{self._number / self._session.fps:6.1f} s{speed}  {self._message}"


@contextmanager
def stopped_by_signals(stop: threading.Event, on_stop: Callable[[], None] | None = None) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop` instead of raising, so that what was made so far is finished; a second one raises
    KeyboardInterrupt. Only in the main thread; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if on_stop is not None:
            on_stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
