"""Optimizers of a role: which parameter is whose, learning rates as closed forms of the step, one state by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unspool.train.config import OptimConfig

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose `weight` is decayed, and may go to Muon."""


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate at 0-based `step` of `steps` as a share of the peak.

    During warm-up (step + 1) / warmup_steps; then, with p in [0, 1) the share that is done of the rest: constant 1;
    linear 1 - (1 - final) p; cosine final + (1 - final) (1 + cos(pi p)) / 2; wsd 1, and linear over the last
    decay_share of all steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - round(config.decay_share * steps))
    if step < start:
        return 1.0
    done = min((step - start) / max(steps - start, 1), 1.0)
    if config.schedule == "cosine":
        return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - (1.0 - config.final) * done


@dataclass(frozen=True)
class Split:
    """Trainable parameters of a module by how they are optimized, by name."""

    muon: dict[str, nn.Parameter] = field(default_factory=dict)
    decayed: dict[str, nn.Parameter] = field(default_factory=dict)
    plain: dict[str, nn.Parameter] = field(default_factory=dict)


def split_parameters(module: nn.Module, config: OptimConfig) -> Split:
    """Weights of linear and convolution layers are decayed, or go to Muon unless their name says otherwise; all other
    parameters (biases, norms, embeddings, free ones) are plain. Frozen parameters are left out."""
    weights = {
        f"{name}.weight" if name else "weight" for name, layer in module.named_modules() if isinstance(layer, MATRICES)
    }
    split = Split()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in weights:
            split.plain[name] = parameter
        elif config.kind == "muon+adamw" and not any(part in name for part in config.adamw_names):
            split.muon[name] = parameter
        else:
            split.decayed[name] = parameter
    return split


class RoleOptimizer:
    """The optimizers of one role behind one `step` and one state.

    `parameters` are all that are trained, by name. `state_tensors` names every state tensor "<parameter>/<state>".
    Raises ValueError for a module with nothing to train.
    """

    def __init__(self, module: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.split = split_parameters(module, config)
        self.parameters: dict[str, nn.Parameter] = {**self.split.muon, **self.split.decayed, **self.split.plain}
        if not self.parameters:
            raise ValueError(f"{type(module).__name__} has no parameter to train; expected some with requires_grad")
        self._flat = {name: _as_matrix(name, p) for name, p in self.split.muon.items()}
        self._optimizers = [optimizer for optimizer in (self._adamw(), self._muon()) if optimizer is not None]

    def _adamw(self) -> torch.optim.Optimizer | None:
        groups = [
            {"params": list(self.split.decayed.values()), "weight_decay": self.config.weight_decay},
            {"params": list(self.split.plain.values()), "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            return None
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, eps=self.config.eps, foreach=True)

    def _muon(self) -> torch.optim.Optimizer | None:
        if not self._flat:
            return None
        return torch.optim.Muon(
            list(self._flat.values()),
            lr=self.config.lr if self.config.muon_lr is None else self.config.muon_lr,
            momentum=self.config.muon_momentum,
            weight_decay=self.config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )

    def step(self, factor: float) -> None:
        """One step at `factor` times the peak learning rates."""
        for name, matrix in self._flat.items():
            grad = self.split.muon[name].grad
            matrix.grad = None if grad is None else grad.view(matrix.shape)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
            optimizer.step()
        for matrix in self._flat.values():
            matrix.grad = None

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _owners(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Every parameter's name, the tensor under which its optimizer keeps state, and that optimizer."""
        held = {id(p): optimizer for optimizer in self._optimizers for g in optimizer.param_groups for p in g["params"]}
        for name, parameter in self.parameters.items():
            key = self._flat.get(name, parameter)
            yield name, key, held[id(key)]

    def state_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, aliasing the state; empty before the first step."""
        found: dict[str, Tensor] = {}
        for name, key, optimizer in self._owners():
            for kind, value in optimizer.state.get(key, {}).items():
                assert isinstance(value, Tensor), f"{kind} of {name} is no tensor"
                found[f"{name}/{kind}"] = value
        return found

    def allocate_state(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Make the state tensors of these names, shapes and dtypes, to be filled by whoever reads a checkpoint.

        Raises ValueError for a parameter that is not trained here.
        """
        wanted: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        for name, what in shapes.items():
            parameter, _, kind = name.rpartition("/")
            wanted.setdefault(parameter, {})[kind] = what
        strange = [name for name in wanted if name not in self.parameters]
        if strange:
            raise ValueError(f"optimizer state of {strange[0]}, which is not trained here; use the recipe of that run")
        for name, key, optimizer in self._owners():
            optimizer.state.pop(key, None)
            if name in wanted:
                optimizer.state[key] = {k: _like(key, *what) for k, what in wanted[name].items()}


def _as_matrix(name: str, parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, or for a convolution a matrix [out, rest] that shares its memory."""
    if parameter.ndim == 2:
        return parameter
    if not parameter.is_contiguous():
        raise ValueError(f"{name} is not contiguous in memory; Muon needs it so; use the default memory format")
    return nn.Parameter(parameter.detach().view(parameter.shape[0], -1))


def _like(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros; sharded as `key` where they have its shape, else (a count of steps) a plain tensor on the CPU."""
    if shape == tuple(key.shape):
        return torch.zeros_like(key, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype)
