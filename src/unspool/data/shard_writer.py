"""Write latents to shards: bounded files, each complete or absent, and a killed run continues where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from unspool.data.shard_format import (
    HEADER,
    INDEX,
    LATENTS,
    TEXT,
    Entry,
    ShardHeader,
    check_prompts,
    read_header,
    read_index,
    replace_text,
    shard_name,
    write_header,
)
from unspool.weights.report import parse_dtype
from unspool.weights.write import save_file

MAX_SHARD_BYTES = 256 * 2**20


class ShardWriter:
    """Appends clips to a data set, shard by shard, as a context manager.

    Nothing is on disk before the first shard is full. An existing data set is continued: `next_item` is the number of
    the first clip of the source that it has not. Leaving the block writes the rest and marks the data set complete;
    Ctrl-C writes the rest, any other exception drops what was not yet in a shard.

    Raises ValueError where the folder holds something else, or a data set with another header (the field is named).
    """

    def __init__(
        self, folder: str | os.PathLike[str], header: ShardHeader, *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes}: expected a positive size")
        self.folder, self.header = Path(folder), header
        self._max, self._dtype = max_shard_bytes, parse_dtype(header.dtype)
        self._tensors: dict[str, Tensor] = {}
        self._new: list[Entry] = []
        self._bytes = 0
        entries = self._existing()
        self.num_clips = len(entries)
        self.next_item = entries[-1].item + 1 if entries else 0
        self._shard = entries[-1].shard + 1 if entries else 0

    def _existing(self) -> list[Entry]:
        if not self.folder.exists():
            _check_place(self.folder)
            return []
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: got a file; expected a folder to write into")
        if not (self.folder / HEADER).is_file():
            if any(self.folder.iterdir()):
                raise ValueError(f"{self.folder}: got a folder with other content; expected a new or an empty one")
            return []
        read_header(self.folder)[0].require_same(self.header)
        entries = read_index(self.folder)
        kept = "".join(entry.line() for entry in entries)
        path = self.folder / INDEX
        if path.is_file() and path.read_text(encoding="utf-8") != kept:
            replace_text(path, kept)  # drops what a killed writer had begun
        return entries

    def add(
        self,
        item: int,
        latents: Tensor,
        captions: Sequence[str],
        *,
        prompt_index: Sequence[int] | None = None,
        text: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
        name: str = "",
    ) -> None:
        """Append clip `item` of the source (numbers must rise): latents [t, c, h, w], one caption or several.

        `prompt_index` [t] (None: the first caption throughout); `text` [prompts, rows, channels]: zero rows at the end
        are not stored; `extra` further arrays by name, kept in their own dtype. Raises ValueError for what does not fit
        the header, or latents that are not finite in its dtype.
        """
        if item < self.next_item:
            raise ValueError(f"item={item}: already written; expected {self.next_item} or more")
        if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(self.header.latent_shape):
            raise ValueError(
                f"latents {tuple(latents.shape)}: expected [t, {', '.join(map(str, self.header.latent_shape))}]"
            )
        prompts = tuple(prompt_index) if prompt_index is not None else (0,) * len(latents)
        check_prompts(captions, prompts, len(latents))
        arrays = {LATENTS: latents.detach().to("cpu", self._dtype, copy=True)}
        if not torch.isfinite(arrays[LATENTS]).all():
            raise ValueError(f"clip {item} {name}: latents not finite in {self.header.dtype}; try bfloat16 or float32")
        arrays |= self._text(text, len(captions))
        arrays |= {key: value.detach().cpu().clone() for key, value in _checked(extra or {}).items()}
        size = sum(array.numel() * array.element_size() for array in arrays.values())
        if self._new and self._bytes + size > self._max:
            self.flush()
        index = self.num_clips + len(self._new)
        self._tensors |= {f"{index}.{key}": array.contiguous() for key, array in arrays.items()}
        self._new.append(
            Entry(
                index=index, item=item, shard=self._shard, frames=len(latents), captions=tuple(captions),
                prompt_index=prompts, name=name,
            )
        )  # fmt: skip
        self._bytes += size
        self.next_item = item + 1

    def _text(self, text: Tensor | None, prompts: int) -> dict[str, Tensor]:
        if (text is None) != (self.header.text_rows is None):
            raise ValueError(f"got {'no text' if text is None else 'text'}, but text_rows={self.header.text_rows}")
        if text is None:
            return {}
        if text.ndim != 3 or len(text) != prompts or text.shape[1] != self.header.text_rows:
            expected = f"[{prompts}, {self.header.text_rows}, channels]"
            raise ValueError(f"text states {tuple(text.shape)}: expected {expected}, a set of rows for each caption")
        used = text.ne(0).any(-1).any(0).nonzero()
        rows = int(used[-1]) + 1 if len(used) else 1
        return {TEXT: text.detach()[:, :rows].to("cpu", self._dtype, copy=True)}

    def flush(self) -> None:
        """Write what was added as one shard. A crash at any point leaves the data set with or without all of it."""
        if not self._new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / HEADER).is_file():
            write_header(self.folder, self.header, num_clips=0, is_complete=False)
        elif read_header(self.folder)[1]:  # a finished data set that grows
            write_header(self.folder, self.header, num_clips=self.num_clips, is_complete=False)
        metadata = {"num_clips": str(len(self._new))}
        save_file(self._tensors, self.folder / shard_name(self._shard), metadata=metadata)
        with (self.folder / INDEX).open("a", encoding="utf-8") as stream:
            stream.writelines(entry.line() for entry in self._new)
            stream.flush()
            os.fsync(stream.fileno())
        self.num_clips += len(self._new)
        self._tensors, self._new, self._bytes = {}, [], 0
        self._shard += 1

    def close(self) -> None:
        """Write the rest and mark the data set complete. Raises ValueError where it has no clip at all."""
        self.flush()
        if not self.num_clips:
            raise ValueError(f"{self.folder}: no clip was written")
        write_header(self.folder, self.header, num_clips=self.num_clips, is_complete=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, KeyboardInterrupt):
            self.flush()


def _check_place(folder: Path) -> None:
    """Refuse a folder that could not be made, before hours of work are spent on its content."""
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be made, because {parent} is no folder that may be written to")


def _checked(extra: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for key in extra:
        if key in (LATENTS, TEXT) or not key.isidentifier():
            raise ValueError(f"extra array {key!r}: expected a name of letters other than {LATENTS!r} and {TEXT!r}")
    return extra
