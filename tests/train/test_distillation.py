"""Distillation in the loop: resumed to the bit, two ranks as one, and networks that only follow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from processes import ranks, stored_tensors
from toy_distillation import DistilRecipe, network, recipe, tensors, train

from unspool.methods.dmd import DistributionMatching
from unspool.train.checkpoint import find
from unspool.train.loop import Diverged, Trainer
from unspool.train.rng import step_rng

KINDS = ["causvid", "self_forcing", "through_kv", "sid", "gan", "consistency", "ode"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_distillation_has_the_bits_of_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", f"kind={kind}")
    train(tmp_path / "legs", f"kind={kind}", "train.save_every=3", "train.keep=9")
    shutil.rmtree(tmp_path / "legs" / "checkpoints" / "step-00000006")  # as if it had ended at step 3
    (tmp_path / "legs" / "checkpoints" / "latest").write_text("step-00000003\n")
    (tmp_path / "legs" / "student.safetensors").unlink()
    trainer = Trainer(recipe(f"kind={kind}", "train.save_every=3", "train.keep=9"), tmp_path / "legs", show=False)
    assert trainer.step == 3
    trainer.run()
    one, other = tensors(whole), tensors(trainer)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_learns_and_the_teacher_does_not(kind: str, tmp_path: Path) -> None:
    trainer = Trainer(recipe(f"kind={kind}"), tmp_path, show=False)
    before = {name: p.detach().clone() for name, p in trainer.method.networks["student"].named_parameters()}
    trainer.run()
    after = dict(trainer.method.networks["student"].named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for frozen in getattr(trainer.method, "frozen", {}).values():
        kept = dict(frozen.backbone.named_parameters())
        assert all(torch.equal(kept[name], p) for name, p in network(2).named_parameters())
        assert not any(p.requires_grad for p in frozen.parameters())


def test_a_follower_is_the_average_of_what_it_follows(tmp_path: Path) -> None:
    trainer = Trainer(recipe("kind=consistency", "train.steps=1"), tmp_path, show=False)
    name, start = next(iter(network(1).named_parameters()))
    trainer.run()
    student = dict(trainer.method.networks["student"].named_parameters())[f"backbone.{name}"]
    follower = trainer.state.followers["average"].network.get_parameter(f"backbone.{name}")
    torch.testing.assert_close(follower, 0.9 * start + 0.1 * student)
    assert f"follow/average/backbone.{name}" in trainer.state.tensors()


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind: str, tmp_path: Path) -> None:
    # eps: Adam divides by the gradient's size, which would make differences of rounding as large as steps
    # (a discriminator's are the smallest: 4e-5 between the ranks' weights with 1e-5, on one kind of processor)
    eps = "1e-4" if kind == "gan" else "1e-5"
    overrides = (f"kind={kind}", "train.steps=3", f"train.optim.eps={eps}", f"train.critic.eps={eps}")
    overrides = overrides[:3] if kind in ("ode", "consistency") else overrides
    assert ranks(2, tmp_path / "two", *overrides, module="toy_distillation") == [0, 0]
    train(tmp_path / "one", *overrides)
    one, two = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "two")
    weights = [name for name in one if name.startswith("model/")]
    worst = max((one[name] - two[name]).abs().max().item() for name in weights)
    assert worst <= 1e-5


@pytest.mark.parametrize("kind", ["self_forcing", "causvid", "sid"])
def test_a_teacher_that_broke_ends_the_training(kind: str, tmp_path: Path) -> None:
    """The critic goes on well between the student's updates, which are the ones that are lost."""
    trainer = Trainer(recipe(f"kind={kind}", "train.steps=12", "train.max_bad_steps=2"), tmp_path / "run", show=False)
    before = tensors(trainer)
    next(trainer.method.teacher_network.parameters()).data.fill_(torch.nan)  # type: ignore[attr-defined]
    with pytest.raises(Diverged, match="of the student was not finite in 2 updates"):
        trainer.run()
    after = tensors(trainer)
    assert trainer.state.updates["student"] == 0 and trainer.state.updates["critic"] >= 3
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("model/student/"))


def test_a_follower_begins_as_its_role_does(tmp_path: Path) -> None:
    """Also where the role begins with given weights."""
    train(tmp_path / "first", "kind=consistency", "train.steps=1")
    trainer = Trainer(recipe("kind=consistency"), tmp_path / "next", init_from=tmp_path / "first", show=False)
    student, follower = trainer.state.networks["student"], trainer.state.followers["average"].network
    pairs = zip(student.parameters(), follower.parameters(), strict=True)
    assert all(torch.equal(own, kept) for own, kept in pairs)


@pytest.mark.parametrize("kind", ["self_forcing", "through_kv"])
def test_autocast_keeps_every_gradient_of_a_rollout(kind: str, tmp_path: Path) -> None:
    """Weights that are cast without a graph in the first steps must not be used at the exit step."""
    found = []
    for cached in (True, False):
        trainer = Trainer(recipe(f"kind={kind}"), tmp_path / str(cached), show=False)
        batch = trainer.recipe.build_source().batch(0, 4)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            loss = trainer.method.step(batch, "student", 0, step_rng(0, 0, "student", range(4))).loss
        loss.backward()
        found.append({n: p.grad for n, p in trainer.method.networks["student"].named_parameters()})
    assert all(found[0][name] is not None for name in found[0])
    worst = max((found[0][n] - found[1][n]).abs().max().item() for n in found[0])  # type: ignore[operator, union-attr]
    assert worst < 1e-6


def test_a_rollout_learns_under_autocast(tmp_path: Path) -> None:
    """bf16 activations beside fp32 weights and caches."""
    trainer = train(tmp_path, "kind=self_forcing", "train.dtype=bf16", "train.steps=3")
    assert trainer.state.skipped == 0 and isinstance(trainer.method, DistributionMatching)
    assert isinstance(trainer.recipe, DistilRecipe)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["gan", "self_forcing"])
def test_two_ranks_learn_in_bf16(kind: str, tmp_path: Path) -> None:
    """Weights are gathered in bf16; what switches autocast off, a discriminator's heads, in fp32."""
    overrides = (f"kind={kind}", "train.dtype=bf16", "train.steps=2")
    assert ranks(2, tmp_path, *overrides, module="toy_distillation") == [0, 0]
    found = find(tmp_path)
    assert found is not None and found.step == 2 and found.state["counters"]["skipped"] == 0
