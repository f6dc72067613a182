"""What does a shared cache save? Ca2-VDM against OS-Fix, OS-Ext and one cache per step, with the same random weights.

    python bench/ca2vdm.py                                            small, on the CPU
    python bench/ca2vdm.py --size xl --device cuda --dtype bfloat16 --compile --plot ca2vdm.png

One video of `--chunks` chunks behind what is given, all ways in turn (arXiv:2411.16375 table 5: 80 latent frames in
52.1, 77.5 and 130.1 s, ratios 1 : 1.5 : 2.5); then the time of each chunk of a longer video, where the past of OS-Ext
and of ViD-GPT, which caches all of it, has no bound (figure 6); the bytes of the caches, also at the paper's sizes
(table 6); and the parameters of STDiT-XL/2 part by part. Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unspool.causal.position import Absolute
from unspool.evaluate.ca2vdm import ExtensionConfig, Way, held_bytes, kv_bytes, ways
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout

SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": (dict(dim=32, num_layers=2, num_heads=2, freq_dim=32), 4),
    "small": (dict(dim=256, num_layers=8, num_heads=4), 8),
    "base": (dict(dim=768, num_layers=12, num_heads=12), 16),
    "xl": (dict(dim=1152, num_layers=28, num_heads=16), 32),
}
"""Sizes of the network, and rows and columns of its latents; the paper's is xl."""
PAPER_S = {"ca2vdm": 52.1, "os_fix": 77.5, "os_ext": 130.1}


@dataclass(frozen=True)
class Bench:
    """Network, latents and how they are run."""

    network: STDiT
    latents: int
    compiled: bool

    @torch.no_grad()
    def run(self, way: Way) -> list[float]:
        """Seconds of each chunk, what is given entered before."""
        device = next(self.network.parameters()).device
        given = torch.randn(1, way.given, self.network.latent_channels, self.latents, self.latents, device=device)
        stream = Rollout(
            self.network, way.config, torch.ones(1, 1, 1), noise=CounterNoise(seed=0), cache=way.cache, prefix=given,
            latent_size=(self.latents, self.latents), compiled=self.compiled,
        )  # fmt: skip
        seconds, before = [], now(device)
        for _ in stream:
            after = now(device)
            seconds.append(after - before)
            before = after
        return seconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def frames_of(way: Way) -> int:
    """Latent frames that go through the network for one denoising step of every chunk."""
    config, total = way.config, 0
    for index in range(1, config.plan.num_chunks or 0):
        frames = config.plan.frames(index)
        reach = getattr(config.visibility, "capacity", None) or frames.stop
        total += min(reach, frames.stop) if config.commit == "recompute" else len(frames)
    return total


def compare(bench: Bench, shared: ExtensionConfig, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of every way, and how many times as long as Ca2-VDM it takes, run by run."""
    chosen = ways(shared)
    for way in chosen.values():
        bench.run(way)  # kernels, and compilation of every length that comes up
    runs = [{name: sum(bench.run(way)) for name, way in chosen.items()} for _ in range(repeats)]  # in turn
    found = {}
    for name, way in chosen.items():
        found[name] = {
            "seconds": round(statistics.median(run[name] for run in runs), 4),
            "times_ca2vdm": round(statistics.median(run[name] / run["ca2vdm"] for run in runs), 3),
            "frames_per_step": frames_of(way),
        }
        if name in PAPER_S:
            found[name]["paper_times_ca2vdm"] = round(PAPER_S[name] / PAPER_S["ca2vdm"], 2)
    return found


def lengthen(bench: Bench, shared: ExtensionConfig, repeats: int) -> dict[str, list[float]]:
    """Median milliseconds of each chunk of a long video."""
    long = ways(replace(shared, unbounded=True))
    bounded, growing = long["ca2vdm"], long["os_ext"].config.visibility
    cached = replace(bounded, config=replace(bounded.config, visibility=growing, positions=Absolute()))
    chosen = {"ca2vdm": bounded, "vid_gpt": cached, "os_ext": long["os_ext"]}
    for way in chosen.values():
        bench.run(way)
    runs = [{name: bench.run(way) for name, way in chosen.items()} for _ in range(repeats)]
    return {
        name: [round(1e3 * statistics.median(each), 3) for each in zip(*(run[name] for run in runs), strict=True)]
        for name in chosen
    }


def bytes_of(shared: ExtensionConfig, network: STDiTConfig, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the caches hold at this size, and in fp16 at that of the paper with 50 steps, where the closed form is."""
    found: dict[str, Any] = {}
    for name, way in ways(shared).items():
        found[name] = vars(held_bytes(way, network, tokens=tokens, dtype=dtype))
    paper = ExtensionConfig(steps=50)
    held = {name: held_bytes(way, STDiTConfig.xl(), tokens=256) for name, way in ways(paper).items()}
    both = ways(replace(paper, prefix_frames=3))["ca2vdm"]
    held["ca2vdm_with_prefix"] = held_bytes(both, STDiTConfig.xl(prefix_attention="separate"), tokens=256)
    one = kv_bytes(layers=28, dim=1152, tokens=256, frames=25)
    formula = {
        "ca2vdm": one, "step_caches": 50 * one, "ca2vdm_with_prefix": one * 28 // 25, "os_fix": 0, "os_ext": 0,
    }  # fmt: skip
    found["paper"] = {name: {**vars(held[name]), "formula": formula[name]} for name in formula}
    return found


def parameters() -> dict[str, int]:
    """Of STDiT-XL/2 without text, part by part, counted on no device."""
    forms: dict[str, dict[str, Any]] = {
        "plain": {}, "joint": {"prefix_attention": "joint"}, "separate": {"prefix_attention": "separate"},
        "mask": {"mask_channel": True}, "both": {"prefix_attention": "separate", "mask_channel": True},
    }  # fmt: skip
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in STDiT(STDiTConfig.xl(**form)).parameters())
                  for name, form in forms.items()}  # fmt: skip
    return {
        "network": counts["plain"], "prefix attention, joint": counts["joint"] - counts["plain"],
        "prefix attention, a second layer": counts["separate"] - counts["plain"],
        "mask channel": counts["mask"] - counts["plain"], "second layer and mask": counts["both"],
    }  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    bars, lines = figure.subplots(1, 2)
    names = list(result["ways"])
    bars.bar(names, [result["ways"][name]["times_ca2vdm"] for name in names])
    bars.set_ylabel("time, times Ca2-VDM")
    for name, row in result["ms_per_chunk"].items():
        lines.plot(range(1, 1 + len(row)), row, label=name)
    lines.set_xlabel("chunk")
    lines.set_ylabel("ms per chunk")
    lines.set_ylim(bottom=0)
    lines.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--pmax", type=int, default=25)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--long", type=int, default=30, help="chunks of the long video")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps; the paper takes 100")
    parser.add_argument("--prefix-frames", type=int, help="of prefix-enhanced attention (default: none)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    sizes, latents = SIZES[args.size]
    prefix = "none" if args.prefix_frames is None else "separate"
    config, dtype = STDiTConfig(**sizes, prefix_attention=prefix), getattr(torch, args.dtype)
    torch.manual_seed(0)
    network = STDiT(config).to(args.device, dtype).eval().requires_grad_(False)
    if args.compile:
        from unspool.ops.compile import compile_backbone

        compile_backbone(network)
    bench = Bench(network, latents, args.compile)
    shared = ExtensionConfig(
        chunk=args.chunk, pmax=args.pmax, num_chunks=args.chunks, steps=args.steps, prefix_frames=args.prefix_frames
    )
    result: dict[str, Any] = {"ways": compare(bench, shared, args.repeats)}
    for name, row in result["ways"].items():
        print(f"{name}: {row['seconds']:.3f} s, {row['times_ca2vdm']:.2f} times Ca2-VDM, "
              f"{row['frames_per_step']} latent frames per step")  # fmt: skip
    result["ms_per_chunk"] = lengthen(bench, replace(shared, num_chunks=args.long), max(1, args.repeats // 2))
    for name, row in result["ms_per_chunk"].items():
        third = max(1, len(row) // 3)
        growth = statistics.median(row[-third:]) / statistics.median(row[third : 2 * third] or row)
        print(f"{name}, {len(row)} chunks: {row[0]:.1f} ms the first, {row[-1]:.1f} ms the last; last third "
              f"{growth:.2f} times the middle one")  # fmt: skip
    result["bytes"] = bytes_of(shared, config, network.tokens_per_frame(latents, latents), dtype)
    for name, row in result["bytes"]["paper"].items():
        print(f"{name} at the paper's sizes: {row['readable']:,} bytes readable (formula {row['formula']:,}), "
              f"{row['staging']:,} of staging")  # fmt: skip
    result["parameters"] = parameters()
    for name, count in result["parameters"].items():
        print(f"STDiT-XL/2, {name}: {count:,} parameters")
    if args.plot is not None:
        plot(result, args.plot)
    result["setting"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    print(json.dumps({**result, "torch": str(torch.__version__)}))


if __name__ == "__main__":
    main()
