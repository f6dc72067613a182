"""Seeds of a step: every random number of a training is a pure function of (seed, step, role, sample)."""

from __future__ import annotations

import hashlib

import torch

from unspool.methods.draws import SampleRng


def mix(*parts: int | str) -> int:
    """A 63-bit seed from numbers and names; the same on every machine."""
    text = "/".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def step_rng(seed: int, step: int, role: str, samples: range) -> SampleRng:
    """The generator of `role` at `step` for the samples with these numbers of the global batch."""
    own = [mix(seed, step, role, "sample", j) for j in samples]
    return SampleRng(mix(seed, step, role, "batch", samples.start), own, mix(seed, step, role, "shared"))


def seed_step(seed: int, step: int, role: str, part: int, device: torch.device) -> None:
    """Seed torch's global generators (dropout inside networks), so that they need no saving. `part` is the number of
    the micro-batch over all ranks."""
    value = mix(seed, step, role, "global", part)
    torch.default_generator.manual_seed(value)  # torch.manual_seed formats a stack trace for every device it lacks
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
