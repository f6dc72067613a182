"""Does a model hold out for hours? 10,000 chunks of a trained one: time, memory, and what the scorer says on the way.

    python bench/endurance.py --chunks 10000 --prompts 4
    python bench/endurance.py --model runs/stage-64/model --chunks 600 --every 50 --out docs/img/endurance.png

    python bench/endurance.py --motions bounces "drifts left" "drifts right" rises orbits rests

Every `--every` chunks five seconds of each stream are scored against their prompt, and their motion against that
of the stage's own scene at the same time. Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unspool.data.worlds.scorer import analyse, score
from unspool.engine.load import load
from unspool.engine.stream import Stream
from unspool.evaluate.protocol import StageProtocol, StreamProtocol, stream_cases

WINDOW_S, WARM = 5.0, 16
"""Seconds that are scored at a time; first chunks whose time does not count."""


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


class Watch:
    """Scores windows of the streams. `cases`: their scenes."""

    def __init__(self, cases: list[Any], fps: float) -> None:
        self.cases, self.fps = cases, fps

    def window(self, frames: np.ndarray[Any, np.dtype[np.uint8]], first: int) -> dict[str, float]:
        """Means over the streams of frames [b, f, h, w, 3] that begin at frame `first`."""
        times = (first + np.arange(frames.shape[1])) / self.fps
        rows, speeds = [], []
        for own, case in zip(frames, self.cases, strict=True):
            found = score(analyse(own, self.fps), case.scene.prompts)
            truth = case.scene.render(times, own.shape[1], own.shape[2])
            true = score(analyse(truth, self.fps), case.scene.prompts)
            rows.append((found.adherence, found.strict, found.psnr))
            speeds.append((found.speed, true.speed))
        own_speed, true_speed = np.nansum(np.array(speeds, float), 0)
        names = ("adherence", "strict", "psnr")
        means = dict(zip(names, np.nanmean(np.array(rows, float), 0).tolist(), strict=True))
        return {**means, "motion_over_truth": float(own_speed / true_speed)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    pipeline = load(args.model, dtype=args.dtype, device=args.device, compile=args.compile)
    fps = pipeline.spec.fps
    frames_per_chunk = pipeline.settings().chunk * pipeline.spec.geometry.temporal
    config = StageProtocol(streams=StreamProtocol(prompts=args.prompts, motions=tuple(args.motions)))
    cases = stream_cases(config, args.chunks * frames_per_chunk / fps + WINDOW_S)
    watch = Watch(cases, fps)
    stream = Stream(
        pipeline, [case.caption for case in cases], seed=0, samples=list(range(len(cases))),
        settings=pipeline.settings(), whole=None,
    )  # fmt: skip
    length, rows, kept, times = round(WINDOW_S * fps), [], [], []
    began, first = time.perf_counter(), 0
    while stream.index < args.chunks:
        if stream.index % args.every == 0:
            kept, first = [], stream.clock.first_frame(stream.index)
        before = time.perf_counter()
        chunk = stream.next_chunk()
        times.append(time.perf_counter() - before)
        wanted = sum(part.shape[1] for part in kept) < length and first >= 0
        if wanted:
            kept.append(chunk)
            if sum(part.shape[1] for part in kept) >= length:
                row = {"chunk": stream.index, "cache_bytes": stream.num_bytes, "resident_bytes": resident_bytes(),
                       "chunk_s": statistics.median(times[WARM:][-args.every:] or times),
                       **watch.window(np.concatenate(kept, 1)[:, :length], first)}  # fmt: skip
                rows.append(row)
                first = -1
                print(f"chunk {row['chunk']:6d} ({time.perf_counter() - began:6.0f} s): adherence "
                      f"{row['adherence']:.3f}, all right {row['strict']:.2f}, {row['psnr']:.1f} dB, motion "
                      f"{row['motion_over_truth']:.2f}, {row['chunk_s'] * 1e3:.0f} ms a chunk", flush=True)  # fmt: skip
    return {"rows": rows, **summary(rows, times), "seconds": round(time.perf_counter() - began)}


def summary(rows: list[dict[str, float]], times: list[float]) -> dict[str, Any]:
    """The last tenth of the run against the first ten windows."""
    head, tail = rows[: min(10, len(rows))], rows[-max(1, len(rows) // 10) :]
    out: dict[str, Any] = {
        name: [round(statistics.fmean(r[name] for r in part), 4) for part in (head, tail)]
        for name in ("adherence", "strict", "psnr", "motion_over_truth")
    }
    own = times[WARM:]
    tenth = max(len(own) // 10, 1)
    out["time_last_over_first_tenth"] = round(statistics.median(own[-tenth:]) / statistics.median(own[:tenth]), 3)
    out["cache_bytes"] = sorted({row["cache_bytes"] for row in rows[1:]})
    out["resident_growth_bytes"] = rows[-1]["resident_bytes"] - rows[min(1, len(rows) - 1)]["resident_bytes"]
    return out


def plot(rows: list[dict[str, float]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"adherence": "adherence", "psnr": "manifold PSNR, dB", "motion_over_truth": "motion over truth",
              "chunk_s": "seconds a chunk"}  # fmt: skip
    for place, (name, label) in enumerate(panels.items()):
        axes = figure.add_subplot(2, 2, place + 1)
        axes.plot([row["chunk"] for row in rows], [row[name] for row in rows], linewidth=1)
        axes.set_xlabel("chunk")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stage", help="name or folder of a causal stage model")
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=4, help="streams in one batch")
    parser.add_argument("--every", type=int, default=100, help="chunks from one scored window to the next")
    parser.add_argument("--motions", nargs="+", default=StreamProtocol().motions, help="of the sprites asked for")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="also draw the curves into this file")
    args = parser.parse_args()
    found = run(args)
    if args.out:
        plot(found["rows"], args.out)
    found |= {"setting": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
              "torch": str(torch.__version__), "threads": torch.get_num_threads()}  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
