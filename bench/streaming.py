"""With which window, sink, positions, commit noise and switch policy does a model stream best? Measured, not argued.

    python bench/streaming.py --model stage --prompts 16 --seconds 50
    python bench/streaming.py --arms "window=9" "window=9 sink=0" "sigma_commit=0.1"
    python bench/streaming.py --parts switches --arms "" "switch_policy=recache" "switch_policy=flush"

Every arm changes the model's own settings ("": the model as it is) and makes the same prompts with the same noise, of
the split "dev": what is chosen here is not what is reported. "streams": long ones under one prompt; "switches":
`--prompts` changes of prompt of each kind. Run again with the same --out it continues. Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unspool.config import apply_overrides
from unspool.engine.load import load
from unspool.engine.pipeline import Pipeline
from unspool.evaluate.protocol import StageProtocol, StreamProtocol, SwitchProtocol
from unspool.evaluate.report import shown, summarise
from unspool.evaluate.runner import Arm, Progress
from unspool.evaluate.stage import STUDENT, Evaluation

ARMS = ("", "window=9", "window=12", "window=15", "window=30", "sink=0", "window=9 sink=0", "sigma_commit=0.05",
        "sigma_commit=0.15")  # fmt: skip
COLUMNS = {
    "adherence": "adherence", "strict": "all right", "psnr": "manifold dB", "motion_over_truth": "motion / truth",
    "boundary_step": "boundary step", "first": "first segment", "change": "last minus first",
    "p50": "change of prompt, p50 s", "p90": "p90 s", "never": "never", "untouched": "untouched",
}  # fmt: skip
SWITCHES = ("p50", "p90", "never", "untouched")


def variant(base: Pipeline, changes: str) -> Pipeline:
    """The same networks under other settings."""
    return base.with_settings(apply_overrides(base.spec.rollout, tuple(changes.split())))


def measure(pipeline: Pipeline, config: StageProtocol, folder: Path, parts: list[str]) -> dict[str, Any]:
    """Means over the whole streams, and what the last segment lost; how changes of prompt are followed."""
    evaluation = Evaluation(config, Arm(name=STUDENT, pipeline=pipeline), folder=folder, progress=Progress())
    results = evaluation.run(parts)
    summary = summarise(evaluation, results)
    times = evaluation.times.get(STUDENT)
    out: dict[str, Any] = {"fps": round(times.frames / times.seconds, 1) if times and times.seconds else None}
    if "switches" in parts:
        out |= {name: shown(summary.switches["all"][STUDENT][name]) for name in SWITCHES}
    if "streams" not in parts:
        return out
    segments = summary.streams[STUDENT]
    for name in ("adherence", "strict", "psnr", "motion_over_truth", "boundary_step"):
        values = [segment[name].value for segment in segments if name in segment]
        out[name] = round(sum(values) / len(values), 4)
    out["first"] = round(segments[0]["adherence"].value, 4)
    out["change"] = shown(summary.lasting[STUDENT]["adherence_last_minus_first"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stage", help="name or folder of a causal stage model")
    parser.add_argument("--arms", nargs="*", default=ARMS, help='settings of an arm as "a=b c=d"')
    parser.add_argument("--parts", nargs="*", choices=("streams", "switches"), default=["streams"])
    parser.add_argument("--prompts", type=int, default=16, help="streams, and changes of prompt of each kind")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("out/streaming"))
    args = parser.parse_args()
    base = load(args.model, dtype=args.dtype, device=args.device, compile=args.compile)
    pipelines = {name: variant(base, name) for name in args.arms}  # all refusals before any work
    config = StageProtocol(
        streams=StreamProtocol(prompts=args.prompts, seconds=args.seconds, split="dev"),
        switches=SwitchProtocol(per_kind=args.prompts, split="dev"),
    )
    base.generate_many(["a red ball bounces"] * args.prompts, frames=105)  # compiles, so that no arm's time holds it
    results = {}
    for name, pipeline in pipelines.items():
        results[name or "as it is"] = measure(pipeline, config, args.out, args.parts)
        print(name or "as it is", results[name or "as it is"], flush=True)
    columns = {name: label for name, label in COLUMNS.items() if name in next(iter(results.values()))}
    print(f"\n| arm | {' | '.join(columns.values())} | frames/s, {args.prompts} together |")
    print("|---" * (len(columns) + 2) + "|")
    for name, row in results.items():
        cells = [row[c] if isinstance(row[c], str) else f"{row[c]:.3f}" for c in columns]
        print(f"| {name} | {' | '.join(cells)} | {row['fps']} |")
    print(json.dumps({"model": base.weights, "prompts": args.prompts, "seconds": args.seconds, "arms": results}))


if __name__ == "__main__":
    main()
