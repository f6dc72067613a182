"""Clean prefixes: what is drawn, what the network is given and told, and that the cached rollout computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian import Call, Recorder
from torch import Tensor

from unspool.causal.cache.recompute import RecomputeBidirectional
from unspool.causal.cache.streams import StreamCaches
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.position import Absolute, Cyclic, WindowRelative
from unspool.causal.prefix import PrefixEnhanced
from unspool.causal.visibility import Kind, Segment, Window
from unspool.config import locate
from unspool.data.batch import Batch
from unspool.diffusion.iddpm import IDDPM
from unspool.methods import METHODS
from unspool.methods.base import Method
from unspool.methods.clean_prefix import CleanPrefix, CleanPrefixConfig, drawn_positions, prefix_lengths
from unspool.methods.draws import SampleRng
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.rollout.recompute import with_past

PLAN = ChunkPlan(chunk=3, first=1)
BASE = CleanPrefixConfig(
    plan=PLAN,
    visibility=Window(window=10, within="causal"),
    prefix_frames=2,
    circle=10,
    prefix_noise=0.0,
    drop_text=0.0,
    process=IDDPM(),
)
FRAMES, LENGTHS = 10, (1, 4, 7)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(prefix_attention: Any = "separate", **parts: Any) -> STDiT:
    """Every parameter random."""
    sizes: dict[str, Any] = dict(dim=24, num_layers=2, num_heads=2, freq_dim=16)
    net = STDiT(STDiTConfig(**sizes, prefix_attention=prefix_attention, mask_channel=True, **parts))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng(parameter.numel())) * 0.2
    return net.double()


def clips(size: int = 2, frames: int = FRAMES) -> Batch:
    return Batch(latents=torch.randn(size, frames, 4, 2, 4, generator=rng(5), dtype=torch.float64))


def stepped(config: CleanPrefixConfig, seed: int, batch: Batch | None = None) -> tuple[Any, Call, STDiT]:
    net = network()
    recorder = Recorder(net)
    result = CleanPrefix(config, backbone=recorder).step(batch or clips(), "student", 0, rng(seed))
    assert len(recorder.calls) == 1
    return result, recorder.calls[0], net


def test_recorded_rules_of_prefixes_and_first_positions(golden_json: Callable[[str], Any]) -> None:
    facts = golden_json("ca2vdm_config")["cases"]["tpe_ids_rules"]
    for name, want in facts["prefix_length_choices"].items():
        length, total, given = (int(part.split("=")[1]) for part in name.split(","))
        assert list(prefix_lengths(ChunkPlan(chunk=length, first=given), total)) == want
    generator = rng()
    for frames, want in facts["training_start_ids_seen_over_600_draws"].items():
        drawn = [drawn_positions(33, int(frames), generator) for _ in range(600)]
        first = Segment(kind=Kind.DENOISE, frames=range(1))
        seen = {policy.assign(first, BASE.visibility.visible(first))[1][0] for policy in drawn}
        assert sorted(seen) == want
    assert drawn_positions(None, 33, generator) == Absolute()


def test_a_step_by_hand() -> None:
    """Cut behind the chunk, clean before it, one level of all steps for a sample; every length is drawn."""
    seen, levels = set(), []
    for seed in range(24):
        result, call, _ = stepped(BASE, seed)
        prefix = int((call.sigma[0] == 0).sum())
        seen.add((prefix, call.x.shape[1]))
        latents = clips().latents
        assert latents is not None and torch.equal(call.x[:, :prefix], latents[:, :prefix])
        assert (call.sigma[:, :prefix] == 0).all() and (call.sigma[:, prefix:] == call.sigma[:, -1:]).all()
        assert (call.x[:, prefix:] != latents[:, prefix : prefix + 3]).all()
        levels += (1000 * call.sigma[:, -1]).tolist()
        assert set(call.context.mask.streams[0]) and result.metrics["loss"].isfinite()
        assert torch.isclose(result.loss, result.metrics["mse"] + result.metrics["bits"])
    assert seen == {(prefix, prefix + 3) for prefix in LENGTHS}
    assert all(abs(level - round(level)) < 1e-9 and 1 <= level <= 1000 for level in levels)
    assert len(set(levels)) > 40 and min(levels) < 200 and max(levels) > 800


def test_positions_turn_only_where_the_clip_fills_the_circle() -> None:
    firsts: dict[int, set[int]] = {}
    for seed in range(40):
        _, call, _ = stepped(BASE, seed)
        firsts.setdefault(call.x.shape[1], set()).add(int(call.context.positions[0]))
    assert firsts[4] == {0} and firsts[7] == {0} and len(firsts[10]) > 4


def test_a_clip_longer_than_the_circle_is_cut_to_it_and_turned() -> None:
    """Windows that no longer begin with the first latent frame, which alone stands for one pixel frame: what a stream
    meets after its first eviction."""
    batch, firsts, seen = clips(frames=16), set(), set()
    assert batch.latents is not None
    for seed in range(60):
        _, call, _ = stepped(BASE, seed, batch)
        prefix = int((call.sigma[0] == 0).sum())
        stop = next(k + prefix for k in range(17) if torch.equal(call.x[:, :prefix], batch.latents[:, k : k + prefix]))
        start, count = stop - prefix, call.x.shape[1]
        assert count == min(10, start + count) and (start + count - 1) % 3 == 0
        seen.add(start)
        positions = call.context.positions.tolist()
        assert [(p - positions[0]) % 10 for p in positions] == list(range(count))
        if count == 10:
            firsts.add(positions[0])
    assert seen == {0, 3, 6} and len(firsts) > 6
    partial = [stepped(BASE, seed, clips(frames=15))[1] for seed in range(40)]
    assert {call.x.shape[1] for call in partial} == {4, 7, 10, 9}, "the last chunk of 15 frames has two"
    spare = [stepped(replace(BASE, circle=12), seed, batch)[1] for seed in range(40)]
    assert {call.x.shape[1] for call in spare} == {4, 7, 10}, "12 positions, of which whole chunks take 10"
    least = replace(BASE, circle=4, visibility=Window(window=4, within="causal"))
    assert {stepped(least, seed, batch)[1].x.shape[1] for seed in range(20)} == {4}, "a past of what is given"
    with pytest.raises(ValueError, match="circle=3 positions leave no room for a past"):
        replace(BASE, circle=3, visibility=Window(window=3, within="causal"))


def test_a_perturbed_prefix_is_told_to_be_clean_and_changes_nothing_else() -> None:
    clean, noised = (stepped(replace(BASE, prefix_noise=level), 3)[1] for level in (0.0, 0.101))
    prefix = int((clean.sigma[0] == 0).sum())
    assert torch.equal(clean.sigma, noised.sigma) and torch.equal(clean.x[:, prefix:], noised.x[:, prefix:])
    off = (noised.x - clean.x)[:, :prefix]
    assert 0.2 < off.std() < 0.5, "sqrt(1 - a) is 0.324 at step 100"
    assert abs(float((off * clean.x[:, :prefix]).mean())) < 0.15, "noise of its own"


def test_a_network_that_makes_the_first_chunk_too_is_trained_behind_nothing() -> None:
    """Prefix 0 is one more length: the first chunk alone, noisy, at the positions at which a stream begins."""
    made = replace(BASE, makes_first=True, prefix_noise=0.1)
    seen: dict[int, Call] = {}
    for seed in range(30):
        result, call, _ = stepped(made, seed)
        assert result.loss.isfinite()
        seen[int((call.sigma[0] == 0).sum())] = call
    assert set(seen) == {0, *LENGTHS}
    assert seen[0].x.shape[1] == 1 and seen[0].context.positions.tolist() == [0]
    alone = CleanPrefix(made, backbone=network()).step(clips(frames=1), "student", 0, rng())
    assert alone.loss.isfinite()


def test_the_cached_rollout_computes_what_was_trained() -> None:
    """The noisy chunk of a step, from a cache into which the prefix was committed chunk by chunk."""
    for seed in range(6):
        _, call, net = stepped(BASE, seed)
        frames, prefix = call.x.shape[1], int((call.sigma[0] == 0).sum())
        offset = int(call.context.positions[0])
        cache = StreamCaches(
            net.sites, batch=2, tokens_per_frame=2, visibility=PrefixEnhanced(base=BASE.visibility, frames=2),
            positions=Cyclic(length=10, offset=offset), dtype=torch.float64,
        )  # fmt: skip
        out = torch.empty(0)
        with torch.no_grad():
            for part in PLAN.chunks(0, frames):
                kind = Kind.COMMIT if part.start < prefix else Kind.DENOISE
                context = cache.begin((Segment(kind=kind, frames=part),))
                out = net(call.x[:, part.start : part.stop], call.sigma[:, part.start : part.stop], call.cond, context)
                cache.promote()
        torch.testing.assert_close(out, call.prediction[:, prefix:], rtol=0, atol=1e-10)


OPEN = replace(BASE, bidirectional=True, circle=None, visibility=Window(window=6))


def test_a_bidirectional_forward_is_cut_to_what_the_chunk_reads() -> None:
    """A past of at most 3, the noisy frames read by all: the prediction is that of the bare clip at positions 0.."""
    plain = replace(OPEN, prefix_frames=None, makes_first=True)
    latents = clips().latents
    seen: dict[tuple[int, ...], list[int]] = {}
    assert latents is not None
    for seed in range(30):
        net = network("none")
        recorder = Recorder(net)
        result = CleanPrefix(plain, backbone=recorder).step(clips(), "student", 0, rng(seed))
        assert result.loss.isfinite()
        call = recorder.calls[0]
        count, past = call.x.shape[1], int((call.sigma[0] == 0).sum())
        firsts = [k for k in range(FRAMES) if past and torch.equal(call.x[:, :past], latents[:, k : k + past])]
        seen[(past, count, *firsts)] = call.context.positions.tolist()
        with torch.no_grad():
            want = net(call.x, call.sigma, call.cond, FullSequence(count))
        torch.testing.assert_close(call.prediction, want, rtol=0, atol=1e-12)
    assert set(seen) == {(0, 1), (1, 4, 0), (3, 6, 1), (3, 6, 4)}
    assert all(positions == list(range(key[1])) for key, positions in seen.items())


def test_the_recomputing_rollout_computes_what_was_trained() -> None:
    """With prefix-enhanced attention: the same forward as that of "recompute_bidirectional" over the same frames."""
    for seed in range(4):
        _, call, net = stepped(OPEN, seed)
        past = int((call.sigma[0] == 0).sum())
        start = 1 if past == 1 else 4
        cache = RecomputeBidirectional(
            net.sites, batch=2, tokens_per_frame=2, visibility=OPEN.sees, positions=WindowRelative()
        )
        segments = with_past(Segment(kind=Kind.DENOISE, frames=range(start, start + 3), sigma=0.5), PLAN, OPEN.sees, 0)
        with torch.no_grad():
            want = net(call.x, call.sigma, call.cond, cache.begin(segments))
        torch.testing.assert_close(call.prediction, want, rtol=0, atol=1e-12)


def test_gradients_reach_every_part_and_no_output_of_the_prefix() -> None:
    net, outputs = network(), []
    recorder = Recorder(net)
    net.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    loss = CleanPrefix(BASE, backbone=recorder).step(clips(), "student", 0, rng(2)).loss
    outputs[0].retain_grad()
    loss.backward()
    prefix = int((recorder.calls[0].sigma[0] == 0).sum())
    to_outputs = outputs[0].grad.abs().amax((0, 2, 3, 4))
    assert prefix >= 1 and (to_outputs[:prefix] == 0).all() and (to_outputs[prefix:] > 0).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_a_step_does_not_depend_on_how_its_batch_is_split() -> None:
    whole = clips(4)
    assert whole.latents is not None
    losses = []
    for rows in ([0, 1, 2, 3], [0, 1], [2, 3]):
        generator = SampleRng(9, rows, shared_seed=7)
        part = Batch(latents=whole.latents[rows])
        losses.append(CleanPrefix(BASE, backbone=network()).step(part, "student", 0, generator).loss.item())
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-12)


def test_text_is_dropped_and_cut_with_the_clip() -> None:
    spoken = Recorder(network(caption_dim=6, caption_len=3))
    null = torch.ones(3, 6, dtype=torch.float64)
    index = torch.tensor([[0] * 3 + [1] * 7]).repeat(2, 1)
    text = torch.randn(2, 2, 3, 6, generator=rng(1), dtype=torch.float64)
    batch = replace(clips(), text=text, prompt_index=index)
    predictions = []
    for share in (0.0, 1.0):
        config = replace(BASE, drop_text=share)
        CleanPrefix(config, backbone=spoken, null_text=null).step(batch, "student", 0, rng(1))
        call = spoken.calls[-1]
        assert call.cond.prompt_index is not None and call.cond.prompt_index.shape == call.x.shape[:2]
        predictions.append(call.prediction)
    assert (predictions[0] - predictions[1]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="of 6 channels"):
        CleanPrefix(BASE, backbone=spoken).step(clips(), "student", 0, rng())


def test_it_is_a_method_and_refuses_what_does_not_fit() -> None:
    method = locate("clean_prefix", METHODS)(BASE, backbone=network())
    assert isinstance(method, Method) and method.roles(0) == ("student",)
    with pytest.raises(ValueError, match="more than the 1 that are given"):
        method.step(clips(frames=1), "student", 0, rng())
    assert method.step(clips(frames=3), "student", 0, rng()).loss.isfinite()
    with pytest.raises(ValueError, match="role='critic'"):
        method.step(clips(), "critic", 0, rng())
    with pytest.raises(ValueError, match="prefix_noise"):
        replace(BASE, prefix_noise=1.5)
    with pytest.raises(ValueError, match="longer than window"):
        replace(BASE, visibility=Window(window=2))
    with pytest.raises(ValueError, match="chunk of 3 latent frames is shorter than prefix_frames=4"):
        replace(BASE, prefix_frames=4)
    with pytest.raises(ValueError, match="prefix_frames=0"):
        replace(BASE, prefix_frames=0)
    with pytest.raises(ValueError, match="length=9 cyclic positions for a window of 10"):
        replace(BASE, circle=9)
    with pytest.raises(ValueError, match="bidirectional=True with circle=10: expected circle=None"):
        replace(BASE, bidirectional=True)
    assert isinstance(stepped(replace(BASE, circle=None), 0)[1].context.positions, Tensor)
