"""Checkpoints from every container give the same weights bit for bit, and nothing wrong is ever loaded silently."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file as write_safetensors
from torch import nn

from unspool import weights
from unspool.models.wan import keys, load
from unspool.models.wan.config import WanConfig
from unspool.weights.names import strip_prefixes

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


def prefixed(prefix: str, state: dict[str, torch.Tensor] = ORIGINAL) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def deep_wrapped() -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in ORIGINAL.items():
        parts = name.split(".")
        inner = ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"] if parts[0] == "blocks" else []
        out[".".join(["model", "_fsdp_wrapped_module", *parts[:2], *inner, "_orig_mod", *parts[2:]])] = tensor
    return out


@pytest.mark.parametrize(
    ("content", "wrapper"),
    [
        (
            {"generator_ema": prefixed("model."), "generator": prefixed("model.", random_state(1)), "critic": {}},
            "generator_ema",
        ),
        ({"generator": prefixed("model."), "critic": prefixed("model.", random_state(2))}, "generator"),
        ({"generator": prefixed("model."), "generator_ema": {}, "step": 7}, "generator"),
        ({"generator_ema": deep_wrapped()}, "generator_ema"),
        ({"model": ORIGINAL, "optimizer": {"lr": 1.0}}, "model"),
        (prefixed("model.diffusion_model."), "flat"),
        (prefixed("module._orig_mod.model."), "flat"),
        (ORIGINAL, "flat"),
        (keys.from_own(OWN, "diffusers"), "flat"),
        (OWN, "flat"),
    ],
    ids=["ema", "generator", "empty-ema", "fsdp-nested", "model", "comfy", "ddp", "flat", "diffusers", "own"],
)
def test_pickles_of_every_kind_give_the_same_weights(tmp_path: Path, content: dict, wrapper: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    found = load.read_wan(tmp_path / "model.pt", num_heads=2, text_len=7)
    assert found.config == TINY
    assert found.report.wrapper == wrapper and found.report.is_exact
    assert wrapper in found.report.summary()
    assert_same(found.tensors, OWN)


def test_the_wrapper_can_be_chosen_and_must_exist(tmp_path: Path) -> None:
    other = keys.from_own(random_state(1), "original")
    torch.save({"generator_ema": prefixed("model."), "generator": prefixed("model.", other)}, tmp_path / "model.pt")
    chosen = load.read_wan(tmp_path / "model.pt", num_heads=2, text_len=7, which="generator")
    assert_same(chosen.tensors, random_state(1))
    assert chosen.report.offered == ("generator_ema", "generator")
    for which in ("critic", "flat"):
        with pytest.raises(ValueError, match=r"expected one of \['generator_ema', 'generator'\]"):
            load.read_wan(tmp_path / "model.pt", which=which)


def test_a_legacy_pickle_is_read(tmp_path: Path) -> None:
    torch.save(ORIGINAL, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(load.read_wan(tmp_path / "old.pth", num_heads=2, text_len=7).tensors, OWN)


leading = st.sampled_from(["model", "module", "diffusion_model"])
infix = st.sampled_from(["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])


@settings(max_examples=100, deadline=None)
@given(front=st.lists(leading | infix, max_size=5), inside=st.lists(st.tuples(st.integers(1, 3), infix), max_size=4))
def test_prefixes_go_in_any_order_and_nesting(front: list[str], inside: list[tuple[int, str]]) -> None:
    parts = ["blocks", "3", "self_attn", "q", "weight"]
    for place, word in inside:
        parts.insert(place, word)
    name = ".".join([*front, *parts])
    assert strip_prefixes([name]) == {name: "blocks.3.self_attn.q.weight"}


def test_prefixes_that_make_two_names_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both 'model\.a\.weight' and 'a\.weight'"):
        strip_prefixes(["model.a.weight", "a.weight"])


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("this must never run",)


def half(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def damaged_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ("zip.pt", "safe.safetensors", "code.pt", "list.pt", "page.pt")}
    torch.save(ORIGINAL, files["zip.pt"])
    half(files["zip.pt"])
    write_safetensors(ORIGINAL, files["safe.safetensors"])
    half(files["safe.safetensors"])
    torch.save({"generator": {"a": Payload()}}, files["code.pt"])
    torch.save([torch.zeros(2)], files["list.pt"])
    files["page.pt"].write_text("<html>not found</html>")
    files["page.safetensors"] = folder / "page.safetensors"
    files["page.safetensors"].write_text("<html>not found</html>")
    files["lfs.safetensors"] = folder / "lfs.safetensors"
    files["lfs.safetensors"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    files["empty.pt"] = folder / "empty.pt"
    files["empty.pt"].touch()
    files["header.safetensors"] = folder / "header.safetensors"
    files["header.safetensors"].write_bytes(struct.pack("<Q", 2**60) + b"{}")
    return files


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("zip.pt", "truncated"),
        ("safe.safetensors", "truncated"),
        ("code.pt", "more than tensors"),
        ("list.pt", "holding a list"),
        ("page.pt", "expected .safetensors"),
        ("page.safetensors", "truncated or no safetensors"),
        ("lfs.safetensors", "git-lfs"),
        ("empty.pt", "empty"),
        ("header.safetensors", "truncated or no safetensors"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, says: str) -> None:
    path = damaged_files(tmp_path)[name]
    with pytest.raises(ValueError, match=says) as caught:
        weights.read_checkpoint(path)
    assert "expected" in str(caught.value) or "fetch it again" in str(caught.value)
    assert "never run" not in capsys.readouterr().out


def test_absent_sources_are_named(tmp_path: Path) -> None:
    for source in (tmp_path / "no.safetensors", str(tmp_path / "nothing"), "checkpoints/a/b.pt", "local_name"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            weights.resolve(source)
    with pytest.raises(FileNotFoundError, match="without weights"):
        weights.read_checkpoint(tmp_path)


def test_every_difference_is_listed_in_the_files_own_names(tmp_path: Path) -> None:
    broken = dict(ORIGINAL)
    del broken["blocks.1.self_attn.k.weight"]
    broken["blocks.0.extra.weight"] = torch.zeros(1)
    broken["blocks.0.ffn.0.bias"] = torch.zeros(21)
    write_safetensors(broken, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as caught:
        load.read_wan(tmp_path / "w.safetensors", config=TINY)
    text = str(caught.value)
    assert "1 missing: blocks.1.self_attn.k.weight" in text
    assert "1 unexpected: blocks.0.extra.weight" in text
    assert "blocks.0.ffn.0.bias [21] instead of [20]" in text
    assert "dim=24" in text and "config=" in text


def test_image_conditioned_networks_without_image_keys_are_refused(tmp_path: Path) -> None:
    """Wan2.2 i2v has the keys of t2v; only its 36 input channels differ."""
    state = ORIGINAL | {"patch_embedding.weight": torch.zeros(24, 9, 1, 2, 2)}
    write_safetensors(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="image-conditioned"):
        load.read_wan(tmp_path / "w.safetensors", num_heads=2)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = ORIGINAL | {"head.head.weight": ORIGINAL["head.head.weight"].to(torch.int8)}
    write_safetensors(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="int8"):
        load.read_wan(tmp_path / "w.safetensors", config=TINY)


def test_arguments_must_agree_with_the_config(tmp_path: Path) -> None:
    load.save_wan_file(OWN, tmp_path / "w.safetensors", config=TINY)
    with pytest.raises(ValueError, match="num_heads=3"):
        load.read_wan(tmp_path / "w.safetensors", num_heads=3)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2, track_running_stats=False)


def test_meta_module_gets_its_own_memory_and_dtype(tmp_path: Path) -> None:
    source = Small()
    weights.save_file(source.state_dict(), tmp_path / "s.safetensors")
    read = weights.read_checkpoint(tmp_path / "s.safetensors").tensors
    with torch.device("meta"):
        module = Small()
    weights.load_into(module, read, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and not p.is_meta and p.requires_grad for p in module.parameters())
    assert torch.equal(module.linear.weight, source.linear.weight.bfloat16())
    with torch.device("meta"):
        same = Small()
    weights.load_into(same, read)
    with torch.no_grad():
        same.linear.weight.zero_()
    assert torch.equal(read["linear.weight"], source.linear.weight)


def test_real_module_is_filled_in_place() -> None:
    source, module = Small(), Small()
    weight = module.linear.weight
    weights.load_into(module, source.state_dict())
    assert module.linear.weight is weight and torch.equal(weight, source.linear.weight)
    with pytest.raises(ValueError, match=r"module\.to"):
        weights.load_into(module, source.state_dict(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"1 missing: norm\.bias"):
        weights.load_into(module, {k: v for k, v in source.state_dict().items() if k != "norm.bias"})


def test_network_round_trip(tmp_path: Path) -> None:
    network = pytest.importorskip("unspool.models.wan.network")
    torch.manual_seed(0)
    source = network.WanTransformer(TINY)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    load.save_wan(source, tmp_path / "m", key_format="diffusers", max_shard_size=20_000)
    loaded = load.from_pretrained(tmp_path / "m")
    assert loaded.config == TINY
    assert_same(dict(loaded.state_dict()), state)
    narrow = load.from_pretrained(tmp_path / "m", torch_dtype="bfloat16")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="torch_dtype"):
        load.from_pretrained(tmp_path / "m", dtype="fp16", torch_dtype="bf16")


def test_hub_names_download_only_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    load.save_wan(OWN, tmp_path / "transformer", config=TINY, key_format="diffusers")
    asked: dict[str, Any] = {}

    def snapshot(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    path = weights.resolve("owner/name", revision="v1", token="t", cache_dir="c", local_files_only=True)
    assert_same(load.read_wan(path).tensors, OWN)
    assert (asked["repo"], asked["revision"], asked["token"], asked["local_files_only"]) == (
        "owner/name",
        "v1",
        "t",
        True,
    )

    def fetched(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])

    for name in ("config.json", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "model.safetensors"):
        assert fetched(name)
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "Wan2.1_VAE.pth"):
        assert not fetched(name)
    for name in ("diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bin"):
        assert not fetched(name)
