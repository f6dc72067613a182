"""Read a checkpoint into a flat dict of tensors, whatever its container; a pickle's code never runs.

Tensors are memory-mapped where the container allows it, so reading costs nothing until they are used; whoever keeps
them must copy them, because they live as long as the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from unspool.weights.files import find_files, read_index, read_json
from unspool.weights.names import FLAT, LEADING, WRAPPERS, choose_wrapper, strip_prefixes, stripped_parts

_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of one network under their names without wrappers, and where they came from.

    `wrapper` is the container key taken, `offered` all that were there; `stripped` the module prefixes removed;
    `ignored` the entries that were no tensors. `metadata` is the safetensors header; `config` comes from it, else from
    `config.json`.
    """

    source: str
    files: tuple[Path, ...]
    tensors: dict[str, torch.Tensor]
    wrapper: str
    offered: tuple[str, ...]
    stripped: tuple[str, ...]
    ignored: tuple[str, ...]
    metadata: dict[str, str]
    config: dict[str, object] | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    which: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    preferred: tuple[str, ...] = WRAPPERS,
    leading: frozenset[str] = LEADING,
) -> Checkpoint:
    """Read safetensors (one file or shards), or `.pt` / `.pth` with `weights_only=True` and mmap.

    `path` is a file, an index, or a directory. `which` names the container key (`generator_ema`, ..., or `flat`); None
    takes the first of `preferred`. Raises FileNotFoundError, or ValueError (got, expected, fix) for a truncated file,
    a file that is no checkpoint, a pickle of other objects, or names that collide.
    """
    path = Path(path).expanduser()
    files = find_files(path, subfolder=subfolder, variant=variant)
    content, metadata = _read_files(files)
    chosen = choose_wrapper(content, which, preferred=preferred)
    names = strip_prefixes(chosen.tensors, leading=leading)
    return Checkpoint(
        source=str(path),
        files=files,
        tensors={names[name]: tensor for name, tensor in chosen.tensors.items()},
        wrapper=chosen.wrapper,
        offered=chosen.offered,
        stripped=stripped_parts(names),
        ignored=chosen.ignored,
        metadata=metadata,
        config=_config(metadata, files[0], path.is_dir()),
    )


def _read_files(files: tuple[Path, ...]) -> tuple[Mapping[str, object], dict[str, str]]:
    if len(files) == 1:
        return _read_file(files[0])
    table = read_index(files[0])
    tensors: dict[str, object] = {}
    metadata: dict[str, str] = {}
    for shard in files[1:]:
        found, metadata = _read_file(shard)
        expected = {name for name, file in table.items() if file == str(shard.relative_to(files[0].parent))}
        if set(found) != expected:
            absent, extra = sorted(expected - set(found)), sorted(set(found) - expected)
            raise ValueError(
                f"got {shard.name}, which does not agree with {files[0].name}: {len(absent)} tensors absent "
                f"{absent[:3]}, "
                f"{len(extra)} not listed {extra[:3]}; expected one consistent download; fetch the shards again"
            )
        tensors |= found
    return tensors, metadata


def _read_file(path: Path) -> tuple[Mapping[str, object], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(64)
    if size == 0:
        raise ValueError(f"got {path}, which is empty; expected a checkpoint; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"got {path}, a git-lfs pointer; expected the weights themselves; run git lfs pull")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if start.startswith(b"PK") or start[:1] == b"\x80":
        return _read_pickle(path, start, size), {}
    raise ValueError(
        f"got {path} ({size} bytes, starting with {start[:8]!r}); expected .safetensors, or a .pt / .pth written by "
        "torch.save"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        # the header is checked against the file's length here, before any tensor is touched
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"got {path} ({path.stat().st_size} bytes), which is truncated or no safetensors file ({error}); expected "
            "a whole "
            "file; fetch it again"
        ) from None


def _read_pickle(path: Path, start: bytes, size: int) -> Mapping[str, object]:
    is_zip = zipfile.is_zipfile(path)
    if start.startswith(b"PK") and not is_zip:
        raise ValueError(
            f"got {path} ({size} bytes), a torch.save archive without its end; it is truncated; fetch it again"
        )
    try:
        # files written before torch 1.6 are bare pickles, which cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:160]
        raise ValueError(
            f"got {path}, a pickle that holds more than tensors, or a damaged one ({reason}); expected plain state "
            "dicts, because "
            "anything else could run code; re-save it as torch.save(model.state_dict()) or safetensors where you trust "
            "it"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"got {path}, which torch cannot read ({reason}); expected a torch.save file; fetch it again"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"got {path} holding a {type(content).__name__}; expected a state dict or a dict of state dicts"
        )
    return content


def _config(metadata: Mapping[str, str], file: Path, from_directory: bool) -> dict[str, object] | None:
    if "config" in metadata:
        try:
            content = json.loads(metadata["config"])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"got a config in the header of {file} that is not JSON ({error}); convert the file again"
            ) from None
        if isinstance(content, dict):
            return content
    beside = file.parent / _CONFIG
    # beside a lone file of another name, config.json may belong to anything
    if beside.is_file() and (from_directory or file.name.startswith("diffusion_pytorch_model")):
        return read_json(beside)
    return None


__all__ = ["FLAT", "Checkpoint", "read_checkpoint"]
