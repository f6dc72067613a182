"""Does a stream stay flat: bytes, live tensors, resident memory and time per chunk over 10,000 chunks?

A tiny network with a window, a sink and prompt switches of every policy. Also, as a plot, what the cache saves: time of
chunk k with a cache against recomputing the whole past without one.

    python bench/flatness.py --chunks 10000
    python bench/flatness.py --growth --out docs/img/growth.png
Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from array import array
from pathlib import Path

import torch

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.mask import causal_mask
from unspool.causal.position import Absolute, WindowRelative
from unspool.causal.visibility import Full, Window
from unspool.diffusion.schedule import few_step
from unspool.evaluate.exactness import random_network
from unspool.models.base import Conditioning
from unspool.models.wan.network import WanTransformer
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout, RolloutConfig

POLICIES = (
    {"policy": "keep"},
    {"policy": "recache", "sink": "kept"},
    {"policy": "recache", "sink": "replaced"},
    {"policy": "recache", "sink": "recomputed"},
    {"policy": "recache_bidirectional", "sink": "kept"},
    {"policy": "flush"},
    {"policy": "keep", "over": 4},
)
SIZE, CHUNK, EVERY = (4, 6), 3, 37
GROWTH_SIZE = (8, 8)


def live_tensors() -> tuple[int, int]:
    """Number and bytes of all tensors that are alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at every object wakes deprecated ones
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return len(tensors), sum(t.numel() * t.element_size() for t in tensors)


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def fastest(times: list[float]) -> float:
    """Mean of the fastest quarter."""
    return statistics.fmean(sorted(times)[: max(len(times) // 4, 1)])


def slope_per_1000(values: list[tuple[int, float]]) -> float:
    """Least-squares slope of the values per 1000 chunks."""
    xs, ys = [x / 1000 for x, _ in values], [y for _, y in values]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def flat(chunks: int) -> dict[str, object]:
    """Stream `chunks` chunks and report what grows."""
    net = random_network(torch.float32, layers=2)
    config = RolloutConfig(
        plan=ChunkPlan(chunk=CHUNK),
        schedule=few_step((1000, 500), shift=5.0),
        visibility=Window(window=9, sink=3),
        positions=WindowRelative(),
    )
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(3, 1, 10, 24, generator=generator)
    stream = Rollout(net, config, texts[0], noise=CounterNoise(0), latent_size=SIZE)
    times = array("d", bytes(8 * chunks))  # made beforehand: the measurement must not grow
    samples: list[tuple[int, int, int, int, int]] = []
    for index in range(chunks):
        if index and index % EVERY == 0:
            stream.switch(texts[index // EVERY % 3], **POLICIES[index // EVERY % len(POLICIES)])  # type: ignore[arg-type]
        began = time.perf_counter()
        chunk = stream.next_chunk()
        times[index] = 1000 * (time.perf_counter() - began)
        if not torch.isfinite(chunk.latents).all():
            raise SystemExit(f"chunk {index} is not finite")
        if index % max(chunks // 40, 1) == 30 % max(chunks // 40, 1) and index >= 30:
            count, size = live_tensors()
            samples.append((index, count, size, stream.branches.num_bytes, resident_bytes()))
    early, late = (  # without the chunks that recache
        [t for i, t in enumerate(times) if first <= i < first + 100 and i % EVERY >= 5] for first in (100, chunks - 100)
    )
    settled = samples[len(samples) // 4 :]
    return {
        "chunks": chunks,
        "ms_100_200": round(statistics.median(early), 3),
        "ms_last_100": round(statistics.median(late), 3),
        "time_ratio": round(statistics.median(late) / statistics.median(early), 3),
        "time_ratio_fastest_quarter": round(fastest(late) / fastest(early), 3),  # less noise of the machine
        "cache_bytes": sorted({s[3] for s in samples}),
        "live_tensors": [min(s[1] for s in settled), max(s[1] for s in settled)],
        "live_bytes": [min(s[2] for s in settled), max(s[2] for s in settled)],
        "rss_mib_start_end": [round(settled[0][4] / 2**20, 1), round(settled[-1][4] / 2**20, 1)],
        "rss_kib_per_1000_chunks": round(slope_per_1000([(s[0], s[4] / 1024) for s in settled]), 1),
    }


@torch.no_grad()
def uncached_ms(net: WanTransformer, chunk: int, repeats: int) -> float:
    """Time of one chunk when every step recomputes the whole past with it (no cache, masked forward)."""
    frames = CHUNK * chunk
    x = torch.randn(1, frames, 4, *GROWTH_SIZE)
    cond = Conditioning(prompts=net.prepare(torch.randn(1, 10, 24)))
    mask = causal_mask(ChunkPlan(chunk=CHUNK), frames, Full(), Absolute())
    context = FullSequence(frames, mask)
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(4):
            net(x, torch.rand(1, frames), cond, context)
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def growth(out: Path | None) -> dict[str, object]:
    """Time of chunk 5, 10, 50, 100: all the past in a cache, a window in a cache, and without a cache."""
    net = random_network(torch.float32)
    uncached_ms(net, 5, 3)  # the first calls pay for what is made once
    text = torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(0))
    asked = (5, 10, 50, 100)
    table: dict[str, list[float]] = {}
    for name, visibility in (("all the past, cached", Full()), ("window 21, cached", Window(window=21))):
        config = RolloutConfig(
            plan=ChunkPlan(chunk=CHUNK), schedule=few_step((1000, 750, 500, 250), shift=5.0), visibility=visibility
        )
        stream = Rollout(net, config, text, noise=CounterNoise(0), latent_size=GROWTH_SIZE)
        times = []
        for _ in range(max(asked) + 4):
            began = time.perf_counter()
            stream.next_chunk()
            times.append(1000 * (time.perf_counter() - began))
        table[name] = [round(statistics.median(times[k - 3 : k + 4]), 2) for k in asked]
    table["no cache"] = [round(uncached_ms(net, k, 5), 2) for k in asked]
    if out is not None:
        plot(table, asked, out)
    return {"chunk": list(asked), "ms": table}


def plot(table: dict[str, list[float]], asked: tuple[int, ...], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (name, values), marker in zip(table.items(), "os^", strict=True):
        axes.plot(asked, values, marker=marker, label=name)
        axes.annotate(f"{values[-1]:.0f} ms", (asked[-1], values[-1]), textcoords="offset points", xytext=(4, 6))
    axes.set(xscale="log", yscale="log", xlabel="chunk of the stream", ylabel="ms per chunk")
    axes.set_xticks(asked, [str(k) for k in asked])
    axes.set_title("Cost of a chunk with and without a cache (tiny network, 2 cores)")
    axes.grid(True, which="both", alpha=0.25)
    axes.margins(x=0.16, y=0.1)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--growth", action="store_true", help="measure the cost of chunk 5, 10, 50, 100 instead")
    parser.add_argument("--out", type=Path, default=None, help="write the plot of --growth here")
    args = parser.parse_args()
    print(json.dumps(growth(args.out) if args.growth else flat(args.chunks)))


if __name__ == "__main__":
    main()
