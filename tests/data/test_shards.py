"""Latents on disk: bit for bit what was written, with their provenance, and never half of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unspool.data import shard_writer
from unspool.data.batch import Source
from unspool.data.listing import Listed
from unspool.data.shard_format import HEADER, INDEX, ShardHeader, read_header, read_index
from unspool.data.shard_writer import ShardWriter
from unspool.data.shards import LatentShards, LatentShardsConfig

C, H, W, ROWS = 3, 2, 4, 6


def header(**changes: object) -> ShardHeader:
    values = {
        "codec": "tiny",
        "codec_sha256": "ab" * 32,
        "normalisation": {"mean": [0.0] * C, "std": [1.0] * C},
        "dtype": "float32",
        "fps": 16.0,
        "num_frames": 81,
        "height_px": 16,
        "width_px": 32,
        "latent_shape": (C, H, W),
        "frames_rule": "1 + 4k, padding start",
        "source": json.dumps({"source": "test", "seed": 0}),
    }
    return ShardHeader(**{**values, **changes})  # type: ignore[arg-type]


def clip(item: int, frames: int = 7) -> dict[str, object]:
    """A clip whose every part depends on its number, with 1 to 3 prompts."""
    generator = torch.Generator().manual_seed(item)
    prompts = item % 3 + 1
    text = torch.randn(prompts, ROWS, 5, generator=generator)
    text[:, item % ROWS + 1 :] = 0
    return {
        "latents": torch.randn(frames, C, H, W, generator=generator),
        "captions": [f"clip {item} prompt {p}" for p in range(prompts)],
        "prompt_index": [min(t * prompts // frames, prompts - 1) for t in range(frames)],
        "text": text,
        "extra": {"action": torch.randint(0, 9, (frames, 2), generator=generator)},
        "name": f"{item}.mp4",
    }


def write(folder: Path, items: range, *, max_shard_bytes: int = 4000, **changes: object) -> None:
    with ShardWriter(folder, header(text_rows=ROWS, **changes), max_shard_bytes=max_shard_bytes) as writer:
        for item in items:
            if item >= writer.next_item:
                writer.add(item, **clip(item))  # type: ignore[arg-type]


def opened(folder: Path, **changes: object) -> LatentShards:
    return LatentShards(LatentShardsConfig(path=str(folder), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: str, in_memory: bool) -> None:
    write(tmp_path, range(9), dtype=dtype)
    source = opened(tmp_path, in_memory=in_memory)
    assert isinstance(source, Source) and isinstance(source, Listed)
    assert len(source) == 9 and len(list(tmp_path.glob("shard-*.safetensors"))) > 1
    for item in range(9):
        batch, expected = source.clips([item]), clip(item)
        kind = getattr(torch, dtype)
        assert torch.equal(batch.latents[0], expected["latents"].to(kind).float())
        assert torch.equal(batch.text[0], expected["text"].to(kind).float())
        assert batch.captions == (tuple(expected["captions"]),) and batch.prompt_index.dtype == torch.int64
        assert batch.prompt_index[0].tolist() == expected["prompt_index"]
        assert torch.equal(source.array(item, "action"), expected["extra"]["action"])
        assert source.entries[item].name == f"{item}.mp4"
    together = source.clips([0, 2])  # one prompt and three: states of absent prompts are zero
    assert together.text.shape == (2, 3, ROWS, 5) and not together.text[0, 1:].any()
    assert read_header(tmp_path) == (header(text_rows=ROWS, dtype=dtype), True)


def test_any_step_is_the_same_without_the_steps_before_and_on_any_rank(tmp_path: Path) -> None:
    write(tmp_path, range(7))
    settings = {"frames": 3, "crop": "any", "seed": 5}
    source = opened(tmp_path, **settings)
    run = [source.batch(step, 4) for step in range(8)]
    assert sorted(i for batch in run[:7] for i in batch.indices.tolist()) == sorted([*range(7)] * 4)
    resumed = opened(tmp_path, in_memory=True, **settings)
    for step in (6, 2):
        again = resumed.batch(step, 4)
        assert torch.equal(again.latents, run[step].latents) and torch.equal(again.indices, run[step].indices)
    parts = [source.batch(3, 4, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.stack([p.latents[i] for i in range(2) for p in parts]), run[3].latents)


@pytest.mark.parametrize("in_memory", [False, True])
def test_clips_whose_prompt_does_not_change_may_be_left_out(tmp_path: Path, in_memory: bool) -> None:
    write(tmp_path, range(9))
    source = opened(tmp_path, prompts=2, in_memory=in_memory)
    assert len(source) == 6
    seen = {i for step in range(3) for i in source.batch(step, 2).indices.tolist()}
    assert seen == {1, 2, 4, 5, 7, 8}
    assert torch.equal(source.clips([1]).latents[0], clip(2)["latents"])
    with pytest.raises(ValueError, match="no clip has more than 3"):
        opened(tmp_path, prompts=4)
    with pytest.raises(ValueError, match="at least 1"):
        opened(tmp_path, prompts=0)


def _crop_starts(source: LatentShards, steps: int) -> set[int]:
    found = set()
    for step in range(steps):
        batch = source.batch(step, 5)
        assert batch.latents is not None and batch.captions is not None and batch.prompt_index is not None
        for index, latents, captions, prompts in zip(
            batch.indices.tolist(), batch.latents, batch.captions, batch.prompt_index.tolist(), strict=True
        ):
            whole = clip(index)
            places = [
                s for s in range(8 - len(latents)) if torch.equal(whole["latents"][s : s + len(latents)], latents)
            ]
            assert len(places) == 1
            expected = whole["prompt_index"][places[0] : places[0] + len(latents)]
            assert [captions[k] for k in prompts] == [whole["captions"][k] for k in expected]
            assert len(captions) == len(set(expected)) or len(latents) == 7  # those that hold in the crop alone
            found.add(places[0])
    return found


def test_crops_begin_where_they_may(tmp_path: Path) -> None:
    """Latent 0 of a codec that pads at the start is unlike the others, so a crop begins there unless told otherwise."""
    write(tmp_path, range(5))
    assert _crop_starts(opened(tmp_path, frames=3), 10) == {0}
    assert _crop_starts(opened(tmp_path, frames=3, crop="any"), 30) == {0, 1, 2, 3, 4}
    assert _crop_starts(opened(tmp_path, frames=3, crop="any", align=3), 20) == {0, 3}
    with pytest.raises(ValueError, match=r"frames=9, but 5 of 5 clips have fewer .*try frames=7"):
        opened(tmp_path, frames=9)


def test_clips_of_several_lengths_need_a_crop(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, header()) as writer:
        for item, frames in enumerate((4, 7)):
            writer.add(item, torch.zeros(frames, C, H, W), ["x"])
    with pytest.raises(ValueError, match="4 to 7 latent frames in one batch; set frames="):
        opened(tmp_path).clips([0, 1])
    batch = opened(tmp_path, frames=4).clips([0, 1])
    assert batch.latents.shape == (2, 4, C, H, W) and batch.text is None and not batch.prompt_index.any()


@pytest.mark.parametrize(
    "field, value",
    [
        ("codec_sha256", "cd" * 32),
        ("codec", "other"),
        ("normalisation", {"mean": [0.5] * C, "std": [1.0] * C}),
        ("fps", 8.0),
        ("height_px", 32),
        ("width_px", 64),
        ("num_frames", 49),
        ("dtype", "float16"),
        ("latent_shape", (C, H, W + 1)),
        ("frames_rule", "1 + 4k, padding end"),
        ("text_encoder", "other"),
        ("source", '{"seed": 1, "source": "test"}'),
    ],
)
def test_another_provenance_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path, range(2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"latents with {field}="):
        write(tmp_path, range(4), **{field: value})
    with pytest.raises(ValueError, match=f"latents with {field}="):
        opened(tmp_path).header.require(**{field: value})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    opened(tmp_path).header.require(**{field: getattr(header(), field)})


def test_another_version_or_spelling_is_no_mismatch(tmp_path: Path) -> None:
    write(tmp_path, range(2), library="unspool 0.1")
    write(tmp_path, range(4), library="unspool 0.2", source='{"seed":0,   "source":"test"}')
    assert len(opened(tmp_path)) == 4


def _content(folder: Path) -> list[tuple[Tensor, Tensor, object]]:
    source = opened(folder)
    batches = [source.clips([index]) for index in range(len(source))]
    return [(batch.latents, batch.text, batch.captions) for batch in batches]


def _assert_same(a: Path, b: Path) -> None:
    for left, right in zip(_content(a), _content(b), strict=True):
        assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1]) and left[2] == right[2]


KILLED = """
import os, sys
sys.path[:0] = [{here!r}]
import test_shards
test_shards.stop_at({moment!r}, os.path.join({folder!r}, "index.jsonl"), lambda: os._exit(9))
test_shards.write(test_shards.Path({folder!r}), range(11))
"""


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_at(moment: str, index: str, stop: Callable[[], object]) -> Callable[[], None]:
    """Arrange that a writer of 11 clips ends in the midst; returns what takes that back."""
    save, line, make = shard_writer.save_file, shard_writer.Entry.line, globals()["clip"]
    shards = []

    def save_then_stop(*args: object, **kwargs: object) -> None:
        save(*args, **kwargs)  # type: ignore[arg-type]
        shards.append(1)
        if len(shards) == 3:
            stop()

    def half_a_line(self: shard_writer.Entry) -> str:
        if self.index == 7:
            with open(index, "a") as file:
                file.write(line(self)[:20])
            stop()
        return line(self)

    def stop_at_eight(item: int, frames: int = 7) -> dict[str, object]:
        if item == 8:
            stop()
        return make(item, frames)

    if moment == "before the index":
        shard_writer.save_file = save_then_stop  # type: ignore[assignment]
    elif moment == "in the index":
        shard_writer.Entry.line = half_a_line  # type: ignore[method-assign]
    else:
        globals()["clip"] = stop_at_eight

    def restore() -> None:
        shard_writer.save_file, shard_writer.Entry.line, globals()["clip"] = save, line, make  # type: ignore[method-assign]

    return restore


def _kill_in_this_process(moment: str, folder: Path) -> None:
    def stop() -> None:
        raise Killed

    restore = stop_at(moment, str(folder / INDEX), stop)
    try:
        with pytest.raises(Killed):
            write(folder, range(11))
    finally:
        restore()


@pytest.mark.parametrize("moment", ["before the index", "between shards", "in the index"])
def test_a_killed_writer_leaves_whole_shards_and_continues(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "killed"
    if moment == "in the index":  # only a process that really ends leaves half a line
        code = KILLED.format(here=str(Path(__file__).parent), moment=moment, folder=str(folder))
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 9, result.stderr
    else:
        _kill_in_this_process(moment, folder)
    with pytest.raises(ValueError, match=r"interrupted after [1-9]"):
        opened(folder)
    survived = len(opened(folder, partial=True))
    assert 0 < survived < 11
    made = []
    with ShardWriter(folder, header(text_rows=ROWS), max_shard_bytes=4000) as writer:
        assert writer.next_item == survived
        for item in range(writer.next_item, 11):
            writer.add(item, **clip(item))  # type: ignore[arg-type]
            made.append(item)
    assert made == [*range(survived, 11)]
    write(tmp_path / "whole", range(11))
    _assert_same(folder, tmp_path / "whole")


def test_ctrl_c_keeps_what_was_added_and_an_error_only_whole_shards(tmp_path: Path) -> None:
    for error, kept in ((KeyboardInterrupt, 3), (RuntimeError, 0)):
        folder = tmp_path / error.__name__
        with pytest.raises(error), ShardWriter(folder, header()) as writer:
            for item in range(3):
                writer.add(item, torch.zeros(2, C, H, W), ["x"])
            raise error
        assert len(read_index(folder)) == kept and folder.exists() == bool(kept)


def test_items_may_be_left_out_but_not_come_twice(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, header()) as writer:
        writer.add(0, torch.zeros(2, C, H, W), ["x"])
        writer.add(4, torch.ones(2, C, H, W), ["y"])
        with pytest.raises(ValueError, match="item=4: already written; expected 5"):
            writer.add(4, torch.zeros(2, C, H, W), ["x"])
    assert ShardWriter(tmp_path, header()).next_item == 5
    assert opened(tmp_path).clips([1]).captions == (("y",),)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"latents": torch.zeros(2, C, H, W + 1)}, r"expected \[t, 3, 2, 4\]"),
        ({"latents": torch.full((2, C, H, W), float("nan"))}, "not finite"),
        ({"captions": []}, "without captions"),
        ({"prompt_index": [0, 1]}, "prompt_index"),
        ({"prompt_index": [0]}, "prompt_index"),
        ({"text": torch.zeros(1, 2, 3)}, "text_rows=None"),
        ({"extra": {"latents": torch.zeros(1)}}, "extra array 'latents'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    values = {"latents": torch.zeros(2, C, H, W), "captions": ["x"], **arguments}
    writer = ShardWriter(tmp_path / "x", header())
    with pytest.raises(ValueError, match=message):
        writer.add(0, **values)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_float16_overflow_is_told(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x", header(dtype="float16"))
    with pytest.raises(ValueError, match=r"not finite in float16; try bfloat16"):
        writer.add(0, torch.full((1, C, H, W), 1e6), ["x"])


def test_foreign_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("foreign", "other content"), ("file", "got a file"), ("file/below", "cannot be made")):
        with pytest.raises(ValueError, match=message):
            ShardWriter(tmp_path / name, header())
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json"):
        opened(tmp_path / "foreign")
    folder = tmp_path / "data"
    write(folder, range(6))
    lines = (folder / INDEX).read_text().splitlines(keepends=True)
    (folder / INDEX).write_text("".join([lines[0], "no json\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"index\.jsonl, line 2"):
        opened(folder)
    (folder / INDEX).write_text("".join(lines))
    shard = folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="truncated"):
        opened(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.jsonl names it"):
        opened(folder)
    (folder / HEADER).write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="got format 'other'"):
        opened(folder)


def test_every_field_of_the_header_is_stored() -> None:
    """A field that is added to the header must take part in the comparison."""
    with pytest.raises(ValueError, match="not a field"):
        header().require(colour=1)
    names = {field.name for field in dataclasses.fields(ShardHeader)}
    assert names - {"library"} <= set(vars(header())) and shard_writer.MAX_SHARD_BYTES == 256 * 2**20
