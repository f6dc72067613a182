"""Weights that recipes begin with: exports, model folders, transformer files; and what does not fit them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unspool.config import apply_overrides, locate
from unspool.data.shard_format import ShardHeader
from unspool.data.shard_writer import ShardWriter
from unspool.engine.model_folder import Part, read_model_folder, save_model_folder
from unspool.models.caption import CaptionConfig, CaptionEncoder
from unspool.models.taehv import Taehv
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.recipes import RECIPES
from unspool.recipes.first_weights import load_network, weights_file
from unspool.recipes.stage import codec_64
from unspool.recipes.stage_folder import describe_model, usual_rollout

CPU = torch.device("cpu")
NETWORK = WanConfig(dim=16, ffn_dim=32, num_layers=1, num_heads=2, in_channels=16, out_channels=16, text_dim=8,
                    text_len=6, freq_dim=128)  # fmt: skip
SIZES = ("network.dim=16", "network.ffn_dim=32", "network.num_layers=1", "network.num_heads=2", "network.text_dim=8",
         "network.text_len=6")  # fmt: skip
WORDS = ("a", "red", "ball", "bounces")
LATENTS = ShardHeader(
    codec="none", codec_sha256=None, normalisation="none", dtype="float32", fps=16.0, num_frames=81, height_px=64,
    width_px=64, latent_shape=(16, 8, 8), frames_rule="1 + 4k",
)  # fmt: skip


def text_encoder(words: tuple[str, ...] = WORDS) -> CaptionEncoder:
    return CaptionEncoder(CaptionConfig(words=words, dim=8, out_dim=8, layers=1, heads=2, rows=5, slots=1))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in bf16, the text encoder beside it, another text encoder, and an export in fp32."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network, text = WanTransformer(NETWORK), text_encoder()
    codec = Taehv(replace(codec_64().codec, encoder_widths=(8, 8, 8, 8), decoder_widths=(8, 8, 8, 8)))
    spec = describe_model(kind="causal", size_px=64, transformer=Part(kind="wan"), rollout=usual_rollout("causal"))
    save_model_folder(folder / "model", spec, transformer=network.to(torch.bfloat16), codec=codec, text=text)
    text.save(folder / "text.safetensors")
    text_encoder().save(folder / "other.safetensors")  # drawn anew: the same sizes, other weights
    export = {f"backbone.{name}": t.float() for name, t in network.state_dict().items()}
    save_file(export, folder / "student.safetensors")
    with ShardWriter(folder / "latents", LATENTS) as writer:
        writer.add(0, torch.randn(21, 16, 8, 8), ("a red ball bounces",))
    return folder


def made(name: str, home: Path, *overrides: str) -> Any:
    recipe = replace(
        locate(f"stage-64-{name}", RECIPES)(), text=str(home / "text.safetensors"), data=str(home / "latents"), codec=""
    )  # without the codec that may lie where the tests run
    return apply_overrides(recipe, [*SIZES, *overrides])


@pytest.mark.parametrize("name", ["teacher", "student", "consistency", "ode", "causvid", "self-forcing", "gan", "long"])
@pytest.mark.parametrize("source", ["model", "model/transformer.safetensors", "student.safetensors", "."])
def test_a_recipe_begins_with_a_model(name: str, source: str, home: Path) -> None:
    recipe, path = made(name, home), str(home / source)
    recipe = replace(recipe, start=path, **({"teacher": path} if hasattr(recipe, "teacher") else {}))
    if name == "long":
        recipe = replace(recipe, critic=path, codec=str(home / "model" / "codec.safetensors"))
    method = recipe.build_method(CPU)
    expected = load_file(home / "student.safetensors")
    for role in ("student", *(("critic", "teacher") if name in ("causvid", "self-forcing", "long") else ())):
        network = method.networks.get(role) or method.frozen[role]
        found = {k: v for k, v in network.state_dict().items() if k.startswith("backbone.")}
        assert set(found) == set(expected)
        for key, value in found.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=f"{role} {key}")


@pytest.fixture(scope="module")
def later(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the same network after a training."""
    file = tmp_path_factory.mktemp("later") / "student.safetensors"
    torch.manual_seed(1)
    moved = {name: t + 0.1 * torch.randn_like(t) for name, t in load_file(home / "student.safetensors").items()}
    save_file(moved, file)
    return file


@pytest.mark.parametrize("name", ["teacher", "student", "consistency", "self-forcing"])
def test_the_progress_of_another_network_is_added_to_the_student_alone(name: str, home: Path, later: Path) -> None:
    start, other = str(home / "model"), str(later)
    changes = (f"progress.now={other}", f"progress.before={home / 'student.safetensors'}", "progress.share=0.5")
    recipe = made(name, home, f"start={start}", *changes)
    recipe = replace(recipe, **({"teacher": start} if hasattr(recipe, "teacher") else {}))
    method = recipe.build_method(CPU)
    first, after = load_file(home / "student.safetensors"), load_file(later)
    for key, value in method.networks["student"].state_dict().items():
        if key.startswith("backbone."):
            expected = first[key] + 0.5 * (after[key] - first[key])
            torch.testing.assert_close(value, expected, msg=key)
    teacher = getattr(method, "frozen", {}).get("teacher")
    for key, value in teacher.state_dict().items() if teacher is not None else ():
        if key.startswith("backbone."):
            torch.testing.assert_close(value, first[key], rtol=0, atol=0, msg=key)


def test_progress_without_one_of_its_ends_is_refused(home: Path, later: Path) -> None:
    with pytest.raises(ValueError, match=r"progress\.before='': give both"):
        made("student", home, f"progress.now={later}", f"start={home}")
    with pytest.raises(ValueError, match=r"progress\.share=0\.5 has no effect"):
        made("student", home, "progress.share=0.5")
    with pytest.raises(ValueError, match=r"without start=.*give start="):
        made("student", home, "start=", f"progress.now={later}", f"progress.before={later}")


def test_a_text_encoder_in_the_student_is_that_of_the_model_folder(home: Path) -> None:
    recipe = replace(made("student", home), text=str(home / "other.safetensors"), start=str(home / "model"))
    found, theirs = recipe.build_method(CPU).networks["student"].text, load_file(home / "text.safetensors")
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


def test_an_encoder_of_other_words_is_refused(home: Path, tmp_path: Path) -> None:
    text_encoder(("a", "blue", "ball", "rests")).save(tmp_path / "text.safetensors")
    recipe = replace(made("student", home), text=str(tmp_path / "text.safetensors"), start=str(home / "model"))
    with pytest.raises(ValueError, match=r"model: its text encoder differs from that of text= in words"):
        recipe.build_method(CPU)


def test_a_distillation_reads_captions_as_its_models_do(home: Path) -> None:
    recipe = replace(made("consistency", home), start=str(home / "model"))
    assert recipe.build_method(CPU)
    with pytest.raises(ValueError, match=r"other\.safetensors is another one.*set text=.*model/text\.safetensors"):
        replace(recipe, text=str(home / "other.safetensors")).build_method(CPU)


def test_a_distillation_reads_captions_as_an_export_did(home: Path, tmp_path: Path) -> None:
    """A text encoder that learnt beside the network lies in its export."""
    learnt = {f"text.{name}": value for name, value in load_file(home / "other.safetensors").items()}
    save_file(load_file(home / "student.safetensors") | learnt, tmp_path / "student.safetensors")
    recipe = replace(made("consistency", home), start=str(tmp_path / "student.safetensors"))
    with pytest.raises(ValueError, match=r"student\.safetensors reads captions with its own text encoder"):
        recipe.build_method(CPU)
    assert replace(recipe, text=str(home / "other.safetensors")).build_method(CPU)


def test_other_sizes_are_named(home: Path) -> None:
    for source in ("model", "model/transformer.safetensors"):
        recipe = replace(made("student", home, "network.num_heads=1"), start=str(home / source))
        with pytest.raises(ValueError, match=rf"{source} .*num_heads 2; expected num_heads 1; set network.num_heads=2"):
            recipe.build_method(CPU)
    wider = replace(made("student", home, "network.dim=32"), start=str(home / "student.safetensors"))
    with pytest.raises(ValueError, match=r"student\.safetensors .*of another shape.*set network="):
        wider.build_method(CPU)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file; expected the student\.safetensors"):
        replace(wider, start=str(home / "none.safetensors")).build_method(CPU)


def test_another_kind_of_network_is_refused(home: Path) -> None:
    from unspool.models.stdit.network import STDiT
    from unspool.recipes.ca2vdm import small_stdit

    with torch.device("meta"):
        network = STDiT(small_stdit())
    with pytest.raises(ValueError, match="its transformer is a WanTransformer, expected a STDiT"):
        load_network(network, str(home / "model"))


def test_a_model_folder_states_its_codec(home: Path, tmp_path: Path) -> None:
    from unspool.data.shard_format import write_header

    recipe = replace(made("student", home), start=str(home / "model"), data=str(tmp_path))
    stated = read_model_folder(home / "model").codec.sha256
    write_header(tmp_path, replace(LATENTS, codec_sha256=stated), num_clips=1, is_complete=True)
    assert recipe.build_method(CPU)
    write_header(tmp_path, replace(LATENTS, codec_sha256="3" * 64), num_clips=1, is_complete=True)
    for source in ("model", "model/transformer.safetensors"):
        with pytest.raises(ValueError, match=rf"different codecs .*3{{12}}.*{source}: {str(stated)[:12]}"):
            replace(recipe, start=str(home / source)).build_method(CPU)
    assert replace(recipe, mixed_codecs=True).build_method(CPU)


def test_a_wan_recipe_takes_a_model_folder(home: Path) -> None:
    recipe = replace(locate("wan-1.3b-consistency", RECIPES)(), network=NETWORK, start=str(home / "model"))
    found = recipe.build_method(CPU).networks["student"].state_dict()
    assert all(torch.equal(found[name], t) for name, t in load_file(home / "student.safetensors").items())


def test_paths_know_the_file_of_their_teacher(home: Path) -> None:
    assert weights_file(str(home / "model")) == home / "model" / "transformer.safetensors"
    assert weights_file(str(home)) == home / "student.safetensors"
