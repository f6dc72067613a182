"""A low-rank adapter merges into a base of any naming, in fp32, and never lands nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file as write_safetensors

from unspool import weights
from unspool.models.wan import keys, load
from unspool.models.wan.config import WanConfig

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


def adapter(rank: int = 3, prefix: str = "base_model.model.", infix: str = "") -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(3)
    targets = [
        "blocks.0.self_attn.q",
        "blocks.1.self_attn.v",
        "blocks.1.cross_attn.k",
        "blocks.0.ffn.2",
        "patch_embedding",
    ]
    state, updates = {}, {}
    for target in targets:
        weight = ORIGINAL[f"{target}.weight"]
        a = torch.randn(rank, *weight.shape[1:], generator=generator)
        b = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=generator)
        state |= {f"{prefix}{target}.lora_A{infix}.weight": a, f"{prefix}{target}.lora_B{infix}.weight": b}
        updates[f"{target}.weight"] = (b.flatten(1).double() @ a.flatten(1).double()).reshape(weight.shape)
    return state, updates


@pytest.mark.parametrize("base_format", ["own", "original", "diffusers"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_lora_merges_into_a_base_of_any_naming(tmp_path: Path, base_format: keys.KeyFormat, wrapped: bool) -> None:
    state, updates = adapter(prefix="base_model.model.model." if wrapped else "", infix=".default" if wrapped else "")
    torch.save({"generator_lora": state, "critic_lora": {}} if wrapped else state, tmp_path / "lora.pt")
    load.save_wan_file(OWN, tmp_path / "base.safetensors", config=TINY, key_format=base_format)
    found = load.read_wan(tmp_path / "base.safetensors", lora=tmp_path / "lora.pt", lora_alpha=6)
    expected = dict(ORIGINAL)
    for name, update in updates.items():
        expected[name] = (ORIGINAL[name].double() + 2.0 * update).float()
    merged = keys.from_own(found.tensors, "original")
    assert found.report.num_merged == len(updates) == 5
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        if name in updates:
            assert not torch.equal(merged[name], ORIGINAL[name])
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(merged[name], tensor), name


def test_lora_of_the_fused_weight_merges_into_original_names(tmp_path: Path) -> None:
    a, b = torch.randn(2, 24), torch.randn(72, 2)
    state = {"blocks.0.self_attn.qkv.lora_A.weight": a, "blocks.0.self_attn.qkv.lora_B.weight": b}
    write_safetensors(state, tmp_path / "lora.safetensors")
    load.save_wan_file(OWN, tmp_path / "base.safetensors", config=TINY, key_format="original")
    merged = load.read_wan(tmp_path / "base.safetensors", lora=tmp_path / "lora.safetensors", lora_alpha=2).tensors
    name = "blocks.0.self_attn.qkv.weight"
    torch.testing.assert_close(merged.pop(name), OWN[name] + b @ a)
    assert_same(merged, {key: tensor for key, tensor in OWN.items() if key != name})


def test_lora_in_bf16_is_merged_in_fp32(tmp_path: Path) -> None:
    """An update below bf16's resolution of the product must still be computed in fp32 and rounded once."""
    base = {"w.weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()}
    a = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    b = torch.randn(8, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    lora = weights.Lora(source="", pairs={"w.weight": (a, b)}, scales={"w.weight": 0.5}, wrapper="flat", files=())
    merged = weights.merge_lora(base, lora)["w.weight"]
    exact = (base["w.weight"].float() + 0.5 * (b.float() @ a.float())).bfloat16()
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact)


def test_lora_scale_comes_from_its_config(tmp_path: Path) -> None:
    state, _ = adapter(rank=4)
    write_safetensors(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="alpha="):
        weights.read_lora(tmp_path)
    config = {"lora_alpha": 8, "r": 4, "alpha_pattern": {"blocks.0.ffn.2": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = weights.read_lora(tmp_path / "adapter_model.safetensors").scales
    assert scales["blocks.0.self_attn.q.weight"] == 2.0 and scales["blocks.0.ffn.2.weight"] == 0.5
    assert set(weights.read_lora(tmp_path / "adapter_model.safetensors", alpha=4).scales.values()) == {1.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_rslora": True}))
    assert set(weights.read_lora(tmp_path / "adapter_model.safetensors").scales.values()) == {4.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"blocks.7.self_attn.q.lora_A.weight": (3, 24), "blocks.7.self_attn.q.lora_B.weight": (24, 3)},
            "land on no weight",
        ),
        ({"blocks.0.self_attn.k.lora_A.weight": (3, 24)}, "only one of"),
        (
            {"blocks.0.self_attn.k.lora_A.weight": (3, 25), "blocks.0.self_attn.k.lora_B.weight": (24, 3)},
            "do not belong",
        ),
        ({"blocks.0.norm3.bias": (24,)}, "no PEFT LoRA keys"),
        ({"blocks.0.self_attn.k.lora_A.other.weight": (3, 24)}, "several adapters"),
    ],
)
def test_lora_that_does_not_fit_is_refused(tmp_path: Path, change: dict, says: str) -> None:
    state, _ = adapter(prefix="")
    write_safetensors(state | {name: torch.zeros(shape) for name, shape in change.items()}, tmp_path / "l.safetensors")
    load.save_wan_file(OWN, tmp_path / "base.safetensors", config=TINY)
    with pytest.raises(ValueError, match=says):
        load.read_wan(tmp_path / "base.safetensors", lora=tmp_path / "l.safetensors", lora_alpha=3)


def test_lora_alone_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(adapter(prefix="")[0], tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="without their base"):
        load.read_wan(tmp_path / "lora.pt")
