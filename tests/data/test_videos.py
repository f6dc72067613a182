"""Videos become clips: the right frames at the right times, the right captions, and nothing that depends on state."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_clips import frame_numbers, write_clip

from unspool.data.batch import Source
from unspool.data.captions_io import NamePattern, read_captions
from unspool.data.decode import Picture, probe, read_frames, resize
from unspool.data.listing import EpochOrder, Listed, global_samples
from unspool.data.videos import VideoFolder, VideoFolderConfig

SMALL = Picture(height_px=16, width_px=24)


def config(folder: Path, **changes: object) -> VideoFolderConfig:
    values = {"path": str(folder), "height_px": 16, "width_px": 24, "num_frames": 5, "caption_pattern": "{name}"}
    return VideoFolderConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of 6 to 22 frames at 16 fps."""
    path = tmp_path_factory.mktemp("videos")
    for index, frames in enumerate((6, 10, 14, 18, 22)):
        write_clip(path / f"clip_{index}.mp4", frames)
    return path


# ---- captions ------------------------------------------------------------------------------------------------------

TWO = [("a.mp4", "first thing"), ("sub/b.mp4", "second, with a comma")]


def _layout(folder: Path, layout: str) -> None:
    names, texts = zip(*TWO, strict=True)
    if layout == "sidecar":
        for name, text in TWO:
            (folder / name).with_suffix(".txt").write_text(text.replace(", ", ",\n") + "\n")
    elif layout == "lines":
        (folder / "videos.txt").write_text("\n".join(names) + "\n")
        (folder / "prompt.txt").write_text("\n".join(texts) + "\n")
    elif layout == "videos2caption":
        rows = [{"path": name, "cap": [text, "another"]} for name, text in TWO]
        (folder / "videos2caption.json").write_text(json.dumps(rows))
    elif layout.endswith(".csv"):
        rows = [f'{name},"{text}"' for name, text in TWO]
        (folder / layout).write_text("\ufefffile_name,text\n" + "\n".join(rows), encoding="utf-8")
    else:
        video, caption = layout.split()
        rows = [json.dumps({video: name, caption: text, "other": 1}) for name, text in TWO]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n\n")


@pytest.mark.parametrize(
    "layout, expected",
    [
        ("sidecar", "sidecar"),
        ("lines", "lines"),
        ("videos2caption", "videos2caption"),
        ("metadata.csv", "metadata"),
        ("other.csv", "metadata"),
        ("video caption", "metadata"),
        ("video_path text", "metadata"),
        ("file_name prompt", "metadata"),
        ("path cap", "metadata"),
        ("media caption", "metadata"),
    ],
)
def test_every_caption_layout_is_found_and_named(tmp_path: Path, layout: str, expected: str) -> None:
    (tmp_path / "sub").mkdir()
    for name, _ in TWO:
        (tmp_path / name).write_bytes(b"")
    _layout(tmp_path, layout)
    found = read_captions(tmp_path)
    assert [(path.relative_to(tmp_path).as_posix(), text) for path, text in found.videos] == TWO
    assert found.layout == expected and expected in found.summary()


def test_a_metadata_file_can_be_the_path_and_other_layouts_are_mentioned(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, _ in TWO:
        (tmp_path / name).write_bytes(b"")
    _layout(tmp_path, "video caption")
    _layout(tmp_path, "sidecar")
    assert read_captions(tmp_path).others == ("sidecar",)
    assert read_captions(tmp_path, layout="sidecar").layout == "sidecar"
    assert [text for _, text in read_captions(tmp_path / "metadata.jsonl").videos] == [text for _, text in TWO]


def test_names_make_captions_and_what_does_not_match_is_told(tmp_path: Path) -> None:
    for name in ("asl_thank_you.mkv", "asl_book.mkv", "other.mp4", ".asl_hidden.mkv", "notes.doc"):
        (tmp_path / name).write_bytes(b"")
    pattern = NamePattern(name="asl_{word}", caption="a person signs '{word}'")
    found = read_captions(tmp_path, pattern=pattern)
    assert [text for _, text in found.videos] == ["a person signs 'book'", "a person signs 'thank you'"]
    assert found.layout == "pattern" and [name for name, _ in found.skipped] == ["other.mp4"]


@pytest.mark.parametrize("pattern", [None, NamePattern(name="{name}", caption="{name}")])
def test_a_folder_may_be_given_from_where_one_is(
    pattern: NamePattern | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data.path=videos`, as one types it."""
    (tmp_path / "videos/sub").mkdir(parents=True)
    for name, text in TWO:
        (tmp_path / "videos" / name).write_bytes(b"")
        (tmp_path / "videos" / name).with_suffix(".txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = read_captions(Path("videos"), pattern=pattern)
    assert [text for _, text in found.videos] == [text for _, text in TWO] and not found.skipped


def test_the_name_stands_in_where_a_sidecar_is_missing(tmp_path: Path) -> None:
    for name in ("a.mp4", "red_ball.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("written")
    assert [name for name, _ in read_captions(tmp_path).skipped] == ["red_ball.mp4"]
    found = read_captions(tmp_path, pattern=NamePattern(name="{name}", caption="{name}"))
    assert [text for _, text in found.videos] == ["written", "red ball"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "without videos"),
        ({"a.mp4": ""}, "no captions"),
        ({"a.mp4": "", "metadata.jsonl": '{"clip": "a.mp4", "text": "x"}'}, "line 1: got the keys"),
        ({"a.mp4": "", "metadata.jsonl": '{"video": "a.mp4",'}, "line 1: not valid JSON"),
        ({"a.mp4": "", "metadata.jsonl": '{"video": "b.mp4", "text": "x"}'}, "no such file"),
        ({"a.mp4": "", "videos.txt": "a.mp4\n", "prompts.txt": "x\ny\n"}, "1 videos and 2 lines"),
        ({"a.mp4": "", "videos2caption.json": "{}"}, "expected a list"),
        ({"a.mp4": "", "a.txt": b"\xff\xfe"}, "not UTF-8"),
    ],
)
def test_unusable_captions_are_one_clear_error(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        VideoFolder(VideoFolderConfig(path=str(tmp_path)))


def test_a_caption_pattern_may_only_use_fields_of_the_name() -> None:
    with pytest.raises(ValueError, match=r"uses \['x'\]"):
        NamePattern(name="{word}", caption="{x}")


# ---- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("source, target", [(16, 16), (30, 16), (30, 30), (24, 8), (8, 16), (25, 16)])
def test_resampling_takes_the_frame_nearest_in_time(tmp_path: Path, suffix: str, source: int, target: int) -> None:
    info = probe(write_clip(tmp_path / f"a{suffix}", 30, fps=source))
    count = info.num_frames(target)
    assert count == -(-30 * target // source) or abs(count - 30 * target / source) <= 0.75
    found = frame_numbers(read_frames(info, range(count), target, SMALL))
    ties = {i for i in range(count) if (Fraction(i * source, target) * 2) % 2 == 1}
    for i in set(range(count)) - ties:
        assert found[i] == min(round(i * source / target), 29), i
    for i in ties:  # the earlier one, unless the container rounded its time stamp to the millisecond
        assert found[i] in (i * source // target, i * source // target + 1)
        assert suffix == ".mkv" or found[i] == i * source // target


def test_variable_frame_rate_is_resampled_by_its_own_time_stamps(tmp_path: Path) -> None:
    stamps = [0, 40, 400, 440, 1000, 1500, 1510, 2000]
    info = probe(write_clip(tmp_path / "v.mkv", len(stamps), stamps_ms=stamps))
    assert info.num_source_frames == len(stamps) and info.last == 2
    found = frame_numbers(read_frames(info, range(20), 10, SMALL))
    expected = [min(range(len(stamps)), key=lambda k: abs(stamps[k] - 100 * i)) for i in range(20)]
    assert found == expected


def test_a_clip_from_the_midst_equals_that_part_of_the_whole(tmp_path: Path) -> None:
    """Late clips are reached by seeking to a key frame; order and repetition of the numbers are free."""
    info = probe(write_clip(tmp_path / "long.mp4", 64))
    whole = read_frames(info, range(64), 16, SMALL)
    numbers = [50, 63, 51, 51, 40]
    assert torch.equal(read_frames(info, numbers, 16, SMALL), whole[numbers])


@pytest.mark.parametrize("rotation, turns", [(90, 1), (-90, 3), (180, 2)])
def test_rotation_of_the_file_is_carried_out(tmp_path: Path, rotation: int, turns: int) -> None:
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :16] = 255
    info = probe(write_clip(tmp_path / "r.mp4", [image] * 3, rotation=rotation))
    shown = np.rot90(image, turns)
    frame = read_frames(info, [1], 16, Picture(height_px=shown.shape[0], width_px=shown.shape[1]))[0]
    expected = torch.from_numpy(shown.copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert (frame - expected).abs().mean() < 0.05


def test_pixels_that_are_not_square_are_shown_square(tmp_path: Path) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 24:] = 255
    info = probe(write_clip(tmp_path / "p.mkv", [image] * 2, pixel_aspect=Fraction(2)))
    frame = read_frames(info, [0], 16, Picture(height_px=32, width_px=32))[0, 0]
    assert frame.max() < -0.5  # the bright stripe lies outside of the middle half that remains


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["cover", "fit"])
)
def test_any_size_becomes_any_other(h: int, w: int, height: int, width: int, fit: str) -> None:
    picture = Picture(height_px=height, width_px=width, fit=fit)  # type: ignore[arg-type]
    result = resize(torch.full((h, w, 3), 255, dtype=torch.uint8), picture)
    assert result.shape == (3, height, width)
    if fit == "cover":
        assert torch.allclose(result, torch.ones_like(result))
    else:
        assert result.max() == pytest.approx(1, abs=1e-5)


def test_fit_shows_all_and_cover_the_middle() -> None:
    frame = torch.zeros(8, 16, 3, dtype=torch.uint8)
    frame[:, 4:12] = 255
    cover = resize(frame, Picture(height_px=8, width_px=8))
    assert torch.equal(cover, torch.ones(3, 8, 8))
    fit = resize(frame, Picture(height_px=16, width_px=16, fit="fit"))
    assert torch.equal(fit[:, 4:12], frame.permute(2, 0, 1) / 127.5 - 1) and (fit[:, :4] == -1).all()


# ---- the source ----------------------------------------------------------------------------------------------------


def test_batches_hold_what_they_say(folder: Path) -> None:
    source = VideoFolder(config(folder))
    assert isinstance(source, Source) and isinstance(source, Listed)
    batch = source.batch(0, 5)
    assert batch.pixels is not None and batch.pixels.shape == (5, 5, 3, 16, 24)
    assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1
    assert batch.captions == tuple((f"clip {index}",) for index in batch.indices.tolist())
    assert all(frame_numbers(clip) == [0, 1, 2, 3, 4] for clip in batch.pixels)


@pytest.mark.parametrize("mode", ["head", "random"])
def test_any_step_is_the_same_without_the_steps_before_and_on_any_rank(folder: Path, mode: str) -> None:
    source = VideoFolder(config(folder, mode=mode, seed=3))
    run = [source.batch(step, 4) for step in range(4)]
    resumed = VideoFolder(config(folder, mode=mode, seed=3, workers=2))
    for step in (3, 1):
        again = resumed.batch(step, 4)
        assert torch.equal(again.pixels, run[step].pixels) and again.captions == run[step].captions
    parts = [resumed.batch(2, 4, rank=rank, world=2) for rank in range(2)]
    whole = torch.stack([part.pixels[i] for i in range(2) for part in parts])
    assert torch.equal(whole, run[2].pixels)


def test_an_epoch_shows_every_clip_once_and_the_next_one_in_another_order(folder: Path) -> None:
    source = VideoFolder(config(folder, num_repeats=2, seed=1))
    assert len(source) == 10
    indices = [index for step in range(10) for index in source.batch(step, 2).indices.tolist()]
    assert sorted(indices[:10]) == sorted(indices[10:]) == sorted([*range(5)] * 2)
    assert indices[:10] != indices[10:]


def _starts(folder: Path, **changes: object) -> dict[str, list[int]]:
    source = VideoFolder(config(folder, **changes))
    found: dict[str, list[int]] = {}
    for entry in range(len(source)):
        batch = source.clips([entry])
        numbers = frame_numbers(batch.pixels[0])
        assert numbers == [*range(numbers[0], numbers[0] + 5)]
        found.setdefault(batch.captions[0][0], []).append(numbers[0])
    return found


def test_the_modes_cut_where_they_say(folder: Path) -> None:
    assert _starts(folder) == {f"clip {i}": [0] for i in range(5)}
    slide = _starts(folder, mode="slide", stride=4)
    assert slide["clip 0"] == [0] and slide["clip 2"] == [0, 4, 8] and slide["clip 4"] == [0, 4, 8, 12, 16]
    assert _starts(folder, mode="slide")["clip 4"] == [0, 5, 10, 15]
    uniform = _starts(folder, mode="uniform", clips_per_video=3)
    assert uniform["clip 0"] == [0, 1] and uniform["clip 4"] == [0, 8, 17]
    source = VideoFolder(config(folder, mode="random"))
    drawn = {source.start_of(4, epoch) for epoch in range(200)}
    assert drawn == set(range(18))


def test_short_videos_are_counted_or_filled(folder: Path) -> None:
    source = VideoFolder(config(folder, num_frames=13))
    assert source.num_clips == 3 and "2 too short" in source.report.summary()
    assert "clip_0.mp4: 6 of 13 frames" in source.report.summary()
    looped = VideoFolder(config(folder, num_frames=13, short="loop"))
    assert frame_numbers(looped.clips([0]).pixels[0]) == [0, 1, 2, 3, 4, 5] * 2 + [0]
    held = VideoFolder(config(folder, num_frames=13, short="hold"))
    assert frame_numbers(held.clips([0]).pixels[0]) == [0, 1, 2, 3, 4] + [5] * 8
    with pytest.raises(ValueError, match=r"5 captioned videos and none of use.*5 too short"):
        VideoFolder(config(folder, num_frames=81))


def test_videos_kept_in_memory_give_the_same_clips(folder: Path) -> None:
    config = VideoFolderConfig(
        path=str(folder), height_px=16, width_px=16, num_frames=5, mode="random", captions="none"
    )
    plain, kept = VideoFolder(config), VideoFolder(replace(config, in_memory=True))
    for step in (0, 3):
        a, b = plain.batch(step, 4), kept.batch(step, 4)
        assert a.pixels is not None and b.pixels is not None and a.captions == b.captions
        torch.testing.assert_close(a.pixels, b.pixels, rtol=0, atol=1 / 255)
    assert plain.describe() == kept.describe()


def test_the_tail_is_never_trained_on(folder: Path) -> None:
    options = {"tail": 0.4, "mode": "slide", "stride": 1}
    train = VideoFolder(config(folder, **options))
    tail = VideoFolder(config(folder, split="tail", **options))
    context = VideoFolder(config(folder, split="tail", tail_context=3, **options))

    def seen(source: VideoFolder, name: str) -> set[int]:
        entries = [e for e in range(len(source)) if source.clip(e).name == name]
        return {n for e in entries for n in frame_numbers(source.clips([e]).pixels[0])}

    assert seen(train, "clip_4.mp4") == set(range(13)) and seen(tail, "clip_4.mp4") == set(range(13, 22))
    assert seen(context, "clip_4.mp4") == set(range(10, 22))
    assert context.clip(0).held_out_from(context.start_of(0)) == 3
    with pytest.raises(ValueError, match="nothing is held out"):
        config(folder, split="tail")


def test_broken_files_are_left_out_and_told(tmp_path: Path, folder: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", 12).read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mkv").write_text("this is no video")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    rng = np.random.default_rng(0)
    noisy = [rng.integers(0, 255, (32, 48, 3), np.uint8) for _ in range(60)]
    streamed = write_clip(tmp_path / "cut.mkv", noisy)
    streamed.write_bytes(streamed.read_bytes()[: streamed.stat().st_size // 2])
    source = VideoFolder(config(tmp_path))
    kinds = {name: kind for name, kind, _ in source.report.rows}
    assert kinds == dict.fromkeys(("empty.mp4", "text.mkv", "cut.mp4", "cut.mkv"), "broken") and source.num_clips == 1
    (tmp_path / "whole.mp4").unlink()
    with pytest.raises(ValueError, match=r"4 captioned videos and none of use.*4 broken"):
        VideoFolder(config(tmp_path))


def test_a_file_that_breaks_later_is_replaced_by_the_next_of_its_epoch(tmp_path: Path) -> None:
    for index in range(3):
        write_clip(tmp_path / f"v{index}.mp4", 6)
    source = VideoFolder(config(tmp_path))
    before = [source.batch(step, 3) for step in range(2)]
    (tmp_path / "v1.mp4").write_bytes(b"gone")
    after = [source.batch(step, 3) for step in range(2)]
    for old, new in zip(before, after, strict=True):
        kept = [a == b for a, b in zip(old.indices.tolist(), new.indices.tolist(), strict=True)]
        assert kept == [index != 1 for index in old.indices.tolist()] and 1 not in new.indices.tolist()
    assert "v1.mp4" in source.report and len(source.clips([0, 1, 2])) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": 6}, "try 5 or 9"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"height_px": 0}, "height_px=0"),
        ({"tail": 1.0}, "tail=1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"stride": 0}, "stride=0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@given(st.integers(1, 60), st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(0, 5))
def test_the_order_visits_every_entry_once_per_epoch(num: int, seed: int, size: int, step: int) -> None:
    order = EpochOrder(num, seed)
    for epoch in range(2):
        found = [order.at(epoch * num + position) for position in range(num)]
        assert sorted(entry for _, entry in found) == [*range(num)] and {e for e, _ in found} == {epoch}
    for world in range(1, size + 1):
        taken = [sample for rank in range(world) for sample in global_samples(step, size, rank=rank, world=world)]
        assert sorted(taken) == [*range(step * size, (step + 1) * size)]


def test_the_real_clips(clips_folder: Path) -> None:
    settings = {"name_pattern": "asl_{word}", "caption_pattern": "a person signs '{word}'", "num_frames": 25}
    source = VideoFolder(VideoFolderConfig(path=str(clips_folder), **settings))  # type: ignore[arg-type]
    assert source.num_clips == 20
    counts = {source.clip(i).name: source.clip(i).video.num_source_frames for i in range(20)}
    assert (counts["asl_again.mkv"], counts["asl_book.mkv"], counts["asl_eat.mkv"]) == (77, 109, 47)
    batch = source.clips([2])
    assert batch.captions == (("a person signs 'book'",),) and batch.pixels.shape == (1, 25, 3, 64, 64)
    assert batch.pixels.std() > 0.1 and not torch.equal(batch.pixels[0, 0], batch.pixels[0, -1])
