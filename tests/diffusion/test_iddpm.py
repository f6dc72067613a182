"""IDDPM against recorded tensors of the published code, and the properties that a process must have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool.diffusion.iddpm import IDDPM
from unspool.diffusion.process import Process
from unspool.rollout.guidance import combine

NOISE, X0 = IDDPM(), IDDPM(predicts="x0")
EXACT = 2e-5  # relative, stated with the tensors whose tables are float64
ROUNDED = 5e-4  # the same for those with float32 tables
Golden = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def case(golden: Golden) -> Callable[[str], dict[str, Tensor]]:
    tensors = golden("ca2vdm_cases")

    def pick(name: str) -> dict[str, Tensor]:
        found = {k.removeprefix(name + "/"): t for k, t in tensors.items() if k.startswith(name + "/")}
        assert found
        return found

    return pick


def swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def agree(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest difference over the largest value."""
    assert got.shape == want.shape
    worst = ((got - want).abs().max() / want.abs().max()).item()
    assert worst <= tolerance, f"relative difference {worst:.3g} > {tolerance:.3g}"


def sigma_of(step: Tensor | int) -> Tensor | float:
    return (step.double() + 1.0) / 1000.0 if isinstance(step, Tensor) else (step + 1) / 1000


def kept_variances(process: IDDPM) -> Tensor:
    """Of steps 0..n - 1, through the public face: x of a unit x0 without noise."""
    one, zero = torch.ones(1, 1000, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1000, 1, 1, 1, dtype=torch.float64)
    levels = torch.arange(1, 1001, dtype=torch.float64)[None] / 1000
    return process.add_noise(one, zero, levels).flatten().square()


# ---- recorded -------------------------------------------------------------------------------------------------------


def test_the_schedule_is_float64(case: Golden) -> None:
    want = case("schedule_full")
    betas = [math.exp(NOISE.log_variances((i + 1) / 1000, i / 1000)[1]) for i in range(1000)]
    torch.testing.assert_close(torch.tensor(betas, dtype=torch.float64), want["betas_f64"], rtol=1e-9, atol=0)
    torch.testing.assert_close(kept_variances(NOISE), want["alphas_cumprod_f64"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [100, 50, 6])
def test_respacing(count: int, case: Golden) -> None:
    want = case(f"schedule_respaced_{count}")
    assert list(NOISE.timestep_map(count)) == want["timestep_map"].tolist()
    steps = NOISE.schedule(count).steps
    assert [NOISE.timestep(step.sigma) for step in reversed(steps)] == want["timestep_map"].tolist()
    for number, step in enumerate(reversed(steps)):
        lower, upper = NOISE.log_variances(step.sigma, step.next_sigma)
        assert upper == pytest.approx(want["log_betas"][number].item(), rel=EXACT)
        assert math.exp(upper) == pytest.approx(want["betas"][number].item(), rel=ROUNDED)
        assert NOISE._kept(step.sigma) == pytest.approx(want["alphas_cumprod"][number].item(), rel=ROUNDED)
        if number:
            assert lower == pytest.approx(want["posterior_log_variance"][number].item(), rel=ROUNDED)
        else:
            assert lower == -math.inf
        unit, zero = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
        for name, x, x0 in (("coef_x0", zero, unit), ("coef_xt", unit, zero)):
            got = NOISE.posterior_mean(x, x0, step.sigma, step.next_sigma).item()
            assert got == pytest.approx(want[name][number].item(), rel=ROUNDED, abs=1e-7)


def test_noising(case: Golden) -> None:
    want = case("q_sample")
    got = NOISE.add_noise(swap(want["x0"]), swap(want["noise"]), sigma_of(want["t"])[:, None])
    agree(got, swap(want["xt"]), 2e-6)


@pytest.mark.parametrize(
    ("name", "process", "count"),
    [("p_sample_eps_100", NOISE, 100), ("p_sample_eps_6", NOISE, 6), ("p_sample_x0_6", X0, 6)],
)
def test_one_ancestral_step(name: str, process: IDDPM, count: int, case: Golden) -> None:
    want = case(name)
    moves = list(reversed(process.schedule(count).steps))
    for row, number in enumerate(want["step"].tolist()):
        move = moves[number]
        assert process.timestep(move.sigma) == want["t_seen_by_network"][row].item()
        x, out, noise = (swap(want[key][row : row + 1]) for key in ("x", "net_out", "noise"))
        x0 = process.to_x0(x, out, move.sigma)
        mean = process.posterior_mean(x, x0, move.sigma, move.next_sigma)
        agree(x0, swap(want["pred_x0"][row : row + 1]), EXACT)
        agree(mean, swap(want["mean_exact"][row : row + 1]), EXACT)
        if number == 0:
            assert torch.equal(mean, x0)
            continue
        log_variance = process.log_variance(x, out, move.sigma, move.next_sigma)
        agree(log_variance, swap(want["log_variance"][row : row + 1]), ROUNDED)
        sample = mean + (0.5 * log_variance).exp() * noise
        agree(sample, swap(want["sample_exact"][row : row + 1]), EXACT)
    assert len(set(want["step"].tolist())) > 2, "several steps, or nothing is shown"


def test_guidance_takes_the_variance_of_the_caption(case: Golden) -> None:
    want = case("guidance")
    null, caption = (swap(half) for half in want["net_out"].chunk(2))
    for scale, name in ((7.5, "out_scale_7p5"), (2.0, "out_scale_2")):
        got = combine(caption, null, scale, channels=4)
        agree(got, swap(want[name]), 1e-6)
        assert torch.equal(got[:, :, 4:], caption[:, :, 4:])
        assert (combine(caption, null, scale) - got).abs().max() > 0.1


def test_loss_of_a_clean_prefix(case: Golden) -> None:
    """A sample in the middle and one at step 0, where the bound is the likelihood of the data."""
    want = case("train_loss")
    assert 0 in want["t"].tolist()
    sigma = torch.where(want["prefix"].bool(), 0.0, sigma_of(want["t"])[:, None])
    x0, noise, seen, out = (swap(want[key]) for key in ("x0", "noise", "net_in", "net_out"))
    x = NOISE.add_noise(x0, noise, sigma)  # the recorded one comes from float32 tables, which step 0 feels: 5e-5
    agree(x, seen, 2e-6)
    got = NOISE.loss(x0, noise, x, out, sigma)
    torch.testing.assert_close(got.mse, want["mse"], rtol=EXACT, atol=0)
    torch.testing.assert_close(got.bits, want["vb_exact"], rtol=EXACT, atol=0)
    torch.testing.assert_close(got.mse + got.bits, want["loss_exact"], rtol=EXACT, atol=0)
    torch.testing.assert_close(got.total, want["loss_exact"].mean(), rtol=EXACT, atol=0)


# ---- properties -----------------------------------------------------------------------------------------------------


def clip(seed: int, channels: int = 4, frames: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, frames, channels, 2, 2, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=30, deadline=None)
@given(level=st.integers(1, 1000), predicts=st.sampled_from(["noise", "x0", "velocity"]), seed=st.integers(0, 99))
def test_round_trips(level: int, predicts: str, seed: int) -> None:
    process = IDDPM(predicts=predicts)  # type: ignore[arg-type]
    assert isinstance(process, Process)
    x0, noise, sigma = clip(seed), clip(seed + 1), level / 1000
    x, perfect = process.add_noise(x0, noise, sigma), process.target(x0, noise, sigma)
    torch.testing.assert_close(process.to_x0(x, perfect, sigma), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.to_noise(x, perfect, sigma), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.from_x0(x, x0, sigma), perfect, rtol=1e-9, atol=1e-9)
    levels = torch.full((2, 3), sigma, dtype=torch.float64)
    for of_float, of_tensor in (
        (x, process.add_noise(x0, noise, levels)),
        (process.to_x0(x, perfect, sigma), process.to_x0(x, perfect, levels)),
        (process.to_noise(x, perfect, sigma), process.to_noise(x, perfect, levels)),
    ):
        torch.testing.assert_close(of_float, of_tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [NOISE, X0, IDDPM(predicts="velocity")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_clean_frames_are_untouched(process: IDDPM, dtype: torch.dtype) -> None:
    """Bit for bit, whatever stands beside them; step 0 is not clean, though the network is told the same number."""
    x0, junk = clip(0, dtype=dtype), torch.full_like(clip(0, dtype=dtype), math.nan)
    sigma = torch.tensor([[0.0, 0.001, 1.0]])
    x = process.add_noise(x0, torch.cat([junk[:, :1], clip(1, dtype=dtype)[:, 1:]], 1), sigma)
    assert torch.equal(x[:, 0], x0[:, 0]) and (x[:, 1] != x0[:, 1]).any() and x.dtype == dtype
    assert torch.equal(process.to_x0(x0, junk, sigma)[:, 0], x0[:, 0])
    assert torch.equal(process.add_noise(x0, junk, 0.0), x0) and torch.equal(process.to_x0(x0, junk, 0.0), x0)
    assert process.timestep(sigma).tolist() == [[0.0, 0.0, 999.0]]
    assert process.is_clean(torch.tensor([[0.0, 0.0004, 0.001, 1.0]])).tolist() == [[True, True, False, False]]
    if process is not X0:
        assert process.from_x0(x, x0, sigma)[:, 0].isnan().all()
        with pytest.raises(ValueError, match=r"sigma=0\.0"):
            process.from_x0(x, x0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_is_a_whole_step_in_either_precision(dtype: torch.dtype) -> None:
    """A level rounded to float32 would move the features of the network's timestep."""
    sigma = torch.arange(1, 1001, dtype=dtype)[None] / 1000
    assert NOISE.timestep(sigma).tolist()[0] == [float(step) for step in range(1000)]


def test_a_velocity_is_the_derivative_along_the_angle_of_signal_and_noise() -> None:
    """arXiv:2202.00512 appendix D: of cos(phi) x0 + sin(phi) noise with cos(phi)^2 the kept variance; a perfect noise,
    x0 and velocity stand for the same, so they have the same bound."""
    x0, noise, sigma = clip(0), clip(1), torch.full((2, 3), 0.3, dtype=torch.float64)
    phi = torch.acos(kept_variances(NOISE)[299] ** 0.5)
    step = 1e-6
    ahead, behind = (torch.cos(phi + s) * x0 + torch.sin(phi + s) * noise for s in (step, -step))
    process = IDDPM(predicts="velocity")
    torch.testing.assert_close(process.target(x0, noise, 0.3), (ahead - behind) / (2 * step), rtol=0, atol=1e-8)
    x, fraction = process.add_noise(x0, noise, 0.3), clip(2)
    guess = clip(3)
    bits = []
    for each in (NOISE, X0, process):
        prediction = torch.cat([each.from_x0(x, guess, 0.3), fraction], dim=2)
        bits.append(each.loss(x0, noise, x, prediction, sigma).bits)
    torch.testing.assert_close(bits[0], bits[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bits[0], bits[2], rtol=1e-9, atol=1e-9)


def test_posterior_is_that_of_bayes() -> None:
    """Mean and variance of x at the lower level given x and x0, from the joint normal of the two levels."""
    kept = kept_variances(NOISE)
    a, b = kept[699].item(), kept[299].item()  # sigma 0.7 and 0.3
    step = a / b
    gain = step**0.5 * (1 - b) / (1 - a)
    x, x0 = clip(0), clip(1)
    want = b**0.5 * x0 + gain * (x - a**0.5 * x0)
    torch.testing.assert_close(NOISE.posterior_mean(x, x0, 0.7, 0.3), want, rtol=1e-12, atol=1e-12)
    lower, upper = NOISE.log_variances(0.7, 0.3)
    assert math.exp(lower) == pytest.approx((1 - b) - gain**2 * (1 - a), rel=1e-10)
    assert math.exp(upper) == pytest.approx(1 - step, rel=1e-10)


def test_learned_range_ends_where_it_says() -> None:
    x = clip(0)
    for value, end in zip((-1.0, 1.0), NOISE.log_variances(0.5, 0.4), strict=True):
        out = torch.cat([x, torch.full_like(x, value)], dim=2)
        torch.testing.assert_close(NOISE.log_variance(x, out, 0.5, 0.4), torch.full_like(x, end))
    assert torch.equal(NOISE.log_variance(x, x, 0.5, 0.4), torch.full_like(x, NOISE.log_variances(0.5, 0.4)[0]))


def prefixed(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sigma = torch.tensor([[0.0, 0.4, 0.4], [0.0, 0.0, 0.001]], dtype=torch.float64)
    x0, noise, out = clip(seed).clamp(-0.9, 0.9), clip(seed + 1), clip(seed + 2, channels=8)
    return x0, noise, NOISE.add_noise(x0, noise, sigma), out.requires_grad_(), sigma


def test_prefix_bears_no_loss_and_gets_no_gradient() -> None:
    x0, noise, x, out, sigma = prefixed(0)
    loss = NOISE.loss(x0, noise, x, out, sigma)
    loss.total.backward()
    clean = sigma == 0
    assert out.grad is not None
    assert out.grad[clean].abs().max() == 0 and out.grad[~clean].abs().max() > 0
    broken = torch.where(clean[:, :, None, None, None], torch.full_like(out, 1e6), out)
    assert torch.equal(NOISE.loss(x0, noise, x, broken, sigma).total, loss.total)


def test_the_bound_trains_the_variance_alone() -> None:
    x0, noise, x, out, sigma = prefixed(3)
    NOISE.loss(x0, noise, x, out, sigma).bits.sum().backward()
    assert out.grad is not None
    assert out.grad[:, :, :4].abs().max() == 0 and out.grad[:, :, 4:].abs().max() > 0


def test_a_perfect_network_has_no_error_and_the_bound_of_the_true_variance_is_zero() -> None:
    x0, noise, x, _, sigma = prefixed(5)
    sigma = torch.where(sigma > 0, 0.002, 0.0)  # where both ends of the range differ most
    x = NOISE.add_noise(x0, noise, sigma)
    perfect = torch.cat([noise, torch.full_like(noise, -1.0)], dim=2)
    loss = NOISE.loss(x0, noise, x, perfect, sigma)
    assert loss.mse.max() == 0 and loss.bits.abs().max() < 1e-9
    off = torch.cat([noise, torch.full_like(noise, 0.5)], dim=2)
    assert (NOISE.loss(x0, noise, x, off, sigma).bits > 1e-3).all()


def test_without_a_variance_there_is_no_bound() -> None:
    x0, noise, x, out, sigma = prefixed(7)
    with_bound, without = NOISE.loss(x0, noise, x, out, sigma), NOISE.loss(x0, noise, x, out[:, :, :4], sigma)
    assert torch.equal(with_bound.mse, without.mse) and without.bits.tolist() == [0.0, 0.0]


def test_what_does_not_fit_is_refused() -> None:
    x = clip(0)
    with pytest.raises((ValueError, TypeError), match="predicts"):
        IDDPM(predicts="sample")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta_start"):
        IDDPM(beta_start=0.1, beta_end=0.01)
    with pytest.raises(ValueError, match="sigma"):
        NOISE.add_noise(x, x, 1.2)
    with pytest.raises((ValueError, TypeError)):
        NOISE.add_noise(x, x, torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="2, 3, 4"):
        NOISE.to_x0(x, torch.cat([x, x[:, :, :1]], 2), 0.5)
    with pytest.raises(ValueError, match="at least one"):
        NOISE.posterior_mean(x, x, 0.5, 0.4999)
    with pytest.raises(ValueError, match="noisy one in each"):
        NOISE.loss(x, x, x, x, torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]))
    for count in (1, 1001):
        with pytest.raises(ValueError, match=rf"num_steps={count}"):
            NOISE.timestep_map(count)
