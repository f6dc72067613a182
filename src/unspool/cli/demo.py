"""`unspool demo`: a 20 s video with two changes of prompt, where it lies and how fast it was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unspool.cli.generate import Args as GenerateArgs
from unspool.cli.generate import announce, check_times, prepare, progress, start

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unspool.engine.model_folder import ModelSpec
    from unspool.engine.session import Session

PROMPTS = (
    "a red ball bounces at sunset",
    "a blue star drifts left at night",
    "a yellow triangle orbits by day",
)
SHEET_TILES = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Generate a video whose prompt changes twice with the model that is shipped, and write a contact sheet beside it.

    Without a shipped model a small network with random weights is rolled out instead, which shows that the parts work
    together and nothing else.
    """

    out: Path = Path("out/demo.mp4")
    """Video to write (.mp4, .gif, .webp, .png or .npy)."""
    seconds: float = 20.0
    """Length of the video; the prompt changes after 35 % and 70 % of it."""
    model: str = "stage"
    """A shipped model, a model folder, or a hub repository."""
    seed: int = 1
    """Of the noise."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""


def run(args: Args) -> int:
    """Run the shipped model, or the random network where there is none."""
    from unspool.engine.shipped import shipped_models

    check_times(args.seconds, ())
    if args.model == Args.model and args.model not in shipped_models():
        from unspool.cli import demo_random

        print(f"no model {args.model!r} in this installation yet: a network with random weights stands in")
        return demo_random.run(demo_random.Args(out=str(args.out), seed=args.seed))
    return _run_model(args)


def _run_model(args: Args) -> int:
    from unspool.engine.load import load
    from unspool.engine.recording import Target, write_session

    prepare(args.out)
    pipeline = load(args.model, device=args.device)
    spec = pipeline.spec
    first, *later = _prompts(spec)
    times = (round(0.35 * args.seconds, 2), round(0.7 * args.seconds, 2))
    options = GenerateArgs(
        prompt=first, at=tuple(zip(times, later, strict=True)), model=args.model, seed=args.seed, seconds=args.seconds
    )
    target = Target.check(args.out, (spec.height_px, spec.width_px), scale=None, filter="lanczos")
    count = pipeline.frame_count(seconds=args.seconds)
    pipeline.check_length(count, bytes_per_pixel=target.bytes_per_pixel)
    session = start(pipeline, options, first, frames=count)
    announce(session, options)
    kept: list[tuple[int, NDArray[np.uint8]]] = []
    write_session(session, _sampled(session, count, kept), target)
    sheet = args.out.with_name(args.out.stem + "_sheet.png")
    _write_sheet(sheet, kept, session.fps)
    print(f"speed  {session.timing}")
    print(f"cache  {session.num_bytes / 2**20:.2f} MiB, the same for a stream of any length")
    print(f"video  {args.out}\nsheet  {sheet}")
    return 0


def _prompts(spec: ModelSpec) -> tuple[str, ...]:
    """Three prompts: the model's own examples where it has them."""
    return spec.examples[:3] if len(spec.examples) >= 3 else PROMPTS


def _sampled(session: Session, count: int, kept: list[tuple[int, NDArray[np.uint8]]]) -> Iterator[NDArray[np.uint8]]:
    """The chunks, with every so-many-th frame set aside for the sheet."""
    every, number = max(1, count // SHEET_TILES), 0
    for chunk in progress(session, count):
        for frame in chunk:
            if number % every == 0 and len(kept) < SHEET_TILES:
                kept.append((number, frame))
            number += 1
        yield chunk


def _write_sheet(path: Path, kept: list[tuple[int, NDArray[np.uint8]]], fps: float) -> None:
    import numpy as np

    from unspool.engine.export import contact_sheet, time_labels

    frames = np.stack([frame for _, frame in kept])
    scale = -(-128 // frames.shape[2])
    contact_sheet(frames, scale=scale, labels=time_labels([number for number, _ in kept], fps)).save(path)
