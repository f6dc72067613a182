"""The cache of STDiT against one forward over all frames, through eviction and the wrap of cyclic positions.

Two expectations: the library's own training mask, and attention written out here from the published rule: frame i reads
j <= i with j >= start of its chunk - Pmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stdit_tiny import SIZES, randomised, sees
from torch import Tensor

from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.cache.streams import StreamCaches
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence, Site
from unspool.causal.mask import teacher_forcing_mask
from unspool.causal.position import Absolute, Cyclic, PositionPolicy, WindowRelative
from unspool.causal.prefix import JOINT, PrefixEnhanced
from unspool.causal.visibility import MAIN, Full, Kind, Segment, Visibility, Window
from unspool.diffusion.iddpm import IDDPM
from unspool.models.base import Conditioning
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.ops.compile import compile_backbone
from unspool.ops.rope import Rope
from unspool.rollout.noise import CounterNoise
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout
from unspool.rollout.settings import RolloutConfig
from unspool.rollout.solvers.ancestral import Ancestral

BOUND = 1e-9
SMALL: dict[str, Any] = dict(dim=24, num_layers=3, num_heads=2, freq_dim=32)
SIZE = (2, 4)  # latents; two tokens a frame


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class ByHand:
    """One sequence, attention as boolean tables written out from the rule; no mask of the library."""

    def __init__(self, frames: int, clean: int, chunk: int, first: int, pmax: int, prefix: int, length: int) -> None:
        self.positions = torch.arange(frames) % length
        starts = torch.tensor([0 if i < first else first + (i - first) // chunk * chunk for i in range(frames)])
        i, j = torch.arange(frames)[:, None], torch.arange(frames)[None]
        self.temporal = ((j <= i) & (j >= starts[:, None] - pmax)).double()
        own = (i == j).double()
        copies = torch.zeros(frames, frames, dtype=torch.float64)
        for n in range(1, prefix + 1):
            for row in range(clean, frames):
                copies[row, max(0, int(starts[row]) - n)] += 1
        noisy = (i >= clean).double()
        self.joint = own + noisy * copies
        self.separate = own * (1 - noisy) + noisy * copies

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        table = self.temporal if site.stream == MAIN else self.joint if site.stream == JOINT else self.separate
        n = q.shape[1] // len(table)
        weights = table.repeat_interleave(n, 0).repeat_interleave(n, 1).log()
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + weights
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Clip:
    """Clean and noisy latents of a stream, a level per chunk, and the network's answers from its cache."""

    def __init__(self, network: STDiT, plan: ChunkPlan, num_chunks: int, batch: int = 1, text: bool = False) -> None:
        """On the network's device; drawn on the CPU."""
        self.network, self.plan = network, plan
        self.device = next(network.parameters()).device
        self.chunks = [plan.frames(i) for i in range(num_chunks)]
        self.total = self.chunks[-1].stop
        shape = (batch, self.total, network.config.in_channels, *SIZE)
        generator = torch.Generator().manual_seed(1)
        both = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        self.clean, self.noisy = (latents.to(self.device) for latents in both)
        self.levels = [float(torch.randint(1, 1001, (1,), generator=generator)) / 1000 for _ in self.chunks]
        states = torch.randn(batch, 4, network.config.caption_dim or 1, generator=generator, dtype=torch.float64)
        states[:, 2:] = 0 if text else states[:, 2:]
        self.cond = Conditioning(prompts=network.prepare(states))

    def run(self, x: Tensor, sigma: list[float], context: Any) -> Tensor:
        return self.network(x, torch.tensor([sigma], dtype=torch.float64), self.cond, context)

    def cache(self, visibility: Visibility, positions: PositionPolicy) -> StreamCaches:
        return StreamCaches(
            self.network.sites,
            batch=len(self.clean),
            tokens_per_frame=self.network.tokens_per_frame(*SIZE),
            visibility=visibility,
            positions=positions,
            dtype=torch.float64,
            device=self.device,
        )

    def cached(self, visibility: Visibility, positions: PositionPolicy) -> list[Tensor]:
        """Per chunk a denoising pass, twice at different levels (the second must not feel the first), and a commit."""
        cache = self.cache(visibility, positions)
        outputs = []
        for frames, level in zip(self.chunks, self.levels, strict=True):
            own = slice(frames.start, frames.stop)
            for told, x in ((1.0, self.clean), (level, self.noisy)):
                context = cache.begin((Segment(kind=Kind.DENOISE, frames=frames),))
                out = self.run(x[:, own], [told] * len(frames), context)
            outputs.append(out)
            self.run(self.clean[:, own], [0.0] * len(frames), cache.begin((Segment(kind=Kind.COMMIT, frames=frames),)))
            cache.promote()
        return outputs

    def by_hand(self, index: int, pmax: int, prefix: int, length: int) -> Tensor:
        """One forward over all frames up to chunk `index`, which alone is noisy."""
        frames = self.chunks[index]
        x = torch.cat([self.clean[:, : frames.start], self.noisy[:, frames.start : frames.stop]], 1)
        context = ByHand(frames.stop, frames.start, self.plan.chunk, self.plan.lead, pmax, prefix, length)
        levels = [0.0] * frames.start + [self.levels[index]] * len(frames)
        return self.run(x, levels, context)[:, frames.start :]

    def masked(self, visibility: Visibility, positions: PositionPolicy) -> Tensor:
        """One forward over [clean | noisy] under the training mask."""
        mask = teacher_forcing_mask(self.plan, self.total, visibility, positions)
        levels = [level for frames, level in zip(self.chunks, self.levels, strict=True) for _ in frames]
        x = torch.cat([self.clean, self.noisy], 1)
        return self.run(x, [0.0] * self.total + levels, FullSequence(2 * self.total, mask))[:, self.total :]


def worst(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and want.std() > 0.1
    return float((got - want).abs().max() / want.std())


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": dict(mask_channel=True),
    "joint": dict(prefix_attention="joint", mask_channel=True),
    "separate": dict(prefix_attention="separate", mask_channel=True),
    "text": dict(prefix_attention="joint", caption_dim=6, caption_len=4),
    "velocity": dict(prefix_attention="separate", process="flow", learned_variance=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_cached_equals_one_forward_over_all_frames(form: str) -> None:
    """Ten chunks of 3 after one given frame, Pmax 7, 10 positions: evicted from the fourth on, wrapped three times."""
    clip = Clip(
        randomised(STDiTConfig(**SMALL, **FORMS[form])), ChunkPlan(chunk=3, first=1), 11, 2, text=form == "text"
    )
    visibility, positions = sees(chunk=3, pmax=7, prefix=2), Cyclic(length=10)
    got = clip.cached(visibility, positions)
    assert worst(torch.cat(got, 1), clip.masked(visibility, positions)) <= BOUND
    for index in range(1, 11):
        assert worst(got[index], clip.by_hand(index, 7, 2, 10)) <= BOUND


def test_a_chunk_that_sees_itself_whole() -> None:
    """Block-causal inside the chunk; commits stay causal."""
    clip = Clip(randomised(STDiTConfig(**SMALL, **FORMS["joint"])), ChunkPlan(chunk=3, first=1), 10)
    positions, full = Cyclic(length=10), sees(chunk=3, pmax=7, prefix=2, within="full")
    got = torch.cat(clip.cached(full, positions), 1)
    assert worst(got, clip.masked(full, positions)) <= BOUND
    assert worst(got, clip.masked(sees(chunk=3, pmax=7, prefix=2), positions)) > 1e-3


def test_an_unbounded_past() -> None:
    """ViD-GPT: all the past, causal, positions that never turn; the prefix beside it stays short."""
    clip = Clip(randomised(STDiTConfig(**SMALL, **FORMS["joint"])), ChunkPlan(chunk=3, first=1), 10)
    visibility = PrefixEnhanced(base=Full(within="causal"), frames=2)
    got = torch.cat(clip.cached(visibility, Absolute()), 1)
    assert worst(got, clip.masked(visibility, Absolute())) <= BOUND
    assert worst(got[:, -3:], clip.by_hand(9, 10**6, 2, 10**6)) <= BOUND


def test_commits_may_be_cut_differently() -> None:
    """Clean frames in chunks of 1, 8 and 8 or of 1, 4, 4, 4 and 4: causal commits write the same keys and values."""
    network, held = randomised(STDiTConfig(**SMALL, **FORMS["separate"])), []
    for chunk in (8, 4):
        clip = Clip(network, ChunkPlan(chunk=chunk, first=1), 16 // chunk + 1)
        cache = clip.cache(PrefixEnhanced(base=Full(within="causal"), frames=3), Absolute())
        for frames in clip.chunks:
            context = cache.begin((Segment(kind=Kind.COMMIT, frames=frames),))
            clip.run(clip.clean[:, frames.start : frames.stop], [0.0] * len(frames), context)
            cache.promote()
        context = cache.begin((Segment(kind=Kind.DENOISE, frames=range(17, 20)),))
        held.append(clip.run(torch.ones(1, 3, 4, *SIZE, dtype=torch.float64), [0.5] * 3, context))
    assert worst(*held) <= BOUND


def test_encoding_the_last_frames_again_is_something_else() -> None:
    """Keys that survive remember through depth what was evicted, so a window encoded anew differs; with one layer
    there is nothing to remember."""
    pmax, plan = 7, ChunkPlan(chunk=3, first=1)
    for layers in (1, 3):
        config = STDiTConfig(**{**SMALL, "num_layers": layers})
        clip = Clip(randomised(config), plan, 9)
        got = clip.cached(sees(chunk=3, pmax=pmax, prefix=None), Cyclic(length=10))
        for index, frames in enumerate(clip.chunks):
            begin = max(0, frames.start - pmax)
            x = torch.cat([clip.clean[:, begin : frames.start], clip.noisy[:, frames.start : frames.stop]], 1)
            levels = [0.0] * (frames.start - begin) + [clip.levels[index]] * len(frames)
            context = ByHand(frames.stop - begin, frames.start - begin, 3, 1, 10**6, 1, 10)
            context.positions = torch.arange(begin, frames.stop) % 10
            again = worst(got[index], clip.run(x, levels, context)[:, frames.start - begin :])
            assert again > 1e-2 if layers > 1 and begin > 0 else again <= BOUND


def test_positions_that_turn_are_not_positions_that_start_anew() -> None:
    """A constant shift of additive positions is no invariance: the same clip elsewhere on the circle differs."""
    clip = Clip(randomised(STDiTConfig(**SMALL)), ChunkPlan(chunk=3, first=1), 3)
    visibility = sees(chunk=3, pmax=7, prefix=None)
    here, there = (clip.masked(visibility, Cyclic(length=10, offset=offset)) for offset in (0, 4))
    assert worst(here, there) > 1e-2
    assert worst(here, clip.masked(visibility, Cyclic(length=10, offset=10))) <= BOUND


@given(
    chunk=st.integers(1, 4),
    first=st.integers(1, 4),
    room=st.integers(0, 5),
    spare=st.integers(0, 3),
    prefix=st.integers(1, 4),
    form=st.sampled_from(["plain", "joint", "separate"]),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_sizes(chunk: int, first: int, room: int, spare: int, prefix: int, form: str) -> None:
    """Windows that are no multiples, prefixes longer than a chunk or than what was given, positions to spare."""
    pmax = max(first, prefix) + room
    plan = ChunkPlan(chunk=chunk, first=first)
    network = randomised(STDiTConfig(**{**SMALL, "num_layers": 2}, **FORMS[form]))
    length = pmax + max(chunk, first) + spare
    clip = Clip(network, plan, 9)
    visibility = sees(chunk=chunk, pmax=pmax, prefix=prefix)
    got = clip.cached(visibility, Cyclic(length=length))
    assert worst(torch.cat(got, 1), clip.masked(visibility, Cyclic(length=length))) <= BOUND
    assert worst(got[-1], clip.by_hand(8, pmax, prefix, length)) <= BOUND


# ---- rollouts -------------------------------------------------------------------------------------------------------


def stream(form: str = "separate", switches: list[Switch] | None = None, **changed: Any) -> Rollout:
    network = randomised(STDiTConfig(**SMALL, **FORMS[form]))
    process = IDDPM(predicts="x0")  # a random network that predicts noise has no bounded output
    values: dict[str, Any] = dict(
        plan=ChunkPlan(chunk=3, first=1, num_frames=25),
        schedule=process.schedule(3),
        visibility=sees(chunk=3, pmax=7, prefix=2),
        positions=Cyclic(length=10),
        process=process,
        solver=Ancestral(process=process),
    )
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(1, 4, network.config.caption_dim or 1, generator=generator)
    given = torch.randn(1, 1, 4, *SIZE, generator=generator)
    return Rollout(
        network, RolloutConfig(**{**values, **changed}), PromptTimeline(text, switches or []),
        noise=CounterNoise(seed=3), latent_size=SIZE, prefix=given, cache="streams",
    )  # fmt: skip


def frames_of(rollout: Rollout) -> Tensor:
    return torch.cat([chunk.latents for chunk in rollout], 1)


def test_a_stream_goes_on_from_a_snapshot_bit_for_bit() -> None:
    first = stream()
    for _ in range(5):
        first.next_chunk()
    second = stream()
    second.restore(first.snapshot())
    assert torch.equal(frames_of(first), frames_of(second))


@pytest.mark.parametrize("side", ["self.keys.0", "prefix_only.values.1"])
def test_a_refused_snapshot_leaves_every_stream_alone(side: str) -> None:
    """Of a stream whose past was flushed, in which one stream of attentions does not fit."""
    other = torch.randn(1, 4, 1, generator=torch.Generator().manual_seed(8))
    first = stream(switches=[Switch(frame=7, text=other, policy="flush")])
    for _ in range(4):
        first.next_chunk()
    taken = first.snapshot()
    name = f"branches.0.{side}"
    for tensors in ({n: t for n, t in taken.tensors.items() if n != name}, {**taken.tensors, name: torch.zeros(3)}):
        target, same = stream(), stream()
        for each in (target, same):
            each.next_chunk()
        sees = target.visibility
        with pytest.raises(ValueError, match="snapshot"):
            target.restore(Snapshot(tensors, taken.facts))
        assert target.visibility is sees and target.branches.caches[0].visibility is sees
        assert torch.equal(frames_of(target), frames_of(same))


@pytest.mark.parametrize("policy", ["flush", "recache"])
def test_a_switch_of_the_prompt_reaches_the_prefix_too(policy: Any) -> None:
    other = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(8))
    before = frames_of(stream("text"))
    after = frames_of(stream("text", [Switch(frame=13, text=other, policy=policy)]))
    assert torch.equal(before[:, :12], after[:, :12]) and after.isfinite().all()
    assert (before[:, 12:] - after[:, 12:]).abs().amax((0, 2, 3, 4)).min() > 1e-3


def test_noise_of_a_commit_is_the_same_whenever_it_runs() -> None:
    """Separate, in one forward with the next chunk, from a snapshot; and it matters."""
    noisy = dict(commit_noise=0.051)
    want = frames_of(stream(**noisy))
    torch.testing.assert_close(frames_of(stream(**noisy, commit="fused")), want, rtol=0, atol=1e-9)
    first, second = stream(**noisy), stream(**noisy)
    early = [first.next_chunk().latents for _ in range(4)]
    second.restore(first.snapshot())
    assert torch.equal(torch.cat([*early, frames_of(second)], 1), want)
    assert (frames_of(stream()) - want).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no commit to be noised"):
        stream(**noisy, commit="none")


def test_bytes_do_not_grow() -> None:
    rollout, sizes = stream(plan=ChunkPlan(chunk=3, first=1, num_frames=61)), []
    for _ in rollout:
        sizes.append(rollout.num_bytes)
    assert len(sizes) == 20 and len(set(sizes[3:])) == 1


def test_what_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="two of them meet"):
        stream(positions=Cyclic(length=9))
    kept = PrefixEnhanced(base=Window(window=10, sink=1, within="causal"), frames=2)
    for held, visibility in (("sink frames", kept), ("a past without a bound", Full(within="causal"))):
        with pytest.raises(ValueError, match=f"{held}.*two latent frames meet as soon as the circle has been gone"):
            stream(visibility=visibility)
    with pytest.raises(ValueError, match="cannot be moved"):
        frames_of(stream(positions=WindowRelative()))
    with pytest.raises(ValueError, match="PrefixEnhanced"):
        stream(visibility=Window(window=10))
    with pytest.raises(ValueError, match="'streams'"):
        network = randomised(STDiTConfig(**SIZES, prefix_attention="joint"))
        Rollout(
            network, stream().config, torch.ones(1, 1, 1), noise=CounterNoise(seed=0), latent_size=SIZE
        )  # fmt: skip


@pytest.mark.slow
def test_a_compiled_network_streams_the_same() -> None:
    """Through eviction and wrap; what is compiled lies between the attentions."""
    want, compiled = frames_of(stream("joint")), stream("joint")
    compile_backbone(compiled.backbone)  # type: ignore[arg-type]
    assert worst(frames_of(compiled), want) <= 1e-5
