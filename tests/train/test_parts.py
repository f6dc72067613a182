"""Closed forms and splits: learning rates, averages, which parameter is whose; recipes, dry run, command line, log."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import Net, ToyRecipe, recipe, train

from unspool.cli.main import COMMANDS, main
from unspool.config import from_dict, to_dict
from unspool.log import read_metrics
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.train.config import EmaConfig, OptimConfig
from unspool.train.dryrun import estimate
from unspool.train.ema import Ema, ema_decay
from unspool.train.optim import RoleOptimizer, lr_factor, split_parameters
from unspool.train.parallel import World
from unspool.train.progress import Display, Window, drop_after, duration
from unspool.train.recipe import Named, flat, load_recipe

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
HERE = Path(__file__).parent


# ---- learning rate -----------------------------------------------------------------------------------------------


def test_learning_rates_are_their_closed_forms() -> None:
    def at(step: int, **fields: object) -> float:
        return lr_factor(OptimConfig(lr=1.0, **fields), step, 100)  # type: ignore[arg-type]

    assert [at(k, warmup_steps=4) for k in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert at(55, schedule="linear", warmup_steps=10) == pytest.approx(0.5)
    assert at(55, schedule="cosine", warmup_steps=10, final=0.2) == pytest.approx(0.6)
    assert at(25, schedule="cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert [at(k, schedule="wsd", decay_share=0.2, final=0.1) for k in (79, 80)] == [1.0, 1.0]
    assert at(90, schedule="wsd", decay_share=0.2, final=0.1) == pytest.approx(0.55)
    assert at(100, schedule="cosine", final=0.3) == pytest.approx(0.3)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]), st.integers(0, 30), st.integers(1, 60),
    st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_learning_rates_rise_to_the_peak_and_then_never_rise(
    schedule: str, warmup: int, steps: int, final: float, share: float
) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, final=final, decay_share=share)  # type: ignore[arg-type]
    curve = [lr_factor(config, step, steps) for step in range(steps + 1)]
    top = min(max(warmup - 1, 0), steps)
    assert all(0 <= value <= 1 for value in curve)
    assert curve[: top + 1] == sorted(curve[: top + 1])
    assert all(a >= b - 1e-12 for a, b in zip(curve[top:], curve[top + 1 :], strict=False))


# ---- average -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_average_is_its_closed_form(warmup: int) -> None:
    config = EmaConfig(decay=0.9, warmup=warmup)
    weight = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    ema = Ema({"w": weight}, config)
    weights = [1.0, -2.0, 5.0, 0.5]
    for number, value in enumerate(weights):
        weight.data.fill_(value)
        ema.update(number)
    decays = [ema_decay(config, n) for n in range(4)]
    assert decays == ([0.9] * 4 if warmup == 0 else pytest.approx([0.1, 2 / 11, 3 / 12, 4 / 13]))
    shares = [(1 - decays[n]) * math.prod(decays[n + 1 :]) for n in range(4)]
    expected = 3.0 * math.prod(decays) + sum(s * w for s, w in zip(shares, weights, strict=True))
    assert ema.average["w"].item() == pytest.approx(expected, rel=1e-12)
    with ema.swapped():
        assert weight.item() == ema.average["w"].item()
    assert weight.item() == 0.5


# ---- optimizers --------------------------------------------------------------------------------------------------


def test_parameters_find_their_optimizer() -> None:
    split = split_parameters(Net(), OptimConfig(lr=1.0, kind="muon+adamw"))
    inside = {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("inner", "outer")}
    assert set(split.muon) == inside | {"mix.weight"}
    assert set(split.decayed) == {"patch_embedding.weight", "head.weight"}
    assert {"words.weight", "modulation", "blocks.0.norm.weight", "head.bias"} <= set(split.plain)
    plain = split_parameters(Net(), OptimConfig(lr=1.0))
    assert not plain.muon and set(plain.decayed) == set(split.muon) | set(split.decayed)
    wan = WanTransformer(
        WanConfig(dim=24, ffn_dim=32, num_layers=1, num_heads=2, in_channels=4, out_channels=4, text_dim=8, text_len=5,
                  freq_dim=16)
    )  # fmt: skip
    named = split_parameters(wan, OptimConfig(lr=1.0, kind="muon+adamw")).muon
    assert {name.removeprefix("blocks.0.") for name in named} == {
        "self_attn.qkv.weight", "self_attn.o.weight", "cross_attn.q.weight", "cross_attn.kv.weight",
        "cross_attn.o.weight", "ffn.0.weight", "ffn.2.weight",
    }  # fmt: skip


def test_a_joint_step_is_the_two_steps_of_torch() -> None:
    torch.manual_seed(3)
    net = Net()
    config = OptimConfig(lr=0.01, kind="muon+adamw", weight_decay=0.1, muon_lr=0.02)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    joint = RoleOptimizer(net, config)
    joint.step(0.5)

    def alone(name: str, shape: tuple[int, ...], kind: type, **options: object) -> torch.Tensor:
        parameter = nn.Parameter(before[name].reshape(shape))
        parameter.grad = grads[name].reshape(shape)
        kind([parameter], **options).step()
        return parameter.detach().reshape(before[name].shape)

    after = dict(net.named_parameters())
    muon = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    adamw = {"lr": 0.005, "betas": (0.9, 0.95), "eps": 1e-8}
    assert torch.equal(after["mix.weight"], alone("mix.weight", (8, 24), torch.optim.Muon, **muon))
    assert torch.equal(
        after["blocks.0.inner.weight"], alone("blocks.0.inner.weight", (16, 8), torch.optim.Muon, **muon)
    )
    head = alone("head.weight", (6, 8), torch.optim.AdamW, **adamw, weight_decay=0.1)
    torch.testing.assert_close(after["head.weight"], head)
    words = alone("words.weight", (4, 8), torch.optim.AdamW, **adamw, weight_decay=0.0)
    torch.testing.assert_close(after["words.weight"], words)
    state = joint.state_tensors()
    assert state["mix.weight/momentum_buffer"].shape == (8, 24) and "head.bias/exp_avg_sq" in state
    with pytest.raises(ValueError, match=r"state of other, which is not trained"):
        joint.allocate_state({"other/exp_avg": ((2,), torch.float32)})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        RoleOptimizer(Net().requires_grad_(False), OptimConfig(lr=1.0))


# ---- recipes and the command line --------------------------------------------------------------------------------


def no_recipe() -> int:
    return 3


def needs_more(size: int) -> ToyRecipe:
    return ToyRecipe()


def test_recipes_are_found_changed_and_refused() -> None:
    named = load_recipe("toy", {"toy": "toy:recipe"}, ["train.optim.lr=0.5", "sizes.width=4"])
    assert isinstance(named.recipe, ToyRecipe) and named.description == "The toy recipe, changed."
    assert named.recipe.sizes.width == 4 and named.recipe.train.optim.lr == 0.5
    assert from_dict(ToyRecipe, to_dict(named.recipe)) == named.recipe
    assert flat(named.recipe)["train.optim.lr"] == 0.5
    for name, message in {
        "toi": "did you mean toy", "nowhere:f": "cannot be imported", "test_parts:no_recipe": "got a int",
        "test_parts:needs_more": "missing a required argument", "test_parts:HERE": "expected a function",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_recipe(name, {"toy": "toy:recipe"})


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(COMMANDS, "train", ("unspool.cli.train:run", "train"))
    monkeypatch.setattr("unspool.recipes.RECIPES", {"toy": "toy:recipe"})
    monkeypatch.setattr("unspool.log.setup_console", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_trains_and_continues(command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy", "train.steps=2"]) == 0
    assert "2 of 2 (2 now)" in capsys.readouterr().out
    assert main(["train", "toy:recipe", "train.steps=3", "--out", "runs/toy"]) == 0
    assert "3 of 3 (1 now)" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(command / "runs/toy/metrics.jsonl")] == [1, 2, 3]
    assert "steps: 3" in (command / "runs/toy/config.yaml").read_text()
    assert main(["train", "toy", "--init-from", "runs/toy", "--out", "runs/b", "train.steps=1"]) == 0
    assert main(["train", "--list"]) == 0
    assert "The toy recipe" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ["", "tox", "toy train.optim.lx=1", "toy train.steps=many", "toy --resume nowhere", "toy --init-from nowhere",
     "toy --out file", "toy --out file/below"],
)  # fmt: skip
def test_mistakes_are_one_line_and_code_2(line: str, command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command / "file").write_text("")
    assert main(["train", *line.split()]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("unspool: error: ") and told.err.count("\n") == 1 and not told.out
    assert not (command / "runs").exists()


def test_a_dry_run_counts_and_writes_nothing(command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "toy", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "to the end" in text and "942 parameters" in text
    assert not list(command.iterdir())
    small = recipe("sizes.dropout=0", "train.optim.kind=muon+adamw", "critic=true")
    found = estimate(Named(name="toy", recipe=small, description=""), timed_steps=1)
    student = found.roles[0]
    muon = sum(p.numel() for p in split_parameters(Net(), small.train.optim).muon.values())
    assert (student.num_parameters, student.num_muon, student.ema_bytes) == (942, muon, 4 * 942)
    assert student.optimizer_bytes == 4 * muon + 8 * (942 - muon) and found.roles[1].ema_bytes == 0
    rows = small.train.batch * 3  # samples x latent frames
    linear = 2 * rows * (6 * 8 + 8 * 6 + 4 * 8 * 16)
    convolution = 2 * rows * 3 * 8 * 8
    # twice as much backward as forward, but that of the input, which needs no gradient
    plain = estimate(Named(name="toy", recipe=recipe("sizes.dropout=0"), description=""), timed_steps=1).measured
    assert plain is not None and found.measured is not None
    assert found.measured.flops > plain.flops  # Muon multiplies matrices, too
    assert plain.flops == 3 * (linear + convolution) - 2 * rows * 6 * 8
    assert plain.activation_bytes > 4 * rows * 8


def test_a_dry_run_of_what_does_not_fit_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.train.dryrun._memory_bytes", lambda device: 1000)
    found = estimate(Named(name="toy", recipe=recipe(), description=""))
    assert found.measured is None and "are needed" in found.text() and found.roles[0].num_parameters == 942


# ---- log ---------------------------------------------------------------------------------------------------------


def test_means_leave_out_what_is_no_number() -> None:
    window = Window()
    for value in (1.0, math.nan, 4.0):
        window.add({"a": torch.tensor(value), "b": value, "c": math.nan})
    assert window.means(ALONE) == {"a": 2.5, "b": 2.5}
    assert window.means(ALONE) == {}


def test_lines_after_the_checkpoint_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    drop_after(path, 2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    drop_after(tmp_path / "none.jsonl", 2)


def test_progress_is_told_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="unspool")
    display = Display("toy", 10, 0, shown=True)
    display.update(5, {"loss": 0.25, "samples_per_s": 8.0})
    display.close()
    assert "toy step 5 of 10  loss 0.25" in caplog.text and "to go" in caplog.text
    assert [duration(s) for s in (3.4, 95, 7260)] == ["3s", "1m35s", "2h01m"]


def test_tensorboard_is_used_where_it_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(tmp_path, "train.steps=1")
    assert list((tmp_path / "tensorboard").iterdir())


def test_recipes_are_listed_without_torch() -> None:
    code = "import sys, unspool.recipes, unspool.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
