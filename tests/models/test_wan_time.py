"""The time embedding: computed once per distinct sigma, and the same as computed for every latent frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unspool.causal.context import FullSequence
from unspool.evaluate.exactness import random_network
from unspool.models.base import Conditioning
from unspool.models.wan import network as wan


@pytest.mark.parametrize(
    ("sigma", "rows"),
    [
        (torch.tensor([[0.5]]), 1),
        (torch.full((2, 6), 0.5), 1),
        (torch.tensor([[0.0, 0.0, 0.0, 0.9, 0.9, 0.9]]), 2),
        (torch.tensor([[0.25] * 6, [0.75] * 6]), 2),
        (torch.linspace(0, 1, 12).reshape(2, 6), 12),
    ],
)
def test_modulation_is_computed_once_per_distinct_sigma(
    sigma: torch.Tensor, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = wan.time_features

    def counting(timestep: torch.Tensor, width: int) -> torch.Tensor:
        seen.append(timestep.numel())
        return real(timestep, width)

    monkeypatch.setattr(wan, "time_features", counting)
    net = random_network(torch.float64, layers=1)
    x = torch.randn(2, 6, 4, 4, 4, dtype=torch.float64)
    cond = Conditioning(prompts=net.prepare(torch.randn(2, 10, 24, dtype=torch.float64)))
    got = net(x, sigma.double(), cond, FullSequence(6))
    assert seen == [rows]

    def every_frame(values: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return values.flatten(), torch.arange(values.numel()).reshape(values.shape)

    monkeypatch.setattr(torch, "unique", every_frame)
    assert (net(x, sigma.double().expand(2, 6), cond, FullSequence(6)) - got).abs().max() <= 1e-12


@pytest.mark.parametrize(("dim", "text_dim", "freq_dim"), [(48, 24, 32), (256, 192, 128), (1536, 4096, 256)])
def test_a_new_network_heeds_text_and_noise_level_at_any_width(dim: int, text_dim: int, freq_dim: int) -> None:
    """With a std of 0.02 for all sizes both embeddings are 0.02 to 0.1 in rms at a width of 256."""
    sizes = {"dim": dim, "ffn_dim": dim, "num_layers": 1, "num_heads": 4, "freq_dim": freq_dim}
    net = wan.WanTransformer(wan.WanConfig(**sizes, text_dim=text_dim, text_len=8))
    with torch.no_grad():
        text = net.text_embedding(torch.randn(16, 8, text_dim))
        time = net.time_embedding(wan.time_features(torch.linspace(0, 1000, 50), freq_dim).float())
    assert text.std() > 0.3
    assert time.std(dim=0).mean() > 0.15
