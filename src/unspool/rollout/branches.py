"""The networks' side of a rollout: one or two guidance branches, each with its prompts and its cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool.causal.cache.base import Cache, Checks
from unspool.causal.cache.snapshot import Snapshot, merge
from unspool.causal.visibility import Pass, Visibility
from unspool.models.base import Backbone, Conditioning, Prompts, Text
from unspool.rollout.guidance import Guidance, combine
from unspool.rollout.prompts import Moment, check_text


@dataclass(frozen=True, kw_only=True)
class FrameInputs:
    """What conditions latent frames besides text, per call: `channels` [b, t, c, h, w], `vectors` [b, t, c]."""

    channels: Tensor | None = None
    vectors: Tensor | None = None


FrameConditions = Callable[[range], FrameInputs]


class Branches:
    """Runs passes for a batch of streams: conditional alone, or with the unconditional in one batch or two caches."""

    def __init__(
        self,
        backbone: Backbone,
        make_cache: Callable[..., Cache],
        guidance: Guidance,
        negative: Tensor | None,
        batch: int,
        frame_conditions: FrameConditions | None,
    ) -> None:
        self.backbone = backbone
        self.guidance = guidance
        self.batch = batch
        self.frame_conditions = frame_conditions
        self.doubled = guidance.is_active and guidance.mode == "batch"
        rows = 2 * batch if self.doubled else batch
        self.caches = [make_cache(batch=rows)]
        if guidance.is_active and not self.doubled:
            self.caches.append(make_cache(batch=rows))
        if guidance.is_active:
            _check_negative(negative, batch, guidance.scale)
        self.negative = None if negative is None else negative.clone()  # encoded later, as texts are
        self._prepared: OrderedDict[tuple[int, float], list[Prompts]] = OrderedDict()
        self._unconditional: Prompts | None = None

    def prompts(self, moment: Moment) -> list[Prompts]:
        """Prompts per cache for a moment. A text is encoded once, and the last two are kept; in grad mode it is encoded
        anew, so that every pass has a graph of its own."""
        if torch.is_grad_enabled():
            return self._prepare(moment.text)
        key = (moment.prompt, moment.weight)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(moment.text)
            while len(self._prepared) > 2:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _prepare(self, text: Tensor) -> list[Prompts]:
        cond = self.backbone.prepare(Text.of(text))
        if not self.guidance.is_active:
            return [cond]
        assert self.negative is not None
        if torch.is_grad_enabled() or self._unconditional is None:
            uncond = self.backbone.prepare(Text.of(self.negative))
            self._unconditional = None if torch.is_grad_enabled() else uncond
        else:
            uncond = self._unconditional
        return [Prompts.join([cond, uncond], 0)] if self.doubled else [cond, uncond]

    def run(
        self, segments: Pass, x: Tensor, sigma: Tensor, prompts: list[Prompts], prompt_index: Tensor | None = None
    ) -> Tensor:
        """One forward per cache over `segments`; the guided prediction for x [b, t, c, h, w]."""
        predictions = []
        for cache, part in zip(self.caches, prompts, strict=True):
            context = cache.begin(segments)
            cond = self._conditioning(segments, part, prompt_index)
            repeated = torch.cat([x, x]) if self.doubled else x
            predictions.append(self.backbone(repeated, sigma, cond, context))
        if not self.guidance.is_active:
            return predictions[0]
        if any(s.kind.value != "denoise" for s in segments) and len(segments) == 1:
            return predictions[0][: self.batch]
        cond_part, uncond_part = predictions[0].chunk(2) if self.doubled else predictions
        return combine(cond_part, uncond_part, self.guidance.scale, channels=x.shape[2])

    def _conditioning(self, segments: Pass, prompts: Prompts, prompt_index: Tensor | None) -> Conditioning:
        if self.frame_conditions is None:
            return Conditioning(prompts=prompts, prompt_index=prompt_index)
        parts = [self.frame_conditions(s.frames) for s in segments]
        channels = _joined([p.channels for p in parts], self.batch, self.doubled)
        vectors = _joined([p.vectors for p in parts], self.batch, self.doubled)
        return Conditioning(prompts=prompts, prompt_index=prompt_index, channels=channels, vectors=vectors)

    def promote(self, *, keep_graph: bool = False) -> None:
        for cache in self.caches:
            cache.promote(keep_graph=keep_graph)

    def discard(self) -> None:
        for cache in self.caches:
            cache.discard()

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.num_bytes for cache in self.caches)

    def snapshot(self) -> Snapshot:
        return merge({str(i): cache.snapshot() for i, cache in enumerate(self.caches)}, {"count": len(self.caches)})

    def check(self, snapshot: Snapshot, visibility: Visibility) -> None:
        """Raise ValueError unless the caches, seeing `visibility`, can be restored from `snapshot`."""
        if snapshot.facts["count"] != len(self.caches):
            raise ValueError(
                f"snapshot of {snapshot.facts['count']} caches, expected {len(self.caches)}; use the same guidance mode"
            )
        for i, cache in enumerate(self.caches):
            if isinstance(cache, Checks):  # another cache refuses in its own restore()
                cache.check(snapshot.nested(str(i)), visibility)

    def restore(self, snapshot: Snapshot) -> None:
        for i, cache in enumerate(self.caches):
            cache.restore(snapshot.nested(str(i)))
        self._prepared.clear()


def _joined(parts: list[Tensor | None], batch: int, doubled: bool) -> Tensor | None:
    """Inputs of all segments behind each other, one row per sample of the branch."""
    tensors = [p.expand(batch, *p.shape[1:]) if p.shape[0] == 1 else p for p in parts if p is not None]
    if not tensors:
        return None
    joined = torch.cat(tensors, dim=1)
    return torch.cat([joined, joined]) if doubled else joined


def admit(backbone: Backbone, texts: list[Tensor], *, wait: bool = False) -> None:
    """Raise ValueError unless the network takes every text; one sample of each is encoded to find out. With
    `wait` also unless it is finite, as `check_text`."""
    with torch.no_grad():
        for text in texts:
            if wait:
                check_text(text, wait=True)
            backbone.prepare(Text.of(text[:1]))


def _check_negative(negative: Tensor | None, batch: int, scale: float) -> None:
    if negative is None:
        raise ValueError(f"guidance scale {scale} needs the text of the unconditional branch; pass negative=")
    check_text(negative, wait=True)
    if negative.shape[0] != batch:
        raise ValueError(f"negative text of {negative.shape[0]} samples: expected {batch}, one per prompt; expand() it")
