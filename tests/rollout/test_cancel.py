"""Chunks that are cancelled between two passes and asked for again: what comes then is bitwise the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_snapshot import GUIDED, RELATIVE, SCENARIOS, THIRD, WINDOW, Scenario, switch
from tiny import Setting, counted, differs, shared_network, text
from torch import Tensor

from unspool.causal.cache.snapshot import Snapshot
from unspool.rollout.rollout import Cancelled, Rollout

CANCELLED = {
    "separate": Scenario(setting=WINDOW, switches=[switch(4, 1, "keep")]),
    "no commits": Scenario(setting=RELATIVE, options={"commit": "none"}),
    "two caches": Scenario(setting=GUIDED, options={"mode": "two_caches"}),
    "recache": Scenario(setting=THIRD, switches=[switch(9, 1, "recache")]),
    "recache, sink replaced": Scenario(setting=THIRD, switches=[switch(9, 1, "recache", sink="replaced")]),
    "recache, sink recomputed": Scenario(setting=THIRD, switches=[switch(9, 1, "recache", sink="recomputed")]),
    "recache, published": Scenario(setting=THIRD, switches=[switch(12, 1, "recache_bidirectional")]),
    "flush": Scenario(setting=THIRD, switches=[switch(9, 1, "flush")]),
    "full": Scenario(setting=Setting(num_frames=40), switches=[switch(4, 1, "keep")]),
}


def with_cancels(scenario: Scenario, at: Callable[[int], bool], chunks: int = 5) -> tuple[Tensor, int, int]:
    """Latents, how often `cancel` was asked and said yes; every cancelled chunk is asked for again."""
    asked, cancelled = 0, 0

    def cancel() -> bool:
        nonlocal asked
        asked += 1
        return at(asked - 1)

    stream, parts = scenario.rollout(cancel=cancel), []
    while len(parts) < chunks:
        try:
            parts.append(stream.next_chunk().latents)
        except Cancelled:
            cancelled += 1
    return torch.cat(parts, 1), asked, cancelled


def cancelled_at(scenario: Scenario, index: int) -> tuple[Rollout, list[Tensor]]:
    """A stream that was cancelled once, at the question with this index, and the chunks before."""
    count = iter(range(10**6))
    stream, parts = scenario.rollout(cancel=lambda: next(count) == index), list[Tensor]()
    while True:
        try:
            parts.append(stream.next_chunk().latents)
        except Cancelled:
            return stream, parts


def every_cancel(scenario: Scenario) -> list[tuple[Tensor, Tensor]]:
    want, asked, _ = with_cancels(scenario, lambda at: False)
    results = []
    for index in range(asked):
        got, _, cancelled = with_cancels(scenario, lambda at, index=index: at == index)  # type: ignore[misc]
        assert cancelled == 1
        results.append((got, want))
    return results


@pytest.mark.parametrize("name", CANCELLED)
def test_a_cancelled_chunk_can_be_asked_for_again(name: str) -> None:
    """At every pass: a denoising step, a commit, the recache of a switch. What comes then is bitwise the same."""
    for got, want in every_cancel(CANCELLED[name]):
        assert torch.equal(got, want)


def test_a_cancelled_recache_of_everything() -> None:
    """The retry recached what the cache still held, which was nothing."""
    for got, want in every_cancel(Scenario(setting=Setting(num_frames=40), switches=[switch(4, 1, "recache")])):
        assert torch.equal(got, want)


@pytest.mark.parametrize("scenario", [
    Scenario(setting=RELATIVE, options={"commit": "fused"}), SCENARIOS["in mid-blend, fused"],
    Scenario(setting=THIRD, switches=[switch(9, 1, "recache")], options={"commit": "fused"}),
], ids=["plain", "blend", "recache"])  # fmt: skip
def test_a_cancelled_fused_chunk(scenario: Scenario) -> None:
    """A commit that went through with the first step is not repeated, and the step gives what it gave with it."""
    for got, want in every_cancel(scenario):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CANCELLED)
def test_cancelled_again_and_again(name: str) -> None:
    """One question of seven is answered yes, all along the stream; cancelled at once, no forward runs."""
    scenario = CANCELLED[name]
    with counted(shared_network()) as calls:
        want, asked, _ = with_cancels(scenario, lambda at: False)
        plain = len(calls)
    with pytest.raises(Cancelled, match="chunk 0"):
        scenario.rollout(cancel=lambda: True).next_chunk()
    with counted(shared_network()) as calls, pytest.raises(Cancelled):
        scenario.rollout(cancel=lambda: True).next_chunk()
    assert calls == [] and plain >= asked
    seen: set[int] = set()
    got, _, cancelled = with_cancels(scenario, lambda at: at % 7 == 3 and not seen.add(at))  # type: ignore[func-returns-value]
    assert cancelled > 1 and torch.equal(got, want)


def test_a_snapshot_between_a_cancel_and_the_retry() -> None:
    """A chunk that was cancelled in its recache can be finished in another stream."""
    for name in ("recache", "recache, sink replaced", "recache, sink recomputed", "flush", "separate", "two caches"):
        scenario = CANCELLED[name]
        want, asked, _ = with_cancels(scenario, lambda at: False)
        for index in range(0, asked, 2):
            stream, parts = cancelled_at(scenario, index)
            other = replace(scenario, switches=()).rollout()
            other.restore(Snapshot.from_bytes(stream.snapshot().to_bytes()))
            while len(parts) < 5:
                parts.append(other.next_chunk().latents)
            assert torch.equal(torch.cat(parts, 1), want)


LIVE = {
    "separate": Scenario(setting=THIRD),
    "fused": Scenario(setting=THIRD, options={"commit": "fused"}),
    "two caches, fused": Scenario(setting=GUIDED, options={"commit": "fused", "mode": "two_caches"}),
    "no commits": Scenario(setting=THIRD, options={"commit": "none"}),
    "after a switch": Scenario(setting=THIRD, switches=[switch(3, 2, "recache")]),
}


@pytest.mark.parametrize("name", LIVE)
def test_a_live_switch_between_a_cancel_and_the_retry(name: str) -> None:
    """A user who changes the prompt stops the chunk that is under way: the retry follows the new prompt in full."""
    scenario = LIVE[name]
    _, asked, _ = with_cancels(scenario, lambda at: False)
    wrong = []
    for policy in ("keep", "recache", "flush"):
        how: dict[str, Any] = {"policy": policy}
        for index in range(asked // 3, asked):
            stream, parts = cancelled_at(scenario, index)
            if len(parts) > 2:  # every pass of one chunk will do
                break
            if len(parts) < 2:
                continue
            plain = scenario.rollout()
            want = [plain.next_chunk().latents for _ in parts]
            for each, chunks in ((stream, parts), (plain, want)):
                each.switch(text(5), **how)
                chunks += [each.next_chunk().latents for _ in range(2)]
            if differs(torch.cat(parts, 1), torch.cat(want, 1)):
                wrong.append((policy, index))
    assert wrong == []
