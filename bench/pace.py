"""Do frames leave at an even pace? Gaps between deliveries, by whole chunks and by pieces decoded between passes.

    python bench/pace.py --model stage --dtype bfloat16

As fast as the model goes, one stream; a gap is the time from one delivery to the next. An even stream has a longest gap
near its mean one. Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator

import torch

from unspool.engine.load import load
from unspool.engine.session import Session

PROMPT, WARM = "a red ball bounces at sunset", 3


def deliveries(session: Session, by_pieces: bool, chunks: int) -> Iterator[int]:
    """Frames of each delivery."""
    for _ in range(chunks):
        if by_pieces:
            for piece in session.pieces():
                yield len(piece)
        else:
            yield len(session.next_chunk())


def measure(session: Session, by_pieces: bool, chunks: int) -> dict[str, float]:
    for _ in deliveries(session, by_pieces, WARM):
        pass
    gaps, total, before = [], 0, time.perf_counter()
    began = before
    for frames in deliveries(session, by_pieces, chunks):
        now = time.perf_counter()
        gaps.append(now - before)
        before, total = now, total + frames
    fps = total / (before - began)
    return {
        "fps": round(fps, 1),
        "gap_ms_p50": round(1e3 * statistics.median(gaps), 1),
        "gap_ms_p95": round(1e3 * sorted(gaps)[int(0.95 * len(gaps))], 1),
        "waits_for_frames": round(sorted(gaps)[int(0.95 * len(gaps))] * fps, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stage")
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    model = load(args.model, dtype=args.dtype, device=args.device, compile=args.compile)
    found: dict[str, list[dict[str, float]]] = {"chunks": [], "pieces": []}
    for _ in range(args.repeats):  # interleaved: the machine may be shared
        for name, rows in found.items():
            rows.append(measure(model.session(PROMPT), name == "pieces", args.chunks))
    middle = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    for name, row in middle.items():
        print(f"{name}: {row['fps']:.1f} frames/s; gaps {row['gap_ms_p50']:.1f} ms (p95 {row['gap_ms_p95']:.1f}), in "
              f"which {row['waits_for_frames']:.1f} frames would have been due")  # fmt: skip
    print(json.dumps({**middle, "setting": vars(args), "torch": str(torch.__version__)}))


if __name__ == "__main__":
    main()
