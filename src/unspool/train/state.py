"""All that a training changes: networks, optimizers, averages and counters; to a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unspool.config import nearest
from unspool.methods.base import Follower, Method
from unspool.ops.compile import compile_backbone
from unspool.train.checkpoint import Saved, check_files, fill, stored
from unspool.train.config import TrainConfig
from unspool.train.ema import Ema
from unspool.train.optim import RoleOptimizer
from unspool.train.parallel import World, gather_after, local, shard_network
from unspool.weights.report import compare

if TYPE_CHECKING:
    from unspool.train.recipe import Recipe

LOOP_FIELDS = (
    "steps", "accumulate", "device", "compile", "gradient_checkpointing", "log_every", "save_every", "save_minutes",
    "keep", "max_minutes", "max_bad_steps", "workers", "ahead", "shard", "offload",
)  # fmt: skip
"""Fields of `TrainConfig` that may change when a run is resumed: they change its length, its speed, or rounding."""


class TrainState:
    """Networks by role, made ready to train, with their optimizers, averages and counters.

    Attributes: `step` steps done; `updates` of each role; `skipped` steps that were not finite, `bad_in_a_row` updates
    of each role that were not, just now. Raises ValueError for a method that the configuration does not fit.
    """

    def __init__(self, method: Method, train: TrainConfig, world: World) -> None:
        self.networks: dict[str, nn.Module] = dict(method.networks)
        self._check(train)
        for network in self.networks.values():
            prepare(network, train, world)
            network.train()
        self.followers: dict[str, Follower] = dict(getattr(method, "followers", {}))
        helpers = {**getattr(method, "frozen", {}), **{name: f.network for name, f in self.followers.items()}}
        for name, network in helpers.items():
            network.requires_grad_(False).eval()
            is_frozen = name not in self.followers
            if is_frozen and train.frozen_dtype == "bf16":
                network.to(torch.bfloat16)
            if world.mesh is None:
                network.to(world.device)
            prepare(network, train, world, offload=is_frozen and train.offload)
        self.optimizers = {role: RoleOptimizer(net, train.optim_of(role)) for role, net in self.networks.items()}
        averaged = () if train.ema is None else train.ema.roles
        self.averages = {role: Ema(self.optimizers[role].parameters, train.ema) for role in averaged if train.ema}
        self.step = self.skipped = 0
        self.bad_in_a_row = dict.fromkeys(self.networks, 0)
        self.updates = dict.fromkeys(self.networks, 0)

    def _check(self, train: TrainConfig) -> None:
        if not self.networks:
            raise ValueError("the method has no networks to train")
        if train.critic is not None and "critic" not in self.networks:
            raise ValueError(f"critic=... has no effect: the method's roles are {', '.join(self.networks)}")
        for role in train.ema.roles if train.ema is not None else ():
            if role not in self.networks:
                raise ValueError(f"ema.roles={role}: the method has no such role; {nearest(role, self.networks)}")
        owner: dict[int, str] = {}
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                if parameter.requires_grad and owner.setdefault(id(parameter), role) != role:
                    raise ValueError(f"{name} belongs to the roles {owner[id(parameter)]} and {role}; share no weights")

    def init_weights(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        """Begin with these weights, strictly. Raises ValueError for names or shapes that differ."""
        network = self.networks[role]
        gather_after(network)
        own = network.state_dict()
        missing, unexpected, wrong = compare(
            {name: tuple(t.shape) for name, t in tensors.items()}, {name: tuple(t.shape) for name, t in own.items()}
        )
        if missing or unexpected or wrong:
            first = [*(f"{n} is missing" for n in missing), *(f"{n} is unexpected" for n in unexpected),
                     *(f"{m.name} is {list(m.got)} instead of {list(m.expected)}" for m in wrong)]  # fmt: skip
            raise ValueError(
                f"initial weights do not fit the {role}: {'; '.join(first[:3])} ({len(first)} in all); expected those "
                "of a network of the same configuration"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(_placed_like(tensors[name], tensor))
        if role in self.averages:
            self.averages[role].reset()
        self.follow(role, entirely=True)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, aliasing the state: `model/<role>/...`, `ema/...`, `optim/...`."""
        found: dict[str, Tensor] = {}
        for role, network in self.networks.items():
            gather_after(network)
            found.update({f"model/{role}/{name}": tensor.detach() for name, tensor in network.state_dict().items()})
        for role, ema in self.averages.items():
            found.update({f"ema/{role}/{name}": tensor for name, tensor in ema.average.items()})
        for role, optimizer in self.optimizers.items():
            found.update({f"optim/{role}/{name}": tensor for name, tensor in optimizer.state_tensors().items()})
        for name, follower in self.followers.items():
            gather_after(follower.network)
            found.update({f"follow/{name}/{key}": t.detach() for key, t in follower.network.state_dict().items()})
        return found

    @torch.no_grad()
    def follow(self, role: str, *, entirely: bool = False) -> None:
        """Move the networks that follow `role` towards it; `entirely` makes them equal to it."""
        for follower in self.followers.values():
            if follower.role != role:
                continue
            gather_after(follower.network)
            gather_after(self.networks[role])
            weights = [local(p) for p in self.networks[role].parameters()]
            own = [local(p) for p in follower.network.parameters()]
            torch._foreach_lerp_(own, weights, 1.0 if entirely else 1.0 - follower.decay)

    def counters(self) -> dict[str, Any]:
        """Plain numbers of a checkpoint, beside the step."""
        return {"updates": self.updates, "skipped": self.skipped, "bad_in_a_row": dict(self.bad_in_a_row)}

    def load(self, saved: Saved, world: World) -> None:
        """Continue from a checkpoint. Raises ValueError for a damaged one, or one of other networks."""
        check_files(saved, world)
        there = stored(saved)
        for role, optimizer in self.optimizers.items():
            prefix = f"optim/{role}/"
            optimizer.allocate_state({n.removeprefix(prefix): w for n, w in there.items() if n.startswith(prefix)})
        tensors = self.tensors()
        extra = [name for name in there if name not in tensors]
        if extra:
            raise ValueError(f"{saved.path} holds {extra[0]} ({len(extra)} tensors more), which this training has not")
        fill(saved, tensors, world)
        counters = saved.state["counters"]
        self.step = saved.step
        self.updates = {role: int(counters["updates"][role]) for role in self.networks}
        self.skipped, bad = int(counters["skipped"]), counters["bad_in_a_row"]
        self.bad_in_a_row = (
            bad if isinstance(bad, dict) else dict.fromkeys(self.networks, int(bad))
        )  # until 0.1: of all


def prepare(network: nn.Module, train: TrainConfig, world: World, *, offload: bool = False) -> None:
    """Checkpointed activations, compiled blocks, shards: in this order, in place."""
    if train.gradient_checkpointing:
        offering = [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]
        if not offering:
            raise ValueError(
                f"gradient_checkpointing=true has no effect: no part of {type(network).__name__} offers it"
            )
        for module in offering:
            module.gradient_checkpointing = True  # type: ignore[assignment]
    if train.compile:
        compile_backbone(network, world.device)  # sharding moves what is elsewhere
    shard_network(network, world, dtype=torch.bfloat16 if train.dtype == "bf16" else None, offload=offload)


def require_same(recipe: Recipe, saved: Saved) -> None:
    """Raise ValueError naming the first fields in which the configuration of a checkpoint differs from the recipe.

    `recipe.may_differ()` keys, and all keys below them, may differ. A field that there was not yet had its default.
    """
    from unspool.train.recipe import flat, with_defaults

    ours, theirs = flat(recipe), flat(with_defaults(recipe, saved.state["config"]))
    allowed = tuple(f"train.{name}" for name in LOOP_FIELDS) + recipe.may_differ()
    differing = [
        key
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key) and not any(key == a or key.startswith(f"{a}.") for a in allowed)
    ]
    if differing:
        shown = "; ".join(f"{key} was {theirs.get(key)!r} and is now {ours.get(key)!r}" for key in differing[:3])
        raise ValueError(
            f"{saved.path} is of another training: {shown}{' ...' if len(differing) > 3 else ''}; give the same "
            "values, or begin another run with --out"
        )


def _placed_like(source: Tensor, target: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        return distribute_tensor(source.to(target.device, target.dtype), target.device_mesh, target.placements)
    return source
