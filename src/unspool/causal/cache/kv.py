"""The key/value cache of one stream: preallocated slots, staged passes, promotion.

Contract: `begin(Pass)` gives the `Context` of one forward; what the forward writes is only staged and the next
`begin` of the same frames overwrites it; `promote()` makes it readable, `discard()` forgets it. A view is valid until
the next `begin`. Bytes are constant from the moment the window is full; no method moves or clones K/V on the hot
path, none synchronises a GPU. Under autograd the views are functional (see `views`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from unspool.causal.cache.slots import SlotTable, common_shift
from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.cache.state import Entry, check, put_back, take
from unspool.causal.cache.views import ADDED, FunctionalView, RingView, SegmentPlan
from unspool.causal.chunks import FrameSet
from unspool.causal.context import Context, Site
from unspool.causal.position import PositionPolicy
from unspool.causal.visibility import (
    MAIN,
    Kind,
    Pass,
    Segment,
    Visibility,
    capacity_of,
    first_copies,
    retained,
    sink_of,
    within_of,
)
from unspool.ops.rope import Rope, rotate, table_dtype
from unspool.shapes import to_device

BLOCK_FRAMES = 24  # growth of an unbounded cache: rare enough to stay outside the hot path


class KVCache:
    """Keys and values of past latent frames at every site of one network, for one batch of streams.

    Args:
        sites: the attentions of the network.
        batch: samples; tokens_per_frame: tokens of a latent frame at the working resolution.
        visibility, positions: what is read and where it stands; pure functions of indices.
        dtype, device: of the buffers, those of the network's activations.
        compiled: fuse rotation and write by torch.compile where a compiler works.
        block_frames: latent frames by which a cache without a bound grows.
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
        if not sites or batch < 1 or tokens_per_frame < 1 or block_frames < 1:
            raise ValueError(
                f"{len(sites)} sites, batch={batch}, tokens_per_frame={tokens_per_frame}, "
                f"block_frames={block_frames}: expected at least 1 of each"
            )
        streams = {site.stream for site in sites}
        if len(streams) > 1:
            raise ValueError(
                f"attention streams {sorted(streams)}: a KVCache keeps one; leave Site.stream at {MAIN!r} for all that "
                "read the same frames, else use the cache 'streams', which has one each"
            )
        self.sites = {site.index: site for site in sites}
        self.batch = batch
        self.tokens_per_frame = tokens_per_frame
        self.visibility = visibility
        self.positions = positions
        self.dtype = dtype
        self.device = torch.device(device)
        self.compiled = compiled
        self.block_frames = block_frames
        self.slots = SlotTable(capacity_of(visibility) or block_frames)
        self.pending: dict[int, dict[int, int]] = {index: {} for index in self.sites}  # site -> frame -> shift due
        self.master_slots: dict[int, tuple[int, int]] = {}  # sink frame -> (row in masters, position as written)
        self.graph: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # frame -> site -> k, v with their graph
        self.graph_baked: dict[int, int] = {}  # position to which such a key was rotated
        self.ropes: dict[int, Rope | None] = {}  # of each site, as last seen
        self._view: RingView | FunctionalView | None = None
        self._view_version = -1
        self._pass: Pass = ()
        self.entries = {index: self.allocate(site, self.slots.capacity) for index, site in self.sites.items()}

    # ---- sizes -------------------------------------------------------------------------------------------------

    def tokens(self, site: Site) -> int:
        return self.tokens_per_frame if site.tokens_per_frame is None else site.tokens_per_frame

    def rows(self, site: Site) -> int:
        """Samples of attention at a site."""
        return self.batch * (self.tokens_per_frame // self.tokens(site) if site.rows is None else site.rows)

    def allocate(self, site: Site, capacity: int) -> Entry:
        rows = self.rows(site)

        def zeros(frames: int) -> Tensor:
            # Stored head by head and seen as [rows, tokens, heads, d]: attention reads each head in one run (3 to 8 %).
            shape = (rows, site.heads, frames * self.tokens(site), site.head_dim)
            with torch.inference_mode(False):  # what is made inside that mode can never be written outside of it
                return torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(1, 2)

        sink = len(sink_of(self.visibility)) if self.positions.moves_keys else 0
        return Entry(zeros(capacity), zeros(capacity), zeros(sink) if sink else None)

    def _grow(self, needed: int) -> None:
        """Add whole blocks of slots; only a cache without a bound ever comes here."""
        old = self.slots.capacity
        new = old + -(-(needed - old) // self.block_frames) * self.block_frames
        for index, site in self.sites.items():
            entry, fresh = self.entries[index], self.allocate(site, new)
            fresh.keys[:, : entry.keys.shape[1]] = entry.keys
            fresh.values[:, : entry.values.shape[1]] = entry.values
            self.entries[index] = Entry(fresh.keys, fresh.values, entry.masters)
        self.slots.capacity = new
        self.slots.version += 1

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers that this cache holds, exact."""
        tensors = [t for e in self.entries.values() for t in (e.keys, e.values, e.masters) if t is not None]
        tensors += [t for site in self.graph.values() for pair in site.values() for t in pair]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def frames(self) -> FrameSet:
        """Latent frames that can be read."""
        return self.slots.frames

    # ---- a pass ------------------------------------------------------------------------------------------------

    def begin(self, segments: Pass) -> Context:
        """The context of one forward over `segments`, in order; earlier passes over the same frames are forgotten.

        Raises ValueError when the segments read frames that were dropped, overlap, or do not fit the window.
        """
        self._check_pass(segments)
        self._check_room(segments)
        functional = torch.is_grad_enabled() or len(segments) > 1 or segments[0].kind is Kind.RECACHE
        functional = functional or any(f in self.slots.promoted for f in segments[0].frames)
        if not functional:
            return self._begin_ring(segments)
        self.slots.unstage()
        baked = dict(self.slots.baked)
        plans = [self._plan(segment, baked) for segment in segments]
        self._pass = segments
        self._view = FunctionalView(self, plans, frozen=torch.is_grad_enabled())
        self._view_version = -1
        return self._view

    def _check_pass(self, segments: Pass) -> None:
        if not segments:
            raise ValueError("a pass needs at least one segment")
        seen = FrameSet()
        for segment in segments:
            own = FrameSet.of(segment.frames)
            if len(seen & own):
                raise ValueError(f"segments of one pass overlap in latent frames {seen & own}")
            if len(seen) and max(seen) > segment.frames.start:
                raise ValueError(
                    f"segment {list(segment.frames)} comes after latent frame {max(seen)} of its pass; give the "
                    "segments of one forward in order of time"
                )
            seen = seen | own
            later = [f for f in self.slots.promoted if f >= segment.frames.start]
            if later and segment.kind in (Kind.PREFILL, Kind.DENOISE):
                raise ValueError(
                    f"{segment.kind.value} of latent frames {list(segment.frames)} while the cache holds {max(later)} "
                    "already: another stream begins; make a cache for it, or drop() what this one holds"
                )
            for bank in (segment.read_bank, segment.write_bank):
                if bank != "clean":
                    raise ValueError(f"bank {bank!r}: KVCache has the bank 'clean' only; use a cache with banks")

    def _check_room(self, segments: Pass) -> None:
        """Refuse what cannot be read or does not fit, before anything has changed."""
        hint = capacity_of(self.visibility)
        earlier = FrameSet()
        for segment in segments:
            past = self._past(segment)
            missing = past - (self.slots.frames | earlier)
            if len(missing):
                raise ValueError(
                    f"latent frames {missing} are wanted by {segment.kind.value} of {list(segment.frames)} but the "
                    f"cache holds {self.slots.frames}; commit every chunk in order, or use a visibility that never "
                    "asks again for what it dropped"
                )
            kept = retained(self.visibility, segment) & (self.slots.frames | earlier)
            needed = len(kept) + len(segment.frames)
            if hint is not None and needed > hint and segment.kind is not Kind.RECACHE:
                raise ValueError(
                    f"a chunk of {len(segment.frames)} latent frames does not fit: {len(kept)} more stay visible in a "
                    f"window of {hint}; use a window of at least {needed} or a shorter chunk"
                )
            earlier = earlier | FrameSet.of(segment.frames)

    def _begin_ring(self, segments: Pass) -> Context:
        segment = segments[0]
        needed = retained(self.visibility, segment)
        same = self._pass and self._pass[0].frames == segment.frames and isinstance(self._view, RingView)
        if same and self._view_version == self.slots.version and self._pass[0].limit == segment.limit:
            assert isinstance(self._view, RingView)
            past, plan = self._past(segment), self._view.plan
            wanted, own = self.positions.assign(segment, past)
            same = (past, tuple(wanted), tuple(own)) == (plan.past, plan.wanted, plan.own)
            if same and within_of(self.visibility, segment) == plan.within:
                self._pass = segments
                self._view.reopen()
                return self._view
        self._forget(set(self.slots.promoted) - set(needed))
        if list(self.slots.staged) != list(segment.frames):
            self.slots.unstage()
            self._make_room(len(segment.frames))
            self.slots.stage(segment.frames)
        plan = self._plan(segment, self.slots.baked)
        for frame, shift in plan.shifts.items():
            self.slots.baked[frame] += shift
            for due in self.pending.values():
                due[frame] = due.get(frame, 0) + shift
        self.slots.version += 1
        view = RingView(self, plan)
        self._pass, self._view, self._view_version = segments, view, self.slots.version
        return view

    def _past(self, segment: Segment) -> FrameSet:
        past = self.visibility.visible(segment)
        return past if segment.limit is None else past & segment.limit

    def _plan(self, segment: Segment, baked: dict[int, int]) -> SegmentPlan:
        """Where the keys of `segment` lie and how far they are from the positions they should have."""
        past = self._past(segment)
        wanted, own = self.positions.assign(segment, past)
        held = [baked[f] for f in past]
        shift = common_shift(wanted, held)
        shifts = {f: w + shift - b for f, w, b in zip(past, wanted, held, strict=True) if w + shift != b}
        positions = [p + shift for p in own]
        baked.update(zip(segment.frames, positions, strict=True))
        within, copies = within_of(self.visibility, segment), first_copies(self.visibility, past)
        return SegmentPlan(segment, past, shifts, tuple(positions), tuple(own), tuple(wanted), within, copies)

    def _make_room(self, frames: int) -> None:
        short = frames - len(self.slots.free())
        if short > 0:
            self._grow(self.slots.capacity + short)

    # ---- after a pass ------------------------------------------------------------------------------------------

    def promote(self, *, keep_graph: bool = False) -> None:
        """Make the last pass readable: its PREFILL, COMMIT and RECACHE segments, or the DENOISE ones if it has none.

        Gradients through promoted entries are cut unless `keep_graph`. Raises ValueError when nothing is staged.
        """
        view = self.check_complete()
        if isinstance(view, RingView):
            self.slots.promote()
        else:
            self._promote_functional(view, keep_graph)
        self._keep_masters()
        self._view = None

    def check_complete(self) -> RingView | FunctionalView:
        """The view of the last pass. Raises ValueError when nothing is staged, or not at every site."""
        if self._view is None:
            raise ValueError("promote(): no pass was begun since the last promote() or discard()")
        self._view.check_complete()
        return self._view

    def _promote_functional(self, view: FunctionalView, keep_graph: bool) -> None:
        chosen = [p for p in view.plans if p.segment.kind is not Kind.DENOISE] or list(view.plans)
        frames = FrameSet.of(*(p.segment.frames for p in chosen))
        newest = max(max(frames), max(self.slots.promoted, default=0)) + 1
        keep = retained(self.visibility, Segment(kind=Kind.DENOISE, frames=range(newest, newest + 1)))
        self._forget(set(self.slots.promoted) - set(keep))
        new = [f for f in frames if f in keep and f not in self.slots.promoted]
        self._make_room(len(new))
        self.slots.stage(new)
        self.slots.promote()
        for plan in chosen:
            kept = [f for f in plan.segment.frames if f in keep]
            positions = dict(zip(plan.segment.frames, plan.positions, strict=True))
            self.slots.baked.update({f: positions[f] for f in kept})
            for frame in kept:
                self._write(view, plan, frame, keep_graph)

    def _write(self, view: FunctionalView, plan: SegmentPlan, frame: int, keep_graph: bool) -> None:
        slot = self.slots.promoted[frame]
        self.graph.pop(frame, None)
        for index, site in self.sites.items():
            k, v = view.staged_frame(index, plan, frame)
            n = self.tokens(site)
            with torch.no_grad():
                self.entries[index].keys[:, slot * n : (slot + 1) * n].copy_(k.detach())
                self.entries[index].values[:, slot * n : (slot + 1) * n].copy_(v.detach())
            self.pending[index].pop(frame, None)
            if keep_graph:
                self.graph.setdefault(frame, {})[index] = (k, v)
                self.graph_baked[frame] = self.slots.baked[frame]
        self.master_slots.pop(frame, None)

    def _keep_masters(self) -> None:
        """Copy the keys of new sink frames, so that moving them never adds up rounding."""
        if not self.positions.moves_keys:
            return
        sink = sink_of(self.visibility)
        for frame in set(self.master_slots) - set(sink):
            del self.master_slots[frame]
        for row, frame in enumerate(sink):
            if frame not in self.slots.promoted or frame in self.master_slots:
                continue
            slot = self.slots.promoted[frame]
            self.master_slots[frame] = (row, self.slots.baked[frame])
            for index, site in self.sites.items():
                n, entry = self.tokens(site), self.entries[index]
                assert entry.masters is not None
                entry.masters[:, row * n : (row + 1) * n].copy_(entry.keys[:, slot * n : (slot + 1) * n])

    def discard(self) -> None:
        """Forget what was staged; promoted frames stay as they are."""
        self.slots.unstage()
        self._view = None
        self._pass = ()

    def drop(self, frames: FrameSet) -> None:
        """Forget promoted frames before the visibility would (a flush, a replaced sink)."""
        self.discard()
        self._forget(set(frames))

    def _forget(self, frames: set[int]) -> None:
        self.slots.drop(frames)
        for frame in frames:
            self.master_slots.pop(frame, None)
            self.graph.pop(frame, None)
            self.graph_baked.pop(frame, None)
            for due in self.pending.values():
                due.pop(frame, None)

    def settle(self, site: Site, rope: Rope | None) -> None:
        """Rotate keys whose position has moved since they were written (once a chunk, only a re-anchored sink)."""
        due = self.pending[site.index]
        if not due:
            return
        if rope is None:
            raise ValueError(ADDED)
        entry, n = self.entries[site.index], self.tokens(site)
        for frame, shift in due.items():
            slot = self.slots.promoted[frame]
            where = slice(slot * n, (slot + 1) * n)
            source = entry.keys[:, where]
            if frame in self.master_slots:
                row, written = self.master_slots[frame]
                assert entry.masters is not None
                source, shift = entry.masters[:, row * n : (row + 1) * n], self.slots.baked[frame] - written
            cos, sin = rope.time_tables([shift], table_dtype(self.dtype))
            entry.keys[:, where].copy_(rotate(source, to_device(cos, self.device), to_device(sin, self.device)))
        due.clear()

    # ---- state -------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Copies of all that is promoted, with its place in the buffers (what is staged is not part of it)."""
        return take(self)

    def check(self, snapshot: Snapshot, visibility: Visibility) -> None:
        """Raise ValueError unless `restore` would take the snapshot once the cache sees `visibility`."""
        check(self, snapshot, visibility)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of a cache of the same network, sizes and policies. Raises ValueError otherwise."""
        put_back(self, snapshot)


__all__ = ["KVCache"]
