"""IDDPM: a discrete, variance-preserving process whose network also predicts its variance.

Sources: arXiv:2006.11239 (process, posterior), arXiv:2102.09672 section 3.1 (learned range), arXiv:2411.16375 (clean
prefix). Step i of n has `sigma = (i + 1) / n`, so sigma 0 is exactly clean and step 0 is not: a latent frame told
sigma 0 is a clean one. At sigma 1 the published betas leave a signal of variance 4e-5. All tables are float64, and
what is computed from them runs in at least float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from unspool.diffusion.flow import check_sigma
from unspool.diffusion.schedule import Schedule
from unspool.shapes import Latent, Sigma, WidePrediction, to_device


@dataclass(frozen=True)
class IDDPMLoss:
    """Two terms per sample `[b]`, averaged over the entries of the noisy frames: squared error, and bits."""

    mse: Tensor
    bits: Tensor

    @property
    def total(self) -> Tensor:
        """What training minimises: mean over the batch of the sum."""
        return (self.mse + self.bits).mean()


@dataclass(frozen=True, kw_only=True)
class IDDPM:
    """Linear betas from `beta_start` to `beta_end` in `num_steps` steps (implements `Process`).

    `predicts` is what the first channels of a prediction stand for; further ones, as many as x has, are the fraction of
    a learned variance. "velocity" is `sqrt(a) noise - sqrt(1 - a) x0` (arXiv:2202.00512 appendix D): under much noise
    an error in it is one in x0, of which "noise" learns next to nothing there. sigma, a float in [0, 1] or a tensor
    `[b, t]`, is rounded to the nearest k / num_steps: there is no level in between, neither in the algebra nor in what
    the network is told.
    """

    predicts: Literal["noise", "x0", "velocity"] = "noise"
    num_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.predicts not in ("noise", "x0", "velocity"):
            raise ValueError(
                f"got predicts={self.predicts!r}, expected 'noise', 'x0' or 'velocity'; flow matching is another "
                "process"
            )
        if self.num_steps < 2 or not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                f"got num_steps={self.num_steps}, betas {self.beta_start}..{self.beta_end}, expected at least 2 steps "
                "and 0 < beta_start <= beta_end < 1; published networks use 1000 and 1e-4..0.02"
            )

    # ---- Process -----------------------------------------------------------------------------------------------

    def add_noise(self, x0: Latent, noise: Latent, sigma: float | Sigma) -> Latent:
        """`sqrt(a) x0 + sqrt(1 - a) noise` with the kept signal variance a; x0 itself at sigma 0.

        Raises:
            ValueError: sigma is out of range, or not `[b, t]`.
        """
        signal, clean = self._signal(sigma, x0)
        dtype = _compute_dtype(x0, noise)
        mixed = _times(signal**0.5, x0.to(dtype)) + _times((1.0 - signal) ** 0.5, noise.to(dtype))
        return _where(clean, x0, mixed.to(x0.dtype))

    def to_x0(self, x: Latent, prediction: WidePrediction, sigma: float | Sigma) -> Latent:
        """Clean latents, not clipped; x itself at sigma 0. Raises as `add_noise`."""
        signal, clean = self._signal(sigma, x)
        mean = _first(prediction, x)
        if self.predicts == "x0":
            return _where(clean, x, mean.to(x.dtype))
        dtype = _compute_dtype(x, mean)
        return _where(clean, x, self._mean_x0(x.to(dtype), mean.to(dtype), signal).to(x.dtype))

    def to_noise(self, x: Latent, prediction: WidePrediction, sigma: float | Sigma) -> Latent:
        """Noise that the prediction stands for; NaN (a float raises) where x has none. Raises as `add_noise`."""
        mean = _first(prediction, x)
        if self.predicts == "noise":
            self._signal(sigma, x)
            return mean.to(x.dtype)
        return self._noise_between(x, self.to_x0(x, prediction, sigma), sigma)

    def from_x0(self, x: Latent, x0: Latent, sigma: float | Sigma) -> Latent:
        """Prediction, without a variance, that stands for x0; undefined at sigma 0 as `to_noise`."""
        if self.predicts == "x0":
            return x0.to(x.dtype)
        noise = self._noise_between(x, x0, sigma)
        return noise if self.predicts == "noise" else self.target(x0.to(x.dtype), noise, sigma)

    def target(self, x0: Latent, noise: Latent, sigma: float | Sigma) -> Latent:
        """What the first channels of a perfect network hold, at every sigma. Raises as `add_noise`."""
        signal, _ = self._signal(sigma, x0)
        if self.predicts != "velocity":
            return noise.to(x0.dtype) if self.predicts == "noise" else x0
        dtype = _compute_dtype(x0, noise)
        target = _times(signal**0.5, noise.to(dtype)) - _times((1.0 - signal) ** 0.5, x0.to(dtype))
        return target.to(x0.dtype)

    @overload
    def timestep(self, sigma: float) -> float: ...
    @overload
    def timestep(self, sigma: Sigma) -> Sigma: ...
    def timestep(self, sigma: float | Sigma) -> float | Sigma:
        """The step 0..num_steps - 1; clean frames are told step 0, as published."""
        if isinstance(sigma, Tensor):
            return ((self.num_steps * sigma.double()).round() - 1.0).clamp(min=0.0)
        return float(max(self._level(sigma) - 1, 0))

    def is_clean(self, sigma: Sigma) -> Tensor:
        """Which latent frames are rounded to level 0: exactly clean, and told so."""
        return self._levels(sigma) == 0

    # ---- sampling ----------------------------------------------------------------------------------------------

    def timestep_map(self, num_steps: int) -> tuple[int, ...]:
        """The steps kept by respacing to `num_steps`, ascending, both ends among them: `round(i (n - 1) / (N - 1))`.

        Raises:
            ValueError: not 2 <= num_steps <= the steps of the process.
        """
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(f"got num_steps={num_steps}, expected 2..{self.num_steps}; published samplers take 100")
        return tuple(round(i * (self.num_steps - 1) / (num_steps - 1)) for i in range(num_steps))

    def schedule(self, num_steps: int) -> Schedule:
        """The respaced steps as the sigmas of a denoising loop. Raises as `timestep_map`."""
        kept = reversed(self.timestep_map(num_steps))
        return Schedule((*((step + 1) / self.num_steps for step in kept), 0.0))

    def posterior_mean(self, x: Latent, x0: Latent, sigma: float, next_sigma: float) -> Latent:
        """Mean of q(x at next_sigma | x at sigma, x0), arXiv:2006.11239 eq. 7; exactly x0 at next_sigma 0."""
        weight_x0, weight_x = _posterior_weights(*self._move(sigma, next_sigma))
        dtype = _compute_dtype(x, x0)
        return (weight_x0 * x0.to(dtype) + weight_x * x.to(dtype)).to(x.dtype)

    def log_variances(self, sigma: float, next_sigma: float) -> tuple[float, float]:
        """Ends of the learned range for a move: log variance of the posterior (-inf at next_sigma 0), and log beta."""
        signal, after = self._move(sigma, next_sigma)
        beta = 1.0 - signal / after
        lower = beta * (1.0 - after) / (1.0 - signal)
        return (math.log(lower) if lower > 0.0 else -math.inf), math.log(beta)

    def log_variance(self, x: Latent, prediction: WidePrediction, sigma: float, next_sigma: float) -> Latent:
        """Predicted log variance of a move: fraction -1 is the posterior's, +1 is beta (arXiv:2102.09672 eq. 15).

        A prediction without variance channels means the posterior's. At next_sigma 0 there is none: -inf.
        """
        lower, upper = self.log_variances(sigma, next_sigma)
        fraction = _fraction(prediction, x)
        if fraction is None or lower == -math.inf:
            return torch.full_like(x, lower, dtype=_compute_dtype(x, x))
        return _between(fraction.to(_compute_dtype(x, fraction)), lower, upper)

    # ---- training ----------------------------------------------------------------------------------------------

    def loss(self, x0: Latent, noise: Latent, x: Latent, prediction: WidePrediction, sigma: Sigma) -> IDDPMLoss:
        """Squared error plus variational bound over the noisy frames of clips with a clean prefix.

        A frame with sigma 0 belongs to the prefix and bears no loss; `x` is what the network saw, which may differ
        from `add_noise(x0, ...)` in the prefix. The bound trains the variance alone: the mean is detached in it
        (arXiv:2102.09672 eq. 16, without its factor 0.001). Without variance channels it is 0.

        Raises:
            ValueError: a sample without noisy frames (asked only of a sigma on the CPU), or as `add_noise`.
        """
        level = _per_frame(self._levels(sigma), x)
        noisy = (level > 0).expand(*x.shape[:2], 1, 1, 1)
        if noisy.device.type == "cpu" and not bool(noisy.flatten(1).any(1).all()):
            raise ValueError("got a sample whose latent frames are all at sigma 0, expected a noisy one in each")
        count = noisy.flatten(1).sum(1) * math.prod(x.shape[2:])

        def average(term: Tensor) -> Tensor:
            return torch.where(noisy, term, 0.0).flatten(1).sum(1) / count

        dtype = _compute_dtype(x, prediction)
        error = _first(prediction, x).to(dtype) - self.target(x0, noise, sigma).to(dtype)
        bits = self._bits(x0.to(dtype), x.to(dtype), prediction.to(dtype), level)
        return IDDPMLoss(mse=average(error.square()), bits=error.new_zeros(len(x)) if bits is None else average(bits))

    def _bits(self, x0: Tensor, x: Tensor, prediction: Tensor, level: Tensor) -> Tensor | None:
        """Variational term of every entry in bits: KL of the posteriors, or likelihood of the data at step 0."""
        fraction = _fraction(prediction, x)
        if fraction is None:
            return None
        level = level.clamp(min=1)  # what prefix frames get is finite, and not counted
        table = self._table(x.device)
        signal, after = table[level], table[level - 1]
        mean = self._mean_x0(x, _first(prediction, x).detach(), signal)
        weight_x0, _ = _posterior_weights(signal, after)
        off = _times(weight_x0, x0 - mean)  # of the two posterior means: x is in both
        # The variance of step 0 is 0; published networks are given that of step 1 there.
        higher, beside = table[level.clamp(min=2)], table[level.clamp(min=2) - 1]
        lower = ((1.0 - higher / beside) * (1.0 - beside) / (1.0 - higher)).log().to(x.dtype)
        log_variance = _between(fraction, lower, (1.0 - signal / after).log().to(x.dtype))
        divergence = 0.5 * (log_variance - lower - 1.0 + (lower - log_variance).exp())
        divergence = divergence + 0.5 * off.square() * (-log_variance).exp()
        unlikely = -_log_likelihood_of_bin(x0, off, 0.5 * log_variance)
        return torch.where(level == 1, unlikely, divergence) / math.log(2.0)

    # ---- tables ------------------------------------------------------------------------------------------------

    def _table(self, device: torch.device) -> Tensor:
        """Kept signal variance per level 0..num_steps, 1 at level 0; float64 on `device`."""
        made = _table_of if device.type == "cpu" else _kept_table  # a copy to a GPU would wait for it, at every call
        return made(self.num_steps, self.beta_start, self.beta_end, device)

    @property
    def _values(self) -> tuple[float, ...]:
        return _signal_variances(self.num_steps, self.beta_start, self.beta_end)

    def _kept(self, sigma: float) -> float:
        return self._values[self._level(sigma)]

    def _move(self, sigma: float, next_sigma: float) -> tuple[float, float]:
        """Kept signal variance before and after a move."""
        if not self._level(next_sigma) < self._level(sigma):
            raise ValueError(
                f"got a move from sigma={sigma} to {next_sigma}, expected one that passes at least one of the "
                f"{self.num_steps} steps; take both from schedule()"
            )
        return self._kept(sigma), self._kept(next_sigma)

    def _level(self, sigma: float) -> int:
        return round(self.num_steps * check_sigma(sigma))

    def _levels(self, sigma: Tensor) -> Tensor:
        return (self.num_steps * sigma.double()).round().long()

    def _signal(self, sigma: float | Tensor, x: Tensor) -> tuple[float | Tensor, bool | Tensor]:
        """Kept signal variance, and which latent frames are clean; floats, or tensors that fit x."""
        if not isinstance(sigma, Tensor):
            return self._kept(sigma), self._level(sigma) == 0
        level = _per_frame(self._levels(sigma), x)
        return self._table(x.device)[level], level == 0

    def _mean_x0(self, x: Tensor, mean: Tensor, signal: float | Tensor) -> Tensor:
        """Clean latents that the first channels of a prediction stand for."""
        if self.predicts == "x0":
            return mean
        if self.predicts == "noise":
            return _times(signal**-0.5, x) - _times((1.0 / signal - 1.0) ** 0.5, mean)
        return _times(signal**0.5, x) - _times((1.0 - signal) ** 0.5, mean)

    def _noise_between(self, x: Latent, x0: Latent, sigma: float | Sigma) -> Latent:
        """`(x - sqrt(a) x0) / sqrt(1 - a)`."""
        signal, clean = self._signal(sigma, x)
        if clean is True:
            raise ValueError("got sigma=0.0, expected sigma > 0: clean latents do not tell their noise; use target()")
        dtype = _compute_dtype(x, x0)
        noise = _times((1.0 - signal) ** -0.5, x.to(dtype)) - _times((signal / (1.0 - signal)) ** 0.5, x0.to(dtype))
        return noise.to(x.dtype) if clean is False else torch.where(torch.as_tensor(clean), math.nan, noise).to(x.dtype)


@lru_cache(maxsize=16)
def _signal_variances(num_steps: int, beta_start: float, beta_end: float) -> tuple[float, ...]:
    values = [1.0]
    for i in range(num_steps):
        values.append(values[-1] * (1.0 - (beta_start + (beta_end - beta_start) * i / (num_steps - 1))))
    return tuple(values)


def _table_of(num_steps: int, beta_start: float, beta_end: float, device: torch.device) -> Tensor:
    values = torch.tensor(_signal_variances(num_steps, beta_start, beta_end), dtype=torch.float64)
    return to_device(values, device)


@lru_cache(maxsize=16)
def _kept_table(num_steps: int, beta_start: float, beta_end: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a training may use it after a sampler has made it
        return _table_of(num_steps, beta_start, beta_end, device)


def _posterior_weights(signal: Any, after: Any) -> tuple[Any, Any]:
    """Weights of x0 and x in the posterior mean, from the kept variance before and after a move; floats or tensors."""
    alpha = signal / after
    return after**0.5 * (1.0 - alpha) / (1.0 - signal), alpha**0.5 * (1.0 - after) / (1.0 - signal)


def _log_likelihood_of_bin(x0: Tensor, off: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the 1/127.5 wide bin around x0 under a normal `off` below it (arXiv:2006.11239 eq. 13).

    The bins at both ends of [-1, 1] are open. The cumulative is the tanh form that published networks learned from.
    """
    scale = (-log_std).exp()
    upper, lower = _cumulative(scale * (off + 1.0 / 255.0)), _cumulative(scale * (off - 1.0 / 255.0))
    probability = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1.0 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _cumulative(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _between(fraction: Tensor, lower: Any, upper: Any) -> Tensor:
    share = (fraction + 1.0) / 2.0
    return share * upper + (1.0 - share) * lower


def _first(prediction: Tensor, x: Tensor) -> Tensor:
    """The channels of a prediction that stand for noise or clean latents."""
    channels = x.shape[2]
    fits = prediction.ndim == 5 and prediction.shape[2] in (channels, 2 * channels)
    if not fits or prediction.shape[:2] + prediction.shape[3:] != x.shape[:2] + x.shape[3:]:
        raise ValueError(
            f"got a prediction of shape {tuple(prediction.shape)} for latents {tuple(x.shape)}, expected the same "
            f"[b, t, c, h, w] with {channels} channels, or {2 * channels} with a learned variance"
        )
    return prediction[:, :, :channels]


def _fraction(prediction: Tensor, x: Tensor) -> Tensor | None:
    """The channels that say where in its range the variance lies; None where the network predicts none."""
    _first(prediction, x)
    return prediction[:, :, x.shape[2] :] if prediction.shape[2] > x.shape[2] else None


def _times(factor: float | Tensor, x: Tensor) -> Tensor:
    return factor.to(x.dtype) * x if isinstance(factor, Tensor) else factor * x


def _where(clean: bool | Tensor, exact: Tensor, computed: Tensor) -> Tensor:
    """`exact` in clean latent frames."""
    return torch.where(clean, exact, computed) if isinstance(clean, Tensor) else exact if clean else computed


def _compute_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _per_frame(level: Tensor, x: Tensor) -> Tensor:
    """Levels `[b, t]` as `[b, t, 1, 1, 1]` where x is."""
    fits = level.ndim == 2 and all(n in (1, full) for n, full in zip(level.shape, x.shape[:2], strict=True))
    if not fits:
        raise ValueError(
            f"got a sigma of shape {tuple(level.shape)}, expected [b, t] = {list(x.shape[:2])} with 1 allowed for "
            "either; use sigma[:, None] for one level per sample"
        )
    return to_device(level, x.device)[..., None, None, None]
