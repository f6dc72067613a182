"""What a noise process must answer: how clean latents become noisy, and what a prediction says about both.

`sigma` is the process's own noise level in [0, 1]: 0 is clean, 1 is pure noise, and it is either one float or a
tensor `[b, t]` (either dimension may be 1), one level per latent frame. Only the process knows what the network
predicts and which number it is told. A discrete process gives each of its steps one sigma, and the prediction may
carry channels beyond those of x (a learned variance); `to_x0` and `to_noise` then read the first ones.
"""

from __future__ import annotations

from typing import Protocol, overload, runtime_checkable

from unspool.shapes import Latent, Prediction, Sigma


@runtime_checkable
class Process(Protocol):
    """One noise process. Stateless; every result has the dtype of the first argument and may alias an input."""

    def add_noise(self, x0: Latent, noise: Latent, sigma: float | Sigma) -> Latent:
        """Noisy latents x at level sigma."""
        ...

    def to_x0(self, x: Latent, prediction: Prediction, sigma: float | Sigma) -> Latent:
        """Clean latents that the prediction at (x, sigma) stands for."""
        ...

    def to_noise(self, x: Latent, prediction: Prediction, sigma: float | Sigma) -> Latent:
        """Noise that the prediction at (x, sigma) stands for."""
        ...

    def from_x0(self, x: Latent, x0: Latent, sigma: float | Sigma) -> Prediction:
        """Prediction at (x, sigma) that stands for x0: the inverse of `to_x0` in its second argument."""
        ...

    def target(self, x0: Latent, noise: Latent, sigma: float | Sigma) -> Prediction:
        """Prediction of a perfect network at `add_noise(x0, noise, sigma)`: what training regresses on."""
        ...

    @overload
    def timestep(self, sigma: float) -> float: ...
    @overload
    def timestep(self, sigma: Sigma) -> Sigma: ...
    def timestep(self, sigma: float | Sigma) -> float | Sigma:
        """The number that the network is told for sigma."""
        ...
