"""What a change of prompt does to the past, and which changes a stream cannot carry out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unspool.causal.cache.base import Cache
from unspool.causal.chunks import ChunkPlan, FrameSet
from unspool.causal.visibility import Since, Visibility, capacity_of, sink_of
from unspool.rollout.prompts import Moment, SinkPolicy, Switch, SwitchPolicy
from unspool.rollout.recache import plan_recache
from unspool.rollout.state import base_of

if TYPE_CHECKING:
    from unspool.rollout.rollout import Rollout


def check_switch(
    cache: Cache, visibility: Visibility, plan: ChunkPlan, policy: SwitchPolicy, sink: SinkPolicy, frame: int
) -> None:
    """Raise ValueError for a change at latent frame `frame` that a stream could not carry out when it comes: such a
    stream would be stuck before that chunk for good."""
    if policy in ("keep", "flush"):
        return
    known = getattr(cache, "switch_policies", None)
    if known is not None and policy not in known:
        raise ValueError(
            f"policy={policy!r} with the cache {type(cache).__name__}, which cannot compute the past again: expected "
            f"one of {', '.join(map(repr, known))}"
        )
    ended = plan.num_frames is not None and frame >= plan.num_frames  # such a change never comes
    if capacity_of(visibility) is not None and not ended:  # without a bound no sink moves, and there is much to plan
        is_bidirectional = policy == "recache_bidirectional"
        plan_recache(
            visibility, FrameSet.of((0, frame)), plan, frame, sink=sink, bidirectional=is_bidirectional, sigma=0.0
        )


def carry_out(stream: Rollout, switch: Switch, moment: Moment, now: int) -> None:
    """Treat the past before latent frame `now` as the switch asks."""
    cache, config, branches = stream.branches.caches[0], stream.config, stream.branches
    if switch.policy == "keep" or now == 0:
        return
    if switch.policy == "flush":
        held = FrameSet.of((0, now)) if config.commit == "recompute" else cache.frames
        keep = sink_of(stream.visibility) & held
        stream.see(Since(base=base_of(stream.visibility), floor=now - 1, keep=keep))
        for each in branches.caches:
            each.drop(each.frames - (keep | FrameSet.of((now - 1, now))))
        return
    plan = plan_recache(
        stream.visibility, cache.frames, config.plan, now, sink=switch.sink,
        bidirectional=switch.policy == "recache_bidirectional", sigma=config.sigma_commit,
    )  # fmt: skip
    stream.see(plan.visibility)
    for each in branches.caches:
        each.drop(plan.forget)
    prompts = branches.prompts(moment)
    for segments in () if config.commit == "recompute" else plan.passes:  # there every pass recomputes it
        latents = torch.cat([stream._to_commit(s.frames, stream.history.take(s.frames)) for s in segments], dim=1)
        branches.run(segments, latents, stream._sigma(config.sigma_commit), prompts)
        branches.promote()
