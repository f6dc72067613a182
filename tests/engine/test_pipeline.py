"""Clips, streams and sessions are one thing: the same frames whichever way they are asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_model import SETTINGS, SPEC, bidirectional, pipeline, shared

from unspool.engine.pipeline import Pipeline

RED, BLUE = "a red ball bounces at sunset", "a blue star drifts left at night"


def test_session_stream_and_clip_are_the_same_frames() -> None:
    clip = shared().generate(RED, seconds=2, seed=3, switches=[(0.9, BLUE)])
    streamed = np.concatenate(list(shared().stream(RED, seconds=2, seed=3, switches=[(0.9, BLUE)])))
    session = shared().session(RED, seed=3)
    made = [session.next_chunk(), session.next_chunk()]
    assert session.set(prompt=BLUE) == pytest.approx(21 / 16)
    made += [session.next_chunk(), session.next_chunk()]
    assert clip.frames.shape == (32, 16, 32, 3) and clip.frames.dtype == np.uint8
    assert (clip.frames == streamed).all()
    assert (clip.frames == np.concatenate(made)[:32]).all()
    assert [len(chunk) for chunk in made] == [9, 12, 12, 12]


def test_the_prompt_changes_what_comes_from_its_chunk_on_and_nothing_before() -> None:
    plain = shared().generate(RED, frames=33, seed=3)
    switched = shared().generate(RED, frames=33, seed=3, switches=[(0.9, BLUE)])
    assert switched.record.events[0].chunk == 2 and switched.record.events[0].seconds == 21 / 16
    assert (plain.frames[:21] == switched.frames[:21]).all()
    assert (plain.frames[21:] != switched.frames[21:]).any()


def test_a_longer_clip_begins_with_the_shorter_one() -> None:
    short, long = shared().generate(RED, frames=5), shared().generate(RED, chunks=3)
    assert len(short) == 5 and len(long) == 33 and (short.frames == long.frames[:5]).all()


def test_seeds_samples_and_guidance_matter() -> None:
    base = shared().generate(RED, frames=9, seed=1)
    others = [
        shared().generate(RED, frames=9, seed=2),
        shared().generate(RED, frames=9, seed=1, sample=1),
        shared().generate(RED, frames=9, seed=1, guidance=1.0),
        shared().generate(RED, frames=9, seed=1, steps=3),
        shared().generate(RED, frames=9, seed=1, negative=BLUE),
    ]
    assert all((base.frames != other.frames).any() for other in others)


@pytest.mark.parametrize("policy", ["keep", "recache", "flush"])
def test_switch_policies_reach_the_rollout(policy: str) -> None:
    """The switch comes after chunk 1, because chunk 0 is the sink, which every policy keeps here."""
    clip = shared().generate(RED, chunks=3, switches=[(1.0, BLUE)], switch_policy=policy)  # type: ignore[arg-type]
    assert clip.record.events[0].policy == policy
    kept = shared().generate(RED, chunks=3, switches=[(1.0, BLUE)])
    assert (policy == "keep") == bool((clip.frames == kept.frames).all())


def test_a_smooth_transition_differs_from_a_cut_and_keeps_the_past() -> None:
    cut = shared().generate(RED, chunks=4, switches=[(0.5, BLUE)], switch_policy="keep")
    smooth = shared().generate(RED, chunks=4, switches=[(0.5, BLUE)], transition="smooth")
    timed = shared().generate(RED, chunks=4, switches=[(0.5, BLUE)], transition=3 * 12 / 16)
    assert (cut.frames != smooth.frames).any() and (smooth.frames == timed.frames).all()
    assert smooth.record.events[0].over == 3 and smooth.record.events[0].policy == "keep"
    with pytest.raises(ValueError, match="blends prompts"):
        shared().generate(RED, chunks=4, switches=[(0.5, BLUE)], transition="smooth", switch_policy="recache")
    with pytest.raises(ValueError, match="expected 'cut', 'smooth' or seconds"):
        shared().session(RED).set(prompt=BLUE, transition=-1.0)


def test_a_batch_is_its_samples_alone_up_to_rounding() -> None:
    texts = [RED, BLUE, ""]
    switches = [(0.5, [BLUE, RED, RED])]
    batch = shared().generate_many(texts, chunks=3, seed=5, switches=switches)
    for j, video in enumerate(batch):
        alone = shared().generate(texts[j], chunks=3, seed=5, sample=j, switches=[(0.5, switches[0][1][j])])
        assert np.abs(video.frames.astype(int) - alone.frames.astype(int)).max() <= 1  # of 255
        assert replace(video.record, frames_sha256="") == replace(alone.record, frames_sha256="")
    picked = shared().generate_many([BLUE], chunks=1, seed=5, samples=[1])
    assert np.abs(picked[0].frames.astype(int) - batch[1].frames[:9].astype(int)).max() <= 1


def test_a_bidirectional_model_makes_its_clip_at_once() -> None:
    teacher = bidirectional()
    clip = teacher.generate(RED, seed=1)
    assert len(clip) == 24 and clip.record.whole == 7 and clip.timing.chunks == 1
    assert (clip.frames == teacher.generate(RED, seed=1).frames).all()
    assert (clip.frames[:9] != teacher.generate(RED, frames=9, seed=1).frames).any()  # it sees the whole clip
    assert len(list(teacher.session(RED))) == 1
    for call in (
        lambda: teacher.generate(RED, frames=26),
        lambda: teacher.generate(RED, switches=[(0.5, BLUE)]),
        lambda: teacher.generate(RED, window=9),
        lambda: teacher.session(RED).set(prompt=BLUE),
    ):
        with pytest.raises(ValueError, match=r"bidirectional|at once"):
            call()


def test_a_whole_clip_equals_one_chunk_of_the_cached_rollout() -> None:
    """`NoCache` is the key/value cache with an empty past: the same frames as one causal chunk of the same length."""
    rollout = replace(SETTINGS, window="full", sink=0, positions="absolute", chunk=7)
    causal = pipeline(replace(SPEC, rollout=rollout))
    teacher = pipeline(replace(SPEC, kind="bidirectional", rollout=rollout))
    difference = causal.generate(RED, frames=25).frames.astype(int) - teacher.generate(RED, frames=25).frames
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "length",
    [
        {"seconds": 0}, {"seconds": -1.0}, {"seconds": float("nan")}, {"frames": 0}, {"frames": 2.5}, {"chunks": -2},
        {"seconds": 1.0, "frames": 3}, {"seconds": 1e6},
    ],
)  # fmt: skip
def test_impossible_lengths_are_refused(length: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        shared().generate(RED, **length)  # type: ignore[arg-type]


def test_switches_outside_the_clip_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes? effect at 1\.3125 s"):
        shared().generate(RED, seconds=1.2, switches=[(1.0, BLUE)])
    with pytest.raises(ValueError, match="at least 0"):
        shared().generate(RED, seconds=1.2, switches=[(-1.0, BLUE)])


def test_prompts_that_are_not_understood_are_reported_and_not_fatal() -> None:
    def notes(prompt: str) -> tuple[str, ...]:
        return shared().generate(prompt, frames=1).notes

    assert notes(RED) == ()
    assert "unconditional" in notes("  ")[0]
    assert "zeppelin" in notes("a red zeppelin")[0]
    assert "\N{BALLOON}" in notes("a red \N{BALLOON}")[0] and "日本" in notes("日本 ball")[0]
    long = notes("word " * 1000 + "x" * 5000)[0]
    assert len(long) < 300
    with pytest.raises(ValueError, match="expected text"):
        shared().generate(3, frames=1)  # type: ignore[arg-type]


def test_fixed_steps_of_a_distilled_model_are_kept() -> None:
    distilled = pipeline(replace(SPEC, rollout=replace(SETTINGS, shift=None)))
    with pytest.raises(ValueError, match="distilled to 2 fixed steps"):
        distilled.generate(RED, frames=1, steps=4)
    assert len(distilled.generate(RED, frames=1, steps=2)) == 1


def test_a_codec_of_another_geometry_is_noticed() -> None:
    wrong = Pipeline(
        replace(SPEC, geometry=replace(SPEC.geometry, temporal=2)),
        transformer=shared().transformer, codec=shared().codec, text=shared().wording.encoder, source="x",
    )  # fmt: skip
    with pytest.raises(ValueError, match="correct geometry in the model's description"):
        wrong.generate(RED, frames=3)


def test_what_is_not_finite_is_refused() -> None:
    broken = pipeline()
    next(iter(broken.codec.parameters())).fill_(float("nan"))  # type: ignore[attr-defined]
    broken.codec.decoder[1].weight.fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not finite"):
        broken.generate(RED, frames=1)
