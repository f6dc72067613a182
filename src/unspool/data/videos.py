"""A folder of captioned videos as a source of clips: any frame rate and size in, one of each out.

A clip is `num_frames` frames at `fps`, resampled by time. Sample j of step k depends on (seed, k, j) and on the files
alone: an epoch shows every clip once, in an order of its own, and a file that turns out broken on the way is replaced
by the next one of that order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from unspool.data.batch import Batch
from unspool.data.captions_io import Layout, NamePattern, read_captions
from unspool.data.decode import Filter, Fit, Picture, VideoInfo, probe, rate, read_frames
from unspool.data.listing import EpochOrder, check_seed, draw_below, global_samples
from unspool.data.skips import SkipReport
from unspool.geometry import Geometry
from unspool.log import get_logger

Mode = Literal["head", "slide", "uniform", "random"]
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class VideoFolderConfig:
    """Which clips are cut out of which videos.

    Fields: `path` a folder, or a metadata file; `height_px`, `width_px`, `num_frames` (1 + `temporal` k) and `fps` of
    every clip; `mode` "head" the first clip of each video, "slide" one every `stride` frames (None: end to end),
    "uniform" `clips_per_video` spread evenly, "random" one whose place is drawn anew in each epoch; `num_repeats` how
    often an epoch shows each of them; `short` what becomes of a video with fewer frames: left out, repeated from its
    start, or its last frame held; `fit`, `filter` see `Picture`; `captions` see `captions_io` ("none": empty captions);
    `name_pattern`, `caption_pattern` make captions of file names; `tail` share at the end of each video that the split
    "train" never sees; a clip of the split "tail" lies in it, or begins at most `tail_context` frames before it;
    `in_memory` keeps every video at this size and rate once it was read (12 kB a frame at 64 px), for folders of few
    videos that are seen often; `workers` threads that decode (0: the caller's).

    Raises ValueError for values that describe no clip.
    """

    path: str = ""
    height_px: int = 64
    width_px: int = 64
    num_frames: int = 81
    fps: float = 16.0
    temporal: int = 4
    mode: Mode = "head"
    stride: int | None = None
    clips_per_video: int = 1
    num_repeats: int = 1
    short: Literal["refuse", "loop", "hold"] = "refuse"
    fit: Fit = "cover"
    filter: Filter = "bicubic"
    captions: Layout | Literal["none"] = "auto"
    name_pattern: str = "{name}"
    caption_pattern: str | None = None
    split: Literal["train", "tail"] = "train"
    tail: float = 0.0
    tail_context: int = 0
    shuffle: bool = True
    seed: int = 0
    in_memory: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        Geometry(temporal=self.temporal).latent_frames(self.num_frames)
        rate(self.fps)
        check_seed(self.seed)
        for name in ("height_px", "width_px", "clips_per_video", "num_repeats", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        for name in ("tail_context", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        if not 0 <= self.tail < 1:
            raise ValueError(f"tail={self.tail}: expected a share in [0, 1), such as 0.2")
        if self.split == "tail" and self.tail == 0:
            raise ValueError("split='tail' with tail=0: nothing is held out; expected a share such as tail=0.2")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of a video: resampled frames from `start` on, inside [`first`, `end`).

    `start` None: drawn in each epoch. `held_out_from`: number within the clip of its first held-out frame; may be
    negative or beyond the clip.
    """

    video: VideoInfo
    name: str
    caption: str
    start: int | None
    first: int
    end: int
    tail_from: int

    def held_out_from(self, start: int) -> int:
        """Which frame of the clip that begins at `start` is the first one of the held-out tail."""
        return self.tail_from - start


class VideoFolder:
    """A `Source` of `pixels`, `captions` and `indices` (implements `Listed`, too).

    `report` holds what was left out so far, `captions_from` one line on where captions come from. Opening reads the
    time stamps of every file. Raises FileNotFoundError, or ValueError where no clip can be made of the folder.
    """

    def __init__(self, config: VideoFolderConfig) -> None:
        if not config.path:
            raise ValueError("got no path; expected a folder of videos; set path=...")
        self.config, self.fps, self.report = config, config.fps, SkipReport()
        self._folder = Path(config.path).expanduser()
        self._picture = Picture(
            height_px=config.height_px, width_px=config.width_px, fit=config.fit, filter=config.filter
        )
        videos = self._captioned()
        probed = _each(self._probe, (path for path, _ in videos), config.workers)
        found = zip(videos, probed, strict=True)
        self._clips = [clip for (_, text), info in found if info is not None for clip in self._cut(info, text)]
        if not self._clips:
            raise ValueError(
                f"{self._folder}: got {len(videos)} captioned videos and none of use; {self.report.summary()}"
            )
        self._order = EpochOrder(len(self), config.seed, shuffle=config.shuffle)
        self._kept: dict[Path, Tensor] = {}  # whole videos as uint8 [n, 3, y, x]
        get_logger(__name__).info("%s: %s", self._folder.name, self.captions_from)
        if self.report:
            get_logger(__name__).warning("%s: %s", self._folder.name, self.report.summary())

    def __len__(self) -> int:
        return len(self._clips) * self.config.num_repeats

    @property
    def num_clips(self) -> int:
        """Different clips; `indices` of a batch count them."""
        return len(self._clips)

    def clip(self, index: int) -> Clip:
        """What clip `index` is."""
        return self._clips[index]

    def frames_of(self, clip: Clip) -> Tensor:
        """All frames of a clip's split of its video, float32 [n, 3, y, x]. Raises ValueError for a broken file."""
        return self._frames(clip.video, range(clip.first, clip.end))

    def name_of(self, entry: int) -> str:
        """File and first frame of an entry of the first epoch: `a.mkv@16`."""
        repeat, index = divmod(entry, self.num_clips)
        return f"{self._clips[index].name}@{self.start_of(index, 0, repeat)}"

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        """Clips of the samples of `rank` at `step`; see `Source`."""
        samples = global_samples(step, size, rank=rank, world=world)
        return self._join(_each(self._sample, samples, self.config.workers))

    def clips(self, entries: Sequence[int]) -> Batch:
        """Entries of the first epoch by number, without those that turn out broken."""
        found = _each(lambda entry: self._load(entry, 0), entries, self.config.workers)
        return self._join([item for item in found if item is not None])

    def describe(self) -> dict[str, object]:
        """Provenance: the settings, and a digest of the names, sizes and captions of all clips."""
        digest = hashlib.sha256()
        for clip in self._clips:
            size = clip.video.path.stat().st_size
            digest.update(f"{clip.name}\0{size}\0{clip.start}\0{clip.caption}\n".encode())
        kept = {
            name: value for name, value in asdict(self.config).items() if name not in ("path", "workers", "in_memory")
        }
        return {"source": "videos", "folder": self._folder.name, **kept, "sha256": digest.hexdigest()}

    def start_of(self, index: int, epoch: int = 0, repeat: int = 0) -> int:
        """The first frame of clip `index` in an epoch: its own place, or a drawn one."""
        clip = self._clips[index]
        if clip.start is not None:
            return clip.start
        room = max(clip.end - clip.first - self.config.num_frames, 0) + 1
        return clip.first + draw_below(room, self.config.seed, epoch, index + repeat * self.num_clips)

    def _captioned(self) -> list[tuple[Path, str]]:
        config = self.config
        if config.captions == "none":
            pattern = NamePattern(name="{name}", caption="")
            found = read_captions(self._folder, layout="pattern", pattern=pattern)
        else:
            text = config.caption_pattern
            pattern_or_none = NamePattern(name=config.name_pattern, caption=text) if text is not None else None
            found = read_captions(self._folder, layout=config.captions, pattern=pattern_or_none)
        for name, reason in found.skipped:
            self.report.add(name, "without file or caption", reason)
        self.captions_from = found.summary()
        return list(found.videos)

    def _probe(self, path: Path) -> VideoInfo | None:
        try:
            return probe(path)
        except (ValueError, OSError) as error:
            self.report.add(self._name(path), "broken", _one_line(error))
            return None

    def _cut(self, video: VideoInfo, caption: str) -> list[Clip]:
        """All clips of one video, none where it is too short."""
        config, total = self.config, video.num_frames(self.config.fps)
        tail_from = total - round(total * config.tail)
        first, end = (0, tail_from) if config.split == "train" else (max(tail_from - config.tail_context, 0), total)
        name, room = self._name(video.path), end - first - config.num_frames
        if room < 0 and (config.short == "refuse" or first == end):
            part = "" if config.tail == 0 else f" in the split {config.split!r}"
            reason = f"{end - first} of {config.num_frames} frames at {config.fps:g} fps{part}"
            self.report.add(name, "too short", reason)
            return []
        starts: Iterable[int | None]
        if config.mode == "random" and room > 0:
            starts = [None]
        elif config.mode == "slide":
            starts = range(first, first + max(room, 0) + 1, config.stride or config.num_frames)
        elif config.mode == "uniform" and config.clips_per_video > 1:
            parts = config.clips_per_video - 1
            # a video with little room gives fewer clips rather than one of them twice
            starts = sorted({first + round(max(room, 0) * part / parts) for part in range(parts + 1)})
        elif config.mode == "uniform":
            starts = [first + max(room, 0) // 2]
        else:
            starts = [first]
        return [
            Clip(video=video, name=name, caption=caption, start=start, first=first, end=end, tail_from=tail_from)
            for start in starts
        ]

    def _sample(self, sample: int) -> tuple[Tensor, str, int]:
        """The clip of a running sample number, or the next readable one in the order of its epoch."""
        for step in range(len(self)):
            epoch, position = divmod(sample, len(self))
            _, entry = self._order.at(epoch * len(self) + (position + step) % len(self))
            found = self._load(entry, epoch)
            if found is not None:
                return found
        raise ValueError(f"{self._folder}: got no clip that can be decoded; {self.report.summary()}")

    def _load(self, entry: int, epoch: int) -> tuple[Tensor, str, int] | None:
        repeat, index = divmod(entry, self.num_clips)
        clip = self._clips[index]
        start, length = self.start_of(index, epoch, repeat), clip.end - clip.first
        numbers: list[int] = []
        for number in range(start, start + self.config.num_frames):
            if number >= clip.end:
                number = clip.end - 1 if self.config.short == "hold" else clip.first + (number - clip.first) % length
            numbers.append(number)
        try:
            return self._frames(clip.video, numbers), clip.caption, index
        except (ValueError, OSError) as error:
            self.report.add(clip.name, "broken", _one_line(error))
            return None

    def _frames(self, video: VideoInfo, numbers: Sequence[int]) -> Tensor:
        if not self.config.in_memory:
            return read_frames(video, numbers, self.config.fps, self._picture)
        if video.path not in self._kept:
            whole = read_frames(video, range(video.num_frames(self.config.fps)), self.config.fps, self._picture)
            self._kept[video.path] = whole.add(1).mul(127.5).round().to(torch.uint8)
        return self._kept[video.path][list(numbers)].float().div(127.5).sub(1)

    def _join(self, found: Sequence[tuple[Tensor, str, int]]) -> Batch:
        if not found:
            return Batch(captions=(), indices=torch.empty(0, dtype=torch.int64))
        return Batch(
            pixels=torch.stack([frames for frames, _, _ in found]),
            captions=tuple((caption,) for _, caption, _ in found),
            indices=torch.tensor([index for _, _, index in found], dtype=torch.int64),
        )

    def _name(self, path: Path) -> str:
        folder = self._folder if self._folder.is_dir() else self._folder.parent
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _each(function: Callable[[Item], Made], items: Iterable[Item], workers: int) -> list[Made]:
    """The results in order; decoding leaves Python's lock, so threads share out the work."""
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
