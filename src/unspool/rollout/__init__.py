"""Autoregressive generation: the loop, solvers, guidance, noise. Importing this package does not import torch."""

from __future__ import annotations

NOISE_SOURCES: dict[str, str] = {
    "counter": "unspool.rollout.noise:CounterNoise",
    "recorded": "unspool.rollout.noise:RecordedNoise",
}
"""Name of a noise source -> "module:Class"; a user's own "module:Class" may stand wherever a name is accepted."""
