"""Classifier-free guidance: the one convention, its ends, its precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unspool.rollout.guidance import Guidance, combine


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 4, 2, 2, generator=rng).to(dtype) for _ in range(2))  # type: ignore[return-value]


@given(scale=st.floats(0.0, 20.0))
def test_both_published_forms_are_one_formula(scale: float) -> None:
    """uncond + scale (cond - uncond) is cond + s (cond - uncond) with s = scale - 1."""
    cond, uncond = (tensor.double() for tensor in pair())
    guided = combine(cond, uncond, scale)
    torch.testing.assert_close(guided, uncond + scale * (cond - uncond), rtol=0, atol=1e-12)
    torch.testing.assert_close(guided, cond + (scale - 1.0) * (cond - uncond), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scale_one_and_zero_return_a_branch_untouched(dtype: torch.dtype) -> None:
    cond, uncond = pair(dtype)
    broken = torch.full_like(cond, math.nan)
    assert combine(cond, broken, 1.0) is cond
    assert torch.equal(combine(broken, uncond, 0.0), uncond)


def test_half_precision_branches_are_combined_in_float32() -> None:
    """Guidance amplifies the difference of two close tensors: in bfloat16 its rounding would be amplified too."""
    cond, uncond = pair(torch.bfloat16)
    exact = uncond.double() + 7.5 * (cond.double() - uncond.double())
    guided = combine(cond, uncond, 7.5)
    assert guided.dtype == torch.bfloat16
    assert (guided != exact.bfloat16()).double().mean() < 0.02
    assert ((uncond + 7.5 * (cond - uncond)) != exact.bfloat16()).double().mean() > 0.2


def test_only_scale_one_skips_the_second_branch() -> None:
    assert not Guidance().is_active
    assert Guidance(scale=0.0).is_active and Guidance(scale=5.0, mode="two_caches").is_active


def test_malformed_guidance_is_refused() -> None:
    cond, uncond = pair()
    for scale in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            Guidance(scale=scale)
        with pytest.raises(ValueError, match="scale"):
            combine(cond, uncond, scale)
    with pytest.raises((ValueError, TypeError), match="mode"):
        Guidance(mode="three_caches")  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError)):
        combine(cond, uncond[:1], 2.0)
