"""A batch of streams from prompts to uint8 frames: text, rollout, codec and stop watch, one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from unspool.rollout.rollout import Rollout

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
        self._undecoded: Tensor | None = None  # finished latents whose decoding failed and is tried again
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
                cache="kv" if whole is None else NoCache,
            )
            self.decoder = Decoder(pipeline.codec)

    @property
    def is_finished(self) -> bool:
        """Whether there is no further chunk: never in a stream without end."""
        count = self.rollout.config.plan.num_chunks
        return count is not None and self.index >= count

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
        """The frames [b, f, y, x, 3] of the next chunk, on the host.

        Nothing is lost when it fails or is cancelled: the chunk is tried again at the next call.
        """
        with self.watch.work():
            if self._undecoded is None:
                self._undecoded = self.rollout.next_chunk().latents
            frames = self.decoder.next(self._undecoded)
        expected = self.clock.num_frames(self.index)
        if frames.shape[1] != expected:
            raise ValueError(
                f"the codec made {frames.shape[1]} frames of chunk {self.index}, expected {expected} by the model's "
                "geometry; correct geometry in the model's description"
            )
        self._undecoded = None
        self.watch.chunk(expected)
        self.index += 1
        return frames

    def snapshot(self) -> Snapshot:
        """All that the streams need to go on elsewhere, bit for bit."""
        loose = {} if self._undecoded is None else {"latents": self._undecoded.detach().clone()}
        parts = {
            "rollout": self.rollout.snapshot(),
            "codec": self.decoder.snapshot(),
            "loose": Snapshot(loose, {}),
        }
        return merge(parts, {"index": self.index})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot. Raises ValueError for one of other settings, weights or noise."""
        self.rollout.restore(snapshot.nested("rollout"))
        self.decoder.restore(snapshot.nested("codec"))
        latents = snapshot.nested("loose").tensors.get("latents")
        self._undecoded = None if latents is None else latents.to(self.rollout.device)
        self.index = snapshot.facts["index"]
