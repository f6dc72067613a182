"""Small videos made on the fly: every frame says by its brightness which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LEVELS = 200


def level(index: int) -> int:
    """Brightness of frame `index`."""
    return 20 + 6 * index % LEVELS


def write_clip(
    path: Path,
    frames: int | Sequence[np.ndarray],
    *,
    fps: int = 16,
    size: tuple[int, int] = (32, 48),
    stamps_ms: Sequence[int] | None = None,
    rotation: int | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """A video of flat frames (frame i as bright as `level(i)`), or of the given ones; `stamps_ms`: its own times."""
    import av

    if isinstance(frames, int):
        frames = [np.full((*size, 3), level(i), np.uint8) for i in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "2", "preset": "ultrafast", "g": "8"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if stamps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            if stamps_ms is not None:
                frame.pts, frame.time_base = stamps_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_numbers(pixels: Tensor) -> list[int]:
    """Which frame of `write_clip` each of [f, 3, y, x] is."""
    found = ((pixels.mean((1, 2, 3)) + 1) * 127.5 - 20) / 6
    return [int(number) for number in torch.round(found)]
