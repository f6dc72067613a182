"""Every `unspool ...` of the documentation is understood: the command line parses it, its a.b=c changes exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from unspool.cli.main import COMMANDS
from unspool.evaluate.protocol import protocol
from unspool.recipes import RECIPES
from unspool.recipes.stage_model import StageModelConfig
from unspool.train.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")))
BLOCK, SPAN = re.compile(r"```sh\n(.*?)```", re.S), re.compile(r"`(unspool [^`]+)`")
EXPECTED = 40


def commands(page: str) -> list[list[str]]:
    """Words of the commands in blocks and spans of a page; mentions of an option or a command alone are none."""
    text = (ROOT / page).read_text("utf-8")
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [line for line in lines if line.startswith("unspool ")] + SPAN.findall(BLOCK.sub("", text))
    words = [shlex.split(line.replace("\n", " "), comments=True)[1:] for line in found]
    return [w for w in words if len(w) > 1 and not w[-1].startswith("--") and "..." not in w]


def check(words: list[str]) -> None:
    """Parse, and look the changes up in what they change. SystemExit or ValueError where something is unknown."""
    module = importlib.import_module(COMMANDS[words[0]][0].partition(":")[0])
    args = tyro.cli(module.Args, prog=f"unspool {words[0]}", args=words[1:])
    changes = tuple(change for change in getattr(args, "overrides", ()) if not change.endswith("=..."))
    if words[0] == "train" and ":" not in args.recipe and args.recipe:
        load_recipe(args.recipe, RECIPES, changes)
    if words[0] == "evaluate":
        protocol(args.preset, changes)
    if words[0] == "stage-model":
        StageModelConfig(overrides=changes)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    for words in commands(page):
        try:
            check(words)
        except (SystemExit, ValueError, KeyError) as error:
            raise AssertionError(f"{page}: unspool {shlex.join(words)}: {error}") from error


def test_commands_are_found_and_wrong_ones_refused() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= EXPECTED
    for wrong in (
        ["evaluate", "stage", "--parts", "streams", "streams.seconds=250"], ["train", "stage-64-long", "no.such=1"],
        ["evaluate", "stage", "clips.number=3"], ["generate", "a ball", "--speed", "2"], ["stage-model", "steps=3"],
    ):  # fmt: skip
        with pytest.raises((SystemExit, ValueError)):
            check(wrong)
