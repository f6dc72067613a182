"""Given latents that start a stream, and what is refused before the network is asked for anything."""

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

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Window
from unspool.diffusion.schedule import Schedule
from unspool.rollout.noise import CounterNoise, RecordedNoise
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout

FUZZ = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SETTING = Setting(chunk=3, window=8, sink=2, num_frames=15)


def refused(match: str, *args: Any, **options: Any) -> str:
    """The message with which a rollout is refused before any forward."""
    with counted(shared_network()) as calls, pytest.raises(ValueError, match=match) as error:
        make_rollout(shared_network(), *args, **options).next_chunk()
    assert calls == []
    return str(error.value)


# ---- prefixes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["separate", "fused"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("first", [None, 1])
def test_an_extension_equals_going_on(first: int | None, relative: bool, commit: str) -> None:
    """A stream cut anywhere and started again from its own clean latents gives what it would have given."""
    setting = replace(SETTING, first=first, relative=relative, scale=2.0)
    whole = run(shared_network(), setting, text(0), commit=commit, mode="two_caches")
    for _, end in setting.bounds()[:-1]:
        rest = run(shared_network(), setting, text(0), commit=commit, mode="two_caches", prefix=whole[:, :end])
        assert_close(rest, whole[:, end:])


def test_an_extension_equals_a_rollout_without_a_cache() -> None:
    """Foreign latents, an image as the first latent frame; the prompts of the prefix follow the timeline."""
    given = torch.randn(2, 7, 4, *SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for first, count in ((1, 1), (1, 4), (1, 7), (None, 3), (None, 6)):
        for switches in ([], [Switch(frame=2, text=text(1), policy="keep", over=3)]):
            setting = replace(SETTING, first=first, sigma_commit=0.05)
            got = run(shared_network(), setting, text(0), switches, prefix=given[:, :count])
            want = reference(shared_network(), setting, text(0), switches, prefix=given[:, :count])
            assert_close(got, torch.cat(want, 1))
            assert differs(got, run(shared_network(), setting, text(0), switches)[:, count:])


def test_a_prefix_then_a_switch() -> None:
    """Given latents are recached like generated ones; chunks are numbered on from them."""
    given = torch.randn(2, 6, 4, *SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for frame in (6, 9):
        for sink in ("kept", "replaced", "recomputed"):
            switch = Switch(frame=frame, text=text(1), policy="recache", sink=sink)  # type: ignore[arg-type]
            stream = make_rollout(shared_network(), SETTING, text(0), [switch], prefix=given)
            chunks = list(stream)
            want = reference(shared_network(), SETTING, text(0), [switch], prefix=given)
            assert_close(torch.cat([c.latents for c in chunks], 1), torch.cat(want, 1))
            assert [(c.index, c.frames.start) for c in chunks] == [(2, 6), (3, 9), (4, 12)]


def test_a_prefix_of_the_whole_stream() -> None:
    given = run(shared_network(), SETTING, text(0))
    stream = make_rollout(shared_network(), SETTING, text(0), prefix=given)
    assert stream.is_finished and list(stream) == []
    with pytest.raises(ValueError, match="outside the stream of 5 chunks"):
        stream.next_chunk()


@FUZZ
@given(data=st.data())
def test_a_prefix_ends_on_a_chunk_boundary(data: st.DataObject) -> None:
    """Every other length is refused with the boundaries around it, before any forward."""
    chunk, first = data.draw(st.integers(1, 4)), data.draw(st.none() | st.integers(1, 4))
    setting = Setting(chunk=chunk, first=first, num_frames=12)
    count = data.draw(st.integers(0, 14))
    given = torch.ones(2, count, 4, *SIZE, dtype=torch.float64)
    ends = [end for _, end in setting.bounds()]
    if count in ends:
        assert make_rollout(shared_network(), setting, text(0), prefix=given).index == ends.index(count) + 1
        return
    message = refused("prefix|outside the stream", setting, text(0), prefix=given)
    if count < 12:
        nearest = [max((e for e in ends if e < count), default=0), min(e for e in ends if e > count)]
        assert all(str(e) in message for e in nearest if e)


def test_a_wrong_prefix_is_refused() -> None:
    good = torch.zeros(2, 3, 4, *SIZE, dtype=torch.float64)
    for shape in ((1, 3, 4, 2, 4), (2, 3, 5, 2, 4), (2, 3, 4, 4, 2), (2, 4, 3, 2, 4), (3, 4, 2, 4), (1, 2, 3, 4, 2, 4)):
        assert str(tuple(shape)) in refused("prefix of shape", SETTING, text(0), prefix=torch.zeros(shape))
    for value in (float("nan"), float("inf")):
        bad = good.clone()
        bad[1, 2, 3, 1, 3] = value
        refused("NaN or infinity", SETTING, text(0), prefix=bad)


# ---- texts --------------------------------------------------------------------------------------------------------


def spoiled(value: float = float("nan")) -> torch.Tensor:
    bad = text(0).clone()
    bad[1, 4, 7] = value
    return bad


def test_wrong_texts_are_refused() -> None:
    refused(r"expected .b, rows, channels.", SETTING, text(0)[0])
    refused("NaN", SETTING, spoiled())
    refused("rows", SETTING, torch.zeros(2, 6, 8, dtype=torch.float64))
    refused("of 8 channels", SETTING, torch.zeros(2, 5, 9, dtype=torch.float64))
    for wrong in (text(1)[:1], torch.zeros(2, 5, 9), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match=r"expected .(2|b), rows"):
            PromptTimeline(text(0), [Switch(frame=3, text=wrong)])
    with pytest.raises(ValueError, match="NaN"):
        Switch(frame=3, text=spoiled(float("inf")))


def test_wrong_switches_are_refused() -> None:
    for wrong, match in (
        ({"policy": "forget"}, "policy='forget'.*keep"), ({"sink": "lost"}, "sink='lost'.*kept"),
        ({"frame": -1}, "frame=-1"), ({"over": 0}, "over=0"), ({"over": 65, "policy": "keep"}, "over=65"),
        ({"over": 2}, "policy='keep'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Switch(**{"frame": 3, "text": text(1), **wrong})  # type: ignore[arg-type]


def test_a_switch_added_late_takes_its_place_in_time() -> None:
    later = Switch(frame=6, text=text(1))
    earlier = replace(later, frame=3, text=text(2))
    shuffled = make_rollout(shared_network(), SETTING, text(0), [later, earlier])
    ordered = make_rollout(shared_network(), SETTING, text(0), [earlier, later])
    for a, b in zip(shuffled, ordered, strict=True):
        assert torch.equal(a.latents, b.latents) and a.prompt == b.prompt


def test_a_refused_live_switch_changes_nothing() -> None:
    """What `switch` refuses at once leaves the stream as it was."""
    stream = make_rollout(shared_network(), SETTING, text(0))
    first = stream.next_chunk().latents
    for wrong in (text(1)[:1], spoiled(), torch.zeros(2, 5, 9)):
        with pytest.raises(ValueError):
            stream.switch(wrong)
    with pytest.raises(ValueError):
        stream.switch(text(1), policy="forget")
    got = torch.cat([first, *(c.latents for c in stream)], 1)
    assert torch.equal(got, run(shared_network(), SETTING, text(0)))


def test_a_live_switch_to_too_long_a_text_is_refused_at_once() -> None:
    stream = make_rollout(shared_network(), SETTING, text(0))
    stream.next_chunk()
    with pytest.raises(ValueError, match="rows"):
        stream.switch(torch.zeros(2, 6, 8, dtype=torch.float64))
    assert stream.next_chunk().prompt == 0


def test_guidance_needs_a_negative_text() -> None:
    refused("negative", replace(SETTING, scale=2.0), text(0), negative=None)
    refused("NaN", replace(SETTING, scale=2.0), text(0), negative=spoiled())
    refused("negative text of 1 samples", replace(SETTING, scale=2.0), text(0), negative=text(9)[:1])


def test_a_negative_text_of_another_batch_is_refused_before_any_forward() -> None:
    refused("negative text", replace(SETTING, scale=2.0), text(0), negative=text(9)[:1], mode="two_caches")


# ---- settings -----------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_are_refused() -> None:
    for wrong, match in (
        ({"chunk": 7, "window": 8, "sink": 2}, "chunk of 7 latent frames is longer than window=8"),
        ({"first": 7}, "chunk of 7"), ({"window": 2, "sink": 2}, "no room beside sink=2"),
        ({"sigma_commit": 1.5}, "sigma_commit=1.5"), ({"sigma_commit": float("nan")}, "sigma_commit"),
        ({"chunk": 0}, "chunk=0"), ({"num_frames": 0}, "num_frames=0"), ({"scale": -1.0}, "scale"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            replace(SETTING, **wrong).config()
    with pytest.raises(ValueError, match="commit='never'"):
        SETTING.config("never")


@pytest.mark.parametrize("size", [(3, 4), (2, 5), (0, 4), (2, -2)])
def test_a_latent_size_off_the_patch_grid_is_refused(size: tuple[int, int]) -> None:
    with counted(shared_network()) as calls, pytest.raises(ValueError, match="multiples of the patch"):
        Rollout(shared_network(), SETTING.config(), text(0), noise=NOISE, latent_size=size)
    assert calls == []


def test_noise_that_does_not_fit_is_refused() -> None:
    """Too few recorded frames, steps or samples: refused by the source, before the forward that would need it."""
    draw = torch.Generator().manual_seed(1)
    full = torch.randn(2, 15, 4, *SIZE, generator=draw, dtype=torch.float64)
    for source in (RecordedNoise(full[:1]), RecordedNoise(full[:, :2]), CounterNoise(1, sample_ids=(1, 2, 3))):
        refused("got", SETTING, text(0), noise=source)


def test_a_schedule_that_starts_below_1_is_refused() -> None:
    assert "input video" in refused("starts at sigma 0.9", replace(SETTING, sigmas=(0.9, 0.0)), text(0))


def test_a_schedule_that_starts_below_1_is_refused_before_any_forward() -> None:
    """A prefix is committed first; a bad schedule of the later chunks is found after chunk 0."""
    good = torch.zeros(2, 3, 4, *SIZE, dtype=torch.float64)
    refused("starts at sigma 0.9", replace(SETTING, sigmas=(0.9, 0.0)), text(0), prefix=good)
    refused("starts at sigma 0.9", replace(SETTING, sigmas=(0.9, 0.0), first_sigmas=(1.0, 0.0)), text(0))


def test_a_sink_longer_than_the_stream() -> None:
    """A short clip from a model with a long sink: 3 latent frames, sink 4."""
    setting = Setting(chunk=3, window=9, sink=4, num_frames=3)
    assert_close(run(shared_network(), setting, text(0)), torch.cat(reference(shared_network(), setting, text(0)), 1))


def test_a_stream_has_an_end() -> None:
    stream = make_rollout(shared_network(), SETTING, text(0))
    assert len(list(stream)) == 5
    for _ in range(2):
        with pytest.raises(ValueError, match="chunk 5 is outside the stream of 5 chunks"):
            stream.next_chunk()


def test_a_config_is_a_value() -> None:
    """Fingerprints tell settings apart and do not change from one object to the next."""
    assert SETTING.config().fingerprint == replace(SETTING).config().fingerprint
    others = [
        replace(SETTING.config(), plan=ChunkPlan(chunk=3, num_frames=16)),
        replace(SETTING.config(), visibility=Window(window=8, sink=3)),
        replace(SETTING.config(), visibility=Window(window=8, sink=2, commit_window=7)),
        replace(SETTING.config(), schedule=Schedule((1.0, 0.8, 0.0), (1.0, 0.79))),
        replace(SETTING.config(), commit="fused"),
    ]
    assert len({SETTING.config().fingerprint, *(c.fingerprint for c in others)}) == 6
