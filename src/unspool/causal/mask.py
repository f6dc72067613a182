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
from unspool.causal.visibility import Kind, Segment, Visibility

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True)
class MaskBlock:
    """Consecutive query frames that read the same keys; positions follow the frames in ascending order."""

    queries: range
    keys: FrameSet
    query_positions: tuple[int, ...]
    key_positions: tuple[int, ...]


@dataclass(frozen=True)
class MaskSpec:
    """Who reads whom in one sequence of `num_frames` sequence frames."""

    num_frames: int
    blocks: tuple[MaskBlock, ...]

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

        frames = torch.tensor(self.allowed(), dtype=torch.bool, device=device)
        return frames.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)

    def flex(self, tokens_per_frame: int, device: torch.device) -> BlockMask:
        """FlexAttention block mask of the same table (CUDA training; on the CPU forward only and slow)."""
        import torch
        from torch.nn.attention.flex_attention import create_block_mask

        frames = torch.tensor(self.allowed(), dtype=torch.bool, device=device)
        n = self.num_frames * tokens_per_frame

        def reads(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return frames[q // tokens_per_frame, k // tokens_per_frame]

        return create_block_mask(reads, None, None, n, n, device=device)


def _blocks(
    frames: range, past: FrameSet, past_positions: list[int], own_positions: list[int], offset: int, causal: bool
) -> list[MaskBlock]:
    """Mask blocks of one chunk whose own frames sit `offset` further on in the sequence than its past."""
    own = range(frames.start + offset, frames.stop + offset)
    past_list = list(past)
    blocks = []
    groups = [range(f, f + 1) for f in own] if causal else [own]
    for queries in groups:
        seen = list(range(own.start, queries.stop))
        positions = dict(zip(past_list, past_positions, strict=True))
        positions.update(zip(own, own_positions, strict=True))
        keys = FrameSet.of_frames([*past_list, *seen])
        blocks.append(
            MaskBlock(
                queries=queries,
                keys=keys,
                query_positions=tuple(own_positions[queries.start - own.start : queries.stop - own.start]),
                key_positions=tuple(positions[k] for k in keys),
            )
        )
    return blocks


def _chunk_blocks(
    frames: range, kind: Kind, visibility: Visibility, positions: PositionPolicy, *, offset: int = 0
) -> list[MaskBlock]:
    segment = Segment(kind=kind, frames=frames)
    past = visibility.visible(segment)
    keys, own = positions.assign(segment, past)
    return _blocks(frames, past, keys, own, offset, visibility.within == "causal")


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
    _check_maskable(visibility)
    blocks: list[MaskBlock] = []
    for frames in plan.chunks(0, num_frames):
        cut = range(frames.start, min(frames.stop, num_frames))
        blocks += _chunk_blocks(cut, kind, visibility, positions)
    return MaskSpec(num_frames, tuple(blocks))


@lru_cache(maxsize=64)
def teacher_forcing_mask(
    plan: ChunkPlan, num_frames: int, visibility: Visibility, positions: PositionPolicy
) -> MaskSpec:
    """Sequence [clean | noisy] of 2 `num_frames`: clean chunks commit, noisy chunks read clean ones before them."""
    _check_maskable(visibility)
    chunks = [range(c.start, min(c.stop, num_frames)) for c in plan.chunks(0, num_frames)]
    blocks: list[MaskBlock] = []
    for frames in chunks:
        blocks += _chunk_blocks(frames, Kind.COMMIT, visibility, positions)
    for frames in chunks:
        blocks += _chunk_blocks(frames, Kind.DENOISE, visibility, positions, offset=num_frames)
    return MaskSpec(2 * num_frames, tuple(blocks))
