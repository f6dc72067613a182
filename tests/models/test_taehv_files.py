"""TAEHV files: own ones come back, published ones state their sizes by shape, others are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unspool.models.base import Codec
from unspool.models.taehv import Taehv, TaehvConfig

SIZES = TaehvConfig(
    encoder_widths=(4, 5, 6, 7), decoder_widths=(7, 6, 5, 4), latent_channels=3, num_blocks=2, padding="end"
)
PIXELS = torch.rand(1, 5, 3, 8, 16) * 2 - 1


def same(one: Taehv, other: Taehv) -> bool:
    latents = one.encode(PIXELS)
    return torch.equal(latents, other.encode(PIXELS)) and torch.equal(one.decode(latents), other.decode(latents))


def test_own_files_come_back(tmp_path: Path) -> None:
    codec = Taehv(replace(SIZES, padding="start", latent_mean=(0.5, -1.0, 0.0), latent_std=(2.0, 0.5, 1.5)))
    path = codec.save(tmp_path / "codec.safetensors", metadata={"note": "kept"})
    again = Taehv.from_single_file(path)
    assert isinstance(again, Codec) and again.config == codec.config and same(again, codec)
    assert next(Taehv.from_single_file(path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="states its own"):
        Taehv.from_single_file(path, padding="end")


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_published_files_state_their_sizes_by_shape(suffix: str, num_blocks: int, tmp_path: Path) -> None:
    sizes = replace(SIZES, num_blocks=num_blocks)
    codec = Taehv(sizes)
    weights = dict(codec.state_dict())
    growth = [name for name in weights if name.startswith("decoder.") and weights[name].shape[2:] == (1, 1)]
    assert len(growth) == 3
    for name in growth:  # more frames than are used: the last rows count
        weights[name] = torch.cat([torch.full_like(weights[name], 99.0), weights[name]])
    path = tmp_path / f"taew2_1.{suffix}"
    if suffix == "pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    found = Taehv.from_single_file(path)
    assert found.config == sizes and same(found, codec)
    assert Taehv.from_single_file(path, padding="start").config.padding == "start"


def test_other_files_are_refused(tmp_path: Path) -> None:
    def attempt(weights: dict[str, Tensor], match: str, metadata: dict[str, str] | None = None) -> None:
        save_file(weights, tmp_path / "bad.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=match):
            Taehv.from_single_file(tmp_path / "bad.safetensors")

    good = dict(Taehv(replace(SIZES, num_blocks=3)).state_dict())
    attempt({"blocks.0.weight": torch.zeros(2)}, "TAEHV names")
    attempt({k: v for k, v in good.items() if k != "decoder.22.bias"}, r"1 missing: decoder\.22\.bias")
    attempt({k: v for k, v in good.items() if k != "encoder.8.weight"}, "not among the tensors")
    attempt({k: v for k, v in good.items() if k != "encoder.9.conv.0.weight"}, "8 memory blocks")
    attempt(good | {"decoder.23.weight": torch.zeros(2)}, r"1 unexpected: decoder\.23\.weight")
    attempt(good | {"decoder.22.weight": torch.zeros(3, 8, 1, 1)}, r"1 of another shape: decoder\.22\.weight")
    attempt(good | {"encoder.0.weight": torch.zeros(8, 12, 3, 3)}, "taew2_2")
    attempt(good, "expected a Taehv", {"config": json.dumps({"_class_name": "CaptionEncoder"})})
    attempt(good, "widths", {"config": json.dumps({"_class_name": "Taehv", "widths": 8})})
    with pytest.raises(FileNotFoundError):
        Taehv.from_single_file(tmp_path / "absent.safetensors")
