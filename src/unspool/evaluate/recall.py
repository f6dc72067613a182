"""How well a network that was trained on a few videos gives them back: nearest clip, and the tails it never saw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def distances(generated: Sequence[Frames], clips: Sequence[Frames]) -> NDArray[np.float64]:
    """Mean squared error [generated, clips] of pixels in [0, 1], each at the place in time where it is least.

    The shorter of the two is laid over the longer one at every offset, so a clip that begins in the middle of its
    video is as near as one that begins at its start. Raises ValueError for frames of different sizes, or none.
    """
    if not generated or not clips:
        raise ValueError(f"{len(generated)} generated clips, {len(clips)} videos: expected at least one of each")
    sizes = {frames.shape[1:] for frames in (*generated, *clips)}
    if len(sizes) > 1 or any(len(frames) == 0 for frames in (*generated, *clips)):
        raise ValueError(f"frames of {sorted(sizes)}: expected one size for all, and at least one frame of each")
    return np.array([[_distance(made, clip) for clip in clips] for made in generated])


def _distance(a: Frames, b: Frames) -> float:
    short, long = sorted((a, b), key=len)
    short_f, long_f = short.astype(np.float32) / 255, long.astype(np.float32) / 255
    count = len(short)
    return min(float(np.square(long_f[i : i + count] - short_f).mean()) for i in range(len(long) - count + 1))


def share_nearest_own(table: NDArray[np.float64], own: Sequence[int]) -> float:
    """Share of the rows of `distances` whose least entry is in column `own`."""
    return float(np.mean(table.argmin(axis=1) == np.asarray(own)))


def nearest_frame_psnr(made: Frames, clips: Sequence[Frames]) -> NDArray[np.float64]:
    """PSNR in dB of each frame of `made` against the nearest frame of each clip, [frames, clips].

    Right for a stream that is longer than its video and goes through it in an order of its own; blind to that order.
    Raises ValueError for frames of different sizes, or none.
    """
    sizes = {frames.shape[1:] for frames in (made, *clips)}
    if not clips or len(sizes) > 1 or any(len(frames) == 0 for frames in (made, *clips)):
        raise ValueError(f"{len(clips)} videos, frames of {sorted(sizes)}: expected at least one, and one size for all")
    own = made.reshape(len(made), -1).astype(np.float64) / 255
    errors = []
    for clip in clips:
        real = clip.reshape(len(clip), -1).astype(np.float64) / 255
        squares = np.square(own).sum(1)[:, None] - 2 * own @ real.T + np.square(real).sum(1)
        errors.append(squares.min(1) / own.shape[1])
    return -10 * np.log10(np.maximum(np.stack(errors, 1), 1e-10))


def mean_change(frames: Frames) -> float:
    """Mean absolute change of a pixel from one frame to the next, in [0, 1]; 0 for a still picture."""
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} frames: expected at least two")
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() / 255)


def psnr_by_frame(made: Sequence[Frames], true: Sequence[Frames]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(mean PSNR in dB of frame k over the clips that have one, number of these clips), for clips of any length.

    Raises ValueError where a clip and its truth are of different shapes.
    """
    for a, b in zip(made, true, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"frames of shape {a.shape} beside truth of shape {b.shape}; expected the same")
    longest = max(map(len, true), default=0)
    values: list[list[float]] = [[] for _ in range(longest)]
    for a, b in zip(made, true, strict=True):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            error = float(np.square(x.astype(np.float64) - y).mean())
            values[k].append(10 * np.log10(255.0**2 / max(error, 1e-5)))
    return np.array([np.mean(v) for v in values]), np.array([len(v) for v in values])


__all__ = ["Frames", "distances", "mean_change", "nearest_frame_psnr", "psnr_by_frame", "share_nearest_own"]
