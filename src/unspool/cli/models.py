"""`unspool models`: what can be loaded by name, and what published models are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from unspool.engine.model_folder import ModelSpec
    from unspool.presets.model import Preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """List the models that this installation carries and the published ones that it knows the settings of.

    Carried models run as they are: unspool generate --model NAME. Of a published one the network can be converted
    (unspool convert --preset NAME). With a folder, that model is described.
    """

    folder: tyro.conf.Positional[Path | None] = None
    """A model folder to check and describe."""
    json: bool = False
    """Print JSON, one model per line."""


def run(args: Args) -> int:
    """Print one row per model."""
    from unspool import presets
    from unspool.engine.model_folder import read_model_folder
    from unspool.engine.shipped import shipped_models

    if args.folder is not None:
        _print_one(args.folder, read_model_folder(args.folder), as_json=args.json)
        return 0
    rows = [_model_row(name, read_model_folder(folder, verify=False)) for name, folder in shipped_models().items()]
    known = [_preset_row(preset) for preset in presets.PRESETS.values()]
    if args.json:
        for row in [*rows, *known]:
            print(json.dumps(row))
        return 0
    print("carried by this installation")
    _print_table(rows) if rows else print("  none")
    print("known (convert the network with unspool convert --preset NAME)")
    _print_table(known)
    return 0


def _model_row(name: str, spec: ModelSpec) -> dict[str, Any]:
    return {
        "name": name,
        "size": f"{spec.num_bytes / 2**20:.1f} MB",
        "px": f"{spec.width_px}x{spec.height_px}",
        "fps": f"{spec.fps:g}",
        "what": f"{spec.kind}, {spec.rollout.steps} steps" + (f": {spec.about}" if spec.about else ""),
        "licence": spec.licence or "not stated",
    }


def _preset_row(preset: Preset) -> dict[str, Any]:
    steps = "" if preset.num_steps is None else f", {preset.num_steps} steps"
    return {
        "name": preset.name,
        "size": f"{preset.network.num_layers} layers of {preset.network.dim}",
        "what": ("causal" if preset.is_causal else "bidirectional") + steps,
        "licence": preset.licence or "not stated",
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    widths = {name: max(len(str(row[name])) for row in rows) for name in rows[0]}
    for row in rows:
        print("  " + "  ".join(f"{row[name]:<{width}}" for name, width in widths.items()).rstrip())


def _print_one(folder: Path, spec: ModelSpec, *, as_json: bool) -> None:
    from unspool.config import to_dict

    if as_json:
        print(json.dumps(to_dict(spec)))
        return
    settings = spec.rollout
    lines = {
        "model": f"{spec.name}: {spec.about}" if spec.about else spec.name,
        "folder": str(folder),
        "kind": f"{spec.kind}, {spec.width_px}x{spec.height_px} px, {spec.fps:g} frames/s, {spec.num_bytes} bytes",
        "rollout": f"chunks of {settings.chunk} latent frames, window {settings.window}, sink {settings.sink}, "
        f"{settings.steps} steps ({settings.solver}), guidance {settings.guidance_scale:g}",
        "weights": spec.weights or "not hashed",
        "licence": spec.licence or "not stated",
        "examples": "; ".join(spec.examples) or "none",
        "words": spec.vocabulary or "not stated",
    }
    for name, value in lines.items():
        print(f"{name:<9} {value}")
    for role, part in spec.parts.items():
        print(f"{role:<12} {part.kind} {part.file or '(no weights)'}")
