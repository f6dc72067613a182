"""What a solver must do: one move along the schedule, with every memory of the past in an explicit state."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from unspool.shapes import Latent, WidePrediction

SolverState: TypeAlias = tuple[tuple[float, Tensor], ...]
"""(sigma, tensor) of earlier steps, newest first; empty at the start of a chunk and in one-step solvers.

A plain tuple, so a snapshot stores floats and tensors and nothing else. The tensors must not be written to.
"""

Noise: TypeAlias = Callable[[], Tensor] | Tensor | None


@runtime_checkable
class Solver(Protocol):
    """Moves latents from sigma to next_sigma. Holds settings only: one solver may serve many sessions at once."""

    needs_noise: ClassVar[bool]
    """Whether `step` uses fresh noise before the last step."""

    def start(self) -> SolverState:
        """The state before the first step of a chunk."""
        ...

    def step(
        self, x: Latent, x0: Latent, sigma: float, next_sigma: float, noise: Noise, state: SolverState
    ) -> tuple[Latent, SolverState]:
        """x at next_sigma, in the dtype of x, and the state for the next step.

        x0: the clean latents estimated at (x, sigma). At `next_sigma == 0` the result is x0 itself.
        noise: fresh noise of the shape of x, or a function that draws it, called only where it is used.

        Raises:
            ValueError: not `0 <= next_sigma < sigma <= 1`, noise is missing, or the state is not of this chunk.
        """
        ...


@runtime_checkable
class ReadsPrediction(Protocol):
    """A solver that takes more from the network than clean latents: its learned variance, say."""

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
        """As `Solver.step`; `prediction` is what the network gave at (x, sigma), None where nobody knows."""
        ...

    reads_prediction: ClassVar[bool]


def advance(
    solver: Solver,
    x: Latent,
    x0: Latent,
    prediction: WidePrediction,
    sigma: float,
    next_sigma: float,
    noise: Noise,
    state: SolverState,
) -> tuple[Latent, SolverState]:
    """One move of any solver, with the prediction for those that read it."""
    if isinstance(solver, ReadsPrediction):
        return solver.step(x, x0, sigma, next_sigma, noise, state, prediction=prediction)
    return solver.step(x, x0, sigma, next_sigma, noise, state)


def check_move(sigma: float, next_sigma: float) -> None:
    """Refuse a move that is not a denoising one.

    Raises:
        ValueError: not `0 <= next_sigma < sigma <= 1`.
    """
    if not 0.0 <= next_sigma < sigma <= 1.0:
        raise ValueError(
            f"got sigma={sigma}, next_sigma={next_sigma}, expected 0 <= next_sigma < sigma <= 1; "
            "take both from Schedule.steps"
        )
