"""Solvers against Gaussian data N(mean, var), whose denoiser and probability flow are known in closed form.

x0(x, sigma) = mean + var a / (a^2 var + sigma^2) (x - a mean) with a = 1 - sigma, and the exact solution of the flow
ODE from pure noise z is mean + sqrt(var) z. Orders are slopes of log error over log steps, in float64.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.schedule import Schedule, few_step, uniform
from unspool.rollout.solvers import SOLVERS
from unspool.rollout.solvers.base import Noise, Solver
from unspool.rollout.solvers.euler import Euler
from unspool.rollout.solvers.fewstep import FewStep
from unspool.rollout.solvers.multistep import Multistep

MEAN, VAR = 0.7, 0.3
FLOW = FlowMatching()


def uneven(num_steps: int) -> Schedule:
    """Steps of 1.3 and 0.7 of the mean by turns, from sigma 1: the worst case for wrong multistep coefficients."""
    inner = [1.0 - (index + 0.3 * (index % 2)) / num_steps for index in range(num_steps)]
    return Schedule((*inner, 0.0))


def quadratic(num_steps: int) -> Schedule:
    """Steps that shrink towards 0, from sigma 1."""
    return Schedule(tuple((1.0 - index / num_steps) ** 2 for index in range(num_steps + 1)))


GRIDS: dict[str, Callable[[int], Schedule]] = {
    "even": lambda num_steps: uniform(num_steps, shift=1.0),
    "shift 3": lambda num_steps: uniform(num_steps, shift=3.0),
    "uneven": uneven,
    "quadratic": quadratic,
}


def posterior_mean(x: Tensor, sigma: float, mean: Tensor | float = MEAN) -> Tensor:
    a = 1.0 - sigma
    return mean + VAR * a / (a * a * VAR + sigma * sigma) * (x - a * mean)


def unexpected_noise() -> Tensor:
    raise AssertionError("a deterministic solver drew noise")


def solve(
    solver: Solver, schedule: Schedule, x: Tensor, denoiser: Callable[[Tensor, float], Tensor], noise: Noise
) -> Tensor:
    state = solver.start()
    for step in schedule.steps:
        x, state = solver.step(x, denoiser(x, step.sigma), step.sigma, step.next_sigma, noise, state)
    return x


def start_noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def measured_order(solver: Solver, grid: Callable[[int], Schedule]) -> float:
    z = start_noise()
    exact = MEAN + math.sqrt(VAR) * z
    counts = (64, 128, 256, 512)
    errors = [(solve(solver, grid(n), z, posterior_mean, unexpected_noise) - exact).abs().max().item() for n in counts]
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize("grid", GRIDS)
def test_euler_has_order_one(grid: str) -> None:
    assert measured_order(Euler(), GRIDS[grid]) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("grid", GRIDS)
def test_multistep_has_order_two_on_even_and_uneven_steps(grid: str) -> None:
    assert measured_order(Multistep(), GRIDS[grid]) == pytest.approx(2.0, abs=0.2)


def test_euler_is_the_explicit_step_along_the_velocity() -> None:
    x, x0 = start_noise(0), start_noise(1)
    velocity = FLOW.from_x0(x, x0, 0.8)
    moved, _ = Euler().step(x, x0, 0.8, 0.3, None, ())
    torch.testing.assert_close(moved, x + (0.3 - 0.8) * velocity, rtol=0, atol=1e-14)


def test_multistep_is_exact_where_the_velocity_is_linear_in_sigma() -> None:
    """The defining property of the coefficients: v = p + q sigma is integrated exactly after the first step."""
    p, q = start_noise(1), start_noise(2)
    sigmas = (0.95, 0.9, 0.62, 0.55, 0.1)
    path = [p * sigma + q * sigma**2 / 2 for sigma in sigmas]
    x0 = [x - sigma * (p + q * sigma) for x, sigma in zip(path, sigmas, strict=True)]
    solver = Multistep()
    _, state = solver.step(path[0], x0[0], sigmas[0], sigmas[1], None, solver.start())
    for index in range(1, 4):
        moved, state = solver.step(path[index], x0[index], sigmas[index], sigmas[index + 1], None, state)
        torch.testing.assert_close(moved, path[index + 1], rtol=0, atol=1e-13)


def spread(coefficients: Tensor) -> float:
    return coefficients[1:].square().sum().item()


def renoised(denoiser: Callable[[Tensor, float], Tensor], schedule: Schedule) -> Tensor:
    """Exact propagation of a linear sampler: entry 0 is the mean, entry i the coefficient of independent noise i."""
    size = schedule.num_steps + 1
    basis = iter(torch.eye(size, dtype=torch.float64)[1:].reshape(-1, 1, 1, 1, 1, size))
    x = next(basis)
    return solve(FewStep(), schedule, x, denoiser, lambda: next(basis)).flatten()


@pytest.mark.parametrize("schedule", [few_step((1000, 750, 500, 250), shift=5.0), uneven(9), uniform(40, shift=1.0)])
def test_few_step_keeps_the_distribution_with_a_perfect_consistency_function(schedule: Schedule) -> None:
    """Property, not order: x0 = mean + sqrt(var / (a^2 var + sigma^2)) (x - a mean) ends on N(mean, var) exactly."""
    mean = torch.zeros(schedule.num_steps + 1, dtype=torch.float64)
    mean[0] = MEAN

    def consistency(x: Tensor, sigma: float) -> Tensor:
        a = 1.0 - sigma
        return mean + math.sqrt(VAR / (a * a * VAR + sigma * sigma)) * (x - a * mean)

    result = renoised(consistency, schedule)
    assert result[0].item() == pytest.approx(MEAN, abs=1e-12)
    assert spread(result) == pytest.approx(VAR, abs=1e-12)


def test_few_step_with_the_posterior_mean_keeps_the_mean_and_loses_spread_for_good() -> None:
    """Stated limitation: re-noising is not an ODE solver; with the posterior mean more steps do not mend the spread."""

    def spread_after(num_steps: int) -> float:
        mean = torch.zeros(num_steps + 1, dtype=torch.float64)
        mean[0] = MEAN
        result = renoised(lambda x, sigma: posterior_mean(x, sigma, mean), uniform(num_steps, shift=1.0))
        assert result[0].item() == pytest.approx(MEAN, abs=1e-12)
        return spread(result)

    assert spread_after(1) == 0.0
    assert all(spread_after(num_steps) < 0.75 * VAR for num_steps in (4, 64, 512))


def test_few_step_keeps_the_distribution_with_posterior_samples() -> None:
    """The same for x0 drawn from p(x0 | x): mean and variance of 400,000 values, to five standard errors."""
    rng = torch.Generator().manual_seed(3)

    def draw() -> Tensor:
        return torch.randn(1, 4, 1, 100, 1000, generator=rng, dtype=torch.float64)

    def posterior_sample(x: Tensor, sigma: float) -> Tensor:
        a = 1.0 - sigma
        return posterior_mean(x, sigma) + math.sqrt(VAR * sigma**2 / (a * a * VAR + sigma * sigma)) * draw()

    result = solve(FewStep(), few_step((1000, 750, 500, 250), shift=5.0), draw(), posterior_sample, draw)
    count = result.numel()
    assert abs(result.mean().item() - MEAN) < 5 * math.sqrt(VAR / count)
    assert abs(result.var().item() - VAR) < 5 * VAR * math.sqrt(2 / count)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contract_of_every_solver(name: str, dtype: torch.dtype) -> None:
    """Built by name; keeps the dtype of x; the last step returns x0 itself; draws noise only if it says so."""
    module, attribute = SOLVERS[name].split(":")
    solver = getattr(importlib.import_module(module), attribute)()
    assert isinstance(solver, Solver)
    x, x0 = start_noise(0, dtype), start_noise(1, dtype)
    calls: list[int] = []

    def noise() -> Tensor:
        calls.append(1)
        return start_noise(2)

    state = solver.start()
    for sigma, next_sigma in ((1.0, 0.8), (0.8, 0.5)):
        moved, state = solver.step(x, x0, sigma, next_sigma, noise, state)
        assert moved.dtype == dtype and isinstance(state, tuple)
    assert len(calls) == (2 if solver.needs_noise else 0)
    last, _ = solver.step(x, x0, 0.5, 0.0, None, state)
    assert last is x0


@pytest.mark.parametrize("name", SOLVERS)
def test_resuming_from_a_stored_state_is_bitwise_the_same(name: str) -> None:
    """The state is all there is: stored to bytes in mid-chunk, read into a new solver, the result does not change."""
    module, attribute = SOLVERS[name].split(":")
    make = getattr(importlib.import_module(module), attribute)
    schedule = uniform(6, shift=3.0)
    noises = [start_noise(10 + index, torch.float32) for index in range(6)]

    def run(solver: Solver, x: Tensor, first: int, last: int, state: object) -> tuple[Tensor, object]:
        for step in schedule.steps[first:last]:
            x0 = posterior_mean(x, step.conditioning)
            x, state = solver.step(x, x0, step.sigma, step.next_sigma, noises[step.index], state)  # type: ignore[arg-type]
        return x, state

    x = start_noise(0, torch.float32)
    whole, _ = run(make(), x, 0, 6, make().start())
    halfway = run(make(), x, 0, 3, make().start())
    stored = io.BytesIO()
    torch.save(halfway, stored)
    # Interleaved with another chunk on the same solver object: nothing may stick to it.
    shared = make()
    run(shared, start_noise(5, torch.float32), 0, 6, shared.start())
    stored.seek(0)
    middle, state = torch.load(stored, weights_only=True)
    resumed, _ = run(shared, middle, 3, 6, state)
    assert torch.equal(whole, resumed)


def test_multistep_keeps_its_state_in_float32_for_half_precision_latents() -> None:
    """A velocity rounded to bfloat16 in the state would put a second error into each step."""
    solver = Multistep()
    x, x0 = start_noise(0, torch.bfloat16), start_noise(1, torch.bfloat16)
    _, state = solver.step(x, x0, 0.9, 0.5, None, solver.start())
    assert state[0][1].dtype == torch.float32
    torch.testing.assert_close(state[0][1], (x.float() - x0.float()) / 0.9)


@pytest.mark.parametrize("solver", [FewStep(), Euler(), Multistep()], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize(
    ("sigma", "next_sigma"), [(0.5, 0.5), (0.5, 0.8), (1.1, 0.5), (0.5, -0.1), (0.0, 0.0), (math.nan, 0.0)]
)
def test_moves_that_do_not_denoise_are_refused(solver: Solver, sigma: float, next_sigma: float) -> None:
    x = start_noise()
    with pytest.raises(ValueError, match="next_sigma < sigma"):
        solver.step(x, x, sigma, next_sigma, x, solver.start())


def test_missing_noise_and_a_state_of_another_chunk_are_refused() -> None:
    x = start_noise()
    with pytest.raises(ValueError, match="noise=None"):
        FewStep().step(x, x, 1.0, 0.5, None, ())
    solver = Multistep()
    _, state = solver.step(x, x, 0.5, 0.4, None, solver.start())
    with pytest.raises(ValueError, match="anew"):
        solver.step(x, x, 1.0, 0.9, None, state)


def test_few_step_takes_a_tensor_or_a_function_of_noise() -> None:
    x, x0, noise = start_noise(0), start_noise(1), start_noise(2)
    from_tensor, _ = FewStep().step(x, x0, 1.0, 0.6, noise, ())
    from_function, _ = FewStep().step(x, x0, 1.0, 0.6, lambda: noise, ())
    assert torch.equal(from_tensor, from_function)
    torch.testing.assert_close(from_tensor, 0.4 * x0 + 0.6 * noise)
