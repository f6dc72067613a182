"""All that one forward knows of time: a network hands over q, k, v and gets attention back.

Two forms: `FullSequence` (training and the bidirectional teacher) here, and the views of a `KVCache` (rollout). Both
are immutable, so recomputation under gradient checkpointing sees what the forward saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from unspool.causal.mask import MaskBlock, MaskSpec
from unspool.causal.visibility import MAIN
from unspool.ops.attention import flex, sdpa
from unspool.ops.rope import Rope, rotate, table_dtype
from unspool.ops.transfer import to_device

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
        if backend not in get_args(Backend):
            raise ValueError(f"backend={backend!r}: expected one of {get_args(Backend)}")
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
        outputs = [self._attend_block(block, tokens, q, k, v, rope) for block in mask.blocks]
        return torch.cat(outputs, dim=1)

    def _compiled(
        self, form: Callable[[int, torch.device], Any], stream: str, tokens: int, device: torch.device
    ) -> Any:
        """The mask as a backend wants it, made once and not per layer."""
        key = (form.__name__, stream, tokens, device)
        if key not in self._masks:
            self._masks[key] = form(tokens, device)
        return self._masks[key]

    def _attend_block(
        self, block: MaskBlock, tokens: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None
    ) -> Tensor:
        own = q[:, block.queries.start * tokens : block.queries.stop * tokens]
        keys = _take(k, block, tokens)
        if rope is not None and self._fixed is None:
            own = rotate(own, *self._table(block.query_positions, rope, q))
            first = block.key_positions[:1] * block.copies
            keys = rotate(keys, *self._table(first + block.key_positions, rope, q))
        return sdpa(own, keys, _take(v, block, tokens))

    def _table(self, positions: tuple[int, ...], rope: Rope, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (positions, rope, like.device, table_dtype(like.dtype))
        if key not in self._tables:
            cos, sin = rope.tables(list(positions), table_dtype(like.dtype))
            self._tables[key] = (to_device(cos, like.device), to_device(sin, like.device))
        return self._tables[key]


def _take(x: Tensor, block: MaskBlock, tokens: int) -> Tensor:
    parts = [x[:, start * tokens : end * tokens] for start, end in block.keys.intervals]
    parts = [parts[0][:, :tokens]] * block.copies + parts
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
