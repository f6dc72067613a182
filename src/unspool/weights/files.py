"""Where weights lie: one file, a directory in diffusers or original layout, indexed shards, or a hub repository."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

INDEX_SUFFIX = ".safetensors.index"
_SUFFIXES = (".safetensors", ".pt", ".pth")
_STEMS = ("diffusion_pytorch_model", "model")
_SUBFOLDER = "transformer"


def is_local(source: str | os.PathLike[str]) -> bool:
    """Whether `source` means a path of this machine: it exists, or it cannot be a hub name (`owner/name`)."""
    text = os.fspath(source)
    if isinstance(source, os.PathLike) or Path(text).exists():
        return True
    return (
        text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text or text.endswith((*_SUFFIXES, ".json"))
    )


def resolve(
    source: str | os.PathLike[str],
    *,
    filename: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local path for `source`; a hub name is downloaded (only the network's files, or `filename` alone).

    `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` are honoured by huggingface_hub, which is imported only for hub names.
    Raises FileNotFoundError for a local path that does not exist.
    """
    if is_local(source):
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"got {os.fspath(source)!r}, which does not exist; expected a file, a directory or owner/name"
            )
        found = path / filename if filename else path
        if not found.exists():
            raise FileNotFoundError(f"got {filename!r}, which {path} does not hold; it holds {_listing(path)}")
        return found
    import huggingface_hub

    repo = os.fspath(source)
    if filename:
        file = huggingface_hub.hf_hub_download(
            repo, filename, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return Path(file)
    # fnmatch's * crosses folders: every pattern is anchored by a name, so that no VAE or text encoder is fetched
    folders = [subfolder] if subfolder else ["", _SUBFOLDER]
    tag = f".{variant}" if variant else ""
    wanted = ["config.json"]
    for stem in _STEMS:
        wanted += [f"{stem}{tag}.safetensors", f"{stem}{tag}-*-of-*.safetensors", f"{stem}{INDEX_SUFFIX}{tag}.json"]
    patterns = [f"{folder}/{name}" if folder else name for folder in folders for name in wanted]
    folder = huggingface_hub.snapshot_download(
        repo,
        revision=revision,
        allow_patterns=patterns,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return Path(folder)


def find_files(path: Path, *, subfolder: str | None = None, variant: str | None = None) -> tuple[Path, ...]:
    """The weight files behind a path: `(file,)`, or `(index, shard, shard, ...)` for a sharded checkpoint.

    A directory is searched for its own weights first, then for `transformer/`. Raises FileNotFoundError when there are
    none or a shard is absent, ValueError when several candidates leave the choice open.
    """
    if path.is_file():
        return _with_shards(path) if path.name.endswith(".json") else (path,)
    if not path.is_dir():
        raise FileNotFoundError(f"got {str(path)!r}, which does not exist; expected a file or a directory")
    folders = [path / subfolder] if subfolder else [path, path / _SUBFOLDER]
    for folder in folders:
        if folder.is_dir() and (found := _in_folder(folder, variant)) is not None:
            return _with_shards(found) if found.name.endswith(".json") else (found,)
    raise FileNotFoundError(
        f"got {[str(f) for f in folders]} without weights"
        + (f" of variant {variant!r}" if variant else "")
        + "; expected "
        f"safetensors, an index.json or .pt / .pth; they hold {[_listing(f) for f in folders if f.is_dir()]}"
    )


def _in_folder(folder: Path, variant: str | None) -> Path | None:
    tag = f".{variant}" if variant else ""
    for stem in _STEMS:
        for name in (f"{stem}{INDEX_SUFFIX}{tag}.json", f"{stem}{tag}.safetensors"):
            if (folder / name).is_file():
                return folder / name
    if variant:
        return None
    for pattern in (f"*{INDEX_SUFFIX}.json", "*.safetensors", "*.pt", "*.pth"):
        found = sorted(p for p in folder.glob(pattern) if not p.name.startswith("."))
        if len(found) > 1:
            raise ValueError(
                f"got {len(found)} candidates in {folder}: {[p.name for p in found][:6]}; name one of them"
            )
        if found:
            return found[0]
    return None


def _with_shards(index: Path) -> tuple[Path, ...]:
    names = sorted(set(read_index(index).values()))
    folder = index.parent.resolve()
    for name in names:
        # an index comes from elsewhere: it must not reach outside of its folder
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"got shard name {name!r} in {index}; expected a file inside {folder}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"got {index.name} naming {len(names)} shards, of which {absent} are absent; fetch them again"
        )
    return (index, *(index.parent / name for name in names))


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name. Raises ValueError when the JSON is not a shard index."""
    content = read_json(index)
    table = content.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(value, str) for value in table.values()):
        raise ValueError(f"got {index} without a weight_map; expected a safetensors index; fetch it again")
    return table


def read_json(path: Path) -> dict[str, object]:
    """A JSON object. Raises ValueError when the file is something else or cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"got {path}, which is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"got {path} holding a {type(content).__name__}; expected a JSON object")
    return content


def sha256_of(files: Sequence[Path]) -> str:
    """Hex digest of one file; of several, the digest of their sorted lines `<digest>  <name>` (sha256sum's output)."""
    digests = []
    for path in files:
        with path.open("rb") as stream:
            digests.append((hashlib.file_digest(stream, "sha256").hexdigest(), path.name))
    if len(digests) == 1:
        return digests[0][0]
    lines = "".join(f"{digest}  {name}\n" for digest, name in sorted(digests, key=lambda pair: pair[1]))
    return hashlib.sha256(lines.encode()).hexdigest()


def _listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else [folder.name]
