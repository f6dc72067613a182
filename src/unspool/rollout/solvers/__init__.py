"""Solvers: how x moves from one sigma to the next. Importing this package does not import torch."""

from __future__ import annotations

SOLVERS: dict[str, str] = {
    "few_step": "unspool.rollout.solvers.fewstep:FewStep",
    "euler": "unspool.rollout.solvers.euler:Euler",
    "ancestral": "unspool.rollout.solvers.ancestral:Ancestral",
    "multistep": "unspool.rollout.solvers.multistep:Multistep",
}
"""Name of a solver -> "module:Class"; a user's own "module:Class" may stand wherever a name is accepted."""
