"""Several processes: who am I, small sums over all ranks, and FSDP2 sharding of an unchanged network."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run. `mesh` is None for one process; its dimensions are "replicate" and "shard"."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    owns_group: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Sequence[float] | Tensor) -> Tensor:
        """Sums over all ranks, float64 on the CPU; one small message."""
        summed = torch.as_tensor(values, dtype=torch.float64).to("cpu")
        if self.mesh is None:
            return summed
        summed = summed.to(self.device)
        dist.all_reduce(summed)
        return summed.cpu()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agree(self, problem: str | None) -> None:
        """Raise ValueError on every rank with the first problem that any rank has; also a barrier."""
        found = next((told for told in self.gather(problem) if told is not None), None)
        if found is not None:
            raise ValueError(found)

    def close(self) -> None:
        """Leave the process group that `start_world` entered."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device behind "auto", "cpu", "cuda", "cuda:1". Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda or cuda:1")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}, but torch finds no CUDA device; try device=cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device={device}: expected one of {torch.cuda.device_count()} CUDA devices")
    return device


def start_world(device: str = "auto", *, shard: int = 0) -> World:
    """Join the processes that torchrun started, or be alone. `shard` ranks share the weights (0: all).

    Reads RANK, WORLD_SIZE and LOCAL_RANK. Raises ValueError for a device that is not there or a group size that does
    not divide the ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        if shard > 1:
            raise ValueError(f"shard={shard}: expected 0 or 1 in one process; start more with torchrun")
        return World(rank=0, size=1, device=chosen)
    shared = shard or size
    if size % shared:
        raise ValueError(f"shard={shard}: expected a divisor of the {size} ranks")
    owns = not dist.is_initialized()
    if owns:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    mesh = init_device_mesh(chosen.type, (size // shared, shared), mesh_dim_names=("replicate", "shard"))
    return World(rank=dist.get_rank(), size=size, device=chosen, mesh=mesh, owns_group=owns)


def alone(device: str = "auto") -> World:
    """This process by itself, whatever torchrun started: for a training that one of them runs for all."""
    return World(rank=0, size=1, device=pick_device(device, int(os.environ.get("LOCAL_RANK", "0"))))


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Where torchrun started several processes on this machine, one after the other does what stands here for `folder`:
    the first makes it, the others find it. It waits as long as that takes, which a barrier would not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"unspool-{name}.lock"):
        yield


def shard_network(network: nn.Module, world: World, *, dtype: torch.dtype | None, offload: bool = False) -> nn.Module:
    """`fully_shard` every unit that the network's modules name, then the network as a whole, in place.

    A module states its units in `fsdp_units()`: modules, or lists of modules that are gathered together, each used
    through its own forward. Weights stay in fp32, are gathered in `dtype` (None: fp32), and gradients are reduced in
    fp32. A unit with `fsdp_fp32 = True` is gathered in fp32: one that switches autocast off. Without units the whole
    network is one. `offload` keeps the shards in the host's memory (on GPUs). Does nothing in one process.
    """
    if world.mesh is None:
        return network
    mesh = world.mesh if world.mesh["replicate"].size() > 1 else world.mesh["shard"]
    # inputs keep their dtype: noise levels and latents rounded to bf16 would be other ones
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = replace(policy, param_dtype=None)
    keep = CPUOffloadPolicy() if offload and world.device.type == "cuda" else OffloadPolicy()
    for module in list(network.modules()):
        units = getattr(type(module), "fsdp_units", None)
        for unit in units(module) if units is not None else ():
            chosen = wide if getattr(unit, "fsdp_fp32", False) else policy
            fully_shard(unit, mesh=mesh, mp_policy=chosen, offload_policy=keep)
    fully_shard(network, mesh=mesh, mp_policy=policy, offload_policy=keep)
    return network


def gather_after(network: nn.Module) -> None:
    """Make the parameters of a sharded network its own shards again, as optimizers and checkpoints know them."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Every rank holds the whole network inside, so that its parts can be called directly, not through its forward."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not network, recurse=False)
            module.reshard()


def sync_gradients(network: nn.Module, is_last: bool) -> None:
    """Whether the next backward sums gradients over ranks: only that of the last micro-batch need."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(is_last)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process, aliasing it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, over all ranks; on the device, without waiting for it."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
