"""`unspool data preview`: see the clips that a model learns from; `unspool data validate`: see what the scorer sees."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from unspool.data.worlds.stage import Scene


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """Write a sheet (or a film) of clips of the Sprite Stage with their captions.

    The stage draws its clips on demand: shaded sprites that bounce, drift, rise, orbit or rest under a sky, and events
    half-way (another colour, shape, motion or sky; a sprite comes or goes) with a caption from that moment on. Clip i
    of a split is always the same clip. `train` and `dev`, `test` are alike; `heldout` shows compositions that training
    never does.

    Try `unspool data preview --split heldout --sprites 2 --events 1 -o heldout.png`, and
    `unspool data preview --clips 12 -o wall.mp4` for a film.
    """

    split: Literal["train", "dev", "test", "heldout"] = "train"
    """Which split."""
    clips: int = 8
    """How many clips."""
    first: int = 0
    """Number of the first clip in its split."""
    sprites: int | None = None
    """Sprites at the beginning of each clip, 1 to 3; drawn at random if not given."""
    events: int | None = None
    """Events in each clip, 0 to 2; drawn at random if not given."""
    size: int = 64
    """Height and width of a frame in pixels; the same scene at any size."""
    seconds: float = 5.0
    """Length of each clip. Beyond 5 s the events are spread over all of it, so the clips are other ones."""
    fps: float = 16.0
    """Frames per second; the same motion at any rate."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out/stage.png")
    """File to write: .png is a sheet, .mp4, .gif and .webp a film of all clips beside each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validate:
    """Print the validation table of the scorer: true clips, spoilt in known ways, each of which must move its score.

    Read every result of a model beside it: "truth" is the ceiling, "wrong prompt" is chance, and "frozen" and
    "shuffled" are what motion scores without motion. Takes about 5 ms per frame and row.

    Try `unspool data validate --clips 4 --sprites 1`, and `--clips 64 --sprites 1 2 3 --json out/scorer.json`.
    """

    clips: int = 16
    """Clips per row."""
    sprites: tuple[int, ...] = (1, 2)
    """One table for each number of sprites."""
    events: int = 0
    """Events in each clip; the rows frozen, shuffled and reversed mean little with events."""
    size: int = 64
    """Height and width of a frame in pixels."""
    fps: float = 16.0
    """Frames per second; clips last 5 s."""
    split: Literal["train", "dev", "test", "heldout"] = "test"
    """Which split."""
    json: Path | None = None
    """File to write the numbers to."""


@tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """The worlds that models learn from: look at their clips, and check what measures a model's clips."""

    action: Annotated[
        Annotated[Preview, tyro.conf.subcommand("preview")] | Annotated[Validate, tyro.conf.subcommand("validate")],
        tyro.conf.arg(name=""),
    ]


def run(args: Args) -> int:
    return _preview(args.action) if isinstance(args.action, Preview) else _validate(args.action)


def _preview(args: Preview) -> int:
    from unspool.data.worlds.preview import film, sheet
    from unspool.engine.export import check_target, write_video

    frames = _checked(args.clips, args.size, args.fps, args.seconds)
    if args.out.suffix.lower() not in (".png", ".mp4", ".gif", ".webp"):
        raise ValueError(f"--out {args.out}: expected .png for a sheet, .mp4, .gif or .webp for a film")
    if args.out.parent != Path("."):
        args.out.parent.mkdir(parents=True, exist_ok=True)
    check_target(args.out)
    scenes = _scenes(args)
    titles = [f"{args.split} {args.first + k}" for k in range(len(scenes))]
    if args.out.suffix.lower() == ".png":
        page = sheet(scenes, titles, frames=frames, fps=args.fps, size_px=args.size)
        part = args.out.with_name(f".{args.out.name}.part")
        page.save(part, format="PNG")
        part.replace(args.out)
    else:
        moving = film(scenes, titles, frames=frames, fps=args.fps, size_px=args.size)
        write_video(args.out, moving, args.fps, metadata={"command": "data preview", "clips": titles})
    print(f"{len(scenes)} clips of {frames / args.fps:.1f} s: {args.out}")
    return 0


def _validate(args: Validate) -> int:
    from unspool.data.worlds.validation import as_table, validate

    _checked(args.clips, args.size, args.fps, 5.0)
    results = {}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.touch()
    for sprites in args.sprites:
        _check_sprites(sprites)
        results[sprites] = validate(
            args.clips, sprites=sprites, events=args.events, size_px=args.size, fps=args.fps, split=args.split,
            num_frames=_checked(args.clips, args.size, args.fps, 5.0),
        )  # fmt: skip
        print(f"{args.clips} clips with {sprites} sprite{'s' * (sprites > 1)}, {args.size} px at {args.fps:g} fps")
        print(as_table(results[sprites]) + "\n")
    if args.json is not None:
        settings = {key: value for key, value in dataclasses.asdict(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "rows": results}, indent=1) + "\n", encoding="utf-8")
        print(f"numbers: {args.json}")
    return 0


def _scenes(args: Preview) -> list[Scene]:
    from unspool.data.worlds.stage import Stage, StageConfig

    if args.sprites is not None:
        _check_sprites(args.sprites)
    if args.events is not None and not 0 <= args.events <= 2:
        raise ValueError(f"--events {args.events}: expected 0, 1 or 2")
    stage = Stage(StageConfig(seconds=args.seconds) if args.seconds > 5 else None)
    indices = range(args.first, args.first + args.clips)
    return [stage.scene(args.split, i, sprites=args.sprites, events=args.events) for i in indices]


def _check_sprites(sprites: int) -> None:
    if not 1 <= sprites <= 3:
        raise ValueError(f"--sprites {sprites}: expected 1, 2 or 3")


def _checked(clips: int, size: int, fps: float, seconds: float) -> int:
    """The number of frames, 1 + 4k."""
    for name, value, low, high in (
        ("--clips", clips, 1, 10_000), ("--size", size, 24, 1024), ("--fps", fps, 1, 120),
        ("--seconds", seconds, 0.5, 600),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"{name} {value}: expected {low} to {high}")
    return 1 + 4 * max(1, round(seconds * fps / 4))
