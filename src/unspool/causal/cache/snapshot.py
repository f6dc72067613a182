"""A state as named tensors and JSON-able facts, to bytes and back: safetensors, never pickle."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor

FORMAT = "unspool-snapshot-1"


@dataclass(frozen=True)
class Snapshot:
    """Copies of what a cache or a rollout holds; nothing in it is shared with the running object."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Safetensors bytes; restoring them in another process continues bit for bit."""
        from safetensors.torch import save

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        facts = json.dumps(self.facts)
        return save(tensors, metadata={"format": FORMAT, "facts": facts, "checksum": _checksum(tensors, facts)})

    @staticmethod
    def from_bytes(data: bytes) -> Snapshot:
        """Inverse of `to_bytes`. Raises ValueError when the bytes are damaged or not a snapshot."""
        from safetensors.torch import load

        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])["__metadata__"]
            tensors = load(data)
            intact = header["checksum"] == _checksum(tensors, header["facts"])
        except Exception as error:
            raise ValueError(
                f"snapshot: expected the bytes of Snapshot.to_bytes(), got {len(data)} bytes that "
                f"cannot be read ({error}); take a new snapshot"
            ) from error
        if header.get("format") != FORMAT:
            raise ValueError(f"snapshot format {header.get('format')!r}: expected {FORMAT!r}; take a new snapshot")
        if not intact:
            raise ValueError("snapshot: the checksum does not fit its content, so it is damaged; take a new snapshot")
        return Snapshot(tensors, json.loads(header["facts"]))

    def nested(self, prefix: str) -> Snapshot:
        """The part of a snapshot that was stored under `prefix`."""
        dot = prefix + "."
        tensors = {name[len(dot) :]: t for name, t in self.tensors.items() if name.startswith(dot)}
        return Snapshot(tensors, self.facts[prefix])


def _checksum(tensors: dict[str, Tensor], facts: str) -> str:
    """CRC-32 over names, kinds and contents: against damage, not against intent."""
    import torch

    value = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def describe(policy: object) -> str:
    """A policy in words that are the same in another process: its fields where it is a dataclass, else its class."""
    kind = type(policy)
    return repr(policy) if is_dataclass(policy) else f"{kind.__module__}.{kind.__qualname__}"


def merge(parts: dict[str, Snapshot], facts: dict[str, Any]) -> Snapshot:
    """One snapshot of several, each under its name."""
    tensors = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.tensors.items()}
    return Snapshot(tensors, {**facts, **{name: part.facts for name, part in parts.items()}})
