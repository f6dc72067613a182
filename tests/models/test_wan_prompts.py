"""Which prompt, noise level and vector each latent frame follows, shown where nothing else can mix frames."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from unspool.causal.context import FullSequence
from unspool.models.base import Conditioning, Prompts
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def one_layer() -> WanTransformer:
    """After one layer a latent frame knows the prompt of its own frame only: text comes after self-attention."""
    config = WanConfig(
        dim=24,
        ffn_dim=32,
        num_layers=1,
        num_heads=2,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        text_len=5,
        freq_dim=16,
        frame_vector_dim=3,
    )
    network = WanTransformer(config).double()
    for weight in network.parameters():
        weight.copy_(torch.randn(weight.shape, dtype=torch.float64) * (0.3 if weight.ndim > 1 else 1.0))
    return network


def text(batch: int, prompts: int) -> Tensor:
    return torch.randn(batch, prompts, 5, 8, dtype=torch.float64)


def test_every_sample_and_latent_frame_follows_its_own_prompt() -> None:
    network, x, sigma = one_layer(), torch.randn(3, 4, 4, 4, 6).double(), torch.rand(1, 1).double()
    states = text(3, 2)
    index = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 1]])
    many = Conditioning(prompts=network.prepare(states), prompt_index=index)
    got = network(x, sigma, many, FullSequence(4))
    for p in range(2):
        alone = network(x, sigma, Conditioning(prompts=network.prepare(states[:, p])), FullSequence(4))
        torch.testing.assert_close(got[index == p], alone[index == p], rtol=0, atol=1e-12)
        assert (got[index != p] - alone[index != p]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_one_index_for_all_samples_and_none_for_the_first_prompt() -> None:
    network, x, sigma = one_layer(), torch.randn(3, 4, 4, 4, 6).double(), torch.rand(1, 1).double()
    prompts = network.prepare(text(3, 2))

    def out(index: Tensor | None) -> Tensor:
        return network(x, sigma, Conditioning(prompts=prompts, prompt_index=index), FullSequence(4))

    row = torch.tensor([[0, 1, 1, 0]])
    assert torch.equal(out(row), out(row.expand(3, 4)))
    assert torch.equal(out(None), out(torch.zeros(3, 4, dtype=torch.int64)))


@pytest.mark.parametrize("dim", [0, 1])
def test_joined_prompts(dim: int) -> None:
    network = one_layer()
    states = text(2, 2)
    parts = [network.prepare(s) for s in states.split(1, dim)]
    joined, whole = Prompts.join(parts, dim), network.prepare(states)
    for a, b in zip(joined.keys + joined.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_sigma_of_all_broadcast_shapes() -> None:
    network, x = one_layer(), torch.randn(2, 4, 4, 4, 6).double()
    cond = Conditioning(prompts=network.prepare(text(2, 1)))
    whole = torch.rand(2, 4).double()
    for sigma in (whole[:1, :1], whole[:, :1], whole[:1], whole):
        got = network(x, sigma, cond, FullSequence(4))
        want = network(x, sigma.expand(2, 4).contiguous(), cond, FullSequence(4))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_vector_of_one_latent_frame_and_none() -> None:
    """One vector for all frames is that vector for each; a vector changes more than nothing, a zero one is not none."""
    network, x, sigma = one_layer(), torch.randn(2, 4, 4, 4, 6).double(), torch.rand(2, 1).double()
    prompts = network.prepare(text(2, 1))

    def out(vectors: Tensor | None) -> Tensor:
        return network(x, sigma, Conditioning(prompts=prompts, vectors=vectors), FullSequence(4))

    one = torch.randn(2, 1, 3).double()
    torch.testing.assert_close(out(one), out(one.expand(2, 4, 3)), rtol=0, atol=1e-12)
    assert (out(one) - out(None)).abs().max() > 1e-3
    assert (out(torch.cat([one] * 3 + [-one], 1)) - out(one)).abs()[:, 3].max() > 1e-3
