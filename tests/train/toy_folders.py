"""Recipes that end in a model folder, at toy size, as the command line trains them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from test_ca2vdm_recipes import SMALL, TOY, stage_files
from test_finetune_video import TOY as FINETUNE

__all__ = ["FINETUNE", "SMALL", "TOY", "stage_files", "train"]


def train(out: Path, *arguments: str) -> None:
    """`unspool train` with `arguments`, the first of them the recipe. Raises AssertionError where it fails."""
    from unspool.cli.main import main

    assert main(["train", arguments[0], "--out", str(out), "--quiet", *arguments[1:]]) == 0
