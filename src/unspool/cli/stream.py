"""`unspool stream`: video without end, in the terminal or to a file, while new prompts may be typed."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unspool.cli.generate import DEFAULT_FOLDER, StreamArgs, announce, check_times, load_model, prepare, start

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unspool.engine.pipeline import Pipeline
    from unspool.engine.session import Session

FALLBACK = DEFAULT_FOLDER / "stream.mp4"
FALLBACK_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(StreamArgs):
    """Stream a prompt in the terminal, two pixels per character; type another prompt and Enter to change it.

    It runs until --seconds, Ctrl-D or Ctrl-C, in constant memory. With -o it is written to a file too. Where stdout is
    no terminal it is only written, to out/stream.mp4 and for 20 s unless told otherwise.
    """

    prompt: tyro.conf.Positional[str]
    """What the video shows first. An empty one leaves it to the model."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write as well: .mp4, or what else unspool generate can write."""
    seconds: float | None = None
    """When to stop; never if not given."""


def run(args: Args) -> int:
    """Play or write; ends cleanly at Ctrl-C, with what was made so far in the file."""
    check_times(args.seconds, args.at)
    is_terminal = sys.stdout.isatty() and sys.stdin.isatty()
    if not is_terminal and args.out is None:
        args = dataclasses.replace(args, out=FALLBACK, seconds=args.seconds or FALLBACK_SECONDS)
        print(f"unspool: not a terminal, so the stream goes to {FALLBACK}", file=sys.stderr)
    if args.out is not None:
        prepare(args.out)
    pipeline = load_model(args)
    count = None if args.seconds is None else pipeline.frame_count(seconds=args.seconds)
    stop = threading.Event()
    session = start(pipeline, args, args.prompt, frames=count, stop=stop)
    announce(session, args, to_stderr=True)

    from unspool.engine.live import stopped_by_signals

    with stopped_by_signals(stop), ExitStack() as terminal:
        if is_terminal:
            chunks = _shown(session, args, stop, count, terminal)
        else:
            chunks = _until(session, stop, count)
        written = _write(pipeline, session, chunks, args)
    print(f"speed  {session.timing}")
    if written is not None:
        print(f"video  {args.out} ({written:g} s)")
    return 0


def _shown(
    session: Session, args: Args, stop: threading.Event, count: int | None, terminal: ExitStack
) -> Iterator[NDArray[np.uint8]]:
    from unspool.engine.live import play
    from unspool.engine.terminal import Keyboard, Screen
    from unspool.log import get_logger

    terminal.callback(get_logger().setLevel, get_logger().level)
    get_logger().setLevel(logging.ERROR)  # what would be logged over the picture stands in the status line
    keyboard, screen = terminal.enter_context(Keyboard(sys.stdin)), terminal.enter_context(Screen(sys.stdout))
    return play(session, screen, keyboard, stop, frames=count, transition=args.transition)


def _until(session: Session, stop: threading.Event, count: int | None) -> Iterator[NDArray[np.uint8]]:
    """The chunks until `stop`, without showing them."""
    from unspool.rollout.settings import Cancelled

    try:
        for chunk in iter(session) if count is None else session.frames(count):
            yield chunk
            if stop.is_set():
                return
    except Cancelled:
        return


def _write(pipeline: Pipeline, session: Session, chunks: Iterator[NDArray[np.uint8]], args: Args) -> float | None:
    """Take all chunks; the seconds that were written, None without a file."""
    if args.out is None:
        for _ in chunks:
            pass
        return None
    from unspool.engine.recording import Target, write_session

    spec = pipeline.spec
    target = Target.check(args.out, (spec.height_px, spec.width_px), scale=args.scale, filter=args.filter)
    record = write_session(session, chunks, target)
    return record.num_frames / record.fps
