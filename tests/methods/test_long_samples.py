"""Long rollouts: what is scored at their end, and changes of prompt on the way."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
sys.path.insert(0, str(Path(__file__).parent))
from test_samples import FRAMES, STEPS, on_policy, prompts
from tiny import CHANNELS, SIZE, TEXT_DIM, TEXT_ROWS, make_network, text

from unspool.causal.visibility import Window
from unspool.data.batch import Batch
from unspool.diffusion.schedule import Schedule
from unspool.methods.common import Student
from unspool.methods.draws import normal, shared_integer
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.scores import Conditioner
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.rollout import Rollout


class Pixels:
    """A codec whose pixels are its latents, four times; keeps what it was asked."""

    def __init__(self) -> None:
        self.encoded: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(4, dim=1)

    def encode(self, pixels: Tensor) -> Tensor:
        self.encoded.append(pixels)
        return pixels + 100.0


def long_sample(config: OnPolicyConfig, seed: int, index: Tensor | None = None) -> Any:
    network, codec = make_network(), Pixels()
    given = prompts(0, 1, index=torch.zeros(2, FRAMES, dtype=torch.int64) if index is None else index)
    made = config.build(codec)(Student(network), Batch(), given, given, torch.Generator().manual_seed(seed))
    return network, codec, made


def test_a_long_rollout_is_scored_at_its_end() -> None:
    """Its window begins with a latent frame made anew; the first chunk carries no loss, what came before no graph."""
    long = 0
    for seed in range(8):
        network, codec, made = long_sample(on_policy(longest=10, visibility=Window(window=4)), seed)
        assert made.latents.shape[1] == FRAMES
        if not codec.encoded:
            assert made.counted is None
            continue
        long += 1
        assert torch.equal(made.latents[:, :1], codec.encoded[0] + 100.0)
        assert made.counted.tolist() == [[False, False, True, True, True, True]] * 2
        weight = network.head.head.weight
        first, rest = (torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in
                       (made.latents[:, :1], made.latents[:, 2:]))  # fmt: skip
        assert not first.any() and rest.any()
    assert 2 <= long < 8


def test_the_end_of_a_long_rollout_is_that_of_the_stream() -> None:
    config = on_policy(longest=10, visibility=Window(window=4, sink=2))
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        last, lead = shared_integer(4, rng), 2 * shared_integer(3, rng)
        shared_integer(1 << 20, rng)
        shared_integer((lead + FRAMES) // 2 - 1, rng)
        noise = normal((2, last + 1, lead + FRAMES, CHANNELS, *SIZE), rng)
        with torch.no_grad():
            network, _, made = long_sample(config, seed)
            schedule = Schedule((*STEPS.schedule.sigmas[: last + 1], 0.0))
            stream = Rollout(
                network, config.rollout(schedule), text(0), latent_size=SIZE,
                noise=RecordedNoise(noise[:, 0], noise[:, 1:].transpose(0, 1) if last else None),
            )  # fmt: skip
            whole = torch.cat([stream.next_chunk().latents for _ in range((lead + FRAMES) // 2)], 1)
        torch.testing.assert_close(made.latents[:, 1:], whole[:, lead + 1 :], rtol=0, atol=1e-12)


def test_a_long_rollout_may_change_its_prompt_where_the_clip_has_another() -> None:
    index = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    found = set()
    for seed in range(12):
        _, codec, made = long_sample(on_policy(longest=10, switch=1.0), seed, index)
        follows = made.prompts.index
        if codec.encoded:
            assert not follows[1].any() and (follows[0, 1:] >= follows[0, :-1]).all()
            assert follows[0, -1] == 1, "near enough to what is scored to be seen in it"
            found.add(tuple(follows[0].tolist()))
    assert len(found) >= 2


def test_prompts_without_an_index_follow_each_other_in_a_long_rollout() -> None:
    """Data of prompts alone: no latents, so no latent frame of theirs to point at."""
    given, changed = prompts(0, 1, index=torch.zeros(2, 1, dtype=torch.int64)), 0
    for seed in range(12):
        codec = Pixels()
        bare = replace(given, index=None)
        config = on_policy(longest=10, switch=1.0, latent_size=SIZE)
        made = config.build(codec)(Student(make_network()), Batch(), bare, bare, torch.Generator().manual_seed(seed))
        if not codec.encoded:
            assert made.prompts.index is None
            continue
        assert made.prompts.states.shape[1] == 2 and (made.prompts.index[:, -1] == 1).all()
        changed += bool((made.prompts.index[:, 0] == 0).all())
    assert changed >= 1
    one = Batch(text=torch.zeros(2, 2, TEXT_ROWS, TEXT_DIM), prompt_index=torch.zeros(2, 4, dtype=torch.int64))
    assert Conditioner().given(one).index is one.prompt_index
    with pytest.raises(ValueError, match=r"prompt_index of shape \(2,\): expected \[b, t\] = \[2, any\]"):
        Conditioner().given(replace(one, prompt_index=torch.zeros(2, dtype=torch.int64)))


def test_long_rollouts_need_a_codec_and_whole_chunks() -> None:
    with pytest.raises(ValueError, match="need the codec"):
        on_policy(longest=10).build()
    for wrong, match in (
        ({"longest": 9}, "whole chunks"), ({"longest": 10, "through_kv": True}, "through_kv=false"),
        ({"switch": 0.5}, "longest above frames"), ({"longest": 6, "frames": 2}, "two chunks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            on_policy(**wrong)


def test_a_codec_that_pads_at_the_end_cannot_open_a_window() -> None:
    from unspool.models.taehv import Taehv, TaehvConfig

    sizes = {"encoder_widths": 4, "decoder_widths": (6, 5, 4, 4), "latent_channels": 4, "num_blocks": 1}
    with pytest.raises(ValueError, match="pads at the start"):
        on_policy(longest=10).build(Taehv(TaehvConfig(**sizes, padding="end")))  # type: ignore[arg-type]
    on_policy(longest=10).build(Taehv(TaehvConfig(**sizes, padding="start")))  # type: ignore[arg-type]


def test_the_past_may_be_made_anew_where_the_prompt_changes() -> None:
    """A change with recache is another rollout than one that keeps the keys."""
    index = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    differs = 0
    for seed in range(12):
        with torch.no_grad():
            kept, again = (long_sample(on_policy(longest=10, switch=1.0, switch_policy=policy), seed, index)[2].latents
                           for policy in ("keep", "recache"))  # fmt: skip
        differs += not torch.equal(kept[0], again[0])
    assert differs >= 2
