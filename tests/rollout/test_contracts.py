"""What a user brings along is taken by name or as an object, and refused in words where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from tiny import NOISE, SIZE, Setting, make_rollout, run, shared_network, text

from unspool.causal.cache import CACHES
from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import FrameSet
from unspool.causal.position import POSITIONS, WindowRelative
from unspool.causal.visibility import VISIBILITIES, Segment, Window, capacity_of, sink_of
from unspool.config import locate
from unspool.diffusion import PROCESSES
from unspool.diffusion.flow import FlowMatching
from unspool.models import BACKBONES
from unspool.rollout import NOISE_SOURCES
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout, RolloutConfig
from unspool.rollout.solvers import SOLVERS
from unspool.rollout.solvers.euler import Euler
from unspool.rollout.solvers.fewstep import FewStep

SETTING = Setting(chunk=3, num_frames=24, window=9, sink=3)


@dataclass(frozen=True)
class Mine:
    """A copy of a window with a sink that is no `Window`."""

    window: int = 9
    sink: int = 3
    within: Literal["full", "causal"] = "full"

    def visible(self, segment: Segment) -> FrameSet:
        return Window(window=self.window, sink=self.sink).visible(segment)

    @property
    def capacity(self) -> int:
        return self.window

    @property
    def sink_frames(self) -> FrameSet:
        return FrameSet.of((0, self.sink))


class Counting(KVCache):
    """A cache of the user's own."""

    made = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        type(self).made += 1


@pytest.mark.parametrize("table", [CACHES, POSITIONS, VISIBILITIES, PROCESSES, BACKBONES, NOISE_SOURCES, SOLVERS])
def test_every_name_of_every_table_can_be_imported(table: dict[str, str]) -> None:
    for name in table:
        assert isinstance(locate(name, table), type)


def test_names_of_users_and_wrong_names() -> None:
    assert locate("unspool.rollout.solvers.euler:Euler", SOLVERS) is Euler
    with pytest.raises(ValueError, match="did you mean euler"):
        locate("eulr", SOLVERS)
    with pytest.raises(ValueError, match="cannot be imported"):
        locate("no_such_module:Thing", SOLVERS)
    with pytest.raises(ValueError, match="cannot be imported"):
        locate("unspool.rollout.solvers.euler:Oiler", SOLVERS)


@pytest.mark.parametrize("field", ["solver", "visibility", "positions", "process"])
def test_a_name_where_an_object_is_wanted_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}='euler'.*locate"):
        replace(SETTING.config(), **{field: "euler"})


def test_a_solver_for_another_process_is_refused() -> None:
    @dataclass(frozen=True)
    class Other(FlowMatching):
        curve: float = 2.0

    config = SETTING.config()
    for solver in (FewStep(), Euler()):
        with pytest.raises(ValueError, match="is made for FlowMatching"):
            replace(config, process=Other(), solver=solver)
    replace(config, process=Other(), solver=FewStep(process=Other()))


@pytest.mark.parametrize("policy", ["keep", "recache", "recache_bidirectional", "flush"])
@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_a_bounded_visibility_of_a_user_is_no_second_class(policy: Any, relative: bool) -> None:
    """Bytes, clean latents, switches and a moving sink: bit for bit what the package's own window gives."""
    assert capacity_of(Mine()) == 9 and list(sink_of(Mine())) == [0, 1, 2]
    setting = replace(SETTING, relative=relative)
    outs, streams = [], []
    for visibility in (setting.config().visibility, Mine()):
        config = replace(setting.config(), visibility=visibility)
        switch = Switch(frame=15, text=text(1), policy=policy)
        from unspool.rollout.prompts import PromptTimeline

        stream = Rollout(
            shared_network(), config, PromptTimeline(text(0), [switch]), noise=NOISE, latent_size=SIZE
        )  # fmt: skip
        outs.append(torch.cat([c.latents for c in stream], 1))
        streams.append(stream)
    assert torch.equal(*outs)
    assert streams[0].num_bytes == streams[1].num_bytes
    assert len(streams[0].history.chunks) == len(streams[1].history.chunks) < 8


def test_a_sink_that_cannot_move_is_refused_by_name() -> None:
    config = replace(SETTING.config(), visibility=Mine())
    stream = Rollout(shared_network(), config, text(0), noise=NOISE, latent_size=SIZE)
    for _ in range(5):
        stream.next_chunk()
    twin = Rollout(shared_network(), config, text(0), noise=NOISE, latent_size=SIZE)
    for _ in range(5):
        twin.next_chunk()
    with pytest.raises(ValueError, match="cannot move the sink of Mine"):
        stream.switch(text(1), policy="recache", sink="replaced")
    assert torch.equal(stream.next_chunk().latents, twin.next_chunk().latents)  # and goes on as if nothing was said
    planned = PromptTimeline(text(0), [Switch(frame=3, text=text(1), policy="recache_bidirectional")])
    with pytest.raises(ValueError, match=r"_bidirectional' at latent frame 3 .*which Mine cannot.*policy='recache'"):
        Rollout(shared_network(), config, planned, noise=NOISE, latent_size=SIZE)


def test_a_chunk_longer_than_a_users_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"capacity=9 minus sink=3"):
        replace(replace(SETTING, chunk=7, window=12).config(), visibility=Mine())


def test_a_cache_by_name_by_path_and_by_class() -> None:
    want = run(shared_network(), SETTING, text(0))
    here = f"{__name__}:Counting"
    for cache in ("kv", Counting):
        stream = Rollout(
            shared_network(), SETTING.config(), text(0), noise=NOISE, latent_size=SIZE, cache=cache
        )  # fmt: skip
        assert torch.equal(torch.cat([c.latents for c in stream], 1), want)
    assert Counting.made == 1
    with pytest.raises(ValueError, match=r"cannot be imported|known"):
        Rollout(shared_network(), SETTING.config(), text(0), noise=NOISE, latent_size=SIZE, cache=here + "s")


def test_a_snapshot_of_another_network_or_noise_is_refused() -> None:
    from tiny import make_network

    from unspool.rollout.noise import CounterNoise

    stream = make_rollout(shared_network(), SETTING, text(0))
    stream.next_chunk()
    taken = stream.snapshot()
    other = make_network(seed=5)
    with pytest.raises(ValueError, match="other weights"):
        make_rollout(other, SETTING, text(0)).restore(taken)
    with pytest.raises(ValueError, match="other noise"):
        make_rollout(shared_network(), SETTING, text(0), noise=CounterNoise(77)).restore(taken)


def test_positions_that_move_keys_do_not_drift() -> None:
    """300 chunks of a moving sink: its keys come from their first version, so the error does not grow."""
    setting = replace(SETTING, relative=True, num_frames=None, sigmas=(1.0, 0.0))
    stream = make_rollout(shared_network(), setting, text(0))
    cache: Any = stream.branches.caches[0]
    first = None
    for chunk in stream:
        if chunk.index == 3:
            n = cache.tokens_per_frame
            first = cache.entries[0].masters[:, :n].clone()
        if chunk.index == 300:
            break
    n = cache.tokens_per_frame
    assert first is not None and torch.equal(cache.entries[0].masters[:, :n], first)
    assert isinstance(cache.positions, WindowRelative) and isinstance(stream.config, RolloutConfig)


def test_marks_of_weights_reach_large_tensors() -> None:
    """A fp32 ramp rounds above 2^24 and points past the end of a 14B network's largest matrix."""
    from unspool.rollout.state import weights_mark

    class Large:
        def parameters(self) -> Any:
            yield torch.empty(3 * 5120 * 5120, dtype=torch.int8)

    assert len(weights_mark(Large())) == 16  # type: ignore[arg-type]


def test_a_switch_inside_a_prefix_is_carried_out() -> None:
    from unspool.rollout.prompts import PromptTimeline

    prefix = torch.randn(2, 6, 4, *SIZE, dtype=torch.float64)
    outs = []
    for policy in ("keep", "recache"):
        line = PromptTimeline(text(0), [Switch(frame=3, text=text(1), policy=policy)])  # type: ignore[arg-type]
        config = replace(SETTING, sink=0).config()
        stream = Rollout(shared_network(), config, line, noise=NOISE, latent_size=SIZE, prefix=prefix)
        outs.append(stream.next_chunk().latents)
    assert not torch.equal(*outs)


def test_texts_of_a_timeline_are_refused_before_any_work() -> None:
    from tiny import counted

    from unspool.rollout.prompts import PromptTimeline

    line = PromptTimeline(text(0), [Switch(frame=9, text=torch.zeros(2, 99, 8, dtype=torch.float64))])
    with counted(shared_network()) as calls, pytest.raises(ValueError, match="rows"):
        Rollout(shared_network(), SETTING.config(), line, noise=NOISE, latent_size=SIZE)
    assert calls == []
