"""Schedules: published step lists and grids, exact ends, refusals."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from conftest import golden_path
from unspool.diffusion.schedule import (
    Schedule,
    bell_weight,
    few_step,
    few_step_on_grid,
    reference_grid,
    shift_sigma,
    uniform,
    unshift_sigma,
)

GRID_TOLERANCE = 1e-6  # the golden grids were computed in float32


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open(str(golden_path("rollout_cases.safetensors")), "pt") as file:
        names = [key for key in file.keys() if key.startswith("schedule")]  # noqa: SIM118 (the file is no mapping)
        return {key: file.get_tensor(key).double() for key in names}


def test_golden_grids(golden: dict[str, torch.Tensor]) -> None:
    grid = torch.tensor(reference_grid(1000, shift=5.0), dtype=torch.float64)
    assert (grid - golden["schedule_shift5/sigmas"]).abs().max() < GRID_TOLERANCE
    assert (1000 * grid - golden["schedule_shift5/timesteps"]).abs().max() < 1000 * GRID_TOLERANCE
    solve = torch.tensor(uniform(50, shift=8.0).sigmas[:-1], dtype=torch.float64)
    assert (solve - golden["schedule_shift8_50/sigmas"]).abs().max() < GRID_TOLERANCE


def test_golden_training_weight(golden: dict[str, torch.Tensor]) -> None:
    want = golden["schedule_shift5/training_weight"]
    grid = reference_grid(1000, shift=5.0)
    weights = torch.tensor([bell_weight(sigma, shift=5.0) for sigma in grid], dtype=torch.float64)
    assert (weights - want).abs().max() < GRID_TOLERANCE
    in_float32 = bell_weight(torch.tensor(grid), shift=5.0)
    assert (in_float32.double() - want).abs().max() < 2 * GRID_TOLERANCE


def test_training_weight_has_mean_one_and_vanishes_at_noise() -> None:
    for shift, points in ((1.0, 10), (5.0, 1000), (8.0, 50)):
        grid = reference_grid(points, shift=shift)
        weights = [bell_weight(sigma, shift=shift, num_points=points) for sigma in grid]
        assert math.fsum(weights) / points == pytest.approx(1.0, abs=1e-12)
        assert weights[0] == 0.0 and min(weights[1:]) > 0.0


def test_published_step_lists() -> None:
    """Timesteps that the published models were trained at (closed form of the shifted grid)."""
    assert few_step((1000, 750, 500, 250), shift=5.0).sigmas == (1.0, 0.9375, 2.5 / 3.0, 0.625, 0.0)
    warped_8 = few_step((1000, 750, 500, 250, 0), shift=8.0)
    assert warped_8.sigmas == pytest.approx((1.0, 0.96, 8 / 9, 8 / 11, 0.0), abs=1e-15)
    assert few_step((757, 522), warp=False).sigmas == (0.757, 0.522, 0.0)


def test_step_list_on_the_grid_tells_the_network_the_listed_timestep() -> None:
    """CausVid compat: told 757 and 522, computed with 0.756757 and 0.521739, which are states 0, 36, 44 of 50."""
    schedule = few_step_on_grid((1000, 757, 522, 0), shift=8.0)
    assert schedule.conditioning == (1.0, 0.757, 0.522)
    assert schedule.sigmas == pytest.approx((1.0, 28 / 37, 12 / 23, 0.0), abs=1e-12)
    solve = uniform(50, shift=8.0).sigmas
    assert schedule.sigmas == pytest.approx((solve[0], solve[36], solve[44], 0.0), abs=1e-12)


def test_warping_equals_indexing_the_reference_grid() -> None:
    """Published code indexes its grid by 1000 - step; the closed form needs no grid and agrees with it."""
    for shift in (1.0, 5.0, 8.0):
        grid = reference_grid(1000, shift=shift)
        steps = (1000, 812, 750, 500, 250, 3)
        looked_up = [grid[1000 - step] for step in steps]
        assert few_step(steps, shift=shift).sigmas[:-1] == pytest.approx(looked_up, abs=1e-12)


@given(sigma=st.floats(0.0, 1.0), shift=st.floats(0.05, 20.0))
def test_shift_is_a_monotone_bijection_with_fixed_ends(sigma: float, shift: float) -> None:
    shifted = shift_sigma(sigma, shift)
    assert 0.0 <= shifted <= 1.0
    assert shift_sigma(0.0, shift) == 0.0 and shift_sigma(1.0, shift) == 1.0
    assert unshift_sigma(shifted, shift) == pytest.approx(sigma, abs=1e-12)
    assert (shifted >= sigma - 1e-15) if shift >= 1.0 else (shifted <= sigma + 1e-15)
    assert shifted == pytest.approx(shift * sigma / (1.0 + (shift - 1.0) * sigma), abs=1e-12)


def test_shift_of_a_tensor_equals_shift_of_its_floats() -> None:
    draws = torch.tensor([[0.0, 0.3], [0.9, 1.0]], dtype=torch.float64)
    want = [[shift_sigma(float(value), 5.0) for value in row] for row in draws]
    assert shift_sigma(draws, 5.0).tolist() == want


@given(num_steps=st.integers(1, 200), shift=st.floats(0.1, 20.0))
def test_uniform_schedules_are_valid_and_their_steps_chain(num_steps: int, shift: float) -> None:
    schedule = uniform(num_steps, shift=shift)
    assert schedule.num_steps == num_steps == len(schedule.steps)
    assert schedule.sigmas[0] == 1.0
    position = 1.0
    for index, step in enumerate(schedule.steps):
        assert (step.index, step.sigma, step.conditioning) == (index, position, position)
        position = step.next_sigma
    assert position == 0.0


def test_steps_carry_the_conditioning() -> None:
    schedule = Schedule((0.9, 0.4, 0.0), conditioning=(0.91, 0.41))
    assert [step.conditioning for step in schedule.steps] == [0.91, 0.41]
    assert [step.sigma for step in schedule.steps] == [0.9, 0.4]


@pytest.mark.parametrize(
    ("sigmas", "told", "match"),
    [
        ((), None, "final 0.0"),
        ((0.0,), None, "final 0.0"),
        ((1.0, 0.5), None, "final 0.0"),
        ((1000.0, 500.0, 0.0), None, r"in \[0, 1\]"),
        ((math.nan, 0.5, 0.0), None, r"in \[0, 1\]"),
        ((1.0, 0.5, 0.5, 0.0), None, "descending"),
        ((0.5, 1.0, 0.0), None, "descending"),
        ((1.0, 0.0, 0.0), None, "descending"),
        ((1.0, 0.5, 0.0), (1.0,), "one per step"),
        ((1.0, 0.5, 0.0), (1.0, 0.5, 0.0), "one per step"),
        ((1.0, 0.5, 0.0), (1.0, 500.0), r"in \[0, 1\]"),
    ],
)
def test_malformed_schedules_are_refused(sigmas: tuple[float, ...], told: tuple[float, ...] | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Schedule(sigmas, told)


@pytest.mark.parametrize("steps", [(), (0,), (250, 500), (1000, 1000), (1000, 0, 500), (1001, 500), (1000, -1)])
def test_malformed_step_lists_are_refused(steps: tuple[int, ...]) -> None:
    for make in (lambda: few_step(steps, shift=5.0), lambda: few_step_on_grid(steps, shift=5.0)):
        with pytest.raises(ValueError, match="descending timesteps"):
            make()


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="warp=False"):
        few_step((757, 522), shift=8.0, warp=False)
    with pytest.raises(ValueError, match="shift=None"):
        few_step((1000, 500))
    with pytest.raises(ValueError, match="descending"):
        few_step_on_grid((1000, 999.9), shift=5.0, num_points=10)
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive"):
            uniform(4, shift=shift)
        with pytest.raises(ValueError, match="positive"):
            unshift_sigma(0.5, shift)
    with pytest.raises(ValueError, match="num_steps"):
        uniform(0, shift=5.0)
    with pytest.raises(ValueError, match="at least 2"):
        bell_weight(0.5, shift=5.0, num_points=1)
    with pytest.raises(ValueError, match="divided by 1000"):
        shift_sigma(500.0, 5.0)


def test_schedules_and_the_dicts_of_names_need_no_torch() -> None:
    code = (
        "import sys, unspool.diffusion.schedule as s, unspool.rollout, unspool.rollout.solvers;"
        "s.few_step((1000, 500), shift=5.0); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
