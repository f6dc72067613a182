"""How much sooner does a few-step causal student show its first chunk than its teacher, and how much faster is it?

CausVid's two claims (arXiv:2412.07772 Table 3: 160 times and 16 times), on the same clip of 21 latent frames (81
frames): the bidirectional teacher makes it in 50 steps with guidance, all at once; the student in chunks of 3 through
its cache, in its few steps. Same machine, dtype and codec, text encoded before the clock starts, both compiled, the two
interleaved. `predicted` is what the floating-point operations say (torch's FlopCounter over the same calls, without the
codec); `network` is measured without the codec, `with codec` to the frames.

    python bench/claims.py --size 128          sizes of the 128 px recipes, random weights: the time is the same
    python bench/claims.py --student stage --teacher weights/stage-64-teacher
Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unspool.engine.load import load
from unspool.engine.model_folder import Part
from unspool.engine.pipeline import Pipeline
from unspool.engine.stream import Stream
from unspool.models.caption import CaptionEncoder
from unspool.models.taehv import Taehv
from unspool.models.wan.network import WanTransformer
from unspool.ops.compile import compile_backbone, compiler_works
from unspool.recipes.stage import codec_64, codec_128, network_64, network_128
from unspool.recipes.stage_distil import FEW_STEPS
from unspool.recipes.stage_folder import describe_model, usual_rollout
from unspool.recipes.stage_parts import CLIP, caption_config

PROMPT = "a red ball bounces at sunset"
PAPER = {"first": 160.0, "all": 16.0}


@dataclass
class Times:
    """Seconds to the first chunk and to the last, by what is counted."""

    first: float
    all: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(64, 128), default=128)
    parser.add_argument("--student", help="model name or folder; random weights of --size if not given")
    parser.add_argument("--teacher", help="model folder of the teacher")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--piece", type=int, default=1, help="latent frames decoded at a time: 1 as streams do, 3 a chunk"
    )
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def models(args: argparse.Namespace) -> tuple[Pipeline, Pipeline]:
    """(student, teacher)."""
    if args.student or args.teacher:
        options: dict[str, Any] = {"device": args.device, "dtype": args.dtype}
        return load(args.student or "stage", **options), load(args.teacher, **options)
    torch.manual_seed(0)
    codec_config = {64: codec_64, 128: codec_128}[args.size]().codec
    made = []
    for kind, few in (("causal", FEW_STEPS), ("bidirectional", None)):
        network = WanTransformer({64: network_64, 128: network_128}[args.size]())
        torch.nn.init.normal_(network.head.head.weight, std=0.02)
        rollout = usual_rollout(kind, few=few)  # type: ignore[arg-type]
        spec = describe_model(kind=kind, size_px=args.size, transformer=Part(kind="wan"), rollout=rollout)  # type: ignore[arg-type]
        modules = [m.to(args.device, getattr(torch, args.dtype)).eval().requires_grad_(False)
                   for m in (network, Taehv(codec_config), CaptionEncoder(caption_config()))]  # fmt: skip
        made.append(Pipeline(spec, transformer=modules[0], codec=modules[1], text=modules[2], source="random weights"))  # type: ignore[arg-type]
    return made[0], made[1]


def stream(pipeline: Pipeline) -> Stream:
    """A fresh stream; a bidirectional model's is one clip of 21 latent frames."""
    whole = None if pipeline.spec.is_causal else CLIP
    return Stream(pipeline, [PROMPT], seed=0, samples=[0], settings=pipeline.settings(), whole=whole)


def run(pipeline: Pipeline, *, piece: int) -> Times:
    """Make the clip once; decode `piece` latent frames at a time (0: not at all)."""
    one, chunk = stream(pipeline), pipeline.settings().chunk
    synchronise(pipeline)
    began, first, made = time.perf_counter(), math.nan, 0
    while made < CLIP:
        latents = one.rollout.next_chunk().latents
        for ready in latents.split(chunk, dim=1):  # a whole clip's first frames need not wait for the last ones
            for part in ready.split(piece, dim=1) if piece else ():
                one.decoder.next(part)
            synchronise(pipeline)
            first = time.perf_counter() - began if math.isnan(first) else first
            made += ready.shape[1]
    return Times(first, time.perf_counter() - began)


def synchronise(pipeline: Pipeline) -> None:
    if pipeline.device.type != "cpu":
        torch.accelerator.synchronize()


def work(pipeline: Pipeline) -> Times:
    """Floating-point operations of the network to the first chunk and to the last one."""
    one = stream(pipeline)
    counts: list[int] = []
    while len(counts) < (CLIP // pipeline.settings().chunk if pipeline.spec.is_causal else 1):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            one.rollout.next_chunk()
        counts.append(counter.get_total_flops())
    return Times(counts[0], sum(counts))


def ratios(student: Times, teacher: Times) -> dict[str, float]:
    return {"first": round(teacher.first / student.first, 1), "all": round(teacher.all / student.all, 1)}


def main() -> None:
    args = arguments()
    pair = models(args)
    predicted = ratios(*(work(p) for p in pair))
    began = time.perf_counter()
    if args.compile:
        for pipeline in pair:
            compile_backbone(pipeline.transformer)  # type: ignore[arg-type]
            pipeline.is_compiled = True
    for pipeline in pair:
        run(pipeline, piece=args.piece)
    warm_s = time.perf_counter() - began
    found: dict[str, Any] = {"predicted": predicted}
    for name, piece in (("network", 0), ("with codec", args.piece)):
        times = [[run(p, piece=piece) for p in pair] for _ in range(args.repeats)]
        student, teacher = (
            Times(statistics.median(t.first for t in column), statistics.median(t.all for t in column))
            for column in zip(*times, strict=True)
        )
        found[name] = ratios(student, teacher)
        found[f"{name} seconds"] = {
            "student first": round(student.first, 4), "student all": round(student.all, 4),
            "teacher first": round(teacher.first, 4), "teacher all": round(teacher.all, 4),
        }  # fmt: skip
    print(f"{pair[0].spec.width_px} px, {CLIP} latent frames; {pair[0].settings().steps} steps against "
          f"{pair[1].settings().steps} with guidance; {args.repeats} repeats, warm-up {warm_s:.0f} s")  # fmt: skip
    print("teacher's time over student's     first chunk   whole clip")
    for name in ("predicted", "network", "with codec"):
        print(f"{name:32s} {found[name]['first']:12.1f} {found[name]['all']:12.1f}")
    print(f"{'CausVid (paper, one H100)':32s} {PAPER['first']:12.1f} {PAPER['all']:12.1f}")
    found |= {
        "setting": vars(args), "compiled": bool(args.compile and compiler_works(args.device)),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
