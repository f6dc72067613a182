"""THE autoregressive loop: inference, streaming, evaluation, on-policy training and trajectories all call it.

Per chunk: noise, one forward per step (each only stages K/V), emit, then a commit pass on the finished latents whose
K/V later chunks read (arXiv:2412.07772 algorithm 2; arXiv:2506.08009). The commit of a chunk runs when the next chunk
is asked for, so a finished chunk is handed over first and the last one is never committed in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unspool.causal.cache import CACHES
from unspool.causal.cache.base import CacheFactory
from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.visibility import Kind, Segment, Visibility, capacity_of, outlived, sink_of
from unspool.config import locate
from unspool.models.base import Backbone, Prompts
from unspool.rollout.branches import Branches, FrameConditions, admit
from unspool.rollout.noise import NoiseSource
from unspool.rollout.prompts import MAX_BLEND, Moment, PromptTimeline, SinkPolicy, Switch, SwitchPolicy
from unspool.rollout.recache import CleanHistory
from unspool.rollout.recompute import check_commit, forward_with_past
from unspool.rollout.settings import Cancelled, Chunk, RolloutConfig
from unspool.rollout.solvers.base import advance
from unspool.rollout.state import put_back, take
from unspool.rollout.switching import carry_out, check_switch


class Rollout:
    """One batch of streams, generated chunk by chunk.

    Args:
        backbone: the network; it is not changed and may serve other rollouts in between.
        config: what to compute. text: first prompt [b, rows, channels], or a PromptTimeline with switches.
        noise: counter-based or recorded. latent_size: latent (rows, columns).
        prefix: given clean latents [b, n, c, h, w], n whole chunks (extension; 1 with `plan.first=1` starts from an
            image). negative: text of the unconditional branch for guidance.
        frame_conditions: extra inputs per latent frame. cancel: asked before each pass, True raises `Cancelled`.
        grad: (chunk, step) -> bool, which passes keep gradients (step = number of steps stands for the commit pass).
        dtype: of the latents between passes. cache_dtype: of K/V (default: of the network's weights).
        compiled: fuse the cache's small kernels (with `compile_backbone`). cache: a name of CACHES, a user's own
            "module:Class", or what makes a cache when called like `KVCache`.
    Raises ValueError before any work when something does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: RolloutConfig,
        text: Tensor | PromptTimeline,
        *,
        noise: NoiseSource,
        latent_size: tuple[int, int],
        prefix: Tensor | None = None,
        negative: Tensor | None = None,
        frame_conditions: FrameConditions | None = None,
        cancel: Callable[[], bool] | None = None,
        grad: Callable[[int, int], bool] | None = None,
        dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        compiled: bool = False,
        cache: str | CacheFactory = "kv",
    ) -> None:
        self.backbone, self.config, self.noise = backbone, config, noise
        self.timeline = text.copy() if isinstance(text, PromptTimeline) else PromptTimeline(text, wait=True)
        self.batch = self.timeline.first.shape[0]
        self.cancel, self.grad = cancel, grad
        weight = next(iter(backbone.parameters()))
        self.device = weight.device
        self.dtype = dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self.shape = (self.batch, backbone.latent_channels, *latent_size)
        self.visibility = config.visibility
        make_cache = partial(
            locate(cache, CACHES) if isinstance(cache, str) else cache, backbone.sites,
            tokens_per_frame=backbone.tokens_per_frame(*latent_size), visibility=config.visibility,
            positions=config.positions, dtype=cache_dtype or weight.dtype, device=self.device, compiled=compiled,
        )  # fmt: skip
        self._check_prefix(prefix)
        admit(backbone, [self.timeline.first, *(s.text for s in self.timeline.switches)])
        if config.guidance.is_active and negative is not None:
            admit(backbone, [negative])
        self.branches = Branches(backbone, make_cache, config.guidance, negative, self.batch, frame_conditions)
        check_commit(self.branches.caches[0], config)
        for switch in self.timeline.switches:
            self.check_switch(switch.policy, switch.sink, switch.frame)
        sink = max(sink_of(config.visibility), default=-1) + 1
        self.history = CleanHistory(config.plan, capacity_of(config.visibility), sink)
        self.index, self._is_open = 0, False  # of the next chunk; whether it is being made
        self.starts: list[int] = []  # of the chunks so far, as far back as a blend of prompts can reach
        self._pending: tuple[int, Moment] | None = None  # chunk that waits for its commit pass
        self._tail: Tensor | None = None  # its latents
        self._repeat: tuple[tuple[int, float], Tensor] | None = None  # (prompt, weight), result of a fused first step
        self._text: Tensor | None = None  # of the last chunk
        self._switched = 0  # number of the last switch that was carried out
        self._sigmas: dict[float, Tensor] = {}
        if prefix is not None:
            self._prefill(prefix)

    # ---- what callers use --------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks until the end of the plan (endless without `plan.num_frames`)."""
        while not self.is_finished:
            yield self.next_chunk()

    @property
    def is_finished(self) -> bool:
        count = self.config.plan.num_chunks
        return count is not None and self.index >= count

    def next_chunk(self) -> Chunk:
        """Generate the next chunk. Raises Cancelled between passes, ValueError past the end of the plan."""
        passes = self.passes()
        while True:
            try:
                next(passes)
            except StopIteration as end:
                chunk: Chunk = end.value
                return chunk

    def passes(self) -> Generator[None, None, Chunk]:
        """`next_chunk` with a stop between any two passes, in which something else may be done; returns the chunk.

        Closing it early leaves the stream as it was. One at a time; a prompt given meanwhile is the next chunk's.
        """
        if self._is_open:
            raise RuntimeError(f"chunk {self.index} is being made; finish or close its passes() first")
        frames = self.config.plan.frames(self.index)
        starts = [*self.starts, frames.start]
        moment = self.timeline.moment(starts, self._text)
        self._is_open = True
        try:
            if self._enter(frames.start, moment):
                yield
            latents = yield from self._denoise(frames, moment)
        except BaseException:
            self.branches.discard()
            raise
        finally:
            self._is_open = False
        return self._finished(frames, starts, moment, latents)

    def _finished(self, frames: range, starts: list[int], moment: Moment, latents: Tensor) -> Chunk:
        self.history.add(
            frames, latents.detach().clone(), sink_of(self.visibility)
        )  # what the caller does to its copy is the caller's business
        self.starts, self._text, self._repeat = starts[-MAX_BLEND:], moment.text, None
        self.timeline.prune(frames.start)
        if self.config.commit == "none":
            steps = self.config.schedule_of(self.index).num_steps
            self.branches.promote(keep_graph=self._wants_grad(self.index, steps))
        elif self.config.commit != "recompute":
            kept = latents if latents.requires_grad else self.history.chunks[self.index]
            self._pending, self._tail = (self.index, moment), kept
        chunk = Chunk(
            index=self.index, frames=frames, latents=latents, prompt=moment.prompt, switched=bool(moment.begins)
        )
        self.index += 1
        self.see(outlived(self.visibility, frames.start))  # the commit of this chunk is still to come
        return chunk

    def switch(self, text: Tensor, *, frame: int | None = None, **how: Any) -> Switch:
        """Change the prompt from the next chunk on (or from latent frame `frame`); options as `Switch`.

        Raises ValueError for a text that the network does not take, a frame that is already made, a stream whose last
        chunk is made or being made, or a policy that this stream cannot carry out.
        """
        plan, coming = self.config.plan, self.index + self._is_open
        if plan.num_chunks is not None and coming >= plan.num_chunks:
            raise ValueError(f"a switch in chunk {coming - 1}, the last one: no chunk is left that could change")
        start = plan.frames(coming).start
        if frame is not None and frame < start:
            raise ValueError(f"frame={frame} is already made; expected a latent frame from {start} on, or None for now")
        switch = Switch(frame=start if frame is None else frame, text=text, **how)
        admit(self.backbone, [text], wait=True)
        self.check_switch(switch.policy, switch.sink, switch.frame)
        self.timeline.add(switch)
        return switch

    def check_switch(self, policy: SwitchPolicy, sink: SinkPolicy, frame: int) -> None:
        """Raise ValueError for a change of prompt at latent frame `frame` that this stream could not carry out."""
        check_switch(self.branches.caches[0], self.visibility, self.config.plan, policy, sink, frame)

    @property
    def num_passes(self) -> int:
        """Passes of the network that the next chunk takes: its steps, and a commit pass of its own that is due."""
        separate = self._pending is not None and self.config.commit != "fused"
        return self.config.schedule_of(self.index).num_steps + separate

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches of this stream."""
        return self.branches.num_bytes

    def finish(self) -> bool:
        """Run a commit pass that is still due; whether one was."""
        if self._pending is None:
            return False
        index, moment = self._pending
        assert self._tail is not None
        frames = self.config.plan.frames(index)
        self._check_cancel()
        segment = Segment(kind=Kind.COMMIT, frames=frames, sigma=self.config.sigma_commit)
        wants = self._wants_grad(index, self.config.schedule_of(index).num_steps)
        with self._grad_mode(wants):
            prompts = self.branches.prompts(moment)
            latents = self._to_commit(frames, self._tail)
            self.branches.run((segment,), latents, self._sigma(self.config.sigma_commit), prompts)
            self.branches.promote(keep_graph=wants)
        self._pending, self._tail = None, None
        return True

    # ---- a chunk -----------------------------------------------------------------------------------------------

    def _enter(self, start: int, moment: Moment) -> bool:
        """Commit what is due and carry out a prompt switch, once; whether a pass was made."""
        due = self._due(moment)
        rewriting = any(switch.policy != "keep" for _, switch in due)
        has_committed = (self.config.commit != "fused" or rewriting or self.grad is not None) and self.finish()
        for number, switch in due:
            with torch.no_grad():
                carry_out(self, switch, moment, start)
            self._switched = number
        return has_committed or rewriting

    def _due(self, moment: Moment) -> list[tuple[int, Switch]]:
        """Switches that the moment begins and that were not carried out yet, with their numbers."""
        first = moment.prompt - len(moment.begins) + 1
        return [(first + i, switch) for i, switch in enumerate(moment.begins) if first + i > self._switched]

    def _denoise(self, frames: range, moment: Moment) -> Generator[None, None, Tensor]:
        config = self.config
        schedule = config.schedule_of(self.index)
        x = self._draw(frames, 0)
        state = config.solver.start()
        segment = Segment(kind=Kind.DENOISE, frames=frames)
        for step in schedule.steps:
            self._check_cancel()
            with self._grad_mode(self._wants_grad(self.index, step.index)):
                prompts = self.branches.prompts(moment)
                at = replace(segment, sigma=step.sigma)
                prediction = self._forward(
                    at, x, step.conditioning, prompts, key=(moment.prompt, moment.weight), first=step.index == 0
                )
                x0 = config.process.to_x0(x, prediction, step.sigma)
                noise = partial(self._draw, frames, step.index + 1)  # drawn only where the solver asks for it
                x, state = advance(config.solver, x, x0, prediction, step.sigma, step.next_sigma, noise, state)
            if step.next_sigma > 0.0:
                yield
        return x

    def _forward(
        self, segment: Segment, x: Tensor, told: float, prompts: list[Prompts], *, key: tuple[int, float], first: bool
    ) -> Tensor:
        """Prediction for one denoising pass, with the previous chunk's commit in the same forward where that is due."""
        if first and self._repeat is not None and self._repeat[0] == key:
            return self._repeat[1]  # the chunk is tried again after its first step went through with the commit
        if self.config.commit == "recompute":
            return forward_with_past(self, segment, x, told, prompts)
        if self._pending is None:
            return self.branches.run((segment,), x, self._sigma(told), prompts)
        index, moment = self._pending
        assert self._tail is not None
        before = self.config.plan.frames(index)
        commit = Segment(kind=Kind.COMMIT, frames=before, sigma=self.config.sigma_commit)
        levels = [self.config.sigma_commit] * len(before) + [told] * len(segment.frames)
        sigma = torch.tensor([levels], dtype=torch.float64)
        old = self.branches.prompts(moment)
        joined, which = prompts, None
        if old is not prompts:
            joined = [Prompts.join([a, b], 1) for a, b in zip(old, prompts, strict=True)]
            which = torch.tensor([[0] * len(before) + [1] * len(segment.frames)])
        latents = torch.cat([self._to_commit(before, self._tail), x], dim=1)
        prediction = self.branches.run((commit, segment), latents, sigma, joined, which)
        self.branches.promote()
        self._pending, self._tail = None, None
        self._repeat = (key, prediction[:, len(before) :])
        return self._repeat[1]

    def _draw(self, frames: range, step: int) -> Tensor:
        return self.noise.draw(frames, step, self.shape, self.dtype, self.device)

    def _to_commit(self, frames: range, latents: Tensor) -> Tensor:
        """What a commit pass sees of clean latents: every time the same."""
        level = self.config.commit_noise
        if level == 0.0:
            return latents
        return self.config.process.add_noise(latents, self._draw(frames, self.config.commit_step), level)

    def _sigma(self, sigma: float) -> Tensor:
        if sigma not in self._sigmas:
            self._sigmas[sigma] = torch.tensor([[sigma]], dtype=torch.float64)
        return self._sigmas[sigma]

    def _check_cancel(self) -> None:
        if self.cancel is not None and self.cancel():
            raise Cancelled(f"cancelled in chunk {self.index}; next_chunk() starts it again")

    def _wants_grad(self, chunk: int, step: int) -> bool:
        return self.grad is not None and torch.is_grad_enabled() and self.grad(chunk, step)

    def _grad_mode(self, wants: bool) -> AbstractContextManager[None]:
        if wants:  # before torch 2.10, weights that autocast had cast without a graph were used again with one
            torch.clear_autocast_cache()
        return torch.set_grad_enabled(wants)

    # ---- prompt switches and given latents ---------------------------------------------------------------------

    def see(self, visibility: Visibility) -> None:
        self.visibility = visibility
        for cache in self.branches.caches:
            cache.visibility = visibility

    def _check_prefix(self, prefix: Tensor | None) -> None:
        if prefix is None:
            return
        expected = (self.batch, "n", *self.shape[1:])
        if prefix.ndim != 5 or (prefix.shape[0], *prefix.shape[2:]) != (self.batch, *self.shape[1:]):
            raise ValueError(f"prefix of shape {tuple(prefix.shape)}: expected [b, n, c, h, w] = {expected}")
        if not bool(torch.isfinite(prefix).all()):
            raise ValueError("prefix latents hold NaN or infinity; expected finite values: check the encoder")
        count, plan = prefix.shape[1], self.config.plan
        ends = [c.stop for c in plan.chunks(0, count)]
        if not ends or ends[-1] != count:
            low = ends[-2] if len(ends) > 1 else 0
            raise ValueError(
                f"prefix of {count} latent frames ends inside a chunk; expected a chunk boundary: give "
                f"{f'{low} or ' if low else ''}{ends[-1] if ends else plan.lead}, or set ChunkPlan(first=...)"
            )

    def _prefill(self, prefix: Tensor) -> None:
        """Commit given latents chunk by chunk under the prompts of the timeline; generation goes on after them."""
        prefix = prefix.to(self.device, self.dtype)
        with torch.no_grad():
            for frames in self.config.plan.chunks(0, prefix.shape[1]):
                self.starts.append(frames.start)
                moment = self.timeline.moment(self.starts, self._text)
                self._text = moment.text
                for number, switch in self._due(moment):
                    carry_out(self, switch, moment, frames.start)
                    self._switched = number
                latents = prefix[:, frames.start : frames.stop]
                self._check_cancel()
                if self.config.commit != "recompute":
                    segment = Segment(kind=Kind.PREFILL, frames=frames, sigma=self.config.sigma_commit)
                    prompts, seen = self.branches.prompts(moment), self._to_commit(frames, latents)
                    self.branches.run((segment,), seen, self._sigma(self.config.sigma_commit), prompts)
                    self.branches.promote()
                self.history.add(frames, latents.clone(), sink_of(self.visibility))
                self.index += 1
        self.starts = self.starts[-MAX_BLEND:]

    # ---- state -------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All that this stream needs to go on elsewhere, bit for bit: `Snapshot.to_bytes()` stores it."""
        return take(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of a rollout of the same configuration, network and noise. Raises ValueError if not."""
        put_back(self, snapshot)


__all__ = ["Cancelled", "Chunk", "Rollout", "RolloutConfig", "rollout"]


def rollout(
    backbone: Backbone, config: RolloutConfig, text: Tensor | PromptTimeline, **options: Any
) -> Iterator[Chunk]:
    """The chunks of one batch of streams; options as `Rollout`."""
    return iter(Rollout(backbone, config, text, **options))
