"""What is saved reads back bit for bit, and a failed save leaves everything as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as write_safetensors

from unspool import weights
from unspool.models.wan import keys, load
from unspool.models.wan.config import WanConfig
from unspool.weights import write

TINY = WanConfig(
    dim=24, ffn_dim=20, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=10, text_len=7, freq_dim=8
)


def random_state(seed: int = 0, config: WanConfig = TINY) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in keys.own_shapes(config).items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


OWN = random_state()
ORIGINAL = keys.from_own(OWN, "original")


@pytest.mark.parametrize("key_format", ["own", "original", "diffusers"])
@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
def test_saved_directory_reads_back_bitwise(
    tmp_path: Path, key_format: keys.KeyFormat, max_shard_size: int | str
) -> None:
    paths = load.save_wan(OWN, tmp_path / "m", config=TINY, key_format=key_format, max_shard_size=max_shard_size)
    shards = [path for path in paths if path.suffix == ".safetensors"]
    assert (len(shards) > 2) == (max_shard_size != "5GB")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted(p.name for p in paths)
    found = load.read_wan(tmp_path / "m")
    assert found.config == TINY and found.report.format == key_format
    assert_same(found.tensors, OWN)
    for shard in shards:
        stored = sum(t.numel() * t.element_size() for t in load_file(shard).values())
        assert stored <= 20_000 or max_shard_size == "5GB"


def test_pipeline_layout_is_found(tmp_path: Path) -> None:
    load.save_wan(OWN, tmp_path / "m" / "transformer", config=TINY, key_format="diffusers")
    (tmp_path / "m" / "model_index.json").write_text("{}")
    assert_same(load.read_wan(tmp_path / "m").tensors, OWN)
    assert_same(load.read_wan(tmp_path / "m", subfolder="transformer").tensors, OWN)


def test_variant_is_found_and_required(tmp_path: Path) -> None:
    half_precision = {name: tensor.half() for name, tensor in OWN.items()}
    load.save_wan(OWN, tmp_path, config=TINY)
    write_safetensors(half_precision, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(load.read_wan(tmp_path, variant="fp16").tensors, half_precision)
    assert_same(load.read_wan(tmp_path).tensors, OWN)
    with pytest.raises(FileNotFoundError, match="bf16"):
        load.read_wan(tmp_path, variant="bf16")


def test_one_file_suffices(tmp_path: Path) -> None:
    path = load.save_wan_file(
        OWN, tmp_path / "w.safetensors", config=TINY, key_format="original", metadata={"chunk": "3"}
    )
    found = load.read_wan(path)
    assert found.config == TINY and found.metadata["chunk"] == "3"
    assert_same(found.tensors, OWN)


def test_saving_over_shards_leaves_no_stale_file(tmp_path: Path) -> None:
    load.save_wan(OWN, tmp_path, config=TINY, max_shard_size=20_000)
    (tmp_path / "README.md").write_text("card")
    other = random_state(5)
    load.save_wan(other, tmp_path, config=TINY)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert_same(load.read_wan(tmp_path).tensors, other)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    target = tmp_path / "m"
    if existing:
        load.save_wan(OWN, target, config=TINY, max_shard_size=20_000)
    before = {path.name: path.read_bytes() for path in target.glob("*")}
    calls: list[object] = []
    real = write._write

    def fail_at_the_second(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            Path(args[1]).write_bytes(b"part")
            raise OSError("no space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(write, "_write", fail_at_the_second)
    with pytest.raises(OSError, match="no space"):
        load.save_wan(random_state(9), target, config=TINY, max_shard_size=20_000)
    calls.pop()
    with pytest.raises(OSError, match="no space"):
        load.save_wan_file(random_state(9), tmp_path / "w.safetensors", config=TINY)
    assert {path.name: path.read_bytes() for path in target.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if existing else [])


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    load.save_wan(OWN, tmp_path, config=TINY, max_shard_size=20_000)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    moved = {name: shards[0] for name in content["weight_map"]}
    index.write_text(json.dumps(content | {"weight_map": {**content["weight_map"], "head.head.bias": shards[0]}}))
    with pytest.raises(ValueError, match="does not agree"):
        load.read_wan(tmp_path)
    index.write_text(json.dumps({"weight_map": {**moved, "x": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="inside"):
        load.read_wan(tmp_path)
    index.write_text(json.dumps(content))
    (tmp_path / shards[-1]).unlink()
    with pytest.raises(FileNotFoundError, match=shards[-1]):
        load.read_wan(tmp_path)


def test_tied_and_overlapping_tensors_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"a": base, "b": base, "c": base[2:8], "d": base.view(3, 4).t()}
    weights.save_file(state, tmp_path / "t.safetensors")
    assert_same(load_file(tmp_path / "t.safetensors"), {k: v.contiguous() for k, v in state.items()})


def test_a_compiled_or_wrapped_network_is_saved_under_plain_names(tmp_path: Path) -> None:
    wrapped = {f"_orig_mod.{name}".replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for name, t in OWN.items()}
    load.save_wan(wrapped, tmp_path / "m", config=TINY)
    assert_same(load.read_wan(tmp_path / "m").tensors, OWN)


def test_saving_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a config"):
        load.save_wan(OWN, tmp_path / "m")
    with pytest.raises(ValueError, match="missing"):
        load.save_wan({"head.modulation": OWN["head.modulation"]}, tmp_path / "m", config=TINY)
    config = WanConfig.from_dict(TINY.to_dict() | {"frame_vector_dim": 3})
    with pytest.raises(ValueError, match="frame_vector_dim"):
        load.save_wan(random_state(0, config), tmp_path / "m", config=config, key_format="diffusers")
    assert not (tmp_path / "m").exists()


def test_header_is_readable_without_us(tmp_path: Path) -> None:
    path = load.save_wan_file(OWN, tmp_path / "w.safetensors", config=TINY, key_format="diffusers")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert WanConfig.parse(json.loads(header["config"])) == TINY
    assert header["format"] == "pt" and header["key_format"] == "diffusers"


def test_the_same_weights_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Data, scores and models are known by the hashes of weight files; safetensors orders the header by chance."""
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    words = {f"key {i}": f'a "value" with ü, {i}' for i in range(40)}
    one = weights.save_file(tensors, tmp_path / "one.safetensors", metadata=words)
    two = weights.save_file(tensors, tmp_path / "two.safetensors", metadata=dict(reversed(words.items())))
    assert one.read_bytes() == two.read_bytes()
    assert_same(load_file(one), tensors)
    with safe_open(one, "pt") as file:
        assert file.metadata() == {"format": "pt", **words}
    size = int.from_bytes(one.read_bytes()[:8], "little")
    stated = list(json.loads(one.read_bytes()[8 : 8 + size])["__metadata__"])
    assert stated == sorted(["format", *words])
