"""Read a low-rank adapter in PEFT's key names and merge it into its base: W += scale * B @ A, in fp32.

Source: arXiv:2106.09685 eq. 3 (scale = alpha / rank) and arXiv:2312.03732 for the rank-stabilised alpha / sqrt(rank).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from unspool.weights.files import read_json
from unspool.weights.names import LEADING
from unspool.weights.read import Checkpoint, read_checkpoint

LORA_WRAPPERS = ("generator_lora",)
_LEADING = LEADING | {"base_model"}
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_ADAPTER_CONFIG = "adapter_config.json"
_METADATA_KEYS = ("lora_adapter_metadata", "adapter_config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Pairs `target weight name -> (A, B)`, under the adapter's names without prefixes, and the factor of each."""

    source: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scales: dict[str, float]
    wrapper: str
    files: tuple[Path, ...]


def read_lora(path: str | os.PathLike[str], *, alpha: float | None = None, which: str | None = None) -> Lora:
    """Read an adapter file (or a PEFT directory); `generator_lora` is the container key looked for first.

    `alpha` gives scale = alpha / rank; None takes alpha from `adapter_config.json` beside the file or from the
    safetensors header. Raises ValueError when alpha is nowhere to be found, a key is no LoRA key, or half of a pair is
    absent.
    """
    found = read_checkpoint(path, which=which, preferred=LORA_WRAPPERS, leading=_LEADING)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    strangers = []
    adapters = set()
    for name, tensor in found.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            strangers.append(name)
            continue
        adapters.add(match["adapter"])
        halves.setdefault(match["module"], {})[match["side"]] = tensor
    if strangers:
        raise ValueError(
            f"got {len(strangers)} keys in {path} that are no PEFT LoRA keys, such as {strangers[:3]}; expected only "
            "<module>.lora_A.weight and <module>.lora_B.weight"
        )
    if len(adapters) > 1:
        raise ValueError(f"got several adapters {sorted(map(str, adapters))} in {path}; expected one; save them apart")
    incomplete = [module for module, sides in halves.items() if len(sides) != 2]
    if incomplete:
        raise ValueError(
            f"got only one of lora_A / lora_B for {len(incomplete)} modules, such as {incomplete[:3]}; fetch it again"
        )
    pairs = {f"{module}.weight": (sides["A"], sides["B"]) for module, sides in halves.items()}
    return Lora(
        source=str(path),
        pairs=pairs,
        scales=_scales(pairs, found, alpha),
        wrapper=found.wrapper,
        files=found.files,
    )


def merge_lora(
    tensors: Mapping[str, torch.Tensor], lora: Lora, *, rename: Callable[[str], str] = lambda name: name
) -> dict[str, torch.Tensor]:
    """The state dict with the adapter merged; untouched tensors are shared, merged ones keep their dtype.

    `rename` turns an adapter's target into the state dict's naming. Raises ValueError before any work when a pair
    lands on no weight or its shapes do not fit.
    """
    targets = {rename(name): name for name in lora.pairs}
    strangers = [name for target, name in targets.items() if target not in tensors]
    if strangers:
        raise ValueError(
            f"got {len(strangers)} of {len(lora.pairs)} LoRA pairs that land on no weight of the base, such as "
            f"{strangers[:3]}; "
            "expected an adapter of this network; check that base and adapter belong together"
        )
    for target, name in targets.items():
        _check_fits(name, tuple(tensors[target].shape), *lora.pairs[name])
    out = dict(tensors)
    for target, name in targets.items():
        a, b = lora.pairs[name]
        weight = out[target]
        update = lora.scales[name] * (b.float().flatten(1) @ a.float().flatten(1))
        out[target] = (weight.float() + update.reshape(weight.shape)).to(weight.dtype)
    return out


def _check_fits(name: str, weight: tuple[int, ...], a: torch.Tensor, b: torch.Tensor) -> None:
    # a convolution's adapter keeps the kernel in A and is 1 x 1 in B
    rows, inputs = weight[0], torch.Size(weight[1:]).numel()
    fits = (
        a.dim() >= 2 and b.dim() >= 2 and a[0].numel() == inputs and b.shape[0] == rows and b[0].numel() == a.shape[0]
    )
    if not fits:
        raise ValueError(
            f"got lora_A {list(a.shape)} and lora_B {list(b.shape)} for {name!r} of shape {list(weight)}; expected "
            f"[rank, {inputs}] and [{rows}, rank]; base and adapter do not belong together"
        )


def _scales(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], found: Checkpoint, alpha: float | None
) -> dict[str, float]:
    config = {} if alpha is not None else _adapter_config(found)
    if alpha is None and "lora_alpha" not in config:
        raise ValueError(
            f"got {found.source} without lora_alpha (no {_ADAPTER_CONFIG} beside it, none in its header); expected the "
            "alpha of "
            "its training; pass alpha=; LongLive 1.0 was trained with 256, equal to its rank"
        )
    if config.get("use_dora"):
        raise ValueError(f"got {found.source}, a DoRA adapter; expected plain LoRA; merge it with PEFT first")
    patterns = config.get("alpha_pattern") or {}
    scales = {}
    for name, (a, _) in pairs.items():
        module = name.removesuffix(".weight")
        value = float(alpha) if alpha is not None else float(config["lora_alpha"])  # type: ignore[arg-type]
        for pattern, special in patterns.items():  # type: ignore[attr-defined]
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                value = float(special)
        rank = a.shape[0]
        scales[name] = value / rank**0.5 if config.get("use_rslora") else value / rank
    return scales


def _adapter_config(found: Checkpoint) -> dict[str, object]:
    beside = found.files[0].parent / _ADAPTER_CONFIG
    if beside.is_file():
        return read_json(beside)
    for key in _METADATA_KEYS:
        if key in found.metadata:
            content = json.loads(found.metadata[key])
            # diffusers prefixes every entry with the component's name
            return (
                {str(name).split(".", 1)[-1]: value for name, value in content.items()}
                if isinstance(content, dict)
                else {}
            )
    return {}
