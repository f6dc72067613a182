"""Clips that were encoded before: the fast path of training. Reads what `ShardWriter` wrote, memory-mapped.

Sample j of step k depends on (seed, k, j) alone. A codec that pads at the start makes latent 0 unlike the others, so
a crop begins at latent 0 unless `crop="any"` says that it need not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from unspool.data.batch import Batch
from unspool.data.listing import EpochOrder, check_seed, draw_below, global_samples
from unspool.data.shard_format import LATENTS, TEXT, Entry, read_header, read_index, shard_name

if TYPE_CHECKING:
    from safetensors import safe_open


@dataclass(frozen=True, kw_only=True)
class LatentShardsConfig:
    """Which data set, and which latent frames of its clips.

    Fields: `path`; `frames` latent frames per sample (None: whole clips); `crop` "start": the first ones, "any": from a
    drawn latent frame that is a multiple of `align`; `prompts` leaves out clips with fewer of them (2: only those whose
    prompt changes); `in_memory` reads all of it once; `partial` accepts a data set whose encoding was interrupted;
    `shuffle`: a new order in each epoch.
    """

    path: str = ""
    frames: int | None = None
    crop: Literal["start", "any"] = "start"
    align: int = 1
    prompts: int = 1
    in_memory: bool = False
    partial: bool = False
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames={self.frames}: expected at least one latent frame, or none for whole clips")
        if self.prompts < 1:
            raise ValueError(f"prompts={self.prompts}: expected at least 1; 2 keeps the clips whose prompt changes")
        if self.align < 1:
            raise ValueError(f"align={self.align}: expected at least 1; the chunk aligns crops to chunks")


class LatentShards:
    """A `Source` of `latents`, `captions`, `prompt_index`, `indices`, and `text` where it was stored, in float32.

    `header` states the provenance; `header.require(codec_sha256=...)` refuses latents of another codec. Raises
    FileNotFoundError, or ValueError for an interrupted or damaged data set or clips with fewer latents than `frames`.
    """

    def __init__(self, config: LatentShardsConfig) -> None:
        if not config.path:
            raise ValueError("got no path; expected a folder written by unspool encode; set path=...")
        self.config, self._folder = config, Path(config.path).expanduser()
        self.header, is_complete = read_header(self._folder)
        self.fps = self.header.fps
        self.entries: list[Entry] = read_index(self._folder)
        if not is_complete and not config.partial:
            raise ValueError(
                f"{self._folder}: encoding was interrupted after {len(self.entries)} clips; run unspool encode again "
                "to continue it, or set partial=true"
            )
        if not self.entries:
            raise ValueError(f"{self._folder}: got a data set without clips")
        most = max(len(entry.captions) for entry in self.entries)
        self.entries = [entry for entry in self.entries if len(entry.captions) >= config.prompts]
        if not self.entries:
            raise ValueError(f"{self._folder}: prompts={config.prompts}, but no clip has more than {most}")
        short = [entry.name or str(entry.index) for entry in self.entries if entry.frames < (config.frames or 0)]
        if short:
            raise ValueError(
                f"{self._folder}: frames={config.frames}, but {len(short)} of {len(self.entries)} clips have fewer "
                f"latent frames ({', '.join(short[:3])}); try frames={min(entry.frames for entry in self.entries)}"
            )
        self._files: dict[int, safe_open] = {}
        self._order = EpochOrder(len(self.entries), config.seed, shuffle=config.shuffle)
        self._memory: dict[str, Tensor] = {}
        self._by_index: dict[int, Entry] = {}
        if config.in_memory:
            names = [LATENTS] if self.header.text_rows is None else [LATENTS, TEXT]
            self._memory = {
                f"{entry.index}.{name}": self._read(entry, name, 0, None) for entry in self.entries for name in names
            }

    def __len__(self) -> int:
        return len(self.entries)

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        """Clips of the samples of `rank` at `step`; see `Source`."""
        taken = [self._order.at(sample) for sample in global_samples(step, size, rank=rank, world=world)]
        return self._join([(self.entries[entry], self._start(self.entries[entry], epoch)) for epoch, entry in taken])

    def clips(self, entries: Sequence[int]) -> Batch:
        """The clips with these numbers, from their first latent frame."""
        return self._join([(self.entries[entry], 0) for entry in entries])

    def array(self, index: int, name: str) -> Tensor:
        """A further array of the clip that `indices` calls `index`, as it was stored. Raises ValueError where the clip
        has none of that name."""
        if not self._by_index:
            self._by_index = {entry.index: entry for entry in self.entries}
        return self._read(self._by_index[index], name, 0, None)

    @property
    def codec_sha256(self) -> str | None:
        """Of the codec that made the latents; None where it has no weights."""
        return self.header.codec_sha256

    def describe(self) -> dict[str, object]:
        """Provenance: that of the clips, and the codec."""
        source = json.loads(self.header.source)
        return {"source": "latents", "codec_sha256": self.header.codec_sha256, "num": len(self), "clips": source}

    def _start(self, entry: Entry, epoch: int) -> int:
        if self.config.crop == "start" or self.config.frames is None:
            return 0
        places = (entry.frames - self.config.frames) // self.config.align + 1
        return self.config.align * draw_below(places, self.config.seed, epoch, entry.index)

    def _join(self, taken: Sequence[tuple[Entry, int]]) -> Batch:
        lengths = sorted({self.config.frames or entry.frames for entry, _ in taken})
        if len(lengths) > 1:
            raise ValueError(f"clips of {lengths[0]} to {lengths[-1]} latent frames in one batch; set frames=")
        parts = [(entry, start, start + lengths[0]) for entry, start in taken]
        held = [_held(entry, start, end) for entry, start, end in parts]
        text = None
        if self.header.text_rows is not None:
            states = (self._get(entry, TEXT, 0, None)[used] for (entry, _), used in zip(taken, held, strict=True))
            text = _padded(states, self.header.text_rows)
        return Batch(
            latents=torch.stack([self._get(entry, LATENTS, start, end) for entry, start, end in parts]).float(),
            captions=tuple(
                tuple(entry.captions[k] for k in used) for (entry, _), used in zip(taken, held, strict=True)
            ),
            prompt_index=torch.tensor(
                [
                    [used.index(k) for k in entry.prompt_index[start:end]]
                    for (entry, start, end), used in zip(parts, held, strict=True)
                ]
            ),
            text=text,
            indices=torch.tensor([entry.index for entry, _ in taken]),
        )

    def _get(self, entry: Entry, name: str, start: int, end: int | None) -> Tensor:
        kept = self._memory.get(f"{entry.index}.{name}")
        return self._read(entry, name, start, end) if kept is None else kept[start:end]

    def _read(self, entry: Entry, name: str, start: int, end: int | None) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._folder / shard_name(entry.shard)
        try:
            if entry.shard not in self._files:
                self._files[entry.shard] = safe_open(path, framework="pt").__enter__()
            part = self._files[entry.shard].get_slice(f"{entry.index}.{name}")
            return part[start : part.get_shape()[0] if end is None else end]
        except SafetensorError as error:
            raise ValueError(f"{path}: clip {entry.index} has no {name!r} ({error})") from None


def _held(entry: Entry, start: int, end: int) -> list[int]:
    """The prompts that hold in a crop; all of them for a whole clip."""
    if end - start == entry.frames:
        return list(range(len(entry.captions)))
    return sorted(set(entry.prompt_index[start:end]))


def _padded(states: Iterable[Tensor], rows: int) -> Tensor:
    """Text states [prompts, rows used, channels] as one [b, prompts, rows, channels], zero where there is none."""
    parts = list(states)
    result = torch.zeros(len(parts), max(map(len, parts)), rows, parts[0].shape[-1])
    for sample, part in zip(result, parts, strict=True):
        sample[: len(part), : part.shape[1]] = part
    return result
