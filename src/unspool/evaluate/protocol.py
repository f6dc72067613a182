"""What is measured on the Sprite Stage, as plain data: which prompts, how many frames, which changes of prompt.

Everything follows from the protocol and from (split, number), so two models that are run under one protocol meet the
same prompts and the same noise, and a smaller preset is the beginning of a larger one. Streams of another length are
other scenes: sprites that shall not collide are placed by where they will be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from unspool.config import apply_overrides, nearest
from unspool.data.worlds.motion import MOTIONS
from unspool.data.worlds.splits import Split
from unspool.data.worlds.stage import EVENTS, Scene, Stage, StageConfig
from unspool.evaluate.switches import wanted

PARTS = ("clips", "switches", "streams", "spread")


@dataclass(frozen=True, kw_only=True)
class ClipProtocol:
    """Clips under one prompt. Fields: `prompts` of the split "test", `held_out` of the split "heldout" (compositions
    that training never shows); `sprites` weights of 1, 2 and 3 sprites; `frames` 1 + 4k; `seeds` clips per prompt;
    `unconditional` clips of the student under the empty prompt, scored against real ones."""

    prompts: int = 256
    held_out: int = 128
    sprites: tuple[float, ...] = (0.375, 0.375, 0.25)
    frames: int = 81
    seeds: int = 1
    unconditional: int = 32

    def __post_init__(self) -> None:
        if self.prompts < 2 or self.held_out < 0 or self.held_out == 1 or self.seeds < 1 or self.unconditional < 0:
            raise ValueError(
                f"clips: prompts={self.prompts}, held_out={self.held_out}, seeds={self.seeds}, unconditional="
                f"{self.unconditional}: expected at least 2 prompts (held_out also 0), 1 seed, and no negative number"
            )
        if self.frames < 9 or self.frames % 4 != 1:
            raise ValueError(f"clips.frames={self.frames}: expected 1 + 4k and at least 9, such as 81")
        if not 1 <= len(self.sprites) <= 3 or min(self.sprites) < 0 or sum(self.sprites) <= 0:
            raise ValueError(f"clips.sprites={self.sprites}: expected up to 3 weights, not all zero")


@dataclass(frozen=True, kw_only=True)
class SwitchProtocol:
    """One change of prompt in a stream. Fields: `per_kind` prompts of each of `kinds` of event; `before`, `after`
    chunks; `phases` times within a chunk at which the new prompt is given; `scan` scenes of a kind that are looked
    through for ones in which it happens early enough; `split`: "dev" where something is chosen by what comes out."""

    per_kind: int = 16
    kinds: tuple[str, ...] = EVENTS
    before: int = 3
    after: int = 4
    phases: int = 8
    scan: int = 4000
    split: Split = "test"

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in EVENTS]
        if unknown or not self.kinds:
            raise ValueError(f"switches.kinds={self.kinds}: expected some of {', '.join(EVENTS)}")
        if min(self.per_kind, self.after, self.phases, self.scan) < 1 or self.before < 2:
            raise ValueError(
                f"switches: per_kind={self.per_kind}, before={self.before}, after={self.after}, phases={self.phases}, "
                f"scan={self.scan}: expected at least 1 of each, and 2 chunks before (the first one is short)"
            )


@dataclass(frozen=True, kw_only=True)
class StreamProtocol:
    """Long streams under one prompt, scored in segments of `segment_s` seconds. 50 s are 10 clips of 81 frames.

    `motions` that are asked for, of those of the stage (none in common: all of these). By default those without an end:
    what drifts or rises comes to rest at the border, and a stream of resting sprites may freeze unnoticed. `split`:
    "dev" where something is chosen by what comes out.
    """

    prompts: int = 16
    seconds: float = 50.0
    segment_s: float = 5.0
    motions: tuple[str, ...] = ("bounces", "orbits")
    split: Split = "test"

    def __post_init__(self) -> None:
        if self.prompts < 1 or not 1.0 <= self.segment_s <= self.seconds <= 3600:
            raise ValueError(
                f"streams: prompts={self.prompts}, seconds={self.seconds}, segment_s={self.segment_s}: expected at "
                "least 1 prompt, segments of at least 1 s, and at most an hour"
            )
        unknown = [motion for motion in self.motions if motion not in MOTIONS]
        if unknown or not self.motions:
            raise ValueError(f"streams.motions={self.motions}: expected some of {', '.join(MOTIONS)}")


@dataclass(frozen=True, kw_only=True)
class SpreadProtocol:
    """Diversity: `seeds` clips of `frames` frames for each of `prompts` prompts of the split "test", and as many
    arrangements of the truth as `truths`."""

    prompts: int = 16
    seeds: int = 6
    frames: int = 33
    truths: int = 32

    def __post_init__(self) -> None:
        if self.prompts < 2 or min(self.seeds, self.truths) < 3:
            raise ValueError(
                f"spread: prompts={self.prompts}, seeds={self.seeds}, truths={self.truths}: expected at least 2 "
                "prompts, and 3 clips of each"
            )
        if self.frames < 25 or self.frames % 4 != 1:
            raise ValueError(f"spread.frames={self.frames}: expected 1 + 4k and at least 25, such as 33")


@dataclass(frozen=True, kw_only=True)
class StageProtocol:
    """One evaluation of a model of the Sprite Stage. `stage`: the stage on which it was trained; `seed` of the noise;
    `batch` clips generated at once (part of the protocol: another batch rounds differently)."""

    clips: ClipProtocol = field(default_factory=ClipProtocol)
    switches: SwitchProtocol = field(default_factory=SwitchProtocol)
    streams: StreamProtocol = field(default_factory=StreamProtocol)
    spread: SpreadProtocol = field(default_factory=SpreadProtocol)
    stage: StageConfig = field(default_factory=StageConfig)
    seed: int = 0
    batch: int = 16
    resamples: int = 2000

    def __post_init__(self) -> None:
        if self.batch < 1 or self.resamples < 100:
            raise ValueError(f"batch={self.batch}, resamples={self.resamples}: expected at least 1 and 100")


PRESETS: dict[str, StageProtocol] = {
    "smoke": StageProtocol(
        clips=ClipProtocol(prompts=8, held_out=4, frames=33, unconditional=2),
        switches=SwitchProtocol(per_kind=1, before=2, after=3),
        streams=StreamProtocol(prompts=2, seconds=6.0, segment_s=2.0),
        spread=SpreadProtocol(prompts=2, seeds=3, frames=25),
        batch=8,
    ),
    "standard": StageProtocol(),
    "full": StageProtocol(
        clips=ClipProtocol(held_out=256, seeds=4, unconditional=256),
        switches=SwitchProtocol(per_kind=64),
        streams=StreamProtocol(prompts=64, seconds=250.0),
        spread=SpreadProtocol(prompts=64, seeds=8),
        batch=64,
    ),
}
"""smoke: does it run; standard: the numbers of a model card; full: for a GPU."""


def protocol(preset: str, overrides: tuple[str, ...] = ()) -> StageProtocol:
    """A preset with a.b=c changes. Raises ValueError for an unknown preset, key or value."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: {nearest(preset, PRESETS)}")
    return apply_overrides(PRESETS[preset], overrides)


@dataclass(frozen=True)
class Case:
    """One prompt of the evaluation: `index` within its part, which is also its sample of the noise."""

    index: int
    sprites: int
    scene: Scene

    @property
    def caption(self) -> str:
        return self.scene.prompts[0].caption.text


def clip_cases(config: StageProtocol, split: Split, count: int) -> list[Case]:
    """`count` scenes without events; of each number of sprites as many as its weight says, spread evenly."""
    stage = Stage(config.stage)
    return [
        Case(k, sprites, stage.scene(split, nth, sprites=sprites, events=0))
        for k, (sprites, nth) in enumerate(_spread(config.clips.sprites, count))
    ]


def stream_cases(config: StageProtocol, seconds: float) -> list[Case]:
    """Scenes of `seconds` seconds without events, whose sprites move as `config.streams` says."""
    motions = tuple(m for m in config.stage.motions if m in config.streams.motions) or config.stage.motions
    stage = Stage(replace(config.stage, motions=motions, seconds=max(seconds, config.stage.seconds)))
    return [
        Case(k, sprites, stage.scene(config.streams.split, nth, sprites=sprites, events=0))
        for k, (sprites, nth) in enumerate(_spread(config.clips.sprites, config.streams.prompts))
    ]


def switch_cases(config: StageProtocol, kind: str, follow_s: float) -> list[Case]:
    """Scenes with exactly one event, of `kind`, whose new caption says what changed and that go on for `follow_s`
    seconds after it. Raises ValueError where the stage has too few of them."""
    seconds = max(config.stage.seconds, 2.0 + follow_s)
    stage = Stage(replace(config.stage, event_kinds=(kind,), seconds=seconds))
    found: list[Case] = []
    for index in range(config.switches.scan):
        scene = stage.scene(config.switches.split, index, events=1)
        is_one = [event.kind for event in scene.events] == [kind] and len(scene.prompts) == 2
        if is_one and scene.events[0].time + follow_s <= seconds and wanted(scene).says_something:
            found.append(Case(len(found), len(scene.looks(0.0)), scene))
            if len(found) == config.switches.per_kind:
                return found
    raise ValueError(
        f"switches: {len(found)} of {config.switches.scan} scenes hold one event {kind!r}, expected "
        f"{config.switches.per_kind}; lower switches.per_kind, raise switches.scan, or leave the kind out"
    )


def batches(cases: list[Case], size: int) -> Iterator[list[Case]]:
    """The cases in order, `size` at a time."""
    for first in range(0, len(cases), size):
        yield cases[first : first + size]


def _spread(weights: tuple[float, ...], count: int) -> list[tuple[int, int]]:
    """`count` pairs (number of sprites, how many of that number came before); any beginning has the right shares."""
    total, made, out = sum(weights), [0] * len(weights), []
    for k in range(count):
        owed = [weight / total * (k + 1) - have for weight, have in zip(weights, made, strict=True)]
        which = owed.index(max(owed))
        out.append((which + 1, made[which]))
        made[which] += 1
    return out
