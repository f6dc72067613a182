"""Video in a terminal: two pixels per character cell in 24-bit colour, and a line that can be typed meanwhile."""

from __future__ import annotations

import os
import re
import select
import shutil
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

UPPER_HALF = "\N{UPPER HALF BLOCK}"
ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"  # alternate screen, cursor hidden, empty
LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?")
LONGEST_LINE = 2000
LARGEST = 2  # cells per pixel of the frame: more is only more to send
TEXT_ROWS = 2


def half_blocks(frame: NDArray[np.uint8], columns: int, rows: int) -> list[str]:
    """Lines of cells that show `frame` [h, w, 3] as large as fits into `columns` x `rows` in its shape.

    A cell is about twice as high as wide, so its two halves are square pixels; foreground and background colour them.
    """
    from PIL import Image

    columns, rows = min(columns, LARGEST * frame.shape[1]), min(rows, LARGEST * frame.shape[0] // 2)
    width, height = fit(frame.shape[1], frame.shape[0], columns, 2 * rows)
    enlarges = width >= frame.shape[1]
    way = Image.Resampling.BICUBIC if enlarges else Image.Resampling.BOX
    pixels = np.asarray(Image.fromarray(frame).resize((width, height), way))
    lines = []
    for top, bottom in zip(pixels[0::2].tolist(), pixels[1::2].tolist(), strict=True):
        line, last = "", None
        for over, under in zip(top, bottom, strict=True):
            colour = (*over, *under)
            if colour != last:
                line += "\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*colour)
                last = colour
            line += UPPER_HALF
        lines.append(line + "\x1b[0m")
    return lines


def fit(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """The largest size of the same shape within `columns` x `rows` pixels; the height is even and at least 2."""
    factor = min(columns / width, rows / height)
    return max(1, min(columns, round(width * factor))), max(2, min(rows, round(height * factor)) // 2 * 2)


class Screen:
    """The terminal's other page while a video plays; what was there before comes back at the end."""

    def __init__(self, out: TextIO, size: Callable[[], tuple[int, int]] | None = None) -> None:
        self._out = out
        self._size = size or shutil.get_terminal_size
        self._last: tuple[int, int] | None = None

    def __enter__(self) -> Screen:
        self._write(ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(LEAVE)

    def draw(self, frame: NDArray[np.uint8] | None, status: str, typed: str) -> None:
        """Show a frame, a line about it and what is being typed; a change of the terminal's size is noticed here."""
        columns, rows = self._size()
        parts = []
        if (columns, rows) != self._last:
            parts.append("\x1b[2J")
            self._last = (columns, rows)
        if frame is not None and rows > TEXT_ROWS:
            for number, line in enumerate(half_blocks(frame, columns, rows - TEXT_ROWS)):
                parts.append(f"\x1b[{number + 1};1H{line}")
        shown = f"> {typed}"
        for row, text in ((rows - 1, status[:columns]), (rows, shown[-columns:])):
            parts.append(f"\x1b[{max(row, 1)};1H\x1b[K{printable(text)}")
        self._write("".join(parts))

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Line:
    """A line that is typed character by character."""

    def __init__(self) -> None:
        self.text = ""
        self.is_closed = False
        """Whether Ctrl-D was typed on an empty line."""

    def feed(self, typed: str) -> list[str]:
        """Take what was typed; the lines that Enter finished, empty ones left out."""
        done = []
        for character in ESCAPES.sub("", typed):
            if character in "\r\n":
                if self.text.strip():
                    done.append(self.text.strip())
                self.text = ""
            elif character in "\x7f\b":
                self.text = self.text[:-1]
            elif character == "\x15":  # Ctrl-U
                self.text = ""
            elif character == "\x17":  # Ctrl-W
                self.text = " ".join(self.text.split()[:-1])
            elif character == "\x04":
                self.is_closed = self.is_closed or not self.text
            elif character.isprintable() and len(self.text) < LONGEST_LINE:
                self.text += character
        return done


class Keyboard:
    """What is typed at a terminal, without waiting for it. Ctrl-C still interrupts. Where a terminal cannot be read key
    by key (not POSIX, or not a terminal) nothing is ever typed."""

    def __init__(self, stream: TextIO) -> None:
        self._fd = stream.fileno() if stream.isatty() else None
        self._saved: list[Any] | None = None
        self._bytes = b""
        self.line = Line()

    def __enter__(self) -> Keyboard:
        try:
            import termios
            import tty
        except ImportError:
            self._fd = None
        if self._fd is not None:
            self._saved = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None and self._saved is not None:
            import termios

            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)

    def poll(self) -> list[str]:
        """The lines that were finished since the last call."""
        if self._fd is None or not select.select([self._fd], [], [], 0)[0]:
            return []
        self._bytes += os.read(self._fd, 4096)
        text, self._bytes = _decoded(self._bytes)
        return self.line.feed(text)


def _decoded(data: bytes) -> tuple[str, bytes]:
    """Text and the bytes of a character that is not complete yet."""
    for cut in range(min(4, len(data) + 1)):
        try:
            return data[: len(data) - cut].decode(), data[len(data) - cut :]
        except UnicodeDecodeError:
            continue
    return data.decode(errors="ignore"), b""


def printable(text: str) -> str:
    """Text without characters that would steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
