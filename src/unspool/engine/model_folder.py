"""A model on disk: one folder with `model.json`, weight files whose headers carry their configs, and a card.

`model.json` says what the model is, how it is rolled out and which files belong to it, with their hashes; a folder that
does not agree with itself is refused in one line that names the file and the way out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unspool.config import from_dict, to_dict
from unspool.engine.settings import RolloutSettings
from unspool.geometry import Geometry

if TYPE_CHECKING:
    from torch import nn

MODEL_FILE, CARD_FILE = "model.json", "README.md"
FORMAT, VERSION = "unspool-model", 1
ROLES = ("transformer", "codec", "text")

NETWORKS = {
    "wan": "unspool.models.wan.network:WanTransformer",
    "stdit": "unspool.models.stdit.network:STDiT",
}
CODECS = {"taehv": "unspool.models.taehv:Taehv", "identity": "unspool.models.identity:IdentityCodec"}
TEXTS = {"caption": "unspool.models.caption:CaptionEncoder"}
KINDS: dict[str, dict[str, str]] = {"transformer": NETWORKS, "codec": CODECS, "text": TEXTS}
"""Role -> kind -> "module:Class". A user's own "module:Class" may stand wherever a kind is accepted; it is read by
`from_single_file(path, dtype=, device=)` and written by `save(path)`, or made by a call without arguments when the
model names no file for it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component: its `kind` (see KINDS), the `file` in the folder, and what that must be. No file: no weights."""

    kind: str
    file: str | None = None
    sha256: str | None = None
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.file is not None and (Path(self.file).name != self.file or self.file.startswith(".")):
            raise ValueError(f"file {self.file!r}: expected a plain file name inside the model's folder")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The content of `model.json`.

    Fields: `kind` "causal" streams without end, "bidirectional" makes clips of at most `clip` latent frames at once;
    `clip` latent frames of a training clip; `fps` of the video; `seconds` made when nobody says how much; `examples`
    prompts that work; `vocabulary` a hint at what can be asked for; `provenance` recipe, seed, hours, data, scores.
    """

    name: str
    kind: Literal["causal", "bidirectional"]
    transformer: Part
    codec: Part
    text: Part
    height_px: int
    width_px: int
    fps: float
    geometry: Geometry
    clip: int
    rollout: RolloutSettings
    seconds: float
    about: str = ""
    examples: tuple[str, ...] = ()
    vocabulary: str = ""
    licence: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        self.geometry.latent_size(self.height_px, self.width_px)
        if self.clip < 1 or not 0 < self.fps <= 1000 or not self.seconds > 0:
            raise ValueError(
                f"clip={self.clip}, fps={self.fps}, seconds={self.seconds}: expected at least 1 latent frame, "
                "0 < fps <= 1000 and seconds > 0"
            )

    @property
    def is_causal(self) -> bool:
        return self.kind == "causal"

    @property
    def parts(self) -> dict[str, Part]:
        """Role -> component."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def weights(self) -> str | None:
        """16 hex digits that tell the weights of all components apart; None before they are saved."""
        if self.transformer.sha256 is None:
            return None
        lines = "".join(f"{role} {part.kind} {part.sha256}\n" for role, part in self.parts.items())
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(part.num_bytes or 0 for part in self.parts.values())


def read_model_folder(folder: str | os.PathLike[str], *, verify: bool = True) -> ModelSpec:
    """The description of the model in `folder`, whose files were found whole.

    `verify` also compares their SHA-256. Raises FileNotFoundError, or ValueError naming the file and the fix.
    """
    folder = Path(folder)
    path = folder / MODEL_FILE
    if not path.is_file():
        inside = f"; {folder / 'model'} does, give that" if (folder / "model" / MODEL_FILE).is_file() else ""
        raise FileNotFoundError(
            f"{folder} holds no {MODEL_FILE}; expected a model folder, as save_model_folder writes{inside}"
        )
    spec = _parse(path)
    for part in spec.parts.values():
        if part.file is not None:
            _check_file(folder / part.file, part, verify=verify)
    return spec


def _parse(path: Path) -> ModelSpec:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, expected an object")
        if content.get("format") != FORMAT:
            raise ValueError(f"format is {content.get('format')!r}, expected {FORMAT!r}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"version {content.get('version')!r}, expected {VERSION}; use the unspool release that wrote it or "
                "a newer one"
            )
        return from_dict(ModelSpec, content)
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
        raise ValueError(f"{path}: not a readable model description: {error}") from None


def _check_file(path: Path, part: Part, *, verify: bool) -> None:
    fix = "copy or download the model again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but {MODEL_FILE} names it; {fix}")
    size = path.stat().st_size
    if part.num_bytes is not None and size != part.num_bytes:
        raise ValueError(f"{path} has {size} bytes, but {MODEL_FILE} says {part.num_bytes}: it is damaged; {fix}")
    if not verify or part.sha256 is None:
        return
    from unspool.weights.files import sha256_of  # here, because it imports torch and a list of models needs none

    if sha256_of([path]) != part.sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MODEL_FILE}; {fix}")


def save_model_folder(
    folder: str | os.PathLike[str],
    spec: ModelSpec,
    *,
    transformer: nn.Module,
    codec: object,
    text: object,
    metadata: Mapping[str, str] | None = None,
    card: str | None = None,
) -> ModelSpec:
    """Write a model folder and return its spec with files, sizes and hashes filled in.

    The kinds are taken from `spec`; a component whose kind has no `save` is written without a file. `metadata` goes
    into every header, `card` into README.md. A new folder appears whole or not at all; in an existing one `model.json`
    is replaced last, so that a mixture is noticed by its hashes.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder to write the model into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    staging.mkdir()
    try:
        parts: dict[str, Any] = {}
        for role, module in (("transformer", transformer), ("codec", codec), ("text", text)):
            parts[role] = _save_part(module, staging, role, spec.parts[role].kind, metadata)
        spec = replace(spec, **parts)
        (staging / MODEL_FILE).write_text(json.dumps(to_dict(spec), indent=1) + "\n", encoding="utf-8")
        if card is not None:
            (staging / CARD_FILE).write_text(card, encoding="utf-8")
        if not folder.exists():
            os.replace(staging, folder)
            return spec
        for file in sorted(staging.iterdir(), key=lambda f: f.name == MODEL_FILE):
            os.replace(file, folder / file.name)
        return spec
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_part(module: Any, folder: Path, role: str, kind: str, metadata: Mapping[str, str] | None) -> Part:
    from unspool.weights.files import sha256_of

    path = folder / f"{role}.safetensors"
    if kind == "wan":
        from unspool.models.wan.load import save_wan_file

        save_wan_file(module, path, metadata=metadata)
    elif hasattr(module, "save"):
        module.save(path, metadata=metadata)
    else:
        return Part(kind=kind)
    return Part(kind=kind, file=path.name, sha256=sha256_of([path]), num_bytes=path.stat().st_size)
