"""Weights out of a run's checkpoint: plain tensors, averaged or raw, as one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unspool.data.shard_format import HEADER, read_header
from unspool.train.checkpoint import Saved, check_files, fill, find, stored
from unspool.train.parallel import World
from unspool.weights.files import sha256_of
from unspool.weights.read import read_checkpoint
from unspool.weights.write import save_file

Which = Literal["ema", "raw"]
CODEC = "codec_sha256"
"""In checkpoints and in the header of exported weights: which codec's latents they were trained on."""
_ALONE = World(rank=0, size=1, device=torch.device("cpu"))
Module = TypeVar("Module", bound=nn.Module)


def read_weights(
    path: str | os.PathLike[str], *, role: str = "student", which: Which | None = None
) -> dict[str, Tensor]:
    """The weights of a role by the names of its network, on the CPU, from a run, a checkpoint or a safetensors file.

    `which` None takes the average where there is one. Raises FileNotFoundError, or ValueError where the run has no
    checkpoint, no such role, or no average.
    """
    path = Path(path)
    if path.is_file():
        return dict(read_checkpoint(path, leading=frozenset()).tensors)
    return _from_run(_found(path), role, which)


def export_weights(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    role: str = "student",
    which: Which | None = None,
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the weights of a role as one safetensors file; see `read_weights`.

    `prefix` picks the tensors whose names begin with it ("backbone.") and removes it. The header tells the step, the
    recipe and its configuration; `metadata` is added to it.
    """
    saved = _found(Path(run))
    tensors = _from_run(saved, role, which)
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not chosen:
        raise ValueError(f"prefix={prefix!r} fits none of {len(tensors)} tensors such as {next(iter(tensors))}")
    header = {
        "step": str(saved.step),
        "recipe": str(saved.state.get("recipe", "")),
        "recipe_config": json.dumps(saved.state["config"]),
        "weights": which or ("ema" if _has_average(saved, role) else "raw"),
        **{f"version_{name}": str(value) for name, value in saved.state.get("versions", {}).items()},
    }
    if codec := saved.state.get(CODEC):
        header[CODEC] = codec
    return save_file(chosen, out, metadata={**header, **(metadata or {})})


def rebuilt(module: Module, tensors: Mapping[str, Tensor], prefix: str = "") -> Module:
    """A new module of the class and `config` of `module`, on the CPU and in eval mode, with those of `tensors` whose
    names begin with `prefix`.

    The modules of a sharded training can be called while they are gathered, but their tensors are DTensors all the
    same, which neither files nor other modules take: what a run writes is built from `read_weights`. Raises
    RuntimeError where names or shapes differ.
    """
    own: Any = module
    made: Module = type(own)(own.config)
    made.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return made.eval()


def check_codec(data: str, *files: str, codec: str = "", stated: Mapping[str, str | None] | None = None) -> None:
    """Raise ValueError where weight files were trained on latents of other codecs than each other, than those in the
    folder `data`, or than the file `codec`. `stated`: hashes known from elsewhere, by name of the weights. What does
    not say, or is not there, is not compared."""
    made: dict[str, str | None] = {}
    if codec and Path(codec).is_file():
        made[codec] = sha256_of([Path(codec)])
    if data and (Path(data) / HEADER).is_file():
        made[data] = read_header(Path(data))[0].codec_sha256
    for file in files:
        if Path(file).suffix == ".safetensors" and Path(file).is_file():
            with safe_open(file, framework="pt") as opened:
                made[file] = (opened.metadata() or {}).get(CODEC)
    made.update(stated or {})
    known = {name: mark for name, mark in made.items() if mark}
    if len(set(known.values())) > 1:
        told = ", ".join(f"{name}: {mark[:12]}" for name, mark in known.items())
        raise ValueError(
            f"latents of different codecs ({told}); expected those of one: encode or train with one codec, or set "
            "mixed_codecs=true where they share an encoder"
        )


def _found(path: Path) -> Saved:
    saved = find(path)
    if saved is None:
        raise ValueError(f"{path} holds no checkpoint; expected the --out folder of a training")
    check_files(saved, _ALONE)
    return saved


def _has_average(saved: Saved, role: str) -> bool:
    return any(name.startswith(f"ema/{role}/") for name in stored(saved))


def _from_run(saved: Saved, role: str, which: Which | None) -> dict[str, Tensor]:
    there = stored(saved)
    parts = {kind: [name for name in there if name.startswith(f"{kind}/{role}/")] for kind in ("model", "ema")}
    if not parts["model"]:
        roles = sorted({name.split("/")[1] for name in there if name.startswith("model/")})
        raise ValueError(f"{saved.path} has no role {role!r}; it has {', '.join(roles)}")
    if which == "ema" and not parts["ema"]:
        raise ValueError(f"{saved.path} has no average of {role!r}; use which='raw'")
    names = {name: f"model/{role}/{name}" for name in (_own(full) for full in parts["model"])}
    if which != "raw":
        names.update({_own(full): full for full in parts["ema"]})
    tensors = {name: torch.empty(there[full][0], dtype=there[full][1]) for name, full in names.items()}
    fill(saved, {full: tensors[name] for name, full in names.items()})
    return tensors


def _own(full: str) -> str:
    return full.split("/", 2)[2]
