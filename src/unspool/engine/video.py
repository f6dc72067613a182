"""A finished clip: its frames, how it was made, how fast; shown by notebooks and written to files."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from unspool.engine.export import Frames, contact_sheet, time_labels, write_video
from unspool.engine.record import Record
from unspool.engine.timing import Timing

if TYPE_CHECKING:
    from PIL.Image import Image

Filter = Literal["nearest", "lanczos"]
WATCHABLE_PX = 256
SHEET_TILES = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Frames uint8 `[n, h, w, 3]` at `fps`, the `record` that makes them again, times, and notes about the prompts."""

    frames: Frames
    fps: float
    record: Record
    timing: Timing
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps

    def save(self, path: str | os.PathLike[str], *, scale: int | None = None, filter: Filter = "lanczos") -> Path:
        """Write .mp4, .gif, .webp, .png (a sheet) or .npy with the record in the metadata, and return the path.

        `scale` enlarges mp4, gif and webp for viewing (None: to about 256 px); .npy holds the frames as they are.
        Raises ValueError for a target that cannot be written.
        """
        target = Path(path)
        factor = scale_for(target, self.frames.shape[1:3], scale)
        frames = enlarged([self.frames], factor, filter)
        return write_video(target, frames, self.fps, metadata=self.record.to_dict())

    def sheet(self, tiles: int = SHEET_TILES) -> Image:
        """A picture of up to `tiles` frames, evenly spaced and labelled with their times."""
        indices = np.unique(np.linspace(0, len(self.frames) - 1, min(tiles, len(self.frames))).round().astype(int))
        labels = time_labels(indices.tolist(), self.fps)
        return contact_sheet(self.frames[indices], scale=-(-128 // self.frames.shape[2]), labels=labels)

    def _repr_html_(self) -> str:
        """What a notebook shows: the video itself, embedded, under its prompt."""
        from html import escape

        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder) / "video.mp4").read_bytes()).decode()
        return (
            f"<p>{escape(self.record.prompt)}</p>"
            f'<video controls loop autoplay muted src="data:video/mp4;base64,{data}"></video>'
        )

    def __repr__(self) -> str:
        height, width = self.frames.shape[1:3]
        return f"Video({len(self)} frames of {width}x{height} px at {self.fps:g}/s: {self.record.prompt[:60]!r})"


def scale_for(target: Path, size: tuple[int, ...], scale: int | None) -> int:
    """How often frames of `size` are enlarged for `target`: as asked, else to about 256 px where people will watch.

    Raises ValueError for a scale below 1 or for a file of raw frames.
    """
    if scale is not None and not 1 <= scale <= 64:
        raise ValueError(f"scale={scale}: expected 1 (as they are) to 64")
    if target.suffix.lower() in (".npy", ".png"):
        if scale not in (None, 1):
            raise ValueError(f"scale={scale}: {target.suffix} holds frames as they are; leave it out, or write .mp4")
        return 1
    return scale if scale is not None else max(1, WATCHABLE_PX // min(size))


def enlarged(chunks: Iterable[Frames], scale: int, filter: Filter = "lanczos") -> Iterator[Frames]:
    """Chunks of frames `scale` times as large: pixels repeated ("nearest") or smooth ("lanczos")."""
    from PIL import Image

    if filter not in ("nearest", "lanczos"):
        raise ValueError(f"filter={filter!r}: expected 'nearest' or 'lanczos'")
    for chunk in chunks:
        if scale == 1:
            yield chunk
        elif filter == "nearest":
            yield chunk.repeat(scale, axis=1).repeat(scale, axis=2)
        else:
            size = (chunk.shape[2] * scale, chunk.shape[1] * scale)
            images = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in chunk]
            yield np.stack([np.asarray(image) for image in images])
