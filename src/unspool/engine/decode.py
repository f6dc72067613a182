"""Latents to uint8 frames as a stream, and the codec's state as a `Snapshot` and back."""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from unspool.causal.cache.snapshot import Snapshot
from unspool.models.base import Codec


class Decoder:
    """The decoding side of one batch of streams; the codec is shared, the state is its own."""

    def __init__(self, codec: Codec[Any]) -> None:
        self.codec = codec
        self.state: Any = None
        weights = list(codec.parameters()) if isinstance(codec, nn.Module) else []
        self._like = weights[0] if weights else None

    @torch.no_grad()
    def next(self, latents: Tensor) -> NDArray[np.uint8]:
        """The frames [b, f, y, x, 3] that the next latents [b, t, c, h, w] complete; waits for the device.

        Raises ValueError, and keeps the state as it was, for pixels that are not finite.
        """
        if self._like is not None:
            latents = latents.to(self._like.device, self._like.dtype)
        pixels, state = self.codec.decode_stream(latents, self.state)
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError(
                "the model made values that are not finite; expected pixels: check its weights, or use a wider dtype"
            )
        self.state = state
        return to_uint8(pixels)

    def snapshot(self) -> Snapshot:
        """A copy of the state; restoring it continues bit for bit."""
        tensors: dict[str, Tensor] = {}
        return Snapshot(tensors, {"state": _take(self.state, tensors)})

    def restore(self, snapshot: Snapshot) -> None:
        """Inverse of `snapshot`, onto the codec's device. Raises ValueError for the state of another codec."""
        self.state = _give(snapshot.facts["state"], snapshot.tensors, self.codec, self._like)


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Frames [b, f, y, x, 3] on the host of pixels [b, f, 3, y, x] in [-1, 1], rounded to nearest."""
    levels = pixels.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(levels, "b f c y x -> b f y x c").contiguous().cpu().numpy()


def _take(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON with tensors set aside: tuples, lists, dicts and dataclasses of tensors, numbers and text."""
    if isinstance(value, Tensor):
        name = f"tensor.{len(tensors)}"
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, tuple | list):
        return {"list" if isinstance(value, list) else "tuple": [_take(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[key, _take(item, tensors)] for key, item in value.items()]}
    if is_dataclass(value):
        kind = type(value)
        items = {field.name: _take(getattr(value, field.name), tensors) for field in fields(value)}
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": items}
    raise ValueError(
        f"a codec's state holds a {type(value).__name__}; expected tensors, numbers, and dataclasses of them"
    )


def _give(fact: Any, tensors: dict[str, Tensor], codec: object, like: Tensor | None) -> Any:
    if "tensor" in fact:
        return tensors[fact["tensor"]].to("cpu" if like is None else like.device, copy=True)
    if "value" in fact:
        return fact["value"]
    if "list" in fact:
        return [_give(item, tensors, codec, like) for item in fact["list"]]
    if "tuple" in fact:
        return tuple(_give(item, tensors, codec, like) for item in fact["tuple"])
    if "dict" in fact:
        return {key: _give(item, tensors, codec, like) for key, item in fact["dict"]}
    module, _, name = fact["class"].partition(":")
    # A file must not be able to name any class: only those that live with the codec, which is loaded already.
    if module.partition(".")[0] != type(codec).__module__.partition(".")[0]:
        raise ValueError(f"the snapshot's codec state is a {fact['class']}; expected one of {type(codec).__module__}")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"the snapshot's codec state names {fact['class']}, which is no dataclass; take a new one")
    return kind(**{key: _give(item, tensors, codec, like) for key, item in fact["fields"].items()})
