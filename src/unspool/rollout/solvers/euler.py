"""Euler on the flow ODE `dx / dsigma = velocity`: first order, deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from unspool.diffusion.flow import FlowMatching, interpolate
from unspool.rollout.solvers.base import Noise, SolverState, check_move
from unspool.shapes import Latent


@dataclass(frozen=True)
class Euler:
    """One straight move per step, for flow matching (implements `Solver`). Measured order 1."""

    needs_noise: ClassVar[bool] = False
    process: ClassVar[FlowMatching] = FlowMatching()

    def start(self) -> SolverState:
        """Empty: each step knows all it needs."""
        return ()

    def step(
        self, x: Latent, x0: Latent, sigma: float, next_sigma: float, noise: Noise, state: SolverState
    ) -> tuple[Latent, SolverState]:
        """`x + (next_sigma - sigma) velocity` with `velocity = (x - x0) / sigma`. noise is not used.

        Written as the point between x0 and x at `next_sigma / sigma`, which never divides latents by a small sigma.
        Raises ValueError as `Solver.step`.
        """
        check_move(sigma, next_sigma)
        if next_sigma == 0.0:
            return x0, state
        dtype = torch.promote_types(x.dtype, torch.float32)
        return interpolate(x0.to(dtype), x, next_sigma / sigma).to(x.dtype), state
