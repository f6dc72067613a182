"""Attentions of one network that read different frames: visibilities, masks and caches of streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.cache.streams import StreamCaches
from unspool.causal.chunks import ChunkPlan, FrameSet
from unspool.causal.context import Context, FullSequence, Site
from unspool.causal.mask import causal_mask, clean_prefix_mask, teacher_forcing_mask
from unspool.causal.position import Absolute, Cyclic, WindowRelative
from unspool.causal.prefix import JOINT, SEPARATE, LastFrames, PrefixEnhanced
from unspool.causal.visibility import (
    MAIN,
    Full,
    Kind,
    Segment,
    Since,
    Visibility,
    Window,
    capacity_of,
    first_copies,
    own_reads,
    retained,
    sink_of,
    stream_of,
    streams_of,
    within_of,
)

PLAN = ChunkPlan(chunk=3, first=1)
SEES = PrefixEnhanced(base=Window(window=6, within="causal"), frames=2)
TEMPORAL = Site(index=0, heads=2, head_dim=4, name="temporal", rows=None, tokens_per_frame=1)
PREFIX = Site(index=1, heads=2, head_dim=4, name="prefix", stream=SEPARATE)


def segment(start: int, stop: int, kind: Kind = Kind.DENOISE) -> Segment:
    return Segment(kind=kind, frames=range(start, stop))


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_groups_of_own_frames() -> None:
    def groups(within: Literal["full", "causal", "own", "none"]) -> list[tuple[list[int], list[int]]]:
        return [(list(queries), list(seen)) for queries, seen in own_reads(within, 3)]

    assert groups("full") == [([0, 1, 2], [0, 1, 2])]
    assert groups("causal") == [([0], [0]), ([1], [0, 1]), ([2], [0, 1, 2])]
    assert groups("own") == [([0], [0]), ([1], [1]), ([2], [2])]
    assert groups("none") == [([0, 1, 2], [])]


def test_worked_numbers_of_the_prefix() -> None:
    only, joint = (LastFrames(frames=3, own=own) for own in (False, True))
    assert str(only.visible(segment(9, 17))) == "[6, 9)" and str(only.visible(segment(1, 9))) == "[0, 1)"
    assert only.visible(segment(9, 17, Kind.COMMIT)) == FrameSet()
    assert within_of(only, segment(9, 17)) == "none" and within_of(joint, segment(9, 17)) == "own"
    assert within_of(only, segment(9, 17, Kind.PREFILL)) == "own"
    assert within_of(only, segment(0, 4)) == "own", "without any past there is nothing else to read"
    assert [first_copies(only, only.visible(segment(n, n + 1))) for n in range(5)] == [0, 2, 1, 0, 0]
    assert first_copies(Window(window=6), FrameSet.of((0, 1))) == 0


def test_the_main_stream_is_the_base() -> None:
    base = Window(window=7, sink=2, within="causal", commit_within="full")
    both = PrefixEnhanced(base=base, frames=2)
    assert (capacity_of(both), sink_of(both), both.within) == (7, sink_of(base), "causal")
    for kind in Kind:
        at = segment(9, 12, kind)
        assert both.visible(at) == base.visible(at) and within_of(both, at) == within_of(base, at)
    assert within_of(both, segment(9, 12, Kind.COMMIT)) == "full"
    assert streams_of(both) == (JOINT, SEPARATE) and stream_of(both, MAIN) is both
    assert stream_of(both, JOINT) == LastFrames(frames=2, own=True)
    assert streams_of(base) == ()


def test_a_flush_reaches_every_stream() -> None:
    """What was forgotten is forgotten for the prefix too; with nothing left, a frame reads itself."""
    flushed = Since(base=SEES, floor=8)
    side = stream_of(flushed, SEPARATE)
    assert str(side.visible(segment(9, 12))) == "[8, 9)" and within_of(side, segment(9, 12)) == "none"
    assert first_copies(side, FrameSet.of((8, 9))) == 1
    gone = stream_of(Since(base=SEES, floor=9), SEPARATE)
    assert within_of(gone, segment(9, 12)) == "own"
    assert within_of(flushed, segment(9, 12)) == "causal"


@given(frames=st.integers(1, 5), chunk=st.integers(1, 4), own=st.booleans())
def test_what_was_dropped_is_never_asked_for(frames: int, chunk: int, own: bool) -> None:
    visibility, held = LastFrames(frames=frames, own=own), FrameSet()
    for part in ChunkPlan(chunk=chunk, first=1).chunks(0, 30):
        needed = retained(visibility, segment(part.start, part.stop))
        assert needed <= held and len(needed) <= frames
        held = needed | FrameSet.of(part)


def test_a_stream_of_which_nobody_speaks_is_refused() -> None:
    with pytest.raises(ValueError, match="PrefixEnhanced"):
        stream_of(Window(window=6), SEPARATE)
    with pytest.raises(ValueError, match="PrefixEnhanced"):
        causal_mask(PLAN, 7, Full(), Absolute()).stream(JOINT)
    with pytest.raises(ValueError, match="which latent frames are clean"):
        q = torch.zeros(1, 14, 2, 4)
        FullSequence(7).attend(PREFIX, q, q, q, None)
    for refused in (
        lambda: stream_of(Window(window=6), "temporal"),
        lambda: causal_mask(PLAN, 7, Full(), Absolute()).stream("temporal"),
        lambda: FullSequence(7).attend(PREFIX, q, q, q, None),
        lambda: KVCache([TEMPORAL, PREFIX], batch=1, tokens_per_frame=5, visibility=Full(), positions=Absolute()),
    ):
        with pytest.raises(ValueError, match=r"leave Site\.stream at 'self'"):
            refused()
    with pytest.raises(ValueError, match="frames=0"):
        PrefixEnhanced(base=Full(), frames=0)


# ---- masks ----------------------------------------------------------------------------------------------------------


def reads(visibility: Visibility, prefix: int, stream: str, num_frames: int = 7) -> list[str]:
    """Per query frame, the key frames as digits."""
    mask = clean_prefix_mask(PLAN, num_frames, prefix, visibility, Absolute()).stream(stream)
    return ["".join(str(k) for k, seen in enumerate(row) if seen) for row in mask.allowed()]


def test_clean_prefix_masks_by_hand() -> None:
    assert reads(SEES, 4, MAIN) == ["0", "01", "012", "0123", "1234", "12345", "123456"]
    assert reads(SEES, 4, SEPARATE) == ["0", "1", "2", "3", "23", "23", "23"]
    assert reads(SEES, 4, JOINT) == ["0", "1", "2", "3", "234", "235", "236"]
    whole = PrefixEnhanced(base=Window(window=6, commit_within="causal"), frames=2)
    assert reads(whole, 4, MAIN) == ["0", "01", "012", "0123", "123456", "123456", "123456"]
    assert reads(whole, 0, MAIN, 1) == ["0"]


def test_noisy_frames_of_a_clip_read_the_clean_copy_of_the_prefix() -> None:
    mask = teacher_forcing_mask(PLAN, 7, SEES, Absolute()).stream(SEPARATE).allowed()
    assert [[k for k, seen in enumerate(row) if seen] for row in mask[11:]] == [[2, 3]] * 3
    assert [[k for k, seen in enumerate(row) if seen] for row in mask[:7]] == [[k] for k in range(7)]


def test_a_prefix_that_ends_inside_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="inside a chunk"):
        clean_prefix_mask(PLAN, 7, 2, SEES, Absolute())


@dataclass(frozen=True)
class Projections:
    """q, k, v of every site, drawn once per latent frame: what a network would hand over."""

    tokens: int
    total: int

    def of(self, site: Site, frames: list[int], seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(10 * seed + site.index)
        shape = (2, 3, self.total, self.tokens, site.heads, site.head_dim)
        parts = torch.randn(shape, generator=generator, dtype=torch.float64).unbind(1)
        chosen = [part[:, frames] for part in parts]
        if site.tokens_per_frame == 1:
            return [part.transpose(1, 2).flatten(0, 1) for part in chosen]
        return [part.flatten(1, 2) for part in chosen]


DRAWN = Projections(tokens=5, total=20)


def attended(context: Context, site: Site, frames: list[int], seed: int = 0) -> Tensor:
    out = context.attend(site, *DRAWN.of(site, frames, seed), None)
    assert context.attend(site, *DRAWN.of(site, frames, seed), None).equal(out)
    return out


@pytest.mark.parametrize("stream", [JOINT, SEPARATE])
@pytest.mark.parametrize("prefix", [1, 4])
def test_slices_equal_a_softmax_written_out(stream: str, prefix: int) -> None:
    """With a past shorter than the prefix (1 of 2 frames, so no effect; 1 of 3, of 4) the first frame counts more."""
    for size in (2, 3, 6):
        sees = PrefixEnhanced(base=Full(), frames=size)
        mask = clean_prefix_mask(PLAN, 7, prefix, sees, Absolute())
        site = Site(index=1, heads=2, head_dim=4, stream=stream)
        q, k, v = DRAWN.of(site, list(range(7)))
        got = FullSequence(7, mask).attend(site, q, k, v, None)
        frame = torch.arange(7).repeat_interleave(5)
        weight = torch.zeros(7, 7, dtype=torch.float64)
        for i in range(7):
            chunk_start = 0 if i < 1 else 1 + 3 * ((i - 1) // 3)
            if i < prefix or stream == JOINT:
                weight[i, i] = 1
            if i >= prefix:
                for n in range(size):
                    weight[i, max(0, chunk_start - 1 - n)] += 1
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 + weight[frame][:, frame].log()
        want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_backends_agree_where_they_can_say_it_and_refuse_where_not() -> None:
    mask = clean_prefix_mask(PLAN, 7, 4, SEES, Absolute())
    for site, rows in (
        (TEMPORAL, ["0", "01", "012", "0123", "1234", "12345", "123456"]),
        (PREFIX, ["0", "1", "2", "3", "23", "23", "23"]),
    ):
        q, k, v = DRAWN.of(site, list(range(7)))
        n = q.shape[1] // 7
        table = torch.tensor([[str(frame) in row for frame in range(7)] for row in rows])
        read = table.repeat_interleave(n, 0).repeat_interleave(n, 1).double().log()
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 + read
        want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        for backend in ("slices", "dense"):
            got = FullSequence(7, mask, backend=backend).attend(site, q, k, v, None)  # type: ignore[arg-type]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    short = clean_prefix_mask(PLAN, 7, 1, SEES, Absolute()).stream(SEPARATE)
    with pytest.raises(ValueError, match="several times"):
        short.dense(5)


def test_added_positions_cannot_move() -> None:
    mask = causal_mask(PLAN, 10, Window(window=6), WindowRelative())
    with pytest.raises(ValueError, match="cannot be moved"):
        _ = FullSequence(10, mask).positions
    turned = causal_mask(PLAN, 10, Window(window=6), Cyclic(length=6, offset=4))
    assert FullSequence(10, turned).positions.tolist() == [4, 5, 0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize("grad", [False, True], ids=["ring", "functional"])
def test_a_cache_refuses_to_name_positions_that_moved(grad: bool) -> None:
    """Window-relative ids are what they were until the window is full; then a rotation would make up for it."""
    cache = KVCache(
        [TEMPORAL], batch=2, tokens_per_frame=5, visibility=Window(window=6), positions=WindowRelative(),
        dtype=torch.float64,
    )  # fmt: skip
    seen: list[list[int]] = []
    with torch.set_grad_enabled(grad):
        for part in PLAN.chunks(0, 7):
            context = cache.begin((segment(part.start, part.stop, Kind.COMMIT),))
            if part.stop <= 4:
                seen.append(context.positions.tolist())
            else:
                with pytest.raises(ValueError, match="cannot be moved"):
                    _ = context.positions
            attended(context, TEMPORAL, list(part))
            cache.promote()
    assert seen == [[0], [1, 2, 3]]


# ---- caches ---------------------------------------------------------------------------------------------------------


def caches(sees: Visibility = SEES, sites: tuple[Site, ...] = (TEMPORAL, PREFIX)) -> StreamCaches:
    return StreamCaches(
        list(sites), batch=2, tokens_per_frame=5, visibility=sees, positions=Absolute(), dtype=torch.float64
    )


@pytest.mark.parametrize("grad", [False, True], ids=["ring", "functional"])
@pytest.mark.parametrize("form", [JOINT, SEPARATE])
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("commit_within", [None, "full"])
def test_cached_equals_masked_on_every_stream(
    size: int, form: str, grad: bool, commit_within: Literal["full"] | None
) -> None:
    """Noisy passes and commits of 19 latent frames against one sequence [clean | noisy]; the third chunk has 4 of the 5
    frames that the longer prefix wants."""
    base = Window(window=6, within="causal", commit_within=commit_within)
    sees = PrefixEnhanced(base=base, frames=size)
    sites = (TEMPORAL, Site(index=1, heads=2, head_dim=4, stream=form))
    cache, total = caches(sees, sites), 19
    mask = teacher_forcing_mask(PLAN, total, sees, Absolute())
    for site in sites:
        clean, noisy = (DRAWN.of(site, list(range(total)), seed) for seed in (0, 1))
        both = [torch.cat(pair, 1) for pair in zip(clean, noisy, strict=True)]
        want = FullSequence(2 * total, mask).attend(site, *both, None)
        n = want.shape[1] // (2 * total)
        site_want = want.unflatten(1, (2, total, n))
        cache.discard()
        cache = caches(sees, sites)
        with torch.set_grad_enabled(grad):
            for part in PLAN.chunks(0, total):
                for copy, kind in ((1, Kind.DENOISE), (0, Kind.COMMIT)):
                    context = cache.begin((segment(part.start, part.stop, kind),))
                    for each in sites:
                        out = attended(context, each, list(part), copy)
                        if each is site:
                            expected = site_want[:, copy, part.start : part.stop].flatten(1, 2)
                            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
                cache.promote()


@torch.no_grad()
def test_each_stream_holds_what_it_reads_and_no_more() -> None:
    cache, sizes = caches(), []
    for part in PLAN.chunks(0, 19):
        context = cache.begin((segment(part.start, part.stop, Kind.PREFILL),))
        for site in (TEMPORAL, PREFIX):
            attended(context, site, list(part))
        cache.promote()
        sizes.append(cache.num_bytes)
    cache.begin((segment(19, 22),))
    assert str(cache.caches[MAIN].frames) == str(cache.frames) == "[16, 19)"
    assert str(cache.caches[SEPARATE].frames) == "[17, 19)"
    assert len(set(sizes[2:])) == 1, "constant from the moment the windows are full"
    per_frame = 2 * 8 * 2 * 5 * 8  # keys and values, bytes, samples, tokens, heads and their channels
    assert sizes[-1] == per_frame * (6 + 2 + 3)


def test_snapshots_hold_every_stream_or_nothing_changes() -> None:
    first, second = caches(), caches()
    for part in PLAN.chunks(0, 10):
        context = first.begin((segment(part.start, part.stop, Kind.COMMIT),))
        for site in (TEMPORAL, PREFIX):
            attended(context, site, list(part))
        first.promote()
    stored = type(first.snapshot()).from_bytes(first.snapshot().to_bytes())
    second.restore(stored)
    for site in (TEMPORAL, PREFIX):
        a, b = (attended(c.begin((segment(10, 13),)), site, [10, 11, 12]) for c in (first, second))
        assert torch.equal(a, b)
    other = caches(PrefixEnhanced(base=SEES.base, frames=3))
    with pytest.raises(ValueError, match="snapshot"):
        other.restore(stored)
    assert len(other.frames) == 0
    with pytest.raises(ValueError, match="streams"):
        caches(SEES, (TEMPORAL,)).restore(stored)


def test_nothing_is_promoted_unless_every_stream_was_reached() -> None:
    cache = caches()
    context = cache.begin((segment(0, 1, Kind.COMMIT),))
    attended(context, TEMPORAL, [0])
    with pytest.raises(ValueError, match="never reached"):
        cache.promote()
    assert len(cache.frames) == 0


def test_wrong_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="'streams'"):
        KVCache([TEMPORAL, PREFIX], batch=1, tokens_per_frame=5, visibility=SEES, positions=Absolute())
    with pytest.raises(ValueError, match="'self' among them"):
        caches(SEES, (PREFIX,))
    with pytest.raises(ValueError, match="PrefixEnhanced"):
        caches(Window(window=6))
