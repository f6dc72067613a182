"""Weights that a training begins with: another training's export, a model folder, or the transformer's file in one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unspool.config import locate
from unspool.engine.model_folder import MODEL_FILE, NETWORKS, ModelSpec, read_model_folder
from unspool.models.caption import CaptionEncoder
from unspool.train.export import check_codec
from unspool.weights.read import read_checkpoint
from unspool.weights.report import LoadReport, compare, load_into

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unspool.methods.base import Method
    from unspool.recipes.stage_parts import Progress

BACKBONE, TEXT = "backbone.", "text."
"""What the names of a training's export begin with."""


def add_progress(network: nn.Module, progress: Progress) -> None:
    """Add it to the network's weights; nothing where none is named. Raises as `load_network`."""
    if not progress.now:
        return
    now, before = copy.deepcopy(network), copy.deepcopy(network)
    load_network(now, progress.now)
    load_network(before, progress.before)
    with torch.no_grad():
        for own, after, first in zip(network.parameters(), now.parameters(), before.parameters(), strict=True):
            own.add_(after - first, alpha=progress.share)


def begin_from(method: Method, path: str, progress: Progress | None = None) -> Method:
    """The method with its student's weights read from `path` (nothing happens without one), and `progress` added; as
    `load_network`.

    A text encoder in the student gets what lies beside the network: the export's `text.*`, the model folder's encoder.
    Where there is none it stays as it is.
    """
    if not path:
        return method
    student: Any = method.networks["student"]
    load_network(student.backbone, path)
    if progress is not None:
        add_progress(student.backbone, progress)
    if not student.encodes:
        return method
    found = model_at(path)
    if found is None:
        own = _part(read_checkpoint(weights_file(path)).tensors, TEXT)
        if own:
            _fill(student.text, own, f"{path} ({TEXT}*)", "text=, the text encoder that it was trained with")
    elif found[1].text.file is not None:
        theirs = _text_of(*found)
        _same_reading(student.text, theirs, path)
        load_into(student.text, theirs.state_dict())
    return method


def load_network(network: nn.Module, path: str) -> None:
    """Load a network's weights, strictly, in the network's own dtype; nothing without a path.

    `path` is a training's export (its `backbone.*`) or the folder of the run that wrote it, a model folder, or the
    transformer's file of one. Raises FileNotFoundError where there is none, and ValueError, naming `path`, for a
    network of other sizes.
    """
    if not path:
        return
    file = weights_file(path)
    found = model_at(path)
    if found is not None:
        network_class = locate(found[1].transformer.kind, NETWORKS)
        if not isinstance(network, network_class):
            raise ValueError(
                f"{path}: its transformer is a {network_class.__name__}, expected a {type(network).__name__}; give "
                "weights of that network"
            )
    own = {} if found is not None else _part(read_checkpoint(file).tensors, BACKBONE)
    if own:
        _fill(network, own, path, "network=, the sizes that it was trained with")
        return
    bare: Any = type(network).from_single_file(file, dtype=torch.float32)  # type: ignore[attr-defined]
    _same_sizes(network, bare, path)
    load_into(network, bare.state_dict())


def model_at(path: str) -> tuple[Path, ModelSpec] | None:
    """The folder and description of the model that `path` names, as its folder or as the transformer's file in it."""
    if not path:
        return None
    place = Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    if not (folder / MODEL_FILE).is_file():
        return None
    spec = read_model_folder(folder, verify=False)
    return (folder, spec) if place == folder or place.name == spec.transformer.file else None


def weights_file(path: str) -> Path:
    """The file that `path` means. Raises FileNotFoundError where there is none."""
    place, found = Path(path).expanduser(), model_at(path)
    if found is not None and found[1].transformer.file is not None:
        return found[0] / found[1].transformer.file
    if (place / "student.safetensors").is_file():
        return place / "student.safetensors"
    if not place.is_file():
        raise FileNotFoundError(
            f"{path}: {'no weights in this folder' if place.is_dir() else 'no such file'}; expected the "
            "student.safetensors of a training, a model folder such as weights/stage-64-many-step, or its "
            "transformer's file"
        )
    return place


def check_codecs(data: str, *paths: str, codec: str = "") -> None:
    """As `check_codec`, and of model folders the codec that their `model.json` states."""
    found = {path: model_at(path) for path in paths}
    stated = {path: model[1].codec.sha256 for path, model in found.items() if model is not None}
    runs = [str(weights_file(path)) for path in paths if found[path] is None and path and Path(path).is_dir()]
    check_codec(data, *paths, *runs, codec=codec, stated=stated)


def check_text(text: CaptionEncoder, text_file: str, *paths: str) -> None:
    """Raise ValueError where a model folder or a training's export among `paths` reads captions with another encoder
    than `text`."""
    for path in paths:
        found, words_differ = model_at(path), False
        if not path or next(text.parameters()).is_meta:
            continue
        if found is None:
            theirs = _part(read_checkpoint(weights_file(path)).tensors, TEXT)
            fix = "the text.safetensors of the model folder that its training left"
        elif found[1].text.file is not None:
            encoder = _text_of(*found)
            theirs, fix = encoder.state_dict(), str(found[0] / found[1].text.file)
            words_differ = encoder.config != text.config
        else:
            continue
        if words_differ or (theirs and not _same_states(text.state_dict(), theirs)):
            raise ValueError(
                f"{path} reads captions with its own text encoder, and text={text_file} is another one; expected the "
                f"encoder that the network knows; set text= to {fix}"
            )


def _same_states(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        value.shape == ours[name].shape and torch.equal(value.to(ours[name]), ours[name])
        for name, value in theirs.items()
    )


def _text_of(folder: Path, spec: ModelSpec) -> CaptionEncoder:
    if spec.text.kind != "caption" or spec.text.file is None:
        raise ValueError(f"{folder}: its text encoder is of kind {spec.text.kind!r}; expected 'caption' with a file")
    return CaptionEncoder.from_single_file(folder / spec.text.file)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fill(module: nn.Module, tensors: dict[str, Tensor], source: str, sizes: str) -> None:
    """`load_into`, whose refusal names the source."""
    shapes = [{name: tuple(t.shape) for name, t in found.items()} for found in (tensors, module.state_dict())]
    missing, unexpected, mismatched = compare(*shapes)
    report = LoadReport(
        source=source, format="own", wrapper="flat", num_tensors=len(tensors), missing=missing, unexpected=unexpected,
        mismatched=mismatched,
    )  # fmt: skip
    report.require_exact(expected=f"the {len(shapes[1])} tensors of {type(module).__name__}", fix=f"set {sizes}")
    load_into(module, tensors)


def _same_sizes(network: Any, found: Any, path: str) -> None:
    differing = _differing(found.config, network.config)
    if differing:
        theirs = " ".join(f"network.{name}={getattr(found.config, name)}" for name in differing)
        raise ValueError(
            f"{path} is a network with {_shown(found.config, differing)}; expected {_shown(network.config, differing)};"
            f" set {theirs}, or give other weights"
        )


def _same_reading(text: CaptionEncoder, theirs: CaptionEncoder, path: str) -> None:
    differing = _differing(theirs.config, text.config)
    if differing:
        raise ValueError(
            f"{path}: its text encoder differs from that of text= in {', '.join(differing)}; expected the same words "
            "and sizes; give the folder's own encoder as text="
        )


def _differing(got: Any, expected: Any) -> list[str]:
    return [f.name for f in fields(got) if getattr(got, f.name) != getattr(expected, f.name)]


def _shown(config: Any, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


__all__ = [
    "add_progress",
    "begin_from",
    "check_codecs",
    "check_text",
    "load_network",
    "model_at",
    "weights_file",
]
