"""Pixels of any source through a codec into shards: what training then reads instead of videos."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unspool import __version__
from unspool.config import locate, to_dict
from unspool.data.batch import Source
from unspool.data.listing import Listed
from unspool.data.shard_format import ShardHeader
from unspool.data.shard_writer import ShardWriter
from unspool.shapes import Latent, Pixels
from unspool.weights.files import sha256_of

CODECS: dict[str, str] = {
    "identity": "unspool.models.identity:IdentityCodec",
    "Taehv": "unspool.models.taehv:Taehv",
}
"""Name, or `_class_name` in the header of a file, -> "module:Class" with `from_single_file` where it has weights."""

TEXT_ENCODERS: dict[str, str] = {"CaptionEncoder": "unspool.models.caption:CaptionEncoder"}
"""The same for text encoders: called with a list of captions they give states [n, rows, channels]."""


class Encoder(Protocol):
    """The half of a codec that is needed here."""

    def encode(self, pixels: Pixels) -> Latent: ...


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A codec or a text encoder with its name, and the hash of the file it came from (None: it has no weights)."""

    module: Any
    name: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What an encoding left: `num_clips` in the data set, `num_new` of them made now, `header`."""

    num_clips: int
    num_new: int
    header: ShardHeader


def load_file_or_name(spec: str, table: dict[str, str]) -> Loaded:
    """A safetensors file whose header names its class, a name of `table`, or a user's own "module:Class".

    Raises FileNotFoundError, or ValueError for a file that says no class or one that is not in the table.
    """
    path = Path(spec).expanduser()
    if spec in table or (":" in spec and not path.exists()):
        return Loaded(module=locate(spec, table)(), name=spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"{spec}: no such file; expected a .safetensors file, one of {', '.join(table)}, or module:Class"
        )
    name = _class_name(path)
    if name not in table:
        raise ValueError(f"{spec}: its header names the class {name!r}; expected one of {', '.join(table)}")
    return Loaded(module=locate(name, table).from_single_file(path), name=name, sha256=sha256_of([path]))


def encode_source(
    source: Source,
    codec: Loaded,
    folder: str | os.PathLike[str],
    *,
    fps: float,
    dtype: str = "float16",
    text: Loaded | None = None,
    limit: int | None = None,
    batch: int = 4,
    workers: int = 0,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Encoded:
    """Encode every clip of a listed source, or the first `limit` samples of another, and continue what is there.

    A clip that cannot be read is left out; the source's report says which. Clips that are on disk are not made again.
    `bf16` runs the codec under autocast, two to four times as fast on a CPU with bf16 products. `progress` gets (clips
    done, clips in all). Raises ValueError where there is no clip, `limit` is missing, or the
    folder holds something else; nothing is written then.
    """
    total = _total(source, limit)
    if batch < 1 or workers < 0:
        raise ValueError(f"batch={batch}, workers={workers}: expected at least 1 clip, and 0 or more threads")
    for loaded in (codec, *([text] if text else [])):
        if isinstance(loaded.module, nn.Module):
            loaded.module.to(device).eval()
    probe = next((clip for item in range(total) if (clip := _fetch(source, item)) is not None), None)
    if probe is None:
        raise ValueError(f"got no clip that can be read among {total}; {_report(source)}".rstrip("; "))
    latents = _encode(codec.module, probe.pixels[None], device, bf16)
    states = _states(text, probe.captions)
    header = _header(source, codec, text, probe.pixels, latents[0], states, fps=fps, dtype=dtype)
    with ShardWriter(folder, header) as writer:
        before = writer.num_clips
        for clips, done in _groups(source, range(writer.next_item, total), batch, workers):
            if clips:
                latents = _encode(codec.module, torch.stack([clip.pixels for clip in clips]), device, bf16)
                for clip, latent in zip(clips, latents, strict=True):
                    writer.add(
                        clip.item,
                        latent,
                        clip.captions,
                        prompt_index=clip.prompt_index,
                        text=_states(text, clip.captions),
                        name=clip.name,
                    )
            progress(done, total)
    return Encoded(num_clips=writer.num_clips, num_new=writer.num_clips - before, header=header)


@dataclass(frozen=True, kw_only=True)
class _Clip:
    item: int
    pixels: Tensor
    captions: tuple[str, ...]
    prompt_index: tuple[int, ...] | None
    name: str


def _total(source: Source, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least one clip")
    if isinstance(source, Listed):
        return min(len(source), limit or len(source))
    if limit is None:
        raise ValueError(f"{type(source).__name__} has no end; give a limit of clips")
    return limit


def _fetch(source: Source, item: int) -> _Clip | None:
    # batches of one: then a sample's number does not depend on how many are encoded together
    found = source.clips([item]) if isinstance(source, Listed) else source.batch(item, 1)
    if len(found) == 0:
        return None
    found.need("pixels")
    assert found.pixels is not None
    index = found.prompt_index
    name_of = getattr(source, "name_of", None)
    return _Clip(
        item=item,
        pixels=found.pixels[0],
        captions=found.captions[0] if found.captions is not None else ("",),
        prompt_index=None if index is None else tuple(index[0].tolist()),
        name=name_of(item) if name_of is not None else "",
    )


def _groups(source: Source, items: range, size: int, workers: int) -> Iterator[tuple[list[_Clip], int]]:
    """The readable clips of `size` items at a time, and how many items are done with them."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for part in parts:
            run = pool.map if workers else map
            found = list(run(lambda item: _fetch(source, item), part))
            yield [clip for clip in found if clip is not None], part[-1] + 1


@torch.inference_mode()
def _encode(codec: Encoder, pixels: Pixels, device: torch.device | str, bf16: bool) -> Latent:
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        latents = codec.encode(pixels.to(device))
    if latents.ndim != 5 or len(latents) != len(pixels):
        raise ValueError(f"the codec made {tuple(latents.shape)} of {tuple(pixels.shape)}; expected [b, t, c, h, w]")
    return latents.float().cpu()


@torch.inference_mode()
def _states(text: Loaded | None, captions: Sequence[str]) -> Tensor | None:
    return None if text is None else text.module(list(captions)).float().cpu()


def _header(
    source: Source,
    codec: Loaded,
    text: Loaded | None,
    pixels: Tensor,
    latents: Tensor,
    states: Tensor | None,
    *,
    fps: float,
    dtype: str,
) -> ShardHeader:
    config = getattr(codec.module, "config", None)
    settings = to_dict(config) if config is not None else {}
    scales = {name: value for name, value in settings.items() if name.endswith(("mean", "std")) and value}
    padding = next((f", padding {value}" for name, value in settings.items() if name == "padding"), "")
    frames, latent_frames = len(pixels), len(latents)
    per_latent = (frames - 1) // (latent_frames - 1) if latent_frames > 1 else 1
    is_rule = 1 + per_latent * (latent_frames - 1) == frames
    c, h, w = latents.shape[1:]
    told = getattr(source, "describe", None)
    describe = told() if told is not None else {"source": type(source).__name__}
    return ShardHeader(
        codec=codec.name,
        codec_sha256=codec.sha256,
        normalisation=scales or "none",
        dtype=dtype,
        fps=float(fps),
        num_frames=frames,
        height_px=pixels.shape[-2],
        width_px=pixels.shape[-1],
        latent_shape=(c, h, w),
        frames_rule=(f"1 + {per_latent}k" if is_rule else f"{frames} to {latent_frames}") + padding,
        text_encoder=text.name if text else None,
        text_sha256=text.sha256 if text else None,
        text_rows=states.shape[1] if states is not None else None,
        source=json.dumps(describe, sort_keys=True),
        library=f"unspool {__version__}",
    )


def _class_name(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: truncated or no safetensors file ({error}); fetch it again") from None
    return str(config.get("_class_name", ""))


def _report(source: Source) -> str:
    report = getattr(source, "report", None)
    return report.summary() if report is not None else ""
