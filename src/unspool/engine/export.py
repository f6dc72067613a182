"""Frames to a file: video, picture or array, written whole or not at all.

Frames are uint8 RGB numpy arrays `[n, h, w, 3]`. The suffix of the target chooses the format. Everything is written to
a hidden file beside the target and renamed at success; at any failure, KeyboardInterrupt included, it is removed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unspool.engine.files import check_writable, replacing
from unspool.log import notice_once

if TYPE_CHECKING:
    from PIL.Image import Image

Frames = NDArray[np.uint8]
"""uint8 RGB frames `[n, h, w, 3]`."""

SHEET_MAX_TILES = 64
SHEET_COLUMNS = 8
SHEET_TILE_PX = 128
LABEL_STRIP_PX = 14
IMAGE_DESCRIPTION = 0x010E
"""The EXIF tag that holds the metadata of a WebP."""


Comment = Callable[[], "str | None"]
Metadata = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
"""JSON data, or a function that gives it once the last frame is written (a hash of the frames, how long it took)."""


def write_video(path: str | Path, frames: Iterable[Frames], fps: float, *, metadata: Metadata | None = None) -> Path:
    """Write chunks of frames to `path` as they arrive and return the path.

    `.mp4` H.264 yuv420p BT.709 (an odd height or width is padded by repeating the last row or column); `.gif`
    (fps rounded to hundredths of a second); `.webp` animated, smaller than a gif (frames that look alike are joined);
    `.png` a contact sheet of up to 64 frames; `.npy` the array itself.
    `metadata` is JSON data kept in the comment tag, for `.npy` in `<name>.npy.json`; `read_metadata` returns it.

    Raises ValueError before the first frame is asked for if the target cannot be written, the suffix is unknown, or fps
    or metadata are unusable; later for frames of a wrong or changing shape, or none at all.
    """
    target = check_target(path)
    comment = _comment(metadata)
    rate = _rate(fps)
    suffix = target.suffix.lower()
    with replacing(target) as file:
        if suffix == ".mp4" and callable(metadata):  # this format wants its tags before the first frame
            _write_mp4(file, _checked(frames), rate, lambda: None)
            _tag_mp4(file, comment())
        else:
            WRITERS[suffix](file, _checked(frames), rate, comment)
        if suffix == ".npy":
            _write_sidecar(target, comment())
    return target


def check_target(path: str | Path) -> Path:
    """Refuse a target that `write_video` could not write, before any work is spent on its content.

    Raises ValueError for an unknown suffix, a missing folder, a folder in the file's place, or no permission.
    """
    target = Path(path)
    if target.suffix.lower() not in WRITERS:
        raise ValueError(f"{target}: cannot write {target.suffix or 'a file without suffix'}; use {', '.join(WRITERS)}")
    check_writable(target)
    return target


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `write_video` stored; an empty dict where there is none.

    Raises FileNotFoundError, or ValueError for a suffix that this module does not write or a file it cannot read.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    suffix = source.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"{source}: no metadata in {suffix or 'a file without suffix'}; known: {', '.join(WRITERS)}")
    try:
        text = _read_comment(source, suffix)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: not a readable {suffix} file: {error}") from error
    try:
        data = json.loads(text) if text else {}
    except ValueError:
        return {}  # somebody else's comment
    return data if isinstance(data, dict) else {}


def contact_sheet(
    frames: Frames, *, columns: int = SHEET_COLUMNS, scale: int = 1, labels: Sequence[str] | None = None
) -> Image:
    """All frames as tiles of one picture, row by row, enlarged `scale` times by repetition so that pixels stay exact.

    `labels` (one per frame, e.g. from `time_labels`) stand in a strip under each tile; None gives no strip.
    """
    from PIL import Image, ImageDraw

    frames = _checked_chunk(frames, None)
    count, height, width, _ = frames.shape
    if count == 0:
        raise ValueError("a contact sheet needs at least one frame, got none")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}: both must be at least 1")
    if labels is not None and len(labels) != count:
        raise ValueError(f"got {len(labels)} labels for {count} frames; give one each")
    columns = min(columns, count)
    rows = -(-count // columns)
    tile_w, tile_h = width * scale, height * scale
    cell_h = tile_h + (LABEL_STRIP_PX if labels is not None else 0)
    gap = 2
    sheet = Image.new("RGB", (columns * (tile_w + gap) - gap, rows * (cell_h + gap) - gap), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for index, frame in enumerate(frames):
        left, top = (index % columns) * (tile_w + gap), (index // columns) * (cell_h + gap)
        tile = Image.fromarray(frame).resize((tile_w, tile_h), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        if labels is not None:
            draw.text((left + 2, top + tile_h + 1), labels[index], fill=(235, 235, 235))
    return sheet


def time_labels(indices: Iterable[int], fps: float) -> list[str]:
    """`#12 0.75s` for frame 12 at 16 frames per second."""
    return [f"#{index} {index / fps:.2f}s" for index in indices]


def _sidecar(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _comment(metadata: Metadata | None) -> Comment:
    if callable(metadata):
        return lambda: _to_json(metadata())
    text = None if metadata is None else _to_json(metadata)
    return lambda: text


def _to_json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be plain JSON data (text, finite numbers, lists, dicts): {error}") from error


def _rate(fps: float) -> Fraction:
    if not 0.01 <= fps <= 1000:  # also refuses NaN
        raise ValueError(f"fps={fps}: expected frames per second between 0.01 and 1000")
    return Fraction(fps).limit_denominator(1001)


def _checked(chunks: Iterable[Frames]) -> Iterator[Frames]:
    """The chunks that hold frames; ValueError for a wrong array, a changed size, or nothing in all of them."""
    size: tuple[int, ...] | None = None
    is_empty = True
    for chunk in [chunks] if isinstance(chunks, np.ndarray) else chunks:
        size = _checked_chunk(chunk, size).shape[1:]
        if len(chunk):
            is_empty = False
            yield chunk
    if is_empty:
        raise ValueError("no frames to write: the source ended before its first frame")


def _checked_chunk(chunk: Frames, size: tuple[int, ...] | None) -> Frames:
    if not isinstance(chunk, np.ndarray) or chunk.dtype != np.uint8 or chunk.ndim != 4 or chunk.shape[3] != 3:
        shape, dtype = getattr(chunk, "shape", None), getattr(chunk, "dtype", type(chunk).__name__)
        got = f"{dtype}" + (f" {list(shape)}" if shape is not None else "")
        raise ValueError(f"got frames {got}, expected a uint8 numpy array [n, h, w, 3]")
    if 0 in chunk.shape[1:3]:
        raise ValueError(f"got frames of {chunk.shape[1]}x{chunk.shape[2]} px; both sides must be at least 1")
    if size is not None and chunk.shape[1:] != size:
        raise ValueError(f"frames changed from {size[0]}x{size[1]} to {chunk.shape[1]}x{chunk.shape[2]} px")
    return chunk


def _write_mp4(path: Path, chunks: Iterator[Frames], rate: Fraction, comment: Comment) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    first = next(chunks)
    height, width = (side + side % 2 for side in first.shape[1:3])
    if (height, width) != first.shape[1:3]:
        notice_once(
            "odd-video-size",
            f"H.264 video needs even sides: {first.shape[1]}x{first.shape[2]} px is written as {height}x{width} px, "
            "the last row or column repeated",
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        text = comment()
        if text is not None:
            container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Tagged, because players guess the matrix from the frame size and would shift the colours of small videos.
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = 1  # both BT.709
        for chunk in itertools.chain([first], chunks):
            padding = ((0, 0), (0, height - chunk.shape[1]), (0, width - chunk.shape[2]), (0, 0))
            for image in np.pad(chunk, padding, mode="edge"):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _tag_mp4(path: Path, comment: str | None) -> None:
    """Put the comment tag into a finished file; its frames are copied, not encoded again."""
    import av

    with (
        replacing(path) as tagged,
        av.open(str(path)) as source,
        av.open(str(tagged), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:  # the last packet is empty
                packet.stream = stream
                container.mux(packet)


def _write_gif(path: Path, chunks: Iterator[Frames], rate: Fraction, comment: Comment) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for chunk in chunks for frame in chunk]
    # GIF counts hundredths of a second: round the running time, not each frame, so that long clips keep their length.
    ends = [round(100 * (index + 1) / rate) for index in range(len(images))]
    durations_ms = [10 * max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    images[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=durations_ms,
        loop=0,
        comment=(comment() or "").encode(),
    )


def _write_webp(path: Path, chunks: Iterator[Frames], rate: Fraction, comment: Comment) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for chunk in chunks for frame in chunk]
    ends_ms = [round(1000 * index / rate) for index in range(len(images) + 1)]
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = comment() or ""
    images[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=images[1:],
        duration=[end - start for start, end in itertools.pairwise(ends_ms)],
        loop=0,
        quality=80,
        exif=exif,
    )


def _write_png(path: Path, chunks: Iterator[Frames], rate: Fraction, comment: Comment) -> None:
    from PIL.PngImagePlugin import PngInfo

    kept: list[tuple[int, NDArray[np.uint8]]] = []
    every = 1  # doubled whenever the sheet is full, so a stream of any length needs little memory
    for index, frame in enumerate(frame for chunk in chunks for frame in chunk):
        if index % every == 0:
            kept.append((index, frame.copy()))
        if len(kept) > SHEET_MAX_TILES:
            kept, every = kept[::2], 2 * every
    indices, tiles = zip(*kept, strict=True)
    frames = np.stack(tiles)
    info = PngInfo()
    text = comment()
    if text is not None:
        info.add_text("Comment", text)
    scale = -(-SHEET_TILE_PX // frames.shape[2])
    sheet = contact_sheet(frames, scale=scale, labels=time_labels(indices, float(rate)))
    sheet.save(path, format="PNG", pnginfo=info)


def _write_npy(path: Path, chunks: Iterator[Frames], rate: Fraction, comment: Comment) -> None:
    with open(path, "wb") as file:  # given a path, numpy would append .npy to it
        np.save(file, np.concatenate(list(chunks)), allow_pickle=False)


def _write_sidecar(target: Path, comment: str | None) -> None:
    if comment is None:
        _sidecar(target).unlink(missing_ok=True)  # that of a file which is being replaced
        return
    with replacing(_sidecar(target)) as file:
        file.write_text(comment, encoding="utf-8")


def _read_comment(source: Path, suffix: str) -> str:
    if suffix == ".npy":
        sidecar = _sidecar(source)
        return sidecar.read_text(encoding="utf-8") if sidecar.is_file() else ""
    if suffix == ".mp4":
        import av

        with av.open(str(source)) as container:
            return container.metadata.get("comment", "")
    from PIL import Image

    with Image.open(source) as image:
        image.load()
        if suffix == ".webp":
            return str(image.getexif().get(IMAGE_DESCRIPTION, ""))
        comment = image.info.get("comment" if suffix == ".gif" else "Comment", "")
    return comment.decode() if isinstance(comment, bytes) else str(comment)


Writer = Callable[[Path, Iterator[Frames], Fraction, Comment], None]

WRITERS: dict[str, Writer] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_png,
    ".npy": _write_npy,
}
"""Suffix -> function that writes all chunks to a path."""
