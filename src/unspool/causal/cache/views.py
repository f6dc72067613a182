"""The contexts that a `KVCache` hands out: in place for streaming, functional under autograd.

`RingView` writes the segment's keys and values into its slots and reads the buffers as they lie: no concatenation, no
mask, no clone. `FunctionalView` copies what it reads into a new tensor per site, so a later pass cannot change what a
backward needs; it also serves forwards of several segments, which may read each other in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unspool.causal.chunks import FrameSet
from unspool.causal.context import Site
from unspool.causal.visibility import Segment, Within, own_reads
from unspool.ops.attention import sdpa
from unspool.ops.compile import compiled
from unspool.ops.rope import Rope, rotate, rotate_and_stage, table_dtype
from unspool.shapes import to_device

if TYPE_CHECKING:
    from unspool.causal.cache.kv import KVCache


ADDED = (
    "these positions move keys after they were written, but this network adds positions to its hidden state and does "
    "not rotate keys, so they cannot be moved; use positions that stay: Absolute or Cyclic"
)
_ALL, _EACH = -1, -2  # numbers of the piece of all slots, and of those of all groups in turn, beside the groups
OVER = "this view is over: its cache has begun, promoted or discarded a pass since; use the view of the last begin()"


@dataclass(frozen=True)
class SegmentPlan:
    """What one segment reads and where it stands, in host integers.

    `past` frames read; `shifts` how far the rotated key of a past frame must still move; `positions` to which own keys
    and queries are rotated; `own` and `wanted` the policy's own positions of segment and past. `within` what is read of
    the segment itself, `copies` how many times more than once the first past frame is read.
    """

    segment: Segment
    past: FrameSet
    shifts: dict[int, int]
    positions: tuple[int, ...]
    own: tuple[int, ...]
    wanted: tuple[int, ...]
    within: Within
    copies: int


@dataclass(frozen=True)
class Piece:
    """Queries of one attention call and the slots they read: a range of slots, or an index of tokens."""

    queries: slice
    span: tuple[int, int] | None
    slots: tuple[int, ...]


def _added(plans: list[SegmentPlan]) -> Tensor:
    """Positions of the queries [t]. Raises ValueError where past keys stand elsewhere than when they were written: a
    rotation takes that back or moves the queries along, what was added to a hidden state cannot follow."""
    if any(plan.shifts or plan.positions != plan.own for plan in plans):
        raise ValueError(ADDED)
    return torch.tensor([p for plan in plans for p in plan.own])


def _check_tokens(q: Tensor, frames: int, cache: KVCache, site: Site) -> None:
    expected = (cache.rows(site), frames * cache.tokens(site), site.heads, site.head_dim)
    if tuple(q.shape) != expected:
        raise ValueError(
            f"attention {site.name or site.index}: got q of {tuple(q.shape)}, expected {expected} "
            "(rows, tokens, heads, head_dim); the cache was built for another batch, latent size or network"
        )


class RingView:
    """Context of one segment over the buffers themselves; valid until the next `begin` of its cache."""

    def __init__(self, cache: KVCache, plan: SegmentPlan) -> None:
        self.cache = cache
        self.plan = plan
        frames = plan.segment.frames
        own = [cache.slots.staged[f] for f in frames]
        past = [cache.slots.promoted[f] for f in plan.past]
        past = past[:1] * plan.copies + past
        self._pieces = [
            _piece(slice(queries.start, queries.stop), sorted(past + own[seen.start : seen.stop]))
            for queries, seen in own_reads(plan.within, len(own))
        ]
        self._own_slots = own
        # Attention over time alone has one token a frame: one call under a small mask is several times as fast as one
        # call per group, which besides has to gather its keys once the window is full (43 times, on a CPU).
        every = sorted(past + own)
        self._whole = _piece(slice(0, len(own)), every)
        self._is_single = len(self._pieces) > 1 and not plan.copies
        self._single: Tensor | None = None
        self._index: dict[int, Tensor] = {}  # tokens per frame -> token slots written
        self._gather: dict[tuple[int, int], Tensor] = {}
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}
        stage = "unspool.ops.rope:rotate_and_stage"
        self._stage = compiled(stage, cache.device.type) if cache.compiled else rotate_and_stage
        self._written: set[int] = set()

    @property
    def positions(self) -> Tensor:
        return _added([self.plan])

    def reopen(self) -> None:
        """Serve another pass over the same frames."""
        self._written.clear()

    def check_complete(self) -> None:
        missing = set(self.cache.sites) - self._written
        if missing:
            raise ValueError(f"promote(): the pass never reached sites {sorted(missing)}; run the whole network first")

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        cache = self.cache
        if cache._view is not self:
            raise RuntimeError(OVER)
        _check_tokens(q, len(self.plan.segment.frames), cache, site)
        cache.settle(site, rope)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError("this view writes in place: call begin() in grad mode too, to get one for autograd")
        entry, n = cache.entries[site.index], cache.tokens(site)
        index = self._token_index(n)
        if rope is None:
            entry.keys.index_copy_(1, index, k.to(entry.keys.dtype))
            entry.values.index_copy_(1, index, v.to(entry.values.dtype))
        else:
            cos, sin = self._table(rope)
            q = self._stage(q, k, v, cos, sin, entry.keys, entry.values, index)
        self._written.add(site.index)
        if n == 1 and self._is_single:
            if self._single is None:
                self._single = _reads(self._pieces, list(self._whole.slots), cache.device)
            return sdpa(q, *self._read(_ALL, self._whole, entry.keys, entry.values, n), self._single)
        if self.plan.within == "own" and len(self._pieces) > 1:  # as many keys for every frame: frames are a batch
            keys, values = self._read(_EACH, self._each(), entry.keys, entry.values, n)
            return _frame_by_frame(q, keys, values, len(self._pieces))
        outputs = []
        for number, piece in enumerate(self._pieces):
            own = q if len(self._pieces) == 1 else q[:, piece.queries.start * n : piece.queries.stop * n]
            outputs.append(sdpa(own, *self._read(number, piece, entry.keys, entry.values, n)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _read(self, number: int, piece: Piece, keys: Tensor, values: Tensor, n: int) -> tuple[Tensor, Tensor]:
        if piece.span is not None:
            where = slice(piece.span[0] * n, piece.span[1] * n)
            return keys[:, where], values[:, where]
        key = (number, n)
        if key not in self._gather:
            self._gather[key] = _token_slots(piece.slots, n, self.cache.device)
        return keys.index_select(1, self._gather[key]), values.index_select(1, self._gather[key])

    def _each(self) -> Piece:
        """The slots of every group, one behind the other."""
        return Piece(self._whole.queries, None, tuple(slot for piece in self._pieces for slot in piece.slots))

    def _token_index(self, n: int) -> Tensor:
        if n not in self._index:
            self._index[n] = _token_slots(tuple(self._own_slots), n, self.cache.device)
        return self._index[n]

    def _table(self, rope: Rope) -> tuple[Tensor, Tensor]:
        if rope not in self._tables:
            cos, sin = rope.tables(list(self.plan.positions), table_dtype(self.cache.dtype))
            self._tables[rope] = (to_device(cos, self.cache.device), to_device(sin, self.cache.device))
        return self._tables[rope]


class FunctionalView:
    """Context of one or more segments that never writes into the buffers before `promote()`.

    With `frozen`, the past of every site is kept as it was at the first call, so recomputation under gradient
    checkpointing (the non-reentrant form) reads the same even when the stream has moved on; staging keeps the first.
    """

    def __init__(self, cache: KVCache, plans: list[SegmentPlan], *, frozen: bool) -> None:
        self.cache = cache
        self.plans = plans
        self.frozen = frozen
        past, own = FrameSet(), FrameSet()
        for plan in plans:
            past, own = past | plan.past, own | FrameSet.of(plan.segment.frames)
        self._held = list(past - own)
        self._slots, self._baked = dict(cache.slots.promoted), dict(cache.slots.baked)
        self._tables: dict[tuple[Rope, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._index: dict[int, Tensor] = {}
        self._masks: dict[tuple[int, torch.device], Tensor] = {}  # by where its segment begins
        self._past: dict[int, tuple[Tensor, Tensor]] = {}
        self._staged: dict[int, tuple[Tensor, Tensor]] = {}
        if frozen and any(f in cache.graph for f in self._held):
            # Made here and not at the first call: under gradient checkpointing that call is recomputed, and has to save
            # the same tensors again.
            for site in cache.sites.values():
                self._frozen_past(site, cache.ropes.get(site.index))

    @property
    def positions(self) -> Tensor:
        return _added(self.plans)

    def check_complete(self) -> None:
        missing = set(self.cache.sites) - set(self._staged)
        if missing:
            raise ValueError(f"promote(): the pass never reached sites {sorted(missing)}; run the whole network first")

    def staged_frame(self, index: int, plan: SegmentPlan, frame: int) -> tuple[Tensor, Tensor]:
        """Rotated key and value [rows, tokens, heads, d] of one own frame."""
        n = self.cache.tokens(self.cache.sites[index])
        at = self._offset(plan) + (frame - plan.segment.frames.start)
        k, v = self._staged[index]
        return k[:, at * n : (at + 1) * n], v[:, at * n : (at + 1) * n]

    def _offset(self, plan: SegmentPlan) -> int:
        return sum(len(p.segment.frames) for p in self.plans[: self.plans.index(plan)])

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        if self.cache._view is not self and site.index not in self._past:
            raise RuntimeError(OVER)  # a recomputation in the backward finds its past kept
        cache = self.cache
        cache.ropes[site.index] = rope
        total = sum(len(p.segment.frames) for p in self.plans)
        _check_tokens(q, total, cache, site)
        n = cache.tokens(site)
        if rope is not None:
            cos, sin = self._table(rope, q)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self._staged.setdefault(site.index, (k, v))
        past_k, past_v = self._frozen_past(site, rope)
        outputs, offset = [], 0
        for plan in self.plans:
            count = len(plan.segment.frames)
            outputs += self._attend_segment(plan, offset, n, q, k, v, past_k, past_v, rope)
            offset += count
        return torch.cat(outputs, dim=1)

    def _table(self, rope: Rope, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of all own frames, made once for all layers."""
        key = (rope, like.device, table_dtype(like.dtype))
        if key not in self._tables:
            positions = [p for plan in self.plans for p in plan.positions]
            cos, sin = rope.tables(positions, table_dtype(like.dtype))
            self._tables[key] = (to_device(cos, like.device), to_device(sin, like.device))
        return self._tables[key]

    def _attend_segment(
        self,
        plan: SegmentPlan,
        offset: int,
        n: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        rope: Rope | None,
    ) -> list[Tensor]:
        """Attention of one segment over [past | earlier segments of this pass | itself]."""
        where = self._where(plan)
        keys = [_frame(past_k if old else k, at, n) for old, at in where]
        values = [_frame(past_v if old else v, at, n) for old, at in where]
        for i, frame in enumerate(plan.past):
            shift = plan.shifts.get(frame, 0)
            if shift:
                keys[i] = _shifted(keys[i], shift, rope)
        keys, values = keys[:1] * plan.copies + keys, values[:1] * plan.copies + values
        groups, count = own_reads(plan.within, len(plan.segment.frames)), len(plan.segment.frames)
        whole = slice(offset * n, (offset + count) * n)
        if n == 1 and len(groups) > 1:
            both = torch.cat([*keys, k[:, whole]], 1), torch.cat([*values, v[:, whole]], 1)
            return [sdpa(q[:, whole], *both, self._mask(offset, len(keys), groups, q.device))]
        if plan.within == "own" and count > 1:
            each = (_beside(keys, k[:, whole], count), _beside(values, v[:, whole], count))
            return [_frame_by_frame(q[:, whole], *each, count)]
        outputs = []
        for group, seen in groups:
            own = slice((offset + seen.start) * n, (offset + seen.stop) * n)
            queries = q[:, (offset + group.start) * n : (offset + group.stop) * n]
            outputs.append(sdpa(queries, torch.cat([*keys, k[:, own]], 1), torch.cat([*values, v[:, own]], 1)))
        return outputs

    def _mask(self, offset: int, past: int, groups: list[tuple[range, range]], device: torch.device) -> Tensor:
        """What the frames of the segment at `offset` read, bool [frames, past + frames]; made once for all layers."""
        key = (offset, device)
        if key not in self._masks:
            reads = [[True] * past + [i in seen for i in range(len(groups))] for _, seen in groups]
            self._masks[key] = to_device(torch.tensor(reads), device)
        return self._masks[key]

    def _where(self, plan: SegmentPlan) -> list[tuple[bool, int]]:
        """Per past frame: does it come from the cache, and its index among the held or the own frames."""
        own: dict[int, int] = {}
        offset = 0
        for other in self.plans[: self.plans.index(plan)]:
            own.update({f: offset + i for i, f in enumerate(other.segment.frames)})
            offset += len(other.segment.frames)
        return [(False, own[f]) if f in own else (True, self._held.index(f)) for f in plan.past]

    def _frozen_past(self, site: Site, rope: Rope | None) -> tuple[Tensor, Tensor]:
        if site.index in self._past:
            return self._past[site.index]
        cache, n = self.cache, self.cache.tokens(site)
        with torch.no_grad():
            cache.settle(site, rope)
            entry = cache.entries[site.index]
            if n not in self._index:
                self._index[n] = _token_slots(tuple(self._slots.get(f, 0) for f in self._held), n, cache.device)
            index = self._index[n]
            k, v = entry.keys.index_select(1, index), entry.values.index_select(1, index)
        live = [i for i, f in enumerate(self._held) if f in cache.graph]
        if live:
            k = _replace(k, {i: self._live_key(site, self._held[i], rope) for i in live}, n)
            v = _replace(v, {i: cache.graph[self._held[i]][site.index][1] for i in live}, n)
        if self.frozen:
            self._past[site.index] = (k, v)
        return k, v

    def _live_key(self, site: Site, frame: int, rope: Rope | None) -> Tensor:
        """A key that carries its graph, at the position that the buffers' copy has by now."""
        key = self.cache.graph[frame][site.index][0]
        shift = self._baked[frame] - self.cache.graph_baked[frame]
        return _shifted(key, shift, rope) if shift else key


def _shifted(key: Tensor, shift: int, rope: Rope | None) -> Tensor:
    """A rotated key moved on by `shift` latent frames. Raises ValueError for keys that were not rotated."""
    if rope is None:
        raise ValueError(ADDED)
    cos, sin = (to_device(t, key.device) for t in rope.time_tables([shift], table_dtype(key.dtype)))
    return rotate(key, cos, sin)


def _frame(x: Tensor, at: int, n: int) -> Tensor:
    return x[:, at * n : (at + 1) * n]


def _replace(x: Tensor, frames: dict[int, Tensor], n: int) -> Tensor:
    count = x.shape[1] // n
    return torch.cat([frames.get(i, _frame(x, i, n)) for i in range(count)], dim=1)


def _beside(past: list[Tensor], own: Tensor, count: int) -> Tensor:
    """The past, then one of the `count` own frames, for each of them: one behind the other."""
    frames = own.unflatten(1, (count, -1))
    held = [x[:, None].expand(-1, count, -1, -1, -1) for x in past]
    return torch.cat([*held, frames], 2).flatten(1, 2)


def _frame_by_frame(q: Tensor, keys: Tensor, values: Tensor, count: int) -> Tensor:
    """Attention of `count` frames, each over its own of `count` equal parts of the keys, in one call."""
    parts = (x.unflatten(1, (count, -1)).flatten(0, 1) for x in (q, keys, values))
    return sdpa(*parts).unflatten(0, (-1, count)).flatten(1, 2)


def _piece(queries: slice, slots: list[int]) -> Piece:
    contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
    return Piece(queries, (slots[0], slots[-1] + 1) if contiguous else None, tuple(slots))


def _reads(pieces: list[Piece], slots: list[int], device: torch.device) -> Tensor:
    """Which of `slots` each query frame reads, bool [queries, slots]; every group holds one query frame."""
    return to_device(torch.tensor([[slot in piece.slots for slot in slots] for piece in pieces]), device)


def _token_slots(slots: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """Token indices of whole slots, int64 on `device`."""
    base = torch.tensor(slots, dtype=torch.int64)[:, None] * n
    return to_device((base + torch.arange(n)).flatten(), device)
