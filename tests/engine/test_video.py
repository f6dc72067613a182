"""What a finished clip and its file carry, how it is enlarged, and what times mean."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from tiny_model import shared

from unspool.engine.export import read_metadata, write_video
from unspool.engine.record import Record, read_record
from unspool.engine.timing import StopWatch
from unspool.engine.video import enlarged, scale_for

RED, BLUE = "a red ball bounces at sunset", "a blue star drifts left at night"


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png", ".npy"])
def test_every_format_carries_the_record_that_makes_the_frames_again(tmp_path: Path, suffix: str) -> None:
    clip = shared().generate("résumé 映画 " + RED, frames=20, seed=9, switches=[(0.5, BLUE)], guidance=1.5)
    record = read_record(clip.save(tmp_path / f"a{suffix}"))
    assert record == clip.record and record.settings.guidance_scale == 1.5 and record.events[0].prompt == BLUE
    assert (np.concatenate(list(shared().replay(record))) == clip.frames).all()
    if suffix == ".npy":
        assert (np.load(tmp_path / "a.npy") == clip.frames).all()


def test_metadata_may_come_after_the_last_frame(tmp_path: Path) -> None:
    seen: list[int] = []
    frames = np.full((3, 16, 16, 3), 90, np.uint8)

    def chunks():  # type: ignore[no-untyped-def]
        for _ in range(2):
            yield frames
            seen.append(1)

    for suffix in (".mp4", ".gif", ".webp", ".png", ".npy"):
        seen.clear()
        path = write_video(tmp_path / f"a{suffix}", chunks(), 16, metadata=lambda: {"chunks": len(seen)})
        assert read_metadata(path) == {"chunks": 2}
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert sum(1 for _ in container.decode(stream)) == 6 and stream.average_rate == 16
        assert stream.codec_context.colorspace == 1  # BT.709 survives the copy
    with pytest.raises(ValueError, match="plain JSON data"):
        write_video(tmp_path / "b.mp4", [frames], 16, metadata=lambda: {"bad": object()})
    assert not [file for file in tmp_path.iterdir() if file.name.startswith((".", "b"))]


def test_records_of_others_are_refused(tmp_path: Path) -> None:
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    for data, message in (
        ({}, "no unspool record"),
        ({"format": "unspool-video", "version": 9, "unspool": "8.0"}, r"version 9, expected 1; .*8\.0"),
        ({"format": "unspool-video", "version": 1}, "missing"),
    ):
        write_video(tmp_path / "a.npy", [frames], 16, metadata=data)
        with pytest.raises(ValueError, match=message):
            read_record(tmp_path / "a.npy")
    record = shared().generate(RED, frames=1).record
    assert Record.parse(record.to_dict(), where="x") == record


def test_enlarging(tmp_path: Path) -> None:
    chunk = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    (near,) = enlarged([chunk], 3, "nearest")
    (smooth,) = enlarged([chunk], 3, "lanczos")
    assert near.shape == smooth.shape == (2, 12, 18, 3)
    assert (near[:, 1::3, 1::3] == chunk).all() and (near != smooth).any()
    assert next(enlarged([chunk], 1)) is chunk
    assert scale_for(Path("a.mp4"), (64, 64), None) == 4 and scale_for(Path("a.mp4"), (480, 832), None) == 1
    assert scale_for(Path("a.npy"), (64, 64), None) == 1 and scale_for(Path("a.gif"), (64, 64), 2) == 2
    for path, scale in (("a.npy", 2), ("a.mp4", 0), ("a.mp4", 65)):
        with pytest.raises(ValueError, match="scale="):
            scale_for(Path(path), (64, 64), scale)
    path = shared().generate(RED, frames=2).save(tmp_path / "a.mp4", scale=2)
    with av.open(str(path)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 32)


def test_notebooks_show_the_video_itself() -> None:
    clip = shared().generate("<b> " + RED, frames=4)
    html = clip._repr_html_()
    assert "data:video/mp4;base64," in html and "&lt;b&gt;" in html and "<b>" not in html
    assert clip.sheet().width > 4 * 128 and "4 frames of 32x16 px" in repr(clip) and clip.seconds == 0.25


def test_times_count_work_and_leave_waiting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("unspool.engine.timing.time.perf_counter", lambda: now[0])
    watch = StopWatch(video_fps=16.0)

    def work(seconds: float, frames: int) -> None:
        with watch.work():
            now[0] += seconds
        watch.chunk(frames)
        now[0] += 100.0  # the caller does something else

    with watch.work():
        now[0] += 0.2  # text encoding
    for seconds, frames in ((0.3, 9), (9.0, 12), *[(0.5, 12)] * 18, (0.7, 12), (2.0, 12)):
        work(seconds, frames)
    timing = watch.timing()
    assert timing.first_frame_ms == pytest.approx(500) and timing.chunks == 22 and timing.frames == 9 + 21 * 12
    assert timing.work_s == pytest.approx(0.5 + 9 + 9 + 0.7 + 2) and timing.fps == pytest.approx(240 / 11.7)
    assert timing.chunk_ms_p50 == pytest.approx(500) and timing.chunk_ms_max == pytest.approx(2000)
    assert timing.chunk_ms_p95 == pytest.approx(700) and timing.realtime == pytest.approx(240 / 11.7 / 16)
    assert StopWatch(16.0).timing().fps is None and "frames" in str(StopWatch(16.0).timing())
