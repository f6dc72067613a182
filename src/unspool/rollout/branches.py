"""The networks' side of a rollout: one or two guidance branches, each with its prompts and its cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.cache.snapshot import Snapshot, merge
from unspool.causal.visibility import Pass
from unspool.models.base import Backbone, Conditioning, Prompts, Text
from unspool.rollout.guidance import Guidance, combine
from unspool.rollout.prompts import Moment, PromptTimeline


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
        make_cache: Callable[[int], KVCache],
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
        self.caches = [make_cache(rows)]
        if guidance.is_active and not self.doubled:
            self.caches.append(make_cache(rows))
        if guidance.is_active and negative is None:
            raise ValueError(
                f"guidance scale {guidance.scale} needs the text of the unconditional branch; pass negative="
            )
        self.negative = negative
        self._prepared: OrderedDict[tuple[int, float], list[Prompts]] = OrderedDict()
        self._unconditional: Prompts | None = None

    def prompts(self, timeline: PromptTimeline, moment: Moment) -> list[Prompts]:
        """Prompts per cache for a moment; the last few are kept, a text is encoded once."""
        key = (moment.prompt, moment.weight)
        if key not in self._prepared:
            cond = self.backbone.prepare(Text.of(timeline.blended(moment)))
            parts = [cond]
            if self.guidance.is_active:
                if self._unconditional is None:
                    assert self.negative is not None
                    self._unconditional = self.backbone.prepare(Text.of(self.negative))
                uncond = self._unconditional
                parts = [Prompts.join([cond, uncond], 0)] if self.doubled else [cond, uncond]
            self._prepared[key] = parts
            while len(self._prepared) > 2:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

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
        return combine(cond_part, uncond_part, self.guidance.scale)

    def _conditioning(self, segments: Pass, prompts: Prompts, prompt_index: Tensor | None) -> Conditioning:
        if self.frame_conditions is None:
            return Conditioning(prompts=prompts, prompt_index=prompt_index)
        parts = [self.frame_conditions(s.frames) for s in segments]
        channels = _joined([p.channels for p in parts], self.doubled)
        vectors = _joined([p.vectors for p in parts], self.doubled)
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

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.facts["count"] != len(self.caches):
            raise ValueError(
                f"snapshot of {snapshot.facts['count']} caches, expected {len(self.caches)}; use the same guidance mode"
            )
        for i, cache in enumerate(self.caches):
            cache.restore(snapshot.nested(str(i)))
        self._prepared.clear()


def _joined(parts: list[Tensor | None], doubled: bool) -> Tensor | None:
    tensors = [p for p in parts if p is not None]
    if not tensors:
        return None
    joined = torch.cat(tensors, dim=1)
    return torch.cat([joined, joined]) if doubled and joined.shape[0] > 1 else joined
