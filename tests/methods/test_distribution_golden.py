"""Losses, draws and targets of distillation against the recorded ones of published code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.schedule import Schedule, few_step, shift_sigma, uniform
from unspool.methods.common import velocity_loss
from unspool.methods.dmd import dmd_gradient, dmd_loss
from unspool.methods.ode_regression import regression_loss
from unspool.methods.scores import ScoreLevels
from unspool.rollout.guidance import combine

Golden = Callable[[str], dict[str, Tensor]]
Facts = Callable[[str], Any]
FLOW = FlowMatching()
ULP = 1.3e-4  # two roundings of a float32 timestep near 1000, in which the record was made
DMD = ["dmd_plain", "dmd_guidance_zero", "dmd_fake_guidance", "dmd_mask_first_chunk", "dmd_mask_per_frame",
       "dmd_other_shift", "dmd_schedule_bounds"]  # fmt: skip


def case(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name + "/"): t for key, t in tensors.items() if key.startswith(name + "/")}


def levels(draw: Tensor, shift: float) -> Tensor:
    return ScoreLevels(shift=shift).of(draw.double() / 1000)


def scores(tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Guided teacher and critic; the record's g of cond + g (cond - uncond) is our scale less 1."""
    given = case(tensors, "inputs")
    teacher = combine(given["real_cond"].double(), given["real_uncond"].double(), 1 + facts["guidance"])
    critic = combine(given["fake_cond"].double(), given["fake_uncond"].double(), 1 + facts["fake_guidance"])
    return teacher, critic


@pytest.mark.parametrize("name", DMD)
def test_dmd(name: str, golden: Golden, golden_json: Facts) -> None:
    tensors, facts = golden("dmd"), golden_json("dmd")["cases"][name]
    d, given = case(tensors, name), case(tensors, "inputs")
    sigma = levels(d["timestep_draw"], facts["shift"])
    torch.testing.assert_close((1000 * sigma).expand_as(d["timestep"]).float(), d["timestep"], atol=ULP, rtol=0)
    noisy = FLOW.add_noise(given["x_gen"], given["noise"], sigma)
    torch.testing.assert_close(noisy, d["noisy"], atol=2e-5, rtol=0)

    sample = given["x_gen"].clone().requires_grad_()
    gradient = dmd_gradient(sample.detach(), *scores(tensors, facts))
    torch.testing.assert_close(gradient.float(), d["grad"], atol=2e-5, rtol=1e-5)
    counted = d["mask"][..., 0, 0, 0] if "mask" in d else None
    loss = dmd_loss(sample, gradient, counted)
    loss.backward()
    torch.testing.assert_close(loss.detach(), d["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(sample.grad, d["dloss_dx"], atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("name", ["dmd_schedule_bounds", "dmd_plain"])
def test_draws_stay_within_the_bounds_of_the_exit_step(name: str, golden: Golden, golden_json: Facts) -> None:
    low, high = (bound / 1000 for bound in golden_json("dmd")["cases"][name]["draw_range"])
    law = ScoreLevels(shift=5.0)
    drawn = law.draw(4000, torch.Generator().manual_seed(0), (shift_sigma(low, 5.0), shift_sigma(high, 5.0)))
    recorded = golden("dmd")[f"{name}/timestep"]
    smallest, largest = law.of(torch.tensor([low, high - 0.001], dtype=torch.float64)).tolist()
    for values in (drawn, recorded.double() / 1000):
        assert smallest - 1e-6 <= values.min() and values.max() <= largest + 1e-6
    assert drawn.min().item() == pytest.approx(smallest) and drawn.max().item() == pytest.approx(largest)


@pytest.mark.parametrize("shift", [5.0, 8.0])
def test_levels(shift: float, golden: Golden) -> None:
    d = case(golden("dmd"), f"timestep_map_shift{shift:.0f}")
    torch.testing.assert_close(1000 * levels(d["draw"], shift), d["timestep"].double(), atol=ULP, rtol=0)


def test_a_sample_that_the_teacher_returns_has_no_gradient(golden: Golden, golden_json: Facts) -> None:
    """The published code makes the largest float of 0 / 0 (`compat_dmd_zero_normaliser`); here it is 0, and finite."""
    name = "compat_dmd_zero_normaliser"
    tensors = golden("dmd")
    d = case(tensors, name)
    gradient = dmd_gradient(d["x_gen"], *scores(tensors, golden_json("dmd")["cases"][name]))
    wrong = d["grad"].abs().flatten(1).amax(1) > 1e30
    assert wrong.any() and gradient.isfinite().all() and not gradient[wrong].any()
    torch.testing.assert_close(gradient[~wrong].float(), d["grad"][~wrong], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["compat_dmd_clamped_timestep", "compat_critic_flow_clamped"])
def test_a_clamped_level_is_the_one_that_is_told(name: str, golden: Golden, golden_json: Facts) -> None:
    """The published code noises with the nearest entry of a grid instead; the levels told are the same."""
    tensors = golden("dmd")
    d, given = case(tensors, name), case(tensors, "inputs")
    sigma = levels(d["timestep_draw"], golden_json("dmd")["cases"][name]["shift"])
    torch.testing.assert_close((1000 * sigma).expand_as(d["timestep"]).float(), d["timestep"], atol=ULP, rtol=0)
    ours = FLOW.add_noise(given["x_gen"], given["noise"], sigma)
    assert 1e-5 < (ours - d["noisy"]).abs().max() < 2e-3


@pytest.mark.parametrize("name", ["critic_flow", "critic_flow_other_shift"])
def test_critic(name: str, golden: Golden, golden_json: Facts) -> None:
    tensors, facts = golden("dmd"), golden_json("dmd")["cases"][name]
    d, given = case(tensors, name), case(tensors, "inputs")
    sigma = levels(d["timestep_draw"], facts["shift"])
    noisy = FLOW.add_noise(given["x_gen"], given["noise"], sigma)
    torch.testing.assert_close(noisy, d["noisy"], atol=2e-5, rtol=0)
    estimate = given["fake_cond"].clone().requires_grad_()
    velocity = FLOW.from_x0(noisy.double(), estimate.double(), sigma)
    target = FLOW.target(given["x_gen"], given["noise"], sigma)
    every = sigma.expand(-1, noisy.shape[1])
    result = velocity_loss(velocity, target, every, weights=torch.ones_like(every))
    result.loss.backward()
    torch.testing.assert_close(result.loss.detach().float(), d["loss"], rtol=2e-6, atol=0)
    torch.testing.assert_close(estimate.grad, d["dloss_destimate"], atol=1e-7, rtol=2e-5)


@pytest.mark.parametrize("name", ["ode_regression", "ode_regression_teacher_forced", "ode_regression_with_clean_level"])
def test_ode_regression(name: str, golden: Golden) -> None:
    d = case(golden("dmd"), name)
    steps, trajectory = d["steps"], d["trajectory"]
    which = d["index_draw"]
    which = which[:, torch.arange(6) // 3 * 3] if which.shape[1] > 1 else which.expand(-1, 6)
    sigma = (steps / 1000)[which]
    torch.testing.assert_close(1000 * sigma, d["timestep"], atol=1e-3, rtol=0)
    noisy = trajectory[torch.arange(2)[:, None], which, torch.arange(6)[None]]
    torch.testing.assert_close(noisy, d["noisy"])
    assert int(which.max()) < len(steps)
    target = trajectory[:, -2] if "clean_context" in d else trajectory[:, -1]
    prediction = d["prediction"].clone().requires_grad_()
    loss = regression_loss(prediction, target, sigma > 0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), d["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction.grad, d["dloss_dprediction"], atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("name", ["4", "5", "3", "2", "1", "4_with_zero", "4_krea_like"])
@pytest.mark.parametrize("shift", [3, 5, 8])
def test_few_step_lists(name: str, shift: int, golden: Golden, golden_json: Facts) -> None:
    listed = golden_json("dmd")["cases"]["warped_lists"]["lists"][name]
    recorded = golden("dmd")[f"warped_list_shift{shift}/{name}"].double() / 1000
    expected = Schedule((*(float(s) for s in recorded if s > 0), 0.0))
    got = few_step(listed, shift=float(shift))
    torch.testing.assert_close(torch.tensor(got.sigmas), torch.tensor(expected.sigmas), atol=1e-6, rtol=0)


def test_estimates_from_velocity(golden: Golden) -> None:
    d = case(golden("dmd"), "x0_from_velocity")
    sigma = (d["timestep"].double() / 1000)[None]
    got = FLOW.to_x0(d["x_t"][None], d["velocity"][None], sigma)[0]
    torch.testing.assert_close(got, d["x0"], atol=2e-5, rtol=0)
    other = golden("dmd")["compat_x0_from_velocity_other_grid/x0"]
    assert (got - other).abs().max() > 1e-4  # one grid for levels and conversion: the published mismatch is not ours


CONSISTENCY = ["consistency_first", "consistency_mid", "consistency_last", "consistency_other_grid"]


@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency(name: str, golden: Golden, golden_json: Facts) -> None:
    """The record's stub networks stand in for teacher, student and average in the method itself."""
    from distribution_stubs import consistency_of

    tensors, facts = golden("dmd"), golden_json("dmd")["cases"][name]
    d = case(tensors, name)
    schedule = uniform(facts["grid"], shift=facts["shift"])
    torch.testing.assert_close(torch.tensor(schedule.sigmas[:-1]).float(), d["sigmas"], atol=1e-6, rtol=0)
    method, student = consistency_of(d, grid=facts["grid"], shift=facts["shift"], guidance=facts["guidance"])
    loss = method(facts["index"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), d["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(student.a.grad, d["dloss_dstudent_A"], atol=1e-7, rtol=1e-4)
