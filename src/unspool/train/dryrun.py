"""What a training would cost: sizes, memory, FLOPs and time, measured on a real step where it fits; writes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from unspool.data.batch import Batch, Source
from unspool.methods.base import Method
from unspool.train.config import TrainConfig
from unspool.train.feed import Feed, to_device
from unspool.train.optim import RoleOptimizer, split_parameters
from unspool.train.parallel import World, pick_device
from unspool.train.progress import duration
from unspool.train.recipe import Named
from unspool.train.rng import seed_step, step_rng
from unspool.train.state import prepare

FP32 = 4
Kind = tuple[tuple[str, ...], int]
"""What a step costs depends on: the roles that act, and the leg of a curriculum."""
MEMORY_SHARE = 0.8
"""A step is measured only where weights, gradients, optimizer and averages fill at most this share of the memory."""


@dataclass(frozen=True, kw_only=True)
class RoleCost:
    """Of one role, in all ranks together: parameters (all, trained, by optimizer) and bytes."""

    role: str
    num_parameters: int
    num_trained: int
    num_muon: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one kind of step: the roles that act, the leg of a curriculum, the share of all steps; mean seconds, FLOPs of
    all micro-batches and roles, seconds of a batch from the source."""

    roles: tuple[str, ...]
    leg: int
    share: float
    step_s: float
    flops: int
    data_s: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Real steps of each kind on `device`: bytes that the backward needs of one micro-batch, peak bytes of the device
    (CUDA only), and as means over the training FLOPs, seconds of a step and of a batch from the source."""

    device: str
    kinds: tuple[StepCost, ...]
    activation_bytes: int
    peak_bytes: int | None

    @property
    def flops(self) -> int:
        return round(sum(kind.share * kind.flops for kind in self.kinds))

    @property
    def step_s(self) -> float:
        return sum(kind.share * kind.step_s for kind in self.kinds)

    @property
    def data_s(self) -> float:
        return sum(kind.share * kind.data_s for kind in self.kinds)

    def slowest_s(self, workers: int) -> float:
        """Seconds of a step where batches are prepared meanwhile by `workers`: of each kind the slower counts."""
        return sum(kind.share * max(kind.step_s, kind.data_s / workers) for kind in self.kinds)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The whole answer; `measured` is None, with the reason in `why`, where no step was run."""

    named: Named
    world: int
    roles: tuple[RoleCost, ...]
    measured: Measured | None
    why: str = ""

    @property
    def total_s(self) -> float | None:
        """Seconds of the whole training; batches are prepared meanwhile, the slower of the two counts."""
        if self.measured is None:
            return None
        train = self.named.recipe.train
        return train.steps * self.measured.slowest_s(train.workers)

    def text(self) -> str:
        """For people, several lines."""
        train = self.named.recipe.train
        first = self.named.description.splitlines()[0] if self.named.description else ""
        lines = [f"recipe      {self.named.name}  {first}".rstrip()]
        lines.append(
            f"steps       {train.steps}, batch {train.batch}"
            + (f" in {train.accumulate} micro-batches" if train.accumulate > 1 else "")
            + (f" on {self.world} ranks" if self.world > 1 else "")
            + f", {train.dtype}"
        )
        for cost in self.roles:
            trained = f"{cost.num_trained:,} trained" if cost.num_trained != cost.num_parameters else "all trained"
            muon = f", {cost.num_muon:,} by Muon" if cost.num_muon else ""
            lines.append(f"{cost.role:<11} {cost.num_parameters:,} parameters, {trained}{muon}")
            lines.append(
                f"  memory    weights {size(cost.weights_bytes)}, gradients {size(cost.gradient_bytes)}, optimizer "
                f"{size(cost.optimizer_bytes)}, average {size(cost.ema_bytes)}: {size(cost.total_bytes)}"
                + (f", {size(cost.total_bytes // self.world)} on each rank" if self.world > 1 else "")
            )
        return "\n".join(lines + self._measured_lines())

    def _measured_lines(self) -> list[str]:
        if self.measured is None:
            return [f"a step      not measured: {self.why}"]
        m = self.measured
        rate = m.flops / max(m.step_s, 1e-9) / 1e9
        lines = [f"activations {size(m.activation_bytes)} kept for the backward of one micro-batch (measured)"]
        if m.peak_bytes is not None:
            lines.append(f"peak        {size(m.peak_bytes)} on {m.device} (measured)")
        lines.append(f"FLOPs       {m.flops / 1e9:,.2f} G a step (matrix products, convolutions, attention; counted)")
        lines.append(f"a step      {m.step_s:.3f} s on {m.device} (measured), {rate:,.1f} GFLOP/s")
        for kind in m.kinds if len(m.kinds) > 1 else ():
            leg = f", leg {kind.leg + 1}" if max(k.leg for k in m.kinds) else ""
            lines.append(f"  {kind.share:<9.1%} {kind.step_s:.3f} s: {' and '.join(kind.roles)}{leg}")
        lines.append(f"a batch     {m.data_s:.3f} s from the source (measured)")
        assert self.total_s is not None
        lines.append(f"to the end  {duration(self.total_s)} for {self.named.recipe.train.steps} steps")
        return lines


def estimate(named: Named, *, timed_steps: int = 3) -> Estimate:
    """Count a recipe's parameters without memory for them, then build it and measure, where it fits.

    Raises ValueError for a recipe that cannot be built, as the training would.
    """
    train = named.recipe.train
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    train.check_batch(ranks)
    device = pick_device(train.device, int(os.environ.get("LOCAL_RANK", "0")))
    is_real = False
    try:
        with torch.device("meta"):
            method = named.recipe.build_method(torch.device("meta"))
    except Exception:  # what reads files or computes with its weights cannot be built without memory
        seed_step(train.seed, 0, "build", 0, device)
        method, is_real = named.recipe.build_method(device), True
    costs = tuple(_role_cost(role, network, train) for role, network in method.networks.items())
    costs += tuple(_helper_cost(name, network, train, frozen) for name, network, frozen in helpers(method))
    whole = partial(Estimate, named=named, world=ranks, roles=costs)
    if ranks > 1:
        return whole(measured=None, why="run without torchrun to measure one rank's step")
    need, there = sum(cost.total_bytes for cost in costs), _memory_bytes(device)
    if need > MEMORY_SHARE * there:
        return whole(measured=None, why=f"{size(need)} are needed, and {device} has {size(there)}")
    if not is_real:  # networks whose weights were read are, but not what else a method holds, such as a text encoder
        seed_step(train.seed, 0, "build", 0, device)
        method = named.recipe.build_method(device)
    return whole(measured=_measure(named, method, device, timed_steps))


def _role_cost(role: str, network: nn.Module, train: TrainConfig) -> RoleCost:
    split = split_parameters(network, train.optim_of(role))
    muon = _count(split.muon.values())
    trained = muon + _count(split.decayed.values()) + _count(split.plain.values())
    averaged = train.ema is not None and role in train.ema.roles
    return RoleCost(
        role=role,
        num_parameters=_count(network.parameters()),
        num_trained=trained,
        num_muon=muon,
        weights_bytes=sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers())),
        gradient_bytes=FP32 * trained,
        optimizer_bytes=FP32 * (muon + 2 * (trained - muon)),
        ema_bytes=FP32 * trained if averaged else 0,
    )


def helpers(method: Method) -> list[tuple[str, nn.Module, bool]]:
    """(name, network, is frozen) of what a method uses beside its roles: teachers, and networks that follow a role."""
    frozen = [(name, network, True) for name, network in getattr(method, "frozen", {}).items()]
    return frozen + [(name, f.network, False) for name, f in getattr(method, "followers", {}).items()]


def _helper_cost(name: str, network: nn.Module, train: TrainConfig, frozen: bool) -> RoleCost:
    """A network without gradients, optimizer and average."""
    number = _count(network.parameters())
    width = 2 if frozen and train.frozen_dtype == "bf16" else FP32
    return RoleCost(
        role=name, num_parameters=number, num_trained=0, num_muon=0, weights_bytes=width * number, gradient_bytes=0,
        optimizer_bytes=0, ema_bytes=0,
    )  # fmt: skip


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def step_kinds(method: Method, source: Source, steps: int) -> dict[Kind, list[int]]:
    """The steps of a training by what they cost: the roles that act, and the leg of a curriculum they fall into."""
    leg_at = getattr(source, "leg_at", lambda step: (0, step))
    kinds: dict[Kind, list[int]] = {}
    for step in range(steps):
        kinds.setdefault((method.roles(step), leg_at(step)[0]), []).append(step)
    return kinds


def _measure(named: Named, method: Method, device: torch.device, timed_steps: int) -> Measured:
    """Of each kind of step one counted and some timed ones; weights change and are thrown away."""
    train, source = named.recipe.train, named.recipe.build_source()
    kinds = step_kinds(method, source, train.steps)
    optimizers = {}
    for role, network in method.networks.items():
        network.train()
        optimizers[role] = RoleOptimizer(network, train.optim_of(role))
    for _, network, frozen in helpers(method):
        network.requires_grad_(False).eval().to(device)
        if frozen and train.frozen_dtype == "bf16":
            network.to(torch.bfloat16)
    world = World(rank=0, size=1, device=device)
    kept, flops, data_s = _Kept(method), {}, {}
    for kind, steps in kinds.items():
        began = time.perf_counter()
        batches, feed = _batches(source, train, world, steps[0])
        data_s[kind] = time.perf_counter() - began
        counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
        with counter, kept.hooks:
            _step(train, method, optimizers, batches, steps[0], device, feed, kept)
        flops[kind] = counter.get_total_flops()
    for network in (*method.networks.values(), *(network for _, network, _ in helpers(method))):
        prepare(network, train, world)
    costs = []
    for kind, steps in kinds.items():
        times = []
        # the first one compiles; rollouts draw their length at each step, so the mean is what a training takes
        for number, step in enumerate(_picked(steps, timed_steps + train.compile) if timed_steps else ()):
            batches, feed = _batches(source, train, world, step)
            began = time.perf_counter()
            _step(train, method, optimizers, batches, step, device, feed, None)
            if number or not train.compile:
                times.append(time.perf_counter() - began)
        step_s = sum(times) / len(times) if times else float("nan")
        costs.append(StepCost(
            roles=kind[0], leg=kind[1], share=len(steps) / train.steps, step_s=step_s, flops=flops[kind],
            data_s=data_s[kind],
        ))  # fmt: skip
    return Measured(
        device=str(device),
        kinds=tuple(costs),
        activation_bytes=kept.most,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _picked(steps: Sequence[int], count: int) -> list[int]:
    """`count` of the steps, spread over them; the same ones again where there are fewer."""
    return [steps[k * len(steps) // count] for k in range(count)]


def _batches(source: Source, train: TrainConfig, world: World, step: int) -> tuple[Sequence[Batch], Feed]:
    """The micro-batches of one step, and the feed that tells their samples."""
    feed = Feed(source, world, size=train.batch, accumulate=train.accumulate, start=step, stop=step + 1, ahead=1)
    try:
        return feed.next(), feed
    finally:
        feed.close()


def _step(
    train: TrainConfig,
    method: Method,
    optimizers: dict[str, RoleOptimizer],
    batches: Sequence[Batch],
    step: int,
    device: torch.device,
    feed: Feed,
    kept: _Kept | None,
) -> None:
    for role in method.roles(step):
        for micro, batch in enumerate(batches):
            rng = step_rng(train.seed, step, role, feed.samples(micro))
            with torch.autocast(device.type, torch.bfloat16, enabled=train.dtype == "bf16"):
                result = method.step(to_device(batch, device), role, step, rng)
            if kept is not None:
                kept.begin_backward()
            (result.loss / len(batches)).backward()
        optimizers[role].step(1.0)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Kept:
    """Bytes of distinct memory that autograd keeps of a forward, the weights themselves not counted."""

    def __init__(self, method: Method) -> None:
        self._weights = {
            p.untyped_storage().data_ptr() for network in method.networks.values() for p in network.parameters()
        }
        self._seen: dict[int, int] = {}
        self.most = 0
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def begin_backward(self) -> None:
        """The forward of a micro-batch is done."""
        self.most = max(self.most, sum(self._seen.values()))
        self._seen = {}


def _cpu_attention() -> dict[Any, Any]:
    """FLOPs of attention on the CPU, which torch's counter does not know: two products forward, five backward."""

    def forward(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
        return 2 * _scores(q, k) * (q[-1] + v[-1])

    def backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
        return 2 * _scores(q, k) * (3 * q[-1] + 2 * v[-1])

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _scores(q: Any, k: Any) -> int:
    batch, heads, queries, _ = q
    return batch * heads * queries * k[-2]


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def size(num_bytes: float) -> str:
    """`12.5 KiB`, `5.2 MiB`, `1.3 GiB`."""
    power = 3 if num_bytes >= 2**30 else 2 if num_bytes >= 2**20 else 1
    return f"{num_bytes / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
