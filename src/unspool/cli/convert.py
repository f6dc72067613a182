"""`unspool convert`: any public checkpoint of a Wan network -> one safetensors file that says what it is."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from unspool.models.wan.load import WanWeights
    from unspool.presets.model import Preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Convert a checkpoint to safetensors with its origin, schedule and licence in the header.

    Pickles are read with weights only: nothing in them is executed. The target appears whole or not at all.
    """

    source: tyro.conf.Positional[str]
    """File (.safetensors, .pt, .pth, index.json), directory, or hub repository (owner/name)."""
    out: tyro.conf.Positional[Path]
    """The .safetensors file to write; an existing one is replaced."""
    filename: str | None = None
    """One file inside the source directory or repository."""
    lora: Path | None = None
    """LoRA in PEFT key names to merge into the weights."""
    lora_alpha: float | None = None
    """Its alpha (scale = alpha / rank), where neither the file nor the preset says it."""
    format: Literal["own", "original", "diffusers"] = "own"
    """Key names to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number type to write; the source's if not given."""
    which: str | None = None
    """Container key to take: generator_ema, generator, model or flat; by default the averaged weights if present."""
    preset: str | None = None
    """Known model that supplies sizes, schedule, window, sink and licence; options given here go before it."""
    num_heads: int | None = None
    """Attention heads, where neither a config nor the width (>= 1536: heads of 128) says it."""
    text_len: int | None = None
    """Rows of text that the network attends; 512 if nothing says otherwise."""
    chunk: int | None = None
    """Latent frames denoised together, for the header."""
    steps: str | None = None
    """Listed denoising timesteps such as 1000,750,500,250, for the header."""
    warp: bool | None = None
    """Whether the listed steps are still to be put through the shift; true if not given beside steps and shift."""
    shift: float | None = None
    """Schedule shift, for the header."""
    window: int | Literal["full"] | None = None
    """Latent frames a chunk may read, sink and itself included, for the header; full: all the past."""
    sink: int | None = None
    """First latent frames that are always kept, for the header."""
    licence: str | None = None
    """Licence of the weights, for the header."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ValueError(
                f"got {str(self.out)!r}; expected a name ending in .safetensors; try "
                f"{self.out.with_suffix('.safetensors')}"
            )
        if self.lora_alpha is not None and self.lora is None:
            raise ValueError("got --lora-alpha without --lora; expected both; name the LoRA file")
        if self.warp is not None and self.steps is None and self.preset is None:
            raise ValueError("got --warp without --steps; expected both; list the steps")


def run(args: Args) -> int:
    """Convert, print the load report and the licence, return 0; errors come before anything is written."""
    from unspool import presets

    preset = presets.get(args.preset) if args.preset else None
    if preset is not None and args.lora is None and any(file.role == "lora" for file in preset.files):
        raise ValueError(
            f"got --preset {preset.name} without --lora; it is a base and a LoRA of rank {preset.lora_rank}: name the "
            "LoRA's file, or leave out --preset to convert the base alone"
        )
    facts = _facts(args, preset)

    from unspool.models.wan.load import save_wan_file

    weights = _read(args, preset)
    header = {**weights.metadata, **_origin(args, weights), **facts}
    for name in ("config", "key_format", "format"):  # written afresh, in the target's format
        header.pop(name, None)
    save_wan_file(
        weights.tensors, args.out, config=weights.config, key_format=args.format, dtype=args.dtype, metadata=header
    )
    print(weights.report.summary())
    print(f"wrote       {args.out} ({args.format} names, {args.out.stat().st_size} bytes)")
    print(
        "licence     "
        f"{header.get('licence', 'not stated: find out before you pass the weights on (--licence records it)')}"
    )
    return 0


def _read(args: Args, preset: Preset | None) -> WanWeights:
    from unspool.models.wan.load import read_wan
    from unspool.weights.files import resolve
    from unspool.weights.report import parse_dtype

    alpha = args.lora_alpha
    if args.lora is not None and alpha is None and preset is not None:
        alpha = preset.lora_alpha
    return read_wan(
        resolve(args.source, filename=args.filename),
        config=preset.network if preset else None,
        num_heads=args.num_heads,
        text_len=args.text_len,
        which=args.which or _which(preset),
        lora=args.lora,
        lora_alpha=alpha,
        dtype=parse_dtype(args.dtype),
    )


def _which(preset: Preset | None) -> str | None:
    # the bidirectional releases are flat files; "which" of a preset is only binding where a container is published
    found = next((file.which for file in preset.files if file.role != "lora"), None) if preset else None
    return None if found == "flat" else found


def _origin(args: Args, weights: WanWeights) -> dict[str, str]:
    from unspool.weights.files import find_files, sha256_of

    weight_files = weights.files[1:] or weights.files  # an index comes first and is no weight
    origin = {
        "source_file": ", ".join(file.name for file in weight_files),
        "source_sha256": sha256_of(weight_files),
        "source_format": weights.report.format,
        "source_wrapper": weights.report.wrapper,
    }
    if args.lora is not None:
        lora_files = find_files(args.lora)
        origin |= {"lora_file": lora_files[0].name, "lora_sha256": sha256_of(lora_files)}
    return origin


def _facts(args: Args, preset: Preset | None) -> dict[str, str]:
    """Header entries about how the network is rolled out; what nobody stated is left out."""
    facts: dict[str, object] = {}
    if preset is not None:
        facts |= {
            name: getattr(preset, name) for name in ("chunk", "steps", "warp", "shift", "window", "sink", "licence")
        }
        facts["preset"] = preset.name
    given = {name: getattr(args, name) for name in ("chunk", "warp", "shift", "window", "sink", "licence")}
    given["steps"] = _parse_steps(args.steps) if args.steps is not None else None
    facts |= {name: value for name, value in given.items() if value is not None}
    facts = {name: value for name, value in facts.items() if value is not None}
    if "steps" in facts and "shift" in facts:
        facts.setdefault("warp", True)
    _check_facts(facts)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def _parse_steps(text: str) -> tuple[float, ...]:
    try:
        steps = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"got --steps {text!r}; expected timesteps such as 1000,750,500,250") from None
    if steps[-1] == 0:
        steps = steps[:-1]  # a trailing 0 only marks the end
    falling = all(a > b for a, b in itertools.pairwise(steps))
    if not steps or not falling or not all(0 < step <= 1000 for step in steps):
        raise ValueError(f"got --steps {text!r}; expected falling timesteps in (0, 1000] such as 1000,750,500,250")
    return steps


def _check_facts(facts: dict[str, object]) -> None:
    chunk, window, sink, shift = (facts.get(name) for name in ("chunk", "window", "sink", "shift"))
    if isinstance(chunk, int) and chunk < 1:
        raise ValueError(f"got chunk={chunk}; expected at least 1 latent frame; try 3")
    if isinstance(sink, int) and sink < 0:
        raise ValueError(f"got sink={sink}; expected 0 or more latent frames; try 0")
    if isinstance(shift, (int, float)) and shift <= 0:
        raise ValueError(f"got shift={shift}; expected a positive number; 1 changes nothing")
    needed = (chunk if isinstance(chunk, int) else 1) + (sink if isinstance(sink, int) else 0)
    if isinstance(window, int) and window < needed:
        raise ValueError(
            f"got window={window}; expected at least sink + chunk = {needed} latent frames; try window={needed}"
        )
