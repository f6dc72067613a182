"""Load and save the Wan transformer in every public format, strictly; original, diffusers and unspool names.

`read_wan` gives the weights and the report, `load_wan` the network, `save_wan` a diffusers-style directory and
`save_wan_file` one safetensors file whose header carries the config.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from unspool.models.wan.config import WanConfig, infer_config
from unspool.models.wan.keys import MAPS, KeyFormat, detect, from_own, own_shapes, shapes_as, to_own
from unspool.weights.files import resolve
from unspool.weights.lora import Lora, merge_lora, read_lora
from unspool.weights.names import strip_prefixes
from unspool.weights.read import Checkpoint, read_checkpoint
from unspool.weights.report import LoadReport, check_dtypes, compare, load_into, parse_dtype
from unspool.weights.write import save_file, save_sharded

if TYPE_CHECKING:
    from unspool.models.wan.network import WanTransformer

_LOG = logging.getLogger(__name__)
CLASS_NAME = "WanTransformer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanWeights:
    """A checkpoint made ready: `tensors` in the network's own names, possibly still mapped to the file."""

    config: WanConfig
    tensors: dict[str, torch.Tensor]
    report: LoadReport
    metadata: dict[str, str]
    files: tuple[Path, ...]


def read_wan(
    path: str | os.PathLike[str],
    *,
    config: WanConfig | None = None,
    num_heads: int | None = None,
    text_len: int | None = None,
    which: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    lora_alpha: float | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
) -> WanWeights:
    """Read a local checkpoint, check it against its architecture, merge a LoRA, rename to own names.

    The config is the argument, else the file's header or `config.json`, else inferred from the shapes (`num_heads` and
    `text_len` say what no shape shows, and are refused beside a config). `which` picks the container key
    (`generator_ema`, `generator`, `model`, `flat`; None prefers the averaged one). `dtype` only licenses fp8 weights
    here; the cast is done by `load_wan`.

    Raises FileNotFoundError; ValueError (got, expected, fix) for damaged files, other architectures, and any missing,
    unexpected or misshapen tensor.
    """
    found = read_checkpoint(path, which=which, subfolder=subfolder, variant=variant)
    key_format = detect(found.tensors)
    config = _config_of(found, key_format, config, num_heads, text_len)
    report = _check(found, key_format, config)
    check_dtypes(found.tensors, dtype)
    tensors = found.tensors
    if lora is not None:
        adapter = read_lora(lora, alpha=lora_alpha)
        tensors = _merge(tensors, adapter, key_format)
        report = dataclasses.replace(report, num_merged=len(adapter.pairs))
    return WanWeights(
        config=config, tensors=to_own(tensors, key_format), report=report, metadata=found.metadata, files=found.files
    )


def load_wan(
    source: str | os.PathLike[str],
    *,
    config: WanConfig | None = None,
    num_heads: int | None = None,
    text_len: int | None = None,
    which: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    lora_alpha: float | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    filename: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> WanTransformer:
    """The network with the weights of a file, a directory or a hub repository (`owner/name`, maybe one `filename`).

    It is built on the meta device and filled with copies, so nothing stays tied to the file. `dtype` None keeps the
    file's dtypes; `device` None is the CPU. The load report is logged at INFO. Other arguments and errors as
    `read_wan`.
    """
    dtype = parse_dtype(dtype)
    path = resolve(
        source,
        filename=filename,
        revision=revision,
        subfolder=subfolder,
        variant=variant,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    weights = read_wan(
        path,
        config=config,
        num_heads=num_heads,
        text_len=text_len,
        which=which,
        lora=lora,
        lora_alpha=lora_alpha,
        subfolder=subfolder,
        variant=variant,
        dtype=dtype,
    )
    _LOG.info("%s", weights.report.summary())
    return build_wan(weights, dtype=dtype, device=device)


def build_wan(
    weights: WanWeights, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> WanTransformer:
    """A network holding copies of these weights, in `dtype` on `device`."""
    from unspool.models.wan.network import WanTransformer

    with torch.device("meta"):
        network = WanTransformer(weights.config)
    load_into(network, weights.tensors, dtype=dtype, device=device)
    return network


def from_pretrained(
    repo_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> WanTransformer:
    """`load_wan` under the argument names of the Hugging Face libraries; `torch_dtype` is the older name of `dtype`."""
    if dtype is not None and torch_dtype is not None and parse_dtype(dtype) != parse_dtype(torch_dtype):
        raise ValueError(f"got dtype={dtype} and torch_dtype={torch_dtype}; expected one of them; drop torch_dtype")
    return load_wan(
        repo_or_dir,
        dtype=dtype if dtype is not None else torch_dtype,
        device=device,
        revision=revision,
        subfolder=subfolder,
        variant=variant,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def save_wan(
    network: nn.Module | Mapping[str, torch.Tensor],
    directory: str | os.PathLike[str],
    *,
    config: WanConfig | None = None,
    key_format: KeyFormat = "own",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, ...]:
    """Write `config.json` and safetensors (sharded beyond `max_shard_size`) in diffusers layout; returns the paths.

    A state dict is given in own names and needs its `config`. Written aside and renamed: a failure leaves the target
    as it was. Raises ValueError when config and tensors do not agree, or the format cannot hold an option of the
    config.
    """
    tensors, config = _prepare(network, config, key_format, dtype)
    return save_sharded(
        tensors,
        directory,
        config=_spell(config, key_format),
        max_shard_size=max_shard_size,
        metadata=_header(config, key_format, metadata),
    )


def save_wan_file(
    network: nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    config: WanConfig | None = None,
    key_format: KeyFormat = "own",
    dtype: torch.dtype | str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one safetensors file whose header carries the config, so that it suffices alone; else as `save_wan`."""
    tensors, config = _prepare(network, config, key_format, dtype)
    return save_file(tensors, path, metadata=_header(config, key_format, metadata))


def _config_of(
    found: Checkpoint, key_format: KeyFormat, config: WanConfig | None, num_heads: int | None, text_len: int | None
) -> WanConfig:
    known = config or (WanConfig.parse(found.config) if found.config is not None else None)
    if known is not None:
        for name, value in (("num_heads", num_heads), ("text_len", text_len)):
            if value is not None and value != getattr(known, name):
                raise ValueError(
                    f"got {name}={value}, but the config says {getattr(known, name)}; drop the argument or pass config="
                )
        return known
    shapes = found.shapes
    for key_map in reversed(MAPS[key_format][1:]):  # diffusers -> original
        shapes = {key_map.join_name(name)[0]: shape for name, shape in shapes.items()}
    inferred = infer_config(shapes, num_heads=num_heads, text_len=512 if text_len is None else text_len)
    if inferred.extra_channels and key_format != "own":
        raise ValueError(
            f"got {inferred.in_channels + inferred.extra_channels} input and {inferred.out_channels} output channels "
            "in "
            f"{found.source}: this is an image-conditioned (i2v) Wan network; expected a t2v network; use a t2v "
            "checkpoint"
        )
    return inferred


def _check(found: Checkpoint, key_format: KeyFormat, config: WanConfig) -> LoadReport:
    missing, unexpected, mismatched = compare(found.shapes, shapes_as(own_shapes(config), key_format))
    report = LoadReport(
        source=found.source,
        format=key_format,
        wrapper=found.wrapper,
        num_tensors=len(found.tensors),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        offered=found.offered,
        stripped=found.stripped,
        ignored=found.ignored,
    )
    report.require_exact(
        expected=f"the Wan t2v transformer with dim={config.dim}, {config.num_layers} blocks, {config.num_heads} heads",
        fix="use a whole checkpoint of that network, or pass the config= that belongs to this one",
    )
    return report


def _merge(tensors: Mapping[str, torch.Tensor], adapter: Lora, key_format: KeyFormat) -> dict[str, torch.Tensor]:
    # the merge happens in the adapter's naming: an adapter of q alone has no place in a fused weight
    naming = _detect_adapter(adapter)
    if naming == key_format:
        return merge_lora(tensors, adapter)
    there = from_own(to_own(tensors, key_format), naming)
    merged = merge_lora(there, adapter)
    return from_own(to_own(merged, naming), key_format)


def _detect_adapter(adapter: Lora) -> KeyFormat:
    try:
        return detect(adapter.pairs)
    except ValueError as error:
        raise ValueError(f"in the LoRA {adapter.source}: {error}") from None


def _prepare(
    network: nn.Module | Mapping[str, torch.Tensor],
    config: WanConfig | None,
    key_format: KeyFormat,
    dtype: torch.dtype | str | None,
) -> tuple[dict[str, torch.Tensor], WanConfig]:
    if key_format not in MAPS:
        raise ValueError(f"got key_format={key_format!r}; expected one of {sorted(MAPS)}")
    state = network.state_dict() if isinstance(network, nn.Module) else network
    if config is None:
        config = getattr(network, "config", None)
        if not isinstance(config, WanConfig):
            raise ValueError(f"got a {type(network).__name__} without a config; expected config=WanConfig(...)")
    short = strip_prefixes(state)
    tensors = {short[name]: tensor for name, tensor in state.items()}
    missing, unexpected, mismatched = compare({n: tuple(t.shape) for n, t in tensors.items()}, own_shapes(config))
    report = LoadReport(
        source="the network to save",
        format="own",
        wrapper="flat",
        num_tensors=len(tensors),
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
    )
    report.require_exact(expected="the tensors of its config in own names", fix="pass the config that belongs to it")
    _spell(config, key_format)
    target = parse_dtype(dtype)
    if target is not None:
        tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
    return from_own(tensors, key_format), config


def _spell(config: WanConfig, key_format: KeyFormat) -> dict[str, object]:
    if key_format == "original":
        return config.to_original()
    if key_format == "diffusers":
        return config.to_diffusers()
    return {"_class_name": CLASS_NAME, **config.to_dict()}


def _header(config: WanConfig, key_format: KeyFormat, metadata: Mapping[str, str] | None) -> dict[str, str]:
    own = {"_class_name": CLASS_NAME, **config.to_dict()}
    return {**(metadata or {}), "config": json.dumps(own), "key_format": key_format}


__all__ = [
    "WanWeights",
    "build_wan",
    "from_pretrained",
    "load_wan",
    "read_wan",
    "save_wan",
    "save_wan_file",
]
