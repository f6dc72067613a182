"""Frames out of a video file at exact times: PyAV for decoding, `F.interpolate` for resizing, nothing else.

Times are exact fractions of a second counted from the first frame shown. Resampling is by time and takes the nearest
source frame (the earlier one of two equally near): no frame rate is assumed, so variable ones come out right. There is
no filter in time.
"""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

Fit = Literal["cover", "fit"]
Filter = Literal["bicubic", "bilinear"]

LEAST_SHARE = Fraction(1, 4)
"""A resampled frame exists when the video lasts for at least this share of its period: time stamps are rounded, to
milliseconds in Matroska, and without it a video resampled to its own rate could gain a frame."""

_SEEK_FROM_S = 2
"""Decoding from the start is cheaper, and safer with broken indexes, than seeking within the first seconds."""
_STATED_SHARE, _STATED_SLACK_S = Fraction(5, 4), Fraction(1, 2)
"""A file that holds less than it states by this factor and these seconds was cut off or is damaged."""
_HD_ROWS = 720
_ITU601, _ITU709, _UNSPECIFIED = 5, 1, 2
"""FFmpeg's numbers of colour matrices (AVCOL_SPC_BT470BG, _BT709, _UNSPECIFIED)."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What is known of a video without decoding it all.

    Fields: `start` time stamp of the first frame shown, in seconds; `last`, `duration` seconds from it to the beginning
    and to the end of the last frame; `num_source_frames`; `pixel_aspect` width of a stored pixel over its height.
    """

    path: Path
    start: Fraction
    last: Fraction
    duration: Fraction
    num_source_frames: int
    pixel_aspect: Fraction

    def num_frames(self, fps: float) -> int:
        """Frames at `fps` that the video holds: frame i stands at i / fps seconds."""
        return max(1, math.ceil(self.duration * rate(fps) - LEAST_SHARE))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """How frames are brought to one size.

    Fields: `height_px`, `width_px`; `fit` "cover" fills the picture and cuts what stands over, evenly at both sides,
    "fit" shows all of it with black borders; `filter` of the resizing, always antialiased.
    """

    height_px: int
    width_px: int
    fit: Fit = "cover"
    filter: Filter = "bicubic"


def rate(fps: float) -> Fraction:
    """29.97 -> 30000/1001. Raises ValueError for a rate that is none."""
    if not 0.01 <= fps <= 1000:  # also refuses NaN
        raise ValueError(f"fps={fps}: expected frames per second between 0.01 and 1000")
    return Fraction(fps).limit_denominator(1001)


def probe(path: Path) -> VideoInfo:
    """Read all time stamps and decode one frame. Raises ValueError saying why the file is of no use as a video."""
    with _opened(path) as (container, stream):
        base = _time_base(stream)
        stamps, last_duration = _stamps(container, stream)
        if not stamps:
            raise ValueError("holds no frame")
        if last_duration <= 0:
            gaps = sorted(b - a for a, b in itertools.pairwise(stamps))
            guess = stream.average_rate
            last_duration = gaps[len(gaps) // 2] if gaps else round(1 / (guess * base)) if guess else 1
        container.seek(0)
        if next(iter(container.decode(stream)), None) is None:
            raise ValueError("holds no frame that can be decoded")
        aspect = stream.sample_aspect_ratio
        found = (stamps[-1] - stamps[0] + last_duration) * base
        # where other streams are there, it may be the sound that is longer
        stated = Fraction(container.duration or 0, 1_000_000) if len(container.streams) == 1 else Fraction(0)
        if stated > found * _STATED_SHARE + _STATED_SLACK_S:
            raise ValueError(f"breaks off after {float(found):.2f} of {float(stated):.2f} s")
    return VideoInfo(
        path=path,
        start=stamps[0] * base,
        last=(stamps[-1] - stamps[0]) * base,
        duration=found,
        num_source_frames=len(stamps),
        pixel_aspect=Fraction(aspect) if aspect else Fraction(1),
    )


def read_frames(info: VideoInfo, numbers: Sequence[int], fps: float, picture: Picture) -> Tensor:
    """Frames `numbers` (frame i stands at i / fps seconds; any order, repeats allowed) as float32 [n, 3, y, x] in
    [-1, 1]. Raises ValueError when the file cannot be decoded that far."""
    if not numbers or min(numbers) < 0:
        raise ValueError(f"frame numbers {list(numbers)[:4]}: expected at least one, none negative")
    wanted = sorted(set(numbers))
    times = [number / rate(fps) for number in wanted]
    with _opened(info.path) as (container, stream):
        frames = list(_nearest(_from(container, stream, info, times[0]), times, info, picture))
    of = dict(zip(wanted, frames, strict=True))
    return torch.stack([of[number] for number in numbers])


def resize(frame: Tensor, picture: Picture, *, pixel_aspect: float = 1.0) -> Tensor:
    """One frame uint8 [y, x, 3] as float32 [3, height_px, width_px] in [-1, 1].

    `pixel_aspect` is the shown width of a stored pixel over its height. Nothing is filtered where the sizes agree.
    """
    pixels = frame.permute(2, 0, 1)[None].float().div(127.5).sub(1)
    rows, columns = frame.shape[0], frame.shape[1] * pixel_aspect
    ratios = picture.height_px / rows, picture.width_px / columns
    scale = max(ratios) if picture.fit == "cover" else min(ratios)
    height, width = (max(1, round(side * scale)) for side in (rows, columns))
    if (height, width) != pixels.shape[-2:]:
        pixels = F.interpolate(pixels, (height, width), mode=picture.filter, align_corners=False, antialias=True)
        pixels = pixels.clamp(-1, 1)  # bicubic overshoots at edges
    top, left = (height - picture.height_px) // 2, (width - picture.width_px) // 2
    if picture.fit == "cover":
        return pixels[0, :, top : top + picture.height_px, left : left + picture.width_px].contiguous()
    bottom, right = picture.height_px - height + top, picture.width_px - width + left
    return F.pad(pixels, (-left, right, -top, bottom), value=-1.0)[0]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its first video stream; whatever FFmpeg says becomes a ValueError of one line."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.EPERM:  # what the Matroska reader answers to a file that is cut off
            reason = "the file breaks off"
        raise ValueError(f"cannot be decoded: {reason}") from error


def _time_base(stream: VideoStream) -> Fraction:
    if not stream.time_base:
        raise ValueError("states no time base")
    return Fraction(stream.time_base)


def _stamps(container: InputContainer, stream: VideoStream) -> tuple[list[int], int]:
    """Time stamps of all shown frames in order, and the duration of the last one (0: not stated), in time bases."""
    ticks: dict[int, int] = {}
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:  # the flush packet; what an edit list cuts away
            continue
        if packet.pts is None:  # AVI and raw streams: only the decoder knows
            container.seek(0)
            decoded = [frame.pts for frame in container.decode(stream) if frame.pts is not None]
            return sorted(decoded), 0
        ticks[packet.pts] = packet.duration or 0
    stamps = sorted(ticks)
    return stamps, ticks[stamps[-1]] if stamps else 0


def _from(
    container: InputContainer, stream: VideoStream, info: VideoInfo, time: Fraction
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(time, frame) from a frame at or before `time` on."""
    is_sought = time > _SEEK_FROM_S
    if is_sought:
        container.seek(int((info.start + time) / _time_base(stream)), stream=stream, backward=True)
    is_first = True
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        now = frame.pts * _time_base(stream) - info.start
        if is_first and is_sought and now > time:  # a file whose index lies
            container.seek(0)
            yield from _from_start(container, stream, info)
            return
        is_first = False
        if now >= 0:
            yield now, frame


def _from_start(
    container: InputContainer, stream: VideoStream, info: VideoInfo
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    for frame in container.decode(stream):
        if frame.pts is not None:
            yield frame.pts * _time_base(stream) - info.start, frame


def _nearest(
    frames: Iterator[tuple[Fraction, av.VideoFrame]], times: Sequence[Fraction], info: VideoInfo, picture: Picture
) -> Iterator[Tensor]:
    """For each of the rising `times` the nearest frame, converted once however often it is taken."""
    shown: Tensor | None = None
    held: tuple[Fraction, av.VideoFrame] | None = None
    done = 0
    for now, frame in frames:
        while done < len(times) and held is not None and 2 * times[done] <= held[0] + now:
            shown = _convert(held[1], info, picture) if shown is None else shown
            yield shown
            done += 1
        if done == len(times):
            return
        held, shown = (now, frame), None
    if held is None:
        raise ValueError("holds no frame that can be decoded")
    # decoders may drop a damaged last frame or two; more means that the file breaks off inside
    if min(times[-1], info.last) - held[0] > 2 * info.duration / info.num_source_frames:
        raise ValueError(f"breaks off after {float(held[0]):.2f} s; {float(times[-1]):.2f} s were asked for")
    shown = _convert(held[1], info, picture) if shown is None else shown
    for _ in range(done, len(times)):
        yield shown


def _convert(frame: av.VideoFrame, info: VideoInfo, picture: Picture) -> Tensor:
    matrix = None
    if int(frame.colorspace) == _UNSPECIFIED:  # as players do: by the size
        matrix = _ITU709 if frame.height >= _HD_ROWS else _ITU601
    rgb = torch.from_numpy(frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray())
    # counter-clockwise quarter turns, which telephones ask for; other angles are rounded
    turns = round(frame.rotation / 90) % 4
    aspect = float(1 / info.pixel_aspect if turns % 2 else info.pixel_aspect)
    return resize(rgb.rot90(turns, (0, 1)), picture, pixel_aspect=aspect)
