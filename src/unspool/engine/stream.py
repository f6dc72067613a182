"""A batch of streams from prompts to uint8 frames: text, rollout, codec and stop watch, one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.causal.cache.snapshot import Snapshot, merge
from unspool.engine.clock import Clock
from unspool.engine.decode import Decoder
from unspool.engine.record import Event
from unspool.engine.settings import RolloutSettings
from unspool.engine.timing import StopWatch
from unspool.engine.whole_clip import NoCache
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Chunk, Rollout

if TYPE_CHECKING:
    from unspool.engine.pipeline import Pipeline


class Stream:
    """What `Session` and batched generation share. Sample j draws the noise of (`seed`, `samples[j]`), whatever it is
    batched with.

    `whole`: latent frames of a clip made at once by a bidirectional network; None streams without end. `cancel` is
    asked before each pass. Raises ValueError before any work for settings that do not fit.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        *,
        seed: int,
        samples: Sequence[int],
        settings: RolloutSettings,
        whole: int | None = None,
        negative: str = "",
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        spec, config = pipeline.spec, settings.config(whole=whole)
        self._wording = pipeline.wording
        self.clock = Clock(geometry=spec.geometry, plan=config.plan, fps=spec.fps)
        self.watch = StopWatch(spec.fps)
        self.index = 0
        """The next chunk to be handed out."""
        self._undecoded: Tensor | None = None  # finished latents of chunk `index` and, if it is made, of the next one
        self._given = 0  # frames of chunk `index` that have left already
        with self.watch.work():
            text = self._wording.states(prompts)
            active = config.guidance.is_active
            self.rollout = Rollout(
                pipeline.transformer,
                config,
                text,
                noise=CounterNoise(seed, sample_ids=tuple(samples)),
                latent_size=spec.geometry.latent_size(spec.height_px, spec.width_px),
                negative=self._wording.states([negative] * len(prompts)) if active else None,
                cancel=cancel,
                compiled=pipeline.is_compiled,
                cache=settings.cache if whole is None else NoCache,
            )
            self.decoder = Decoder(pipeline.codec)

    @property
    def is_finished(self) -> bool:
        """Whether there is no further chunk: never in a stream without end."""
        count = self.rollout.config.plan.num_chunks
        return count is not None and self.index >= count

    @property
    def num_undecoded(self) -> int:
        """Finished latent frames whose frames have not left yet."""
        return 0 if self._undecoded is None else self._undecoded.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the caches; constant once the window is full."""
        return self.rollout.num_bytes

    def switch(self, prompts: Sequence[str], event: Event) -> None:
        """Let `prompts` take over at `event.chunk`, the next chunk or a later one."""
        with self.watch.work():
            self.rollout.switch(
                self._wording.states(prompts),
                frame=self.rollout.config.plan.frames(event.chunk).start,
                policy=event.policy,
                sink=event.sink,
                over=event.over,
            )

    @torch.no_grad()
    def next_chunk(self) -> NDArray[np.uint8]:
        """The frames [b, f, y, x, 3] of the next chunk, on the host; of one that `pieces` has begun to give, the rest.

        Nothing is lost when it fails or is cancelled: the chunk is tried again at the next call.
        """
        if self._undecoded is None:
            with self.watch.work():
                self._undecoded = self.rollout.next_chunk().latents
        before, number, parts = (self._undecoded, self._given, self.decoder.state), self.index, []
        try:
            while self.index == number:
                parts.append(self._piece())
            return np.concatenate(parts, axis=1)
        except BaseException:
            self._undecoded, self._given, self.decoder.state = before
            raise

    @torch.no_grad()
    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """One more chunk is made, and frames [b, f, y, x, 3] leave as soon as a latent frame of them is decoded.

        What the chunk before has left is decoded between the passes of this one, so that frames come at an even pace;
        then the first latent frame of this chunk. `rest` gives the others where no further chunk follows.
        """
        passes, latents = self.rollout.passes(), None
        pace = _Pace(self.num_undecoded, self.rollout.num_passes)
        try:
            while latents is None:
                for _ in range(pace.due()):
                    yield self._leaving()
                with self.watch.work():
                    latents = _advance(passes)
        finally:
            passes.close()
        due = self.num_undecoded + 1
        self._undecoded = latents if self._undecoded is None else torch.cat([self._undecoded, latents], dim=1)
        for _ in range(due):
            yield self._leaving()

    @torch.no_grad()
    def rest(self) -> Iterator[NDArray[np.uint8]]:
        """The frames of finished latents that are not decoded yet."""
        while self._undecoded is not None:
            yield self._leaving()

    def _leaving(self) -> NDArray[np.uint8]:
        """A piece that does not wait for the others of its chunk."""
        frames = self._piece()
        self.watch.leaves()
        return frames

    def _piece(self) -> NDArray[np.uint8]:
        """The frames of the first latent frame that is not decoded yet; all of a clip that is made at once."""
        latents = self._undecoded
        assert latents is not None
        size = 1 if self.clock.plan.num_frames is None else latents.shape[1]
        with self.watch.work():
            frames = self.decoder.next(latents[:, :size])
        self._given += frames.shape[1]
        self._undecoded = latents[:, size:] if latents.shape[1] > size else None
        own, last = (self.clock.plan.frames(chunk) for chunk in (self.index, self.rollout.index - 1))
        if self.num_undecoded <= last.stop - own.stop:  # what is left is of the next chunk
            self._chunk_is_out()
        return frames

    def _chunk_is_out(self) -> None:
        expected, given = self.clock.num_frames(self.index), self._given
        self._given = 0
        if given != expected:
            raise ValueError(
                f"the codec made {given} frames of chunk {self.index}, expected {expected} by the model's geometry; "
                "correct geometry in the model's description"
            )
        self.watch.chunk(expected)
        self.index += 1

    def snapshot(self) -> Snapshot:
        """All that the streams need to go on elsewhere, bit for bit."""
        loose = {} if self._undecoded is None else {"latents": self._undecoded.detach().clone()}
        parts = {
            "rollout": self.rollout.snapshot(),
            "codec": self.decoder.snapshot(),
            "loose": Snapshot(loose, {}),
        }
        return merge(parts, {"index": self.index, "given": self._given})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot. Raises ValueError for one of other settings, weights or noise."""
        self.rollout.restore(snapshot.nested("rollout"))
        self.decoder.restore(snapshot.nested("codec"))
        latents = snapshot.nested("loose").tensors.get("latents")
        self._undecoded = None if latents is None else latents.to(self.rollout.device)
        self.index, self._given = snapshot.facts["index"], snapshot.facts.get("given", 0)


class _Pace:
    """Spreads `pieces` over `passes`, so that one more may leave after the last of them."""

    def __init__(self, pieces: int, passes: int) -> None:
        self._pieces, self._passes, self._given, self._done = pieces, passes, 0, -1

    def due(self) -> int:
        """How many are due before one more pass: none before the first, and not all where passes are few."""
        self._done += 1
        total = min(self._pieces, (self._pieces + 1) * self._done // self._passes)
        now, self._given = total - self._given, total
        return now


def _advance(passes: Generator[None, None, Chunk]) -> Tensor | None:
    """One more pass; the latents after the last one."""
    try:
        next(passes)
    except StopIteration as end:
        chunk: Chunk = end.value
        return chunk.latents
    return None
