"""Flow matching: exact ends, round trips, and precision that does not depend on the dtype of the latents."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool.diffusion import PROCESSES
from unspool.diffusion.flow import FlowMatching, interpolate
from unspool.diffusion.process import Process

FLOW = FlowMatching()
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# A shape error may come from the function itself or, where the tests check annotations, from the annotation.
SHAPE_ERRORS = (ValueError, TypeError)


def latents(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0 and one NaN from a number, which torch.equal does not."""
    return a.dtype == b.dtype and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def awkward(seed: int, dtype: torch.dtype) -> Tensor:
    """Latents with the values that naive arithmetic changes: -0.0, the smallest and the largest number."""
    x = latents(seed, 2, 3, 4, 2, 2, dtype=dtype)
    x.view(-1)[:4] = torch.tensor([-0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny, -torch.finfo(dtype).max])
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_ends_are_exact_bit_for_bit(dtype: torch.dtype, as_tensor: bool) -> None:
    x0, noise = awkward(0, dtype), awkward(1, dtype).flip(0)
    clean: float | Tensor = torch.zeros(1, 1) if as_tensor else 0.0
    pure: float | Tensor = torch.ones(2, 3) if as_tensor else 1.0
    assert same_bits(FLOW.add_noise(x0, noise, clean), x0)
    assert same_bits(FLOW.add_noise(x0, noise, pure), noise)
    assert same_bits(FLOW.to_x0(x0, noise, clean), x0)
    assert same_bits(FLOW.to_noise(x0, noise, pure), x0)


def test_a_clean_frame_ignores_nan_noise_and_a_noise_frame_nan_latents() -> None:
    x0, noise = latents(0, 1, 2, 2, 2, 2), latents(1, 1, 2, 2, 2, 2)
    noise[:, 0], x0[:, 1] = math.nan, math.nan
    x = FLOW.add_noise(x0, noise, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(x[:, 0], x0[:, 0]) and torch.equal(x[:, 1], noise[:, 1])


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 3), t=st.integers(1, 4), seed=st.integers(0, 99), sigma=st.floats(1e-3, 1.0), b1=st.booleans())
def test_round_trips_and_one_level_per_latent_frame(b: int, t: int, seed: int, sigma: float, b1: bool) -> None:
    x0, noise = latents(seed, b, t, 2, 3, 2).double(), latents(seed + 1, b, t, 2, 3, 2).double()
    levels = sigma * torch.linspace(0.5, 1.0, (1 if b1 else b) * t, dtype=torch.float64).reshape(-1, t)
    x = FLOW.add_noise(x0, noise, levels)
    velocity = FLOW.target(x0, noise, levels)
    for sample in range(b):
        for frame in range(t):
            level = float(levels[sample % levels.shape[0], frame])
            here = (slice(sample, sample + 1), slice(frame, frame + 1))
            torch.testing.assert_close(x[here], (1 - level) * x0[here] + level * noise[here], rtol=0, atol=1e-14)
            torch.testing.assert_close(x[here], FLOW.add_noise(x0[here], noise[here], level), rtol=0, atol=1e-15)
    torch.testing.assert_close(FLOW.to_x0(x, velocity, levels), x0, rtol=0, atol=1e-13)
    torch.testing.assert_close(FLOW.to_noise(x, velocity, levels), noise, rtol=0, atol=1e-13)
    torch.testing.assert_close(FLOW.from_x0(x, x0, levels), velocity, rtol=0, atol=1e-11)
    again = FLOW.to_x0(x, FLOW.from_x0(x, x0, sigma), sigma)
    torch.testing.assert_close(again, x0, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_latents_are_converted_in_float32(dtype: torch.dtype) -> None:
    """One rounding, at the end: the result is the exact value rounded to the dtype of the latents."""
    x0, noise = latents(0, 2, 3, 4, 8, 8, dtype=dtype), latents(1, 2, 3, 4, 8, 8, dtype=dtype)
    sigma = 0.8333333
    exact = (1 - sigma) * x0.double() + sigma * noise.double()
    cases = [
        (FLOW.add_noise(x0, noise, sigma), exact),
        (FLOW.to_x0(x0, noise, sigma), x0.double() - sigma * noise.double()),
        (FLOW.from_x0(x0, noise, sigma), (x0.double() - noise.double()) / sigma),
        (FLOW.target(x0, noise, sigma), noise.double() - x0.double()),
    ]
    for got, want in cases:
        assert got.dtype == dtype
        if dtype in (torch.bfloat16, torch.float16):
            off = (got != want.to(dtype)).double().mean()
            assert off < 1e-2  # a double rounding on a tie; arithmetic in half precision is off in a third of all
        else:
            torch.testing.assert_close(
                got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 * (dtype != torch.float64)
            )


def test_float64_sigma_lifts_float32_latents_and_float64_survives() -> None:
    x0, noise = latents(0, 1, 2, 2, 2, 2), latents(1, 1, 2, 2, 2, 2)
    sigma = torch.full((1, 2), 1 / 3, dtype=torch.float64)
    assert torch.equal(FLOW.add_noise(x0, noise, sigma), (x0.double() * (1 - sigma[0, 0]) + noise.double() / 3).float())
    tiny = 1e-12
    x = FLOW.add_noise(torch.ones(1, 1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1, 1).double(), tiny)
    assert x.item() == 1.0 - tiny


def test_velocity_at_sigma_zero_is_refused_or_nan() -> None:
    x, x0 = latents(0, 1, 2, 2, 2, 2), latents(1, 1, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="undefined"):
        FLOW.from_x0(x, x0, 0.0)
    velocity = FLOW.from_x0(x, x0, torch.tensor([[0.0, 0.5]]))
    assert velocity[:, 0].isnan().all()
    torch.testing.assert_close(velocity[:, 1], 2 * (x - x0)[:, 1])


@pytest.mark.parametrize("sigma", [-1e-9, 1.0 + 1e-9, 937.5, math.nan])
def test_sigma_out_of_range_is_refused(sigma: float) -> None:
    x = latents(0, 1, 1, 1, 1, 1)
    for call in (FLOW.add_noise, FLOW.to_x0, FLOW.to_noise, FLOW.from_x0, FLOW.target):
        with pytest.raises(ValueError, match="expected 0 <= sigma <= 1"):
            call(x, x, sigma)


@pytest.mark.parametrize(
    "sigma", [torch.zeros(2), torch.zeros(3, 2), torch.zeros(2, 3, 1), torch.tensor(0.5), torch.zeros(2, 2)]
)
def test_sigma_of_another_shape_is_refused(sigma: Tensor) -> None:
    """A sigma [b] would otherwise broadcast over the wrong axis, which shows only when b > 1."""
    x = latents(0, 2, 3, 2, 2, 2)
    for call in (FLOW.add_noise, FLOW.to_x0, FLOW.to_noise, FLOW.from_x0, FLOW.target):
        with pytest.raises(SHAPE_ERRORS):
            call(x, x, sigma)


def test_half_precision_sigma_and_unequal_shapes_are_refused() -> None:
    x = latents(0, 2, 3, 2, 2, 2)
    with pytest.raises(ValueError, match="float32 or float64"):
        FLOW.add_noise(x, x, torch.full((2, 3), 0.8333, dtype=torch.bfloat16))
    with pytest.raises(SHAPE_ERRORS):
        FLOW.add_noise(x, x[:, :1], 0.5)
    with pytest.raises(SHAPE_ERRORS):
        FLOW.to_x0(x, x[:1], 0.5)


def test_timestep_is_a_thousand_sigma_unrounded() -> None:
    assert FLOW.timestep(0.9375) == 937.5
    assert FLOW.timestep(0.757) == pytest.approx(757.0, abs=1e-12)
    assert FLOW.timestep(torch.tensor([[0.625, 0.0]])).tolist() == [[625.0, 0.0]]


def test_gradients_pass_through_every_conversion() -> None:
    x0, noise = (latents(seed, 1, 2, 1, 2, 2).double().requires_grad_() for seed in (0, 1))
    sigma = torch.tensor([[0.0, 0.7]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: FLOW.add_noise(a, b, sigma), (x0, noise))
    assert torch.autograd.gradcheck(lambda a, b: FLOW.to_x0(a, b, sigma), (x0, noise))
    assert torch.autograd.gradcheck(lambda a, b: FLOW.from_x0(a, b, 0.7), (x0, noise))


def test_interpolate_takes_the_dtype_of_its_start() -> None:
    start, end = latents(0, 1, 1, 1, 2, 2, dtype=torch.bfloat16), latents(1, 1, 1, 1, 2, 2)
    assert interpolate(start, end, 1.0).dtype == torch.bfloat16
    assert interpolate(end, start, 0.25).dtype == torch.float32


def test_the_named_process_is_a_process() -> None:
    module, name = PROCESSES["flow"].split(":")
    assert (module, name) == (FlowMatching.__module__, FlowMatching.__name__)
    assert isinstance(FLOW, Process)
