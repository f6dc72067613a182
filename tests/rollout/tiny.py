"""A tiny seeded network with no zero in it, and whole rollouts without any cache.

`reference` knows no cache, mask, visibility or position class: it keeps a ledger of every latent frame that was ever
committed, with the prompt and the reads it was committed under, and computes the whole ledger again, in one forward
together with the noisy chunk, at every denoising step. Which frames are read is arithmetic on frame numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Absolute, WindowRelative
from unspool.causal.visibility import Full, Window
from unspool.diffusion.schedule import Schedule
from unspool.models.base import Conditioning, Text
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.rollout.guidance import Guidance
from unspool.rollout.noise import CounterNoise, NoiseSource
from unspool.rollout.prompts import PromptTimeline, Switch
from unspool.rollout.rollout import Rollout, RolloutConfig
from unspool.rollout.solvers.euler import Euler
from unspool.rollout.solvers.fewstep import FewStep
from unspool.rollout.solvers.multistep import Multistep

CHANNELS, SIZE, GRID = 4, (2, 4), (1, 2)
TEXT_ROWS, TEXT_DIM = 5, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # max abs difference / std of the latents
NOISE = CounterNoise(seed=11)


def make_network(dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: int) -> WanTransformer:
    """Three layers; every parameter random: gates, modulation, norms and head too."""
    config = WanConfig(
        dim=24, ffn_dim=32, num_layers=3, num_heads=2, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_DIM, text_len=TEXT_ROWS, freq_dim=16, **sizes,
    )  # fmt: skip
    network = WanTransformer(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            values = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            if weight.ndim > 1 and "modulation" not in name:
                values = values / math.sqrt(weight[0].numel())
            else:
                values = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.4 * values
            weight.copy_(values)
        network.head.head.weight.mul_(0.8)  # predictions of about the size of noise: long rollouts stay in range
    return network.to(dtype)


@lru_cache(maxsize=8)
def shared_network(dtype: torch.dtype = torch.float64) -> WanTransformer:
    """One network for all tests that leave its weights alone."""
    return make_network(dtype).requires_grad_(False)


def text(number: int, batch: int = 2, rows: int = TEXT_ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
    """Text states [batch, rows, channels] of prompt `number`: each sample has its own."""
    draw = torch.Generator().manual_seed(1000 + number)
    return 2 * torch.randn(4, rows, TEXT_DIM, generator=draw, dtype=torch.float64)[:batch].to(dtype)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One rollout in plain numbers; `window` None reads everything, `told` is what the network hears for sigmas."""

    chunk: int = 2
    first: int | None = None
    num_frames: int | None = 8
    window: int | None = None
    sink: int = 0
    relative: bool = False
    offset: int = 0
    sigmas: tuple[float, ...] = (1.0, 0.8, 0.0)
    told: tuple[float, ...] | None = None
    first_sigmas: tuple[float, ...] | None = None
    solver: str = "few_step"
    scale: float = 1.0
    sigma_commit: float = 0.0

    def config(self, commit: Any = "separate", mode: Any = "batch") -> RolloutConfig:
        """The same in the library's words."""
        return RolloutConfig(
            plan=ChunkPlan(chunk=self.chunk, first=self.first, num_frames=self.num_frames),
            schedule=Schedule(self.sigmas, self.told),
            first_schedule=None if self.first_sigmas is None else Schedule(self.first_sigmas),
            visibility=Full() if self.window is None else Window(window=self.window, sink=self.sink),
            positions=WindowRelative(offset=self.offset) if self.relative else Absolute(offset=self.offset),
            solver={"few_step": FewStep(), "euler": Euler(), "multistep": Multistep()}[self.solver],
            guidance=Guidance(self.scale, mode), sigma_commit=self.sigma_commit, commit=commit,
        )  # fmt: skip

    def bounds(self) -> list[tuple[int, int]]:
        """Chunks of the stream by walking along it."""
        assert self.num_frames is not None
        chunks, at = [], 0
        while at < self.num_frames:
            length = self.first if at == 0 and self.first is not None else self.chunk
            chunks.append((at, min(at + length, self.num_frames)))
            at += length
        return chunks


def make_rollout(
    network: WanTransformer, setting: Setting, prompt: Tensor, switches: Sequence[Switch] = (),
    *, commit: str = "separate", mode: str = "batch", noise: NoiseSource = NOISE, **options: Any,
) -> Rollout:  # fmt: skip
    """The library's rollout of a setting."""
    timeline = PromptTimeline(prompt, list(switches))
    if setting.scale != 1.0:
        options.setdefault("negative", text(99, prompt.shape[0], dtype=prompt.dtype))
    return Rollout(network, setting.config(commit, mode), timeline, noise=noise, latent_size=SIZE, **options)


def run(*args: Any, **options: Any) -> Tensor:
    """All latents of the library's rollout of a setting; arguments as `make_rollout`."""
    return torch.cat([chunk.latents for chunk in make_rollout(*args, **options)], 1)


@contextmanager
def counted(network: WanTransformer) -> Iterator[list[int]]:
    """Latent frames of every forward that the network has finished, in order."""
    calls: list[int] = []
    handle = network.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[1]))
    try:
        yield calls
    finally:
        handle.remove()


def assert_close(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Fail unless max |got - want| / std(want) is within tolerance and the reference has something to say."""
    assert got.shape == want.shape and got.dtype == want.dtype
    std = want.std().item() if want.numel() > 1 else 1.0
    assert 0.2 <= std < 100, f"reference latents have std {std}"
    worst = (got - want).abs().max().item() / std
    limit = TOLERANCE[want.dtype] if tolerance is None else tolerance
    assert worst <= limit, f"relative difference {worst:.3g} > {limit:.3g}"


def differs(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3


def cached(cache: KVCache) -> dict[int, list[Tensor]]:
    """Per promoted frame: keys and values of every site, as they lie in the cache."""
    found: dict[int, list[Tensor]] = {}
    for frame, slot in sorted(cache.slots.promoted.items()):
        for site in cache.sites.values():
            n, entry = cache.tokens(site), cache.entries[site.index]
            parts = [t[:, slot * n : (slot + 1) * n].clone() for t in (entry.keys, entry.values)]
            found.setdefault(frame, []).extend(parts)
    return found


# ---- the rollout without a cache ----------------------------------------------------------------------------------


def spin(x: Tensor, position: int) -> Tensor:
    """Rotate one frame of tokens [b, n, heads, d] as complex numbers at a position in time."""
    half = x.shape[-1] // 2
    space = half // 3
    time = half - 2 * space
    lines = [
        [position / 10000.0 ** (j / time) for j in range(time)]
        + [row / 10000.0 ** (j / space) for j in range(space)]
        + [column / 10000.0 ** (j / space) for j in range(space)]
        for row in range(GRID[0])
        for column in range(GRID[1])
    ]
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(lines, dtype=torch.float64))
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], half, 2))
    return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2).to(x.dtype)


@dataclass
class Group:
    """Frames that were computed together: places in the sequence and frame numbers, of themselves and their reads."""

    members: list[int]
    frames: list[int]
    reads: list[int]
    read_frames: list[int]


@dataclass
class PairContext:
    """Attention written out: every group reads the places that it lists, nothing else. `cut` stops gradients there."""

    groups: list[Group]
    setting: Setting
    cut: int = 0

    def attend(self, site: object, q: Tensor, k: Tensor, v: Tensor, rope: object) -> Tensor:
        n = GRID[0] * GRID[1]

        def frame(x: Tensor, at: int) -> Tensor:
            part = x[:, at * n : (at + 1) * n]
            return part.detach() if x is not q and at < self.cut else part

        outputs: dict[int, Tensor] = {}
        for group in self.groups:
            frames = [*group.read_frames, *group.frames]
            rank = {f: (i if self.setting.relative else f) + self.setting.offset for i, f in enumerate(frames)}
            places = [*group.reads, *group.members]
            keys = torch.cat([spin(frame(k, at), rank[f]) for at, f in zip(places, frames, strict=True)], 1)
            values = torch.cat([frame(v, at) for at in places], 1)
            for at, f in zip(group.members, group.frames, strict=True):
                scores = torch.einsum("bqhd,bkhd->bhqk", spin(frame(q, at), rank[f]), keys) / math.sqrt(q.shape[-1])
                outputs[at] = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
        return torch.cat([outputs[at] for at in sorted(outputs)], 1)


@dataclass
class Ledger:
    """Every latent frame ever committed, and which of its versions is current."""

    network: WanTransformer
    setting: Setting
    negative: Tensor | None = None
    cut: bool = True
    latents: list[Tensor] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    current: dict[int, int] = field(default_factory=dict)  # frame -> place in the sequence
    sink_start: int = 0
    floor: int = 0

    def in_sink(self, frame: int) -> bool:
        return self.sink_start <= frame < self.sink_start + self.setting.sink

    def visible(self, start: int, end: int) -> list[int]:
        """Frames below `start` that a chunk ending before `end` reads."""
        window = self.setting.window
        room = None if window is None else window - self.setting.sink
        return [
            f for f in sorted(self.current)
            if f < start
            and (self.in_sink(f) or (f >= max(self.floor, self.sink_start) and (room is None or end - f <= room)))
        ]  # fmt: skip

    def write(self, frames: Sequence[int], latents: Tensor, prompt: Tensor, end: int) -> None:
        """Commit frames of one chunk that ends before `end`."""
        reads = self.visible(frames[0], end)
        first = len(self.latents)
        places = list(range(first, first + len(frames)))
        self.groups.append(Group(places, list(frames), [self.current[f] for f in reads], reads))
        self.latents += latents.split(1, 1)
        self.texts += [prompt] * len(frames)
        self.current.update(zip(frames, places, strict=True))

    def predict(self, frames: range, x: Tensor, told: float, prompt: Tensor) -> Tensor:
        """The guided prediction for one noisy chunk."""
        outputs = [self._forward(frames, x, told, [*self.texts, *[prompt] * len(frames)])]
        if self.negative is not None:
            blank = self._forward(frames, x, told, [self.negative] * (len(self.texts) + len(frames)))
            outputs = [blank + self.setting.scale * (outputs[0] - blank)]
        return outputs[0]

    def _forward(self, frames: range, x: Tensor, told: float, texts: list[Tensor]) -> Tensor:
        distinct = list({id(t): t for t in texts}.values())
        index = torch.tensor([[next(i for i, d in enumerate(distinct) if d is t) for t in texts]])
        rows = max(t.shape[1] for t in distinct)
        padded = [torch.nn.functional.pad(t, (0, 0, 0, rows - t.shape[1])) for t in distinct]
        prompts = self.network.prepare(Text(states=torch.stack(padded, 1)))
        known = len(self.latents)
        reads = self.visible(frames.start, frames.stop)
        own = Group(list(range(known, known + len(frames))), list(frames), [self.current[f] for f in reads], reads)
        sigma = torch.tensor([[self.setting.sigma_commit] * known + [told] * len(frames)], dtype=torch.float64)
        context: Any = PairContext([*self.groups, own], self.setting, known if self.cut else 0)
        cond = Conditioning(prompts=prompts, prompt_index=index)
        return self.network(torch.cat([*self.latents, x], 1), sigma, cond, context)[:, known:]

    def switch(self, how: Switch, now: int, prompt: Tensor) -> None:
        """What a prompt switch at frame `now` does to the past, told in frame numbers."""
        window, sink, kept = self.setting.window, self.setting.sink, dict(self.current)
        if how.policy == "flush":
            self.floor = now - 1
            self.current = {f: at for f, at in kept.items() if self.in_sink(f) or f == now - 1}
        if how.policy != "recache":
            return
        low, again = self.floor, set[int]()
        if window is not None and how.sink == "replaced":
            low = self.sink_start = max(low, now - window)
        elif window is not None:
            low = max(low, now - (window - sink))
        if how.sink == "recomputed" and window is not None:
            self.sink_start, again = 0, set(range(sink))
        spare = window is not None and how.sink == "kept"
        self.current = {f: at for f, at in kept.items() if spare and self.in_sink(f)}
        source = {f: self.latents[at] for g in self.groups for f, at in zip(g.frames, g.members, strict=True)}
        for start, end in self.setting.bounds():
            if start < now and (end > low or again & set(range(start, end))):
                frames = [f for f in range(start, end) if f not in self.current]
                if frames:
                    self.write(frames, torch.cat([source[f] for f in frames], 1), prompt, end)
        self.current = {f: at for f, at in self.current.items() if f >= low or self.in_sink(f)}


def move(
    solver: str, x: Tensor, v: Tensor, sigma: float, after: float, old: Any, noise: Callable[[], Tensor]
) -> Tensor:
    """One step of a solver, from velocity; `old` is (sigma, velocity) of the step before."""
    if solver == "few_step" and after > 0:
        return (1 - after) * (x - sigma * v) + after * noise()
    if solver == "multistep" and old is not None and after > 0:
        h, before = after - sigma, sigma - old[0]
        return x + h * v + h * h / (2 * before) * (v - old[1])
    return x + (after - sigma) * v


def text_of(
    prompt: Tensor, switches: Sequence[Switch], starts: list[int], spoken: list[Tensor]
) -> tuple[Tensor, list[Switch]]:
    """Text of the last of the chunks that start at `starts`, and the switches that begin with it, in order.

    `spoken` are the texts of the chunks before: a blend leads from the one that was spoken last when it began.
    """
    now, before = starts[-1], starts[-2] if len(starts) > 1 else -1
    due = [s for s in switches if s.frame <= now]
    if not due:
        return prompt, []
    begins = [s for s in due if s.frame > before]
    new, first = due[-1], sum(s < due[-1].frame for s in starts)
    share = (len(starts) - first) / new.over
    if share >= 1:
        return new.text, begins
    old = spoken[first - 1] if first else prompt
    rows = max(old.shape[1], new.text.shape[1])
    old, late = (torch.cat([t, t.new_zeros(t.shape[0], rows - t.shape[1], TEXT_DIM)], 1) for t in (old, new.text))
    return (1 - share) * old + share * late, begins


def reference(
    network: WanTransformer, setting: Setting, prompt: Tensor, switches: Sequence[Switch] = (),
    *, noise: NoiseSource = NOISE, prefix: Tensor | None = None, ledger: Ledger | None = None,
    grad: Callable[[int, int], bool] = lambda chunk, step: False,
) -> list[Tensor]:  # fmt: skip
    """Latents per chunk, the past computed anew at every step. `grad` says which steps keep their graph."""
    negative = text(99, prompt.shape[0], dtype=prompt.dtype) if setting.scale != 1.0 else None
    ledger = ledger or Ledger(network, setting, negative)
    given, starts, chunks = 0 if prefix is None else prefix.shape[1], [], list[Tensor]()
    shape, spoken = (prompt.shape[0], CHANNELS, *SIZE), list[Tensor]()
    for number, (start, end) in enumerate(setting.bounds()):
        frames = range(start, end)
        starts.append(start)
        words, begins = text_of(prompt, switches, starts, spoken)
        spoken.append(words)
        if start < given:
            assert prefix is not None
            ledger.write(frames, prefix[:, start:end], words, end)
            continue
        for switch in begins if start > 0 else []:
            ledger.switch(switch, start, words)
        sigmas = setting.first_sigmas if number == 0 and setting.first_sigmas else setting.sigmas
        x, old = noise.draw(frames, 0, shape, prompt.dtype, "cpu"), None
        for step, (sigma, after) in enumerate(pairwise(sigmas)):
            told = setting.told[step] if setting.told else sigma
            with torch.set_grad_enabled(grad(number, step)):
                v = ledger.predict(frames, x, told, words)
                draw = lambda s=step: noise.draw(frames, s + 1, shape, prompt.dtype, "cpu")  # noqa: B023, E731
                x, old = move(setting.solver, x, v, sigma, after, old, draw), (sigma, v)
        ledger.write(frames, x.detach() if ledger.cut else x, words, end)
        chunks.append(x)
    return chunks
