"""What `load` returns: a network, its codec and its text encoder, from prompts to frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unspool.engine.clock import Clock
from unspool.engine.model_folder import ModelSpec
from unspool.engine.origin import weights_of
from unspool.engine.record import Event, FrameHash, Record
from unspool.engine.session import Session, Transition
from unspool.engine.settings import RolloutSettings, SwitchPolicy, Window, plain
from unspool.engine.stream import Stream
from unspool.engine.video import Video
from unspool.engine.wording import TextEncoder, Wording
from unspool.models.base import Backbone, Codec

MAX_SECONDS = 3600.0
MAX_BYTES = 8 * 2**30
"""What one clip may take: an hour, and this much memory for its frames. Streams have no limit."""

Switches = Sequence[tuple[float, str]]
"""(seconds, prompt) pairs: each prompt takes over at the first chunk that starts at or after its time."""


class Pipeline:
    """One model ready to use; `unspool.load` makes it. Any number of sessions may share it, one thread at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        transformer: Backbone,
        codec: Codec[Any],
        text: TextEncoder,
        source: str,
        is_compiled: bool = False,
    ) -> None:
        self.spec, self.source, self.is_compiled = spec, source, is_compiled
        self.transformer, self.codec = transformer, codec
        self.wording = Wording(text)

    @property
    def weights(self) -> str:
        """What tells these weights from others: of the files, or of the networks where they differ from their files."""
        return weights_of(self.spec, transformer=self.transformer, codec=self.codec, text=self.wording.encoder)

    def with_settings(self, rollout: RolloutSettings) -> Pipeline:
        """The same networks rolled out in another way: `pipe.with_settings(replace(pipe.spec.rollout, sink=0))`.

        Raises ValueError for settings that do not fit together.
        """
        rollout.config()
        return Pipeline(
            replace(self.spec, rollout=rollout), transformer=self.transformer, codec=self.codec,
            text=self.wording.encoder, source=self.source, is_compiled=self.is_compiled,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return next(iter(self.transformer.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return next(iter(self.transformer.parameters())).dtype

    # ---- what callers use --------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        frames: int | None = None,
        chunks: int | None = None,
        seed: int = 0,
        sample: int = 0,
        switches: Switches = (),
        transition: Transition = "cut",
        steps: int | None = None,
        guidance: float | None = None,
        window: Window | None = None,
        sink: int | None = None,
        switch_policy: SwitchPolicy | None = None,
        negative: str = "",
        on_chunk: Callable[[Session], None] | None = None,
    ) -> Video:
        """A clip of a prompt, or of several that take over at their times.

        Its length is `seconds`, `frames` or `chunks` (none: the model's usual one). The same seed and sample give the
        same frames, and a longer clip begins with the shorter one. `steps`, `guidance`, `window`, `sink`,
        `switch_policy`: None takes the model's. `on_chunk` is called after every chunk.
        Raises ValueError for an impossible length, a switch outside the clip, or settings that do not fit.
        """
        count = self.frame_count(seconds=seconds, frames=frames, chunks=chunks)
        self.check_length(count, bytes_per_pixel=3)
        session = self.session(
            prompt, seed=seed, sample=sample, switches=switches, transition=transition, steps=steps, guidance=guidance,
            window=window, sink=sink, switch_policy=switch_policy, negative=negative, frames=count,
        )  # fmt: skip
        made = []
        for chunk in session.frames(count):
            made.append(chunk)
            if on_chunk is not None:
                on_chunk(session)
        return _video(np.concatenate(made), session)

    def generate_many(
        self,
        prompts: Sequence[str],
        *,
        seconds: float | None = None,
        frames: int | None = None,
        chunks: int | None = None,
        seed: int = 0,
        samples: Sequence[int] | None = None,
        switches: Sequence[tuple[float, Sequence[str]]] = (),
        steps: int | None = None,
        guidance: float | None = None,
        window: Window | None = None,
        sink: int | None = None,
        switch_policy: SwitchPolicy | None = None,
        negative: str = "",
    ) -> list[Video]:
        """The clips of several prompts in one batch, all switched at the same times, each to a prompt of its own.

        Clip j is `generate(prompts[j], seed=seed, sample=samples[j])` up to rounding (`samples`: 0, 1, 2...).
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: expected a list of prompts, got one text; use generate() for it")
        seed = plain(seed)
        samples = list(range(len(prompts))) if samples is None else [plain(sample) for sample in samples]
        if not prompts or len(samples) != len(prompts) or any(len(texts) != len(prompts) for _, texts in switches):
            raise ValueError(
                f"{len(prompts)} prompts, {len(samples)} samples, switches to "
                f"{[len(texts) for _, texts in switches]} prompts: expected at least one prompt, and as many of each"
            )
        count = self.frame_count(seconds=seconds, frames=frames, chunks=chunks)
        self.check_length(count, bytes_per_pixel=3 * len(prompts))
        settings = self.settings(steps=steps, guidance=guidance, window=window, sink=sink, switch_policy=switch_policy)
        whole = self._whole(count)
        stream = Stream(self, prompts, seed=seed, samples=samples, settings=settings, whole=whole, negative=negative)
        planned = self._planned(stream.clock, switches, settings, count)
        made = []
        while stream.clock.first_frame(stream.index) < count:
            if stream.index in planned:
                stream.switch([event.prompt for event in planned[stream.index]], planned[stream.index][0])
            made.append(stream.next_chunk())
        videos = []
        for j, own in enumerate(np.concatenate(made, axis=1)[:, :count]):
            events = tuple(texts[j] for _, texts in sorted(planned.items()))
            record = self.record(
                prompt=prompts[j], negative=negative, events=events, seed=seed, sample=samples[j], settings=settings,
                whole=whole, num_frames=count, frames_sha256=hash_of(own),
            )  # fmt: skip
            notes = [note for text in [prompts[j], *(e.prompt for e in events)] for note in self.wording.notes(text)]
            timing = stream.watch.timing()
            videos.append(Video(frames=own, fps=self.spec.fps, record=record, timing=timing, notes=tuple(notes)))
        return videos

    def _planned(
        self, clock: Clock, switches: Sequence[tuple[float, Sequence[str]]], settings: RolloutSettings, frames: int
    ) -> dict[int, list[Event]]:
        """By chunk, what each sample of a batch switches to there."""
        planned = {}
        for at, texts in switches:
            chunk = self._chunk_at(clock, at, frames)
            event = Event(
                chunk=chunk, seconds=clock.seconds(chunk), prompt="", policy=settings.switch_policy,
                sink=settings.sink_policy,
            )  # fmt: skip
            planned[chunk] = [replace(event, prompt=text) for text in texts]
        return planned

    def stream(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        seed: int = 0,
        switches: Switches = (),
        transition: Transition = "cut",
        steps: int | None = None,
        guidance: float | None = None,
        window: Window | None = None,
        sink: int | None = None,
        switch_policy: SwitchPolicy | None = None,
        negative: str = "",
    ) -> Iterator[NDArray[np.uint8]]:
        """Chunks of frames uint8 [f, h, w, 3] as they are made; without `seconds` for as long as they are asked for.

        The frames are those of `generate` with the same arguments; a `session` also takes new prompts on the way.
        """
        count = None if seconds is None else self.frame_count(seconds=seconds)
        session = self.session(
            prompt, seed=seed, switches=switches, transition=transition, steps=steps, guidance=guidance, window=window,
            sink=sink, switch_policy=switch_policy, negative=negative, frames=count,
        )  # fmt: skip
        return iter(session) if count is None else session.frames(count)

    def session(
        self,
        prompt: str,
        *,
        seed: int = 0,
        sample: int = 0,
        switches: Switches = (),
        transition: Transition = "cut",
        steps: int | None = None,
        guidance: float | None = None,
        window: Window | None = None,
        sink: int | None = None,
        switch_policy: SwitchPolicy | None = None,
        negative: str = "",
        frames: int | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Session:
        """A stream whose prompt can be changed while it runs; see `Session`. `frames`: where a clip ends, if known;
        iterating then ends there."""
        settings = self.settings(steps=steps, guidance=guidance, window=window, sink=sink, switch_policy=switch_policy)
        session = Session(
            self, prompt, settings=settings, seed=seed, sample=sample, whole=self._whole(frames), negative=negative,
            cancel=cancel, num_frames=frames,
        )  # fmt: skip
        for at, text in switches:
            self._chunk_at(session.stream.clock, at, frames)
            session.set(prompt=text, transition=transition, at=at, switch_policy=switch_policy)
        return session

    # ---- records -----------------------------------------------------------------------------------------------

    def session_of(self, record: Record, *, cancel: Callable[[], bool] | None = None) -> Session:
        """A session that makes the frames of a record again."""
        session = Session(
            self, record.prompt, settings=record.settings, seed=record.seed, sample=record.sample, whole=record.whole,
            negative=record.negative, cancel=cancel,
        )  # fmt: skip
        session.plan(record.events)
        return session

    def replay(self, record: Record) -> Iterator[NDArray[np.uint8]]:
        """The frames of a record, chunk by chunk; with the same weights and kind of device they are the same."""
        return self.session_of(record).frames(record.num_frames)

    def record(
        self,
        *,
        prompt: str,
        negative: str,
        events: tuple[Event, ...],
        seed: int,
        sample: int,
        settings: RolloutSettings,
        whole: int | None,
        num_frames: int,
        frames_sha256: str,
    ) -> Record:
        """What a video of this model carries."""
        from unspool import __version__

        return Record(
            model=self.source, name=self.spec.name, weights=self.weights, prompt=prompt, negative=negative,
            events=events, seed=seed, sample=sample, num_frames=num_frames, fps=self.spec.fps, settings=settings,
            whole=whole, device=self.device.type, dtype=str(self.dtype).removeprefix("torch."),
            torch=str(torch.__version__), unspool=__version__, frames_sha256=frames_sha256,
        )  # fmt: skip

    # ---- lengths and settings ----------------------------------------------------------------------------------

    def settings(
        self,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        window: Window | None = None,
        sink: int | None = None,
        switch_policy: SwitchPolicy | None = None,
    ) -> RolloutSettings:
        """The model's settings with what is given changed. Raises ValueError for what does not fit the model."""
        if not self.spec.is_causal and (window is not None or sink is not None):
            raise ValueError(
                f"window={window}, sink={sink} have no effect: {self.spec.name} is bidirectional; leave them"
            )
        return self.spec.rollout.changed(
            steps=steps, guidance=guidance, window=window, sink=sink, switch_policy=switch_policy
        )

    def frame_count(self, *, seconds: float | None = None, frames: int | None = None, chunks: int | None = None) -> int:
        """Pixel frames of a clip of that length. Raises ValueError for none, several, or an impossible length."""
        given = {"seconds": seconds, "frames": frames, "chunks": chunks}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) > 1:
            raise ValueError(f"got {named}; expected one of seconds, frames and chunks")
        for name, value in named.items():
            kinds = (int, float) if name == "seconds" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: expected {'a' if name == 'seconds' else 'a whole'} number above 0")
        if chunks is not None:
            clock = Clock(geometry=self.spec.geometry, plan=self.spec.rollout.config().plan, fps=self.spec.fps)
            return clock.first_frame(chunks)
        if frames is not None:
            return frames
        return max(1, round((self.spec.seconds if seconds is None else seconds) * self.spec.fps))

    def check_length(self, frames: int, *, bytes_per_pixel: int) -> None:
        """Raise ValueError for a clip of more than an hour, or whose frames do not fit into memory where
        `bytes_per_pixel` of them are held at once."""
        per_second = self.spec.fps * self.spec.height_px * self.spec.width_px * bytes_per_pixel
        limit = min(MAX_SECONDS, MAX_BYTES / per_second) if per_second else MAX_SECONDS
        if frames > limit * self.spec.fps:
            raise ValueError(
                f"a clip of {frames / self.spec.fps:g} s is too long to be made at once; expected at most {limit:.0f} "
                "s; use `unspool stream` or Pipeline.stream(), which run until they are stopped in constant memory"
            )

    def _whole(self, frames: int | None) -> int | None:
        """Latent frames of a clip that a bidirectional model makes at once; None for a causal one."""
        spec = self.spec
        if spec.is_causal:
            return None
        if frames is None:
            return spec.clip
        clock = Clock(geometry=spec.geometry, plan=spec.rollout.config().plan, fps=spec.fps)
        needed, most = clock.latents_for(frames), spec.geometry.pixel_frames(spec.clip)
        if needed > spec.clip:
            raise ValueError(
                f"{frames} frames: {spec.name} is bidirectional and makes at most {most} frames ({most / spec.fps:g} "
                "s) at once; ask for less, or use a causal model"
            )
        return needed

    def _chunk_at(self, clock: Clock, at: float, frames: int | None) -> int:
        """The chunk at which a prompt switch at `at` seconds takes effect. Raises ValueError where that is after the
        end of the clip."""
        if not self.spec.is_causal:
            raise ValueError(f"{self.spec.name} is bidirectional and makes a clip under one prompt; leave out switches")
        chunk = clock.chunk_at(at)
        if frames is not None and clock.first_frame(chunk) >= frames:
            raise ValueError(
                f"a prompt switch at {at:g} s would take effect at {clock.seconds(chunk):g} s, when the clip of "
                f"{frames / clock.fps:g} s is over; expected an earlier time or a longer clip"
            )
        return chunk


def hash_of(frames: NDArray[np.uint8]) -> str:
    """The hash of raw frames that records carry."""
    digest = FrameHash()
    digest.add(frames)
    return digest.hexdigest()


def _video(frames: NDArray[np.uint8], session: Session) -> Video:
    record = session.record(num_frames=len(frames), frames_sha256=hash_of(frames))
    return Video(
        frames=frames, fps=session.fps, record=record, timing=session.timing, notes=tuple(session.notes)
    )  # fmt: skip
