"""`unspool encode` turns videos into latents that say what they are, and leaves nothing half-written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unspool.cli import main as front
from unspool.data.batch import Batch
from unspool.data.encoding import Loaded, encode_source, load_file_or_name
from unspool.data.shards import LatentShards, LatentShardsConfig
from unspool.data.stage import StageClips
from unspool.data.videos import VideoFolder, VideoFolderConfig
from unspool.data.worlds.stage import StageConfig
from unspool.engine.export import write_video

CLIP = ["num_frames=5", "height_px=16", "width_px=24", "caption_pattern={name}"]


class Averages(nn.Module):
    """A codec in miniature: 1 + 4k frames to 1 + k latents, each the mean of its frames at half the size."""

    def encode(self, pixels: Tensor) -> Tensor:
        padded = torch.cat([pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels], 1)
        b, f, c, y, x = padded.shape
        return padded.reshape(b, f // 4, 4, c, y // 2, 2, x // 2, 2).mean((2, 5, 7))


class Exploding(Averages):
    def encode(self, pixels: Tensor) -> Tensor:
        if float(pixels.mean()) > 0.5:
            raise RuntimeError("out of memory")
        return super().encode(pixels)


class Letters(nn.Module):
    """A text encoder in miniature: one row per letter."""

    def forward(self, captions: Sequence[str]) -> Tensor:
        states = torch.zeros(len(captions), 8, 2)
        for row, caption in enumerate(captions):
            for column, letter in enumerate(caption[:8]):
                states[row, column, 0] = ord(letter)
        return states


class World:
    """A source without an end, with two prompts per clip."""

    fps = 8.0

    def __init__(self, *, frames: int = 5, size_px: int = 4) -> None:
        self.frames, self.size_px = frames, size_px

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        samples = range(step * size + rank, (step + 1) * size, world)
        pixels = [torch.full((self.frames, 3, self.size_px, self.size_px), sample / 100) for sample in samples]
        captions = tuple((f"world {sample}", "then") for sample in samples)
        return Batch(pixels=torch.stack(pixels), captions=captions, prompt_index=torch.tensor([[0, 1]] * len(samples)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "videos"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index, frames in enumerate((9, 12, 5, 3)):
        flat = torch.randint(0, 120, (frames, 1, 1, 3), generator=generator).expand(-1, 16, 24, -1)
        write_video(path / f"v{index}.mp4", flat.to(torch.uint8).numpy().copy(), 16)
    (path / "broken.mp4").write_bytes(b"no video")
    return path


@pytest.fixture
def encode(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setitem(front.COMMANDS, "encode", ("unspool.cli.encode:run", "encode"))
    monkeypatch.setitem(sys.modules, "my_codec", sys.modules[__name__])
    return lambda *args: front.main(["encode", *map(str, args)])


def opened(path: Path) -> LatentShards:
    return LatentShards(LatentShardsConfig(path=str(path)))


def test_a_folder_of_videos(folder: Path, tmp_path: Path, encode, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "latents"
    assert encode(folder, *CLIP, "-o", out, "--codec", "my_codec:Averages", "--dtype", "fp32", "--batch", 2) == 0
    printed = capsys.readouterr().out
    assert "clips       3 (3 new" in printed and "from pattern" in printed and "1 + 4k" in printed
    assert "1 broken (broken.mp4:" in printed and "1 too short (v3.mp4: 3 of 5 frames" in printed
    source = opened(out)
    settings = {"num_frames": 5, "height_px": 16, "width_px": 24, "caption_pattern": "{name}"}
    videos = VideoFolder(VideoFolderConfig(path=str(folder), **settings))  # type: ignore[arg-type]
    batch, expected = source.clips(range(3)), videos.clips(range(3))
    assert torch.equal(batch.latents, Averages().encode(expected.pixels)) and batch.captions == expected.captions
    assert source.header.latent_shape == (3, 8, 12) and source.header.fps == 16 and source.header.num_frames == 5
    assert str(tmp_path) not in (out / "dataset.json").read_text() + (out / "index.jsonl").read_text()
    assert json.loads(source.header.source)["folder"] == "videos"
    before = sorted(path.name for path in out.iterdir())
    assert before == ["dataset.json", "index.jsonl", "shard-00000.safetensors"]
    assert encode(folder, *CLIP, "-o", out, "--codec", "my_codec:Averages", "--dtype", "fp32") == 0
    assert "clips       3 (0 new" in capsys.readouterr().out and sorted(p.name for p in out.iterdir()) == before


def test_a_world_without_end_with_text(tmp_path: Path, encode, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("my_codec:World", "size_px=6", "-o", tmp_path / "w", "--codec", "my_codec:Averages", "--workers", 0)
    assert encode(*command) == 2 and "give a limit" in capsys.readouterr().err
    assert encode(*command, "--limit", 5, "--text", "my_codec:Letters", "--dtype", "bf16") == 0
    source = opened(tmp_path / "w")
    assert source.header.fps == 8 and source.header.height_px == 6 and source.header.text_rows == 8
    batch = source.clips([3, 1])
    assert batch.captions == (("world 3", "then"), ("world 1", "then")) and batch.prompt_index.tolist() == [[0, 1]] * 2
    assert torch.allclose(batch.latents[0], torch.tensor(0.03), rtol=1e-2)
    assert torch.equal(batch.text[1], Letters()(["world 1", "then"]))
    assert encode("my_codec:World", "size_px=6", "-o", tmp_path / "b", "--codec", "my_codec:Averages", "--workers", 0,
                  "--limit", 5, "--bf16", "--dtype", "fp32") == 0  # fmt: skip
    torch.testing.assert_close(opened(tmp_path / "b").clips([3, 1]).latents, batch.latents, rtol=1e-2, atol=1e-3)


def test_an_interrupted_run_continues(tmp_path: Path, encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C keeps what was encoded; the second run makes only the rest, and the result is the same."""
    calls = []
    real = World.batch

    def batch(self: World, step: int, size: int, **kwargs: int) -> Batch:
        calls.append(step)
        if step == 6 and calls.count(6) == 1:
            raise KeyboardInterrupt
        return real(self, step, size, **kwargs)

    monkeypatch.setattr(World, "batch", batch)
    command = ("my_codec:World", "--codec", "my_codec:Averages", "--batch", 2, "--limit", 9, "--workers", 0, "-o")
    assert encode(*command, tmp_path / "a") == 130
    with pytest.raises(ValueError, match="interrupted after 6 clips"):
        opened(tmp_path / "a")
    calls[:] = [6]
    assert encode(*command, tmp_path / "a") == 0
    assert calls == [6, 0, 6, 7, 8]  # clip 0 only tells the shape
    assert encode(*command, tmp_path / "b") == 0
    assert torch.equal(opened(tmp_path / "a").clips(range(9)).latents, opened(tmp_path / "b").clips(range(9)).latents)


def test_clips_of_different_stages_do_not_mix(tmp_path: Path) -> None:
    """The header says what of the stage is not as usual; a motion that is named twice comes twice as often."""
    codec = Loaded(module=Averages(), name="x")
    motions = ("orbits", "orbits", "rests")
    for name, world in (("usual", StageConfig()), ("circles", StageConfig(motions=motions))):
        clips = StageClips(world, frames=5, size_px=16)
        header = encode_source(clips, codec, tmp_path / name, fps=16.0, limit=2).header
        told = {"source": "StageClips"} | ({"motions": list(motions)} if name == "circles" else {})
        assert json.loads(header.source) == told
    for other in (
        StageClips(frames=5, size_px=16),
        StageClips(StageConfig(motions=motions), split="dev", frames=5, size_px=16),
    ):
        with pytest.raises(ValueError, match="source"):
            encode_source(other, codec, tmp_path / "circles", fps=16.0, limit=4)


def test_a_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    class Rising(World):
        def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
            return World().batch(step * 20, size)

    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_source(Rising(), Loaded(module=Exploding(), name="x"), out, fps=8, limit=5, batch=1)
    assert not out.exists()


def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, encode, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    ok = ("--codec", "identity", "-o", out)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "none", *ok), "no such folder"),
        ((tmp_path / "empty", *ok), "without videos"),
        ((folder, *ok), "no captions"),
        ((folder, "num_frame=5", *ok), "did you mean num_frames"),
        ((folder, "num_frames=6", *ok), "try 5 or 9"),
        ((folder, *CLIP[1:], "num_frames=81", *ok), "none of use"),
        ((folder, *CLIP, "--codec", tmp_path / "bad.safetensors", "-o", out), "no safetensors file"),
        ((folder, *CLIP, "--codec", tmp_path / "none.safetensors", "-o", out), "no such file"),
        ((folder, *CLIP, "--codec", "my_codec:Nothing", "-o", out), "cannot be imported"),
        ((folder, *CLIP, "--codec", "identity", "-o", tmp_path / "file"), "got a file"),
        ((folder, *CLIP, "--codec", "identity", "-o", folder), "other content"),
        ((folder, *CLIP, *ok, "--limit", 0), "limit=0"),
        ((folder, *CLIP, *ok, "--device", "toaster"), "--device 'toaster'"),
        (("prompts", f"path={tmp_path / 'file'}", *ok, "--fps", 8), "no pixels"),
    ]
    for arguments, message in cases:
        assert encode(*arguments) == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unspool: error:")]
        assert len(lines) == 1 and message in lines[0], (arguments, lines)
        assert not out.exists()


def test_another_codec_does_not_continue_a_data_set(folder: Path, tmp_path: Path, encode, capsys) -> None:
    command = (folder, *CLIP, "-o", tmp_path / "out", "--codec")
    assert encode(*command, "identity") == 0
    assert encode(*command, "my_codec:Averages") == 2
    assert "latents with codec='identity'; expected 'my_codec:Averages'" in capsys.readouterr().err


def test_a_file_says_which_class_reads_it(tmp_path: Path) -> None:
    from unspool.weights.write import save_file

    path = save_file({"a": torch.zeros(1)}, tmp_path / "t.safetensors", metadata={"config": '{"_class_name": "Kept"}'})

    class Kept:
        @classmethod
        def from_single_file(cls, path: Path) -> str:
            return f"read {path.name}"

    sys.modules[__name__].Kept = Kept  # type: ignore[attr-defined]
    loaded = load_file_or_name(str(path), {"Kept": f"{__name__}:Kept"})
    assert (loaded.module, loaded.name) == ("read t.safetensors", "Kept") and len(loaded.sha256 or "") == 64
    with pytest.raises(ValueError, match="names the class 'Kept'; expected one of Other"):
        load_file_or_name(str(path), {"Other": "x:Y"})


@pytest.mark.parametrize("mean", [None, (0.5, -0.5)])
def test_a_codec_file_states_its_hash_padding_and_normalisation(
    folder: Path, tmp_path: Path, encode, mean: tuple[float, ...] | None
) -> None:
    from unspool.models.taehv import Taehv, TaehvConfig
    from unspool.weights.files import sha256_of

    scales = {"latent_mean": mean, "latent_std": mean and (1.0, 2.0)}
    settings = TaehvConfig(encoder_widths=4, decoder_widths=(4,) * 4, latent_channels=2, padding="start", **scales)
    codec = Taehv(settings).eval()
    file = codec.save(tmp_path / "codec.safetensors")
    out = tmp_path / "out"
    assert encode(folder, *CLIP, "-o", out, "--codec", file, "--dtype", "fp32", "--device", "cpu") == 0
    source = opened(out)
    assert source.header.codec_sha256 == sha256_of([file]) and source.header.frames_rule == "1 + 4k, padding start"
    expected = {"latent_mean": [0.5, -0.5], "latent_std": [1.0, 2.0]} if mean else "none"
    assert source.header.normalisation == expected and source.header.latent_shape == (2, 2, 3)
    videos = VideoFolder(VideoFolderConfig(path=str(folder), num_frames=5, height_px=16, width_px=24, captions="none"))
    with torch.no_grad():
        assert torch.allclose(source.clips([1]).latents, codec.encode(videos.clips([1]).pixels), atol=1e-5)
