"""The Sprite Stage evaluation: every row of the table on the same prompts, noise and frames, raw uint8.

Reference rows need no model: the truth (ceiling of the scorer), the codec's copy of it (ceiling of the latents), a
frozen first frame and shuffled frames (what motion scores without motion), the truth under another prompt (chance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from unspool.config import to_dict
from unspool.data.stage import to_pixels
from unspool.data.worlds.stage import Stage
from unspool.engine.clock import Clock
from unspool.engine.decode import to_uint8
from unspool.engine.pipeline import Pipeline
from unspool.evaluate.frozen import measure_frozen_stream
from unspool.evaluate.measures import (
    Format,
    Frames,
    Measure,
    Values,
    measure_clip,
    measure_copy,
    measure_spoilt,
    measure_stream,
    measure_truth,
)
from unspool.evaluate.protocol import PARTS, Case, StageProtocol, batches, clip_cases, stream_cases, switch_cases
from unspool.evaluate.runner import Arm, ClipStore, Measures, Progress, Request, code_mark, mark, scorer_mark
from unspool.evaluate.sheet import Sample
from unspool.evaluate.spread import drawn_states, measure_states
from unspool.evaluate.switches import measure_switch
from unspool.log import notice_once
from unspool.rollout.state import weights_mark

TRUTH, CODEC, FROZEN, SHUFFLED, WRONG = "truth", "codec round trip", "frozen", "shuffled", "wrong prompt"
TEACHER, MANY, STUDENT, UNCONDITIONAL = "teacher", "many-step", "student", "student, empty prompt"
ORDER = (TRUTH, CODEC, FROZEN, SHUFFLED, WRONG, UNCONDITIONAL, TEACHER, MANY, STUDENT)
CODEC_BATCH = 4
"""Clips that the codec copies at once: a bound on memory, of no effect on speed."""


@dataclass
class Row:
    """Values of many clips: of which prompt (`clusters`), and how many sprites that has."""

    clusters: list[int] = field(default_factory=list)
    sprites: list[int] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)

    def add(self, cases: Sequence[Case], values: Sequence[Values]) -> None:
        for case, found in zip(cases, values, strict=True):
            self.clusters.append(case.index)
            self.sprites.append(case.sprites)
            self.values.append(found)


Rows = dict[str, Row]


@dataclass(frozen=True)
class Times:
    """Frames that an arm made in batches, and the seconds of work."""

    frames: int = 0
    seconds: float = 0.0


@dataclass
class Results:
    """Everything that was measured: `clips` by split and row, `switches` by kind of event and row, `streams` by row
    (names with the number of the segment), `spread` by row (states of sprites; several clips of each prompt)."""

    clips: dict[str, Rows] = field(default_factory=dict)
    switches: dict[str, Rows] = field(default_factory=dict)
    streams: Rows = field(default_factory=dict)
    spread: Rows = field(default_factory=dict)


class Evaluation:
    """One protocol on a model and, where given, its teacher and the many-step network between the two (clips and
    diversity). `folder` keeps clips and measurements; run again, it continues. Raises ValueError for models that do not
    fit each other or the protocol."""

    def __init__(
        self,
        config: StageProtocol,
        student: Arm,
        teacher: Arm | None = None,
        many: Arm | None = None,
        *,
        folder: Path,
        workers: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.student = config, student
        self.arms = [arm for arm in (teacher, many, student) if arm is not None]
        spec = student.pipeline.spec
        for arm in self.arms:
            self._check(arm)
        clock = self.clock
        count = clock.chunks_for(max(config.clips.frames, round(config.streams.seconds * spec.fps)))
        boundaries = tuple(clock.first_frame(chunk) for chunk in range(1, count + 1))
        self.form = Format(height=spec.height_px, width=spec.width_px, fps=spec.fps, boundaries=boundaries)
        self.store, self.measures = ClipStore(folder / "clips"), Measures(folder / "measures.jsonl", workers=workers)
        self.times: dict[str, Times] = {}
        self.progress = progress or Progress(quiet=True)
        plan = (clock.plan.lead, clock.plan.chunk)
        self._common = (scorer_mark(), to_dict(config.stage), spec.height_px, spec.width_px, spec.fps, plan)
        self._codec = spec.codec.sha256 or _codec_mark(student.pipeline)

    def _check(self, arm: Arm) -> None:
        """Refuse what would fail after an hour of work."""
        spec, other, frames = self.student.pipeline.spec, arm.pipeline.spec, self.config.clips.frames
        if (other.height_px, other.width_px, other.fps) != (spec.height_px, spec.width_px, spec.fps):
            raise ValueError(
                f"{other.name} makes {other.width_px}x{other.height_px} px at {other.fps:g}/s and {spec.name} "
                f"{spec.width_px}x{spec.height_px} px at {spec.fps:g}/s; expected two models of one format"
            )
        most = other.geometry.pixel_frames(other.clip)
        if not other.is_causal and frames > most:
            raise ValueError(
                f"clips.frames={frames}: {other.name} is bidirectional and makes at most {most} frames; set "
                f"clips.frames={most}"
            )
        other.geometry.latent_frames(frames)
        _ = arm.settings  # refuses steps or a guidance that the model cannot have

    @property
    def clock(self) -> Clock:
        """Chunks of the student's stream."""
        spec = self.student.pipeline.spec
        return Clock(geometry=spec.geometry, plan=self.student.settings.config().plan, fps=spec.fps)

    def run(self, parts: Sequence[str] = PARTS) -> Results:
        """Measure the named parts; switches and streams only where the model can stream."""
        results = Results()
        try:
            if "clips" in parts:
                clips = self.config.clips
                results.clips["test"] = self._clips("test", clips.prompts)
                if clips.held_out:
                    results.clips["heldout"] = self._clips("heldout", clips.held_out)
            if not self.student.pipeline.spec.is_causal:
                if set(parts) & {"switches", "streams"}:
                    notice_once("evaluate-bidirectional", "a bidirectional model: no changes of prompt, no streams")
            else:
                if "switches" in parts:
                    results.switches = self._switches()
                if "streams" in parts:
                    results.streams = self._streams()
            if "spread" in parts:
                results.spread = self._spread()
        finally:
            self.measures.close()
        return results

    # ---- clips under one prompt --------------------------------------------------------------------------------

    def _clips(self, split: Literal["test", "heldout"], count: int) -> Rows:
        config, frames = self.config.clips, self.config.clips.frames
        cases = clip_cases(self.config, split, count)
        others = {case.index: _other(case, cases) for case in cases}
        is_test = split == "test"
        empty = config.unconditional if is_test else 0
        rows: Rows = {}
        passes = 2 + 2 * is_test + config.seeds * len(self.arms)
        self.progress.start(f"{count} prompts ({split})", count * passes + min(empty, count))
        for batch in batches(cases, self.config.batch):
            jobs: list[Measure] = [
                partial(measure_truth, case.scene, others[case.index].scene.prompts, frames, self.form)
                for case in batch
            ]
            keys = [self._key("truth", case, others[case.index].caption, frames) for case in batch]
            self._measure(rows, TRUTH, batch, keys, jobs.copy)
            keys = [self._key("codec", case, self._codec, frames) for case in batch]
            self._measure(rows, CODEC, batch, keys, partial(self._copies, batch, frames))
            for name in (FROZEN, SHUFFLED) if is_test else ():
                jobs = [partial(measure_spoilt, name, case.index, case.scene, frames, self.form) for case in batch]
                self._measure(rows, name, batch, [self._key(name, case, frames) for case in batch], jobs.copy)
            for arm in self.arms:
                for seed in range(config.seeds):
                    self._generated(rows, arm.name, arm, batch, self._request(batch, frames, seed))
            blank = [case for case in batch if case.index < empty]
            if blank:
                request = self._request(blank, frames, 0, captions=[""] * len(blank))
                self._generated(rows, UNCONDITIONAL, self.student, blank, request)
        rows[WRONG] = _renamed(rows[TRUTH], "wrong.")
        return {name: rows[name] for name in ORDER if name in rows}

    def _request(
        self, batch: Sequence[Case], frames: int, seed: int, *, captions: Sequence[str] | None = None
    ) -> Request:
        texts = tuple(case.caption for case in batch) if captions is None else tuple(captions)
        samples = tuple(case.index for case in batch)
        return Request(prompts=texts, samples=samples, seed=self.config.seed + seed, frames=frames)

    def _generated(self, rows: Rows, name: str, arm: Arm, batch: Sequence[Case], request: Request) -> None:
        source = self.store.key(arm, request)
        keys = [self._key("clip", case, source, k) for k, case in enumerate(batch)]

        def jobs() -> list[Measure]:
            clips = self.store.clips(arm, request)
            return [
                partial(measure_clip, own, case.scene.prompts, self.form)
                for own, case in zip(clips, batch, strict=True)
            ]

        self._measure(rows, name, batch, keys, jobs)
        self._note_time(arm.name, arm, request)

    def _copies(self, batch: Sequence[Case], frames: int) -> list[Measure]:
        return [
            partial(measure_copy, copy, case.scene, self.form)
            for part in batches(list(batch), CODEC_BATCH)
            for case, copy in zip(part, round_trip(self.student.pipeline, self._truths(part, frames)), strict=True)
        ]

    def _truths(self, cases: Sequence[Case], frames: int) -> list[Frames]:
        return [self.form.render(case.scene, frames) for case in cases]

    def _measure(
        self, rows: Rows, name: str, batch: Sequence[Case], keys: Sequence[str], make: Callable[[], Sequence[Measure]]
    ) -> None:
        rows.setdefault(name, Row()).add(batch, self.measures.get(keys, make))
        self.progress.advance(len(batch), name)

    def _key(self, what: str, case: Case, *facts: object) -> str:
        return mark(what, repr(case.scene), case.index, *self._common, *facts)

    def samples(self, count: int, arm: Arm | None = None) -> list[Sample]:
        """The first `count` clips of an arm (None: the student) of the split "test", in order, with what was measured
        on them."""
        config, arm = self.config.clips, arm or self.student
        rows: Rows = {}
        found: list[Sample] = []
        self.progress.start(f"samples, {arm.name}", min(count, config.prompts))
        for batch in batches(clip_cases(self.config, "test", config.prompts), self.config.batch):
            request = self._request(batch, config.frames, 0)
            self._generated(rows, arm.name, arm, batch, request)
            for case, frames in zip(batch, self.store.clips(arm, request), strict=True):
                found.append(Sample(str(case.index), case.caption, frames, rows[arm.name].values[case.index]))
            if len(found) >= count:
                break
        return found[:count]

    # ---- changes of prompt, and long streams -------------------------------------------------------------------

    def _switches(self) -> dict[str, Rows]:
        config, clock = self.config.switches, self.clock
        start = clock.first_frame(config.before)
        frames = clock.first_frame(config.before + config.after)
        at_s, follow_s = start / clock.fps, (frames - start) / clock.fps
        for wait in waits(self.config, clock):  # the measurement rests on this
            if clock.chunk_at(at_s - wait) != config.before:
                raise ValueError(
                    f"switches.before={config.before}: a prompt given at {at_s - wait:g} s does not wait for that "
                    "chunk; set switches.before higher"
                )
        self.progress.start("prompt switches", 2 * config.per_kind * len(config.kinds))
        out: dict[str, Rows] = {}
        for kind in config.kinds:
            rows = out.setdefault(kind, {})
            for batch in batches(switch_cases(self.config, kind, follow_s), self.config.batch):
                keys = [self._key("switch", case, frames - start) for case in batch]
                jobs: list[Measure] = [
                    partial(measure_switch, None, case.scene, 0.0, frames - start, self.form) for case in batch
                ]
                self._measure(rows, TRUTH, batch, keys, jobs.copy)
                self._switched(rows, batch, at_s, frames)
        return out

    def _switched(self, rows: Rows, batch: Sequence[Case], at_s: float, frames: int) -> None:
        later = tuple(case.scene.prompts[1].caption.text for case in batch)
        request = Request(
            prompts=tuple(case.caption for case in batch), samples=tuple(case.index for case in batch),
            seed=self.config.seed, frames=frames, switches=((at_s, later),),
        )  # fmt: skip
        source = self.store.key(self.student, request)

        def jobs() -> list[Measure]:
            clips = self.store.clips(self.student, request)
            return [
                partial(measure_switch, own, case.scene, at_s, frames, self.form)
                for own, case in zip(clips, batch, strict=True)
            ]

        keys = [self._key("switched", case, source, k) for k, case in enumerate(batch)]
        self._measure(rows, STUDENT, batch, keys, jobs)
        self._note_time(STUDENT, self.student, request)

    def _streams(self) -> Rows:
        config, fps = self.config.streams, self.form.fps
        segment = round(config.segment_s * fps)
        frames = round(config.seconds * fps) // segment * segment
        cases = stream_cases(self.config, frames / fps)
        self.progress.start(f"streams of {frames / fps:g} s", 3 * len(cases))
        rows: Rows = {}
        for batch in batches(cases, self.config.batch):
            keys = [self._key("stream truth", case, segment, frames) for case in batch]
            jobs: list[Measure] = [
                partial(measure_stream, None, case.scene, segment, frames, self.form) for case in batch
            ]
            self._measure(rows, TRUTH, batch, keys, jobs.copy)
            keys = [self._key("stream frozen", case, segment, frames, code_mark("frozen")) for case in batch]
            jobs = [partial(measure_frozen_stream, case.scene, segment, frames, self.form) for case in batch]
            self._measure(rows, FROZEN, batch, keys, jobs.copy)
            self._streamed(rows, batch, segment, frames)
        return rows

    def _streamed(self, rows: Rows, batch: Sequence[Case], segment: int, frames: int) -> None:
        request = self._request(batch, frames, 0)
        source = self.store.key(self.student, request)

        def jobs() -> list[Measure]:
            clips = self.store.clips(self.student, request)
            return [
                partial(measure_stream, own, case.scene, segment, frames, self.form)
                for own, case in zip(clips, batch, strict=True)
            ]

        keys = [self._key("stream", case, source, k, segment) for k, case in enumerate(batch)]
        self._measure(rows, STUDENT, batch, keys, jobs)
        self._note_time(STUDENT, self.student, request)

    # ---- diversity ---------------------------------------------------------------------------------------------

    def _spread(self) -> Rows:
        config, stage = self.config.spread, Stage(self.config.stage)
        cases = clip_cases(self.config, "test", config.prompts)
        self.progress.start("diversity", len(cases) * config.seeds * len(self.arms))
        rows: Rows = {TRUTH: Row()}
        for case in cases:
            rows[TRUTH].add([case] * config.truths, drawn_states(stage, case.scene, config.truths))
        for batch in batches(cases, self.config.batch):
            for arm in self.arms:
                for seed in range(config.seeds):
                    request = self._request(batch, config.frames, seed)
                    source = self.store.key(arm, request)
                    keys = [self._key("states", case, source, k, code_mark("spread")) for k, case in enumerate(batch)]
                    self._measure(rows, arm.name, batch, keys, partial(self._states, arm, request, batch))
                    self._note_time(arm.name, arm, request)
        return rows

    def _states(self, arm: Arm, request: Request, batch: Sequence[Case]) -> list[Measure]:
        clips = self.store.clips(arm, request)
        return [partial(measure_states, own, case.scene, self.form) for own, case in zip(clips, batch, strict=True)]

    def _note_time(self, name: str, arm: Arm, request: Request) -> None:
        """Add what a batch took to the times of `name`."""
        seconds = self.store.seconds(arm, request)
        if seconds == seconds:  # the clips may have been deleted after they were measured
            have = self.times.setdefault(name, Times())
            self.times[name] = Times(have.frames + request.frames * len(request.prompts), have.seconds + seconds)


def waits(config: StageProtocol, clock: Clock) -> list[float]:
    """Seconds between the moment a prompt is given and the chunk at which it takes effect, for every phase."""
    chunk_s = clock.plan.chunk * clock.geometry.temporal / clock.fps
    return [chunk_s * phase / config.switches.phases for phase in range(config.switches.phases)]


@torch.no_grad()
def round_trip(pipeline: Pipeline, clips: Sequence[Frames]) -> list[Frames]:
    """Clips of one length through the codec and back."""
    weight = next(iter(pipeline.transformer.parameters()))
    parameters = getattr(pipeline.codec, "parameters", None)
    like = next(iter(parameters()), weight) if parameters is not None else weight
    pixels = torch.stack([to_pixels(clip) for clip in clips]).to(like.device, like.dtype)
    return list(to_uint8(pipeline.codec.decode(pipeline.codec.encode(pixels))))


def _codec_mark(pipeline: Pipeline) -> str:
    codec = pipeline.codec
    return weights_mark(codec) if isinstance(codec, torch.nn.Module) else type(codec).__name__  # type: ignore[arg-type]


def _other(case: Case, cases: Sequence[Case]) -> Case:
    """The next case with as many sprites, else the next one at all."""
    place = next(k for k, other in enumerate(cases) if other is case)
    after = [*cases[place + 1 :], *cases[:place]]
    return next((other for other in after if other.sprites == case.sprites), after[0])


def _renamed(row: Row, prefix: str) -> Row:
    """The values of a row whose names begin with `prefix`, without it."""
    values = [{n.removeprefix(prefix): v for n, v in own.items() if n.startswith(prefix)} for own in row.values]
    return Row(list(row.clusters), list(row.sprites), values)
