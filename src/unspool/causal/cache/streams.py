"""One `KVCache` per attention stream: networks whose attentions read different pasts (Ca2-VDM's spatial prefix).

Contract: as `KVCache`, for all streams together. Each keeps what its own stream of the visibility reads and no more,
so the bytes are those of the temporal window plus those of the short prefix (arXiv:2411.16375 table 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool.causal.cache.kv import BLOCK_FRAMES, KVCache
from unspool.causal.cache.snapshot import Snapshot, merge
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Context, Site
from unspool.causal.position import PositionPolicy
from unspool.causal.visibility import MAIN, Pass, Visibility, stream_of
from unspool.ops.rope import Rope


@dataclass(frozen=True)
class StreamContext:
    """One view per stream; each attention is answered by the view of its stream."""

    views: Mapping[str, Context]

    @property
    def positions(self) -> Tensor:
        return self.views[MAIN].positions

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        return self.views[site.stream].attend(site, q, k, v, rope)


class StreamCaches:
    """Keys and values of every stream of one network; arguments as `KVCache`.

    Raises ValueError when no site is of the main stream, or `visibility` does not speak of a stream that sites have.
    """

    def __init__(
        self,
        sites: list[Site],
        *,
        batch: int,
        tokens_per_frame: int,
        visibility: Visibility,
        positions: PositionPolicy,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        block_frames: int = BLOCK_FRAMES,
    ) -> None:
        names = list(dict.fromkeys(site.stream for site in sites))
        if MAIN not in names:
            raise ValueError(f"attention streams {names}: expected {MAIN!r} among them; it says which frames are held")
        self._visibility = visibility
        self.caches = {
            name: KVCache(
                [site for site in sites if site.stream == name],
                batch=batch,
                tokens_per_frame=tokens_per_frame,
                visibility=stream_of(visibility, name),
                positions=positions,
                dtype=dtype,
                device=device,
                compiled=compiled,
                # A side stream without a bound of its own holds few frames: it grows until they fit, then stays.
                block_frames=block_frames if name == MAIN else 1,
            )
            for name in names
        }

    @property
    def visibility(self) -> Visibility:
        return self._visibility

    @visibility.setter
    def visibility(self, visibility: Visibility) -> None:
        self._visibility = visibility
        for name, cache in self.caches.items():
            cache.visibility = stream_of(visibility, name)

    @property
    def frames(self) -> FrameSet:
        """Latent frames that the main stream can read."""
        return self.caches[MAIN].frames

    @property
    def num_bytes(self) -> int:
        """Bytes of all streams, exact."""
        return sum(cache.num_bytes for cache in self.caches.values())

    def begin(self, segments: Pass) -> Context:
        return StreamContext({name: cache.begin(segments) for name, cache in self.caches.items()})

    def promote(self, *, keep_graph: bool = False) -> None:
        """As `KVCache.promote`; nothing is promoted unless the pass reached every site of every stream."""
        for cache in self.caches.values():
            cache.check_complete()
        for cache in self.caches.values():
            cache.promote(keep_graph=keep_graph)

    def discard(self) -> None:
        for cache in self.caches.values():
            cache.discard()

    def drop(self, frames: FrameSet) -> None:
        for cache in self.caches.values():
            cache.drop(frames)

    def snapshot(self) -> Snapshot:
        parts = {name: cache.snapshot() for name, cache in self.caches.items()}
        return merge(parts, {"streams": sorted(parts)})

    def check(self, snapshot: Snapshot, visibility: Visibility) -> None:
        """Raise ValueError unless every stream can be restored once the caches see `visibility`."""
        if snapshot.facts.get("streams") != sorted(self.caches):
            raise ValueError(
                f"snapshot of the streams {snapshot.facts.get('streams')}: expected {sorted(self.caches)}; restore it "
                "into a cache of the same network"
            )
        for name, cache in self.caches.items():
            cache.check(snapshot.nested(name), stream_of(visibility, name))

    def restore(self, snapshot: Snapshot) -> None:
        """As `KVCache.restore`; nothing is changed unless every stream fits."""
        self.check(snapshot, self.visibility)
        for name, cache in self.caches.items():
            cache.restore(snapshot.nested(name))
