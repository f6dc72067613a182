"""Ancestral sampling of IDDPM: a draw from the posterior, with the variance that the network predicts.

Source: arXiv:2006.11239 algorithm 2 on respaced steps (arXiv:2102.09672 section 4), whose chain is told by pairs of
sigmas alone. Clean latents are not clipped, as published for latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from unspool.diffusion.iddpm import IDDPM
from unspool.rollout.solvers.base import Noise, SolverState, check_move
from unspool.shapes import Latent, WidePrediction


@dataclass(frozen=True)
class Ancestral:
    """Mean of the posterior plus its noise (implements `Solver` and `ReadsPrediction`).

    A prediction without variance channels, or none, means the posterior's own variance: the smallest of the range.
    """

    needs_noise: ClassVar[bool] = True
    reads_prediction: ClassVar[bool] = True
    made_for: ClassVar[type] = IDDPM
    """Whose posterior it draws from."""
    process: IDDPM = field(default_factory=IDDPM)

    def start(self) -> SolverState:
        """Empty: each step knows all it needs."""
        return ()

    def step(
        self,
        x: Latent,
        x0: Latent,
        sigma: float,
        next_sigma: float,
        noise: Noise,
        state: SolverState,
        *,
        prediction: WidePrediction | None = None,
    ) -> tuple[Latent, SolverState]:
        """A draw of x at next_sigma. Raises ValueError as `Solver.step`, and for sigmas that are no steps."""
        check_move(sigma, next_sigma)
        if next_sigma == 0.0:
            return x0, state
        if noise is None:
            raise ValueError(f"got noise=None at next_sigma={next_sigma}, expected fresh noise; pass a noise source's")
        fresh = noise() if callable(noise) else noise
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = self.process.posterior_mean(wide, x0, sigma, next_sigma)
        spread = (
            0.5 * self.process.log_variance(wide, x if prediction is None else prediction, sigma, next_sigma)
        ).exp()
        return (mean + spread * fresh.to(wide.dtype)).to(x.dtype), state
