"""What a step does: micro-batches equal the batch, ranks equal one, bad steps are left out, order is kept."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import ranks, stored_tensors
from toy import Toy, recipe, tensors, train

from unspool.config import apply_overrides
from unspool.data.batch import Batch
from unspool.log import read_metrics
from unspool.methods.base import StepResult
from unspool.methods.draws import normal, uniform
from unspool.train.callbacks import Every
from unspool.train.feed import Feed
from unspool.train.loop import Diverged, Trainer
from unspool.train.parallel import World, pick_device
from unspool.train.rng import mix, step_rng

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
TOLERANCE = 1e-5
"""Between two orders of the same sums in fp32, after AdamW steps."""


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    fixed = ("sizes.dropout=0", "train.batch=8", "train.steps=6")
    big, small = train(tmp_path / "big", *fixed), train(tmp_path / "small", *fixed, "train.accumulate=4")
    for state in (big, small):
        state.state.networks["student"].calls.zero_()  # type: ignore[operator, union-attr]
    assert 0 < apart(tensors(big), tensors(small)) < TOLERANCE


@pytest.mark.dist
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    fixed = ("sizes.dropout=0", "train.steps=20", "critic=true", "train.batch=8", "train.accumulate=2")
    assert ranks(2, tmp_path / "two", *fixed, "signal_at=11") == [0, 0]  # stopped together ...
    assert stored_tensors(tmp_path / "two").keys() == tensors(train(tmp_path / "one", *fixed)).keys()
    assert ranks(2, tmp_path / "two", *fixed) == [0, 0]  # ... and continued
    assert apart(stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "two")) < TOLERANCE
    assert (tmp_path / "two/student.safetensors").is_file() and (tmp_path / "two/critic.safetensors").is_file()
    losses = [[row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    good = train(tmp_path / "good", "train.steps=3")
    bad = train(tmp_path / "bad", "train.steps=4", "bad=3")
    for trainer in (good, bad):
        trainer.state.networks["student"].calls.zero_()  # type: ignore[operator, union-attr]
    assert apart(tensors(good), tensors(bad)) == 0
    assert bad.state.skipped == 1 and bad.state.updates == {"student": 3}
    assert math.isfinite(read_metrics(tmp_path / "bad/metrics.jsonl")[-2]["loss"])
    with pytest.raises(Diverged, match="of the student was not finite in 3 updates in a row, up to step 5"):
        train(tmp_path / "worse", "train.steps=9", "bad=2,3,4", "train.max_bad_steps=3", "train.save_every=2")
    assert (tmp_path / "worse/checkpoints/latest").read_text() == "step-00000004\n"


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    free = train(tmp_path / "free", "train.steps=1", "train.clip_norm=none")
    clipped = train(tmp_path / "clipped", "train.steps=1", "train.clip_norm=0.001")
    norm = read_metrics(tmp_path / "clipped/metrics.jsonl")[0]["grad_norm"]
    assert norm == read_metrics(tmp_path / "free/metrics.jsonl")[0]["grad_norm"]
    moment = "optim/student/head.weight/exp_avg"
    ratio = tensors(clipped)[moment] / tensors(free)[moment]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.001 / norm), rtol=1e-3, atol=0)


def test_the_draws_of_a_sample_are_its_own() -> None:
    for law in (uniform, normal):
        whole, part = step_rng(1, 2, "student", range(6)), step_rng(1, 2, "student", range(1, 6, 2))
        assert torch.equal(law((6, 3, 2), whole)[1::2], law((3, 3, 2), part))
        assert law((6,), whole).unique().numel() == 6
    plain = torch.Generator().manual_seed(1)
    assert torch.equal(normal((2, 3), plain), torch.randn(2, 3, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="batch of 6 samples first"):
        uniform((5,), whole)
    keys = [(1, 2, "a", 3), (1, 2, "a", 4), (12, "a", 3), (1, 2, "b", 3), (2, 1, "a", 3)]
    assert len({mix(*key) for key in keys}) == len(keys) and mix(1, "a") == 8691890459346216368


class Uneven(Toy):
    """Later steps are ready sooner."""

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
        time.sleep(0.01 * (3 - step % 4))
        if step == 9:
            raise ValueError("clip 9 is unreadable")
        return super().batch(step, size, rank=rank, world=world)


def test_the_feed_keeps_the_order_of_the_steps() -> None:
    feed = Feed(Uneven(), ALONE, size=4, accumulate=2, start=3, stop=10, workers=4, ahead=4)
    try:
        for step in range(3, 9):
            numbers = [batch.indices.tolist() for batch in feed.next() if batch.indices is not None]
            assert numbers == [[4 * step, 4 * step + 2], [4 * step + 1, 4 * step + 3]]
        with pytest.raises(ValueError, match="clip 9"):
            feed.next()
    finally:
        feed.close()


def test_callbacks_see_the_average_and_leave_no_trace(tmp_path: Path) -> None:
    seen = []

    def look(trainer: Trainer) -> dict[str, float]:
        network = trainer.state.networks["student"]
        weights = dict(network.named_parameters())
        same = all(torch.equal(weights[n], a) for n, a in trainer.state.averages["student"].average.items())
        seen.append((trainer.step, same, network.training, torch.is_grad_enabled()))
        torch.rand(5)
        return {"score": 1.5}

    plain = train(tmp_path / "plain", "train.steps=5")
    watched = Trainer(recipe("train.steps=5"), tmp_path / "watched", show=False)
    watched._callbacks = (Every(2, look, at_start=True),)
    watched.run()
    assert seen == [(step, True, False, False) for step in (0, 2, 4, 5)]
    assert apart(tensors(plain), tensors(watched)) == 0
    scores = [row for row in read_metrics(tmp_path / "watched/metrics.jsonl") if "score" in row]
    assert [row["step"] for row in scores] == [0, 2, 4, 5]


def test_a_signal_during_the_last_step_keeps_the_last_evaluation(tmp_path: Path) -> None:
    seen: list[int] = []
    trainer = Trainer(recipe("train.steps=4"), tmp_path / "run", show=False)
    trainer._callbacks = (Every(2, lambda t: seen.append(t.step)),)
    step = trainer.method.step

    def signalled(batch: Batch, role: str, number: int, rng: torch.Generator) -> StepResult:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch, role, number, rng)

    trainer.method.step = signalled  # type: ignore[method-assign]
    assert trainer.run().is_done and seen == [2, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.ema.roles=student,judge", "no such role"),
        ("train.gradient_checkpointing=maybe", "expected bool"),
        ("train.batch=6 train.accumulate=4", "multiple of accumulate x ranks = 4 x 1; try 4 or 8"),
        ("train.critic=none train.device=tpu", "expected auto, cpu, cuda"),
        ("train.steps=0", "at least 1"),
        ("train.optim.muon_lr=0.1", "has no effect with kind='adamw'"),
        ("train.optim.lr=-1", "positive"),
        ("train.otpim.lr=1", "did you mean optim"),
        ("train.ema.decay=1", "expected a number in"),
        ("train.shard=2", "start more with torchrun"),
    ],
)
def test_bad_settings_are_told(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as found:
        Trainer(apply_overrides(recipe(), override.split()), tmp_path / "run", show=False)
    assert "\n" not in str(found.value) and not (tmp_path / "run").exists()


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        pick_device("cuda")


def test_the_feed_does_not_take_threads_from_the_loop() -> None:
    seen: list[int] = []

    class Watching(Toy):
        def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> Batch:
            seen.append(torch.get_num_threads())
            return super().batch(step, size, rank=rank, world=world)

    before = torch.get_num_threads()
    feed = Feed(Watching(), ALONE, size=4, stop=2)
    feed.next()
    feed.close()
    assert set(seen) == {1} and torch.get_num_threads() == before
