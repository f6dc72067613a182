"""How long a stream takes, by the definitions that all claims of this project use.

`first_frame_ms`: from the submitted prompt to the first uint8 frames on the host, those of the whole first chunk unless
it is given by pieces: text encoding, every step and the decoder included, time in which the caller did something else
excluded. `fps`: frames per second of work from
the third chunk on; the commit pass of a chunk runs in the call for the next one, so it is counted. `chunk_ms`: time of
one chunk over the same chunks. Copying to the host waits for the device, so device time is in all of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

WARM_UP_CHUNKS = 2
KEPT_CHUNKS = 1000  # the statistics of an endless stream are those of its last chunks


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Measured times; None where a clip was too short to tell."""

    frames: int
    chunks: int
    work_s: float
    first_frame_ms: float | None
    fps: float | None
    chunk_ms_p50: float | None
    chunk_ms_p95: float | None
    chunk_ms_max: float | None
    realtime: float | None
    """`fps` over the frames per second at which the video is shown: at 1 or more it can be watched live."""

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers, rounded for reading."""
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        parts = [f"{self.frames} frames in {self.work_s:.2f} s"]
        if self.fps is not None:
            parts.append(f"{self.fps:.1f} frames/s steady ({self.realtime:.2f} x real time)")
        if self.first_frame_ms is not None:
            parts.append(f"first frame after {self.first_frame_ms:.0f} ms")
        if self.chunk_ms_p50 is not None:
            parts.append(f"chunk {self.chunk_ms_p50:.0f} ms (p95 {self.chunk_ms_p95:.0f}, max {self.chunk_ms_max:.0f})")
        return ", ".join(parts)


class StopWatch:
    """Adds up the work of one stream."""

    def __init__(self, video_fps: float) -> None:
        self._video_fps = video_fps
        self._pending_s = 0.0  # work since the last finished chunk: set-up, or a chunk that was cancelled
        self._first_s: float | None = None
        self._frames = self._chunks = 0
        self._work_s = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=KEPT_CHUNKS)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Time spent inside counts, whether it succeeds or not."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._pending_s += time.perf_counter() - began

    def leaves(self) -> None:
        """Frames are on the host before their chunk is complete."""
        if self._first_s is None:
            self._first_s = self._pending_s

    def chunk(self, frames: int) -> None:
        """A chunk of `frames` is on the host; all work since the last one was for it."""
        took, self._pending_s = self._pending_s, 0.0
        if self._first_s is None:
            self._first_s = took
        if self._chunks >= WARM_UP_CHUNKS:
            self._recent.append((frames, took))
        self._frames, self._chunks, self._work_s = self._frames + frames, self._chunks + 1, self._work_s + took

    def timing(self) -> Timing:
        """What is known so far."""
        recent = self._recent.copy()  # whoever asks may be another thread than the one that works
        times = sorted(took for _, took in recent)
        total = sum(times)
        fps = sum(frames for frames, _ in recent) / total if total else None
        return Timing(
            frames=self._frames,
            chunks=self._chunks,
            work_s=self._work_s,
            first_frame_ms=None if self._first_s is None else 1000 * self._first_s,
            fps=fps,
            chunk_ms_p50=_quantile_ms(times, 0.5),
            chunk_ms_p95=_quantile_ms(times, 0.95),
            chunk_ms_max=_quantile_ms(times, 1.0),
            realtime=None if fps is None else fps / self._video_fps,
        )


def _quantile_ms(times: list[float], share: float) -> float | None:
    """The nearest-rank quantile of sorted seconds."""
    return (
        1000 * times[min(len(times) - 1, max(0, -(-round(share * 1000 * len(times)) // 1000) - 1))] if times else None
    )
