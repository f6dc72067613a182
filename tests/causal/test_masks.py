"""Masks made from a visibility, in every backend, against the oracle of plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, FUZZ, network_of, rules, settings_of_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    LoopContext,
    Rule,
    assert_equal_outputs,
    forcing_rows,
    make_inputs,
    oracle_forcing,
    oracle_plain,
    plain_rows,
)

from unspool.causal.context import FullSequence, Site
from unspool.causal.mask import causal_mask, teacher_forcing_mask
from unspool.causal.position import Absolute
from unspool.causal.visibility import Kind


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# ---- the library's masks against the same oracle ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(rule=rules(), how=settings_of_inputs())
@settings(FUZZ, max_examples=25)
def test_teacher_forcing_mask_equals_the_oracle(rule: Rule, how: dict[str, Any], dtype: torch.dtype) -> None:
    network = network_of(dtype)
    inputs = make_inputs(network, rule, **how)
    b, f = inputs.clean.shape[:2]
    mask = teacher_forcing_mask(rule.plan, f, rule.visibility, rule.positions)
    x = torch.cat([inputs.clean, inputs.noisy], 1)
    sigma = torch.cat([torch.zeros(b, f, dtype=dtype), inputs.sigma.expand(b, f)], 1)
    want = torch.cat(oracle_forcing(network, rule, inputs), 1)
    context = FullSequence(2 * f, mask)
    assert_equal_outputs(network(x, sigma, inputs.cond(range(f), copies=2), context), want)
    oracle_table = LoopContext(forcing_rows(rule), inputs.grid)
    assert mask.allowed() == oracle_table.allowed
    if mask.fixed_positions is not None:
        dense = FullSequence(2 * f, mask, backend="dense")
        assert_equal_outputs(network(x, sigma, inputs.cond(range(f), copies=2), dense), want)
    else:
        assert rule.policy != "absolute"
        with pytest.raises(ValueError, match="slices"):
            FullSequence(2 * f, mask, backend="dense")


@pytest.mark.parametrize("dtype", DTYPES)
@given(rule=rules(), how=settings_of_inputs(), kind=st.sampled_from([Kind.DENOISE, Kind.COMMIT]))
@settings(FUZZ, max_examples=25)
def test_causal_mask_equals_the_oracle(rule: Rule, how: dict[str, Any], kind: Kind, dtype: torch.dtype) -> None:
    network = network_of(dtype)
    inputs = make_inputs(network, rule, **how)
    f = rule.num_frames
    mask = causal_mask(rule.plan, f, rule.visibility, rule.positions, kind)
    rows = plain_rows(rule, kind is Kind.COMMIT)
    assert mask.allowed() == LoopContext(rows, inputs.grid).allowed
    want = oracle_plain(network, rule, inputs, kind is Kind.COMMIT)
    for backend in ("slices", "dense") if mask.fixed_positions is not None else ("slices",):
        context = FullSequence(f, mask, backend=backend)  # type: ignore[arg-type]
        assert_equal_outputs(network(inputs.noisy, inputs.sigma, inputs.cond(range(f)), context), want)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("learns", [True, False])
def test_slices_have_values_and_gradients_of_the_dense_mask(window: int | None, learns: bool) -> None:
    rule = Rule(chunk=2, first=1, num_frames=7, window=window, sink=1 if window else 0)
    mask = teacher_forcing_mask(rule.plan, 7, rule.visibility, Absolute())
    rng = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, 14 * 3, 2, 4, generator=rng, dtype=torch.float64) for _ in range(4))
    site = Site(index=0, heads=2, head_dim=4)
    found = []
    for backend in ("slices", "dense"):
        with torch.set_grad_enabled(learns):
            parts = [x.clone().requires_grad_(learns) for x in (q, k, v)]
            out = FullSequence(14, mask, backend=backend).attend(site, *parts, None)  # type: ignore[arg-type]
            found.append([out, *(torch.autograd.grad((out * weight).sum(), parts) if learns else ())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("grid", [(8, 8), (2, 3)])
@pytest.mark.parametrize("window", [None, 5])
def test_flex_forward_equals_the_oracle(window: int | None, grid: tuple[int, int]) -> None:
    """384 tokens (a multiple of 128) and 36."""
    rule = Rule(chunk=2, first=1, num_frames=6, window=window, sink=1 if window else 0)
    network = network_of(torch.float32)
    inputs = make_inputs(network, rule, grid=grid, batch=1)
    mask = causal_mask(rule.plan, 6, rule.visibility, rule.positions)
    context = FullSequence(6, mask, backend="flex")
    got = network(inputs.noisy, inputs.sigma, inputs.cond(range(6)), context)
    assert_equal_outputs(got, oracle_plain(network, rule, inputs))


def test_a_mask_serves_a_clip_shorter_than_its_plan() -> None:
    rule = Rule(chunk=3, num_frames=4)
    network = network_of(torch.float64)
    inputs = make_inputs(network, rule)
    mask = causal_mask(replace(rule, num_frames=100).plan, 4, rule.visibility, rule.positions)
    got = network(inputs.noisy, inputs.sigma, inputs.cond(range(4)), FullSequence(4, mask))
    assert_equal_outputs(got, oracle_plain(network, rule, inputs))
