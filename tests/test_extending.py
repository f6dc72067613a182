"""The documentation runs: every ```python block of the guides is executed, in order, one namespace per file.

The blocks hold their own assertions. A block marked ```python no-run is skipped and counted.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<source>.*?)^(?P=indent)```[ ]*$", re.M | re.S)
NO_RUN = {"README.md": 0, "docs/extending.md": 0, "docs/ideas.md": 0, "docs/rollout.md": 1}
"""Guide -> blocks that it may leave unrun (they need downloaded weights); raise a number only with a reason."""

ASSERTED = {"docs/extending.md": 40, "docs/ideas.md": 6, "docs/rollout.md": 15}
"""Guide -> least number of `assert` statements: a guide without them would prove nothing."""


@dataclass(frozen=True)
class Block:
    """One fenced block: its first line in the file, its text, and whether it is marked no-run."""

    line: int
    source: str
    is_skipped: bool


def blocks_of(text: str) -> list[Block]:
    """The Python blocks of a Markdown text. Raises ValueError for a mark that means nothing here."""
    found = []
    for fence in FENCE.finditer(text):
        language, *marks = fence["info"].split() or [""]
        if language != "python":
            continue
        line = text.count("\n", 0, fence.start("source")) + 1
        if marks not in ([], ["no-run"]):
            raise ValueError(f"line {line - 1}: got the mark {' '.join(marks)!r}, expected none or 'no-run'")
        found.append(Block(line, fence["source"], is_skipped=bool(marks)))
    return found


def run(path: Path, name: str = "my_project") -> tuple[int, int]:
    """Execute the blocks of a file as one module `name`; how many ran and how many were skipped.

    The module is importable while it runs, as a user's own file would be; tracebacks show the lines of the guide.
    """
    blocks = blocks_of(path.read_text("utf-8"))
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        for block in blocks:
            if not block.is_skipped:
                exec(compile("\n" * (block.line - 1) + block.source, str(path), "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    skipped = sum(block.is_skipped for block in blocks)
    return len(blocks) - skipped, skipped


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """A guide may seed, or switch gradients off, for itself only."""
    with torch.random.fork_rng(), torch.enable_grad():
        yield


@pytest.mark.parametrize("guide", NO_RUN)
def test_a_guide_runs_as_it_is_written(guide: str) -> None:
    ran, skipped = run(ROOT / guide)
    assert skipped == NO_RUN[guide]
    assert ran > 0 or guide not in ASSERTED


@pytest.mark.parametrize("guide", ASSERTED)
def test_a_guide_asserts_what_it_says(guide: str) -> None:
    sources = [block.source for block in blocks_of((ROOT / guide).read_text("utf-8")) if not block.is_skipped]
    count = sum(len(re.findall(r"^\s*assert ", source, re.M)) for source in sources)
    assert count >= ASSERTED[guide]


CONTRACTS = (
    "Process",
    "Visibility",
    "PositionPolicy",
    "Context",
    "Backbone",
    "Solver",
    "NoiseSource",
    "Codec",
    "Cache",
)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_every_contract_has_its_chapter_with_code(contract: str) -> None:
    text = (ROOT / "docs/extending.md").read_text("utf-8")
    chapters = re.split(r"^## ", text, flags=re.M)[1:]
    own = [chapter for chapter in chapters if re.search(rf"\b{contract}\b", chapter.splitlines()[0])]
    assert len(own) == 1, f"expected one chapter that names {contract} in its title"
    assert "assert " in "".join(block.source for block in blocks_of(own[0]))


def unlisted(structure: str, modules: list[str]) -> list[str]:
    """Modules (paths below the package) that neither have their own mention nor lie in a folder named with a slash."""
    folders = re.findall(r"`((?:\w+/)+)`", structure)
    stems = set(re.findall(r"\b(\w+)\.py\b", structure))
    listed = re.findall(r"`((?:\w+/)+)((?:\w+\.py ?)+)`", structure)
    paths = {folder + name for folder, names in listed for name in names.split()}
    top = {f"{stem}.py" for stem in stems}
    return [m for m in modules if m not in paths and not m.startswith(tuple(folders)) and ("/" in m or m not in top)]


def test_the_structure_names_every_module_and_no_other() -> None:
    package = ROOT / "src/unspool"
    modules = sorted(str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py")
    structure = (ROOT / "docs/structure.md").read_text("utf-8")
    assert not unlisted(structure, modules), "add a line to docs/structure.md"
    mentioned = set(re.findall(r"\b((?:\w+/)+\w+\.py)\b", structure)) - {"tests/test_layers.py"}
    assert mentioned and not mentioned - set(modules), "docs/structure.md names what is not there"


def test_a_module_that_is_not_named_is_noticed() -> None:
    structure = "`a/x.py y.py` two files, `b/` a folder, `top.py`"
    assert unlisted(structure, ["a/x.py", "a/y.py", "b/z.py", "top.py"]) == []
    assert unlisted(structure, ["a/z.py", "c/x.py", "other.py"]) == ["a/z.py", "c/x.py", "other.py"]


# ---- the runner itself: it must be able to fail --------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "guide.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_failing_block_fails_at_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, "# Guide\n\n```python\nvalue = 1\n```\ntext\n```python\nx = 0\nassert value == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(path)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(path), 9)
    assert "my_project" not in sys.modules


def test_a_syntax_error_fails(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError):
        run(write(tmp_path, "```python\ndef f(:\n```\n"))


def test_blocks_share_a_namespace_and_marked_ones_are_counted(tmp_path: Path) -> None:
    text = "```python\na = 1\n```\n```python no-run\nraise RuntimeError\n```\n"
    text += "```sh\nexit 1\n```\n```python\nassert a\n```\n"
    assert run(write(tmp_path, text)) == (2, 1)


def test_a_block_in_a_list_is_seen(tmp_path: Path) -> None:
    with pytest.raises(IndentationError):  # seen, and refused: it would not run as it is when copied
        run(write(tmp_path, "1. step\n\n   ```python\n   a = 1\n   ```\n"))


def test_an_unknown_mark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-run"):
        run(write(tmp_path, "```python norun\n1 / 0\n```\n"))


def test_classes_of_a_guide_can_be_found_by_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "```python\nfrom __future__ import annotations\nimport importlib\nfrom dataclasses import dataclass\n\n"
        "@dataclass(frozen=True)\nclass Mine:\n    size: int = 3\n```\n"
        "```python\nassert importlib.import_module(Mine.__module__).Mine().size == 3\n```\n",
    )
    assert run(path) == (2, 0)
