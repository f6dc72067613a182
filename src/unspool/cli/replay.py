"""`unspool replay`: make a video again from what its metadata says, and compare."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unspool.cli.generate import prepare, progress

if TYPE_CHECKING:
    from unspool.engine.pipeline import Pipeline
    from unspool.engine.record import Record

DIFFERENT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Make a video of `unspool generate` or `stream` again, and say whether its frames are the same.

    What is compared are the raw frames, by the hash in the metadata. The same weights on the same kind of device give
    the same frames. The exit code is 1 if they differ.
    """

    video: tyro.conf.Positional[Path]
    """A file that unspool wrote: .mp4, .gif, .webp, .png or .npy."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write it again; if not given it is only compared."""
    model: str | None = None
    """The model to use instead of the recorded one."""
    device: str = "auto"
    """auto (the kind recorded, if it is there), cpu, cuda, cuda:1."""


def run(args: Args) -> int:
    """Return 0 for the same frames, 1 for others."""
    from unspool.engine.record import FrameHash, read_record

    record = read_record(args.video)
    if args.out is not None:
        prepare(args.out)
    pipeline = _load(args, record)
    _print_warnings(pipeline, record)
    session = pipeline.session_of(record)
    digest = FrameHash()
    if args.out is None:
        for chunk in progress(session, record.num_frames):
            digest.add(chunk)
        found = digest.hexdigest()
    else:
        from unspool.engine.recording import Target, write_session

        size = (pipeline.spec.height_px, pipeline.spec.width_px)
        target = Target.check(args.out, size, scale=None, filter="lanczos")
        found = write_session(session, progress(session, record.num_frames), target).frames_sha256
        print(f"video  {args.out}")
    is_same = found == record.frames_sha256
    print(f"{'identical' if is_same else 'DIFFERENT'}: {record.num_frames} frames, sha256 {found[:16]}", end="")
    print("" if is_same else f", recorded {record.frames_sha256[:16]}")
    return 0 if is_same else DIFFERENT


def _load(args: Args, record: Record) -> Pipeline:
    from unspool.engine.load import find_device, load

    device = args.device
    if device == "auto" and record.device == "cpu":
        device = "cpu"
    return load(args.model or record.model, device=find_device(device), dtype=record.dtype)


def _print_warnings(pipeline: Pipeline, record: Record) -> None:
    import torch

    from unspool import __version__

    for name, got, expected in (
        ("weights", pipeline.weights, record.weights),
        ("device", pipeline.device.type, record.device),
        ("torch", torch.__version__, record.torch),
        ("unspool", __version__, record.unspool),
    ):
        if got != expected:
            print(f"unspool: other {name} than recorded: {got}, it was {expected}", file=sys.stderr)
