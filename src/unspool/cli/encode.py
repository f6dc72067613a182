"""`unspool encode`: a folder of videos, or any other source of pixels, through a codec into shards of latents."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from unspool.data.batch import Source

_TELL_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Encode clips to latents once, so that training need not decode and encode them in every epoch.

    Every shard appears whole or not at all; the same command again continues an interrupted one. Files that cannot be
    used are left out and reported at the end.
    """

    source: tyro.conf.Positional[str]
    """Folder of videos with captions, metadata file, source name, or module:Class of your own."""
    settings: tyro.conf.Positional[tuple[str, ...]] = ()
    """Settings of the source as key=value, such as fps=16 num_frames=81 height_px=64 width_px=64 mode=slide."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write; an existing data set of the same settings is continued."""
    codec: str
    """Codec file (.safetensors), "identity" (latents are pixels), or module:Class."""
    text: str | None = None
    """Text encoder file or module:Class whose states are stored, too; captions always are."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number type of what is stored."""
    bf16: bool = False
    """Run the codec in bf16 where it loses little by it: two to four times as fast on a CPU with bf16 products."""
    batch: int = 4
    """Clips encoded together."""
    workers: int = 2
    """Threads that decode; 0: none."""
    limit: int | None = None
    """Clips to encode at most; needed where the source has no end."""
    fps: float | None = None
    """Frame rate of the clips, where the source does not say it."""
    device: str | None = None
    """Where to encode: cpu, cuda, cuda:1; by default cuda where there is one."""


def run(args: Args) -> int:
    """Encode, print a summary and what was left out, return 0; errors in the input come before anything is written."""
    import torch

    from unspool.data.encoding import CODECS, TEXT_ENCODERS, encode_source, load_file_or_name
    from unspool.weights.report import parse_dtype

    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out}: got a file; expected a folder to write into")
    codec = load_file_or_name(args.codec, CODECS)
    text = load_file_or_name(args.text, TEXT_ENCODERS) if args.text else None
    source = _source(args)
    fps = args.fps or getattr(source, "fps", None)
    if fps is None:
        raise ValueError(f"{args.source}: the source does not say its frame rate; give --fps")
    began = time.perf_counter()
    with _progress() as progress:
        encoded = encode_source(
            source,
            codec,
            args.out,
            fps=fps,
            dtype=str(parse_dtype(args.dtype)).removeprefix("torch."),
            text=text,
            limit=args.limit,
            batch=args.batch,
            workers=args.workers,
            bf16=args.bf16,
            device=_device(args.device, torch.cuda.is_available()),
            progress=progress,
        )
    header, seconds = encoded.header, time.perf_counter() - began
    shards = sorted(args.out.glob("shard-*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    shape = " x ".join(map(str, header.latent_shape))
    print(f"source      {args.source}{_captions_from(source)}")
    print(f"clips       {encoded.num_clips} ({encoded.num_new} new, in {seconds:.1f} s)")
    print(f"pixels      {header.num_frames} frames at {header.fps:g} fps, {header.height_px} x {header.width_px} px")
    print(f"latents     {shape} in {header.dtype}, {header.frames_rule} frames, codec {header.codec} {_hash(header)}")
    print(f"wrote       {args.out} ({len(shards)} shards, {size} bytes)")
    report = getattr(source, "report", None)
    if report:
        print(f"left out    {report.summary(most=20)}")
    return 0


def _source(args: Args) -> Source:
    from unspool.data import SOURCES
    from unspool.data.build import build_source

    path = Path(args.source).expanduser()
    if path.exists():
        return build_source("videos", (*args.settings, f"path={path}"))
    if args.source not in SOURCES and ":" not in args.source:
        raise FileNotFoundError(
            f"{args.source}: no such folder; expected one with videos, module:Class, or one of {', '.join(SOURCES)}"
        )
    return build_source(args.source, args.settings)


def _device(name: str | None, has_cuda: bool) -> str:
    import torch

    chosen = name or ("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(chosen)
    except RuntimeError:
        raise ValueError(f"got --device {chosen!r}; expected cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not has_cuda:
        raise ValueError(f"got --device {chosen!r}, but torch finds no CUDA device; try --device cpu")
    return chosen


def _captions_from(source: Source) -> str:
    found = getattr(source, "captions_from", None)
    return f": {found}" if found else ""


def _hash(header: object) -> str:
    digest = getattr(header, "codec_sha256", None)
    return f"sha256 {digest[:12]}" if digest else "(no weights)"


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every ten seconds elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("encode", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress for logs."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._last >= _TELL_EVERY_S:
            self._last = now
            print(f"unspool: encoded {done} of {total} clips", file=sys.stderr)
