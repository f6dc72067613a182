"""The three namings of the Wan transformer map onto each other exactly, and other networks are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import golden_path
from unspool.models.wan import keys
from unspool.models.wan.config import WanConfig, infer_config

WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_layers=30, num_heads=12)
TINY = WanConfig(
    dim=24, ffn_dim=20, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=10, text_len=7, freq_dim=8
)


def random_state(config: WanConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in keys.own_shapes(config).items()}


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, tuple[int, ...]]]:
    model = json.loads(golden_path("diffusers_wan.json").read_text())["real_model"]["Wan2.1-T2V-1.3B"]
    return {fmt: {name: tuple(s) for name, s in model[fmt].items()} for fmt in ("original", "diffusers")}


@pytest.mark.parametrize("fmt", ["original", "diffusers"])
def test_825_published_keys_and_shapes(published: dict, fmt: keys.KeyFormat) -> None:
    mapped = keys.shapes_as(keys.own_shapes(WAN_1_3B), fmt)
    assert len(published[fmt]) == 825
    assert mapped == published[fmt]
    assert keys.detect(published[fmt]) == fmt


def test_825_keys_round_trip_on_meta(published: dict) -> None:
    """original -> own -> diffusers -> own -> original, names, shapes and the pairing of names."""
    names = json.loads(golden_path("diffusers_wan.json").read_text())["original_to_diffusers"]
    original = {name: torch.empty(shape, device="meta") for name, shape in published["original"].items()}
    own = keys.to_own(original, "original")
    assert {name: tuple(t.shape) for name, t in own.items()} == keys.own_shapes(WAN_1_3B)
    diffusers = keys.from_own(own, "diffusers")
    assert {name: tuple(t.shape) for name, t in diffusers.items()} == published["diffusers"]
    back = keys.from_own(keys.to_own(diffusers, "diffusers"), "original")
    assert {name: tuple(t.shape) for name, t in back.items()} == published["original"]
    for ours, theirs in names.items():
        assert keys.DIFFUSERS.split_name(ours) == (theirs,)
        assert keys.DIFFUSERS.join_name(theirs)[0] == ours


def test_both_namings_of_the_golden_network_give_one_state_bitwise() -> None:
    tensors = load_file(golden_path("diffusers_wan.safetensors"))
    states = {}
    for fmt in ("original", "diffusers"):
        prefix = f"weights_{fmt}/"
        named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        assert keys.detect(named) == fmt
        states[fmt] = keys.to_own(named, fmt)
        back = keys.from_own(states[fmt], fmt)
        assert set(back) == set(named) and all(torch.equal(back[name], named[name]) for name in named)
    assert set(states["original"]) == set(states["diffusers"])
    assert all(torch.equal(t, states["diffusers"][name]) for name, t in states["original"].items())


def test_fusion_order_is_q_k_v() -> None:
    own = random_state(TINY)
    original = keys.from_own(own, "original")
    for n, part in enumerate("qkv"):
        rows = own["blocks.1.self_attn.qkv.weight"][24 * n : 24 * (n + 1)]
        assert torch.equal(original[f"blocks.1.self_attn.{part}.weight"], rows)
    for n, part in enumerate("kv"):
        bias = own["blocks.1.cross_attn.kv.bias"][24 * n : 24 * (n + 1)]
        assert torch.equal(original[f"blocks.1.cross_attn.{part}.bias"], bias)


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3),
    half=st.integers(3, 6),
    layers=st.integers(1, 12),
    patch=st.sampled_from([(1, 1, 1), (1, 2, 2), (1, 1, 2)]),
    channels=st.integers(1, 5),
    vector=st.sampled_from([0, 5]),
    octaves=st.sampled_from([0, 1, 4]),
)
def test_round_trip_and_inference_of_any_size(
    heads: int, half: int, layers: int, patch: tuple[int, int, int], channels: int, vector: int, octaves: int
) -> None:
    config = WanConfig(
        dim=2 * half * heads,
        ffn_dim=9,
        num_layers=layers,
        num_heads=heads,
        in_channels=channels,
        out_channels=channels,
        patch_size=patch,
        text_dim=6,
        text_len=5,
        freq_dim=4,
        frame_vector_dim=vector,
        place_octaves=octaves,
    )
    own = random_state(config)
    for fmt in keys.MAPS:
        there = keys.from_own(own, fmt)
        assert {name: tuple(t.shape) for name, t in there.items()} == keys.shapes_as(keys.own_shapes(config), fmt)
        assert keys.detect(there) == fmt
        back = keys.to_own(there, fmt)
        assert set(back) == set(own) and all(torch.equal(back[name], own[name]) for name in own)
    shapes = keys.shapes_as(keys.own_shapes(config), "original")
    assert infer_config(shapes, num_heads=heads, text_len=5) == config


@pytest.mark.parametrize(("vector", "octaves"), [(0, 0), (6, 0), (0, 3)])
def test_own_shapes_are_those_of_the_network(vector: int, octaves: int) -> None:
    network = pytest.importorskip("unspool.models.wan.network")
    config = WanConfig(
        dim=24,
        ffn_dim=20,
        num_layers=3,
        num_heads=2,
        text_dim=10,
        freq_dim=8,
        frame_vector_dim=vector,
        extra_channels=2,
        place_octaves=octaves,
    )
    with torch.device("meta"):
        state = network.WanTransformer(config).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == keys.own_shapes(config)


def test_published_keys_are_those_of_the_network_on_meta(published: dict) -> None:
    network = pytest.importorskip("unspool.models.wan.network")
    with torch.device("meta"):
        state = network.WanTransformer(WAN_1_3B).state_dict()
    for fmt in ("original", "diffusers"):
        named = keys.from_own(state, fmt)
        assert {name: tuple(t.shape) for name, t in named.items()} == published[fmt]


def test_joining_refuses_incomplete_and_mixed_names() -> None:
    original = keys.from_own(random_state(TINY), "original")
    short = {name: t for name, t in original.items() if name != "blocks.0.self_attn.k.bias"}
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.k\.bias"):
        keys.to_own(short, "original")
    mixed = original | {"blocks.0.self_attn.qkv.weight": torch.zeros(72, 24)}
    with pytest.raises(ValueError, match="one naming"):
        keys.to_own(mixed, "original")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("img_emb.proj.0.weight", "image-conditioned"),
        ("blocks.0.cross_attn.k_img.weight", "image-conditioned"),
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("blocks.0.self_attn.q.lora_A.weight", "LoRA"),
    ],
)
def test_relatives_are_refused_by_name(extra: str, says: str) -> None:
    names = [*keys.shapes_as(keys.own_shapes(TINY), "original"), extra]
    with pytest.raises(ValueError, match=says):
        keys.detect(names)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "HunyuanVideo"),
        (["transformer_blocks.0.attn1.to_q.weight"], "not Wan"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
        (["conv1.weight", "layer1.0.bn1.weight", "fc.bias"], "unknown architecture"),
    ],
)
def test_other_networks_are_refused_by_name(names: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        keys.detect(names)


def test_config_spellings_agree() -> None:
    assert WanConfig.from_original(TINY.to_original()) == TINY
    assert WanConfig.from_diffusers(TINY.to_diffusers()) == TINY
    assert WanConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    for spelled in (TINY.to_original(), TINY.to_diffusers(), TINY.to_dict()):
        assert WanConfig.parse(json.loads(json.dumps(spelled))) == TINY
    assert "text_len" not in WAN_1_3B.to_diffusers()


def test_config_reads_the_golden_files() -> None:
    content = json.loads(golden_path("diffusers_wan.json").read_text())
    original = WanConfig.from_original(content["config_original"])
    assert WanConfig.from_diffusers(content["config_diffusers"] | {"text_len": 12}) == original
    tiny = WanConfig.from_original(json.loads(golden_path("wan_tiny_config.json").read_text()))
    shapes = {name: tuple(t.shape) for name, t in load_file(golden_path("wan_tiny_weights.safetensors")).items()}
    assert infer_config(shapes, num_heads=2, text_len=12) == tiny
    assert keys.shapes_as(keys.own_shapes(tiny), "original") == shapes


def test_config_ignores_harmless_original_keys() -> None:
    values = TINY.to_original() | {"_diffusers_version": "0.30", "window_size": [-1, -1], "sink_size": 3}
    assert WanConfig.from_original(values) == TINY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "i2v"}, "i2v"),
        ({"model_type": "flf2v"}, "flf2v"),
        ({"qk_norm": False}, "qk_norm"),
        ({"cross_attn_norm": False}, "cross_attn_norm"),
        ({"in_dim": 36}, "image-conditioned"),
        ({"dim": "24"}, "dim"),
    ],
)
def test_original_config_refusals(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WanConfig.from_original(TINY.to_original() | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_dim": 1280}, "image_dim"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim"),
        ({"pos_embed_seq_len": 514}, "first-and-last"),
        ({"qk_norm": "rms_norm"}, "qk_norm"),
        ({"in_channels": 36}, "image-conditioned"),
    ],
)
def test_diffusers_config_refusals(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WanConfig.from_diffusers(TINY.to_diffusers() | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "heads divide"),
        ({"num_heads": 8}, "head_dim=3"),
        ({"freq_dim": 9}, "even"),
        ({"patch_size": (2, 2, 2)}, "latent frames per token"),
        ({"patch_size": (1, 2)}, "three positive ints"),
        ({"num_layers": 0}, "num_layers"),
        ({"eps": 0.0}, "eps"),
        ({"frame_vector_dim": -1}, "frame_vector_dim"),
        ({"place_octaves": -1}, "place_octaves"),
        ({"num_head": 2}, "did you mean"),
    ],
)
def test_own_config_refusals(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WanConfig.from_dict(TINY.to_dict() | change)


@pytest.mark.parametrize("option", ["frame_vector_dim", "extra_channels", "place_octaves"])
def test_own_options_have_no_public_spelling(option: str) -> None:
    config = WanConfig.from_dict({"dim": 24, "ffn_dim": 20, "num_layers": 1, "num_heads": 2, option: 3})
    for spell in (config.to_original, config.to_diffusers):
        with pytest.raises(ValueError, match=option):
            spell()


def test_heads_are_never_guessed_for_small_networks() -> None:
    shapes = keys.shapes_as(keys.own_shapes(TINY), "original")
    with pytest.raises(ValueError, match="num_heads="):
        infer_config(shapes)
    assert infer_config(keys.shapes_as(keys.own_shapes(WAN_1_3B), "original")) == WAN_1_3B
    with pytest.raises(ValueError, match=r"head\.head\.weight"):
        infer_config({name: shape for name, shape in shapes.items() if name != "head.head.weight"}, num_heads=2)
