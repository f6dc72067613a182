"""Prompt switches that treat the past: recaches and flushes against a rollout without a cache, and their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import (
    NOISE,
    SIZE,
    Setting,
    assert_close,
    cached,
    counted,
    differs,
    make_rollout,
    reference,
    run,
    shared_network,
    text,
)
from torch import Tensor

from unspool.causal.visibility import Window
from unspool.rollout.prompts import Switch
from unspool.rollout.rollout import Rollout

FUZZ = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SINKS = ("kept", "replaced", "recomputed")


def recache(frame: int, number: int = 1, sink: Any = "kept", batch: int = 2) -> Switch:
    return Switch(frame=frame, text=text(number, batch), policy="recache", sink=sink)


def flush(frame: int, number: int = 1, batch: int = 2) -> Switch:
    return Switch(frame=frame, text=text(number, batch), policy="flush")


def check(setting: Setting, switches: Sequence[Switch], **options: Any) -> Tensor:
    got = run(shared_network(), setting, text(0), switches, **options)
    assert_close(got, torch.cat(reference(shared_network(), setting, text(0), switches), 1))
    return got


def keys_after(setting: Setting, switch: Switch, prompt: Tensor | None = None) -> dict[int, list[Tensor]]:
    """Keys and values of the cache once the chunk that begins with the switch is made."""
    stream = make_rollout(shared_network(), setting, text(0) if prompt is None else prompt, [switch])
    while stream.next_chunk().frames.start < switch.frame:
        pass
    return cached(stream.branches.caches[0])


def apart(a: dict[int, list[Tensor]], b: dict[int, list[Tensor]], frames: Sequence[int] | None = None) -> float:
    assert set(a) == set(b) or frames is not None
    chosen = sorted(a) if frames is None else frames
    return max((x - y).abs().max().item() for f in chosen for x, y in zip(a[f], b[f], strict=True))


# ---- under an unchanged prompt ------------------------------------------------------------------------------------

REACHING = {
    "aligned": Setting(chunk=3, window=9, sink=3, num_frames=12),
    "no sink": Setting(chunk=3, window=9, num_frames=12),
    "sink off the chunk grid": Setting(chunk=3, window=9, sink=4, num_frames=12),
    "sink longer than a chunk": Setting(chunk=2, window=8, sink=5, num_frames=12),
    "sink longer than the past": Setting(chunk=3, window=15, sink=8, num_frames=12),
    "window cuts a chunk": Setting(chunk=3, window=8, sink=1, num_frames=12),
    "first 1": Setting(chunk=3, first=1, window=9, sink=2, num_frames=13),
    "full": Setting(chunk=3, num_frames=12),
    "commit level": Setting(chunk=3, window=9, sink=3, num_frames=12, sigma_commit=0.2),
}


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("name", REACHING)
def test_an_unchanged_prompt_reproduces_the_cache(name: str, sink: str) -> None:
    """Window reaching frame 0: keys and values of every frame as they were, fp64 1e-10, and so is what follows."""
    setting = REACHING[name]
    for frame in (3, 6, 8):
        again = replace(recache(frame, 0), sink=sink)  # type: ignore[arg-type]
        start = next(a for a, _ in setting.bounds() if a >= frame)
        if setting.window is not None and start > setting.window:
            continue
        plain = replace(again, policy="keep")
        assert apart(keys_after(setting, again), keys_after(setting, plain)) <= 1e-10
        if sink != "replaced":  # whose sink would go on to differ where none was replaced
            assert_close(run(shared_network(), setting, text(0), [again]), run(shared_network(), setting, text(0)))


@pytest.mark.parametrize("relative", [False, True])
def test_an_unchanged_prompt_changes_nothing_later(relative: bool) -> None:
    """With guidance in two caches and positions that move, too; switching twice as well."""
    setting = Setting(chunk=2, window=8, sink=2, num_frames=16, relative=relative, scale=2.0)
    plain = run(shared_network(), setting, text(0), mode="two_caches")
    for sink in ("kept", "recomputed"):
        twice: Any = [recache(5, 0, sink), recache(8, 0, sink)]
        assert_close(run(shared_network(), setting, text(0), twice, mode="two_caches"), plain)


@pytest.mark.parametrize("name", ["aligned", "no sink", "full"])
def test_the_bidirectional_form_does_not_reproduce_it(name: str) -> None:
    """Frames of the past that see their future get other keys even under the same prompt."""
    setting = REACHING[name]
    again = replace(recache(6, 0), policy="recache_bidirectional")
    assert apart(keys_after(setting, again), keys_after(setting, replace(again, policy="keep"))) > 1e-3
    assert differs(run(shared_network(), setting, text(0), [again]), run(shared_network(), setting, text(0)))


# ---- against a rollout without a cache ----------------------------------------------------------------------------

ONE = (1.0, 0.0)
PASSING = {
    "aligned": Setting(chunk=3, window=9, sink=3, num_frames=20),
    "relative": Setting(chunk=3, window=9, sink=3, num_frames=20, relative=True, sigmas=ONE),
    "no sink": Setting(chunk=2, window=6, num_frames=20, sigmas=ONE),
    "off the chunk grid": Setting(chunk=3, window=8, sink=2, num_frames=20, sigmas=ONE),
    "off the chunk grid, relative": Setting(chunk=3, window=10, sink=4, num_frames=20, relative=True, sigmas=ONE),
    "first 1": Setting(chunk=3, first=1, window=7, sink=1, num_frames=19, sigmas=ONE),
    "chunk 1": Setting(chunk=1, window=4, sink=1, num_frames=14, sigmas=ONE),
    "guided": Setting(chunk=2, window=6, sink=2, num_frames=14, scale=2.0, relative=True),
    "full": Setting(chunk=2, num_frames=14),
    "full, relative": Setting(chunk=2, num_frames=14, relative=True, sigmas=ONE),
}


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("name", PASSING)
def test_recaches_equal_a_rollout_without_a_cache(name: str, sink: str) -> None:
    """Two switches, the second one after frame 0 has left the window."""
    switches = [recache(5, 1, sink), recache(11, 2, sink)]
    got = check(PASSING[name], switches)
    assert_close(run(shared_network(), PASSING[name], text(0), switches, commit="fused", mode="two_caches"), got)
    kept = [replace(s, policy="keep", sink="kept") for s in switches]
    assert differs(got, run(shared_network(), PASSING[name], text(0), kept))


@FUZZ
@given(data=st.data())
def test_any_recache_equals_a_rollout_without_a_cache(data: st.DataObject) -> None:
    """Sizes, sink policies and moments drawn at random, half of them after a flush."""
    chunk, first = data.draw(st.integers(1, 4)), data.draw(st.none() | st.integers(1, 4))
    sink = data.draw(st.integers(0, 5))
    window = max(chunk, first or 0) + sink + data.draw(st.integers(0, 6))
    setting = Setting(
        chunk=chunk, first=first, num_frames=14, window=window, sink=sink, sigmas=(1.0, 0.0),
        relative=data.draw(st.booleans()),
    )  # fmt: skip
    marks = sorted(data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    sinks = data.draw(st.lists(st.sampled_from(SINKS), min_size=3, max_size=3))
    switches = [recache(f, i + 1, s) for i, (f, s) in enumerate(zip(marks, sinks, strict=False))]
    if data.draw(st.booleans()):
        switches[0] = flush(marks[0])
    check(setting, switches, commit=data.draw(st.sampled_from(["separate", "fused"])))


@pytest.mark.parametrize("frame", [1, 3, 4, 6])
def test_a_recomputed_sink_is_that_of_a_fresh_prefill(frame: int) -> None:
    """The same latents committed under the new prompt from the start give the same keys and values."""
    for setting in (REACHING["aligned"], REACHING["sink off the chunk grid"], REACHING["full"]):
        plain = run(shared_network(), setting, text(0))
        start = next(a for a, _ in setting.bounds() if a >= frame)
        got = keys_after(setting, recache(frame, 1, "recomputed"))
        fresh = make_rollout(shared_network(), setting, text(1), prefix=plain[:, :start])
        want = cached(fresh.branches.caches[0])
        assert set(range(min(start, setting.sink))) <= set(got) <= set(want)
        assert apart(got, want, sorted(got)) <= 1e-10
        assert apart(got, keys_after(setting, replace(recache(frame, 1), policy="keep"))) > 1e-3


def test_a_recomputed_sink_comes_from_the_true_first_frames() -> None:
    """Long after frame 0 left the window, and after the sink had been replaced."""
    setting = Setting(chunk=3, window=9, sink=4, num_frames=30)
    plain = run(shared_network(), setting, text(0), [recache(12, 1, "replaced")])
    stream = make_rollout(
        shared_network(), setting, text(0), [recache(12, 1, "replaced"), recache(21, 2, "recomputed")]
    )
    while stream.next_chunk().frames.start < 21:
        pass
    got = cached(stream.branches.caches[0])
    fresh = make_rollout(shared_network(), setting, text(2), prefix=plain[:, :6])
    want = cached(fresh.branches.caches[0])
    assert apart(got, want, [0, 1, 2, 3]) <= 1e-10
    check(setting, [recache(12, 1, "replaced"), recache(21, 2, "recomputed")])


def test_a_replaced_sink_is_the_oldest_recached_frames() -> None:
    setting = replace(PASSING["aligned"], num_frames=24)
    stream = make_rollout(shared_network(), setting, text(0), [recache(14, 1, "replaced")])
    while stream.next_chunk().frames.start < 18:
        pass
    stream.finish()
    assert stream.branches.caches[0].frames.intervals == ((6, 9), (15, 21))


def test_a_recache_is_one_forward() -> None:
    stream = make_rollout(shared_network(), PASSING["aligned"], text(0), [recache(12)])
    for _ in range(4):
        stream.next_chunk()
    with counted(shared_network()) as calls:
        stream.next_chunk()
    assert calls == [3, 6, 3, 3]  # the commit that was due, the recache, two steps


@pytest.mark.parametrize("count", [3, 7])
def test_many_recaches(count: int) -> None:
    """One at every chunk, sinks mixed: still the rollout without a cache."""
    switches = [recache(3 * i, i, SINKS[i % 3]) for i in range(1, count + 1)]
    check(PASSING["off the chunk grid, relative"], switches)


def test_a_recache_keeps_what_the_commit_reads() -> None:
    """A commit that reaches further back than a denoise finds its frames gone after a switch."""
    config = replace(Setting(num_frames=20).config(), visibility=Window(window=4, commit_window=10))
    stream = Rollout(shared_network(), config, text(0), noise=NOISE, latent_size=SIZE)
    for chunk in stream:
        if chunk.index == 5:
            stream.switch(text(1), policy="recache")


# ---- flush --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [0, 2, 3])
def test_a_flush_keeps_the_sink_and_the_last_latent_frame(sink: int) -> None:
    setting = Setting(chunk=3, window=9, sink=sink, num_frames=30)
    stream = make_rollout(shared_network(), setting, text(0), [flush(15)])
    while stream.next_chunk().frames.start < 15:
        pass
    assert list(stream.branches.caches[0].frames) == [*range(sink), 14]
    stream.next_chunk()
    assert list(stream.branches.caches[0].frames) == [*range(sink), *range(max(14, 21 - 9 + sink), 18)]


@pytest.mark.parametrize("commit", ["separate", "fused"])
@pytest.mark.parametrize("name", PASSING)
def test_flushes_equal_a_rollout_without_a_cache(name: str, commit: str) -> None:
    """Absolute and relative positions, early and late, twice, guided in two caches."""
    got = check(PASSING[name], [flush(3, 1), flush(11, 2)], commit=commit, mode="two_caches")
    kept = [replace(s, policy="keep") for s in (flush(3, 1), flush(11, 2))]
    assert differs(got, run(shared_network(), PASSING[name], text(0), kept))


@pytest.mark.parametrize("name", PASSING)
def test_a_recache_after_a_flush(name: str) -> None:
    """What was forgotten stays so: the recache computes the sink's rest and what came since, and nothing older."""
    check(PASSING[name], [flush(6, 1), recache(10, 2)])
    check(PASSING[name], [recache(6, 1), flush(10, 2), recache(11, 3)])


def test_a_flush_after_a_replaced_sink() -> None:
    check(PASSING["aligned"], [recache(12, 1, "replaced"), flush(18, 2)])
    check(PASSING["relative"], [recache(12, 1, "replaced"), flush(15, 2), flush(18, 3)])


@pytest.mark.parametrize("switches", [
    (flush(6, 1), recache(9, 2, "replaced")),  # a window that reaches frame 0: the next chunk raised
    (flush(12, 1), recache(15, 2, "replaced")),  # the new sink was placed before the flush, where nothing is read
    (recache(12, 1, "replaced"), flush(15, 2), recache(18, 3, "recomputed")),  # the recomputed sink stayed hidden
], ids=["early", "late", "recomputed"])  # fmt: skip
def test_another_sink_after_a_flush(switches: Sequence[Switch]) -> None:
    """A replaced sink is the oldest recached frames, those since the flush; a recomputed one is read again."""
    check(PASSING["aligned"], switches)


def test_the_bidirectional_form_after_a_flush() -> None:
    """It replaces the sink where the window reaches frame 0, and every chunk after it raised."""
    again = replace(recache(9, 2), policy="recache_bidirectional")
    assert run(shared_network(), PASSING["aligned"], text(0), [flush(6, 1), again]).isfinite().all()


def test_policies_differ() -> None:
    """Every policy and sink does something of its own."""
    setting, outs = PASSING["aligned"], []
    for sink in SINKS:
        outs.append(run(shared_network(), setting, text(0), [recache(15, 1, sink)]))
    for policy in ("keep", "flush", "recache_bidirectional"):
        switch = Switch(frame=15, text=text(1), policy=policy)  # type: ignore[arg-type]
        outs.append(run(shared_network(), setting, text(0), [switch]))
    for i, a in enumerate(outs):
        assert all(differs(a[:, 15:], b[:, 15:]) for b in outs[:i])
        assert torch.equal(a[:, :15], outs[0][:, :15])
