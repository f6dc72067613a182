"""Which videos a folder holds and what is said about them, in the conventions that trainers have settled on.

| layout | what is read |
|---|---|
| "metadata" | `metadata.jsonl`, `.json` or `.csv` (or the folder's only .jsonl or .csv): a row per video |
| "videos2caption" | `videos2caption.json`: a list of objects with `path` and `cap` |
| "lines" | `videos.txt` and `prompts.txt` or `prompt.txt`, line by line |
| "sidecar" | `a.txt` beside `a.mp4`, its lines joined by spaces |
| "pattern" | the file name, put into a sentence |

"auto" takes the first of them that is there. Column names are free within `VIDEO_KEYS` and `CAPTION_KEYS`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

VIDEO_KEYS = ("video", "video_path", "file_name", "path", "media")
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")

Layout = Literal["auto", "metadata", "videos2caption", "lines", "sidecar", "pattern"]

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class NamePattern:
    """A caption made of a file name: `name` "asl_{word}" and `caption` "a person signs '{word}'".

    Both name the same fields; in the text that a field matches, `_` and `-` become spaces. A name that does not match
    has no caption. Raises ValueError for a caption that uses a field which the name does not have.
    """

    name: str
    caption: str

    def __post_init__(self) -> None:
        fields, used = _FIELD.findall(self.name), set(_FIELD.findall(self.caption))
        if not fields or len(set(fields)) != len(fields):
            raise ValueError(f"name_pattern={self.name!r}: expected distinct fields in braces, such as 'asl_{{word}}'")
        if used - set(fields):
            raise ValueError(
                f"caption_pattern={self.caption!r} uses {sorted(used - set(fields))}, which name_pattern="
                f"{self.name!r} does not have; name them there"
            )

    def caption_of(self, path: Path) -> str | None:
        """The caption of a file, or None where its name (without suffix) does not match."""
        parts = _FIELD.split(self.name)  # text, field, text, field, ..., text
        regex = "".join(f"(?P<{part}>.+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        match = re.fullmatch(regex, path.stem)
        if match is None:
            return None
        words = {field: re.sub(r"[_\-\s]+", " ", text).strip() for field, text in match.groupdict().items()}
        return _FIELD.sub(lambda field: words[field[1]], self.caption)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What was found: `layout` used, `file` it stands in (None: several files, or none), `videos` with their captions
    in a fixed order, `skipped` (name, reason), `others`: layouts that are there, too, and were not used."""

    layout: Layout
    file: str | None
    videos: tuple[tuple[Path, str], ...]
    skipped: tuple[tuple[str, str], ...]
    others: tuple[Layout, ...] = ()

    def summary(self) -> str:
        """One line for the user."""
        where = f" ({self.file})" if self.file else ""
        others = f"; {', '.join(self.others)} are there, too, and not used" if self.others else ""
        return f"{len(self.videos)} videos with captions from {self.layout}{where}{others}"


def read_captions(source: Path, *, layout: Layout = "auto", pattern: NamePattern | None = None) -> Captions:
    """The videos of a folder, or of one metadata file, with their captions.

    `pattern` serves "pattern", and the videos that another layout leaves without a caption. Raises FileNotFoundError
    where there is nothing, ValueError (got, expected, fix) where nothing in it is a captioned video.
    """
    if source.is_file():
        read = _READERS["videos2caption" if source.name == "videos2caption.json" else "metadata"]
        return _resolve(read(source), source.parent, "metadata", source.name, pattern, ())
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder of videos")
    there = {name: file for name, find in _FINDERS.items() if (file := find(source)) is not None}
    if pattern is not None:
        there["pattern"] = source
    chosen: Layout = next(iter(there), "pattern") if layout == "auto" else layout
    if chosen not in there:
        raise ValueError(_nothing(source, layout, tuple(there)))
    others = tuple(name for name in there if name not in (chosen, "pattern"))
    if chosen in ("sidecar", "pattern"):
        rows = [
            (str(path.relative_to(source)), _sidecar(path) if chosen == "sidecar" else None)
            for path in videos_in(source)
        ]
        return _resolve(rows, source, chosen, None, pattern, others)
    file = there[chosen]
    return _resolve(_READERS[chosen](file), source, chosen, file.name, pattern, others)


def videos_in(folder: Path) -> list[Path]:
    """All files below a folder that are videos by their suffix, in the order of their names, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


Rows = Iterable[tuple[str, str | None]]


def _resolve(
    rows: Rows, folder: Path, layout: Layout, file: str | None, pattern: NamePattern | None, others: tuple[Layout, ...]
) -> Captions:
    """Find the files of the rows, and captions for rows without."""
    videos: list[tuple[Path, str]] = []
    skipped = []
    for name, caption in rows:
        places = (folder / name, folder / "videos" / name)  # an absolute name stands for itself
        path = next((place for place in places if place.is_file()), None)
        shown = places[0].relative_to(folder).as_posix() if places[0].is_relative_to(folder) else Path(name).name
        if path is None:
            skipped.append((shown, "no such file"))
            continue
        text = caption or (pattern.caption_of(path) if pattern else None)
        if text is None:
            reason = f"name does not match {pattern.name!r}" if pattern else "no caption"
            skipped.append((shown, reason))
        else:
            videos.append((path, text))
    if not videos:
        reasons = ", ".join(f"{name} ({why})" for name, why in skipped[:3]) or "none is listed or lies there"
        raise ValueError(f"{folder}: got no video with a caption from {layout}: {reasons}; expected at least one")
    return Captions(layout=layout, file=file, videos=tuple(videos), skipped=tuple(skipped), others=others)


def _nothing(folder: Path, layout: Layout, there: tuple[Layout, ...]) -> str:
    count = len(videos_in(folder))
    if not count:
        return f"{folder}: got a folder without videos; expected files ending in {', '.join(VIDEO_SUFFIXES)}"
    got = f"layout {layout!r}, which is not there" if layout != "auto" else "no captions"
    return (
        f"{folder}: got {count} videos and {got}{'; there is ' + ', '.join(there) if there else ''}; expected "
        "metadata.jsonl, metadata.csv, videos2caption.json, videos.txt + prompts.txt or a .txt beside each video; or "
        "give caption_pattern (such as 'a person signs {name}') to make captions of the file names"
    )


def _find_metadata(folder: Path) -> Path | None:
    for name in ("metadata.jsonl", "metadata.json", "metadata.csv"):
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*.jsonl", "*.csv"):
        files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        if len(files) == 1:
            return files[0]
    return None


def _find_lines(folder: Path) -> Path | None:
    is_there = (folder / "videos.txt").is_file() and _prompts_beside(folder / "videos.txt") is not None
    return folder / "videos.txt" if is_there else None


def _find_sidecar(folder: Path) -> Path | None:
    return next((path for path in videos_in(folder) if path.with_suffix(".txt").is_file()), None)


def _prompts_beside(videos: Path) -> Path | None:
    names = ("prompts.txt", "prompt.txt", "captions.txt")
    return next((videos.parent / name for name in names if (videos.parent / name).is_file()), None)


def _sidecar(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    return " ".join(read_text(file).split()) if file.is_file() else None


def _read_metadata(file: Path) -> Iterator[tuple[str, str | None]]:
    text = read_text(file)
    if file.suffix.lower() == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
            yield _row(row, f"{file}, row {number}")
    elif file.suffix.lower() == ".json":
        yield from _read_list(file)
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _row(_json(line, f"{file}, line {number}"), f"{file}, line {number}")


def _read_list(file: Path) -> Iterator[tuple[str, str | None]]:
    content = _json(read_text(file), str(file))
    if not isinstance(content, list):
        raise ValueError(f"{file}: got a {type(content).__name__}; expected a list of objects with path and cap")
    for number, row in enumerate(content):
        yield _row(row, f"{file}, entry {number}")


def _read_lines(file: Path) -> Iterator[tuple[str, str | None]]:
    beside = _prompts_beside(file)
    assert beside is not None
    videos, prompts = ([line.strip() for line in read_text(path).split("\n")] for path in (file, beside))
    while videos and not videos[-1]:
        videos.pop()
    while len(prompts) > len(videos) and not prompts[-1]:  # an empty prompt may be meant
        prompts.pop()
    if len(videos) != len(prompts):
        raise ValueError(
            f"{file}: got {len(videos)} videos and {len(prompts)} lines in {beside.name}; expected one line for each"
        )
    yield from zip(videos, prompts, strict=True)


def _row(row: object, where: str) -> tuple[str, str | None]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: got a {type(row).__name__}; expected an object with a video and a caption")
    video, caption = (
        next((row[key] for key in keys if row.get(key) not in (None, "")), None) for keys in (VIDEO_KEYS, CAPTION_KEYS)
    )
    if isinstance(caption, list) and caption:  # alternatives: the first is the best one where several are given
        caption = caption[0]
    if not isinstance(video, str):
        raise ValueError(
            f"{where}: got the keys {[str(key) for key in row]}; expected a video under one of {', '.join(VIDEO_KEYS)}"
        )
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{where}: got a caption of type {type(caption).__name__}; expected text")
    return video, caption.strip() or None if caption else None


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None


def read_text(file: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises ValueError for another encoding."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; expected UTF-8; convert it") from None


_FINDERS: dict[Layout, Callable[[Path], Path | None]] = {
    "metadata": _find_metadata,
    "videos2caption": lambda folder: file if (file := folder / "videos2caption.json").is_file() else None,
    "lines": _find_lines,
    "sidecar": _find_sidecar,
}
_READERS: dict[Layout, Callable[[Path], Iterator[tuple[str, str | None]]]] = {
    "metadata": _read_metadata,
    "videos2caption": _read_list,
    "lines": _read_lines,
}
