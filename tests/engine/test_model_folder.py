"""Model folders: what is written is read back, and what is wrong is named in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import SPEC, WORDS, load, parts, pipeline, save

from unspool.engine import load as load_module
from unspool.engine.model_folder import MODEL_FILE, ModelSpec, Part, read_model_folder, save_model_folder
from unspool.engine.settings import GUIDANCE_CONVENTION
from unspool.models.caption import CaptionConfig, CaptionEncoder
from unspool.models.identity import IdentityCodec
from unspool.models.taehv import Taehv, TaehvConfig

RED = "a red ball bounces at sunset"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_holds_the_whole_model(folder: Path) -> None:
    assert {file.name for file in folder.parent.iterdir()} == {"tiny"}
    found = load(folder)
    assert found.spec == read_model_folder(folder) and found.spec.rollout == SPEC.rollout
    assert (found.generate(RED, frames=9).frames == pipeline().generate(RED, frames=9).frames).all()
    stated = json.loads((folder / MODEL_FILE).read_text())
    assert stated["rollout"]["guidance_convention"] == GUIDANCE_CONVENTION and stated["version"] == 1
    assert found.spec.num_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_saving_again_replaces_the_model(folder: Path) -> None:
    before = read_model_folder(folder).weights
    spec = save(folder, seed=1)
    assert read_model_folder(folder).weights == spec.weights != before
    assert not [file for file in folder.parent.iterdir() if file != folder]


def test_a_component_without_weights_has_no_file(tmp_path: Path) -> None:
    spec = replace(SPEC, codec=Part(kind="identity"))
    saved = save_model_folder(tmp_path / "m", spec, **{**parts(), "codec": IdentityCodec()})
    assert saved.codec.file is None and not (tmp_path / "m" / "codec.safetensors").exists()
    assert isinstance(load(tmp_path / "m").codec, IdentityCodec)


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save_model_folder(tmp_path / "m", SPEC, **{**parts(), "transformer": torch.nn.Linear(2, 2)})
    assert not list(tmp_path.iterdir())


def edit(folder: Path, **changes: object) -> None:
    path = folder / MODEL_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil(kind: str, folder: Path) -> None:
    weights = folder / "codec.safetensors"
    if kind == "missing":
        weights.unlink()
    elif kind == "short":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif kind == "flipped":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif kind == "no json":
        (folder / MODEL_FILE).write_text("{")
    elif kind == "no model":
        (folder / MODEL_FILE).unlink()
    elif kind == "version":
        edit(folder, version=2)
    elif kind == "format":
        edit(folder, format="other")
    elif kind == "key":
        edit(folder, nmae="x")
    elif kind == "kind":
        edit(folder, text={"kind": "captoin", "file": "text.safetensors"})
    elif kind == "outside":
        edit(folder, text={"kind": "caption", "file": "../text.safetensors"})
    elif kind == "size":
        edit(folder, height_px=24)
    elif kind == "swapped":
        (folder / "text.safetensors").replace(weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"codec\.safetensors is missing.*copy or download"),
        ("short", r"codec\.safetensors has \d+ bytes.*copy or download"),
        ("flipped", r"codec\.safetensors is damaged: its SHA-256"),
        ("no json", r"model\.json: not a readable model description"),
        ("no model", r"holds no model\.json"),
        ("version", r"model\.json: .*version 2, expected 1"),
        ("format", r"model\.json: .*format is 'other'"),
        ("key", r"model\.json: .*did you mean name\?"),
        ("kind", r"did you mean caption"),
        ("outside", r"model\.json: .*plain file name"),
        ("size", r"model\.json: .*24 is not a positive multiple of 16"),
        ("swapped", r"codec\.safetensors has"),
    ],
)
def test_a_spoilt_folder_is_refused_by_name(folder: Path, kind: str, message: str) -> None:
    spoil(kind, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_components_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    codec = Taehv(TaehvConfig(decoder_widths=(4, 4, 4, 4), encoder_widths=4, latent_channels=3, padding="start"))
    save_model_folder(tmp_path / "codec", SPEC, **{**parts(), "codec": codec})
    with pytest.raises(ValueError, match="codec has 3 latent channels, the network 4"):
        load(tmp_path / "codec")
    text = CaptionEncoder(CaptionConfig(words=WORDS, dim=8, out_dim=12, layers=1, heads=2, rows=4))
    save_model_folder(tmp_path / "text", SPEC, **{**parts(), "text": text})
    with pytest.raises(ValueError, match="rows of 8 channels"):
        load(tmp_path / "text")


def test_without_verifying_the_hash_is_not_read(folder: Path) -> None:
    spoil("flipped", folder)
    assert isinstance(read_model_folder(folder, verify=False), ModelSpec)


def test_names_that_cannot_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "shipped_models", lambda: {"stage": folder})
    assert load("stage").spec.name == "tiny" and load().source == "stage"
    for name, message in (
        ("stag", "did you mean stage"),
        ("/no/such/folder", "no model"),
        ("self-forcing-dmd", "known as a preset"),
        (str(folder / MODEL_FILE), "is a file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(name)
    for device, message in (("gpu", "expected auto"), ("cuda:77", "GPUs are visible")):
        with pytest.raises(ValueError, match=message):
            load(folder, device=device)


def test_dtype(folder: Path) -> None:
    found = load(folder, dtype="bfloat16")
    assert found.dtype == torch.bfloat16
    clip = found.generate(RED, frames=9)
    assert clip.record.dtype == "bfloat16"
    near = np.abs(clip.frames.astype(int) - load(folder).generate(RED, frames=9).frames).mean()
    assert 0 < near < 10  # of 255
