"""A rollout as a snapshot and back, with everything checked before anything is changed.

Two streams are the same stream only with the same settings, noise and weights, so their marks are stored too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unspool.causal.cache.snapshot import Snapshot, merge
from unspool.causal.chunks import FrameSet
from unspool.causal.visibility import Since, Visibility, Window
from unspool.models.base import Backbone
from unspool.rollout.noise import NoiseSource
from unspool.rollout.prompts import Moment

if TYPE_CHECKING:
    from unspool.rollout.rollout import Rollout


def base_of(visibility: Visibility) -> Visibility:
    """What a visibility is once a flush is forgotten."""
    return visibility.base if isinstance(visibility, Since) else visibility


def take(stream: Rollout) -> Snapshot:
    """Copies of all that a stream holds."""
    visibility = stream.visibility
    floor, keep = (visibility.floor, visibility.keep.intervals) if isinstance(visibility, Since) else (None, ())
    base, pending, repeat = base_of(visibility), stream._pending, stream._repeat
    facts: dict[str, Any] = {
        "config": stream.config.fingerprint,
        "shape": list(stream.shape),
        "index": stream.index,
        "switched": stream._switched,
        "repeat": None if repeat is None else list(repeat[0]),
        "starts": stream.starts,
        "pending": None if pending is None else pending[0],
        "moment": None if pending is None else [pending[1].prompt, pending[1].weight],
        "noise": noise_facts(stream.noise),
        "weights": weights_mark(stream.backbone),
        "sink_start": base.sink_start if isinstance(base, Window) else None,
        "floor": floor,
        "keep": keep,
    }
    loose = {"text": stream._text, "repeat": None if repeat is None else repeat[1]}
    parts = {
        "branches": stream.branches.snapshot(),
        "history": stream.history.snapshot(),
        "timeline": stream.timeline.snapshot(),
        "loose": Snapshot({name: t.detach().clone() for name, t in loose.items() if t is not None}, {}),
    }
    return merge(parts, facts)


def _check(stream: Rollout, facts: dict[str, Any]) -> None:
    if facts.get("config") != stream.config.fingerprint or facts.get("shape") != list(stream.shape):
        raise ValueError(
            f"snapshot of shape {facts.get('shape')} and {facts.get('config')}: expected {list(stream.shape)} and "
            f"{stream.config.fingerprint}; make the rollout with the configuration of the snapshot"
        )
    for name, got, expected in (
        ("noise", facts.get("noise"), noise_facts(stream.noise)),
        ("weights", facts.get("weights"), weights_mark(stream.backbone)),
    ):
        if got != expected:
            raise ValueError(
                f"snapshot made with other {name} ({got}): expected {expected}; a stream goes on only with the same"
            )


def put_back(stream: Rollout, snapshot: Snapshot) -> None:
    """Make `stream` what it was. Raises ValueError, and changes nothing, when the snapshot is of another stream."""
    facts = snapshot.facts
    _check(stream, facts)
    visibility = base_of(stream.config.visibility)
    if isinstance(visibility, Window):
        visibility = replace(visibility, sink_start=facts["sink_start"])
    if facts["floor"] is not None:
        visibility = Since(base=visibility, floor=facts["floor"], keep=FrameSet.of(*map(tuple, facts["keep"])))
    stream.branches.check(snapshot.nested("branches"), visibility)
    stream.see(visibility)
    stream.branches.restore(snapshot.nested("branches"))
    stream.history.restore(snapshot.nested("history"), stream.device)
    stream.timeline = type(stream.timeline).restored(snapshot.nested("timeline"))
    stream.index, stream._switched, stream.starts = facts["index"], facts["switched"], list(facts["starts"])
    loose = {name: t.to(stream.device) for name, t in snapshot.nested("loose").tensors.items()}
    stream._text, stream._repeat = loose.get("text"), None
    if facts["repeat"] is not None:
        stream._repeat = ((facts["repeat"][0], facts["repeat"][1]), loose["repeat"])
    stream._pending, stream._tail, stream._is_open = None, None, False
    if facts["pending"] is not None:
        assert stream._text is not None
        prompt, weight = facts["moment"]
        stream._pending = (facts["pending"], Moment(prompt, weight, (), stream._text))
        stream._tail = stream.history.chunks[facts["pending"]]


def noise_facts(noise: NoiseSource) -> dict[str, Any]:
    """The state of a noise source, tensors replaced by a hash of their content."""
    return {name: _mark(value) for name, value in noise.state().items()}


def weights_mark(backbone: Backbone) -> str:
    """A short hash over a few numbers of every parameter: tells weights apart without reading all of them."""
    return tensors_mark(backbone.parameters())


def tensors_mark(tensors: Iterable[Tensor]) -> str:
    """The same of any tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        count = min(flat.numel(), 16)
        places = [i * (flat.numel() - 1) // max(count - 1, 1) for i in range(count)]  # integers: fp32 ends at 2^24
        index = torch.tensor(places, dtype=torch.long, device=flat.device)
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[index].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _mark(value: object) -> object:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]
    return list(value) if isinstance(value, tuple) else value
