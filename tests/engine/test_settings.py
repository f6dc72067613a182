"""Rollout settings as data: the process with its options, there and back, and refused where they do not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from tiny_model import SETTINGS

from unspool.causal.newer import stated
from unspool.causal.visibility import Full, Window
from unspool.config import from_dict, to_dict
from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.iddpm import IDDPM
from unspool.engine.settings import RolloutSettings
from unspool.rollout.solvers.ancestral import Ancestral
from unspool.rollout.solvers.euler import Euler

VELOCITY = IDDPM(predicts="velocity", num_steps=200)
OPTIONS: dict[str, str | int | float] = {"predicts": "velocity", "num_steps": 200}
ANCESTRAL = replace(
    SETTINGS, process="iddpm", process_options=OPTIONS, solver="ancestral", shift=None,
    sigmas=VELOCITY.schedule(4).sigmas,
)  # fmt: skip


def test_options_reach_the_process_its_solver_and_its_schedules() -> None:
    again = from_dict(RolloutSettings, to_dict(ANCESTRAL))
    assert again == ANCESTRAL and again.noising() == VELOCITY
    config = again.config()
    assert config.process == VELOCITY and config.solver == Ancestral(process=VELOCITY)
    assert again.changed(steps=7).sigmas == VELOCITY.schedule(7).sigmas != IDDPM().schedule(7).sigmas
    assert SETTINGS.config().process == FlowMatching()


def test_commit_passes_may_read_their_own_chunk_differently() -> None:
    """Published as "partial": noisy frames read each other, committed ones only what is before them."""
    partial = replace(SETTINGS, commit_within="causal")
    visibility = from_dict(RolloutSettings, to_dict(partial)).config().visibility
    assert visibility == Window(window=9, sink=3, within="full", commit_within="causal")
    with pytest.raises(ValueError, match="commit_within='causal' with window='full'"):
        replace(partial, window="full")


@dataclass(frozen=True)
class Nearest(Window):
    """A policy that no name stands for."""

    window: int = 6


@dataclass(frozen=True)
class Slowed(Euler):
    """A solver with an option."""

    share: float = 1.0


def test_solver_and_visibility_of_ones_own_are_data_too() -> None:
    own = replace(
        SETTINGS, solver=f"{__name__}:Slowed", solver_options={"share": 0.5}, visibility=f"{__name__}:Nearest",
        visibility_options={"window": 9, "sink": 0},
    )  # fmt: skip
    again = from_dict(RolloutSettings, to_dict(own))
    config = again.config()
    assert again == own and config.solver == Slowed(share=0.5)
    assert type(config.visibility).__name__ == "Nearest" and config.visibility.window == 9  # type: ignore[attr-defined]
    assert again.config(whole=9).visibility == Full(within="full")
    assert again.changed(steps=2).visibility == own.visibility
    with pytest.raises(ValueError, match=r"sink=0: what this model reads is decided by visibility="):
        again.changed(sink=0)
    with pytest.raises(ValueError, match=r"solver_options=\{'part': 1\}: expected options among share"):
        replace(own, solver_options={"part": 1}).config()
    with pytest.raises(ValueError, match="without visibility"):
        replace(own, visibility=None)
    unsaid = {"solver_options", "visibility", "visibility_options"}
    assert not unsaid & set(stated(SETTINGS)) and unsaid <= set(stated(own))


def test_options_are_unsaid_while_there_are_none() -> None:
    """So that records of before there were any still fit."""
    assert "process_options" in stated(ANCESTRAL)
    assert not {"process", "process_options", "prefix_frames"} & set(stated(SETTINGS))


def test_options_that_the_process_does_not_have_are_refused() -> None:
    wrong = replace(ANCESTRAL, process_options={"predict": "velocity"})
    with pytest.raises(ValueError, match=r"'predict': 'velocity'.*expected options among predicts, num_steps"):
        wrong.config()
    with pytest.raises(ValueError, match="got num_steps=1"):
        replace(ANCESTRAL, process_options={"num_steps": 1}).noising()
