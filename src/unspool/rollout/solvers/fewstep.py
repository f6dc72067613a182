"""Few-step re-noising: `x <- add_noise(x0, fresh noise, next_sigma)`, the sampler of consistency-type students.

Source: arXiv:2303.01469 algorithm 1 (multistep consistency sampling). It is no ODE solver and has no order of
accuracy: the mean of Gaussian data comes out exact for any number of steps, and the whole distribution does exactly
when x0 is a sample of the data (a perfect consistency function, or a draw from the posterior). With the posterior
*mean* in its place the spread comes out too small, and more steps do not mend it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.process import Process
from unspool.rollout.solvers.base import Noise, SolverState, check_move
from unspool.shapes import Latent


@dataclass(frozen=True)
class FewStep:
    """Re-noising with fresh noise at every step but the last; works for any process (implements `Solver`)."""

    needs_noise: ClassVar[bool] = True
    process: Process = field(default_factory=FlowMatching)

    def start(self) -> SolverState:
        """Empty: each step knows all it needs."""
        return ()

    def step(
        self, x: Latent, x0: Latent, sigma: float, next_sigma: float, noise: Noise, state: SolverState
    ) -> tuple[Latent, SolverState]:
        """`add_noise(x0, noise, next_sigma)`. Raises ValueError as `Solver.step`."""
        check_move(sigma, next_sigma)
        if next_sigma == 0.0:
            return x0, state
        if noise is None:
            raise ValueError(f"got noise=None at next_sigma={next_sigma}, expected fresh noise; pass a noise source's")
        fresh = noise() if callable(noise) else noise
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.process.add_noise(x0.to(dtype), fresh, next_sigma).to(x.dtype), state
