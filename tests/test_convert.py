"""`unspool convert` writes weights that equal their source bit for bit, with a header that says what they are."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from unspool import presets
from unspool.cli.convert import Args, run
from unspool.models.wan import keys, load
from unspool.models.wan.config import WanConfig

TINY = WanConfig(
    dim=24, ffn_dim=20, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=10, text_len=7, freq_dim=8
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    own = {name: torch.randn(shape, generator=generator) for name, shape in keys.own_shapes(TINY).items()}
    original = keys.from_own(own, "original")
    path = tmp_path / "student.pt"
    torch.save({"generator_ema": {f"model.{name}": t.clone() for name, t in original.items()}, "step": 600}, path)
    return path


def convert(source: Path, out: Path, **options: object) -> dict[str, str]:
    assert run(Args(source=str(source), out=out, num_heads=2, text_len=7, **options)) == 0  # type: ignore[arg-type]
    with safe_open(out, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("key_format", ["own", "original", "diffusers"])
def test_weights_and_header(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key_format: keys.KeyFormat
) -> None:
    header = convert(
        source,
        tmp_path / "out.safetensors",
        format=key_format,
        chunk=3,
        steps="1000,750,500,250,0",
        shift=5.0,
        window=21,
        sink=0,
        licence="Apache-2.0",
    )
    saved = torch.load(source, weights_only=True)["generator_ema"]
    expected = keys.to_own({name.removeprefix("model."): t for name, t in saved.items()}, "original")
    expected = keys.from_own(expected, key_format)
    written = load_file(tmp_path / "out.safetensors")
    assert set(written) == set(expected) and all(torch.equal(written[name], t) for name, t in expected.items())
    facts = {name: json.loads(header[name]) for name in ("chunk", "steps", "warp", "shift", "window", "sink", "config")}
    assert facts.pop("config") == {"_class_name": "WanTransformer", **TINY.to_dict()}
    assert facts == {"chunk": 3, "steps": [1000, 750, 500, 250], "warp": True, "shift": 5.0, "window": 21, "sink": 0}
    assert header["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (header["source_format"], header["source_wrapper"], header["licence"]) == (
        "original",
        "generator_ema",
        "Apache-2.0",
    )
    assert str(tmp_path) not in json.dumps(header)
    printed = capsys.readouterr().out
    assert "generator_ema" in printed and "missing 0, unexpected 0" in printed and "Apache-2.0" in printed


def test_converting_again_keeps_the_facts_and_names_the_new_source(source: Path, tmp_path: Path) -> None:
    first = convert(source, tmp_path / "a.safetensors", chunk=3, licence="Apache-2.0")
    second = convert(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers", dtype="bfloat16", chunk=1
    )
    assert second["licence"] == first["licence"] and second["chunk"] == "1" and second["key_format"] == "diffusers"
    assert second["source_sha256"] == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert {t.dtype for t in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    in_place = convert(tmp_path / "b.safetensors", tmp_path / "b.safetensors", format="original")
    assert in_place["key_format"] == "original"
    assert keys.detect(load_file(tmp_path / "b.safetensors")) == "original"


def test_lora_is_merged_and_recorded(source: Path, tmp_path: Path) -> None:
    lora = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(24, 2),
    }
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    plain = convert(source, tmp_path / "plain.safetensors", format="original")
    header = convert(source, tmp_path / "out.safetensors", format="original", lora=tmp_path / "lora.pt", lora_alpha=1.0)
    assert header["lora_sha256"] == hashlib.sha256((tmp_path / "lora.pt").read_bytes()).hexdigest()
    assert "lora_sha256" not in plain
    before, after = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "out.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["blocks.0.self_attn.q.weight"]
    torch.testing.assert_close(after[changed[0]], before[changed[0]] + 1.0)


def test_preset_supplies_facts_and_options_override_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    small = dataclasses.replace(presets.get("causvid-3step"), network=TINY, files=())
    monkeypatch.setitem(presets.PRESETS, "small", small)
    header = convert(source, tmp_path / "out.safetensors", preset="small", chunk=1)
    assert json.loads(header["steps"]) == [1000, 757, 522] and header["warp"] == "false" and header["window"] == "full"
    assert header["chunk"] == "1" and header["licence"] == "CC-BY-NC-SA-4.0"
    assert "CC-BY-NC-SA-4.0" in capsys.readouterr().out


def test_the_network_of_another_preset_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dim=1536"):
        run(Args(source=str(source), out=tmp_path / "out.safetensors", preset="self-forcing-dmd"))
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "self-forcing"}, "did you mean self-forcing"),
        ({"steps": "1000,a"}, "timesteps such as"),
        ({"steps": "250,500"}, "falling"),
        ({"steps": "0"}, "falling"),
        ({"chunk": 3, "sink": 3, "window": 5}, "sink \\+ chunk = 6"),
        ({"shift": 0.0}, "positive"),
        ({"which": "critic"}, "expected one of"),
    ],
)
def test_bad_options_are_refused_before_writing(source: Path, tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        convert(source, tmp_path / "out.safetensors", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]


def test_arguments_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"try out\.safetensors"):
        Args(source="a", out=Path("out.pt"))
    with pytest.raises(ValueError, match="--lora"):
        Args(source="a", out=Path("out.safetensors"), lora_alpha=1.0)


def test_command_line_parses_and_imports_no_torch() -> None:
    code = (
        "import sys, tyro\n"
        "from unspool.cli.convert import Args\n"
        "args = tyro.cli(Args, args=['in.pt', 'out.safetensors', '--window', 'full', '--format', 'diffusers'])\n"
        "assert (args.source, args.window, args.format) == ('in.pt', 'full', 'diffusers')\n"
        "import unspool.presets\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_presets_are_consistent() -> None:
    for name, preset in presets.PRESETS.items():
        assert preset.name == name
        assert preset.is_causal == (preset.chunk is not None)
        shapes = keys.shapes_as(keys.own_shapes(preset.network), "original")
        assert len(shapes) == 15 + 27 * preset.network.num_layers
    assert presets.get("longlive-1.0").window == 12 and presets.get("longlive-1.0").sink == 3


def test_preset_network_has_the_published_size() -> None:
    count = sum(torch.Size(shape).numel() for shape in keys.own_shapes(presets.get("wan2.1-t2v-1.3b").network).values())
    assert count == 1_418_996_800


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean longlive-1\.0"):
        presets.get("longlive")


def test_a_preset_of_base_and_lora_is_not_half_converted(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without --lora; it is a base and a LoRA of rank 256"):
        convert(source, tmp_path / "out.safetensors", preset="longlive-1.0")
    assert not (tmp_path / "out.safetensors").exists()


def test_converted_file_is_read_without_arguments(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.safetensors", format="diffusers")
    assert load.read_wan(tmp_path / "out.safetensors").config == TINY
