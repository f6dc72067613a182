"""The models that the package carries; imports no torch."""

from __future__ import annotations

from pathlib import Path

from unspool.engine.model_folder import MODEL_FILE

ASSETS = Path(__file__).parents[1] / "assets"


def shipped_models() -> dict[str, Path]:
    """Name -> folder."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob(f"*/{MODEL_FILE}"))}
