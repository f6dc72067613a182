"""Tokens that are told where in the picture they are (`place_octaves`)."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from unspool.models.wan.layers import place_features

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
from tiny import Setting, assert_close, make_network, reference, run, text


def test_places_are_of_the_picture() -> None:
    """Centres of four tokens; the coordinate of each is the mean of the two in its place of a finer grid."""
    coarse, fine = place_features(4, 3), place_features(8, 3)
    assert torch.equal(coarse[:, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64))
    assert torch.allclose(fine[:, 0].view(4, 2).mean(1), coarse[:, 0])
    assert coarse.shape == (4, 7)
    assert coarse[3, 2].item() == pytest.approx(math.sin(2 * math.pi * 0.75))
    assert coarse[3, 6].item() == pytest.approx(math.cos(4 * math.pi * 0.75))


def test_without_weight_nothing_is_added() -> None:
    network, plain = make_network(place_octaves=2), make_network()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("place_embedding")})
    setting, prompt = Setting(chunk=2, num_frames=4), text(0)
    told = run(network, setting, prompt)
    torch.nn.init.zeros_(network.place_embedding.weight)
    torch.nn.init.zeros_(network.place_embedding.bias)
    untold = run(network, setting, prompt)
    assert_close(untold, run(plain, setting, prompt))
    assert (told - untold).abs().max() > 1e-2


def test_rows_and_columns_are_told_apart() -> None:
    """The table of a grid: what is added depends on the row alone where the map reads rows only."""
    network = make_network(place_octaves=2)
    with torch.no_grad():
        network.place_embedding.weight[:, 5:] = 0.0
    table = network._places((3, 4)).view(3, 4, -1)
    assert torch.equal(table, table[:, :1].expand_as(table))
    assert all(not torch.equal(table[i], table[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("relative", [False, True])
def test_a_cached_rollout_equals_one_without_a_cache(relative: bool) -> None:
    network = make_network(place_octaves=2)
    setting = Setting(chunk=3, window=9, sink=3, num_frames=15, relative=relative)
    assert_close(run(network, setting, text(0)), torch.cat(reference(network, setting, text(0), []), 1))
