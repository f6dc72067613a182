"""Noise sources: a pure function of (seed, sample, latent frame, step), Gaussian, and replayable."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool.rollout import NOISE_SOURCES
from unspool.rollout.noise import CounterNoise, NoiseSource, RecordedNoise, _philox

LAST = 2**64 - 1

PINNED_BITS = [9734064612041795694, 6671093866256082092, 656488000623934844, 4257603855492368478]
PINNED_NORMALS = [0.4354175329208374, 1.7874537706375122, 1.2269721031188965, -0.32398244738578796]
PINNED_HASH = "3fd9acd5630dd51627bafff14fad4fcbf243c71dc7aa34fa77edb1de4154af8d"


def draw(source: NoiseSource, frames: range, step: int = 0, shape: tuple[int, int, int, int] = (1, 4, 3, 5)) -> Tensor:
    return source.draw(frames, step, shape, torch.float32, "cpu")


def frame_noise(seed: int, sample: int, frame: int, step: int) -> Tensor:
    return draw(CounterNoise(seed, sample_offset=sample), range(frame, frame + 1), step)


def test_pinned_integers() -> None:
    """Philox-4x64-10 with key (seed, sample) and counter (0, 0, step, latent frame): fixed for ever."""
    bits = _philox(seed=1234567890123456789, sample=7, frame=2**40 + 3, step=2, count=4)
    assert bits.tolist() == PINNED_BITS


def test_pinned_normals() -> None:
    """Changing any of these values breaks every stored seed: do not update them to make the test pass."""
    noise = draw(CounterNoise(42), range(3, 5), step=1, shape=(2, 4, 8, 8))
    torch.testing.assert_close(noise[1, 1, 3, 7, 4:], torch.tensor(PINNED_NORMALS), rtol=0, atol=1e-6)
    # Rounded, because the last bit may differ from one CPU to another (see CounterNoise).
    rounded = (noise.double() * 2**12).floor().to(torch.int32).numpy()
    assert hashlib.sha256(rounded.astype("<i4").tobytes()).hexdigest() == PINNED_HASH


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 9), max_size=5),
    batch=st.integers(1, 3),
    first=st.sampled_from([0, 1, 10**6, 2**40, 2**63]),
    step=st.integers(0, 5),
    rows=st.integers(1, 7),
    seed=st.integers(0, LAST),
)
def test_any_split_into_chunks_and_samples_gives_the_same_bits(
    cuts: list[int], batch: int, first: int, step: int, rows: int, seed: int
) -> None:
    """Chunks drawn last first, samples drawn one at a time: bitwise the one draw of everything."""
    source, shape = CounterNoise(seed), (batch, 3, rows, 3)
    whole = draw(source, range(first, first + 9), step, shape)
    bounds = sorted({0, 9, *cuts})
    spans = [range(first + low, first + high) for low, high in pairwise(bounds)]
    pieces = [draw(source, span, step, shape) for span in reversed(spans)]
    assert torch.equal(torch.cat(pieces[::-1], dim=1), whole)
    for sample in range(batch):
        alone = CounterNoise(seed, sample_ids=(sample,))
        assert torch.equal(draw(alone, range(first, first + 9), step, (1, *shape[1:]))[0], whole[sample])


def test_sample_ids_and_offset_name_the_same_samples() -> None:
    by_offset = draw(CounterNoise(5, sample_offset=7), range(2), shape=(3, 1, 2, 2))
    by_id = draw(CounterNoise(5, sample_ids=(9, 7, 8)), range(2), shape=(3, 1, 2, 2))
    assert torch.equal(by_offset, by_id[[1, 2, 0]])


def test_every_number_uses_all_of_its_64_bits() -> None:
    """A seed or latent frame cut to 32 (or, through a float, to 53) bits would make two of these equal."""
    words = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**53, 2**53 + 1, 2**63, 2**63 + 1, LAST - 1, LAST]
    drawn: dict[bytes, tuple[int, ...]] = {}
    for position in range(4):
        for word in words:
            numbers = tuple(word if index == position else 3 for index in range(4))
            drawn[frame_noise(*numbers).numpy().tobytes()] = numbers
    assert len(drawn) == 4 * len(words)


def test_the_numbers_are_not_interchangeable() -> None:
    """Seed 1 of sample 2 is not seed 2 of sample 1, and so on for every pair."""
    orders = [(1, 2, 3, 4), (2, 1, 3, 4), (1, 2, 4, 3), (3, 2, 1, 4), (4, 2, 3, 1), (1, 3, 2, 4)]
    drawn = {frame_noise(*numbers).numpy().tobytes() for numbers in orders}
    assert len(drawn) == 6


def test_values_are_standard_normal() -> None:
    """Moments, tails and the Kolmogorov-Smirnov distance of 2 million values, each within what chance allows."""
    noise = draw(CounterNoise(0), range(20), shape=(1, 16, 80, 80)).double().flatten()
    n = noise.numel()
    # Standard errors of the first four moments of a normal: 1, 2, 15, 96 over n, square-rooted.
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(noise.pow(power).mean().item() - expected) < 5 * math.sqrt(variance / n)
    ordered = noise.sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - ranks).abs().max(), (cdf - ranks + 1 / n).abs().max()).item()
    assert distance < 1.95 / math.sqrt(n)  # p = 0.001
    assert 4.5 < noise.abs().max().item() < 6.5 and torch.isfinite(noise).all()


def test_neighbouring_counters_are_independent() -> None:
    """No correlation between values, or between their squares, of any two neighbours in seed, sample, frame, step."""
    base = (11, 4, 6, 2)
    neighbours = [base, *(tuple(v + (i == axis) for i, v in enumerate(base)) for axis in range(4))]
    rows = [
        draw(CounterNoise(seed, sample_offset=sample), range(frame, frame + 1), step, (1, 16, 64, 64)).flatten()
        for seed, sample, frame, step in neighbours
    ]
    # Within one draw as well: the two halves share the radii of Box-Muller.
    rows += list(rows[0].chunk(2))
    full, halves = torch.stack(rows[:5]).double(), torch.stack(rows[5:]).double()
    for values in (full, full.square(), halves, halves.square()):
        correlation = torch.corrcoef(values) - torch.eye(len(values))
        assert correlation.abs().max() < 5 / math.sqrt(values.shape[1])


@pytest.mark.parametrize("count", [1, 2, 3, 15])
def test_odd_and_tiny_latents(count: int) -> None:
    noise = draw(CounterNoise(1), range(4), shape=(2, 1, 1, count))
    assert noise.shape == (2, 4, 1, 1, count) and noise.unique().numel() == noise.numel()


def test_every_dtype_gets_the_same_noise_rounded() -> None:
    source = CounterNoise(3)
    single = draw(source, range(3))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(source.draw(range(3), 0, (1, 4, 3, 5), dtype, torch.device("cpu")), single.to(dtype))


def test_no_global_random_state_is_read_or_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), str(np.random.get_state(legacy=False))
    first = draw(CounterNoise(3), range(3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state(legacy=False))  # the text shows the position, which every draw moves
    torch.manual_seed(1)
    assert torch.equal(first, draw(CounterNoise(3), range(3)))


def test_numbers_outside_64_bits_are_refused() -> None:
    for word in (-1, 2**64, 0.5):
        for make in (lambda w: CounterNoise(w), lambda w: CounterNoise(0, w), lambda w: CounterNoise(0, 0, (w,))):
            with pytest.raises((ValueError, TypeError), match=r"2\^64|Type-check"):
                make(word)
    source = CounterNoise(0)
    for frames, step in ((range(-1, 2), 0), (range(LAST, LAST + 2), 0), (range(2), -1), (range(2), 2**64)):
        with pytest.raises(ValueError, match=r"2\^64"):
            draw(source, frames, step)
    with pytest.raises(ValueError, match="sample id"):
        draw(CounterNoise(0, sample_offset=LAST), range(1), shape=(2, 1, 1, 1))
    with pytest.raises(ValueError, match="expected one of them"):
        CounterNoise(0, sample_offset=1, sample_ids=(1,))
    with pytest.raises(ValueError, match="expected 2 samples"):
        draw(CounterNoise(0, sample_ids=(1, 2)), range(1))


def record() -> RecordedNoise:
    rng = torch.Generator().manual_seed(0)
    return RecordedNoise(
        torch.randn(2, 5, 4, 3, 2, generator=rng), torch.randn(3, 2, 5, 4, 3, 2, generator=rng), first_frame=10
    )


def test_recorded_noise_is_replayed_by_frame_and_step() -> None:
    source = record()
    assert source.renoise is not None
    for step, tensor in enumerate((source.initial, *source.renoise)):
        assert torch.equal(draw(source, range(10, 15), step, (2, 4, 3, 2)), tensor)
        assert torch.equal(draw(source, range(12, 14), step, (2, 4, 3, 2)), tensor[:, 2:4])
        assert torch.equal(draw(source, range(10, 15, 2), step, (2, 4, 3, 2)), tensor[:, ::2])


def test_unrecorded_noise_is_refused_by_name() -> None:
    source = record()
    for frames, name in ((range(9, 11), "latent frame 9"), (range(13, 16), "latent frame 15")):
        with pytest.raises(ValueError, match=name + ", expected 10 to 14"):
            draw(source, frames, 0, (2, 4, 3, 2))
    for step in (-1, 4):
        with pytest.raises(ValueError, match=f"step {step}, expected 0 to 3"):
            draw(source, range(10, 11), step, (2, 4, 3, 2))
    with pytest.raises(ValueError, match="step 1, expected 0 to 0"):
        draw(RecordedNoise(source.initial), range(1), 1, (2, 4, 3, 2))
    with pytest.raises(ValueError, match="as recorded"):
        draw(source, range(10, 11), 0, (1, 4, 3, 2))


def test_malformed_records_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[b, F, c, h, w\]"):
        RecordedNoise(torch.zeros(5, 4, 3, 2))
    with pytest.raises(ValueError, match="renoise"):
        RecordedNoise(torch.zeros(2, 5, 4, 3, 2), torch.zeros(2, 5, 4, 3, 2))
    with pytest.raises(ValueError, match="first_frame"):
        RecordedNoise(torch.zeros(2, 5, 4, 3, 2), first_frame=-1)


@pytest.mark.parametrize("source", [CounterNoise(LAST, LAST - 2), CounterNoise(5, sample_ids=(LAST, 3))])
def test_counter_state_survives_json(source: CounterNoise) -> None:
    again = CounterNoise.from_state(json.loads(json.dumps(source.state())))
    assert again == source
    assert torch.equal(draw(again, range(2), shape=(2, 1, 2, 2)), draw(source, range(2), shape=(2, 1, 2, 2)))


def test_states_name_their_source() -> None:
    for source in (CounterNoise(1), record()):
        module, attribute = NOISE_SOURCES[str(source.state()["source"])].split(":")
        made = getattr(importlib.import_module(module), attribute).from_state(source.state())
        assert type(made) is type(source) and isinstance(made, NoiseSource)
        assert torch.equal(draw(made, range(10, 12), 2, (2, 4, 3, 2)), draw(source, range(10, 12), 2, (2, 4, 3, 2)))
    with pytest.raises(ValueError, match="'recorded'"):
        CounterNoise.from_state(record().state())
    with pytest.raises(ValueError, match="without"):
        CounterNoise.from_state({"source": "counter", "seed": 1})
    with pytest.raises(ValueError, match="tensors"):
        RecordedNoise.from_state({"source": "recorded", "first_frame": 0, "initial": [1.0], "renoise": None})
