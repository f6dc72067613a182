"""The causal network without cache, visibility, mask or position classes: plain loops over frame pairs.

What a query frame reads, and where each key stands, is decided here by arithmetic on frame numbers alone; rotation and
softmax are written out. Only the weights are shared with the library.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Absolute, PositionPolicy, ReanchoredSink, WindowRelative
from unspool.causal.visibility import Full, Kind, Segment, Visibility, Window
from unspool.models.base import Conditioning, Prompts
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # max abs difference / std of the output
HEADS, HEAD_DIM, CHANNELS, TEXT_ROWS, TEXT_DIM = 2, 12, 4, 5, 8


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One setting in plain numbers. `window` None: everything; `relative`: positions count what is held."""

    chunk: int
    first: int | None = None
    num_frames: int = 8
    window: int | None = None
    sink: int = 0
    causal_inside: bool = False
    commit_window: int | None = None
    commit_reads_sink: bool = True
    policy: str = "absolute"  # absolute | relative | reanchored
    offset: int = 0

    # ---- the same setting in the library's words ---------------------------------------------------------------

    @property
    def plan(self) -> ChunkPlan:
        return ChunkPlan(chunk=self.chunk, first=self.first, num_frames=self.num_frames)

    @property
    def visibility(self) -> Visibility:
        within: Any = "causal" if self.causal_inside else "full"
        if self.window is None:
            return Full(within=within)
        return Window(
            window=self.window,
            sink=self.sink,
            within=within,
            commit_window=self.commit_window,
            commit_reads_sink=self.commit_reads_sink,
        )

    @property
    def positions(self) -> PositionPolicy:
        if self.policy == "absolute":
            return Absolute(offset=self.offset)
        return WindowRelative(offset=self.offset) if self.policy == "relative" else ReanchoredSink()


def chunk_bounds(rule: Rule) -> list[tuple[int, int]]:
    """Chunks by walking along the clip."""
    bounds, at = [], 0
    while at < rule.num_frames:
        length = rule.first if at == 0 and rule.first is not None else rule.chunk
        end = at
        while end < rule.num_frames and end < at + length:
            end += 1
        bounds.append((at, end))
        at = end
    return bounds


def reads_past(rule: Rule, end: int, key: int, commit: bool) -> bool:
    """Does a chunk that ends before frame `end` read the frame `key` of an earlier chunk?"""
    if rule.window is None:
        return True
    reach = rule.commit_window if commit and rule.commit_window is not None else rule.window
    room = reach - rule.sink  # frames left beside the sink, the chunk's own ones among them
    if key < rule.sink:
        return not commit or rule.commit_reads_sink
    return end - key <= room


@dataclass
class Row:
    """What one query frame reads: its own position, and (sequence frame, position) of every key."""

    position: int
    keys: list[tuple[int, int]] = field(default_factory=list)


def rows_of(rule: Rule, commit: bool, key_base: int = 0, own_base: int = 0) -> list[Row]:
    """One row per frame; past frames sit at `key_base` + frame in the sequence, a chunk's own at `own_base` + frame."""
    rows = []
    for start, end in chunk_bounds(rule):
        past = [g for g in range(start) if reads_past(rule, end, g, commit)]
        standing: dict[int, int] = {}
        if rule.policy == "absolute":
            for g in [*past, *range(start, end)]:
                standing[g] = g + rule.offset
        else:  # held frames close up; only differences count, so both relative policies are one
            for place, g in enumerate([*past, *range(start, end)]):
                standing[g] = place + rule.offset
        for f in range(start, end):
            row = Row(standing[f])
            for g in past:
                row.keys.append((key_base + g, standing[g]))
            for g in range(start, end):
                if not rule.causal_inside or g <= f:
                    row.keys.append((own_base + g, standing[g]))
            rows.append(row)
    return rows


def plain_rows(rule: Rule, commit: bool = False) -> list[Row]:
    """One copy of the clip: every chunk reads what the rule says of the same copy."""
    return rows_of(rule, commit)


def forcing_rows(rule: Rule) -> list[Row]:
    """[clean | noisy]: clean chunks read clean ones as a commit does, noisy ones read clean ones as a denoise does."""
    return rows_of(rule, True) + rows_of(rule, False, own_base=rule.num_frames)


def spin(x: Tensor, position: int, grid: tuple[int, int]) -> Tensor:
    """Rotate one frame of tokens [b, rows * columns, heads, d] as complex numbers at a position in time."""
    half = x.shape[-1] // 2
    space = half // 3
    time = half - 2 * space
    angles = []
    for r, c in itertools.product(range(grid[0]), range(grid[1])):
        line = [position / 10000.0 ** (j / time) for j in range(time)]
        line += [r / 10000.0 ** (j / space) for j in range(space)]
        line += [c / 10000.0 ** (j / space) for j in range(space)]
        angles.append(line)
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], half, 2).contiguous())
    return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2).to(x.dtype)


class LoopContext:
    """A context whose reads are a list of rows; a dense frame-pair table, plain matmul and softmax."""

    def __init__(self, rows: list[Row], grid: tuple[int, int]) -> None:
        self.rows = rows
        self.grid = grid
        self.allowed = [[False] * len(rows) for _ in rows]
        for f, row in enumerate(rows):
            for g, _ in row.keys:
                self.allowed[f][g] = True

    @property
    def positions(self) -> Tensor:
        return torch.tensor([row.position for row in self.rows])

    def attend(self, site: object, q: Tensor, k: Tensor, v: Tensor, rope: object) -> Tensor:
        n = self.grid[0] * self.grid[1]
        assert q.shape[1] == n * len(self.rows)
        out = torch.zeros_like(q)
        spun: dict[tuple[int, int], Tensor] = {}
        for f, row in enumerate(self.rows):
            table = torch.tensor(self.allowed[f]).repeat_interleave(n)
            keys = torch.zeros_like(k)
            for g, position in row.keys:
                if (g, position) not in spun:
                    spun[g, position] = spin(k[:, g * n : (g + 1) * n], position, self.grid)
                keys = torch.cat([keys[:, : g * n], spun[g, position], keys[:, (g + 1) * n :]], dim=1)
            query = spin(q[:, f * n : (f + 1) * n], row.position, self.grid)
            scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~table, -math.inf).softmax(-1)
            part = torch.einsum("bhqk,bkhd->bqhd", weights, v)
            out = torch.cat([out[:, : f * n], part, out[:, (f + 1) * n :]], dim=1)
        return out


class RawStore:
    """A past that keeps keys as they come and rotates them when they are read, chunk by chunk."""

    def __init__(self, rule: Rule, grid: tuple[int, int]) -> None:
        self.rule = rule
        self.grid = grid
        self.kept: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        self.staged: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

    def view(self, start: int, end: int, commit: bool) -> RawView:
        self.staged = {f: {} for f in range(start, end)}
        return RawView(self, start, end, [g for g in range(start) if reads_past(self.rule, end, g, commit)])

    def promote(self) -> None:
        self.kept.update(self.staged)


class RawView:
    def __init__(self, store: RawStore, start: int, end: int, past: list[int]) -> None:
        self.store, self.start, self.end, self.past = store, start, end, past

    def attend(self, site: Any, q: Tensor, k: Tensor, v: Tensor, rope: object) -> Tensor:
        grid, rule = self.store.grid, self.store.rule
        n, outputs = grid[0] * grid[1], []
        for f in range(self.start, self.end):
            at = slice((f - self.start) * n, (f - self.start + 1) * n)
            self.store.staged[f][site.index] = (k[:, at], v[:, at])
        for f in range(self.start, self.end):
            last = f + 1 if rule.causal_inside else self.end
            held = [*self.past, *range(self.start, last)]
            absolute = rule.policy == "absolute"
            place = {g: g + rule.offset if absolute else i for i, g in enumerate(held)}
            where = {**self.store.kept, **self.store.staged}
            keys = torch.cat([spin(where[g][site.index][0], place[g], grid) for g in held], 1)
            values = torch.cat([where[g][site.index][1] for g in held], 1)
            query = spin(q[:, (f - self.start) * n : (f - self.start + 1) * n], place[f], grid)
            weights = (torch.einsum("bqhd,bkhd->bhqk", query, keys) / math.sqrt(q.shape[-1])).softmax(-1)
            outputs.append(torch.einsum("bhqk,bkhd->bqhd", weights, values))
        return torch.cat(outputs, 1)


# ---- a network with no zero anywhere, and inputs ------------------------------------------------------------------


def make_network(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 3) -> WanTransformer:
    """All parameters random: gates, modulation and head too, so that no path can hide an error."""
    config = WanConfig(
        dim=HEADS * HEAD_DIM,
        ffn_dim=32,
        num_layers=layers,
        num_heads=HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        text_len=TEXT_ROWS,
        freq_dim=16,
    )
    network = WanTransformer(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            values = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            if weight.ndim > 1 and "modulation" not in name:
                values = values / math.sqrt(weight[0].numel())
            elif "norm" in name and name.endswith("weight"):
                values = 1 + 0.2 * values
            else:
                values = 0.5 * values
            weight.copy_(values)
        network.head.head.weight.mul_(2)
    return network.to(dtype).requires_grad_(False)


@dataclass
class Inputs:
    """A clean and a noisy clip, noise levels, and prompts that differ between samples and along the clip."""

    clean: Tensor
    noisy: Tensor
    sigma: Tensor  # [b|1, F|1]
    prompts: Prompts
    index: Tensor | None
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def cond(self, frames: range, copies: int = 1) -> Conditioning:
        index = None if self.index is None else self.index[:, frames.start : frames.stop].repeat(1, copies)
        return Conditioning(prompts=self.prompts, prompt_index=index)

    def part(self, frames: range) -> Tensor:
        return self.sigma if self.sigma.shape[1] == 1 else self.sigma[:, frames.start : frames.stop]


def make_inputs(
    network: WanTransformer,
    rule: Rule,
    *,
    batch: int = 2,
    grid: tuple[int, int] = (2, 3),
    num_prompts: int = 1,
    sigma_shape: tuple[bool, bool] = (True, True),
    seed: int = 0,
) -> Inputs:
    """`sigma_shape`: whether sigma differs between samples, and between latent frames."""
    dtype = network.head.head.weight.dtype
    draw = torch.Generator().manual_seed(seed + 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    frames = rule.num_frames
    size = (batch, frames, CHANNELS, 2 * grid[0], 2 * grid[1])
    sigma = torch.rand(
        batch if sigma_shape[0] else 1, frames if sigma_shape[1] else 1, generator=draw, dtype=torch.float64
    )
    index = torch.randint(num_prompts, (batch, frames), generator=draw) if num_prompts > 1 else None
    prompts = network.prepare(randn(batch, num_prompts, TEXT_ROWS, TEXT_DIM))
    return Inputs(randn(*size), randn(*size), sigma.to(dtype), prompts, index, grid)


# ---- both sides ---------------------------------------------------------------------------------------------------


def oracle_forcing(network: WanTransformer, rule: Rule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Predictions (of the clean half, of the noisy half) in ONE forward over [clean | noisy]."""
    b, f = inputs.clean.shape[:2]
    sigma = torch.cat([torch.zeros(b, f, dtype=inputs.sigma.dtype), inputs.sigma.expand(b, f)], 1)
    x = torch.cat([inputs.clean, inputs.noisy], 1)
    context = LoopContext(forcing_rows(rule), inputs.grid)
    out = network(x, sigma, inputs.cond(range(f), copies=2), context)  # type: ignore[arg-type]
    return out[:, :f], out[:, f:]


def oracle_plain(network: WanTransformer, rule: Rule, inputs: Inputs, commit: bool = False) -> Tensor:
    """Prediction of the noisy clip where every chunk reads the noisy past."""
    f = inputs.noisy.shape[1]
    context = LoopContext(plain_rows(rule, commit), inputs.grid)
    return network(inputs.noisy, inputs.sigma, inputs.cond(range(f)), context)  # type: ignore[arg-type]


def make_cache(network: WanTransformer, rule: Rule, inputs: Inputs, **changes: Any) -> KVCache:
    options: dict[str, Any] = {
        "batch": inputs.clean.shape[0],
        "tokens_per_frame": inputs.tokens,
        "visibility": rule.visibility,
        "positions": rule.positions,
        "dtype": inputs.clean.dtype,
        "block_frames": 4,
    }
    return KVCache(network.sites, **{**options, **changes})


def denoise(network: WanTransformer, cache: KVCache, inputs: Inputs, frames: range, x: Tensor | None = None) -> Tensor:
    """A denoising pass on the noisy frames (or on others)."""
    x = inputs.noisy[:, frames.start : frames.stop] if x is None else x
    context = cache.begin((Segment(kind=Kind.DENOISE, frames=frames),))
    return network(x, inputs.part(frames), inputs.cond(frames), context)


def commit(
    network: WanTransformer, cache: KVCache, inputs: Inputs, frames: range, kind: Kind = Kind.COMMIT, **options: bool
) -> Tensor:
    """A commit pass on the clean frames at sigma 0, and promotion."""
    context = cache.begin((Segment(kind=kind, frames=frames),))
    sigma = torch.zeros(1, 1, dtype=inputs.sigma.dtype)
    out = network(inputs.clean[:, frames.start : frames.stop], sigma, inputs.cond(frames), context)
    cache.promote(**options)
    cache.slots.check()
    return out


def rollout(network: WanTransformer, cache: KVCache, rule: Rule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Predictions (of the commits, of the denoising passes) chunk by chunk through the cache."""
    clean, noisy = [], []
    for start, end in chunk_bounds(rule):
        noisy.append(denoise(network, cache, inputs, range(start, end)))
        clean.append(commit(network, cache, inputs, range(start, end)))
    return torch.cat(clean, 1), torch.cat(noisy, 1)


def started(network: WanTransformer, rule: Rule, chunks: int, **options: Any) -> tuple[KVCache, Inputs]:
    """A cache that has gone through `chunks` chunks, and the inputs."""
    inputs = make_inputs(network, rule)
    cache = make_cache(network, rule, inputs, **options)
    step(network, cache, rule, inputs, 0, chunks)
    return cache, inputs


def step(network: WanTransformer, cache: KVCache, rule: Rule, inputs: Inputs, first: int, last: int) -> Tensor:
    outputs = []
    for start, end in chunk_bounds(rule)[first:last]:
        outputs.append(denoise(network, cache, inputs, range(start, end)))
        outputs.append(commit(network, cache, inputs, range(start, end)))
    return torch.cat(outputs, 1) if outputs else torch.zeros(0)


def only(kind: Kind, start: int, end: int) -> tuple[Segment]:
    return (Segment(kind=kind, frames=range(start, end)),)


def assert_equal_outputs(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Fail unless max |got - want| / std(want) is within tolerance and the reference has something to say."""
    tolerance = TOLERANCE[want.dtype] if tolerance is None else tolerance
    assert got.shape == want.shape and got.dtype == want.dtype
    std = want.std().item()
    assert std >= 0.5, f"the reference output has std {std}: too tame to show an error"
    worst = (got - want).abs().max().item() / std
    assert worst <= tolerance, f"relative difference {worst:.3g} > {tolerance:.3g}"
