"""`load`: a model by its name in the package, by its folder, or from the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unspool import presets
from unspool.config import locate, nearest
from unspool.engine.model_folder import KINDS, MODEL_FILE, ModelSpec, Part, read_model_folder
from unspool.engine.origin import note_origin
from unspool.engine.pipeline import Pipeline
from unspool.engine.shipped import shipped_models
from unspool.models.base import Text
from unspool.weights.files import is_local
from unspool.weights.report import parse_dtype

HUB_FILES = [MODEL_FILE, "*.safetensors", "README.md"]


def load(
    name_or_path: str | os.PathLike[str] = "stage",
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str | None = None,
    compile: bool = False,
    verify: bool = True,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Pipeline:
    """A model ready to generate: one that the package carries, a model folder, or a hub repository (`owner/name`).

    `device` "auto" is the first GPU, else the CPU. `dtype` None is float32 on a CPU and the files' own elsewhere.
    `compile` fuses the small kernels of network and decoder where a compiler works. `verify` compares the files with
    their hashes.
    Raises FileNotFoundError or ValueError in one line for an unknown name and for missing or damaged files.
    """
    source = os.fspath(name_or_path)
    folder = find_model(name_or_path, revision=revision, local_files_only=local_files_only)
    spec = read_model_folder(folder, verify=verify)
    target = find_device(device)
    kind = parse_dtype(dtype) or (torch.float32 if target.type == "cpu" else None)
    parts = {role: _load_part(folder, role, part, kind, target) for role, part in spec.parts.items()}
    for weight in parts["codec"].parameters() if isinstance(parts["codec"], torch.nn.Module) else ():
        if weight.dim() == 4:  # as convolutions compute, else every call lays them out anew
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for role, part in spec.parts.items():
        note_origin(parts[role], part.sha256)
    if compile:
        from unspool.ops.compile import compile_backbone

        compile_backbone(parts["transformer"])
        if isinstance(decoder := getattr(parts["codec"], "decoder", None), torch.nn.Module):
            compile_backbone(decoder)
    check_fit(spec, folder, **parts)
    return Pipeline(spec, **parts, source=source, is_compiled=compile)


def find_device(device: torch.device | str) -> torch.device:
    """The device of a name; "auto" is the first GPU, else the CPU. Raises ValueError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {str(device)!r}: expected auto, cpu, cuda or cuda:<number>") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r}: {torch.cuda.device_count()} GPUs are visible; use auto or cpu")
    return found


def find_model(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder of a model, downloaded where it is a hub repository. Raises FileNotFoundError for an unknown one."""
    shipped = shipped_models()
    if isinstance(name_or_path, str) and name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; expected a model folder, which holds {MODEL_FILE} beside its weights")
    name = os.fspath(name_or_path)
    if name in presets.PRESETS:
        raise ValueError(
            f"{name} is known as a preset, but its repository has no {MODEL_FILE}; convert the network with `unspool "
            "convert` and put it, its codec and its text encoder into a folder with save_model_folder"
        )
    if is_local(name_or_path):
        raise FileNotFoundError(
            f"no model {name!r}: this installation carries {', '.join(shipped) or 'none'}, and there is no folder of "
            f"that name; {nearest(name, shipped) if shipped else 'train it, or give a folder or owner/name'}"
        )
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no folder {name!r} here, and the hub does not give that repository: {reason}") from None
    return Path(found)


def check_fit(spec: ModelSpec, folder: Path, *, transformer: Any, codec: Any, text: Any) -> None:
    """Raise ValueError when the components do not fit each other, or not the sizes that `model.json` states."""
    rows, columns = spec.geometry.latent_size(spec.height_px, spec.width_px)
    channels = getattr(codec, "latent_channels", transformer.latent_channels)
    try:
        spec.rollout.config(whole=None if spec.is_causal else spec.clip)
        transformer.tokens_per_frame(rows, columns)
        if channels != transformer.latent_channels:
            raise ValueError(
                f"the codec has {channels} latent channels, the network {transformer.latent_channels}; put the codec "
                "that it was trained with into the folder"
            )
        with torch.no_grad():
            transformer.prepare(Text.of(text([""])))
    except ValueError as error:
        raise ValueError(f"{folder / MODEL_FILE}: {error}") from None


def _load_part(folder: Path, role: str, part: Part, dtype: torch.dtype | None, device: torch.device) -> Any:
    made = locate(part.kind, KINDS[role])
    if part.file is None:
        return made()
    if part.kind == "wan":  # not by from_single_file, which logs a report meant for checkpoints of unknown origin
        from unspool.models.wan.load import build_wan, read_wan

        found = build_wan(read_wan(folder / part.file, dtype=dtype), dtype=dtype, device=device)
    else:
        found = made.from_single_file(folder / part.file, dtype=dtype, device=device)
    return found.eval().requires_grad_(False) if isinstance(found, nn.Module) else found
