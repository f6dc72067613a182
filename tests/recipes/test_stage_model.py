"""The chain that builds the stage model, at a size where every part takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unspool.config import apply_overrides, locate
from unspool.data.shard_format import ShardHeader, write_header
from unspool.data.stage import StageClips
from unspool.data.worlds.stage import StageConfig
from unspool.log import read_metrics
from unspool.recipes import RECIPES
from unspool.recipes.stage_folder import card_of
from unspool.recipes.stage_model import OFTEN, PARTS, TAKEN, StageModel, StageModelConfig

SMALL = (
    "codec.train.steps=2", "codec.train.batch=2", "codec.codec.encoder_widths=8,8,8,8", "codec.frames=9",
    "codec.codec.decoder_widths=8,8,8,8",
    "text.train.steps=2", "text.train.batch=4", "text.text.dim=32", "text.text.layers=1", "text.text.out_dim=16",
    *(f"{part}.{change}" for part in ("teacher", "student", "motion", "few", "distil", "long") for change in (
        "train.steps=4", "train.batch=2", "network.dim=32", "network.ffn_dim=64", "network.num_layers=1",
        "network.num_heads=2", "network.text_dim=16", "train.compile=false", "watch.every=4", "watch.clips=2",
        "watch.frames=21", "watch.steps=2",
    )),
    "teacher.short.legs=[[3,1],[9,1]]", "few.short.legs=[[3,4]]", "distil.short.legs=[[3,4]]",
    "distil.method.sample.frames=3", "long.method.sample.frames=6", "long.method.sample.longest=12",
)  # fmt: skip


def build(folder: Path, **changes: object) -> tuple[str | None, list[str]]:
    told: list[str] = []
    config = StageModelConfig(out=folder, clips=64, overrides=SMALL, **changes)  # type: ignore[arg-type]
    return StageModel(config, told.append).run(), told


@pytest.mark.slow
def test_the_chain_ends_in_three_models_that_load(tmp_path: Path) -> None:
    from unspool.engine.load import load

    assert build(tmp_path, until="text")[0] is None
    ended, told = build(tmp_path)
    assert ended is None and told[:2] == ["codec: already made", "text: already made"]
    assert list(json.loads((tmp_path / "stage-64" / "parts.json").read_text())) == list(PARTS)
    rows = read_metrics(tmp_path / "stage-64" / "student" / "metrics.jsonl")
    assert any("score/one/adherence" in row for row in rows)
    assert (tmp_path / "stage-64" / "teacher" / "samples" / "step-00000004.png").is_file()
    student = load(tmp_path / "stage-64" / "model")
    assert student.generate("a red ball bounces at sunset", seconds=1).frames.shape[1:] == (64, 64, 3)
    assert load(tmp_path / "stage-64" / "model").settings().steps == 4
    assert load(tmp_path / "stage-64" / "stage-64-many-step").settings().steps == 25
    assert not load(tmp_path / "stage-64" / "stage-64-teacher").spec.is_causal


def test_a_leg_without_time_saves_nothing_and_says_where_it_stopped(tmp_path: Path) -> None:
    ended, told = build(tmp_path, max_minutes=0.05)
    assert ended == "codec" and "run the same command again" in told[-1]


def test_codec_and_text_encoder_may_be_those_of_a_model(tmp_path: Path) -> None:
    taken = [tmp_path / "model" / name for name in TAKEN]
    taken[0].parent.mkdir()
    taken[0].write_bytes(b"a codec")
    with pytest.raises(ValueError, match=r"lacks \['text.safetensors'\]"):
        StageModelConfig(parts=tmp_path / "model")
    taken[1].write_bytes(b"a text encoder")
    ended, told = build(tmp_path, until="text", parts=tmp_path / "model")
    assert ended is None and "codec: taken from" in told[1]
    assert [(tmp_path / "stage-64" / name).read_bytes() for name in TAKEN] == [b"a codec", b"a text encoder"]
    assert build(tmp_path, until="text")[1] == ["codec: already made", "text: already made"]
    (tmp_path / "stage-64" / "latents").mkdir()
    made = StageModel(StageModelConfig(out=tmp_path))._provenance("student")
    assert made["taken"] == {"codec": "model", "text": "model"} and made["clips"] == 0
    assert "another model's parts (codec of model, text of model): recipe" in card_of("causal", 64, made)
    assert "from nothing: recipe" in card_of("causal", 64, {**made, "taken": {}})


def test_a_part_whose_file_was_deleted_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in TAKEN:
        (tmp_path / "model" / name).write_bytes(b"weights")
    build(tmp_path, until="text", parts=tmp_path / "model")
    (tmp_path / "stage-64" / "codec.safetensors").unlink()
    told = build(tmp_path, until="text", parts=tmp_path / "model")[1]
    assert told[0] == "codec: begins" and told[-1] == "text: already made"
    assert (tmp_path / "stage-64" / "codec.safetensors").is_file()
    notes = tmp_path / "stage-64" / "parts.json"
    notes.write_text(json.dumps({part: {"made": True, "minutes": 1.0} for part in PARTS}))
    chain = StageModel(StageModelConfig(out=tmp_path))
    assert [part for part in PARTS if chain._is_made(part)] == ["codec", "text"]


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    for wrong, match in (
        ({"size_px": 96}, "64 or 128"), ({"until": "all"}, "codec, text"), ({"clips": 3}, "at least 64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            StageModelConfig(out=tmp_path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"PART\.a\.b=c"):
        StageModelConfig(out=tmp_path, overrides=("steps=3",))
    with pytest.raises(ValueError, match="motions"):
        StageModelConfig(out=tmp_path, overrides=("latents.motions=[flies]",))
    with pytest.raises(ValueError, match=r"latents\.colours=.*each once"):
        StageModelConfig(out=tmp_path, overrides=("latents.colours=[red,red,blue]",))


def test_the_stage_that_is_rendered_can_be_changed(tmp_path: Path) -> None:
    config = StageModelConfig(out=tmp_path, overrides=("latents.motions=[bounces,orbits,orbits]", "latents.sprites=1"))
    assert config.stage == StageConfig(motions=("bounces", "orbits", "orbits"), sprites=(1.0,))
    assert StageModelConfig(out=tmp_path).stage == StageConfig(motions=OFTEN)


def test_clips_of_another_stage_than_the_command_says_are_refused(tmp_path: Path) -> None:
    """Or the models would state a stage that they were not trained on."""
    own = StageClips(StageConfig(motions=("orbits", "rests"))).describe()
    (tmp_path / "stage-64" / "latents").mkdir(parents=True)
    header = ShardHeader(
        codec="none", codec_sha256=None, normalisation="none", dtype="float32", fps=16.0, num_frames=5, height_px=64,
        width_px=64, latent_shape=(16, 8, 8), frames_rule="1 + 4k", source=json.dumps(own),
    )  # fmt: skip
    write_header(tmp_path / "stage-64" / "latents", header, num_clips=0, is_complete=True)
    (tmp_path / "stage-64" / "parts.json").write_text('{"latents": {"made": true}}')
    same = StageModel(StageModelConfig(out=tmp_path, overrides=("latents.motions=[orbits,rests]",)))
    assert not same._is_made("latents"), "made with fewer clips than this command says: it goes on"
    same._num_latents = lambda: 24_000  # type: ignore[method-assign]
    assert same._is_made("latents")
    with pytest.raises(ValueError, match=r"holds clips of .*orbits.*give the latents\.\* that it was made with"):
        StageModel(StageModelConfig(out=tmp_path))._is_made("latents")


def test_every_recipe_builds_its_configuration_and_says_what_it_is() -> None:
    for name, target in RECIPES.items():
        made = locate(name, RECIPES)
        assert made().train.steps > 0, target
        assert made.__doc__, name


def test_the_text_encoder_is_kept_as_it_was_parsed_with_unless_asked_otherwise(tmp_path: Path) -> None:
    import torch

    from unspool.models.caption import CaptionEncoder
    from unspool.recipes.stage import teacher_64
    from unspool.recipes.stage_parts import caption_config
    from unspool.train.optim import RoleOptimizer

    CaptionEncoder(caption_config()).save(tmp_path / "text.safetensors")
    for learns in (False, True):
        recipe = apply_overrides(teacher_64(), [f"text={tmp_path / 'text.safetensors'}", f"learn_text={learns}"])
        student = recipe.build_method(torch.device("cpu")).networks["student"]
        trained = RoleOptimizer(student, recipe.train.optim).parameters
        assert any(name.startswith("text.") for name in trained) == learns
        assert any(name.startswith("backbone.") for name in trained)
