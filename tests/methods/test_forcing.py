"""Diffusion and teacher forcing: the known optimum of autoregressive Gaussian latents, and the cached rollout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from gaussian import Call, Oracle, Recorder, Walk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Absolute, WindowRelative
from unspool.causal.visibility import Full, Kind, Segment, Window
from unspool.config import apply_overrides, from_dict, locate, to_dict
from unspool.data.batch import Batch
from unspool.diffusion.schedule import few_step
from unspool.methods import METHODS
from unspool.methods.base import Method
from unspool.methods.common import SigmaLaw
from unspool.methods.diffusion_forcing import DiffusionForcing, DiffusionForcingConfig
from unspool.methods.teacher_forcing import ContextNoise, TeacherForcing, TeacherForcingConfig
from unspool.models.base import Conditioning
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout, RolloutConfig

PLAN = ChunkPlan(chunk=2)
LAW = SigmaLaw(law="uniform", shift=1.0)
DF = DiffusionForcingConfig(plan=PLAN, visibility=Full(), sigma=LAW, weight="none", drop_text=0.0)
TF = TeacherForcingConfig(plan=PLAN, visibility=Full(), sigma=LAW, weight="none", drop_text=0.0)
WALK = Walk(mean=0.4, scale=0.9, decay=0.9)
SIZE, FRAMES = 16_000, 4
TOLERANCE = 1e-10  # max abs difference / std, fp64: cached against masked


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_wan() -> WanTransformer:
    """Every weight random, gates and head too."""
    network = WanTransformer(
        WanConfig(dim=24, ffn_dim=32, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=8,
                  text_len=5, freq_dim=16)
    ).double()  # fmt: skip
    draw = rng(6)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            values = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            fan = weight[0].numel() if weight.ndim > 1 and "modulation" not in name else 6
            weight.copy_(values / math.sqrt(fan) + ("norm" in name and name.endswith("weight")))
    return network.requires_grad_(False)


def clips(frames: int, prompts: int = 1, size: int = 2, seed: int = 9) -> Batch:
    draw = rng(seed)
    latents = torch.randn(size, frames, 4, 2, 4, generator=draw, dtype=torch.float64)
    text = torch.randn(size, prompts, 5, 8, generator=draw, dtype=torch.float64)
    index = torch.randint(prompts, (size, frames), generator=draw).sort(1).values if prompts > 1 else None
    return Batch(latents=latents, text=text, prompt_index=index)


def recorded(method: type, config: Any, network: nn.Module, batch: Batch, seed: int = 0) -> tuple[Any, Call]:
    """The result of one step, and the call that it made of the network."""
    recorder = Recorder(network)
    result = method(config, backbone=recorder).step(batch, "student", 0, rng(seed))
    assert len(recorder.calls) == 1
    return result, recorder.calls[0]


# ---- the optimum of AR(1) latents --------------------------------------------------------------------------------


def gradients(method: type, config: Any, oracle: Oracle, frames: int = FRAMES) -> tuple[float, Tensor, Tensor]:
    result, _ = recorded(method, config, oracle, WALK.batch(SIZE, frames))
    result.loss.backward()
    assert oracle.wrong.grad is not None and oracle.bias.grad is not None
    return result.loss.item(), oracle.wrong.grad, oracle.bias.grad


NOISY = dataclasses.replace(TF, context=ContextNoise(share=0.5, max_sigma=0.3))


@pytest.mark.parametrize(
    ("method", "config", "copies"),
    [
        (DiffusionForcing, DF, 1),
        (DiffusionForcing, dataclasses.replace(DF, visibility=Window(window=3)), 1),
        (DiffusionForcing, dataclasses.replace(DF, clean_first=0.5), 1),
        (TeacherForcing, TF, 2),
        (TeacherForcing, NOISY, 2),
        (TeacherForcing, dataclasses.replace(NOISY, visibility=Window(window=3, within="causal")), 2),
    ],
)
def test_the_best_answer_to_the_noisy_past_has_no_gradient(method: type, config: Any, copies: int) -> None:
    """The optimum is computed for the levels that the network is told, so this fails where the past has others."""
    oracle = Oracle(WALK, copies * FRAMES, clip=FRAMES)
    loss, wrong, bias = gradients(method, config, oracle)
    least = oracle.variance[:, -FRAMES:]
    if isinstance(config, DiffusionForcingConfig) and config.clean_first:
        assert math.isfinite(loss)  # the least loss depends on who was given; the gradient says it all
    else:
        assert abs(loss - float(least.mean())) < 5 * 1.5 * float(least.mean()) / SIZE**0.5
    limit = 5 * 2 / SIZE**0.5 / FRAMES
    assert wrong.abs().max() < limit and bias.abs().max() < limit
    blind = Oracle(dataclasses.replace(WALK, decay=0.0), copies * FRAMES, clip=FRAMES)
    worse, wrong, _ = gradients(method, config, blind)
    assert worse > 1.1 * loss and wrong.abs().max() > 5 * limit  # the past matters, and the test can fail


def test_gradient_reaches_only_what_a_chunk_may_read() -> None:
    for method, config, n in ((DiffusionForcing, DF, FRAMES), (TeacherForcing, TF, 2 * FRAMES)):
        oracle = Oracle(Walk(decay=0.3), n, clip=FRAMES)
        _, wrong, _ = gradients(method, config, oracle)
        own, past = slice(n - 2, n), slice(0, 2)
        assert (wrong[own, own] != 0).all() and (wrong[own, past] != 0).all()
        assert (wrong[n - FRAMES : n - 2, own] == 0).all()
        assert (wrong[: n - FRAMES] == 0).all()  # the clean copy carries no loss
    assert (wrong[6:, 4:6] == 0).all() and (wrong[6:, 2:4] == 0).all()  # no noisy past, no clean copy of itself


# ---- noise levels ------------------------------------------------------------------------------------------------


@given(first=st.sampled_from([None, 1, 2]), chunk=st.integers(1, 3), frames=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_one_sigma_per_chunk(first: int | None, chunk: int, frames: int) -> None:
    plan = ChunkPlan(chunk=chunk, first=first)
    for method, config in ((DiffusionForcing, DF), (TeacherForcing, TF)):
        oracle = Oracle(WALK, frames * (2 if config is TF else 1), clip=frames)
        _, call = recorded(method, dataclasses.replace(config, plan=plan), oracle, WALK.batch(3, frames))
        sigma = call.sigma[:, -frames:]
        for c in plan.chunks(0, frames):
            own = sigma[:, c.start : min(c.stop, frames)]
            assert (own == own[:, :1]).all()
        firsts = sigma[:, [c.start for c in plan.chunks(0, frames)]]
        assert len(firsts.unique()) == firsts.numel()
        if config is TF:
            assert (call.sigma[:, :frames] == 0).all()


def test_a_given_first_chunk_is_clean_and_carries_no_loss() -> None:
    batch = WALK.batch(2000, FRAMES)
    _, call = recorded(DiffusionForcing, dataclasses.replace(DF, clean_first=0.3), Oracle(WALK, FRAMES), batch)
    given = (call.sigma[:, :2] == 0).all(1)
    assert abs(float(given.double().mean()) - 0.3) < 0.05 and (call.sigma[~given] > 0).all()
    assert batch.latents is not None and torch.equal(call.x[given, :2], batch.latents[given, :2])
    always = Oracle(Walk(), FRAMES)
    _, _, bias = gradients(DiffusionForcing, dataclasses.replace(DF, clean_first=1.0), always)
    assert (bias[:2] == 0).all() and (bias[2:] != 0).all()


@pytest.mark.parametrize("per", ["sample", "chunk"])
@pytest.mark.parametrize("told", ["true", "commit"])
def test_context_noise_is_slight_its_own_and_told(per: Any, told: Any) -> None:
    """A published trainer indexes a descending grid with small integers, so its "slight" noise has sigma near 1, and
    it takes the noise of the noisy copy. Latents are 0 here, so what remains is the noise."""
    noise = ContextNoise(share=0.4, max_sigma=0.2, per=per, told=told)
    config = dataclasses.replace(TF, context=noise, sigma_commit=0.05)
    batch = dataclasses.replace(Walk().batch(SIZE, FRAMES), latents=torch.zeros(SIZE, FRAMES, 1, 1, 1).double())
    _, call = recorded(TeacherForcing, config, Oracle(Walk(), 2 * FRAMES, clip=FRAMES), batch)
    past, noisy = call.x[..., 0, 0, 0].split(FRAMES, 1)
    heard, sigma = call.sigma.split(FRAMES, 1)
    noised = (past != 0).all(1) if per == "sample" else past != 0
    assert abs(float(noised.double().mean()) - 0.4) < 0.03
    if per == "sample":
        assert ((past != 0).any(1) == noised).all()
    else:
        assert (noised[:, 0] == noised[:, 1]).all() and not (noised[:, 1] == noised[:, 2]).all()
    again, other = (recorded(TeacherForcing, config, Oracle(Walk(), 8, clip=4), batch, seed)[1].x for seed in (0, 1))
    assert torch.equal(again, call.x)  # and another seed has another noise, not only other levels:
    assert abs(float((past * other[:, :FRAMES, 0, 0, 0]).mean())) < 5 * past.var() / (SIZE * FRAMES) ** 0.5
    spread = float(past[past != 0].square().mean())
    assert abs(spread - 0.2**2 / 3) < 0.1 * 0.2**2 / 3  # E sigma^2 of sigma uniform in [0, 0.2]
    assert abs(float((past / past.std() * noisy / sigma).mean())) < 5 / (SIZE * FRAMES) ** 0.5
    if told == "commit":
        assert (heard == 0.05).all()
        return
    told_where = noised[:, None].expand_as(heard) if per == "sample" else noised
    assert (heard[~told_where] == 0.05).all() and (heard[told_where] <= 0.2).all()
    ratio = past[told_where] / heard[told_where]  # standard normal, if the level is the true one
    assert abs(float(ratio.square().mean()) - 1) < 5 * 2**0.5 / ratio.numel() ** 0.5


# ---- the cached rollout ------------------------------------------------------------------------------------------


def cached_predictions(network: WanTransformer, config: TeacherForcingConfig, call: Call, frames: int) -> Tensor:
    """The noisy half of a call again: chunk after chunk through a cache, each past chunk committed once."""
    past, noisy = call.x.split(frames, 1)
    told, sigma = call.sigma.split(frames, 1)
    index = None if call.cond.prompt_index is None else call.cond.prompt_index[:, :frames]
    cache = KVCache(
        network.sites, batch=len(past), tokens_per_frame=network.tokens_per_frame(*past.shape[3:]),
        visibility=config.visibility, positions=config.positions, dtype=torch.float64, device=torch.device("cpu"),
    )  # fmt: skip

    def forward(kind: Kind, c: range, x: Tensor, level: Tensor) -> Tensor:
        part = slice(c.start, c.stop)
        cond = Conditioning(prompts=call.cond.prompts, prompt_index=None if index is None else index[:, part])
        context = cache.begin((Segment(kind=kind, frames=c),))
        return network(x[:, part], level[:, part], cond, context)

    outputs = []
    for c in config.plan.chunks(0, frames):
        c = range(c.start, min(c.stop, frames))
        outputs.append(forward(Kind.DENOISE, c, noisy, sigma))
        forward(Kind.COMMIT, c, past, told)
        cache.promote()
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    "visibility", [Full(), Window(window=4, sink=1), Window(window=3), Window(window=5, sink=1, commit_window=3)]
)
@pytest.mark.parametrize("positions", [Absolute(), WindowRelative()])
def test_teacher_forcing_computes_what_the_cached_rollout_computes(
    visibility: Any, positions: Any, prompts: int
) -> None:
    network, frames = tiny_wan(), 7
    config = dataclasses.replace(
        TF, visibility=visibility, positions=positions, plan=ChunkPlan(chunk=2, first=1),
        context=ContextNoise(share=0.5, max_sigma=0.3),
    )  # fmt: skip
    batch = clips(frames, prompts)
    result, call = recorded(TeacherForcing, config, network, batch)
    cached = cached_predictions(network, config, call, frames)
    masked = call.prediction[:, frames:]
    assert (cached - masked).abs().max() <= TOLERANCE * masked.std()
    assert batch.latents is not None
    sigma = call.sigma[:, frames:, None, None, None]
    velocity = (call.x[:, frames:] - batch.latents) / sigma
    assert math.isclose(result.loss.item(), float((cached - velocity).square().mean()), rel_tol=1e-9)


def test_a_rollout_s_own_network_calls_are_those_of_teacher_forcing() -> None:
    """The clip that a `Rollout` made, fed back as data: at the rollout's noise and sigma the same prediction."""
    network, frames = tiny_wan(), 6
    batch = clips(frames)
    recorder = Recorder(network)
    assert batch.text is not None
    rollout = Rollout(
        recorder,
        RolloutConfig(plan=ChunkPlan(chunk=2, num_frames=frames), schedule=few_step((1000, 600), shift=1.0),
                      visibility=Full()),
        batch.text[:, 0], noise=CounterNoise(seed=3), latent_size=(2, 4),
    )  # fmt: skip
    with torch.no_grad():
        made = torch.cat([chunk.latents for chunk in rollout], 1)
    seen = [call for call in recorder.calls if float(call.sigma.max()) == 0.6]
    x = torch.cat([made, *[call.x for call in seen]], 1)
    sigma = torch.tensor([[0.0] * frames + [0.6] * frames], dtype=torch.float64)
    _, call = recorded(TeacherForcing, TF, network, dataclasses.replace(batch, latents=made))
    masked = network(x, sigma, call.cond, call.context)[:, frames:]
    cached = torch.cat([call.prediction for call in seen], 1)
    assert (cached - masked).abs().max() <= TOLERANCE * masked.std()


@pytest.mark.parametrize(("method", "config"), [(DiffusionForcing, DF), (TeacherForcing, TF)])
def test_later_chunks_do_not_change_a_prediction(method: type, config: Any) -> None:
    network, frames = tiny_wan(), 6
    batch = clips(frames)
    assert batch.latents is not None
    later = batch.latents.clone()
    later[:, 4:] += 3.0
    before = recorded(method, config, network, batch)[1].prediction[:, -frames:]
    after = recorded(method, config, network, dataclasses.replace(batch, latents=later))[1].prediction[:, -frames:]
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-12)
    assert (after[:, 4:] - before[:, 4:]).abs().amax((2, 3, 4)).min() > 1e-3
    earlier = batch.latents.clone()
    earlier[:, :2] += 3.0
    moved = recorded(method, config, network, dataclasses.replace(batch, latents=earlier))[1].prediction[:, -frames:]
    assert (moved - before).abs().amax((2, 3, 4)).min() > 1e-4  # and every later chunk reads the first


# ---- the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diffusion_forcing", "teacher_forcing"])
def test_contract(name: str) -> None:
    config = DF if name == "diffusion_forcing" else TF
    recorder = Recorder(tiny_wan())
    method = locate(name, METHODS)(config, backbone=recorder)
    assert isinstance(method, Method) and method.roles(0) == ("student",)
    losses = [method.step(clips(frames), "student", 0, rng(2)).loss.item() for frames in (6, 4, 6)]
    assert losses[0] == losses[2] and method.step(clips(6), "student", 0, rng(3)).loss.item() != losses[0]
    assert recorder.calls[0].context is recorder.calls[2].context is not recorder.calls[1].context
    dense = dataclasses.replace(config, backend="dense")
    other = locate(name, METHODS)(dense, backbone=recorder).step(clips(6), "student", 0, rng(2))
    assert math.isclose(other.loss.item(), losses[0], rel_tol=1e-9)
    with pytest.raises(ValueError, match="no latents"):
        method.step(Batch(text=torch.zeros(1, 1, 5, 8)), "student", 0, rng())
    with pytest.raises(ValueError, match="no text"):
        method.step(Batch(latents=clips(4).latents), "student", 0, rng())
    with pytest.raises(ValueError, match="role"):
        method.step(clips(4), "teacher", 0, rng())


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0, 3.0])
def test_what_a_clip_begins_with_counts_as_much_as_is_said(weight: float) -> None:
    network, batch, frames = tiny_wan(), clips(5), 5  # chunks of 2, 2 and 1
    result, call = recorded(TeacherForcing, dataclasses.replace(TF, first_weight=weight), network, batch)
    x, sigma, x0 = call.x[:, frames:], call.sigma[:, frames:, None, None, None], batch.latents
    assert x0 is not None
    target = (x - (1 - sigma) * x0) / sigma - x0
    said = network(call.x, call.sigma, call.cond, call.context)[:, frames:]
    error = (said - target).square().flatten(2).mean(2).mean(0)
    torch.testing.assert_close(result.loss, (weight * error[:2].sum() + error[2:].sum()) / frames)


def test_one_clean_chunk_alone_is_refused() -> None:
    config = dataclasses.replace(DF, clean_first=0.1)
    with pytest.raises(ValueError, match="longer clips"):
        DiffusionForcing(config, backbone=tiny_wan()).step(clips(2), "student", 0, rng())


def test_configs() -> None:
    for config in (DF, TF, NOISY, dataclasses.replace(TF, visibility=Window(window=9, sink=3))):
        assert from_dict(type(config), to_dict(config)) == config
    moved = apply_overrides(NOISY, ["context.max_sigma=0.1", "context.told=commit", "plan.chunk=3"])
    assert moved.context.max_sigma == 0.1 and moved.plan.chunk == 3
    window = dataclasses.replace(TF, visibility=Window(window=4, sink=1))
    for config, overrides in (
        (window, ["plan.chunk=4"]), (TF, ["sigma_commit=2"]), (TF, ["context.share=0.5"]), (TF, ["weight=no"]),
        (NOISY, ["context.max_sigma=1.5"]), (NOISY, ["context.per=frame"]), (DF, ["clean_first=2"]),
        (DF, ["drop_text=-1"]), (TF, ["first_weight=-0.1"]), (TF, ["first_weight=.inf"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected|use|set both"):
            apply_overrides(config, overrides)
