"""Noise sources: the Gaussian noise of a rollout as a function of (sample, latent frame, step), and of nothing else.

Step 0 is the initial noise of a latent frame; step s >= 1 is the fresh noise added before denoising step s. A source
has no position: drawing twice gives the same values, so chunk size, batch size, order and resume point cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.shapes import Latent

_WORD = 1 << 64


@runtime_checkable
class NoiseSource(Protocol):
    """Where a rollout gets its noise. Immutable; one source may serve any number of draws in any order."""

    def draw(
        self,
        frames: range,
        step: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Latent:
        """Noise `[b, len(frames), c, h, w]` of the latent frames with these absolute indexes; shape is (b, c, h, w).

        Raises:
            ValueError: the source cannot give it.
        """
        ...

    def state(self) -> dict[str, object]:
        """All that `from_state` needs to build an equal source: JSON values, or tensors by name; a fresh dict.

        The entry "source" is the name in `NOISE_SOURCES`, or a user's own "module:Class".
        """
        ...

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> NoiseSource:
        """The source whose `state()` this is.

        Raises:
            ValueError: the state is that of another class or lacks an entry.
        """
        ...


@dataclass(frozen=True)
class CounterNoise:
    """Standard normal noise computed from (seed, sample, latent frame, step) on the CPU.

    Philox-4x64 with the key (seed, sample) and the counter words (step, latent frame) gives 64-bit integers whose
    stream numpy guarantees across versions; Box-Muller in float64 makes normals of them, rounded to float32 and then
    cast. The float64 logarithm and cosine may differ in their last bit from one CPU to another, which after rounding
    changes about one value in 10^8 by one unit in the last place of float32. All four numbers use their whole 64 bits.

    sample_ids: one id per sample of the batch; sample j then equals the same id drawn alone. By default the ids are
        sample_offset, sample_offset + 1, ...

    Raises:
        ValueError: a number does not fit into 64 unsigned bits, or both kinds of ids are given.
    """

    seed: int
    sample_offset: int = 0
    sample_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_integer("seed", self.seed)
        _check_integer("sample_offset", self.sample_offset)
        if self.sample_ids is None:
            return
        if self.sample_offset != 0:
            raise ValueError(
                f"got sample_offset={self.sample_offset} and sample_ids={self.sample_ids}, expected one of them"
            )
        object.__setattr__(self, "sample_ids", tuple(self.sample_ids))
        for sample in self.sample_ids:
            _check_integer("sample id", sample)

    def draw(
        self,
        frames: range,
        step: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Latent:
        """Noise `[b, len(frames), c, h, w]`; to a CUDA device the copy is queued and the host does not wait.

        Raises:
            ValueError: step or a latent frame is negative or above 64 bits, or b is not the number of sample ids.
        """
        samples = self._samples(shape[0])
        _check_integer("step", step)
        for frame in (frames[0], frames[-1]) if len(frames) else ():
            _check_integer("latent frame", frame)
        count = math.prod(shape[1:])
        values = np.empty((len(samples), len(frames), count), dtype=np.float32)
        for row, sample in enumerate(samples):
            for column, frame in enumerate(frames):
                # One latent frame at a time, so that vectorised loops never see a length that depends on the chunk.
                values[row, column] = _normals(self.seed, sample, frame, step, count)
        noise = torch.from_numpy(values).reshape(shape[0], len(frames), *shape[1:]).to(dtype)
        if torch.device(device).type != "cuda":
            return noise.to(device)
        return noise.pin_memory().to(device, non_blocking=True)

    def state(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "source": "counter",
            "seed": self.seed,
            "sample_offset": self.sample_offset,
            "sample_ids": None if self.sample_ids is None else list(self.sample_ids),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> CounterNoise:
        """The source whose `state()` this is. Raises ValueError for another one's."""
        seed, offset, ids = _entries(state, "counter", ("seed", "sample_offset", "sample_ids"))
        if not isinstance(seed, int) or not isinstance(offset, int) or not isinstance(ids, (list, tuple, type(None))):
            raise ValueError(
                f"got a noise state {dict(state)}, expected integers; it is not one of CounterNoise.state()"
            )
        return cls(seed, offset, None if ids is None else tuple(ids))

    def _samples(self, batch: int) -> tuple[int, ...]:
        if self.sample_ids is None:
            ids = tuple(range(self.sample_offset, self.sample_offset + batch))
            if ids:
                _check_integer("sample id", ids[-1])
            return ids
        if len(self.sample_ids) != batch:
            raise ValueError(f"got a batch of {batch}, expected {len(self.sample_ids)} samples: {self.sample_ids}")
        return self.sample_ids


@dataclass(frozen=True, eq=False)
class RecordedNoise:
    """Noise from tensors: to reproduce a recorded run, or to drive a rollout with chosen noise.

    initial: `[b, F, c, h, w]`, step 0. renoise: `[steps, b, F, c, h, w]`, `renoise[s - 1]` is step s; None for a
    one-step schedule. first_frame: the latent frame index of `initial[:, 0]`. The tensors are kept, not copied.

    Raises:
        ValueError: the shapes do not fit together, or first_frame is negative.
    """

    initial: Tensor
    renoise: Tensor | None = None
    first_frame: int = 0

    def __post_init__(self) -> None:
        _check_integer("first_frame", self.first_frame)
        if self.initial.ndim != 5:
            raise ValueError(f"got initial noise of shape {tuple(self.initial.shape)}, expected [b, F, c, h, w]")
        if self.renoise is not None and tuple(self.renoise.shape[1:]) != tuple(self.initial.shape):
            raise ValueError(
                f"got renoise of shape {tuple(self.renoise.shape)}, expected [steps, *{list(self.initial.shape)}]"
            )

    def draw(
        self,
        frames: range,
        step: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Latent:
        """The recorded noise `[b, len(frames), c, h, w]`; may alias the record.

        Raises:
            ValueError: a latent frame or the step was not recorded, or shape (b, c, h, w) is another one.
        """
        batch, count, *rest = self.initial.shape
        if tuple(shape) != (batch, *rest):
            raise ValueError(f"got (b, c, h, w) = {tuple(shape)}, expected {(batch, *rest)} as recorded")
        end = self.first_frame + count
        missing = [frame for frame in frames if not self.first_frame <= frame < end]
        if missing:
            raise ValueError(
                f"got latent frame {missing[0]}, expected {self.first_frame} to {end - 1} as recorded; "
                "record more frames or generate fewer"
            )
        num_steps = 1 + (0 if self.renoise is None else self.renoise.shape[0])
        if not 0 <= step < num_steps:
            raise ValueError(
                f"got step {step}, expected 0 to {num_steps - 1} as recorded; use at most {num_steps} schedule steps"
            )
        source = self.initial if step == 0 or self.renoise is None else self.renoise[step - 1]
        if frames.step == 1:
            picked = source[:, frames.start - self.first_frame : frames.stop - self.first_frame]
        else:
            picked = source[:, [frame - self.first_frame for frame in frames]]
        return picked.to(device=device, dtype=dtype)

    def state(self) -> dict[str, object]:
        """The record itself: "initial" and "renoise" are tensors (renoise may be None), the rest JSON values."""
        return {
            "source": "recorded",
            "first_frame": self.first_frame,
            "initial": self.initial,
            "renoise": self.renoise,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> RecordedNoise:
        """The source whose `state()` this is. Raises ValueError for another one's."""
        first, initial, renoise = _entries(state, "recorded", ("first_frame", "initial", "renoise"))
        if (
            not isinstance(first, int)
            or not isinstance(initial, Tensor)
            or not isinstance(renoise, (Tensor, type(None)))
        ):
            raise ValueError("got a noise state without its tensors, expected one of RecordedNoise.state()")
        return cls(initial, renoise, first)


def _normals(seed: int, sample: int, frame: int, step: int, count: int) -> NDArray[np.float32]:
    """count standard normals by Box-Muller: the first half of the integers gives radii, the second gives angles."""
    pairs = (count + 1) // 2
    bits = _philox(seed, sample, frame, step, 2 * pairs)
    # 52 random bits as the mantissa of a float64 in [1, 2): exact, and much faster than a conversion and a division.
    bits >>= np.uint64(12)
    bits |= np.uint64(0x3FF0000000000000)
    uniform = bits.view(np.float64)
    radius = np.sqrt(-2.0 * np.log(2.0 - uniform[:pairs]))  # 2 - u lies in (0, 1]: the logarithm is finite
    angle = (2.0 * np.pi) * (uniform[pairs:] - 1.0)
    normals = np.empty(2 * pairs, dtype=np.float32)
    normals[:pairs] = radius * np.cos(angle)
    normals[pairs:] = radius * np.sin(angle)
    return normals[:count]


def _philox(seed: int, sample: int, frame: int, step: int, count: int) -> NDArray[np.uint64]:
    """count 64-bit integers of the Philox-4x64-10 stream of one latent frame; only the low counter word moves in it."""
    key = np.array([seed, sample], dtype=np.uint64)
    counter = np.array([0, 0, step, frame], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def _entries(state: Mapping[str, object], source: str, names: tuple[str, ...]) -> tuple[object, ...]:
    if state.get("source") != source:
        raise ValueError(f"got the state of a {state.get('source')!r} noise source, expected {source!r}")
    absent = [name for name in names if name not in state]
    if absent:
        raise ValueError(f"got a noise state without {absent}, expected {list(names)}")
    return tuple(state[name] for name in names)


def _check_integer(name: str, value: int) -> None:
    if not isinstance(value, int) or not 0 <= value < _WORD:
        raise ValueError(f"got {name} {value}, expected an integer from 0 to 2^64 - 1")
