"""Rotary embedding against complex numbers, norms against their formulas; far positions, mixed precision."""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool.ops.norm import gated_add, layer_norm, modulate, rms_norm, upcast
from unspool.ops.rope import Rope, rotate, rotate_and_stage, table_dtype

FUZZ = settings(max_examples=40, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_rotation(x: Tensor, positions: list[int], grid: tuple[int, int]) -> Tensor:
    """One complex factor per token, pair by pair."""
    half = x.shape[-1] // 2
    widths = (half - 2 * (half // 3), half // 3, half // 3)
    out = x.clone()
    for n, place in enumerate(itertools.product(positions, range(grid[0]), range(grid[1]))):
        pair = 0
        for width, p in zip(widths, place, strict=True):
            for j in range(width):
                factor = cmath.exp(1j * p * 10000.0 ** (-j / width))
                for b, h in itertools.product(range(x.shape[0]), range(x.shape[2])):
                    turned = complex(x[b, n, h, 2 * pair], x[b, n, h, 2 * pair + 1]) * factor
                    out[b, n, h, 2 * pair], out[b, n, h, 2 * pair + 1] = turned.real, turned.imag
                pair += 1
        assert pair == half
    return out


def turned(x: Tensor, rope: Rope, positions: list[int]) -> Tensor:
    return rotate(x, *rope.tables(positions, table_dtype(x.dtype)))


@given(
    positions=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    head_dim=st.sampled_from([6, 8, 10, 12, 16]),
)
@FUZZ
def test_rotation_is_multiplication_by_complex_numbers(
    positions: list[int], rows: int, columns: int, head_dim: int
) -> None:
    x = randn(1, len(positions) * rows * columns, 2, head_dim)
    rope = Rope.for_head(head_dim, (rows, columns))
    got = turned(x, rope, positions)
    torch.testing.assert_close(got, plain_rotation(x, positions, (rows, columns)), rtol=0, atol=1e-12)


def test_published_split_of_a_head_of_128() -> None:
    assert Rope.for_head(128, (30, 52)).pairs == (22, 21, 21)


@given(shift=st.integers(-50, 10**6), first=st.integers(0, 20), second=st.integers(0, 20))
@FUZZ
def test_only_the_difference_of_positions_matters(shift: int, first: int, second: int) -> None:
    rope, x, y = Rope.for_head(12, (2, 3)), randn(1, 6, 2, 12), randn(1, 6, 2, 12, seed=1)
    near = torch.einsum("bnhd,bmhd->bhnm", turned(x, rope, [first]), turned(y, rope, [second]))
    moved = turned(x, rope, [first + shift]), turned(y, rope, [second + shift])
    torch.testing.assert_close(torch.einsum("bnhd,bmhd->bhnm", *moved), near, rtol=0, atol=1e-8)


@given(start=st.integers(0, 10**6), delta=st.integers(-1000, 1000))
@FUZZ
def test_moving_a_rotated_key(start: int, delta: int) -> None:
    """Rows and columns stay; time moves by delta, from any position."""
    rope, x = Rope.for_head(12, (2, 3)), randn(1, 12, 2, 12)
    moved = rotate(turned(x, rope, [start, start + 3]), *rope.time_tables([delta, delta], torch.float64))
    want = turned(x, rope, [start + delta, start + 3 + delta])
    torch.testing.assert_close(moved, want, rtol=0, atol=1e-8)


def test_far_positions_are_as_exact_as_near_ones_in_fp32() -> None:
    """fp32 activations at position 10^6 against fp64 ones: angles must not be rounded to fp32."""
    rope, x = Rope.for_head(12, (2, 3)), randn(1, 6, 2, 12)
    for position in (3, 10**6 + 7, 10**8 + 1):
        wide = turned(x, rope, [position])
        torch.testing.assert_close(turned(x.float(), rope, [position]).double(), wide, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotation_keeps_dtype_and_length(dtype: torch.dtype) -> None:
    x = randn(2, 6, 2, 12, dtype=dtype)
    out = turned(x, Rope.for_head(12, (2, 3)), [5])
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double().norm(dim=-1), x.double().norm(dim=-1), rtol=tolerance, atol=0)


def test_rotate_and_stage_writes_only_its_slots() -> None:
    rope = Rope.for_head(12, (1, 2))
    q, k, v = (randn(2, 4, 2, 12, seed=s) for s in range(3))
    keys, values = randn(2, 10, 2, 12, seed=7), randn(2, 10, 2, 12, seed=8)
    before_k, before_v = keys.clone(), values.clone()
    index = torch.tensor([6, 7, 2, 3])
    out = rotate_and_stage(q, k, v, *rope.tables([4, 9], torch.float64), keys, values, index)
    assert torch.equal(out, turned(q, rope, [4, 9]))
    assert torch.equal(keys[:, index], turned(k, rope, [4, 9])) and torch.equal(values[:, index], v)
    rest = [0, 1, 4, 5, 8, 9]
    assert torch.equal(keys[:, rest], before_k[:, rest]) and torch.equal(values[:, rest], before_v[:, rest])


# ---- norms --------------------------------------------------------------------------------------------------------


def test_layer_and_rms_norm_by_their_formulas() -> None:
    x, w, b = randn(2, 5, 8), randn(8, seed=1), randn(8, seed=2)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    plain = (x - mean) / (var + 1e-6).sqrt()
    torch.testing.assert_close(layer_norm(x, 1e-6), plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer_norm(x, 1e-6, w, b), plain * w + b, rtol=0, atol=1e-12)
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    torch.testing.assert_close(rms_norm(x, w, 1e-6), rms, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_modulation_and_gate_give_each_frame_its_row(batch: int, rows: int) -> None:
    """6 tokens of 3 latent frames; one row for all, or one per frame; for all samples, or each its own."""
    x, y = randn(2, 6, 4), randn(2, 6, 4, seed=1)
    shift, scale = randn(batch, rows, 4, seed=2), randn(batch, rows, 4, seed=3)
    modulated, gated = modulate(x, shift, scale), gated_add(x, y, shift)
    for b, n in itertools.product(range(2), range(6)):
        at = (b if batch == 2 else 0, n // 2 if rows == 3 else 0)
        want = x[b, n] * (1 + scale[at]) + shift[at]
        torch.testing.assert_close(modulated[b, n], want, rtol=0, atol=1e-12)
        torch.testing.assert_close(gated[b, n], x[b, n] + shift[at] * y[b, n], rtol=0, atol=1e-12)


def test_narrow_inputs_are_computed_wide() -> None:
    """Norms of bf16 are those of fp32, rounded once; large values do not overflow."""
    x, w = 3e4 * randn(2, 5, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    wide = layer_norm(x.float(), 1e-6)
    got = layer_norm(x, 1e-6)
    assert got.dtype == torch.float32 and torch.equal(got, wide)
    assert torch.equal(rms_norm(x, w, 1e-6), rms_norm(x.float(), w.float(), 1e-6).bfloat16())
    half = torch.full((1, 1, 64), 6e4, dtype=torch.float16)
    assert torch.isfinite(rms_norm(half, w.half(), 1e-6)).all()
    gate = torch.full((1, 1, 64), 1 / 3, dtype=torch.float32)
    one = torch.full((1, 1, 64), 256.0, dtype=torch.bfloat16)
    assert torch.equal(gated_add(one, one, gate), (one.float() + one.float() * gate).bfloat16())
    assert upcast(x).dtype == torch.float32 and upcast(x.double()).dtype == torch.float64
    assert math.isclose(float(got.mean()), 0.0, abs_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_complex_and_real_form_rotate_alike_with_the_same_gradients(dtype: torch.dtype) -> None:
    cos, sin = Rope.for_head(16, (2, 3)).tables([0, 5, 1000], table_dtype(dtype))
    beside = torch.randn(2, 18, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    apart = beside.mT.contiguous().mT  # features that do not lie side by side: no complex numbers
    assert apart.stride(-1) != 1
    results = []
    for x in (beside.requires_grad_(), apart.requires_grad_()):
        out = rotate(x, cos, sin)
        results.append((out, *torch.autograd.grad(out.square().sum() + out.sum(), x)))
    for one, other in zip(*results, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)
