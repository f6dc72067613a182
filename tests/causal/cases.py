"""Strategies over every setting of a rollout, and the networks that the tests share."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from oracle import Inputs, Rule, make_network, started

from unspool.causal.cache.kv import KVCache
from unspool.models.wan.network import WanTransformer

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.float64]


@lru_cache(maxsize=4)
def network_of(dtype: torch.dtype = torch.float64) -> WanTransformer:
    return make_network(dtype=dtype)


RULE = Rule(chunk=2, num_frames=14, window=6, sink=1)
RELATIVE = replace(RULE, policy="relative")
FULL = Rule(chunk=2, num_frames=8)


def setup(rule: Rule, chunks: int, **options: Any) -> tuple[WanTransformer, KVCache, Inputs]:
    """A network, a cache that has gone through `chunks` chunks, and the inputs."""
    return network_of(), *started(network_of(), rule, chunks, **options)


@st.composite
def rules(draw: Any) -> Rule:
    """Every setting; windows start at sink + the longest chunk and need not be multiples of anything."""
    chunk, first = draw(st.integers(1, 5)), draw(st.sampled_from([None, 1, 2]))
    sink = draw(st.integers(0, 4))
    longest = max(chunk, first or 0)
    window = draw(st.one_of(st.none(), st.just(sink + longest), st.integers(sink + longest, sink + longest + 6)))
    windowed = window is not None
    return Rule(
        chunk=chunk,
        first=first,
        num_frames=draw(st.integers(1, 14)),
        window=window,
        sink=sink if windowed else 0,
        causal_inside=draw(st.booleans()),
        commit_window=draw(st.one_of(st.none(), st.integers(sink + longest, sink + longest + 6))) if windowed else None,
        commit_reads_sink=draw(st.booleans()) if windowed else True,
        policy=draw(st.sampled_from(["absolute", "relative", "reanchored"])),
        offset=draw(st.sampled_from([0, 5])),
    )


@st.composite
def settings_of_inputs(draw: Any) -> dict[str, Any]:
    return {
        "batch": draw(st.integers(1, 3)),
        "grid": draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (3, 2), (2, 3)])),
        "num_prompts": draw(st.integers(1, 3)),
        "sigma_shape": (draw(st.booleans()), draw(st.booleans())),
        "seed": draw(st.integers(0, 1000)),
    }
