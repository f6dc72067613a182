"""The model folder that a training on the stage leaves, and the rollout that it and the watched samples state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unspool.causal.visibility import Window
from unspool.config import apply_overrides, locate
from unspool.data.shard_format import ShardHeader
from unspool.data.shard_writer import ShardWriter
from unspool.engine.load import load
from unspool.engine.model_folder import read_model_folder
from unspool.models.caption import CaptionConfig, CaptionEncoder
from unspool.models.taehv import Taehv
from unspool.recipes import RECIPES
from unspool.recipes.stage import codec_64
from unspool.recipes.stage_watch import Watch
from unspool.train.loop import Trainer

ROOT = Path(__file__).parents[2]
SMALL = ("train.steps=1", "train.batch=1", "train.compile=false", "train.dtype=fp32", "in_memory=false",
         "network.dim=16", "network.ffn_dim=32", "network.num_layers=1", "network.num_heads=2", "network.text_dim=8",
         "network.text_len=6", "short.legs=[]")  # fmt: skip
LATENTS = ShardHeader(
    codec="none", codec_sha256=None, normalisation="none", dtype="float32", fps=16.0, num_frames=81, height_px=64,
    width_px=64, latent_shape=(16, 8, 8), frames_rule="1 + 4k",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codec, text encoder and latents."""
    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(0)
    Taehv(replace(codec_64().codec, encoder_widths=(8, 8, 8, 8), decoder_widths=(8, 8, 8, 8))).save(
        folder / "codec.safetensors"
    )
    words = ("a", "red", "ball", "bounces")
    CaptionEncoder(CaptionConfig(words=words, dim=8, out_dim=8, layers=1, heads=2, rows=5, slots=1)).save(
        folder / "text.safetensors"
    )
    with ShardWriter(folder / "latents", LATENTS) as writer:
        writer.add(0, torch.randn(21, 16, 8, 8), ("a red ball bounces",))
    return folder


def made(name: str, home: Path, *overrides: str) -> Any:
    recipe = locate(f"stage-64-{name}", RECIPES)()
    recipe = replace(recipe, text=str(home / "text.safetensors"), data=str(home / "latents"), start="",
                     codec=str(home / "codec.safetensors"))  # fmt: skip
    return apply_overrides(recipe, [*SMALL, *overrides])


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_many_step_training_leaves_a_model(name: str, home: Path, tmp_path: Path) -> None:
    Trainer(made(name, home, "learn_text=true"), tmp_path, name=f"stage-64-{name}", show=False).run()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.json.*model does, give that"):
        load(tmp_path)
    found = load(tmp_path / "model")
    assert found.spec.is_causal == (name == "student") and found.spec.provenance["recipe"] == f"stage-64-{name}"
    assert found.generate("a red ball bounces", frames=9).frames.shape == (9, 64, 64, 3)
    trained = load_file(tmp_path / "student.safetensors")
    for key, value in load_file(tmp_path / "model" / "text.safetensors").items():
        torch.testing.assert_close(value, trained[f"text.{key}"], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("codec", ["none.safetensors", ""])
def test_a_training_without_a_codec_says_that_it_leaves_none(
    codec: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(replace(made("student", home), codec=codec), tmp_path, show=False).run()
    assert not (tmp_path / "model").exists()
    told = capsys.readouterr().out
    assert ("model       none: codec=none.safetensors is not there; `unspool stage-model" in told) == bool(codec)


def test_the_codec_of_a_run_may_change_unless_it_trains(home: Path) -> None:
    assert "codec" in made("student", home).may_differ() and "codec" in made("self-forcing", home).may_differ()
    assert "codec" not in made("long", home).may_differ()


@pytest.mark.parametrize("name", ["text", "data"])
def test_what_is_not_made_yet_is_said_with_its_command(name: str, home: Path, tmp_path: Path) -> None:
    recipe = replace(made("student", home), **{name: str(tmp_path / "none")})
    with pytest.raises(FileNotFoundError, match=rf"{name}=.*none is not there; `unspool stage-model .*--until latents"):
        Trainer(recipe, tmp_path / "run", show=False)


# ---- the rollout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"),
    [("motion", "weights/stage-64-many-step"), ("teacher", "weights/stage-64-teacher"),
     ("long", "src/unspool/assets/stage")],
)  # fmt: skip
def test_the_shipped_models_state_the_rollout_of_their_recipes(name: str, folder: str) -> None:
    stated = read_model_folder(ROOT / folder, verify=False).rollout
    assert locate(f"stage-64-{name}", RECIPES)().rollout() == stated


@pytest.mark.parametrize("name", ["student", "consistency", "self-forcing", "gan"])
def test_chunks_and_commit_level_are_those_of_the_method(name: str, home: Path, tmp_path: Path) -> None:
    inner = "method.sample" if name in ("self-forcing", "gan") else "method"
    recipe = made(name, home, f"{inner}.plan.chunk=1", f"{inner}.sigma_commit=0.1",
                  f"watch.codec={home / 'codec.safetensors'}", "watch.clips=2")  # fmt: skip
    rollout = recipe.rollout()
    assert rollout.chunk == 1 and rollout.sigma_commit == 0.1
    assert (rollout.window, rollout.sink, rollout.positions) == (21, 3, "relative")
    watch = Watch(recipe.watch, kind=recipe.kind, size_px=64, rollout=rollout)
    assert watch.spec.rollout == rollout and [type(c).__name__ for c in recipe.callbacks()] == ["Every", "StageFolder"]
    if name == "student":
        Trainer(replace(recipe, watch=replace(recipe.watch, codec="")), tmp_path, show=False).run()
        assert read_model_folder(tmp_path / "model").rollout == rollout


WINDOWED = ("method.visibility._type=Window", "method.visibility.window=9", "method.visibility.sink=2")


def test_a_window_and_positions_are_taken_at_their_word(home: Path) -> None:
    rollout = made("student", home, *WINDOWED).rollout()
    assert (rollout.window, rollout.sink, rollout.positions) == (9, 2, "absolute")
    cyclic = ("method.positions._type=Cyclic", "method.positions.length=12", "method.positions.offset=1")
    rollout = made("student", home, *WINDOWED, *cyclic, "method.visibility.sink=0").rollout()
    assert rollout.positions == "cyclic" and rollout.position_options == {"length": 12, "offset": 1}
    rollout = made("student", home, "method.positions=ReanchoredSink", "method.plan.first=1").rollout()
    assert (rollout.positions, rollout.first, rollout.window) == ("reanchored", 1, 21)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ((*WINDOWED, "method.visibility.commit_window=6"), r"visibility=.*commit_window=6"),
        (("method.positions.moves_keys=true",), r"positions=.*moves_keys=True.*moves_keys=False"),
        (("method.plan.num_frames=21",), r"plan\.num_frames=21: expected none"),
        (("method.plan.chunk=20",), "a chunk of 20 latent frames is longer than window=21 minus sink=3"),
    ],
)
def test_what_model_json_cannot_state_is_refused_before_training(
    overrides: tuple[str, ...], match: str, home: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        made("student", home, *overrides)
    assert apply_overrides(replace(made("student", home), codec=""), overrides)


@dataclass(frozen=True, kw_only=True)
class Near(Window):
    """A policy that no name of the package stands for."""

    window: int = 6


def test_a_visibility_of_ones_own_is_stated_by_its_class(home: Path, tmp_path: Path) -> None:
    recipe = made("self-forcing", home, "fewer=[]")
    sample = replace(recipe.method.sample, visibility=Near(window=9))
    own = replace(recipe, method=replace(recipe.method, sample=sample)).rollout()
    assert own.visibility == f"{__name__}:Near" and own.visibility_options["window"] == 9
    assert own.config().visibility == Near(window=9)
