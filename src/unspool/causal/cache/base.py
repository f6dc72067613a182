"""What a rollout asks of a cache: any class with these members can stand in for `KVCache` (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Context
from unspool.causal.visibility import Pass, Visibility


@runtime_checkable
class Cache(Protocol):
    """The past of one batch of streams: begin a pass, then promote or discard what it staged.

    A class that serves one way of committing only says which: a class attribute `commit`, as of `RolloutConfig`.
    """

    visibility: Visibility
    """What may be read; a rollout replaces it when a switch forgets the past or moves the sink."""

    @property
    def frames(self) -> FrameSet:
        """Latent frames that can be read."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is held, exact."""
        ...

    def begin(self, segments: Pass) -> Context: ...

    def promote(self, *, keep_graph: bool = False) -> None: ...

    def discard(self) -> None: ...

    def drop(self, frames: FrameSet) -> None: ...

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...


@runtime_checkable
class Checks(Protocol):
    """What a cache adds so that a rollout that refuses a snapshot is left as it was."""

    def check(self, snapshot: Snapshot, visibility: Visibility) -> None:
        """Raise ValueError unless the cache, once it sees `visibility`, can be restored; changes nothing."""
        ...


CacheFactory: TypeAlias = Callable[..., Cache]
"""Called with the sites and the keywords of `KVCache`: batch, tokens_per_frame, visibility, positions, dtype, device,
compiled."""
