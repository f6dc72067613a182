"""Texts of unequal length in one forward: guidance in one batch, a prompt switch inside a fused pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stdit_tiny import randomised, sees
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.position import Cyclic
from unspool.diffusion.iddpm import IDDPM
from unspool.models.base import Conditioning, Prompts
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.rollout.guidance import Guidance
from unspool.rollout.noise import CounterNoise
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout
from unspool.rollout.settings import RolloutConfig
from unspool.rollout.solvers.ancestral import Ancestral

SMALL: dict[str, Any] = dict(dim=24, num_layers=2, num_heads=2, freq_dim=32, caption_dim=6, caption_len=9)
SIZE = (2, 4)
NETWORK = randomised(STDiTConfig(**SMALL))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def words(rows: int, seed: int = 0, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, rows, 6, generator=generator, dtype=torch.float64)


def frames_of(network: STDiT, text: Tensor | PromptTimeline, negative: Tensor | None = None, **changed: Any) -> Tensor:
    process = IDDPM(predicts="x0")  # a random network that predicts noise has no bounded output
    values: dict[str, Any] = dict(
        plan=ChunkPlan(chunk=3, num_frames=12),
        schedule=process.schedule(3),
        visibility=sees(chunk=3, pmax=7, prefix=None),
        positions=Cyclic(length=10),
        process=process,
        solver=Ancestral(process=process),
    )
    rollout = Rollout(
        network, RolloutConfig(**{**values, **changed}), text, noise=CounterNoise(seed=3), latent_size=SIZE,
        negative=negative,
    )  # fmt: skip
    return torch.cat([chunk.latents for chunk in rollout], 1)


def test_guidance_in_one_batch_takes_a_negative_of_other_length() -> None:
    """The learned null caption has all rows, a prompt has as many as it has words."""
    for negative in (NETWORK.null_text(1), words(3, 5)):
        outs = [
            frames_of(NETWORK, words(4), negative, guidance=Guidance(scale=2.0, mode=mode))  # type: ignore[arg-type]
            for mode in ("batch", "two_caches")
        ]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-6)
        assert (outs[0] - frames_of(NETWORK, words(4))).abs().max() > 1e-2


@pytest.mark.parametrize(("before", "after"), [(4, 7), (7, 4)])
def test_a_fused_commit_meets_a_prompt_of_other_length(before: int, after: int) -> None:
    outs = [
        frames_of(NETWORK, PromptTimeline(words(before), [Switch(frame=6, text=words(after, 5))]), commit=commit)
        for commit in ("fused", "separate")
    ]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-6)
    assert (outs[0] - frames_of(NETWORK, words(before)))[:, 6:].abs().max() > 1e-2


def test_rows_added_by_joining_are_not_read() -> None:
    x = torch.randn(2, 3, 4, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.full((1, 1), 0.5, dtype=torch.float64)

    def said(prompts: Prompts, latents: Tensor, index: Tensor | None = None) -> Tensor:
        return NETWORK(latents, sigma, Conditioning(prompts=prompts, prompt_index=index), FullSequence(3))

    short, long = (NETWORK.prepare(words(rows, rows, 2)) for rows in (4, 7))
    apart = torch.cat([said(short, x), said(long, x)])
    by_batch = Prompts.join([short, long], 0)
    assert by_batch.mask is not None and by_batch.mask.sum(-1).flatten().tolist() == [4, 4, 7, 7]
    torch.testing.assert_close(said(by_batch, torch.cat([x, x])), apart, rtol=0, atol=1e-12)
    by_prompt = Prompts.join([long, short], 1)
    for number, want in ((1, apart[:2]), (0, apart[2:])):
        got = said(by_prompt, x, torch.full((1, 1), number))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_numbers_of_prompts_that_there_are_not_are_refused() -> None:
    """Flattened over samples, number 1 of one prompt would be the next sample's."""
    x, sigma = torch.zeros(2, 3, 4, *SIZE, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64)
    one = NETWORK.prepare(words(4, batch=2))
    for prompts, wrong in ((one, 1), (Prompts.join([one, one], 1), 2), (one, -1)):
        for index in (torch.tensor([[0, wrong, 0]]), torch.full((2, 1), wrong)):
            with pytest.raises(ValueError, match=f"0..{prompts.num_prompts - 1}"):
                NETWORK(x, sigma, Conditioning(prompts=prompts, prompt_index=index), FullSequence(3))


def test_the_null_caption_through_the_mask_of_a_caption() -> None:
    text = torch.cat([words(4, 1, 2), torch.zeros(2, 3, 6, dtype=torch.float64)], 1)
    text[1, 2:] = 0
    null, seen = NETWORK.null_text(2), NETWORK.null_text(2, like=text)
    assert null.shape == (2, 9, 6) and seen.shape == (2, 7, 6)
    assert torch.equal(seen[0, :4], null[0, :4]) and torch.equal(seen[1, :2], null[1, :2])
    assert not seen[0, 4:].any() and not seen[1, 2:].any()
    read = NETWORK.prepare(seen).mask
    assert read is not None and read.sum(-1).flatten().tolist() == [4, 2]
    for wrong in (text[:1], words(10, batch=2), text[0]):
        with pytest.raises(ValueError, match=r"expected \[2, 1..9 rows"):
            NETWORK.null_text(2, like=wrong)
