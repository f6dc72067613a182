"""What the package promises before any of its code runs: light imports, honest metadata, pinned development."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import unspool

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "av", "PIL", "safetensors", "huggingface_hub", "transformers", "diffusers")


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, timeout=120)


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after `code`."""
    ask = f"\nimport sys\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    result = run_python(code + ask)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    return {_canonical(name): version for name, _, version in (line.partition("==") for line in lines)}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirement_name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return _canonical(match[0])


def _all_requirements(project: dict[str, Any]) -> list[str]:
    extras = project["project"]["optional-dependencies"].values()
    groups = project["dependency-groups"].values()
    return [*project["project"]["dependencies"], *(item for group in [*extras, *groups] for item in group)]


def test_the_import_checker_itself_sees_torch() -> None:
    assert "torch" in loaded_after("import torch")


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_after("import unspool; unspool.__version__; dir(unspool)") == set()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['unspool', '--help']\nfrom unspool.cli.main import main\nassert main() == 0"
    assert loaded_after(code) == set()


def test_importing_the_command_line_imports_no_command() -> None:
    code = "import unspool.cli.main, sys\nprint(sorted(m for m in sys.modules if m.startswith('unspool')))"
    assert run_python(code).stdout.strip() == "['unspool', 'unspool.cli', 'unspool.cli.main']"


def test_every_command_parses_without_torch() -> None:
    """The options of a command are shown, and wrong ones refused, before torch is loaded."""
    commands = [path.stem for path in (ROOT / "src/unspool/cli").glob("*.py") if path.stem not in ("__init__", "main")]
    code = "\n".join(f"import unspool.cli.{name}; unspool.cli.{name}.Args" for name in commands)
    assert commands and "torch" not in loaded_after(code)


def test_lazy_names_resolve_and_others_are_refused() -> None:
    for name in unspool._LAZY:
        assert callable(getattr(unspool, name)), name
        assert name in dir(unspool)
    with pytest.raises(AttributeError, match="no_such_name"):
        unspool.no_such_name  # noqa: B018
    assert re.match(r"\d+(\.|\+)", unspool.__version__)


def test_torch_is_pinned_for_development_and_a_range_for_users(
    project: dict[str, Any], constraints: dict[str, str]
) -> None:
    torch = next(item for item in project["project"]["dependencies"] if _requirement_name(item) == "torch")
    assert constraints["torch"] == "2.13.0"
    assert torch == "torch>=2.7"


def test_nothing_requires_torchvision_or_torchcodec(project: dict[str, Any], constraints: dict[str, str]) -> None:
    names = {_requirement_name(item) for item in _all_requirements(project)} | set(constraints)
    assert not names & {"torchvision", "torchcodec", "torchaudio"}


def test_every_direct_development_dependency_is_pinned(project: dict[str, Any], constraints: dict[str, str]) -> None:
    direct = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    missing = {_requirement_name(item) for item in direct} - set(constraints)
    assert not missing, f"add to constraints.txt: {missing}"


def test_all_that_make_installs_is_pinned_and_follows_the_pins(
    project: dict[str, Any], constraints: dict[str, str]
) -> None:
    """Walks the requirements of what is installed, so a new indirect dependency cannot come in unpinned."""
    if not (Path(sys.prefix) / ".installed").is_file():
        pytest.skip("this interpreter is not in the .venv that make built")
    todo = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    wrong, seen = {}, set()
    while todo:
        requirement = Requirement(todo.pop())
        name = _canonical(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        if name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # the CUDA build of torch pins these itself
        found = distribution(name)
        if constraints.get(name) != found.version.partition("+")[0]:
            wrong[name] = f"installed {found.version}, pinned {constraints.get(name)}"
        todo += found.requires or []
    assert not wrong and len(seen) > len(project["project"]["dependencies"])


def test_the_list_the_makefile_installs_is_the_group(project: dict[str, Any]) -> None:
    """An old pip knows no --group, so the Makefile reads the group with a line of Python: run that very line."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    line = re.search(r"^GROUP := (.*)$", makefile, re.MULTILINE)
    assert line, "the Makefile has no GROUP"
    printed = subprocess.run([sys.executable, "-c", line[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.split("\n")[:-1] == project["dependency-groups"]["dev"]
    assert "$(GROUP)" in makefile and "-c constraints.txt" in makefile


def test_versions_and_licence_agree(project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert project["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text("utf-8")
    for name in project["project"]["license-files"]:
        assert (ROOT / name).is_file(), name
    assert (ROOT / "src/unspool/py.typed").is_file()
