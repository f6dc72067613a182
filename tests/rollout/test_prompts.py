"""Prompts over time: which chunk follows which text, how texts blend, and that old ones are forgotten."""

from __future__ import annotations

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
    counted,
    differs,
    make_rollout,
    reference,
    run,
    shared_network,
    text,
)
from torch import Tensor

from unspool.rollout.prompts import MAX_BLEND, PromptTimeline, Switch
from unspool.rollout.rollout import Rollout

FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SETTING = Setting(window=5, sink=1, num_frames=12)


def timeline(*switches: Switch) -> PromptTimeline:
    return PromptTimeline(text(0), list(switches))


def keep(frame: int, number: int = 1, **how: Any) -> Switch:
    return Switch(frame=frame, text=text(number), policy="keep", **how)


def texts_of(line: PromptTimeline, starts: list[int]) -> list[Tensor]:
    """Text of every chunk of a stream with these starts, pruned on the way as a rollout does it."""
    seen: list[Tensor] = []
    for count in range(1, len(starts) + 1):
        seen.append(line.moment(starts[:count][-MAX_BLEND - 1 :], seen[-1] if seen else None).text)
        line.prune(starts[count - 1])
    return seen


# ---- when a switch takes effect -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [0, 1, 2, 3, 4, 5, 6])
def test_a_switch_takes_effect_at_the_next_chunk_start(frame: int) -> None:
    """Chunks of 3 start at 0, 3, 6...: a switch inside a chunk waits for its end."""
    first = -(-frame // 3)
    chunks = list(make_rollout(shared_network(), Setting(chunk=3, num_frames=9), text(0), [keep(frame)]))
    assert [c.prompt for c in chunks] == [int(i >= first) for i in range(3)]
    assert [c.switched for c in chunks] == [i == first for i in range(3)]
    plain = run(shared_network(), Setting(chunk=3, num_frames=9), text(0))
    got = torch.cat([c.latents for c in chunks], 1)
    assert torch.equal(got[:, : 3 * first], plain[:, : 3 * first])
    assert differs(got[:, 3 * first :], plain[:, 3 * first :])


@pytest.mark.parametrize("policy", ["keep", "recache", "recache_bidirectional", "flush"])
def test_a_switch_at_frame_0_is_the_first_prompt(policy: Any) -> None:
    """Nothing has been written: no policy has anything to do, and no forward is spent."""
    with counted(shared_network()) as calls:
        got = run(shared_network(), SETTING, text(0), [Switch(frame=0, text=text(1), policy=policy)])
    assert len(calls) == 6 * 2 + 5
    assert torch.equal(got, run(shared_network(), SETTING, text(1)))


@pytest.mark.parametrize("policy", ["keep", "recache", "flush"])
def test_a_switch_after_the_end_does_nothing(policy: Any) -> None:
    late = Switch(frame=100, text=text(1), policy=policy)
    assert torch.equal(run(shared_network(), SETTING, text(0), [late]), run(shared_network(), SETTING, text(0)))


def test_a_switch_in_the_last_chunk_is_refused() -> None:
    """While it is made as when it is there."""
    stream = make_rollout(shared_network(), SETTING, text(0))
    count = stream.config.plan.num_chunks
    assert count is not None
    for _ in range(count - 1):
        stream.next_chunk()
    for _ in stream.passes():
        with pytest.raises(ValueError, match=f"in chunk {count - 1}, the last one"):
            stream.switch(text(1))
    with pytest.raises(ValueError, match=f"in chunk {count - 1}, the last one"):
        stream.switch(text(1))


@pytest.mark.parametrize("policy", ["keep", "recache", "flush"])
def test_a_live_switch_equals_a_planned_one(policy: Any) -> None:
    """`switch()` between two chunks is a switch at the next chunk's first frame; an earlier frame is refused."""
    planned = run(shared_network(), SETTING, text(0), [Switch(frame=6, text=text(1), policy=policy)])
    for frame in (None, 6):
        stream = make_rollout(shared_network(), SETTING, text(0))
        parts = [stream.next_chunk().latents for _ in range(3)]
        with pytest.raises(ValueError, match="frame=2 is already made; expected a latent frame from 6 on"):
            stream.switch(text(1), frame=2, policy=policy)
        assert stream.switch(text(1), frame=frame, policy=policy).frame == 6
        assert torch.equal(torch.cat([*parts, *(c.latents for c in stream)], 1), planned)


@pytest.mark.parametrize("policy", ["keep", "recache", "flush"])
def test_a_switch_between_two_passes_is_the_next_chunks(policy: Any) -> None:
    """With its policy: the chunk that is being made has begun under the old prompt."""
    planned = run(shared_network(), SETTING, text(0), [Switch(frame=6, text=text(1), policy=policy)])
    stream = make_rollout(shared_network(), SETTING, text(0))
    chunks = [stream.next_chunk() for _ in range(2)]
    passes = stream.passes()
    next(passes)
    with pytest.raises(ValueError, match="frame=4 is already made; expected a latent frame from 6 on"):
        stream.switch(text(1), frame=4)
    assert stream.switch(text(1), policy=policy).frame == 6
    while len(chunks) == 2:
        try:
            next(passes)
        except StopIteration as end:
            chunks.append(end.value)
    chunks += stream
    assert [c.switched for c in chunks] == [i == 3 for i in range(6)]
    assert torch.equal(torch.cat([c.latents for c in chunks], 1), planned)


def test_switches_in_one_chunk() -> None:
    """Of several switches that fall between two chunk starts the last one's text counts, and every one is numbered."""
    switches = [keep(1, 1), keep(1, 2), keep(2, 3)]
    chunks = list(make_rollout(shared_network(), SETTING, text(0), switches))
    assert [c.prompt for c in chunks] == [0, 3, 3, 3, 3, 3]
    want = run(shared_network(), SETTING, text(0), [keep(2, 3)])
    assert torch.equal(torch.cat([c.latents for c in chunks], 1), want)


def test_a_flush_is_not_lost_to_a_later_switch() -> None:
    """The user asks to forget the past, then corrects the prompt before the next chunk: the past is still read."""
    flush = Switch(frame=5, text=text(2), policy="flush")
    want = run(shared_network(), SETTING, text(0), [replace(flush, frame=6, text=text(1))])
    assert_close(run(shared_network(), SETTING, text(0), [flush, keep(6, 1)]), want)


def test_one_timeline_may_serve_two_rollouts() -> None:
    """A PromptTimeline is handed over like a text; a second rollout over it must see the same prompts."""
    line = timeline(keep(2, 1), keep(4, 2), keep(6, 3), keep(8, 4))
    got = []
    for _ in range(2):
        stream = Rollout(shared_network(), SETTING.config(), line, noise=NOISE, latent_size=SIZE)
        got.append(torch.cat([c.latents for c in stream], 1))
    assert torch.equal(*got)


# ---- blending -----------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
def test_a_blend_is_linear_over_its_chunks(data: st.DataObject) -> None:
    """Chunk k of n after a switch follows old + k / n (new - old), the n-th and all later ones exactly the new text."""
    size, over = data.draw(st.integers(1, 4)), data.draw(st.integers(1, MAX_BLEND))
    frame = data.draw(st.integers(0, 20))
    starts = [i * size for i in range(-(-frame // size) + over + 3)]
    seen = texts_of(timeline(keep(frame, over=over)), starts)
    begun = -(-frame // size)
    for number, got in enumerate(seen):
        done = number - begun + 1
        if done <= 0:
            assert torch.equal(got, text(0))
        elif done >= over:
            assert torch.equal(got, text(1))
        else:
            assert_close(got, (1 - done / over) * text(0) + done / over * text(1), 1e-12)


@pytest.mark.parametrize("commit", ["separate", "fused"])
def test_a_blend_in_a_rollout(commit: str) -> None:
    """Against the rollout without a cache; texts of another number of rows are padded with zeros."""
    short = Switch(frame=3, text=text(1, rows=2), policy="keep", over=3)
    for switch in (keep(3, over=3), short):
        got = run(shared_network(), SETTING, text(0), [switch], commit=commit)
        assert_close(got, torch.cat(reference(shared_network(), SETTING, text(0), [switch]), 1))


def test_a_blend_equals_switches_to_the_blended_texts() -> None:
    blend = run(shared_network(), SETTING, text(0), [keep(4, over=4)])
    steps = [Switch(frame=4 + 2 * i, text=torch.lerp(text(0), text(1), (i + 1) / 4), policy="keep") for i in range(4)]
    assert_close(blend, run(shared_network(), SETTING, text(0), steps))


@FUZZ
@given(first=st.integers(1, 5), second=st.integers(1, 5), gap=st.integers(1, 6))
def test_a_switch_in_the_middle_of_a_blend(first: int, second: int, gap: int) -> None:
    """It takes over at once, stays within the texts it goes between, and ends exactly at the newest."""
    line = timeline(keep(2, 1, over=first), keep(2 + gap, 2, over=second))
    seen = texts_of(line, list(range(2 + gap + second + 2)))
    for got in seen[2 + gap :]:
        every = torch.stack([text(i) for i in range(3)])
        assert bool((got >= every.amin(0) - 1e-12).all()) and bool((got <= every.amax(0) + 1e-12).all())
    assert torch.equal(seen[2 + gap + second - 1], text(2))
    assert torch.equal(seen[-1], text(2))


def test_a_switch_in_the_middle_of_a_blend_does_not_jump() -> None:
    """After 1 of 10 chunks towards text 1, a blend of 10 towards text 2 must not pass through 0.9 of text 1."""
    seen = texts_of(timeline(keep(1, 1, over=10), keep(2, 2, over=10)), list(range(5)))
    far = (text(1) - text(0)).abs().max()
    assert (seen[2] - seen[1]).abs().max() <= 0.3 * far


# ---- a long stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
def test_many_switches_keep_texts_bounded(every: int) -> None:
    """200 switches of all policies: two texts and the switches between them stay, and prompts are numbered on."""
    setting = Setting(chunk=2, num_frames=None, window=5, sink=1, relative=True, sigmas=(1.0, 0.0))
    stream = make_rollout(shared_network(), setting, text(0, 1))
    policies = ("keep", "recache", "flush", "recache_bidirectional")
    latents, sizes = [], set()
    for index in range(200):
        if index % every == 0:
            stream.switch(text(index % 7, 1), policy=policies[index // every % 4])
        chunk = stream.next_chunk()
        assert chunk.prompt == index // every + 1
        assert len(stream.timeline.switches) <= 2
        latents.append(chunk.latents)
        sizes.add(stream.branches.num_bytes)
    assert torch.stack(latents).isfinite().all() and len(sizes) == 1
    assert stream.timeline.pruned == 200 // every - 2 + (200 % every > 0)
    assert len(stream.branches._prepared) <= 2
    with pytest.raises(ValueError, match="forgotten"):
        stream.timeline.text(0)


def test_texts_that_are_still_due_are_kept() -> None:
    """Pruning forgets neither planned switches nor the text from which a blend comes."""
    line = timeline(*(keep(i, i, over=4) for i in range(1, 6)), keep(50, 6))
    seen = texts_of(line, list(range(12)))
    assert [s.frame for s in line.switches][-1] == 50 and len(line.switches) == 3
    assert torch.equal(seen[-1], text(5))
    assert torch.equal(line.text(line.pruned + 3), text(6))


def test_pruning_changes_nothing() -> None:
    """The same stream with a timeline that never forgets, bit for bit; blends cross the prunes."""
    switches = [keep(i, i % 5, over=1 + i % 4) for i in range(1, 24, 3)]
    setting = Setting(num_frames=24, window=5, sink=1)
    got = run(shared_network(), setting, text(0), switches, commit="fused")
    stream = make_rollout(shared_network(), setting, text(0), switches, commit="fused")
    stream.timeline.prune = lambda start: None  # type: ignore[method-assign]
    chunks = list(stream)
    assert torch.equal(torch.cat([c.latents for c in chunks], 1), got)
    assert [c.prompt for c in chunks] == [sum(s.frame <= c.frames.start for s in switches) for c in chunks]


def test_a_timeline_survives_its_snapshot() -> None:
    line = timeline(*(keep(i, i, over=2) for i in range(1, 6)), Switch(frame=9, text=text(6), sink="replaced"))
    texts_of(line, list(range(6)))
    again = PromptTimeline.restored(line.snapshot())
    assert again.pruned == line.pruned
    for starts in ([4, 5], [4, 5, 6], [5, 6, 7, 8, 9]):
        a, b = line.moment(starts), again.moment(starts)
        assert (a.prompt, a.weight, len(a.begins)) == (b.prompt, b.weight, len(b.begins))
        assert torch.equal(a.text, b.text)
    assert [(s.frame, s.policy, s.sink, s.over) for s in again.switches] == [
        (s.frame, s.policy, s.sink, s.over) for s in line.switches
    ]
