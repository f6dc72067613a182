"""The rooms of the architecture: a module imports only from its own room and from rooms above it.

Imports inside functions, under TYPE_CHECKING, through importlib and as "module:Class" strings count like any other.
The checker is run on the package and, to prove that it can fail, on small synthetic trees.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "unspool"

ROOMS: list[tuple[str, ...]] = [
    ("shapes", "geometry", "annotations", "config", "weights", "log"),
    ("diffusion",),
    ("ops",),
    ("causal",),
    ("models",),
    ("rollout",),
    ("presets",),
    ("data",),
    ("methods",),
    ("train",),
    ("engine",),
    ("evaluate",),
    ("serve",),
    ("recipes",),
    ("cli",),
    ("__main__",),
    ("assets",),
]
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}
NEVER_TOGETHER = [{"train", "engine"}]
BANNED = {"torchvision", "torchcodec"}
TORCH_FREE = ("serve.app", "serve.messages")
"""Modules that may not reach torch, neither directly nor through what they import."""

TARGET = re.compile(rf"{PACKAGE}(\.\w+)+:\w+")
MODULE = re.compile(rf"{PACKAGE}(\.\w+)+")


@dataclass(frozen=True)
class Import:
    """One import of one module. `is_eager`: it happens when the importing module is imported."""

    module: str
    line: int
    is_eager: bool


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """All imports in a source text, by absolute module name; for `from a import b` both `a` and `a.b`."""
    tree = ast.parse(source)
    late = {id(node) for outer in ast.walk(tree) if _is_late(outer) for node in ast.walk(outer) if node is not outer}
    found = []
    for node in ast.walk(tree):
        for name in _names(node, module, is_package):
            is_text = isinstance(node, ast.Constant | ast.Call)
            found.append(Import(name, getattr(node, "lineno", 0), is_eager=id(node) not in late and not is_text))
    return found


def _is_late(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _names(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parents, base] if base else parents)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and TARGET.fullmatch(node.value):
        yield node.value.partition(":")[0]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def room_of(module: str) -> str | None:
    """`unspool.causal.cache.kv` -> `causal`; None for the package itself and for anything outside it."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def check(sources: Mapping[str, str]) -> list[str]:
    """Violations in a tree given as path below src/ -> text, one readable line each."""
    modules = {_module_name(path): (path, text) for path, text in sources.items()}
    imports = {name: imports_of(text, name, path.endswith("__init__.py")) for name, (path, text) in modules.items()}
    problems = []
    for name, found in imports.items():
        path, room = modules[name][0], room_of(name)
        if room is not None and room not in LEVEL:
            problems.append(f"{path}: {room} is no room of the architecture; known: {', '.join(LEVEL)}")
            continue
        for item in found:
            if item.module.split(".")[0] in BANNED:
                problems.append(f"{path}:{item.line}: imports {item.module}, which is never allowed")
            problem = _wrong_direction(room, room_of(_known(item.module, modules)))
            if problem:
                problems.append(f"{path}:{item.line}: {problem} ({item.module})")
    return sorted(set(problems + _torch_problems(modules, imports)))


def _wrong_direction(room: str | None, other: str | None) -> str | None:
    if room is None or other is None or other == room:
        return None  # the package's own __init__ is the front door: it names anything, lazily
    if other not in LEVEL:
        return f"{room} imports {other}, which is no room"
    if any({room, other} == pair for pair in NEVER_TOGETHER):
        return f"{room} and {other} never import each other"
    if LEVEL[other] > LEVEL[room]:
        return f"{room} imports {other}, which lies below it"
    return None


def _known(name: str, modules: Mapping[str, object]) -> str:
    """`from unspool import write_video` names an attribute of the package and not a room."""
    is_attribute = name.count(".") == 1 and name.startswith(f"{PACKAGE}.") and name not in modules
    return PACKAGE if is_attribute and room_of(name) not in LEVEL else name


def _torch_problems(modules: Mapping[str, tuple[str, str]], imports: Mapping[str, list[Import]]) -> list[str]:
    problems = []
    for start in (f"{PACKAGE}.{name}" for name in TORCH_FREE):
        todo, seen = [start] if start in modules else [], set()
        while todo:
            name = todo.pop()
            seen.add(name)
            for item in imports[name]:
                # A late import of a module that this file calls itself is its own doing; in others it is not.
                if item.module.split(".")[0] == "torch" and (item.is_eager or name == start):
                    problems.append(f"{modules[name][0]}:{item.line}: {start} must not reach torch, but does here")
                if not item.is_eager:
                    continue
                parents = item.module.split(".")
                chain = {".".join(parents[:end]) for end in range(1, len(parents) + 1)}
                todo += [module for module in chain if module in modules and module not in seen]
    return problems


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_the_package_keeps_its_layers() -> None:
    sources = {str(path.relative_to(SOURCE)): path.read_text("utf-8") for path in SOURCE.rglob("*.py")}
    assert len(sources) > 10, f"the source tree was not found under {SOURCE}"
    assert not check(sources), "\n".join(check(sources))


def test_no_module_imports_torch_at_the_front_door() -> None:
    """`import unspool` and the command line must not import torch, or anything heavy, by themselves."""
    for path in [SOURCE / PACKAGE / "__init__.py", *(SOURCE / PACKAGE / "cli").glob("*.py")]:
        module = _module_name(str(path.relative_to(SOURCE)))
        eager = {
            item.module.split(".")[0] for item in imports_of(path.read_text("utf-8"), module, False) if item.is_eager
        }
        assert not eager & {"torch", "numpy", "av", "PIL", "safetensors", "huggingface_hub", "transformers"}, path


WRONG = {
    "upward": ("causal/x.py", "from unspool.models import base", "causal imports models"),
    "in a function": ("ops/x.py", "def f():\n    import unspool.engine.export", "ops imports engine"),
    "in a method": (
        "ops/x.py",
        "class A:\n    def f(self):\n        from unspool import rollout",
        "ops imports rollout",
    ),
    "type checking": (
        "diffusion/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from unspool.ops.rope import Rope",
        "diffusion imports ops",
    ),
    "string target": ("models/x.py", 'D = {"kv": "unspool.train.loop:Loop"}', "models imports train"),
    "importlib": ("shapes.py", 'import importlib\nimportlib.import_module("unspool.causal")', "shapes imports causal"),
    "relative": ("causal/cache/x.py", "from ...rollout import rollout", "causal imports rollout"),
    "relative from a package": ("causal/__init__.py", "from ..models import wan", "causal imports models"),
    "train and engine": ("engine/x.py", "from unspool.train.state import State", "never import each other"),
    "engine and train": ("train/x.py", "def f():\n    from unspool.engine import export", "never import each other"),
    "vocabulary upward": (
        "weights/x.py",
        "from unspool.diffusion.flow import FlowMatching",
        "weights imports diffusion",
    ),
    "unknown room": ("utils/x.py", "", "no room"),
    "unknown top module": ("helpers.py", "", "no room"),
    "import of an unknown room": ("cli/x.py", "from unspool.utils.x import f", "no room"),
    "torchvision": ("data/x.py", "def f():\n    import torchvision.io", "never allowed"),
    "torchcodec": ("data/x.py", "from torchcodec.decoders import VideoDecoder", "never allowed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_checker_sees(case: str) -> None:
    path, source, message = WRONG[case]
    problems = check({f"{PACKAGE}/{path}": source})
    assert problems and message in problems[0], problems


RIGHT = {
    "downward": ("models/x.py", "from unspool.causal.context import Context\nfrom unspool.ops import attention"),
    "same room": ("causal/cache/kv.py", "from unspool.causal.chunks import ChunkPlan\nfrom ..mask import MaskSpec"),
    "vocabulary": ("weights/x.py", "from unspool.log import notice_once\nfrom unspool.config import nearest"),
    "third party": ("ops/x.py", "import torch\nfrom einops import rearrange"),
    "string target above": ("models/x.py", 'D = {"kv": "unspool.causal.cache.kv:KVCache"}'),
    "text that only mentions": ("ops/x.py", '"""See unspool.engine.export:write_video for more."""'),
    "the command line": ("cli/x.py", "from unspool.engine import export\nfrom unspool.train import loop"),
    "the front door": ("__init__.py", 'L = {"a": "unspool.engine.export:a", "b": "unspool.train.loop:b"}'),
    "an attribute of the front door": ("cli/x.py", "from unspool import __version__"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_the_checker_allows(case: str) -> None:
    path, source = RIGHT[case]
    assert check({f"{PACKAGE}/{path}": source}) == []


@pytest.mark.parametrize(
    "app",
    [
        "import torch",
        "def f():\n    from torch import nn",
        "from unspool.serve import encode",
        "import unspool.serve.encode",
    ],
)
def test_the_server_process_is_kept_free_of_torch(app: str) -> None:
    tree = {"unspool/serve/app.py": app, "unspool/serve/encode.py": "from unspool.ops import rope"}
    tree["unspool/ops/rope.py"] = "import torch.nn.functional as F"
    problems = check(tree)
    assert len(problems) == 1 and "must not reach torch" in problems[0], problems


def test_the_server_process_may_name_what_its_worker_loads() -> None:
    tree = {"unspool/serve/app.py": 'W = "unspool.serve.worker:Worker"', "unspool/serve/worker.py": "import torch"}
    assert check(tree) == []
