"""One user's stream: chunks on demand, and a prompt that may change while they come."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from unspool.annotations import check_word
from unspool.causal.cache.snapshot import Snapshot, merge
from unspool.config import from_dict, to_dict
from unspool.engine.files import replacing
from unspool.engine.record import Event, Record
from unspool.engine.settings import RolloutSettings, SwitchPolicy, plain
from unspool.engine.stream import Stream
from unspool.engine.timing import Timing
from unspool.log import get_logger
from unspool.rollout.prompts import MAX_BLEND

if TYPE_CHECKING:
    from unspool.engine.pipeline import Pipeline

Transition = Literal["cut", "smooth"] | float
SMOOTH_CHUNKS = 3
SNAPSHOT_FORMAT, SNAPSHOT_VERSION = "unspool-session", 1

_LOG = get_logger(__name__)


class Paused(RuntimeError):
    """A chunk was asked of a session that is paused."""


class Session:
    """A stream of one prompt at a time. Made by `Pipeline.session`.

    Chunks are made when they are asked for. `set` may be called from another thread while one is being made; all else
    belongs to one thread. `notes` holds what the user should know about the prompts, in the order they came.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompt: str,
        *,
        settings: RolloutSettings,
        seed: int = 0,
        sample: int = 0,
        whole: int | None = None,
        negative: str = "",
        cancel: Callable[[], bool] | None = None,
        num_frames: int | None = None,
    ) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.seed, self.sample = plain(seed), plain(sample)
        self.whole, self.negative = whole, negative
        self._cancel, self._num_frames = cancel, num_frames
        self._lock = threading.Lock()
        self.is_paused = False
        self.notes: list[str] = []
        self._start(prompt)

    def _start(self, prompt: str) -> None:
        self.stream = Stream(
            self.pipeline,
            [prompt],
            seed=self.seed,
            samples=[self.sample],
            settings=self.settings,
            whole=self.whole,
            negative=self.negative,
            cancel=self._cancel,
        )
        self.first_prompt = self.prompt = prompt
        self.events: list[Event] = []
        """Changes of prompt that took effect, in order."""
        self._agenda: dict[int, Event] = {}  # by chunk: changes to come
        self._begun = 0  # first chunk that a change of prompt can still reach
        self._note(prompt)

    def _note(self, prompt: str) -> None:
        for note in self.pipeline.wording.notes(prompt):
            self.notes.append(note)
            _LOG.warning("%s", note)

    # ---- chunks ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Chunks until the end of the clip, where the last one is cut to fit, or a pause; iterate again after
        `resume`."""
        while not (self.is_finished or self.is_paused):
            start = self.stream.clock.first_frame(self.chunk)
            chunk = self.next_chunk()
            yield chunk if self._num_frames is None else chunk[: self._num_frames - start]

    def next_chunk(self) -> NDArray[np.uint8]:
        """The next frames, uint8 [f, h, w, 3], on the host; the prompt that was set last is followed from here on.

        Raises Paused; ValueError past the end of a clip; `Cancelled` when `cancel` says so, and then the next call
        makes the same chunk.
        """
        self._refuse_when_paused()
        if not self.stream.num_undecoded:
            self._begin()
        with self._making():
            return self.stream.next_chunk()[0]

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """As `next_chunk`, but frames [f, h, w, 3] leave a latent frame at a time and at an even pace: while a chunk is
        made, what is left of the one before, between its passes, and then its own first piece.

        The frames are the same. The prompt that was set last is followed from the chunk that is made; `rest` gives what
        is left at the end.
        """
        self._refuse_when_paused()
        self._begin()
        with self._making():
            for piece in self.stream.pieces():
                yield piece[0]

    def rest(self) -> Iterator[NDArray[np.uint8]]:
        """What `pieces` has not given yet of the chunk that it began."""
        for piece in self.stream.rest():
            yield piece[0]

    def _refuse_when_paused(self) -> None:
        if self.is_paused:
            raise Paused("the session is paused; call resume() first")

    def _begin(self) -> None:
        """Let a change of prompt take over that is planned for the chunk to be made."""
        with self._lock:
            index = self.stream.rollout.index
            self._begun = index + 1
            event = self._agenda.pop(index, None)
        if event is not None:
            self.stream.switch([event.prompt], event)
            with self._lock:
                self.events.append(event)
                self.prompt = event.prompt

    @contextmanager
    def _making(self) -> Iterator[None]:
        """Around the making of a chunk: where it is not made, a change of prompt can reach it again."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._begun = self.stream.rollout.index
            raise

    def frames(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """Chunks until `count` frames were given, the last one cut to fit."""
        while count > 0:
            chunk = self.next_chunk()[:count]
            count -= len(chunk)
            yield chunk

    @property
    def is_finished(self) -> bool:
        """Whether the clip is over; a stream without end never is."""
        over = self._num_frames is not None and self.stream.clock.first_frame(self.chunk) >= self._num_frames
        return over or self.stream.is_finished

    @property
    def chunk(self) -> int:
        """Number of the next chunk."""
        return self.stream.index

    @property
    def seconds(self) -> float:
        """When the next chunk begins, in the time of the video."""
        return self.stream.clock.seconds(self.stream.index)

    @property
    def fps(self) -> float:
        """Frames per second at which the video is shown."""
        return self.stream.clock.fps

    @property
    def num_bytes(self) -> int:
        """Bytes of the caches, constant once the window is full."""
        return self.stream.num_bytes

    @property
    def timing(self) -> Timing:
        """How fast it has been so far."""
        return self.stream.watch.timing()

    # ---- control -----------------------------------------------------------------------------------------------

    def set(
        self,
        *,
        prompt: str,
        transition: Transition = "cut",
        at: float | None = None,
        switch_policy: SwitchPolicy | None = None,
    ) -> float:
        """Follow another prompt from the next chunk on, or from the first one at or after `at` seconds.

        Returns the time in seconds at which it takes effect. `transition` "smooth" or a number of seconds blends the
        prompts over several chunks, for which cached keys keep the old prompt; "cut" changes at once and treats the
        past by `switch_policy` (None: the model's). Of several changes for one chunk the last one counts.
        Raises ValueError for a clip that is made at once, a policy that is none or that this model cannot carry out,
        or a blend that does not fit it.
        """
        if self.whole is not None:
            raise ValueError("this model makes a clip at once, under one prompt; use a causal model to change it")
        over = self._blend(transition)
        policy = switch_policy or ("keep" if over > 1 else self.settings.switch_policy)
        if over > 1 and policy != "keep":
            raise ValueError(
                f"transition={transition!r} blends prompts, and switch_policy={policy!r} acts at once; use 'keep' or "
                "transition='cut'"
            )
        check_word("switch_policy", policy, SwitchPolicy)
        self.pipeline.wording.states([prompt])  # encoded here, so that the next chunk does not wait for it
        clock = self.stream.clock
        wanted = 0 if at is None else clock.chunk_at(at)
        with self._lock:
            chunk = max(self._begun, wanted)
            self.stream.rollout.check_switch(policy, self.settings.sink_policy, clock.plan.frames(chunk).start)
            self._agenda[chunk] = Event(
                chunk=chunk,
                seconds=clock.seconds(chunk),
                prompt=prompt,
                policy=policy,
                sink=self.settings.sink_policy,
                over=over,
            )
        self._note(prompt)
        return clock.seconds(chunk)

    def plan(self, events: Sequence[Event]) -> None:
        """Put changes of prompt on the agenda as they are, each at its chunk (of a record)."""
        with self._lock:
            self._agenda.update({event.chunk: event for event in events})

    def _blend(self, transition: Transition) -> int:
        if transition == "cut":
            return 1
        if transition == "smooth":
            return SMOOTH_CHUNKS
        clock = self.stream.clock
        chunk_s = clock.plan.chunk * clock.geometry.temporal / clock.fps
        longest = MAX_BLEND * chunk_s
        if isinstance(transition, bool) or not isinstance(transition, int | float) or not 0 <= transition <= longest:
            raise ValueError(f"transition={transition!r}: expected 'cut', 'smooth' or seconds from 0 to {longest:.1f}")
        return min(MAX_BLEND, max(1, round(transition / chunk_s)))

    def pause(self) -> None:
        """Make no chunk until `resume`; the state stays as it is."""
        self.is_paused = True

    def resume(self) -> None:
        """Go on exactly where `pause` stopped."""
        self.is_paused = False

    def reset(self, *, seed: int | None = None, prompt: str | None = None) -> None:
        """Start again at time 0, with another seed or prompt where given, else the current ones; not paused."""
        with self._lock:
            before = self.seed
            self.seed = before if seed is None else plain(seed)
            try:
                self._start(self.prompt if prompt is None else prompt)
            except BaseException:  # the stream goes on as it was
                self.seed = before
                raise
            self.is_paused = False

    # ---- records and snapshots ---------------------------------------------------------------------------------

    def record(self, *, num_frames: int, frames_sha256: str = "") -> Record:
        """How the first `num_frames` frames were made, for a video's metadata."""
        clock = self.stream.clock
        return self.pipeline.record(
            prompt=self.first_prompt,
            negative=self.negative,
            events=tuple(event for event in self.events if clock.first_frame(event.chunk) < num_frames),
            seed=self.seed,
            sample=self.sample,
            settings=self.settings,
            whole=self.whole,
            num_frames=num_frames,
            frames_sha256=frames_sha256,
        )

    def snapshot(self, path: str | os.PathLike[str]) -> Path:
        """Write all that this stream needs to go on elsewhere, bit for bit, to a file (safetensors, versioned)."""
        with self._lock:  # `set` may come from another thread
            facts: dict[str, Any] = {
                "format": SNAPSHOT_FORMAT,
                "version": SNAPSHOT_VERSION,
                "record": self.record(num_frames=self.stream.clock.first_frame(self.chunk)).to_dict(),
                "prompt": self.prompt,
                "events": [to_dict(event) for event in self.events],
                "agenda": [to_dict(event) for event in self._agenda.values()],
                "begun": self._begun,
                "is_paused": self.is_paused,
                "num_frames": self._num_frames,
            }
        target = Path(path)
        data = merge({"stream": self.stream.snapshot()}, facts).to_bytes()
        with replacing(target) as file:
            file.write_bytes(data)
        return target

    @classmethod
    def restore(
        cls, path: str | os.PathLike[str], pipeline: Pipeline, *, cancel: Callable[[], bool] | None = None
    ) -> Session:
        """The session of a snapshot, continued by a pipeline with the same weights; `cancel` as of `Pipeline.session`.

        Raises FileNotFoundError; ValueError for a damaged file, another version, or other weights.
        """
        source = Path(path)
        try:
            snapshot = Snapshot.from_bytes(source.read_bytes())
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        facts = snapshot.facts
        if facts.get("format") != SNAPSHOT_FORMAT or facts.get("version") != SNAPSHOT_VERSION:
            found = json.dumps([facts.get("format"), facts.get("version")])
            raise ValueError(
                f"{source}: a snapshot {found}, expected {json.dumps([SNAPSHOT_FORMAT, SNAPSHOT_VERSION])}; "
                "take a new one with this release"
            )
        record = Record.parse(facts["record"], where=str(source))
        if record.weights != pipeline.weights:
            raise ValueError(
                f"{source}: a snapshot of {record.name} with weights {record.weights}, but {pipeline.spec.name} has "
                f"{pipeline.weights}; load the model it was taken from ({record.model})"
            )
        session = pipeline.session_of(replace(record, events=()), cancel=cancel)
        session.stream.restore(snapshot.nested("stream"))
        session.events, agenda = ([from_dict(Event, e) for e in facts[name]] for name in ("events", "agenda"))
        session._agenda = {event.chunk: event for event in agenda}
        session.prompt = facts["prompt"]
        session._begun, session.is_paused = facts["begun"], facts["is_paused"]
        session._num_frames = facts.get("num_frames")
        return session
