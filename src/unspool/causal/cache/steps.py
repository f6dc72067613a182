"""One cache per denoising step: a noisy chunk reads earlier chunks as they were at its own noise level (Live2Diff).

No forward commits a clean chunk, and memory is that of one cache times the steps (arXiv:2407.08701 section 3.3;
compared in arXiv:2411.16375 table 6).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from unspool.causal.cache.snapshot import Snapshot, merge
from unspool.causal.cache.streams import StreamCaches
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Context, Site
from unspool.causal.visibility import Kind, Pass, Segment, Visibility


class StepCaches:
    """A `StreamCaches` for each noise level that a chunk goes through (implements `Cache`).

    For rollouts with `commit="none"`: at the end of a chunk the passes of all levels are promoted, each into its own
    cache. Given latents are read as clean ones at every level. Arguments as `KVCache`. Caches are made at the first
    pass of their level, so the bytes are final once the first chunk is made.
    """

    commit: ClassVar[str] = "none"
    switch_policies: ClassVar[tuple[str, ...]] = ("keep", "flush")
    """A recache has no level to compute the past at."""

    def __init__(self, sites: list[Site], *, visibility: Visibility, **options: Any) -> None:
        self._visibility = visibility
        self._make = lambda: StreamCaches(sites, visibility=self._visibility, **options)
        self._given: StreamCaches | None = None  # given latents, until the first chunk is made
        self.levels: dict[float, StreamCaches] = {}
        """By noise level; empty until the first chunk."""
        self._begun: dict[float, StreamCaches] = {}  # in this chunk
        self._frames: range | None = None  # of this chunk

    @property
    def visibility(self) -> Visibility:
        return self._visibility

    @visibility.setter
    def visibility(self, visibility: Visibility) -> None:
        self._visibility = visibility
        for cache in self._all():
            cache.visibility = visibility

    @property
    def frames(self) -> FrameSet:
        """Latent frames that can be read at every level."""
        held = [cache.frames for cache in self._all()] or [FrameSet()]
        return functools.reduce(lambda a, b: a & b, held)

    @property
    def num_bytes(self) -> int:
        """Bytes of the caches of all levels, exact."""
        return sum(cache.num_bytes for cache in self._all())

    def _all(self) -> list[StreamCaches]:
        return [*([] if self._given is None else [self._given]), *self.levels.values()]

    def begin(self, segments: Pass) -> Context:
        """The context of one forward: given latents, or a denoising pass, which reads and writes its own level.

        Raises ValueError for commits and recaches, and for a level at which earlier chunks were not denoised.
        """
        (segment, *others) = segments
        if others or segment.kind not in (Kind.PREFILL, Kind.DENOISE):
            raise ValueError(
                f"a pass of {[s.kind.value for s in segments]}: one cache per step keeps denoising passes and given "
                "latents only; use commit='none' and the switch policy 'keep' or 'flush'"
            )
        if segment.kind is Kind.PREFILL:
            if self.levels:
                raise ValueError(f"given latents {list(segment.frames)} after the first chunk; give them before it")
            self._given = self._given or self._make()
            self._begun = {segment.sigma: self._given}
            return self._given.begin(segments)
        if self._frames != segment.frames:
            self._begun, self._frames = {}, segment.frames
        cache = self._level(segment.sigma)
        self._check_past(cache, segment)
        self._begun[segment.sigma] = cache
        return cache.begin(segments)

    def _level(self, sigma: float) -> StreamCaches:
        if sigma not in self.levels:
            cache = self._make()
            if self._given is not None and len(self._given.frames):
                cache.restore(self._given.snapshot())
            self.levels[sigma] = cache
        return self.levels[sigma]

    def _check_past(self, cache: StreamCaches, segment: Segment) -> None:
        missing = self._visibility.visible(segment) - cache.frames
        if len(missing):
            raise ValueError(
                f"latent frames {missing} were never denoised at sigma={segment.sigma}, where {list(segment.frames)} "
                "reads them; use the same schedule for every chunk, the first one too"
            )

    def promote(self, *, keep_graph: bool = False) -> None:
        """Make the chunk's passes readable, each at its own level. Raises ValueError as `KVCache.promote`."""
        if not self._begun:
            raise ValueError("promote(): no pass was begun since the last promote() or discard()")
        for cache in self._begun.values():
            cache.promote(keep_graph=keep_graph)
        if self._given not in self._begun.values():
            self._given = None  # every level has its own copy by now
        self._begun, self._frames = {}, None

    def discard(self) -> None:
        for cache in self._all():
            cache.discard()
        self._begun, self._frames = {}, None

    def drop(self, frames: FrameSet) -> None:
        self.discard()
        for cache in self._all():
            cache.drop(frames)
        if not any(len(cache.frames) for cache in self._all()):
            self.levels, self._given = {}, None  # as new: another stream may begin

    def snapshot(self) -> Snapshot:
        named = {f"level{i}": cache.snapshot() for i, cache in enumerate(self.levels.values())}
        if self._given is not None:
            named["given"] = self._given.snapshot()
        return merge(named, {"levels": list(self.levels), "has_given": self._given is not None})

    def restore(self, snapshot: Snapshot) -> None:
        """As `KVCache.restore`, into a cache of the same network; levels are made as they were."""
        if "levels" not in snapshot.facts:
            raise ValueError("snapshot of another kind of cache: expected one of the cache 'steps'")
        levels = {}
        for i, sigma in enumerate(snapshot.facts["levels"]):
            levels[sigma] = self._make()
            levels[sigma].restore(snapshot.nested(f"level{i}"))
        given = self._make() if snapshot.facts["has_given"] else None
        if given is not None:
            given.restore(snapshot.nested("given"))
        self.levels, self._given, self._begun, self._frames = levels, given, {}, None
