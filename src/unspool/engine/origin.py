"""Which file a component's weights came from, for as long as they are those of the file."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from unspool.engine.model_folder import ModelSpec
from unspool.rollout.state import tensors_mark

_ORIGIN = "_unspool_origin"


def note_origin(part: object, sha256: str | None) -> None:
    """Remember that `part` was just loaded from a file with this hash; copies of the module carry it along."""
    if isinstance(part, nn.Module) and sha256 is not None:
        object.__setattr__(part, _ORIGIN, (sha256, _mark(part)))


def weights_of(spec: ModelSpec, **parts: object) -> str:
    """What tells the weights of all `parts` (role -> component) from others: `spec.weights` while every one is what was
    loaded from the file that `spec` states, else "unsaved " and a hash of a few numbers of every tensor."""
    modules = {role: part for role, part in parts.items() if isinstance(part, nn.Module)}
    marks = {role: _mark(module) for role, module in modules.items()}
    if spec.weights is not None and all(
        getattr(module, _ORIGIN, None) == (spec.parts[role].sha256, marks[role])
        for role, module in modules.items()
        if marks[role] is not None
    ):
        return spec.weights
    lines = "".join(f"{role} {mark}\n" for role, mark in sorted(marks.items()))
    return "unsaved " + hashlib.sha256(lines.encode()).hexdigest()[:16]


@torch.no_grad()
def _mark(module: nn.Module) -> str | None:
    tensors = module.state_dict().values()
    return tensors_mark(tensors) if tensors else None


__all__ = ["note_origin", "weights_of"]
