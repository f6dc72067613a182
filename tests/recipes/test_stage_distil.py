"""The stage's distillation recipes, each for a few steps over a tiny network and random latents."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unspool.config import apply_overrides, locate
from unspool.data.shard_format import ShardHeader, read_header, write_header
from unspool.data.shard_writer import ShardWriter
from unspool.data.shards import LatentShards, LatentShardsConfig
from unspool.data.trajectories import TrajectoryConfig, TrajectoryShards, write_trajectories
from unspool.diffusion.schedule import uniform
from unspool.engine.load import load
from unspool.log import read_metrics
from unspool.models.caption import CaptionConfig, CaptionEncoder
from unspool.models.taehv import Taehv
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.recipes import RECIPES
from unspool.recipes.stage import codec_64
from unspool.recipes.stage_distil import FEW_STEPS, GRID, TWO_STEPS, DistilRecipe
from unspool.recipes.stage_folder import SHIFT, usual_rollout
from unspool.train.dryrun import estimate
from unspool.train.loop import Trainer
from unspool.train.recipe import Named

CAPTIONS = ("a red ball bounces", "a blue star rests")
SIZES = ("network.dim=16", "network.ffn_dim=32", "network.num_layers=1", "network.num_heads=2", "network.text_dim=8",
         "network.text_len=6")  # fmt: skip
SMALL = ("train.steps=2", "train.batch=2", "train.compile=false", "train.log_every=1", "train.dtype=fp32",
         "in_memory=false", *SIZES)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.safetensors, latents, trajectories and weights of a student and a teacher."""
    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(0)
    words = ("a", "red", "ball", "bounces", "blue", "star", "rests")
    CaptionEncoder(CaptionConfig(words=words, dim=8, out_dim=8, layers=1, heads=2, rows=5, slots=1)).save(
        folder / "text.safetensors"
    )
    network = WanTransformer(
        WanConfig(dim=16, ffn_dim=32, num_layers=1, num_heads=2, in_channels=16, out_channels=16, text_dim=8,
                  text_len=6, freq_dim=128)
    )  # fmt: skip
    Taehv(replace(codec_64().codec, encoder_widths=(8, 8, 8, 8), decoder_widths=(8, 8, 8, 8))).save(
        folder / "codec.safetensors"
    )
    for role in ("student", "teacher", "critic"):
        weights = {f"backbone.{name}": t + 0.05 * torch.randn_like(t) for name, t in network.state_dict().items()}
        save_file(weights, folder / f"{role}.safetensors")
    header = ShardHeader(
        codec="none", codec_sha256=None, normalisation="none", dtype="float32", fps=16.0, num_frames=81, height_px=64,
        width_px=64, latent_shape=(16, 8, 8), frames_rule="1 + 4k",
    )  # fmt: skip
    with ShardWriter(folder / "latents", header) as writer:
        for item in range(4):
            index = [0] * 10 + [1] * 11 if item % 2 else [0] * 21
            writer.add(item, torch.randn(21, 16, 8, 8), CAPTIONS[: 1 + item % 2], prompt_index=index)
    clips = LatentShards(LatentShardsConfig(path=str(folder / "latents")))
    keep = TrajectoryConfig(
        schedule=uniform(GRID, shift=SHIFT), keep=FEW_STEPS.schedule.sigmas, guidance_from_uncond=1.0
    )

    def sample(latents: Any, numbers: range) -> Any:
        states = torch.randn(len(numbers), 5, 21, 16, 8, 8)
        return states, states[:, -1]

    write_trajectories(sample, clips, folder / "trajectories", keep, count=4, batch=2, teacher={"sha256": "x"})
    return folder


def made(name: str, home: Path, *overrides: str) -> DistilRecipe:
    recipe = locate(name, RECIPES)()
    data = home / ("trajectories" if name.endswith("ode") else "latents")
    recipe = replace(recipe, text=str(home / "text.safetensors"), start=str(home / "student.safetensors"),
                     codec=str(home / "codec.safetensors"), data=str(data))  # fmt: skip
    if name.rpartition("-")[2] in ("forcing", "bidirectional", "causvid", "gan", "long"):
        recipe = replace(recipe, teacher=str(home / "teacher.safetensors"))
    if name.endswith("long"):
        recipe = replace(recipe, critic=str(home / "critic.safetensors"))
    if name.endswith("ode"):
        recipe = replace(recipe, teacher="")
    return apply_overrides(recipe, [*SMALL, *overrides])


@pytest.mark.parametrize(
    "name", ["consistency", "ode", "self-forcing", "self-forcing-bidirectional", "causvid", "gan", "long"]
)
def test_a_recipe_trains_its_student(name: str, home: Path, tmp_path: Path) -> None:
    recipe = made(f"stage-64-{name}", home)
    Trainer(recipe, tmp_path, show=False).run()
    before, after = load_file(home / "student.safetensors"), load_file(tmp_path / "student.safetensors")
    assert set(after) == set(before) and any(not torch.equal(after[n], before[n]) for n in before)
    found = load(tmp_path / "model")
    assert found.settings() == recipe.rollout() and found.generate("a red ball bounces", frames=9).frames.shape[0] == 9
    for key, value in found.transformer.state_dict().items():
        torch.testing.assert_close(value.float(), after[f"backbone.{key}"].bfloat16().float(), rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["consistency", "ode", "self-forcing", "causvid", "gan", "long"])
def test_a_dry_run_measures_a_step(name: str, home: Path) -> None:
    found = estimate(Named(name=name, description="", recipe=made(f"stage-64-{name}", home)), timed_steps=1)
    assert found.measured is not None, found.why
    assert found.measured.flops > 0 and found.measured.step_s > 0 and "to the end" in found.text()


def test_samples_are_scored_on_the_way(home: Path, tmp_path: Path) -> None:
    recipe = made("stage-64-self-forcing", home, "train.steps=1", f"watch.codec={home / 'codec.safetensors'}",
                  "watch.every=1", "watch.clips=2", "watch.frames=9")  # fmt: skip
    Trainer(recipe, tmp_path, show=False).run()
    assert any("score/one/adherence" in row for row in read_metrics(tmp_path / "metrics.jsonl"))
    assert (tmp_path / "samples" / "step-00000001.png").is_file()


def test_the_critic_goes_on_from_the_leg_before(home: Path) -> None:
    recipe = made("stage-64-long", home)
    for critic, expected in ((recipe.critic, "critic"), ("", "teacher")):  # type: ignore[attr-defined]
        method: Any = replace(recipe, critic=critic).build_method(torch.device("cpu"))  # type: ignore[call-arg]
        file = load_file(home / f"{expected}.safetensors")
        for name, value in method.networks["critic"].state_dict().items():
            torch.testing.assert_close(value, file[name], rtol=0, atol=0, msg=name)


def test_paths_are_sampled_first_where_there_are_none(home: Path, tmp_path: Path) -> None:
    recipe = replace(made("stage-64-ode", home, "paths=3"), data=str(home / "latents"))
    unsampled = replace(recipe, teacher=str(home / "teacher.safetensors"))
    with pytest.raises(ValueError, match=r"not sampled yet, which the run itself does first.*data=RUN/paths"):
        unsampled.build_source()
    Trainer(unsampled, tmp_path, show=False).run()
    facts = TrajectoryShards(LatentShardsConfig(path=str(tmp_path / "paths"))).describe()
    assert facts["kind"] == "bidirectional" and facts["steps"] == GRID and facts["guidance_from_uncond"] == 3.0


def test_weights_and_data_of_different_codecs_are_refused(home: Path, tmp_path: Path) -> None:
    """Channels and patches agree: what tells them apart is the codec's hash, which shards and exports carry."""
    for name, mark in (("one", "1" * 64), ("other", "2" * 64)):
        save_file(load_file(home / "teacher.safetensors"), tmp_path / f"{name}.safetensors", {"codec_sha256": mark})
    one, other = (str(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    recipe: Any = replace(made("stage-64-causvid", home), codec="")
    assert replace(recipe, start=one, teacher=one, critic="").build_method(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"different codecs .*one\.safetensors: 1{12}, .*other\.safetensors: 2{12}"):
        replace(recipe, start=one, teacher=other).build_method(torch.device("cpu"))
    ode = replace(made("stage-64-ode", home), data=str(home / "latents"), start=one, teacher=other, codec="")
    with pytest.raises(ValueError, match="different codecs"):
        ode.prepare(tmp_path)  # before any path is sampled
    encoded = tmp_path / "latents"
    shutil.copytree(home / "latents", encoded)
    header, _ = read_header(encoded)
    write_header(encoded, replace(header, codec_sha256="3" * 64), num_clips=1, is_complete=True)
    with pytest.raises(ValueError, match=r"different codecs .*latents: 3{12}"):
        replace(recipe, start=one, teacher=one, data=str(encoded)).build_method(torch.device("cpu"))


def test_exports_say_whose_latents_they_know(home: Path, tmp_path: Path) -> None:
    encoded = tmp_path / "latents"
    shutil.copytree(home / "latents", encoded)
    header, _ = read_header(encoded)
    count = len((encoded / "index.jsonl").read_text().splitlines())
    write_header(encoded, replace(header, codec_sha256="3" * 64), num_clips=count, is_complete=True)
    recipe = replace(made("stage-64-consistency", home), data=str(encoded), codec="")
    Trainer(recipe, tmp_path / "run", show=False).run()
    with safe_open(str(tmp_path / "run" / "student.safetensors"), "pt") as file:
        assert file.metadata()["codec_sha256"] == "3" * 64


def test_settings_without_effect_are_refused(home: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher_kind='causal' with method\.past='noisy'"):
        made("stage-64-ode", home, "teacher_kind=causal")
    assert made("stage-64-ode", home, "teacher_kind=causal", "method.past=clean", "method.clean=false")
    with pytest.raises(ValueError, match="learn_text"):
        made("stage-64-causvid", home, "learn_text=true")
    with pytest.raises(ValueError, match=r"short\.legs"):
        made("stage-64-ode", home, "short.legs=[[3,1]]")
    with pytest.raises(ValueError, match="changes=true has no effect"):
        made("stage-64-ode", home, "changes=true")
    with pytest.raises(ValueError, match=r"fewer=.*1000\.0, 500\.0.*expected levels of steps=.*shift 5.*fewer too"):
        made("stage-64-consistency", home, "steps.shift=5")
    assert made("stage-64-consistency", home, "steps.shift=5", "fewer=[]")
    with pytest.raises(ValueError, match="frozen_encoder=true without start="):
        apply_overrides(locate("stage-64-codec", RECIPES)(), ["frozen_encoder=true"])
    with pytest.raises(ValueError, match="other steps than it learns"):
        made("stage-64-causvid", home, "steps.steps=[1000,500]")
    with pytest.raises(ValueError, match="other steps than it learns"):
        made("stage-64-gan", home, "steps.steps=[1000,500]")


def test_a_few_step_student_is_described_as_one() -> None:
    rollout = usual_rollout("causal", few=FEW_STEPS)
    assert rollout.steps == 4 and rollout.guidance_scale == 1.0 and rollout.solver == "few_step"
    assert rollout.config().schedule == FEW_STEPS.schedule
    with pytest.raises(ValueError, match="distilled to 4 fixed steps"):
        rollout.changed(steps=8)
    both = usual_rollout("causal", few=FEW_STEPS, fewer=(TWO_STEPS,))
    assert both.changed(steps=2).config().schedule == TWO_STEPS.schedule and both.changed(steps=4) == both
    with pytest.raises(ValueError, match="distilled to 2 or 4 fixed steps"):
        both.changed(steps=3)


def test_the_teachers_grid_holds_the_students_steps() -> None:
    TrajectoryConfig(schedule=uniform(GRID, shift=SHIFT), keep=FEW_STEPS.schedule.sigmas, guidance_from_uncond=3.0)


def test_resuming_with_another_recipe_is_refused(home: Path, tmp_path: Path) -> None:
    Trainer(made("stage-64-causvid", home, "train.steps=1"), tmp_path, show=False).run()
    with pytest.raises(ValueError, match="is of a recipe DmdRecipe, expected ConsistencyRecipe"):
        Trainer(made("stage-64-consistency", home), tmp_path, show=False)
    with pytest.raises(ValueError, match="another training"):
        Trainer(made("stage-64-self-forcing", home), tmp_path, show=False)
