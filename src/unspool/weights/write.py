"""Write safetensors so that a reader sees the old content or the new one, never a part.

Every file is written beside its target and renamed; a failure leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

STEM = "diffusion_pytorch_model"
_OWN_FILES = re.compile(rf"{STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors|{STEM}\.safetensors\.index\.json")


def save_file(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write one safetensors file atomically; `metadata` becomes its `__metadata__` header. Returns the path.

    Raises ValueError when there is nothing to write, a header value is no string, or the target is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"got {path}, a directory; expected the name of a .safetensors file")
    _check(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as temporary:
        _write(tensors, temporary, metadata)
        os.replace(temporary, path)
    return path


def save_sharded(
    tensors: Mapping[str, torch.Tensor],
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, object],
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, ...]:
    """Write `config.json` and `diffusion_pytorch_model[-0000x-of-N].safetensors` (+ index when sharded).

    Everything is written to a hidden folder first. While an existing checkpoint is being replaced, its index and
    config are absent, so an interruption cannot leave a mixture that reads as valid. Returns the paths written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"got {directory}, a file; expected a directory to write into")
    _check(tensors, metadata)
    # sizes are counted per tensor: a view of a fused tensor must not count as its whole storage
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern=STEM + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(directory) as staging:
        staging.mkdir()
        for name, keys in plan.filename_to_tensors.items():
            _write({key: tensors[key] for key in keys}, staging / name, metadata)
        names = [*plan.filename_to_tensors]
        if plan.is_sharded:
            total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
            names.append(f"{STEM}.safetensors.index.json")
            _write_json(staging / names[-1], index)
        names.append("config.json")
        _write_json(staging / names[-1], config)
        _publish(staging, directory, names)
    return tuple(directory / name for name in names)


def _publish(staging: Path, directory: Path, names: list[str]) -> None:
    if not directory.exists():
        os.replace(staging, directory)
        return
    stale = [path for path in directory.iterdir() if _OWN_FILES.fullmatch(path.name) or path.name == "config.json"]
    for path in sorted(stale, key=lambda p: p.suffix != ".json"):  # index and config first
        path.unlink()
    for name in names:  # shards first, then index and config
        os.replace(staging / name, directory / name)


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _write(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None) -> None:
    from safetensors.torch import save_file as write_safetensors

    # tied or overlapping tensors get memory of their own, since the format cannot express sharing
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    write_safetensors(plain, path, metadata={"format": "pt", **(metadata or {})})
    with path.open("r+b") as stream:
        _sort_header(stream)
        stream.flush()
        os.fsync(stream.fileno())


def _sort_header(stream: BinaryIO) -> None:
    """The library writes the entries of `__metadata__` in an order that changes from process to process; sorted, the
    same weights are the same bytes, and so have the same hash."""
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= size:  # another way of escaping a character: left as it is
        stream.seek(8)
        stream.write(text.ljust(size))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> None:
    if not tensors:
        raise ValueError("got an empty state dict; expected tensors to write")
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(
            f"got {len(meta)} tensors on the meta device, such as {meta[0]!r}; expected weights; load them first"
        )
    odd = [name for name, value in (metadata or {}).items() if not isinstance(value, str)]
    if odd:
        raise ValueError(f"got header values of {odd} that are no strings; expected strings, as safetensors requires")
