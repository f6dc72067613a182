"""The terminal player on a fake terminal: cells, sizes, typing, and a session that is played and changed."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import shared

from unspool.engine.live import Ahead, play, stopped_by_signals
from unspool.engine.terminal import ENTER, LEAVE, Keyboard, Line, Screen, fit, half_blocks

RED, BLUE = "a red ball bounces at sunset", "a blue star drifts left at night"
CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m")


def painted(lines: list[str]) -> np.ndarray:
    """The pixels that a terminal would show: two rows per line."""
    rows: list[list[tuple[int, ...]]] = []
    for line in lines:
        upper: list[tuple[int, ...]] = []
        lower: list[tuple[int, ...]] = []
        colour: tuple[int, ...] = ()
        for escape, text in re.findall(r"(\x1b\[[\d;]*m)|(.)", line):
            if escape:
                found = CELL.fullmatch(escape)
                colour = tuple(map(int, found.groups())) if found else ()
            else:
                assert text == "\N{UPPER HALF BLOCK}" and colour
                upper.append(colour[:3])
                lower.append(colour[3:])
        rows += [upper, lower]
    return np.array(rows, np.uint8)


def test_cells_are_the_frame_s_pixels() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    lines = half_blocks(frame, 12, 4)
    assert (painted(lines) == frame).all() and all(line.endswith("\x1b[0m") for line in lines)
    plain = np.full((8, 12, 3), 7, np.uint8)
    assert half_blocks(plain, 12, 4)[0].count("\x1b[38") == 1  # a colour is sent when it changes


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(2, 120))
def test_a_frame_fits_in_its_shape(width: int, height: int, columns: int, rows: int) -> None:
    w, h = fit(width, height, columns, rows)
    assert 1 <= w <= columns and 2 <= h <= max(rows, 2) and h % 2 == 0
    assert w >= columns - 1 or h >= rows - 2 or max(w / width, h / height) > 0


def test_the_screen_follows_the_terminal_s_size_and_comes_back() -> None:
    out, size = io.StringIO(), [(40, 12)]
    frame = np.zeros((16, 32, 3), np.uint8)
    with Screen(out, lambda: size[0]) as screen:
        screen.draw(frame, "status", "typed\x07")
        first = len(out.getvalue())
        screen.draw(frame, "status", "")
        assert "\x1b[2J" not in out.getvalue()[first:]
        size[0] = (20, 6)
        before = len(out.getvalue())
        screen.draw(frame, "a status that is far too long for it", "x" * 50)
        later = out.getvalue()[before:]
        assert "\x1b[2J" in later and later.count("\N{UPPER HALF BLOCK}") <= 20 * 4
        size[0] = (1, 1)
        screen.draw(frame, "s", "")
    text = out.getvalue()
    assert text.startswith(ENTER) and text.endswith(LEAVE) and "\x07" not in text


def test_typing() -> None:
    line = Line()
    assert line.feed("a red bal") == [] and line.feed("ll\x7f\r") == ["a red ball"]
    assert line.feed("x\x1b[A\x1b[1;5Cy\x1bOP z\x17") == [] and line.text == "xy"
    assert line.feed("\x15blue\n\n  \ngreen") == ["blue"] and line.text == "green"
    line.feed("\x04")
    assert not line.is_closed
    line.feed("\x15\x04")
    assert line.is_closed
    line.feed("é" * 5000)
    assert len(line.text) == 2000


def test_the_keyboard_is_read_key_by_key_and_restored() -> None:
    import termios

    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as terminal:
        before = termios.tcgetattr(slave)
        with Keyboard(terminal) as keyboard:
            assert keyboard.poll() == []
            os.write(master, "a bl\u00fc".encode()[:-1])
            wait_for(lambda: keyboard.poll() == [] and keyboard.line.text == "a bl")
            os.write(master, "\u00fc".encode()[-1:] + b"e\r")
            lines: list[str] = []
            wait_for(lambda: bool(lines.extend(keyboard.poll()) or lines))
            assert lines == ["a bl\u00fce"]
        assert termios.tcgetattr(slave) == before
    os.close(master)
    with Keyboard(io.StringIO()) as nothing:
        assert nothing.poll() == []


def wait_for(is_true, seconds: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Typist(Keyboard):
    """Types a prompt at the first poll."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.lines = [BLUE + " zork"]

    def poll(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def test_a_played_session_shows_what_it_makes_and_follows_what_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.engine.live.time.sleep", lambda seconds: None)
    out, stop = io.StringIO(), threading.Event()
    session = shared().session(RED, cancel=stop.is_set)
    with Typist() as keyboard, Screen(out, lambda: (160, 20)) as screen:
        chunks = list(play(session, screen, keyboard, stop, frames=45))
    assert sum(map(len, chunks)) == 45 and stop.is_set()
    assert [event.prompt for event in session.events] == [BLUE + " zork"]
    again = shared().session_of(session.record(num_frames=45))
    assert (np.concatenate(list(again.frames(45))) == np.concatenate(chunks)).all()
    shown = out.getvalue()
    assert "\N{UPPER HALF BLOCK}" in shown and "s on: a blue star" in shown and "zork" in shown


def test_chunks_are_made_ahead_but_bounded_and_errors_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    session = shared().session(RED, cancel=stop.is_set)
    with Ahead(session, stop) as ahead:
        ahead.take(30.0)
        wait_for(lambda: session.chunk >= 2)
        time.sleep(0.1)
        assert session.chunk == 2  # the one that was taken, and one ahead
    stop = threading.Event()
    session = shared().session(RED, cancel=stop.is_set)
    monkeypatch.setattr(session, "pieces", lambda: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"), Ahead(session, stop) as ahead:
        ahead.take(30.0)


def test_a_signal_stops_and_a_second_one_interrupts() -> None:
    stop, before = threading.Event(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopped_by_signals(stop):
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(stop.is_set)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) == before
