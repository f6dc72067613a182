"""Where samples come from: noised data, rollouts, and which gradients a rollout keeps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
from tiny import CHANNELS, SIZE, TEXT_DIM, TEXT_ROWS, make_network, text

from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import ReanchoredSink
from unspool.causal.visibility import Full, Window
from unspool.data.batch import Batch, TrajectoryBatch
from unspool.diffusion.schedule import Schedule
from unspool.methods import on_policy as module
from unspool.methods.common import BatchPrompts, Student
from unspool.methods.consistency import ConsistencyConfig
from unspool.methods.draws import SampleRng, normal, shared_integer
from unspool.methods.ode_regression import OdeRegression, OdeRegressionConfig
from unspool.methods.on_policy import OnPolicyConfig, timeline
from unspool.methods.samples import NoisedDataConfig, StepList
from unspool.methods.scores import Conditioner, Score, ScoreConfig, ScoreLevels, joined
from unspool.models.wan.network import WanTransformer
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout

STEPS = StepList(steps=(1000.0, 750.0, 500.0, 250.0), shift=3.0)
PLAN = ChunkPlan(chunk=2)
FRAMES = 6


def prompts(*numbers: int, index: Tensor | None = None) -> BatchPrompts:
    return BatchPrompts(states=torch.stack([text(n) for n in numbers], dim=1), index=index)


def on_policy(**values: Any) -> OnPolicyConfig:
    return OnPolicyConfig(**{"steps": STEPS, "plan": PLAN, "frames": FRAMES, "latent_size": SIZE, **values})


def exiting_at(step: int) -> torch.Generator:
    """A generator whose first integer is the wanted exit step."""
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        if shared_integer(4, rng) == step:
            return torch.Generator().manual_seed(seed)
    raise AssertionError


def sample(network: WanTransformer, config: OnPolicyConfig, exit_step: int, grad: bool = True) -> Tensor:
    with torch.set_grad_enabled(grad):
        made = config.build()(Student(network), Batch(), prompts(0), prompts(9), exiting_at(exit_step))
    return made.latents


def noise_of(exit_step: int) -> Tensor:
    rng = exiting_at(exit_step)
    shared_integer(4, rng)
    return normal((2, exit_step + 1, FRAMES, CHANNELS, *SIZE), rng)


@pytest.mark.parametrize("exit_step", range(4))
def test_a_sample_is_the_rollout_up_to_its_exit_step(exit_step: int) -> None:
    """Steps before run as they will in a stream; the estimate at the exit step is what later chunks see."""
    network = make_network()
    got = sample(network, on_policy(), exit_step, grad=False)
    config = on_policy().rollout(STEPS.schedule)
    noise = noise_of(exit_step)
    short = replace(config, schedule=Schedule((*STEPS.schedule.sigmas[: exit_step + 1], 0.0)))
    renoise = noise[:, 1:].transpose(0, 1) if exit_step else None
    stream = Rollout(network, short, text(0), noise=RecordedNoise(noise[:, 0], renoise), latent_size=SIZE)
    with torch.no_grad():
        seen = [stream.next_chunk().latents for _ in range(3)]
    torch.testing.assert_close(got, torch.cat(seen, 1), rtol=0, atol=1e-12)


def flat_gradient(loss: Tensor, network: WanTransformer) -> Tensor:
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


VISIBLE: list[Any] = [Full(), Window(window=4), Window(window=6, sink=2)]


@pytest.mark.parametrize("visibility", VISIBLE, ids=["full", "window", "sink"])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_no_gradient_through_what_later_chunks_read(exit_step: int, visibility: Any) -> None:
    """The last chunk's gradient is that of a rollout whose earlier chunks were given as clean latents."""
    network = make_network()
    config = on_policy(visibility=visibility)
    whole = sample(network, config, exit_step)
    got = flat_gradient(whole[:, 4:].square().sum(), network)

    noise = noise_of(exit_step)
    renoise = noise[:, 1:].transpose(0, 1) if exit_step else None
    given = replace(config.rollout(Schedule((*STEPS.schedule.sigmas[: exit_step + 1], 0.0))))
    stream = Rollout(
        network, given, text(0), noise=RecordedNoise(noise[:, 0], renoise), latent_size=SIZE,
        prefix=whole[:, :4].detach(), grad=lambda chunk, step: step == exit_step,
    )  # fmt: skip
    alone = stream.next_chunk().latents
    torch.testing.assert_close(alone, whole[:, 4:], rtol=0, atol=1e-9)
    want = flat_gradient(alone.square().sum(), network)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_steps_before_the_exit_carry_no_gradient() -> None:
    """The gradient is that of one forward at the exit step on a fixed input."""
    network = make_network()
    loss = sample(network, on_policy(), 3).square().sum()
    deep = flat_gradient(loss, network)
    assert deep.isfinite().all() and deep.abs().max() > 0
    calls = []
    handle = network.register_forward_hook(lambda module, args, out: calls.append(out.requires_grad))
    sample(network, on_policy(), 3)
    handle.remove()
    # per chunk three steps without, the exit step with; and the commit pass of all chunks but the last without
    assert calls == [False, False, False, True, False] * 2 + [False, False, False, True]


@pytest.mark.parametrize("visibility", VISIBLE, ids=["full", "window", "sink"])
def test_through_kv_has_the_same_values_and_more_gradient(visibility: Any) -> None:
    network = make_network()
    cut, through = on_policy(visibility=visibility), on_policy(visibility=visibility, through_kv=True)
    one, other = sample(network, cut, 2), sample(network, through, 2)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    torch.testing.assert_close(sample(network, through, 2, grad=False), one.detach(), rtol=0, atol=1e-12)
    first = [flat_gradient(x[:, :2].square().sum(), network) for x in (sample(network, cut, 2), other)]
    torch.testing.assert_close(first[0], first[1], rtol=1e-7, atol=1e-9)  # the first chunk reads nothing
    last = [flat_gradient(sample(network, c, 2)[:, 4:].square().sum(), network) for c in (cut, through)]
    assert (last[0] - last[1]).abs().max() > 1e-3 * last[0].abs().max()


def test_through_kv_is_the_gradient_of_what_was_written() -> None:
    """Moving a weight by a small step changes the loss as its gradient says, the emitted latents held fixed."""
    network = make_network()
    config = on_policy(through_kv=True)
    kept: list[Tensor] = []
    loss = sample(network, config, 1)[:, 4:].square().sum()
    gradient = flat_gradient(loss, network)
    weight = network.blocks[1].self_attn.o.weight
    place = sum(
        p.numel() for p in list(network.parameters())[: [p is weight for p in network.parameters()].index(True)]
    )
    # the replay is a function of the weights for fixed latents and states before the last step
    original = module._Run.latents

    def fixed(self: Any, student: Any, solver: Any = None) -> Tensor:
        if not kept:
            kept.extend([original(self, student, solver), torch.cat(solver.before, dim=1)])
        else:
            solver.before = [kept[1]]
        return kept[0]

    module._Run.latents = fixed  # type: ignore[method-assign, assignment]
    try:
        values = []
        sample(network, config, 1)
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, 0] += sign * 1e-5
            values.append(sample(network, config, 1)[:, 4:].square().sum().item())
            with torch.no_grad():
                weight[0, 0] -= sign * 1e-5
    finally:
        module._Run.latents = original  # type: ignore[method-assign]
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[place].item(), rel=1e-5)


def test_each_chunk_follows_its_own_prompt_per_sample() -> None:
    """Sample 0 changes at chunk 1, sample 1 at chunk 2: as two rollouts of one sample each."""
    network = make_network()
    index = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    both = prompts(0, 1, index=index)
    noise = noise_of(2)
    with torch.no_grad():
        got = on_policy().build()(Student(network), Batch(), both, both, exiting_at(2))
        assert got.prompts.index is not None
        assert got.prompts.index.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
        config = on_policy().rollout(StepList(steps=(1000.0, 750.0, 500.0), shift=3.0).schedule)
        for row, frame in ((0, 2), (1, 4)):
            switch = Switch(frame=frame, text=text(1)[row : row + 1], policy="keep")
            line = PromptTimeline(text(0)[row : row + 1], [switch])
            own = RecordedNoise(noise[row : row + 1, 0], noise[row : row + 1, 1:].transpose(0, 1))
            stream = Rollout(network, config, line, noise=own, latent_size=SIZE)
            alone = torch.cat([stream.next_chunk().latents for _ in range(3)], 1)
            torch.testing.assert_close(got.latents[row : row + 1], alone, rtol=0, atol=1e-9)
    assert len(timeline(got.prompts, PLAN, FRAMES).switches) == 2


def test_bounds_of_the_score_follow_the_exit_step() -> None:
    network = make_network()
    for exit_step in range(4):
        made = on_policy(restrict=True).build()(
            Student(network), Batch(), prompts(0), prompts(9), exiting_at(exit_step)
        )
        low, high = (*STEPS.schedule.sigmas, 0.0)[exit_step + 1], STEPS.schedule.sigmas[exit_step]
        assert made.bounds == pytest.approx((low, high))
        for levels in (ScoreLevels(shift=STEPS.shift), ScoreLevels(shift=8.0), ScoreLevels(shift=8.0, points=0)):
            drawn = levels.draw(500, torch.Generator().manual_seed(1), made.bounds)
            assert max(low, levels.low) - 1e-3 <= drawn.min() and drawn.max() < min(high, levels.high) + 1e-3
    assert on_policy().build()(Student(network), Batch(), prompts(0), prompts(9), exiting_at(1)).bounds == (0.0, 1.0)


def test_all_ranks_draw_one_exit_step() -> None:
    drawn = [shared_integer(1000, SampleRng(seed, [seed, seed + 1], shared_seed=7)) for seed in range(5)]
    assert len(set(drawn)) == 1
    assert len({shared_integer(1000, SampleRng(0, [1], shared_seed=s)) for s in range(5)}) > 1


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_a_clean_past_is_told_the_level_of_commit_passes(level: float) -> None:
    """As a network that was trained with that level, and streams with it, knows its past."""
    network, told = make_network(), []
    network.register_forward_hook(lambda module, args, out: told.append(args[1]))
    x0 = torch.randn(2, FRAMES, CHANNELS, *SIZE, dtype=torch.float64)
    config = ScoreConfig(reads="clean_past", plan=PLAN, sigma_commit=level)
    with torch.no_grad():
        Score(config, Student(network)).x0(x0, torch.full((2, 1), 0.5), prompts(0), prompts(9), x0)
        ode = OdeRegressionConfig(steps=STEPS, plan=PLAN, past="clean", clean=False, sigma_commit=level)
        states = torch.randn(2, 5, FRAMES, CHANNELS, *SIZE, dtype=torch.float64)
        batch = TrajectoryBatch(trajectory=states, sigmas=STEPS.schedule.sigmas, latents=states[:, -1],
                                text=prompts(0).states)  # fmt: skip
        method = OdeRegression(ode, backbone=network)
        method.step(batch, "student", 0, torch.Generator().manual_seed(0))
    assert len(told) == 2
    for levels in told:
        torch.testing.assert_close(levels[:, :FRAMES].double(), torch.full((2, FRAMES), level).double())
        assert (levels[:, FRAMES:] >= 0.25).all()


def test_levels_of_a_past_that_is_not_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_commit=0\.1 has no effect where no clean past is read"):
        ScoreConfig(reads="noisy_past", plan=PLAN, sigma_commit=0.1)
    with pytest.raises(ValueError, match="has no effect"):
        OdeRegressionConfig(steps=STEPS, plan=PLAN, sigma_commit=0.1)
    with pytest.raises(ValueError, match=r"sigma_commit=5\.0: expected a noise level"):
        ConsistencyConfig(grid=8, shift=2.0, guidance_from_uncond=2.0, plan=PLAN, decay=0.9, sigma_commit=5.0)


def test_noised_data_reads_levels_of_the_list_chunk_by_chunk() -> None:
    network = make_network()
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    x0 = torch.randn(2, FRAMES, CHANNELS, *SIZE, dtype=torch.float64)
    config = NoisedDataConfig(steps=STEPS, plan=PLAN)
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        made = config.build()(Student(network), Batch(latents=x0), prompts(0), prompts(9), rng)
        sigma = seen[-1]
        clean = (sigma == 0)[..., None, None, None].expand_as(x0)
        assert torch.equal(made.latents[clean], x0[clean])
        assert torch.equal(sigma[:, ::2], sigma[:, 1::2])
    handle.remove()
    levels = sorted(set(torch.cat(seen).flatten().tolist()))
    assert levels == pytest.approx(sorted(STEPS.schedule.sigmas))


def test_noised_data_without_clean_chunks() -> None:
    network = make_network()
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    config = NoisedDataConfig(steps=STEPS, plan=PLAN, clean=False)
    x0 = torch.randn(2, FRAMES, CHANNELS, *SIZE, dtype=torch.float64)
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        config.build()(Student(network), Batch(latents=x0), prompts(0), prompts(9), rng)
    handle.remove()
    assert torch.cat(seen).min() > 0


def test_published_lists_are_told_as_published() -> None:
    """CausVid's 1000, 757, 522 at shift 8: the algebra uses the grid, the network hears the list."""
    steps = StepList(steps=(1000.0, 757.0, 522.0), shift=8.0, warp=False)
    assert steps.schedule.conditioning == (1.0, 0.757, 0.522)
    with pytest.raises(ValueError, match="begin at 1000"):
        StepList(steps=(900.0, 500.0), shift=3.0)


def test_conditioner_reads_ready_made_text() -> None:
    null = torch.randn(TEXT_ROWS, TEXT_DIM, dtype=torch.float64)
    cond, uncond = Conditioner(null_text=null)(Batch(text=text(3)[:, None]))
    assert cond.states is not None and uncond.states is not None
    assert torch.equal(cond.states[:, 0], text(3)) and torch.equal(uncond.states[1, 0], null)
    both = joined(cond, BatchPrompts(states=uncond.states[:, :, :3]))
    assert both.states is not None and both.states.shape == (4, 1, TEXT_ROWS, TEXT_DIM)


@pytest.mark.parametrize(
    "values", [{"frames": 5}, {"exit": "first"}, {"visibility": Window(window=1)}], ids=["frames", "exit", "window"]
)
def test_bad_settings(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"use|expected|window"):
        on_policy(**values)


def test_positions_that_move_keys_are_replayed_too() -> None:
    network = make_network()
    moved = {"visibility": Window(window=4, sink=1), "positions": ReanchoredSink()}
    one = sample(network, on_policy(**moved), 2)
    other = sample(network, on_policy(**moved, through_kv=True), 2)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
