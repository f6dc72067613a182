"""What does a re-anchored sink cost: rotate its keys anew once a chunk, or keep all keys raw and rotate at every read?

Rotary attention sees differences of positions only, so the keys of a rolling window stay right as they were rotated at
write; only a sink that moves with the window needs work. Measured per chunk (4 steps and a commit) over all layers:

- `written`: rotate the new keys at every pass (what every policy pays);
- `sink`: the same, and the sink's keys anew from their first version once per chunk (`KVCache.settle`);
- `read`: keep raw keys and rotate the whole window at every pass.

Last line of the output: JSON with the three in ms per chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from unspool.ops.compile import compiled, compiler_works
from unspool.ops.rope import Rope, rotate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 8), ("heads", 6), ("head-dim", 64), ("grid", 8), ("chunk", 3), ("window", 21), ("sink", 3),
        ("passes", 5), ("repeats", 15),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    dtype, tokens = getattr(torch, args.dtype), args.grid**2
    rope = Rope.for_head(args.head_dim, (args.grid, args.grid))
    turn = compiled("unspool.ops.rope:rotate") if args.compile else rotate

    def keys(frames: int) -> torch.Tensor:
        return torch.randn(1, frames * tokens, args.heads, args.head_dim, dtype=dtype)

    new, sink, window = keys(args.chunk), keys(args.sink), keys(args.window)
    new_table = rope.tables(list(range(args.chunk)), torch.float32)
    sink_table = rope.time_tables([1] * args.sink, torch.float32)
    window_table = rope.tables(list(range(args.window)), torch.float32)
    held = torch.empty_like(sink)

    def written() -> None:
        for _ in range(args.passes * args.layers):
            turn(new, *new_table)

    def moved() -> None:
        written()
        for _ in range(args.layers):
            held.copy_(rotate(sink, *sink_table))

    def read() -> None:
        for _ in range(args.passes * args.layers):
            turn(window, *window_table)

    def clock(call: Callable[[], None]) -> float:
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)

    ways = (written, moved, read)
    with torch.no_grad():
        for way in ways:
            way()
        rounds = [[clock(way) for way in ways] for _ in range(args.repeats)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    result = dict(zip(("written", "sink", "read"), (round(m, 3) for m in medians), strict=True))
    print(json.dumps({**result, "compiled": bool(args.compile and compiler_works()), "setting": vars(args)}))


if __name__ == "__main__":
    main()
