"""Export: what is written can be read back, and nothing half-written is ever left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from unspool.engine import export
from unspool.engine import files as files_module
from unspool.engine.export import contact_sheet, read_metadata, time_labels, write_video

SUFFIXES = [".mp4", ".gif", ".webp", ".png", ".npy"]
META = {"seed": 3, "prompt": "a résumé 映画", "schedule": [1.0, 0.9375, 0.0], "nested": {"sink": None}}


def smooth(count: int, height: int, width: int) -> np.ndarray:
    """A colour gradient that moves: gentle enough for yuv420p, different in every frame, channel and direction."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    red, green, blue = 130 + x + 2 * t, 200 - 2 * y, 20 + x + y // 2
    return np.clip(np.stack([red, green, blue], axis=-1), 0, 255).astype(np.uint8)


def decoded(path: Path) -> tuple[np.ndarray, Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames), stream.average_rate


def files(folder: Path) -> set[str]:
    return set(os.listdir(folder))


@pytest.mark.parametrize(("height", "width"), [(48, 32), (16, 16), (2, 2), (8, 64)])
def test_mp4_keeps_frames_rate_and_colours(tmp_path: Path, height: int, width: int) -> None:
    frames = smooth(13, height, width)
    chunks = (frames[start : start + 5] for start in range(0, 13, 5))
    write_video(tmp_path / "a.mp4", chunks, 16, metadata=META)
    back, rate = decoded(tmp_path / "a.mp4")
    assert back.shape == frames.shape and rate == 16
    assert np.abs(back.astype(int) - frames).mean() < 3
    assert np.abs(back.astype(int) - frames[:, :, :, ::-1]).mean() > 20  # the comparison sees swapped channels


def test_mp4_chunking_changes_nothing(tmp_path: Path) -> None:
    frames = smooth(7, 16, 16)
    write_video(tmp_path / "a.mp4", [frames], 16)
    write_video(tmp_path / "b.mp4", (frames[i : i + 1] for i in range(7)), 16)
    assert (decoded(tmp_path / "a.mp4")[0] == decoded(tmp_path / "b.mp4")[0]).all()


def test_mp4_pads_odd_sides_by_their_edge(tmp_path: Path) -> None:
    frames = smooth(3, 15, 17)
    write_video(tmp_path / "a.mp4", frames, 24)
    back, _ = decoded(tmp_path / "a.mp4")
    assert back.shape == (3, 16, 18, 3)
    assert np.abs(back[:, :15, :17].astype(int) - frames).mean() < 3
    assert np.abs(back[:, 15, :17].astype(int) - frames[:, 14]).mean() < 6


@pytest.mark.parametrize("fps", [16, 29.97, 12.5, 24000 / 1001])
def test_mp4_frame_rate(tmp_path: Path, fps: float) -> None:
    write_video(tmp_path / "a.mp4", smooth(30, 16, 16), fps)
    assert abs(float(decoded(tmp_path / "a.mp4")[1]) - fps) < 1e-3


def test_npy_is_exact_and_streams_join(tmp_path: Path) -> None:
    frames = smooth(6, 5, 7)
    write_video(tmp_path / "a.npy", iter([frames[:1], frames[1:1], frames[1:]]), 16)
    assert (np.load(tmp_path / "a.npy") == frames).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_keep_their_length(tmp_path: Path, suffix: str) -> None:
    write_video(tmp_path / f"a{suffix}", smooth(31, 12, 12), 16)
    with Image.open(tmp_path / f"a{suffix}") as image:
        total_ms = 0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            total_ms += image.info["duration"]
    assert abs(total_ms - 1000 * 31 / 16) <= 10


def test_webp_shows_the_frames(tmp_path: Path) -> None:
    frames = smooth(1, 32, 48).repeat(5, 0)
    for index in range(5):
        frames[index, 4:12, 8 * index : 8 * index + 8] = (255, 0, 0)  # else the format joins frames that look alike
    write_video(tmp_path / "a.webp", frames, 16)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == 5
        for index, frame in enumerate(frames):
            image.seek(index)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).mean() < 6


@pytest.mark.parametrize("count", [1, 5, 64, 65, 300])
def test_png_shows_every_kth_frame_of_any_length(tmp_path: Path, count: int) -> None:
    frames = np.zeros((count, 4, 4, 3), dtype=np.uint8)
    frames[:, :, :, 0] = (np.arange(count) % 256)[:, None, None]
    write_video(tmp_path / "a.png", (frames[i : i + 7] for i in range(0, count, 7)), 16)
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    every = 1 if count <= 64 else 2 if count <= 128 else 8
    shown = frames[::every]
    cell_h, cell_w = 128 + export.LABEL_STRIP_PX + 2, 130
    for index, frame in enumerate(shown):
        row, column = divmod(index, 8)
        assert (sheet[row * cell_h + 64, column * cell_w + 64] == frame[2, 2]).all(), index
    assert sheet.shape[0] == -(-len(shown) // 8) * cell_h - 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_video(path, smooth(3, 16, 16), 16, metadata=META)
    assert read_metadata(path) == META
    write_video(path, smooth(3, 16, 16), 16)
    assert read_metadata(path) == {}
    assert files(tmp_path) == {path.name}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("after", [0, 2])
def test_a_failing_source_leaves_nothing(tmp_path: Path, suffix: str, error: type[BaseException], after: int) -> None:
    def source() -> Iterator[np.ndarray]:
        for _ in range(after):
            yield smooth(5, 16, 16)
        raise error("boom")

    with pytest.raises(error):
        write_video(tmp_path / f"a{suffix}", source(), 16, metadata=META)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_video(path, smooth(3, 16, 16), 16, metadata=META)
    before, names = path.read_bytes(), files(tmp_path)
    with pytest.raises(ValueError, match="frames changed from 16x16 to 16x18 px"):
        write_video(path, [smooth(3, 16, 16), smooth(3, 16, 18)], 16, metadata={"other": 1})
    assert path.read_bytes() == before and files(tmp_path) == names and read_metadata(path) == META


def untouched() -> Iterator[np.ndarray]:
    pytest.fail("a frame was asked for before the target was checked")
    yield smooth(1, 16, 16)


def test_a_bad_target_is_refused_before_any_frame_is_made(tmp_path: Path) -> None:
    (tmp_path / "dir.mp4").mkdir()
    for path, message in [
        (tmp_path / "a.avi", r"cannot write \.avi; use \.mp4"),
        (tmp_path / "a", "a file without suffix"),
        (tmp_path / "missing" / "a.mp4", "does not exist; create it first"),
        (tmp_path / "dir.mp4", "is a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_video(path, untouched(), 16)
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "a.mp4", untouched(), 0)
    with pytest.raises(ValueError, match="fps=nan"):
        write_video(tmp_path / "a.mp4", untouched(), float("nan"))
    for bad in ({"x": np.zeros(3)}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="plain JSON data"):
            write_video(tmp_path / "a.mp4", untouched(), 16, metadata=bad)
    assert files(tmp_path) == {"dir.mp4"}


def test_a_folder_without_permission_is_refused_before_any_frame_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because permissions do not bind the superuser, who often runs tests in containers."""

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files_module, "create", refuse)
    with pytest.raises(ValueError, match=r"cannot write into .*: Permission denied"):
        write_video(tmp_path / "a.mp4", untouched(), 16)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 8, 8, 3), dtype=np.float32), r"got frames float32 \[2, 8, 8, 3\], expected a uint8"),
        (np.zeros((8, 8, 3), dtype=np.uint8)[None, None], r"\[1, 1, 8, 8, 3\]"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), r"\[2, 3, 8, 8\]"),
        (np.zeros((2, 0, 8, 3), dtype=np.uint8), "0x8 px"),
        ([[1, 2]], "got frames list"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "no frames to write"),
    ],
)
def test_bad_frames_are_named(tmp_path: Path, bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", [bad], 16)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no frames to write"):
        write_video(tmp_path / "a.mp4", [], 16)
    assert files(tmp_path) == set()


def test_contact_sheet_repeats_pixels_exactly_and_in_reading_order() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet(frames, columns=2, scale=4))
    assert sheet.shape == (3 * 14 - 2, 2 * 18 - 2, 3)
    for index, frame in enumerate(frames):
        row, column = divmod(index, 2)
        tile = sheet[row * 14 : row * 14 + 12, column * 18 : column * 18 + 16]
        assert (tile == frame.repeat(4, axis=0).repeat(4, axis=1)).all()


def test_contact_sheet_labels_stand_under_their_tiles() -> None:
    frames = np.zeros((2, 20, 90, 3), dtype=np.uint8)
    plain = np.asarray(contact_sheet(frames, columns=2, labels=["", ""]))
    labelled = np.asarray(contact_sheet(frames, columns=2, labels=time_labels([0, 1], 16)))
    changed = (plain != labelled).any(-1)
    assert changed[20:, :92].any() and changed[20:, 92:].any() and not changed[:20].any()
    assert time_labels([0, 12], 16) == ["#0 0.00s", "#12 0.75s"]


def test_contact_sheet_refuses_what_makes_no_picture() -> None:
    frames = smooth(2, 4, 4)
    for arguments, message in [
        ({"columns": 0}, "columns=0"),
        ({"scale": 0}, "scale=0"),
        ({"labels": ["one"]}, "got 1 labels for 2 frames"),
    ]:
        with pytest.raises(ValueError, match=message):
            contact_sheet(frames, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one frame"):
        contact_sheet(frames[:0])


def test_read_metadata_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_metadata(tmp_path / "a.mp4")
    for suffix in (".mp4", ".gif", ".webp", ".png"):
        (tmp_path / f"a{suffix}").write_bytes(b"not a video")
        with pytest.raises(ValueError, match="not a readable"):
            read_metadata(tmp_path / f"a{suffix}")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.gif", comment=b"made with love")
    assert read_metadata(tmp_path / "b.gif") == {}
