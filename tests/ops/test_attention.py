"""Every attention backend against softmax written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unspool.ops.attention import flex, sdpa

FUZZ = settings(max_examples=40, deadline=None, derandomize=True)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                scores = [float(q[b, i, h] @ k[b, j, h]) / math.sqrt(q.shape[3]) for j in range(k.shape[1])]
                reads = [j for j in range(k.shape[1]) if mask is None or mask[i, j]]
                top = max(scores[j] for j in reads)
                weights = {j: math.exp(scores[j] - top) for j in reads}
                for j in reads:
                    out[b, i, h] += weights[j] / sum(weights.values()) * v[b, j, h]
    return out


def tokens(seed: int, b: int, n: int, m: int, heads: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(b, size, heads, d, generator=draw, dtype=torch.float64) for size in (n, m, m)
    )


@given(
    b=st.integers(1, 2),
    n=st.integers(1, 6),
    m=st.integers(1, 7),
    heads=st.integers(1, 3),
    d=st.sampled_from([2, 6]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
@FUZZ
def test_sdpa_is_softmax_attention(b: int, n: int, m: int, heads: int, d: int, masked: bool, seed: int) -> None:
    q, k, v = tokens(seed, b, n, m, heads, d)
    mask = None
    if masked:
        mask = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask[:, 0] = True
    torch.testing.assert_close(sdpa(q, k, v, mask), plain(q, k, v, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 7), (40, 1100), (1030, 1020)], ids=["one", "few", "slices", "flash"])
@pytest.mark.parametrize("masked", ["no", "rows", "one row for all", "heads"])
def test_training_on_a_cpu_has_the_values_and_gradients_of_the_fused_kernel(n: int, m: int, masked: str) -> None:
    q, k, v = tokens(1, 2, n, m, 2, 4)
    shape = {"no": (), "rows": (n, m), "one row for all": (2, 1, 1, m), "heads": (2, 2, n, m)}[masked]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(n)) < 0.5 if shape else None
    if mask is not None:
        mask[..., 0] = True
    fused = sdpa(q, k, v, mask)
    for x in (q, k, v):
        x.requires_grad_()
    out = sdpa(q, k, v, mask)
    torch.testing.assert_close(out, fused, rtol=0, atol=1e-6)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    parts = (x.transpose(1, 2) for x in (q, k, v))
    kernel = scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)
    expected = torch.autograd.grad((kernel * weight).sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_under_autocast_training_attends_in_its_dtype() -> None:
    q, k, v = (x.float().requires_grad_() for x in tokens(3, 1, 6, 9, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, dense = sdpa(q, k, v), sdpa(q, k, v, torch.ones(6, 9, dtype=torch.bool))
        parts = (x.transpose(1, 2) for x in (q, k, v))
        fused = scaled_dot_product_attention(*parts).transpose(1, 2)
    assert out.dtype == dense.dtype == fused.dtype == torch.bfloat16
    assert torch.equal(out, dense)
    torch.testing.assert_close(out, fused, rtol=0, atol=0.03)


def test_the_order_of_keys_does_not_matter() -> None:
    """Why a cache may read its slots as they lie."""
    q, k, v = tokens(0, 2, 5, 9, 2, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sdpa(q, k[:, order], v[:, order]), sdpa(q, k, v), rtol=0, atol=1e-13)


def test_a_masked_key_has_no_influence_at_all() -> None:
    q, k, v = tokens(0, 1, 4, 6, 2, 4)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 3] = False
    loud = v.clone()
    loud[:, 3] = 1e300
    assert torch.equal(sdpa(q, k, loud, mask), sdpa(q, k, v, mask))


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("n", [128, 96, 130])
def test_flex_equals_sdpa(n: int) -> None:
    """Lengths that are and are not multiples of the block of 128."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = (t.float() for t in tokens(2, 1, n, n, 2, 8))
    block = create_block_mask(lambda b, h, i, j: i // 5 >= j // 5, None, None, n, n, device="cpu")
    index = torch.arange(n)
    dense = index[:, None] // 5 >= index[None] // 5
    with torch.no_grad():
        torch.testing.assert_close(flex(q, k, v, block), sdpa(q, k, v, dense), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="slices"):
        flex(q.requires_grad_(True), k, v, block)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("learns", ["k", "v"])
def test_flex_refuses_a_cpu_backward_for_any_input(learns: str) -> None:
    """Gradients may be wanted for keys or values alone."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = (t.float() for t in tokens(2, 1, 16, 16, 2, 8))
    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, 16, 16, device="cpu")
    (k if learns == "k" else v).requires_grad_(True)
    with pytest.raises(ValueError, match="slices"):
        flex(q, k, v, block)
