"""What the views of a cache do once: gathers of a prefix, masks of attention over time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.causal.cache import views
from unspool.causal.cache.kv import KVCache
from unspool.causal.context import Site
from unspool.causal.position import Absolute
from unspool.causal.prefix import JOINT, LastFrames
from unspool.causal.visibility import Kind, Segment, Visibility, Window

TEMPORAL = [Site(index=i, heads=2, head_dim=4, rows=None, tokens_per_frame=1) for i in range(3)]
SPATIAL = [Site(index=i, heads=2, head_dim=4, stream=JOINT) for i in range(3)]
CAUSAL, LAST = Window(window=9, within="causal"), LastFrames(frames=2, own=True)
TOKENS, BATCH = 5, 2


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> Counted:
    counter = Counted(getattr(views, name))
    monkeypatch.setattr(views, name, counter)
    return counter


def projections(site: Site, count: int, seed: int) -> list[Tensor]:
    shape = (BATCH * TOKENS, count) if site.tokens_per_frame == 1 else (BATCH, count * TOKENS)
    generator = torch.Generator().manual_seed(10 * seed + site.index)
    return [torch.randn(*shape, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def after_two_chunks(sites: list[Site], visibility: Visibility) -> KVCache:
    cache = KVCache(
        sites, batch=BATCH, tokens_per_frame=TOKENS, visibility=visibility, positions=Absolute(), dtype=torch.float64
    )
    with torch.no_grad():
        for part in (range(0, 1), range(1, 4)):
            context = cache.begin((Segment(kind=Kind.COMMIT, frames=part),))
            for site in sites:
                context.attend(site, *projections(site, len(part), part.start), None)
            cache.promote()
    return cache


@pytest.mark.parametrize("grad", [False, True], ids=["ring", "functional"])
def test_a_prefix_beside_each_frame_is_gathered_once(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = after_two_chunks(SPATIAL, LAST)
    calls, gathers = counted(monkeypatch, "sdpa"), counted(monkeypatch, "_token_slots")
    with torch.set_grad_enabled(grad):
        context = cache.begin((Segment(kind=Kind.DENOISE, frames=range(4, 7)),))
        for site in SPATIAL:
            q, k, v = projections(site, 3, 4)
            got = context.attend(site, q, k, v, None).unflatten(1, (3, TOKENS))
            _, *past = projections(site, 3, 1)
            for i in range(3):
                keys, values = (torch.cat([old[:, TOKENS:], new[:, i * TOKENS : (i + 1) * TOKENS]], 1)
                                for old, new in zip(past, (k, v), strict=True))  # fmt: skip
                scores = torch.einsum("bqhd,bkhd->bhqk", q[:, i * TOKENS : (i + 1) * TOKENS], keys) / 2
                want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
                torch.testing.assert_close(got[:, i], want, rtol=0, atol=1e-12)
    assert calls.calls == len(SPATIAL), "one attention for the frames of a site"
    assert gathers.calls <= 2, "slots are looked up once for all sites"


def test_masks_over_time_are_made_once_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch, "_reads")
    for sites, want in ((SPATIAL, 0), (TEMPORAL, 1)):
        cache, made.calls = after_two_chunks(sites, CAUSAL), 0
        with torch.no_grad():
            for _ in range(2):
                context = cache.begin((Segment(kind=Kind.DENOISE, frames=range(4, 7)),))
                for site in sites:
                    context.attend(site, *projections(site, 3, 4), None)
        assert made.calls == want


def test_masks_of_a_forward_under_autograd_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every segment of the pass, not for every layer."""
    cache = after_two_chunks(TEMPORAL, CAUSAL)
    moved = counted(monkeypatch, "to_device")
    context = cache.begin(tuple(Segment(kind=Kind.COMMIT, frames=part) for part in (range(4, 7), range(7, 9))))
    after = []
    for site in TEMPORAL:
        context.attend(site, *projections(site, 5, 4), None)
        after.append(moved.calls)
    assert after[0] >= 2 and set(after) == {after[0]}
