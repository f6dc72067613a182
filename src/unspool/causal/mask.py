"""Training masks made from a Visibility: per query segment a list of key intervals, compiled to what a device runs.

A sequence is counted in sequence frames: for plain causal training these are the latent frames, for teacher forcing
the clean copy [0, F) is followed by the noisy one [F, 2F). Sources: wan_causal masks of arXiv:2412.07772 and
arXiv:2506.08009; what a chunk reads comes from the same object that drives eviction in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from unspool.causal.chunks import ChunkPlan, FrameSet
from unspool.causal.position import PositionPolicy
from unspool.causal.visibility import (
    MAIN,
    Kind,
    Pass,
    Segment,
    Visibility,
    first_copies,
    own_reads,
    stream_of,
    streams_of,
    within_of,
)

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True)
class MaskBlock:
    """Consecutive query frames that read the same keys; positions follow the frames in ascending order.

    `copies`: how many times more than once the first key frame is read.
    """

    queries: range
    keys: FrameSet
    query_positions: tuple[int, ...]
    key_positions: tuple[int, ...]
    copies: int = 0


@dataclass(frozen=True)
class MaskSpec:
    """Who reads whom in one sequence of `num_frames` sequence frames; `streams` the same for attentions besides."""

    num_frames: int
    blocks: tuple[MaskBlock, ...]
    streams: tuple[tuple[str, MaskSpec], ...] = ()

    def stream(self, name: str) -> MaskSpec:
        """The mask of the attentions of one stream. Raises ValueError where none was made."""
        masks = {MAIN: self, **dict(self.streams)}
        if name not in masks:
            raise ValueError(
                f"attention stream {name!r}: this mask has {list(masks)} only; leave Site.stream at {MAIN!r} if these "
                "attentions read the same frames, else make it from a visibility that speaks of that stream, such as "
                "PrefixEnhanced(base=..., frames=...)"
            )
        return masks[name]

    def allowed(self) -> list[list[bool]]:
        """Frame-level truth table [query frame][key frame]."""
        table = [[False] * self.num_frames for _ in range(self.num_frames)]
        for block in self.blocks:
            for q in block.queries:
                for k in block.keys:
                    table[q][k] = True
        return table

    @property
    def fixed_positions(self) -> tuple[int, ...] | None:
        """One position per sequence frame that serves every block, or None where a block moves its keys."""
        own: dict[int, int] = {}
        for block in self.blocks:
            own.update(zip(block.queries, block.query_positions, strict=True))
        for block in self.blocks:
            if any(own[k] != p for k, p in zip(block.keys, block.key_positions, strict=True)):
                return None
        return tuple(own[f] for f in range(self.num_frames))

    def dense(self, tokens_per_frame: int, device: torch.device | None = None) -> torch.Tensor:
        """Boolean [tokens, tokens], True where the query (row) reads the key (column)."""
        import torch

        from unspool.shapes import to_device

        self._check_single()
        frames = torch.tensor(self.allowed(), dtype=torch.bool)
        frames = frames if device is None else to_device(frames, device)
        return frames.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)

    def flex(self, tokens_per_frame: int, device: torch.device) -> BlockMask:
        """FlexAttention block mask of the same table (CUDA training; on the CPU forward only and slow)."""
        import torch
        from torch.nn.attention.flex_attention import create_block_mask

        self._check_single()
        frames = torch.tensor(self.allowed(), dtype=torch.bool, device=device)
        n = self.num_frames * tokens_per_frame

        def reads(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return frames[q // tokens_per_frame, k // tokens_per_frame]

        return create_block_mask(reads, None, None, n, n, device=device)

    @property
    def has_copies(self) -> bool:
        """Whether a key frame is read several times by one query, which no boolean mask can say."""
        return any(block.copies for block in self.blocks)

    def _check_single(self) -> None:
        if self.has_copies:
            raise ValueError(
                "a past shorter than the prefix is read several times, which no boolean mask can say; use "
                "backend='slices', or a first chunk of at least as many latent frames"
            )


_Part = tuple[range, Kind, int]  # latent frames, why, and how much further on than its past they sit in the sequence


def _chunk_blocks(part: _Part, visibility: Visibility, positions: PositionPolicy) -> list[MaskBlock]:
    frames, kind, offset = part
    segment = Segment(kind=kind, frames=frames)
    past = visibility.visible(segment)
    return _blocks(segment, past, list(past), frames.start + offset, visibility, positions)


def _blocks(
    segment: Segment, past: FrameSet, places: list[int], start: int, visibility: Visibility, positions: PositionPolicy
) -> list[MaskBlock]:
    """`segment` from sequence frame `start` on; `places` are the sequence frames of its past."""
    past_positions, own_positions = positions.assign(segment, past)
    at = dict(zip(places, past_positions, strict=True))
    at.update(zip(range(start, start + len(segment.frames)), own_positions, strict=True))
    blocks = []
    for queries, seen in own_reads(within_of(visibility, segment), len(segment.frames)):
        keys = FrameSet.of_frames([*places, *(start + i for i in seen)])
        blocks.append(
            MaskBlock(
                queries=range(start + queries.start, start + queries.stop),
                keys=keys,
                query_positions=tuple(own_positions[queries.start : queries.stop]),
                key_positions=tuple(at[k] for k in keys),
                copies=first_copies(visibility, past),
            )
        )
    return blocks


def _spec(num_frames: int, parts: list[_Part], visibility: Visibility, positions: PositionPolicy) -> MaskSpec:
    """The mask of a sequence of chunks, and those of the visibility's other streams."""
    _check_maskable(visibility)
    blocks = [block for part in parts for block in _chunk_blocks(part, visibility, positions)]
    streams = [
        (name, _spec(num_frames, parts, stream_of(visibility, name), positions)) for name in streams_of(visibility)
    ]
    return MaskSpec(num_frames, tuple(blocks), tuple(streams))


def _chunks(plan: ChunkPlan, num_frames: int) -> list[range]:
    return [range(c.start, min(c.stop, num_frames)) for c in plan.chunks(0, num_frames)]


def _check_maskable(visibility: Visibility) -> None:
    if not getattr(visibility, "maskable", True):
        raise ValueError(
            f"{type(visibility).__name__} reads what depends on the content, so no mask can stand for it: "
            "train it by rollout, or choose a visibility of indices"
        )


@lru_cache(maxsize=64)
def causal_mask(
    plan: ChunkPlan, num_frames: int, visibility: Visibility, positions: PositionPolicy, kind: Kind = Kind.DENOISE
) -> MaskSpec:
    """Each chunk reads itself and what the visibility gives it: diffusion forcing and plain causal training."""
    return _spec(num_frames, [(frames, kind, 0) for frames in _chunks(plan, num_frames)], visibility, positions)


@lru_cache(maxsize=64)
def clean_prefix_mask(
    plan: ChunkPlan, num_frames: int, prefix: int, visibility: Visibility, positions: PositionPolicy
) -> MaskSpec:
    """Chunks before latent frame `prefix` commit, those from it on denoise: a clean prefix in front of noisy frames
    (ViD-GPT; arXiv:2411.16375 section 3.2). Raises ValueError when `prefix` lies inside a chunk."""
    chunks = _chunks(plan, num_frames)
    if prefix not in {0, *(c.stop for c in chunks)}:
        raise ValueError(
            f"prefix={prefix} latent frames end inside a chunk; expected one of {[0, *(c.stop for c in chunks)]}"
        )
    parts = [(c, Kind.COMMIT if c.stop <= prefix else Kind.DENOISE, 0) for c in chunks]
    return _spec(num_frames, parts, visibility, positions)


@lru_cache(maxsize=64)
def teacher_forcing_mask(
    plan: ChunkPlan, num_frames: int, visibility: Visibility, positions: PositionPolicy
) -> MaskSpec:
    """Sequence [clean | noisy] of 2 `num_frames`: clean chunks commit, noisy chunks read clean ones before them."""
    chunks = _chunks(plan, num_frames)
    parts = [(c, Kind.COMMIT, 0) for c in chunks] + [(c, Kind.DENOISE, num_frames) for c in chunks]
    return _spec(2 * num_frames, parts, visibility, positions)


@lru_cache(maxsize=64)
def pass_mask(segments: Pass, visibility: Visibility, positions: PositionPolicy) -> MaskSpec:
    """The segments of one forward behind each other, each reading what the visibility gives it of those before it.

    Raises ValueError where a segment reads a latent frame that is not among them.
    """
    _check_maskable(visibility)
    at = {f: i for i, f in enumerate(f for segment in segments for f in segment.frames)}
    blocks: list[MaskBlock] = []
    for segment in segments:
        past = visibility.visible(segment)
        past = past if segment.limit is None else past & segment.limit
        absent = [f for f in past if f not in at]
        if absent:
            raise ValueError(
                f"{segment.kind.value} of {list(segment.frames)} reads latent frames {FrameSet.of_frames(absent)}, "
                "which are not in the same forward, and nothing was kept of them; use commit='recompute'"
            )
        places = [at[f] for f in past]
        blocks += _blocks(segment, past, places, at[segment.frames.start], visibility, positions)
    names = streams_of(visibility)
    streams = tuple((name, pass_mask(segments, stream_of(visibility, name), positions)) for name in names)
    return MaskSpec(len(at), tuple(blocks), streams)


@lru_cache(maxsize=64)
def open_mask(segments: Pass, visibility: Visibility, positions: PositionPolicy) -> MaskSpec:
    """As `pass_mask`, but all latent frames of the forward read each other, clean ones the noisy ones too (OS-Fix and
    OS-Ext of arXiv:2411.16375): of the visibility only its other streams are left."""
    by_rule = pass_mask(segments, visibility, positions)
    past = FrameSet.of(*(segment.frames for segment in segments[:-1]))
    keys, own = positions.assign(segments[-1], past)
    every, n = tuple(keys + own), by_rule.num_frames
    block = MaskBlock(queries=range(n), keys=FrameSet.of((0, n)), query_positions=every, key_positions=every)
    return MaskSpec(n, (block,), by_rule.streams)
