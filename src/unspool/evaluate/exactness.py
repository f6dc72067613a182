"""Proof on this machine: cached streaming against one masked forward, and against tensors of the published networks.

Every row compares two ways to compute the same thing and gives the largest difference over the standard deviation of
the expected values. Negative controls break one side on purpose and must exceed the bound of their comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.chunks import ChunkPlan, FrameSet
from unspool.causal.context import FullSequence
from unspool.causal.mask import teacher_forcing_mask
from unspool.causal.position import Absolute, PositionPolicy, ReanchoredSink, WindowRelative
from unspool.causal.visibility import Full, Kind, Segment, Visibility, Window
from unspool.models.base import Conditioning, Prompts
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer

FP32, FP64 = 1e-5, 1e-10


@dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, largest relative difference, bound, and which side of it is right."""

    what: str
    dtype: str
    value: float
    bound: float
    control: bool = False

    @property
    def ok(self) -> bool:
        return self.value > self.bound if self.control else self.value <= self.bound


@dataclass(frozen=True)
class Setting:
    """A policy to prove."""

    name: str
    plan: ChunkPlan
    visibility: Visibility
    positions: PositionPolicy = field(default_factory=Absolute)
    size: tuple[int, int] = (4, 6)
    frames: int = 20


SETTINGS = (
    Setting("all the past, chunk 3", ChunkPlan(chunk=3), Full()),
    Setting("all the past, chunk 1", ChunkPlan(chunk=1), Full(), frames=9),
    Setting("first frame alone, then 4", ChunkPlan(chunk=4, first=1), Full()),
    Setting("plain causal inside the chunk", ChunkPlan(chunk=3), Window(window=9, sink=3, within="causal")),
    Setting("window 6, chunk 3", ChunkPlan(chunk=3), Window(window=6)),
    Setting("window 7, no multiple of chunk 3", ChunkPlan(chunk=3), Window(window=7)),
    Setting("window 9 with sink 3", ChunkPlan(chunk=3), Window(window=9, sink=3)),
    Setting("window 9 with sink 4, no multiple", ChunkPlan(chunk=3), Window(window=9, sink=4)),
    Setting("window 4 with sink 1, chunk 1", ChunkPlan(chunk=1), Window(window=4, sink=1), frames=12),
    Setting("commit reads 12, denoise 6", ChunkPlan(chunk=3), Window(window=6, commit_window=12)),
    Setting(
        "commit without the sink",
        ChunkPlan(chunk=3),
        Window(window=9, sink=3, commit_window=6, commit_reads_sink=False),
    ),
    Setting("window-relative, sink 3", ChunkPlan(chunk=3), Window(window=9, sink=3), WindowRelative()),
    Setting("re-anchored sink 2, chunk 5", ChunkPlan(chunk=5), Window(window=11, sink=2), ReanchoredSink(), frames=27),
    Setting("position 10^6 and beyond", ChunkPlan(chunk=3), Window(window=9, sink=3), Absolute(offset=10**6)),
    Setting("128 tokens a frame", ChunkPlan(chunk=2), Window(window=6, sink=2), size=(16, 32), frames=10),
)


def random_network(dtype: torch.dtype, *, seed: int = 0, layers: int = 3, dim: int = 48) -> WanTransformer:
    """A small network in which every parameter is random, so that no error can hide behind a zero."""
    config = WanConfig(
        dim=dim, ffn_dim=96, num_layers=layers, num_heads=2, in_channels=4, out_channels=4, text_dim=24, text_len=10,
        freq_dim=32,
    )  # fmt: skip
    net = WanTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        is_gain = "norm" in name and name.endswith("weight")
        scale = 0.5 if parameter.ndim == 1 or "modulation" in name else 1.4 / fan_in**0.5
        parameter.data = 1 + 0.3 * noise if is_gain else scale * noise
    return net.to(dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class Clip:
    """Inputs of one comparison: clean and noisy latents, a noise level per latent frame, two prompts per sample."""

    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    prompts: Prompts
    prompt_index: Tensor

    @staticmethod
    def random(net: WanTransformer, setting: Setting, dtype: torch.dtype, *, batch: int = 2, seed: int = 1) -> Clip:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, setting.frames, 4, *setting.size)
        clean, noisy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        sigma = torch.rand((batch, setting.frames), generator=generator, dtype=torch.float64)
        text = torch.randn((batch, 2, 10, 24), generator=generator, dtype=torch.float64).to(dtype)
        index = (torch.arange(setting.frames) >= setting.frames // 2).long()[None].expand(batch, -1)
        return Clip(clean, noisy, sigma, net.prepare(text), index)


def masked(net: WanTransformer, setting: Setting, clip: Clip) -> Tensor:
    """Predictions for the noisy latents by one forward over [clean | noisy] under the training mask."""
    mask = teacher_forcing_mask(setting.plan, setting.frames, setting.visibility, setting.positions)
    x = torch.cat([clip.clean, clip.noisy], dim=1)
    sigma = torch.cat([torch.zeros_like(clip.sigma), clip.sigma], dim=1)
    cond = Conditioning(prompts=clip.prompts, prompt_index=torch.cat([clip.prompt_index] * 2, dim=1))
    return net(x, sigma, cond, FullSequence(2 * setting.frames, mask))[:, setting.frames :]


def new_cache(
    net: WanTransformer,
    setting: Setting,
    dtype: torch.dtype,
    batch: int = 2,
    *,
    device: str = "cpu",
    compiled: bool = False,
) -> KVCache:
    """An empty cache for a setting; it grows by 8 latent frames where the setting has no bound."""
    return KVCache(
        net.sites,
        batch=batch,
        tokens_per_frame=net.tokens_per_frame(*setting.size),
        visibility=setting.visibility,
        positions=setting.positions,
        dtype=dtype,
        device=device,
        compiled=compiled,
        block_frames=8,
    )


def cached(
    net: WanTransformer,
    setting: Setting,
    clip: Clip,
    cache: KVCache,
    *,
    first: int = 0,
    each: Callable[[int], None] = lambda chunk: None,
) -> Tensor:
    """The same predictions chunk by chunk from a cache; `each` is called before every chunk."""
    outputs = []
    for frames in setting.plan.chunks(first, setting.frames):
        frames = range(frames.start, min(frames.stop, setting.frames))
        each(setting.plan.chunk_of(frames.start))
        here = slice(frames.start, frames.stop)
        cond = Conditioning(prompts=clip.prompts, prompt_index=clip.prompt_index[:, here])
        context = cache.begin((Segment(kind=Kind.DENOISE, frames=frames),))
        outputs.append(net(clip.noisy[:, here], clip.sigma[:, here], cond, context))
        context = cache.begin((Segment(kind=Kind.COMMIT, frames=frames),))
        net(clip.clean[:, here], torch.zeros(1, 1), cond, context)
        cache.promote()
    return torch.cat(outputs, dim=1)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the standard deviation of `expected`."""
    return float((got.double() - expected.double()).abs().max() / expected.double().std())


def policies() -> Iterator[Row]:
    """Cached streaming against one masked forward: before, at and after eviction."""
    for dtype, bound in ((torch.float32, FP32), (torch.float64, FP64)):
        net = random_network(dtype)
        for setting in SETTINGS:
            clip = Clip.random(net, setting, dtype)
            value = difference(cached(net, setting, clip, new_cache(net, setting, dtype)), masked(net, setting, clip))
            yield Row(f"cached = masked: {setting.name}", _short(dtype), value, bound)


def equalities() -> Iterator[Row]:
    """Two ways through the same cache."""
    dtype, setting = torch.float64, SETTINGS[11]
    net = random_network(dtype)
    clip = Clip.random(net, setting, dtype)
    expected = cached(net, setting, clip, new_cache(net, setting, dtype))
    shifted = Setting("", setting.plan, setting.visibility, WindowRelative(offset=12345))
    value = difference(cached(net, shifted, clip, new_cache(net, shifted, dtype)), expected)
    yield Row("relative positions shifted by a constant", "fp64", value, FP64)
    with torch.enable_grad():
        functional = cached(net, setting, clip, new_cache(net, setting, dtype))
    yield Row("functional cache (autograd) = ring in place", "fp64", difference(functional, expected), FP64)

    half = setting.plan.chunks(0, 12)[-1].stop
    cache = new_cache(net, setting, dtype)
    early = Setting("", setting.plan, setting.visibility, setting.positions, frames=half)
    cached(net, early, clip, cache)
    stored = cache.snapshot().to_bytes()
    rest = cached(net, setting, clip, cache, first=half)
    other = new_cache(net, setting, dtype)
    other.restore(Snapshot.from_bytes(stored))
    again = cached(net, setting, clip, other, first=half)
    yield Row("snapshot to bytes, restored: bitwise", "fp64", float((rest - again).abs().max()), 0.0)

    a, b = new_cache(net, setting, dtype), new_cache(net, setting, dtype)
    elsewhere = Clip.random(net, setting, dtype, seed=2)
    pieces: list[Tensor] = []
    for chunk in setting.plan.chunks(0, 15):
        span = Setting("", setting.plan, setting.visibility, setting.positions, frames=chunk.stop)
        pieces.append(cached(net, span, clip, a, first=chunk.start))
        cached(net, span, elsewhere, b, first=chunk.start)
    value = float((torch.cat(pieces, dim=1) - expected[:, :15]).abs().max())
    yield Row("two sessions interleaved: bitwise as alone", "fp64", value, 0.0)
    yield _recached(net, setting, dtype)


def _recached(net: WanTransformer, setting: Setting, dtype: torch.dtype) -> Row:
    """Recache under an unchanged prompt while the window still reaches frame 0."""
    span = Setting("", setting.plan, setting.visibility, setting.positions, frames=9)
    clip = Clip.random(net, span, dtype)
    cache = new_cache(net, span, dtype)
    cached(net, span, clip, cache)
    before = [(e.keys.clone(), e.values.clone()) for e in cache.entries.values()]
    segments = tuple(Segment(kind=Kind.RECACHE, frames=c) for c in span.plan.chunks(3, 9))
    sink = FrameSet.of((0, 3))
    segments = tuple(Segment(kind=s.kind, frames=s.frames, limit=sink | FrameSet.of((3, 9))) for s in segments)
    cond = Conditioning(prompts=clip.prompts, prompt_index=clip.prompt_index[:, 3:])
    net(clip.clean[:, 3:], torch.zeros(1, 1), cond, cache.begin(segments))
    held, slots = cache.frames, dict(cache.slots.promoted)
    cache.promote()
    n, value = cache.tokens_per_frame, 0.0
    for entry, (keys, values) in zip(cache.entries.values(), before, strict=True):
        for frame in held & cache.frames:
            old, new = slots[frame] * n, cache.slots.promoted[frame] * n
            value = max(value, difference(entry.keys[:, new : new + n], keys[:, old : old + n]))
            value = max(value, difference(entry.values[:, new : new + n], values[:, old : old + n]))
    return Row("recache under the same prompt reproduces K/V", "fp64", value, FP64)


def controls() -> Iterator[Row]:
    """Each breaks one side only; a comparison that did not notice would prove nothing."""
    dtype, setting = torch.float32, SETTINGS[6]
    net = random_network(dtype)
    clip = Clip.random(net, setting, dtype)
    expected = masked(net, setting, clip)
    cache = new_cache(net, setting, dtype)

    def corrupt(chunk: int) -> None:
        if chunk == 4:
            cache.entries[1].values[:, cache.slots.promoted[1] * cache.tokens_per_frame] += 0.01

    value = difference(cached(net, setting, clip, cache, each=corrupt), expected)
    yield Row("a corrupted cache slot", "fp32", value, FP32, control=True)
    wider = Setting("", setting.plan, Window(window=10, sink=3))
    value = difference(cached(net, wider, clip, new_cache(net, wider, dtype)), expected)
    yield Row("one latent frame too many in the window", "fp32", value, FP32, control=True)
    value = difference(cached(net, setting, clip, _OffByOne(net, setting, dtype)), expected)
    yield Row("one rotary position off by 1", "fp32", value, FP32, control=True)


class _OffByOne(KVCache):
    """A cache that rotates the keys and queries of latent frame 7 as if it were frame 8."""

    def __init__(self, net: WanTransformer, setting: Setting, dtype: torch.dtype) -> None:
        super().__init__(
            net.sites, batch=2, tokens_per_frame=net.tokens_per_frame(*setting.size), visibility=setting.visibility,
            positions=_Slip(), dtype=dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class _Slip:
    moves_keys: bool = False

    def assign(self, segment: Segment, kept: FrameSet) -> tuple[list[int], list[int]]:
        return [f + (f == 7) for f in kept], [f + (f == 7) for f in segment.frames]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}[dtype]


@torch.no_grad()
def all_rows(golden: Path | None) -> Iterator[tuple[str, Row]]:
    """(section, row) of every comparison; golden tensors only where the folder is given."""
    from unspool.evaluate import golden as published
    from unspool.evaluate import golden_stdit

    for section, rows in (
        ("Cached streaming = one masked forward", policies),
        ("Other equalities", equalities),
        ("Negative controls (must exceed the bound)", controls),
    ):
        for row in rows():
            yield section, row
    if golden is not None:
        for recorded in (published.rows, golden_stdit.rows):
            for row in recorded(golden):
                yield "Published networks", row
