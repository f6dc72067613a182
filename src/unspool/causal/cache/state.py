"""What a `KVCache` holds, as a snapshot and back, with everything checked before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unspool.causal.cache.snapshot import Snapshot, describe

if TYPE_CHECKING:
    from unspool.causal.cache.kv import KVCache
    from unspool.causal.visibility import Visibility


@dataclass
class Entry:
    """Buffers of one site: keys and values [rows, capacity * tokens, heads, head_dim]."""

    keys: Tensor
    values: Tensor
    masters: Tensor | None = None  # sink keys as first written, from which moved ones are rotated


def _policies(cache: KVCache, visibility: Visibility | None = None) -> str:
    return f"{describe(visibility or cache.visibility)}, {describe(cache.positions)}"


def take(cache: KVCache) -> Snapshot:
    """Copies of all that is promoted, with its place in the buffers."""
    tensors: dict[str, Tensor] = {}
    for index, entry in cache.entries.items():
        tensors[f"keys.{index}"] = entry.keys.detach().clone()
        tensors[f"values.{index}"] = entry.values.detach().clone()
        if entry.masters is not None:
            tensors[f"masters.{index}"] = entry.masters.detach().clone()
    promoted = list(cache.slots.promoted.items())
    facts: dict[str, Any] = {
        "policies": _policies(cache),
        "capacity": cache.slots.capacity,
        "promoted": promoted,
        "baked": [[f, cache.slots.baked[f]] for f, _ in promoted],
        "masters": [[f, row, written] for f, (row, written) in cache.master_slots.items()],
        "pending": [[i, f, s] for i, due in cache.pending.items() for f, s in due.items()],
    }
    return Snapshot(tensors, facts)


def check(cache: KVCache, snapshot: Snapshot, visibility: Visibility | None = None) -> None:
    """Raise ValueError unless `cache` (once it sees `visibility`, where given) can be restored from `snapshot`."""
    stored = sum(name.startswith("keys.") for name in snapshot.tensors)
    policies = snapshot.facts.get("policies")
    if policies != _policies(cache, visibility) or stored != len(cache.sites):
        raise ValueError(
            f"snapshot of {stored} sites and {policies}: expected {len(cache.sites)} sites and "
            f"{_policies(cache, visibility)}; restore it into a cache of the same network and policies"
        )
    for index, site in cache.sites.items():
        shape = (
            cache.rows(site),
            snapshot.facts["capacity"] * cache.tokens(site),
            site.heads,
            site.head_dim,
        )
        for name in ("keys", "values"):
            found = snapshot.tensors.get(f"{name}.{index}")
            if found is None or tuple(found.shape) != shape or found.dtype != cache.dtype:
                got = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise ValueError(
                    f"snapshot: site {index} has {name} {got}, expected {shape} {cache.dtype}; restore it into a cache "
                    "of the same network, batch, latent size and dtype"
                )


def put_back(cache: KVCache, snapshot: Snapshot) -> None:
    """Make `cache` what it was. Raises ValueError, and changes nothing, when the snapshot is of another cache."""
    check(cache, snapshot)
    cache.discard()
    cache.graph.clear()
    with torch.inference_mode(False):
        _copy(cache, snapshot)
    facts = snapshot.facts
    cache.slots.capacity = facts["capacity"]
    cache.slots.promoted = dict(map(tuple, facts["promoted"]))
    cache.slots.baked = dict(map(tuple, facts["baked"]))
    cache.slots.version += 1
    cache.master_slots = {f: (row, written) for f, row, written in facts["masters"]}
    for index, frame, shift in facts["pending"]:
        cache.pending[index][frame] = shift


def _copy(cache: KVCache, snapshot: Snapshot) -> None:
    for index, site in cache.sites.items():
        entry = cache.allocate(site, snapshot.facts["capacity"])  # for the layout, which a file does not keep
        entry.keys.copy_(snapshot.tensors[f"keys.{index}"])
        entry.values.copy_(snapshot.tensors[f"values.{index}"])
        if entry.masters is not None:
            entry.masters.copy_(snapshot.tensors[f"masters.{index}"])
        cache.entries[index] = entry
        cache.pending[index] = {}
