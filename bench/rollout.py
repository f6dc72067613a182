"""How much slower is a streamed chunk than its bare matrix products and attention calls?

The whole rollout (noise, embedding, modulation, norms, rotation, cache, text attention, solver, commit pass) against
the same linear layers (q, k, v in one product) and the same `scaled_dot_product_attention` calls alone: same sizes,
dtype and machine, equal FLOPs by torch's FlopCounter, the two interleaved, medians of chunks with a full window. What
is left over is memory traffic, small kernels and Python; 1.0 would mean that none of it costs anything.

    python bench/rollout.py --dtype bfloat16 --compile
Last line of the output: JSON with ms_per_chunk, bare_ms, ratio and the setting.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Window
from unspool.diffusion.schedule import few_step
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer
from unspool.ops.compile import compile_backbone, compiler_works
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout, RolloutConfig

STEPS = (1000, 750, 500, 250)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("dim", 384), ("layers", 8), ("heads", 6), ("ffn", 1536), ("channels", 16), ("rows", 16), ("columns", 16),
        ("patch", 2), ("text-len", 32), ("text-dim", 256), ("chunk", 3), ("window", 21), ("sink", 0), ("batch", 1),
        ("chunks", 12), ("threads", 0), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def network(args: argparse.Namespace) -> WanTransformer:
    torch.manual_seed(args.seed)
    config = WanConfig(
        dim=args.dim, ffn_dim=args.ffn, num_layers=args.layers, num_heads=args.heads, in_channels=args.channels,
        out_channels=args.channels, patch_size=(1, args.patch, args.patch), text_dim=args.text_dim,
        text_len=args.text_len,
    )  # fmt: skip
    net = WanTransformer(config).eval().requires_grad_(False)
    torch.nn.init.normal_(net.head.head.weight, std=0.02)
    return net.to(args.device, getattr(torch, args.dtype))


def streamed(args: argparse.Namespace, net: WanTransformer) -> Rollout:
    config = RolloutConfig(
        plan=ChunkPlan(chunk=args.chunk), schedule=few_step(STEPS, shift=5.0),
        visibility=Window(window=args.window, sink=args.sink),
    )  # fmt: skip
    text = torch.randn(args.batch, args.text_len, args.text_dim, generator=torch.Generator().manual_seed(1))
    return Rollout(
        net, config, text.to(args.device), noise=CounterNoise(args.seed), latent_size=(args.rows, args.columns),
        compiled=args.compile,
    )  # fmt: skip


def bare(args: argparse.Namespace, net: WanTransformer) -> Callable[[], None]:
    """The matrix products and attention calls of one chunk, on tensors made beforehand."""
    dtype, device = getattr(torch, args.dtype), args.device
    d, tokens = args.dim, (args.rows // args.patch) * (args.columns // args.patch)
    n, m, head = args.chunk * tokens, args.window * tokens, args.dim // args.heads
    patch = args.channels * args.patch**2

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    x, patches, wide = make(args.batch, n, d), make(args.batch, n, patch), make(args.batch, n, args.ffn)
    q = make(args.batch, args.heads, n, head)
    # One buffer per layer, as in a real network: weights and caches compete for the CPU's caches.
    caches = [(make(args.batch, args.heads, m, head), make(args.batch, args.heads, m, head)) for _ in net.blocks]
    text = [(make(args.batch, args.heads, args.text_len, head),) * 2 for _ in net.blocks]
    features = torch.randn(1, 1, args.freq, device=device)
    embedded = torch.randn(1, 1, d, device=device)
    time_layers = [layer.float() for layer in (net.time_embedding[0], net.time_embedding[2], net.time_projection[1])]
    wide_weights = [(layer.weight.clone(), layer.bias.clone()) for layer in time_layers]  # type: ignore[union-attr, operator]
    for layer in time_layers:
        layer.to(dtype)

    def forward() -> None:
        F.linear(features, *wide_weights[0])
        F.linear(embedded, *wide_weights[1])
        F.linear(embedded, *wide_weights[2])
        F.linear(patches, net.patch_embedding.weight.flatten(1), net.patch_embedding.bias)
        for block, (k, v), (tk, tv) in zip(net.blocks, caches, text, strict=True):
            F.linear(x, block.self_attn.qkv.weight, block.self_attn.qkv.bias)  # type: ignore[union-attr, arg-type]
            F.scaled_dot_product_attention(q, k, v)
            F.linear(x, block.self_attn.o.weight, block.self_attn.o.bias)  # type: ignore[union-attr, arg-type]
            F.linear(x, block.cross_attn.q.weight, block.cross_attn.q.bias)  # type: ignore[union-attr, arg-type]
            F.scaled_dot_product_attention(q, tk, tv)
            F.linear(x, block.cross_attn.o.weight, block.cross_attn.o.bias)  # type: ignore[union-attr, arg-type]
            F.linear(x, block.ffn[0].weight, block.ffn[0].bias)  # type: ignore[union-attr, index]
            F.linear(wide, block.ffn[2].weight, block.ffn[2].bias)  # type: ignore[union-attr, index]
        F.linear(x, net.head.head.weight, net.head.head.bias)

    def chunk() -> None:
        with torch.no_grad():
            for _ in range(len(STEPS) + 1):
                forward()

    return chunk


def flops(call: Callable[[], object]) -> int:
    # The counter knows no CPU flash attention; the plain one multiplies the same matrices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    net = network(args)
    args.freq = net.config.freq_dim
    alone = bare(args, net)
    counted = streamed(argparse.Namespace(**{**vars(args), "compile": False}), net)
    for _ in range(-(-args.window // args.chunk) + 1):
        counted.next_chunk()
    ours, theirs = flops(counted.next_chunk), flops(alone)
    began = time.perf_counter()
    if args.compile:
        compile_backbone(net)
    stream = streamed(args, net)
    for _ in range(-(-args.window // args.chunk) + 2):
        stream.next_chunk()
    warm_s = time.perf_counter() - began

    def clock(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return 1000 * (time.perf_counter() - began)

    clock(alone)
    pairs = [(clock(stream.next_chunk), clock(alone)) for _ in range(args.chunks)]
    chunk_ms, bare_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{args.chunks} chunks, window {args.window} full; warm-up (with compilation) {warm_s:.1f} s")
    print(f"per chunk {chunk_ms:.1f} ms, bare {bare_ms:.1f} ms; GFLOP {ours / 1e9:.3f} against {theirs / 1e9:.3f}")
    setting = {k: v for k, v in vars(args).items() if k not in ("freq",)}
    print(
        json.dumps(
            {
                "ms_per_chunk": round(chunk_ms, 2), "bare_ms": round(bare_ms, 2), "ratio": round(ratio, 3),
                "flops": ours, "bare_flops": theirs, "compiled": bool(args.compile and compiler_works(args.device)),
                "setting": setting, "torch": torch.__version__, "threads": torch.get_num_threads(),
                "cpu": platform.processor() or platform.machine(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
