"""Distillation at the size of Wan-1.3B: built without memory, and run at toy width on two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_wan
from processes import ranks, stored_tensors
from safetensors.torch import load_file

from unspool.config import locate
from unspool.methods.base import Method
from unspool.models.taehv import Taehv, TaehvConfig
from unspool.recipes import RECIPES
from unspool.train.ema import ema_decay

PARAMETERS, LARGE = 1_418_996_800, 14_288_491_584


@pytest.mark.parametrize("name", toy_wan.NAMES)
def test_a_recipe_builds_on_the_meta_device(name: str) -> None:
    recipe: Any = locate(name, RECIPES)()
    method = recipe.build_method(torch.device("meta"))
    assert isinstance(method, Method)
    teachers = list(getattr(method, "frozen", {}).values())
    networks = [*method.networks.values(), *(f.network for f in getattr(method, "followers", {}).values())]
    for network in networks + teachers:
        large = network in teachers and name.endswith("self-forcing")
        assert sum(p.numel() for p in network.parameters()) == (LARGE if large else PARAMETERS)
        assert all(p.is_meta for p in network.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wan")
    toy_wan.data(made)
    return made


@pytest.mark.dist
@pytest.mark.parametrize("name", toy_wan.NAMES)
def test_two_ranks_take_two_steps_as_one_does(name: str, folder: Path, tmp_path: Path) -> None:
    """Sharded over blocks, activations recomputed in the backward."""
    assert ranks(2, tmp_path / "two", str(folder), name, module="toy_wan") == [0, 0]
    toy_wan.train(tmp_path / "one", str(folder), name)
    one, two = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "two")
    assert set(one) == set(two)
    worst = max((one[n] - two[n]).abs().max().item() for n in one if n.startswith("model/"))
    assert worst <= 1e-5


def test_a_larger_teacher_needs_a_critic_of_its_own(tmp_path: Path) -> None:
    recipe: Any = locate("wan-1.3b-self-forcing", RECIPES)()
    recipe = replace(recipe, network=toy_wan.TOY, teacher_network=toy_wan.LARGER, teacher="somewhere")
    with pytest.raises(ValueError, match="give critic="):
        recipe.build_method(torch.device("cpu"))


def test_a_runs_export_begins_the_next_one(folder: Path, tmp_path: Path) -> None:
    toy_wan.train(tmp_path / "ode", str(folder), "wan-1.3b-causvid-ode")
    file = tmp_path / "ode" / "student.safetensors"
    trainer = toy_wan.train(tmp_path / "dmd", str(folder), "wan-1.3b-causvid", f"start={file}", f"teacher={file}")
    method: Any = trainer.method
    kept = load_file(file)
    teacher = method.teacher_network.state_dict()
    assert set(kept) == set(teacher) and all(torch.equal(kept[n], teacher[n]) for n in kept)


def test_a_teacher_may_be_kept_in_bf16(folder: Path, tmp_path: Path) -> None:
    name = "wan-1.3b-self-forcing"
    trainer = toy_wan.train(tmp_path, str(folder), name, "train.frozen_dtype=bf16", "train.dtype=bf16")
    method: Any = trainer.method
    assert next(method.teacher_network.parameters()).dtype == torch.bfloat16
    assert next(method.student.parameters()).dtype == torch.float32
    assert trainer.state.skipped == 0


def test_long_rollouts_open_their_windows_with_the_codec(folder: Path, tmp_path: Path) -> None:
    """21 latent frames of a rollout of 24; without a codec that is refused before any step."""
    name, longer = "wan-1.3b-self-forcing", "method.sample.longest=24"
    with pytest.raises(ValueError, match="codec='identity' has no effect on OdeRegressionConfig"):
        replace(locate("wan-1.3b-causvid-ode", RECIPES)(), codec="identity")
    with pytest.raises(ValueError, match="need the codec"):
        toy_wan.train(tmp_path / "none", str(folder), name, longer)
    torch.manual_seed(0)
    codec = Taehv(TaehvConfig(encoder_widths=4, decoder_widths=(8, 8, 4, 4), padding="start", num_blocks=1))
    codec.save(tmp_path / "codec.safetensors")
    trainer = toy_wan.train(tmp_path / "long", str(folder), name, longer, f"codec={tmp_path / 'codec.safetensors'}")
    method: Any = trainer.method
    assert method.sampler.codec is not None and trainer.state.step == 2 and trainer.state.skipped == 0


def test_the_published_average_begins_late_and_at_its_full_decay() -> None:
    config = locate("wan-1.3b-self-forcing", RECIPES)().train.ema
    assert [ema_decay(config, update) for update in (0, 39, 40, 119)] == [0.0, 0.0, 0.99, 0.99]
