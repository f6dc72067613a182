"""Changes of prompt that cannot be carried out are refused when they are asked for, and what a stream was given is its
own from then on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import NOISE, SIZE, Setting, make_rollout, shared_network, text

from unspool.causal.visibility import Full, Window
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout

SETTING = Setting(chunk=2, window=6, sink=2, num_frames=None)


def test_a_cache_that_cannot_recache_says_so_at_once_and_goes_on() -> None:
    config = replace(SETTING.config("none"), visibility=Window(window=6))
    streams = [Rollout(shared_network(), config, text(0), noise=NOISE, latent_size=SIZE, cache="steps") for _ in "ab"]
    for stream in streams:
        stream.next_chunk()
    with pytest.raises(ValueError, match=r"policy='recache' with the cache StepCaches.*'keep', 'flush'"):
        streams[0].switch(text(1))
    assert torch.equal(*(stream.next_chunk().latents for stream in streams))
    for stream in streams:
        stream.switch(text(1), policy="keep")
    assert torch.equal(*(stream.next_chunk().latents for stream in streams))
    planned = PromptTimeline(text(0), [Switch(frame=4, text=text(1))])
    with pytest.raises(ValueError, match="cannot compute the past again"):
        Rollout(shared_network(), config, planned, noise=NOISE, latent_size=SIZE, cache="steps")


def test_without_a_cache_a_sink_that_was_replaced_stays_within_reach() -> None:
    stream = Rollout(shared_network(), SETTING.config("recompute"), text(0), noise=NOISE, latent_size=SIZE,
                     cache="recompute")  # fmt: skip
    for number in range(16):
        if number in (5, 11):
            stream.switch(text(number), policy="recache", sink="replaced")
        assert stream.next_chunk().latents.isfinite().all()
        assert len(stream.history.chunks) <= 5  # the first, the moved and the recent ones


@pytest.mark.parametrize("planned", [False, True])
def test_a_switch_keeps_its_own_copy_of_the_text(planned: bool) -> None:
    results = []
    for spoils in (False, True):
        given = text(1)
        switches = [Switch(frame=2, text=given)] if planned else []
        stream = make_rollout(shared_network(), replace(SETTING, num_frames=6), text(0), switches)
        if not planned:
            stream.next_chunk()
            stream.switch(given)
        if spoils:
            given.zero_()
        results.append(torch.cat([chunk.latents for chunk in stream], 1)[:, -4:])
    assert torch.equal(*results)


def test_the_negative_text_is_a_copy_too() -> None:
    results = []
    for spoils in (False, True):
        negative = text(99)
        stream = make_rollout(shared_network(), replace(SETTING, scale=2.0), text(0), negative=negative)
        if spoils:
            negative.zero_()
        results.append(stream.next_chunk().latents)
    assert torch.equal(*results)


def test_one_chunk_at_a_time() -> None:
    stream = make_rollout(shared_network(), SETTING, text(0))
    passes = stream.passes()
    next(passes)
    with pytest.raises(RuntimeError, match=r"chunk 0 is being made; finish or close"):
        stream.next_chunk()
    passes.close()
    assert stream.next_chunk().index == 0


def test_a_misspelt_within_is_refused() -> None:
    for make in (lambda: Full(within="casual"), lambda: Window(window=3, within="casual")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"within='casual': expected one of 'full', 'causal', 'own', 'none'"):
            make()
    with pytest.raises(ValueError, match="commit_within='all'"):
        Window(window=3, commit_within="all")  # type: ignore[arg-type]
