"""`unspool generate`: a prompt, or several after each other, to a video file."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unspool.engine.pipeline import Pipeline
    from unspool.engine.record import Record
    from unspool.engine.session import Session

DEFAULT_FOLDER = Path("out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamArgs:
    """What `generate` and `stream` have in common."""

    at: tyro.conf.UseAppendAction[tuple[tuple[float, str], ...]] = ()
    """From this second on another prompt: --at 4 "a blue star drifts left at night". It takes effect at the first chunk
    that begins then or later, which is printed."""
    model: str = "stage"
    """A model that is shipped (see unspool models), a model folder, or a hub repository (owner/name)."""
    seed: int = 0
    """Of the noise: the same seed, prompt and settings give the same frames."""
    steps: int | None = None
    """Denoising steps per chunk; the model's own if not given."""
    guidance: float | None = None
    """Strength of guidance: uncond + scale * (cond - uncond), 1 is none; the model's own if not given."""
    window: int | Literal["full"] | None = None
    """Latent frames that a chunk reads, itself and the sink included; the model's own if not given."""
    sink: int | None = None
    """First latent frames that are always kept; the model's own if not given."""
    switch: Literal["keep", "recache", "recache_bidirectional", "flush"] | None = None
    """What happens to the cached past when the prompt changes; the model's own if not given."""
    transition: Literal["cut", "smooth"] | float = "cut"
    """How one prompt passes into the next: at once, smoothly, or within that many seconds."""
    negative: str = ""
    """What guidance leads away from."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number type; float32 on a CPU and the files' own elsewhere if not given."""
    compile: bool = False
    """Fuse small kernels first: slower to start, faster to run."""
    scale: int | None = None
    """Enlarge mp4, gif and webp that many times; to about 256 px if not given. Frames in .npy are never enlarged."""
    filter: Literal["lanczos", "nearest"] = "lanczos"
    """How they are enlarged: smoothly, or by repeating pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(StreamArgs):
    """Make a video of a prompt, or of several that take over while it runs.

    The file carries prompts, seed, settings and the weights' hash, so that `unspool replay` can make it again.

    Try `unspool generate "a red ball bounces at sunset" -o out.mp4 --seconds 10 --at 4 "a blue star drifts left at
    night"`.
    """

    prompt: tyro.conf.Positional[str]
    """What the video shows. An empty one leaves it to the model."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = DEFAULT_FOLDER / "video.mp4"
    """File to write: .mp4, .gif, .webp, .png (a sheet of frames) or .npy (the raw frames)."""
    seconds: float | None = None
    """Length of the video; the model's usual one if not given."""
    json: bool = False
    """Print one line of JSON on stdout instead of a summary."""


def run(args: Args) -> int:
    """Generate, write, report; every refusal comes before the first frame is made."""
    check_times(args.seconds, args.at)
    prepare(args.out)
    pipeline = load_model(args)

    from unspool.engine.recording import Target, write_session

    spec = pipeline.spec
    target = Target.check(args.out, (spec.height_px, spec.width_px), scale=args.scale, filter=args.filter)
    count = pipeline.frame_count(seconds=args.seconds)
    pipeline.check_length(count, bytes_per_pixel=target.bytes_per_pixel)
    session = start(pipeline, args, args.prompt, frames=count)
    announce(session, args, to_stderr=args.json)
    record = write_session(session, progress(session, count), target)
    if args.json:
        print(json.dumps(summary(session, record, args)))
    else:
        print(f"speed  {session.timing}")
        print(f"video  {args.out} ({record.num_frames / record.fps:g} s, sha256 {record.frames_sha256[:16]})")
    return 0


def check_times(seconds: float | None, at: tuple[tuple[float, str], ...]) -> None:
    """Refuse impossible times before anything slow is imported."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"--seconds {seconds:g}: expected a length above 0, such as --seconds 10")
    for time_s, _ in at:
        if not 0 <= time_s < math.inf:
            raise ValueError(f"--at {time_s:g}: expected the second from which on the prompt holds, at least 0")


def prepare(out: Path) -> None:
    """Refuse a target that cannot be written before anything slow is imported; the default folder is made."""
    from unspool.engine.export import check_target

    if out.parent == DEFAULT_FOLDER:
        out.parent.mkdir(exist_ok=True)
    check_target(out)


def load_model(args: StreamArgs) -> Pipeline:
    from unspool.engine.load import load

    return load(args.model, device=args.device, dtype=args.dtype, compile=args.compile)


def start(
    pipeline: Pipeline,
    args: StreamArgs,
    prompt: str,
    *,
    frames: int | None = None,
    stop: threading.Event | None = None,
) -> Session:
    """The session that the options describe."""
    return pipeline.session(
        prompt,
        seed=args.seed,
        switches=args.at,
        transition=args.transition,
        steps=args.steps,
        guidance=args.guidance,
        window=args.window,
        sink=args.sink,
        switch_policy=args.switch,
        negative=args.negative,
        frames=frames,
        cancel=None if stop is None else stop.is_set,
    )


def announce(session: Session, args: StreamArgs, *, to_stderr: bool = False) -> None:
    """Say what is made of what, and when each prompt takes over."""
    out = sys.stderr if to_stderr else sys.stdout
    spec = session.pipeline.spec
    where = f"{session.pipeline.device} {str(session.pipeline.dtype).removeprefix('torch.')}"
    print(f"model  {spec.name} {spec.width_px}x{spec.height_px} px, {spec.fps:g} frames/s, on {where}", file=out)
    if session.notes and spec.vocabulary:
        print(f"words  {spec.vocabulary}", file=out)
    clock = session.stream.clock
    for at, prompt in args.at:
        chunk = clock.chunk_at(at)
        print(
            f"switch asked for {at:g} s, takes effect at {clock.seconds(chunk):g} s (chunk {chunk}): {prompt}", file=out
        )


def progress(session: Session, count: int) -> Iterator[NDArray[np.uint8]]:
    """The frames of a session with a line about them on stderr, rewritten in place on a terminal."""
    began, done = time.perf_counter(), 0
    is_live = sys.stderr.isatty()
    for chunk in session.frames(count):
        done += len(chunk)
        if is_live:
            rate = done / (time.perf_counter() - began)
            left = (count - done) / rate
            line = f"\r{done}/{count} frames  {rate:.1f} frames/s  {left:.0f} s left \x1b[K"
            print(line, end="" if done < count else "\n", file=sys.stderr, flush=True)
        yield chunk


def summary(session: Session, record: Record, args: Args) -> dict[str, Any]:
    """What `--json` prints; times as `unspool.engine.timing` defines them."""
    timing = session.timing.to_dict()
    return {
        "path": str(args.out),
        "frames": record.num_frames,
        "seconds": record.num_frames / record.fps,
        "chunks": timing["chunks"],
        "fps": timing["fps"],
        "fps_overall": round(record.num_frames / float(timing["work_s"] or 1e-9), 3),
        "first_frame_ms": timing["first_frame_ms"],
        "chunk_ms": {name: timing[f"chunk_ms_{name}"] for name in ("p50", "p95", "max")},
        "realtime": timing["realtime"],
        "hash": record.frames_sha256,
        "model": record.name,
        "weights": record.weights,
        "seed": record.seed,
        "switches": [
            {"asked_s": at, "at_s": session.stream.clock.seconds(session.stream.clock.chunk_at(at)), "prompt": prompt}
            for at, prompt in args.at
        ],
        "notes": session.notes,
    }
