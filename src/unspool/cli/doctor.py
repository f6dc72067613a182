"""`unspool doctor`: what is installed here, what will run fast, and what would break."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

CORE = ("torch", "numpy", "safetensors", "huggingface_hub", "pillow", "av", "tyro", "pyyaml", "einops", "jaxtyping")
EXTRAS = ("lmdb", "tensorboard")
TORCH_FAMILY = ("torchvision", "torchcodec", "torchaudio")
DEFAULT = "default"  # the untagged build of the package index: CUDA on Linux, of whatever version was current
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Check this installation. The exit code is 1 if something found here breaks unspool or what it uses, else 0."""

    compile: bool = False
    """Also compile and run a tiny kernel, which takes some seconds, instead of only looking for a compiler."""


@dataclasses.dataclass(frozen=True)
class Installed:
    """One distribution as far as the checks need it, read without importing it."""

    version: str
    cuda: str | None
    """CUDA version of its own build, "" for a CPU build, DEFAULT for an untagged one, None where it does not say."""
    requires: tuple[str, ...] = ()


def run(args: Args) -> int:
    """Print the report on stdout and return the exit code."""
    problems: list[str] = []
    notes: list[str] = []
    _print_versions(problems)
    problems += torch_family_problems({name: found for name in ("torch", *TORCH_FAMILY) if (found := _installed(name))})
    if not any(problem.startswith("torch ") for problem in problems):
        _print_torch(problems)
    _print_compiler(notes, probe=args.compile)
    for title, lines in (("note", notes), ("PROBLEM", problems)):
        for line in lines:
            print(f"{title}: {line}")
    print("found problems" if problems else "all good")
    return 1 if problems else 0


def torch_family_problems(installed: Mapping[str, Installed]) -> list[str]:
    """Mismatches between torch and the packages that load its C++ library.

    A torchvision or torchcodec made for another torch fails at import, and takes with it transformers, diffusers, peft
    and others that import it whenever it is present. Unspool needs none of them, so removing them always helps.
    """
    torch = installed.get("torch")
    if torch is None:
        return []
    problems = []
    for name in TORCH_FAMILY:
        other = installed.get(name)
        if other is None:
            continue
        cure = f"pip uninstall {name}, or install the {name} built for this torch from the same package index"
        wanted = _exact_torch(other.requires)
        if wanted is not None and wanted != _public(torch.version):
            problems.append(f"{name} {other.version} needs torch {wanted}, but torch {torch.version} is here: {cure}")
        elif None not in (torch.cuda, other.cuda) and _differ(torch.cuda, other.cuda):
            builds = f"{_build(other.cuda)}, torch {torch.version} for {_build(torch.cuda)}"
            problems.append(f"{name} {other.version} is built for {builds}: its import fails and breaks others; {cure}")
    return problems


def cpu_flags(text: str) -> list[str]:
    """Those of the flags that matter for speed, from the text of /proc/cpuinfo."""
    for line in text.splitlines():
        if re.match(r"(flags|Features)\s*:", line):
            present = set(line.partition(":")[2].split())
            return [flag for flag in CPU_FLAGS if flag in present]
    return []


def missing_for_compile() -> list[str]:
    """What torch.compile lacks on the CPU; empty when it should work, else networks run uncompiled with one notice."""
    missing = []
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        missing.append("a C++ compiler (g++ or clang++)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("the Python headers (Python.h; package python3-dev)")
    return missing


def _print_versions(problems: list[str]) -> None:
    _row("unspool", _version("unspool") or "not installed (running from source)")
    _row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in CORE:
        version = _version(name)
        _row(name, version or "MISSING")
        if version is None:
            problems.append(f"{name} is missing: pip install {name}")
    present = [f"{name} {version}" for name in EXTRAS if (version := _version(name))]
    _row("extras", ", ".join(present) or "none")


def _print_torch(problems: list[str]) -> None:
    if _version("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch cannot be imported: {' '.join(str(error).split())}")
        return
    _row("torch build", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")
    _row("torch threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    _row("GPU", ", ".join(names) or "none visible")
    if torch.version.cuda and not names:
        _row("", "(a CUDA build without a visible GPU: everything runs on the CPU)")
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpu_flags(cpuinfo.read_text(encoding="utf-8", errors="replace")) if cpuinfo.is_file() else []
    _row("CPU", f"{torch.backends.cpu.get_cpu_capability()}; {' '.join(flags) or 'flags unknown'}")


def _print_compiler(notes: list[str], *, probe: bool) -> None:
    missing = missing_for_compile()
    if probe and not missing:
        import torch

        from unspool.ops.compile import compiler_works

        works = compiler_works("cuda" if torch.cuda.is_available() else "cpu")
        _row("torch.compile", "works (a kernel was built and run)" if works else "fails; eager code runs instead")
        return
    _row("torch.compile", "usable" if not missing else "not usable; eager code runs instead")
    if missing:
        notes.append(f"torch.compile would make CPU generation faster; missing: {', '.join(missing)}")


def _installed(name: str) -> Installed | None:
    version = _version(name)
    if version is None:
        return None
    requires = tuple(importlib.metadata.requires(name) or ())
    return Installed(version=version, cuda=_cuda_of(name, version), requires=requires)


def _cuda_of(name: str, version: str) -> str | None:
    """The CUDA version a package was built for: from its version.py as text, else from the tag of its version."""
    try:
        spec = importlib.util.find_spec(name)  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        spec = None
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin is not None else None
    if file is not None and file.is_file():
        found = cuda_in_version_file(file.read_text(encoding="utf-8", errors="replace"))
        if found is not None:
            return found
    found = _cuda_of_tag(version)
    untagged = "+" not in version and sys.platform == "linux"
    return DEFAULT if found is None and untagged else found


def cuda_in_version_file(text: str) -> str | None:
    """`"13.0"`, `""` for a CPU build, or None where the text does not say."""
    match = re.search(r"^cuda(?:\s*:[^=]+)?\s*=\s*(None|['\"]([\d.]*)['\"])", text, re.MULTILINE)
    if match is not None:
        return ".".join((match[2] or "").split(".")[:2])
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return _cuda_of_tag(match[1]) if match else None


def _cuda_of_tag(version: str) -> str | None:
    """`1.2+cu130` -> `13.0`, `1.2+cpu` -> ``, anything else -> None."""
    local = version.partition("+")[2]
    if local == "cpu":
        return ""
    match = re.fullmatch(r"cu(\d+)(\d)", local)
    return f"{match[1]}.{match[2]}" if match else None


def _exact_torch(requires: Iterable[str]) -> str | None:
    for requirement in requires:
        match = re.match(r"torch\s*\(?==\s*([\w.]+)", requirement)
        if match:
            return match[1]
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    return version.partition("+")[0]


def _differ(cuda: str | None, other: str | None) -> bool:
    """An untagged build is known to be for CUDA, but not for which: it differs from a CPU build alone."""
    if DEFAULT in (cuda, other):
        return "" in (cuda, other)
    return cuda != other


def _build(cuda: str | None) -> str:
    if cuda == DEFAULT:
        return "CUDA (the default on Linux)"
    return f"CUDA {cuda}" if cuda else "the CPU"


def _row(name: str, value: str) -> None:
    print(f"{name:<16} {value}", file=sys.stdout)
