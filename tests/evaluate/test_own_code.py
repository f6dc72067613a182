"""Kept clips belong to the code and the weights that made them, those of a user's own included."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_model import save

from unspool.causal.visibility import Full
from unspool.engine.load import load
from unspool.engine.pipeline import Pipeline
from unspool.engine.settings import RolloutSettings
from unspool.evaluate import own_code
from unspool.evaluate.runner import Arm, ClipStore, Request, mark

REQUEST = Request(prompts=("a red ball",), samples=(0,), seed=0, frames=9)
SOLVER = """
from unspool.rollout.solvers.euler import Euler
class Mine(Euler):
    scale = {scale}
"""


@pytest.fixture
def model(tmp_path: Path) -> Pipeline:
    save(tmp_path / "tiny")
    return load(tmp_path / "tiny")


@pytest.fixture
def modules(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "code"
    folder.mkdir()
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("my_solver_of_a_test", None)


def key(pipeline: Pipeline, folder: Path) -> str:
    own_code._source.cache_clear()  # as another process would
    own_code._never_again.cache_clear()
    return ClipStore(folder).key(Arm(name="student", pipeline=pipeline), REQUEST)


def test_a_model_of_the_package_alone_has_the_key_of_its_files_and_settings(model: Pipeline, tmp_path: Path) -> None:
    facts = own_code.settings_facts(model.settings())
    assert own_code.own_code(model, model.settings()) == {}
    assert model.weights == model.spec.weights
    assert key(model, tmp_path) == mark(model.weights, facts, asdict(REQUEST), "cpu", "torch.float32")


def test_a_solver_of_ones_own_is_known_by_its_source(model: Pipeline, modules: Path, tmp_path: Path) -> None:
    keys = []
    for scale in (1, 2, 1):
        (modules / "my_solver_of_a_test.py").write_text(SOLVER.format(scale=scale))
        sys.modules.pop("my_solver_of_a_test", None)
        mine = model.with_settings(replace(model.spec.rollout, solver="my_solver_of_a_test:Mine"))
        keys.append(key(mine, tmp_path))
    assert keys[0] == keys[2] != keys[1]
    assert key(model, tmp_path) not in keys


def test_a_policy_of_ones_own_is_known_by_its_values(model: Pipeline, tmp_path: Path) -> None:
    own = {f.name: getattr(model.spec.rollout, f.name) for f in model.spec.rollout.__dataclass_fields__.values()}
    made = [model.with_settings(Reaching(**own, reach=reach)) for reach in (3, 9, 3)]
    keys = [key(pipeline, tmp_path) for pipeline in made]
    assert keys[0] == keys[2] != keys[1] and key(model, tmp_path) not in keys


def test_a_class_without_source_is_never_the_same_twice(model: Pipeline, tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "typed_in"}
    exec("from unspool.engine.settings import RolloutSettings\nclass Typed(RolloutSettings): pass", scope)
    own = {f.name: getattr(model.spec.rollout, f.name) for f in model.spec.rollout.__dataclass_fields__.values()}
    typed = model.with_settings(scope["Typed"](**own))
    assert key(typed, tmp_path) != key(typed, tmp_path)


def test_weights_changed_in_memory_are_not_those_of_the_file(model: Pipeline, tmp_path: Path) -> None:
    before, stated = key(model, tmp_path), model.weights
    twin = copy.deepcopy(model.transformer)
    parts: dict[str, Any] = {"codec": model.codec, "text": model.wording.encoder}
    again = Pipeline(model.spec, transformer=twin, **parts, source="a copy")
    assert again.weights == stated
    with torch.no_grad():
        next(iter(twin.parameters())).zero_()  # type: ignore[attr-defined]
    assert again.weights.startswith("unsaved ") and key(again, tmp_path) != before
    assert model.weights == stated and key(model, tmp_path) == before
    with torch.no_grad():
        next(iter(model.codec.parameters())).add_(1.0)  # type: ignore[attr-defined]
    assert model.weights.startswith("unsaved ") and model.weights != again.weights


@dataclass(frozen=True)
class Reach(Full):
    reach: int = 3


@dataclass(frozen=True, kw_only=True)
class Reaching(RolloutSettings):
    """A rollout with a visibility that no name stands for."""

    reach: int = 3

    def config(self, *, whole: int | None = None) -> Any:
        return replace(super().config(whole=whole), visibility=Reach(reach=self.reach))
