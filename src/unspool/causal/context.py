"""All that one forward knows of time: a network hands over q, k, v and gets attention back.

Two forms: `FullSequence` (training and the bidirectional teacher) here, and the views of a `KVCache` (rollout). Both
are immutable, so recomputation under gradient checkpointing sees what the forward saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from unspool.annotations import check_word
from unspool.causal.mask import MaskBlock, MaskSpec
from unspool.causal.visibility import MAIN
from unspool.ops.attention import flex, sdpa
from unspool.ops.rope import Rope, rotate, table_dtype
from unspool.shapes import to_device

Backend = Literal["slices", "dense", "flex"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention of one layer, made once by the network that owns it.

    Fields: `index` its row in a cache; `heads`, `head_dim`; `stream` names sites that read the same frames, where a
    visibility says for each name which (the default is what it says of itself, another name it must know);
    `rows` samples of attention per sample of the batch and `tokens_per_frame` where they differ from the latent's
    (attention over time alone has one row per spatial position and one token per latent frame). `rows=None`: as many
    as hold all tokens of a latent frame, at whatever resolution.
    """

    index: int
    heads: int
    head_dim: int
    name: str = ""
    stream: str = MAIN
    rows: int | None = 1
    tokens_per_frame: int | None = None


@runtime_checkable
class Context(Protocol):
    """What the network's attention calls; see ARCHITECTURE contracts."""

    @property
    def positions(self) -> Tensor:
        """Positions of the query frames [t] (int64, CPU), for backbones that add them to the hidden state."""
        ...

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        """Attention of q [b, n, heads, d] over what it may read; q and k come not rotated."""
        ...


class FullSequence:
    """Every frame of the sequence in one forward, under a mask or none.

    Args: `num_frames` sequence frames (teacher forcing counts both copies); `mask` or None for bidirectional;
    `backend`: "slices" (SDPA per query segment: CPU training), "dense" (one SDPA with a boolean mask), "flex" (CUDA).
    Raises ValueError when the mask is of another length or the backend cannot express it.
    """

    def __init__(
        self, num_frames: int, mask: MaskSpec | None = None, *, backend: Backend = "slices", offset: int = 0
    ) -> None:
        check_word("backend", backend, Backend)
        if mask is not None and mask.num_frames != num_frames:
            raise ValueError(
                f"mask of {mask.num_frames} sequence frames for a sequence of {num_frames}; build it for num_frames"
            )
        self.num_frames = num_frames
        self.mask = mask
        self.backend = backend
        fixed = tuple(range(offset, offset + num_frames)) if mask is None else mask.fixed_positions
        if fixed is None and backend != "slices":
            raise ValueError(
                f"backend={backend!r} rotates every key once, but these positions move keys from chunk to chunk; "
                "use backend='slices'"
            )
        self._fixed = fixed
        self._masks: dict[tuple[str, str, int, torch.device], Any] = {}
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    @property
    def positions(self) -> Tensor:
        if self._fixed is None:
            raise ValueError(
                "these positions move keys after they were written, but this network adds positions to its hidden "
                "state, where they cannot be moved; use positions that stay: Absolute or Cyclic"
            )
        return torch.tensor(self._fixed)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        if q.shape[1] % self.num_frames:
            raise ValueError(
                f"{q.shape[1]} tokens are not whole latent frames of a sequence of {self.num_frames}; "
                "the context was built for another clip length"
            )
        tokens = q.shape[1] // self.num_frames
        if rope is not None and tokens != rope.grid[0] * rope.grid[1]:
            raise ValueError(
                f"{q.shape[1]} tokens of a {rope.grid[0]}x{rope.grid[1]} grid are not a sequence of {self.num_frames} "
                "latent frames; the context was built for another clip length"
            )
        if rope is not None and self._fixed is not None:
            cos, sin = self._table(self._fixed, rope, q)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.mask is None:
            if site.stream != MAIN:
                raise ValueError(
                    f"attention stream {site.stream!r} needs to know which latent frames are clean, which a sequence "
                    "without a mask does not; use clean_prefix_mask or teacher_forcing_mask, or leave Site.stream "
                    f"at {MAIN!r} for an attention that reads all frames"
                )
            return sdpa(q, k, v)
        mask = self.mask.stream(site.stream)
        # With one token a frame (attention over time alone) one call under a small mask beats one call per block.
        is_small = tokens == 1 and (rope is None or self._fixed is not None) and not mask.has_copies
        is_small = is_small and len(mask.blocks) > 1
        if self.backend == "dense" or (self.backend == "slices" and is_small):
            return sdpa(q, k, v, self._compiled(mask.dense, site.stream, tokens, q.device))
        if self.backend == "flex":
            return flex(q, k, v, self._compiled(mask.flex, site.stream, tokens, q.device))
        cuts = _cuts(mask) if torch.is_grad_enabled() else ()
        parts = [_Parts(x, tokens, cuts) for x in (q, k, v)]
        return torch.cat([self._attend_block(block, parts, rope) for block in mask.blocks], dim=1)

    def _compiled(
        self, form: Callable[[int, torch.device], Any], stream: str, tokens: int, device: torch.device
    ) -> Any:
        """The mask as a backend wants it, made once and not per layer."""
        key = (form.__name__, stream, tokens, device)
        if key not in self._masks:
            self._masks[key] = form(tokens, device)
        return self._masks[key]

    def _attend_block(self, block: MaskBlock, parts: list[_Parts], rope: Rope | None) -> Tensor:
        q, k, v = parts
        own = q.take([(block.queries.start, block.queries.stop)])
        keys = k.take(block.keys.intervals, block.copies)
        if rope is not None and self._fixed is None:
            own = rotate(own, *self._table(block.query_positions, rope, own))
            first = block.key_positions[:1] * block.copies
            keys = rotate(keys, *self._table(first + block.key_positions, rope, own))
        return sdpa(own, keys, v.take(block.keys.intervals, block.copies))

    def _table(self, positions: tuple[int, ...], rope: Rope, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (positions, rope, like.device, table_dtype(like.dtype))
        if key not in self._tables:
            cos, sin = rope.tables(list(positions), table_dtype(like.dtype))
            self._tables[key] = (to_device(cos, like.device), to_device(sin, like.device))
        return self._tables[key]


class _Parts:
    """Tokens [b, t n, h, d] of whole frames to take intervals from. With `cuts`, frames where intervals begin or end,
    they are split there once: the gradient of that is one tensor, that of every slice would be one of all frames."""

    def __init__(self, x: Tensor, tokens: int, cuts: tuple[int, ...]) -> None:
        self.x, self.tokens, self.cuts = x, tokens, cuts
        self.pieces = x.split([(b - a) * tokens for a, b in pairwise(cuts)], dim=1) if cuts else ()

    def take(self, intervals: Iterable[tuple[int, int]], copies: int = 0) -> Tensor:
        """The intervals of frames behind each other, the first frame `copies` times more."""
        found = [piece for start, stop in intervals for piece in self._between(start, stop)]
        found = [found[0][:, : self.tokens]] * copies + found
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _between(self, start: int, stop: int) -> Sequence[Tensor]:
        if self.cuts:
            return self.pieces[self.cuts.index(start) : self.cuts.index(stop)]
        return (self.x[:, start * self.tokens : stop * self.tokens],)


@lru_cache(maxsize=64)
def _cuts(mask: MaskSpec) -> tuple[int, ...]:
    """0, the length, and every frame between at which queries or keys of a block begin or end."""
    ends = {0, mask.num_frames}
    for block in mask.blocks:
        ends.update((block.queries.start, block.queries.stop))
        ends.update(end for interval in block.keys.intervals for end in interval)
    return tuple(sorted(ends))
