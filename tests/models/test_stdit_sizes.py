"""STDiT-XL/2 on no device: names and shapes as published, and bytes of the recorded caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unspool.evaluate.ca2vdm import ExtensionConfig, held_bytes, ways
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT

C, TEXT, ROWS = 1152, 4096, 120
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def published() -> Shapes:
    """The table of the recorded networks' notes, written out for 28 layers of width 1152."""
    shapes: Shapes = {"x_embedder.proj.weight": (C, 4, 1, 2, 2), "x_embedder.proj.bias": (C,)}
    shapes |= linear("t_embedder.mlp.0", C, 256) | linear("t_embedder.mlp.2", C, C) | linear("t_block.1", 6 * C, C)
    shapes |= linear("y_embedder.y_proj.fc1", C, TEXT) | linear("y_embedder.y_proj.fc2", C, C)
    shapes |= {"y_embedder.y_embedding": (ROWS, TEXT)}
    for i in range(28):
        block = f"blocks.{i}"
        shapes |= {f"{block}.scale_shift_table": (6, C)}
        for attention in ("attn", "attn_cf", "attn_temp"):
            shapes |= linear(f"{block}.{attention}.qkv", 3 * C, C) | linear(f"{block}.{attention}.proj", C, C)
        shapes |= linear(f"{block}.cross_attn.q_linear", C, C) | linear(f"{block}.cross_attn.kv_linear", 2 * C, C)
        shapes |= linear(f"{block}.cross_attn.proj", C, C)
        shapes |= linear(f"{block}.mlp.fc1", 4 * C, C) | linear(f"{block}.mlp.fc2", C, 4 * C)
    shapes |= linear("blocks.0.attn_temp_pre_merge", C, C + 1)
    return shapes | {"final_layer.scale_shift_table": (2, C)} | linear("final_layer.linear", 8 * 4, C)


def test_names_and_shapes_of_the_whole_xl_network() -> None:
    config = STDiTConfig.xl(caption_dim=TEXT, caption_len=ROWS, prefix_attention="separate", mask_channel=True)
    with torch.device("meta"):
        state = STDiT(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == published()
    without = {name: shape for name, shape in published().items() if "y_embedder" not in name and "cross" not in name}
    assert sum(torch.Size(shape).numel() for shape in without.values()) == 754_902_176


@pytest.mark.parametrize("name", ["xl_window41_prefix_enhanced", "xl_window49_guided_plain", "tiny_this_set_fp32"])
def test_bytes_of_recorded_caches(name: str, golden_json: Callable[[str], Any]) -> None:
    """Other windows, two branches of guidance, fp32: what later chunks can read is the recorded number."""
    recorded, tiny = golden_json("ca2vdm_config"), name.startswith("tiny")
    facts, hyper = recorded["cases"]["memory"]["values"][name], recorded["hyper"]
    has_prefix = facts["spatial_bytes"] > 0
    prefix = hyper["prefix_enhanced_frames"] if has_prefix else None
    way = ways(ExtensionConfig(chunk=8, pmax=facts["window"], num_chunks=2, steps=4, prefix_frames=prefix))["ca2vdm"]
    form: dict[str, Any] = dict(prefix_attention="separate" if has_prefix else "none")
    config, tokens = STDiTConfig.xl(**form), 256
    if tiny:
        config = STDiTConfig(dim=hyper["hidden"], num_layers=hyper["depth"], num_heads=hyper["heads"], **form)
        tokens = hyper["tokens_per_frame"]
    dtype = torch.float32 if tiny else torch.float16
    found = held_bytes(way, config, tokens=tokens, batch=facts["rows"], dtype=dtype)
    assert found.readable == facts["temporal_bytes"] + facts["spatial_bytes"]
