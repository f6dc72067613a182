"""What decides a training besides objective and data: length, batch, precision, optimizers, averages, saving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerKind = Literal["adamw", "muon+adamw"]
LrSchedule = Literal["constant", "cosine", "linear", "wsd"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer of a role.

    Fields: `kind` "adamw", or "muon+adamw": Muon (arXiv:2502.16982, its update scaled to AdamW's) for the matrices
    inside the network and AdamW for the rest; `lr` peak learning rate; `betas`, `eps` of AdamW; `weight_decay` of the
    weights of linear and convolution layers, never of biases, norms, embeddings or free parameters; `warmup_steps`
    linear from 0; `schedule` after it, down to the share `final` of `lr`: "wsd" is constant until the last
    `decay_share` of the steps and linear from there; `muon_lr` (None: `lr`), `muon_momentum`; `adamw_names`: layers
    whose dotted name contains one of these stay with AdamW under Muon (first and last layers, what makes modulations).
    """

    lr: float
    kind: OptimizerKind = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: LrSchedule = "constant"
    final: float = 0.0
    decay_share: float = 0.2
    muon_lr: float | None = None
    muon_momentum: float = 0.95
    adamw_names: tuple[str, ...] = ("embed", "head", "modulation", "time_projection")

    def __post_init__(self) -> None:
        _choice("kind", self.kind, ("adamw", "muon+adamw"))
        _choice("schedule", self.schedule, ("constant", "cosine", "linear", "wsd"))
        _positive("lr", self.lr)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: expected two numbers in [0, 1)")
        for name in ("weight_decay", "warmup_steps", "eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        for name in ("final", "decay_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share in [0, 1]")
        if self.kind == "adamw" and self.muon_lr is not None:
            raise ValueError(f"muon_lr={self.muon_lr} has no effect with kind='adamw'; use kind='muon+adamw'")
        if self.muon_lr is not None:
            _positive("muon_lr", self.muon_lr)
        if not 0.0 <= self.muon_momentum < 1.0:
            raise ValueError(f"muon_momentum={self.muon_momentum}: expected a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights of some roles.

    Fields: `decay` per step; `warmup` w > 0 uses min(decay, (1 + n) / (w + n)) at update n, so that early weights are
    forgotten; `roles` that have an average; `start`: before so many updates of the role the average is its weights.
    """

    decay: float
    warmup: int = 10
    roles: tuple[str, ...] = ("student",)
    start: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay={self.decay}: expected a number in [0, 1); ema=none for no average")
        for name in ("warmup", "start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more updates")
        if not self.roles:
            raise ValueError("roles=(): expected at least one; ema=none for no average")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Fields: `steps` optimizer steps in all; `batch` samples per step over all ranks; `accumulate` micro-batches per step
    on each rank; `optim` of every role, `critic` of that role where it differs; `ema` (None: no average); `seed` of the
    first weights and of all draws; `dtype` "bf16" computes under autocast with fp32 weights, "fp32" without; `device`
    "auto", "cpu", "cuda", "cuda:1"; `clip_norm` of each role's gradient (None: only measured); `max_bad_steps`: how
    many steps in a row may be left out because loss or gradient are not finite; `compile`, `gradient_checkpointing` of
    networks that offer it; `log_every` steps; `save_every` steps (0: never), `save_minutes` (0: never), a save at the
    end is always made; `keep` newest checkpoints; `max_minutes` ends the leg with a save (None: no limit);
    `workers` threads prepare batches `ahead` steps in advance; `shard` ranks share one copy of the weights and the
    groups of them replicate (0: all share); `frozen_dtype` in which networks are kept that a method only uses (a
    teacher), `offload` keeps their shards in the host's memory between uses (GPUs under torchrun only).
    """

    steps: int
    batch: int
    optim: OptimConfig
    accumulate: int = 1
    critic: OptimConfig | None = None
    ema: EmaConfig | None = None
    seed: int = 0
    dtype: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    clip_norm: float | None = 1.0
    max_bad_steps: int = 10
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 0
    save_minutes: float = 10.0
    keep: int = 2
    max_minutes: float | None = None
    workers: int = 1
    ahead: int = 2
    shard: int = 0
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    offload: bool = False

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, ("bf16", "fp32"))
        _choice("frozen_dtype", self.frozen_dtype, ("bf16", "fp32"))
        for name in ("steps", "batch", "accumulate", "max_bad_steps", "log_every", "keep", "workers", "ahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("save_every", "save_minutes", "shard"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        for name in ("clip_norm", "max_minutes"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed}: expected a number in [0, 2^63)")
        self.check_batch(1)

    def check_batch(self, world: int) -> None:
        """Raise ValueError unless every micro-batch of `world` ranks has the same number of samples."""
        parts = world * self.accumulate
        if self.batch % parts:
            lower = max(self.batch // parts, 1) * parts
            raise ValueError(
                f"batch={self.batch}: expected a multiple of accumulate x ranks = {self.accumulate} x {world}; "
                f"try {lower} or {lower + parts}"
            )

    def optim_of(self, role: str) -> OptimConfig:
        """The optimizer of a role."""
        return self.critic if role == "critic" and self.critic is not None else self.optim


def _positive(name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}={value}: expected a positive number")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")
