"""A small text encoder that is trained jointly with its network: known words in, text states out.

What is kept of a caption is decided by a vocabulary (see `caption_words`); case, accents, punctuation, plurals and
typos do not matter, and what is not known is reported and never fatal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unspool.config import from_dict, to_dict
from unspool.models.caption_words import Reading, Vocabulary
from unspool.ops.attention import sdpa
from unspool.ops.norm import upcast
from unspool.shapes import to_device
from unspool.weights.read import read_checkpoint
from unspool.weights.report import load_into
from unspool.weights.write import save_file

CLASS_NAME = "CaptionEncoder"
PADDING, EMPTY, FIRST_WORD = 0, 1, 2
"""Rows of the word table: nothing, the caption without words, then the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Sizes of a `CaptionEncoder`.

    Fields: `words` vocabulary, the most frequent first (see `Vocabulary`); `dim` width; `out_dim` channels of the text
    states (the network's text_dim); `layers`, `heads`, `ffn_dim` (None: twice `dim`); `rows` most words of a caption;
    `slots` learned rows put before the words, one for each thing that a caption may tell of.
    """

    words: tuple[str, ...]
    dim: int = 192
    out_dim: int = 192
    layers: int = 3
    heads: int = 4
    rows: int = 40
    slots: int = 0
    ffn_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", Vocabulary(self.words).words)
        for name in ("dim", "out_dim", "layers", "heads", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.slots < 0:
            raise ValueError(f"slots={self.slots}: expected 0 or more learned rows")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            raise ValueError(f"ffn_dim={self.ffn_dim}: expected at least 1, or None for twice dim")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim}: expected a multiple of heads={self.heads}")
        if not self.words:
            raise ValueError("words=(): expected at least one known word")

    @property
    def text_len(self) -> int:
        """Rows of the states of every caption: slots and words."""
        return self.slots + self.rows


class CaptionEncoder(nn.Module):
    """Pre-norm transformer over [slots | words]; `encoder(captions)` gives the states that a backbone prepares.

    A caption without a known word, "" above all, is the unconditional prompt and has a learned word of its own.
    """

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary(config.words)
        dim = config.dim
        self.words = nn.Embedding(FIRST_WORD + len(config.words), dim)
        self.positions = nn.Parameter(torch.empty(config.rows, dim))
        self.slots = nn.Parameter(torch.empty(config.slots, dim))
        self.layers = nn.ModuleList(
            CaptionLayer(dim, config.heads, config.ffn_dim or 2 * dim) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, config.out_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.words.weight, self.positions, self.slots):
            if table.numel():
                nn.init.normal_(table, std=0.1)

    @property
    def text_len(self) -> int:
        """Rows of the states of every caption."""
        return self.config.text_len

    def read(self, caption: str) -> Reading:
        """What the encoder takes from a caption, what it corrects and what it drops."""
        return self.vocabulary.read(caption, self.config.rows)

    def unknown(self, caption: str) -> list[str]:
        """The words of `caption` that have no effect: not known, or past the last row. Once each, in order."""
        reading = self.read(caption)
        return list(dict.fromkeys([*reading.unknown, *reading.cut]))

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Rows of the word table [n, rows], int64 on the CPU; PADDING past the end."""
        table = torch.full((len(captions), self.config.rows), PADDING, dtype=torch.int64)
        for line, caption in zip(table, captions, strict=True):
            places = [FIRST_WORD + word for word in self.read(caption).words] or [EMPTY]
            line[: len(places)] = torch.tensor(places)
        return table

    def forward(self, captions: Sequence[str]) -> Tensor:
        """States [n, slots + rows, out_dim], at least fp32; rows past the end of a caption are zero.

        Raises ValueError when `captions` is one string.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions={captions[:40]!r}: expected a list of captions; use [caption]")
        tokens = to_device(self.tokens(captions), self.positions.device)
        words = self.words(tokens) + self.positions
        x = torch.cat([self.slots.expand(len(captions), -1, -1), words], dim=1)
        used = torch.cat([torch.ones_like(tokens[:, :1]).expand(-1, self.config.slots), tokens], dim=1) != PADDING
        mask = used[:, None, None, :]  # [n, heads, queries, keys]
        for layer in self.layers:
            x = layer(x, mask)
        return upcast(self.out(self.norm(x))).masked_fill(~used[..., None], 0.0)

    def knowing(self, captions: Iterable[str]) -> CaptionEncoder:
        """A copy that also knows the words of these captions; their rows of the table are new, all else is kept."""
        added = self.vocabulary.missing(captions)
        device, words = self.positions.device, (*self.config.words, *dict.fromkeys(added))
        encoder = CaptionEncoder(replace(self.config, words=words)).to(device, self.positions.dtype)
        kept = self.state_dict()
        kept["words.weight"] = torch.cat([kept["words.weight"], encoder.words.weight[len(kept["words.weight"]) :]])
        encoder.load_state_dict(kept)
        return encoder

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> Path:
        """Write one safetensors file atomically; the header carries the config with its vocabulary."""
        config = json.dumps({"_class_name": CLASS_NAME, **to_dict(self.config)})
        return save_file(self.state_dict(), path, metadata={**(metadata or {}), "config": config})

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> CaptionEncoder:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for a file of another kind."""
        checkpoint = read_checkpoint(path)
        found = checkpoint.config or {}
        if found.get("_class_name") != CLASS_NAME:
            raise ValueError(
                f"{path} holds {found.get('_class_name', 'tensors without a config')}, expected a {CLASS_NAME}; "
                "use the text.safetensors of a model folder"
            )
        values = {name: value for name, value in found.items() if not name.startswith("_")}
        with torch.device("meta"):
            encoder = cls(from_dict(CaptionConfig, values, where=str(path)))
        load_into(encoder, checkpoint.tensors, dtype=dtype, device=device)
        return encoder


class CaptionLayer(nn.Module):
    """Attention over all rows and a feed-forward part, both after a norm."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [n, rows, dim]; `mask` [n, 1, 1, rows] is True for the rows that may be read."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.o(sdpa(q, k, v, mask).flatten(2))
        return x + self.ffn(self.norm2(x))
