"""Latents on disk: what `dataset.json` states, what a line of `index.jsonl` holds, and what makes a shard whole.

A data set is a folder of `dataset.json` (provenance), `index.jsonl` (a line per clip: captions, prompt per latent
frame, shard) and `shard-00000.safetensors`, ... with the arrays of clip i under `<i>.latents`, `<i>.text`, ...
A shard appears at once and states how many clips it has; its lines are appended after it. So a shard counts only with
all its lines, and a killed writer leaves nothing that could be taken for data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

from unspool.config import from_dict, nearest, to_dict
from unspool.weights.files import read_json

FORMAT = "unspool-latents-1"
HEADER, INDEX = "dataset.json", "index.jsonl"
LATENTS, TEXT = "latents", "text"


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """Where latents come from and what they mean: data sets that differ in any of it do not mix.

    Fields: `codec` name and `codec_sha256` of its weights (None: it has none); `normalisation` what was done to the
    codec's output (mean and std per channel, or a word); `dtype` of the arrays; `fps`, `num_frames`, `height_px`,
    `width_px` of the pixels; `latent_shape` (c, h, w); `frames_rule` such as "1+4k start"; `text_encoder`,
    `text_sha256`, `text_rows` (None: captions only); `source` the provenance of the clips; `library` version.
    `source` is JSON text.
    """

    codec: str
    codec_sha256: str | None
    normalisation: dict[str, list[float]] | str
    dtype: str
    fps: float
    num_frames: int
    height_px: int
    width_px: int
    latent_shape: tuple[int, int, int]
    frames_rule: str
    text_encoder: str | None = None
    text_sha256: str | None = None
    text_rows: int | None = None
    source: str = "{}"
    library: str = ""
    format: str = FORMAT

    def __post_init__(self) -> None:
        # one spelling of the same settings, so that headers can be compared
        object.__setattr__(self, "source", json.dumps(json.loads(self.source), sort_keys=True))

    def require(self, **expected: object) -> None:
        """Raise ValueError naming the first field that is not as expected: `header.require(codec_sha256=..., fps=16)`.

        The hash of the codec that decodes belongs here: latents of another codec are noise to it.
        """
        known = [field.name for field in fields(self)]
        for name, value in expected.items():
            if name not in known:
                raise ValueError(f"{name}: not a field of {HEADER}; {nearest(name, known)}")
            if getattr(self, name) != value:
                raise ValueError(
                    f"latents with {name}={_short(getattr(self, name))}; expected {_short(value)}; "
                    "encode the clips again, or use what they were encoded with"
                )

    def require_same(self, other: ShardHeader) -> None:
        """Raise ValueError naming the first field that differs from `other`; the library's version may."""
        self.require(**{f.name: getattr(other, f.name) for f in fields(other) if f.name != "library"})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One clip of the index.

    Fields: `index` its place; `item` its number in the source; `shard`; `frames` latent frames; `captions` in order of
    time; `prompt_index` which of them each latent frame follows; `name` of the file or scene it shows.
    """

    index: int
    item: int
    shard: int
    frames: int
    captions: tuple[str, ...]
    prompt_index: tuple[int, ...]
    name: str = ""

    def line(self) -> str:
        """Its line of the index."""
        return json.dumps(to_dict(self), ensure_ascii=False, separators=(",", ":")) + "\n"


def shard_name(number: int) -> str:
    """7 -> shard-00007.safetensors"""
    return f"shard-{number:05d}.safetensors"


def write_header(folder: Path, header: ShardHeader, *, num_clips: int, is_complete: bool) -> None:
    """Replace `dataset.json` at once."""
    content = {**to_dict(header), "source": json.loads(header.source)}
    replace_text(folder / HEADER, json.dumps({**content, "num_clips": num_clips, "complete": is_complete}, indent=2))


def read_header(folder: Path) -> tuple[ShardHeader, bool]:
    """The header, and whether the writer came to its end. Raises FileNotFoundError, or ValueError for another file."""
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {HEADER} in it; expected a folder written by unspool encode")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: got format {content.get('format')!r}; expected {FORMAT!r}; encode the clips again")
    is_complete = bool(content.pop("complete", False))
    content.pop("num_clips", None)
    content["source"] = json.dumps(content.get("source", {}), sort_keys=True)
    return from_dict(ShardHeader, content, where=str(path)), is_complete


def read_index(folder: Path) -> list[Entry]:
    """The clips of all whole shards; lines after them are what a killed writer had begun.

    Raises ValueError where a line in the midst is none, or a shard is missing.
    """
    path = folder / INDEX
    if not path.is_file():
        return []
    entries: list[Entry] = []
    for _, group in groupby(_entries(path), key=lambda entry: entry.shard):
        found = list(group)
        expected = clips_in(folder / shard_name(found[0].shard))
        if len(found) > expected or [entry.index for entry in found] != list(
            range(len(entries), len(entries) + len(found))
        ):
            raise ValueError(f"{path}: does not agree with {shard_name(found[0].shard)}; encode the clips again")
        if len(found) < expected:
            break
        entries += found
    return entries


def clips_in(shard: Path) -> int:
    """How many clips a shard states. Raises FileNotFoundError, or ValueError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    if not shard.is_file():
        raise FileNotFoundError(f"{shard}: missing, though {INDEX} names it; copy the data set again")
    try:
        with safe_open(shard, framework="pt") as file:
            return int((file.metadata() or {}).get("num_clips", -1))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{shard}: truncated or no shard ({error}); copy the data set again") from None


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one."""
    import os

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_prompts(captions: Sequence[str], prompt_index: Sequence[int], frames: int) -> None:
    """Raise ValueError unless every one of `frames` latent frames follows one of the captions."""
    if not captions:
        raise ValueError("a clip without captions; expected at least one, which may be empty")
    if len(prompt_index) != frames or not all(0 <= index < len(captions) for index in prompt_index):
        raise ValueError(
            f"prompt_index {list(prompt_index)[:8]} for {frames} latent frames and {len(captions)} captions; expected "
            "one number below the count of captions for each latent frame"
        )


def _entries(path: Path) -> Iterator[Entry]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # a line is whole only with its end
        try:
            yield _entry(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a line of an index ({error})") from None


def _entry(row: Mapping[str, object]) -> Entry:
    # by hand and not from_dict: an index may have a million lines
    return Entry(**{**row, "captions": tuple(row["captions"]), "prompt_index": tuple(row["prompt_index"])})  # type: ignore[arg-type]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 90 else text[:87] + "..."
