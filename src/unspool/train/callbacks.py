"""What happens beside the steps: sample sheets, scores, exports. The loop knows only this face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unspool.train.loop import Trainer


class Callback:
    """Base of all callbacks; each method does nothing by default.

    All ranks call them at the same steps, because a sharded network computes only together; write files where
    `trainer.world.is_main`. The step's randomness does not depend on what a callback draws.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of a leg; `trainer.step` steps are done."""

    def on_step(self, trainer: Trainer) -> None:
        """After a step; `trainer.step` steps are done."""

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written to `path`."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of the training, not of a leg that was stopped before; a checkpoint was saved."""


class Every(Callback):
    """Calls `function(trainer)` with the averaged weights in place, every `steps` steps and after the last one.

    What it returns, a mapping of numbers or None, goes to the log. `at_start` also calls it before the first step.
    """

    def __init__(
        self, steps: int, function: Callable[[Trainer], Mapping[str, float] | None], *, at_start: bool = False
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: expected at least 1")
        self.steps, self.function, self.at_start = steps, function, at_start

    def on_start(self, trainer: Trainer) -> None:
        if self.at_start and trainer.step == 0:
            self._call(trainer)

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step % self.steps == 0 or trainer.step == trainer.recipe.train.steps:
            self._call(trainer)

    def _call(self, trainer: Trainer) -> None:
        with trainer.evaluating():
            found = self.function(trainer)
        if found:
            trainer.write(found)
