"""`unspool demo`: stream a small seeded network chunk by chunk and write what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unspool.models.wan.network import WanTransformer
    from unspool.rollout.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Args:
    """Roll out a small network with random weights and an identity codec: the whole path, no download, no training.

    The weights are random, so what you see is texture and not a scene; the second prompt shows as another tint. What it
    shows is that the parts work together: a bounded key/value cache, a few denoising steps and one commit pass a chunk,
    and a prompt that changes half-way.
    """

    out: str = "out/demo.mp4"
    """Video to write (.mp4, .gif, .webp, .npy or .png); a contact sheet is written beside it."""
    chunks: int = 16
    """Chunks of three latent frames."""
    window: int = 12
    """Latent frames that a chunk reads, itself and the sink included."""
    sink: int = 3
    """First latent frames that are always kept."""
    switch: Literal["keep", "recache", "recache_bidirectional", "flush"] = "recache"
    """What happens to the cached past when the prompt changes half-way."""
    seed: int = 1
    """Of the weights, the prompts and the noise."""
    fps: float = 12.0
    """Frames per second of the video."""


SIZE, CHUNK, ENLARGE = 48, 3, 4


def run(args: Args) -> int:
    import torch

    from unspool.engine.export import check_target, contact_sheet, time_labels, write_video

    if args.chunks < 1:
        raise ValueError(f"--chunks {args.chunks}: expected at least 1")
    target = Path(args.out)
    if target.parent != Path("."):
        target.parent.mkdir(parents=True, exist_ok=True)
    check_target(target)
    with torch.no_grad():
        stream = _stream(args)
        frames: list[NDArray[np.uint8]] = []
        began = time.perf_counter()
        write_video(target, _progress(stream, args, frames), args.fps, metadata=_settings(args))
    took = time.perf_counter() - began
    shown = [f for block in frames for f in block]
    every = max(1, len(shown) // 24)
    picked = shown[::every][:24]
    sheet = target.with_name(target.stem + "_sheet.png")
    labels = time_labels(range(0, len(shown), every), args.fps)[: len(picked)]
    import numpy as np

    contact_sheet(np.stack(picked), columns=8, scale=1, labels=labels).save(sheet)
    num_bytes = stream.branches.num_bytes
    print(f"{len(shown)} frames in {took:.1f} s ({len(shown) / took:.1f} frames/s, video writing included)")
    print(f"cache {num_bytes / 2**20:.2f} MiB, the same for a stream of any length")
    print(f"video {target}\nsheet {sheet}")
    return 0


def _network(seed: int) -> WanTransformer:
    """Random weights between an input and an output that know each other: a mosaic instead of plain noise."""
    import torch

    from unspool.models.wan.config import WanConfig
    from unspool.models.wan.network import WanTransformer

    config = WanConfig(
        dim=96, ffn_dim=192, num_layers=4, num_heads=4, in_channels=3, out_channels=3, patch_size=(1, 4, 4),
        text_dim=32, text_len=8, freq_dim=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    net = WanTransformer(config).eval().requires_grad_(False)
    patch = config.in_channels * 16
    basis = torch.linalg.qr(torch.randn(config.dim, patch)).Q  # hidden directions that carry the input
    net.patch_embedding.weight.copy_(basis.reshape(net.patch_embedding.weight.shape))
    # The head gives the input back, so that x0 = x - sigma velocity loses its noise, and adds one colour per patch that
    # attention, text and time have made. The network's patches are ordered (row, column, channel), the input's
    # (channel, row, column).
    order = torch.arange(patch).reshape(config.in_channels, 16).T.flatten()
    free = torch.eye(config.dim) - basis @ basis.T  # directions that only the blocks write
    colour = free @ torch.randn(config.dim, config.in_channels) @ torch.eye(config.in_channels).repeat(1, 16)
    net.head.head.weight.copy_((basis[:, order] * (patch / config.dim) ** 0.5 + 0.18 * colour).T)
    net.head.modulation.zero_()
    for block in net.blocks:
        torch.nn.init.normal_(block.modulation, std=0.25)  # type: ignore[arg-type]
        block.cross_attn.o.weight.mul_(8.0)  # type: ignore[union-attr, operator]
    return net


def _stream(args: Args) -> Rollout:
    import torch

    from unspool.causal.chunks import ChunkPlan
    from unspool.causal.visibility import Window
    from unspool.diffusion.schedule import few_step
    from unspool.rollout.noise import CounterNoise
    from unspool.rollout.prompts import PromptTimeline, Switch
    from unspool.rollout.rollout import Rollout, RolloutConfig

    config = RolloutConfig(
        plan=ChunkPlan(chunk=CHUNK, num_frames=CHUNK * args.chunks),
        schedule=few_step((1000, 750, 500, 250), shift=5.0),
        visibility=Window(window=args.window, sink=args.sink),
    )
    net = _network(args.seed)
    prompts = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(args.seed))
    half = CHUNK * (args.chunks // 2)
    switches = [Switch(frame=half, text=prompts[1], policy=args.switch)] if half else []
    timeline = PromptTimeline(prompts[0], switches)
    return Rollout(net, config, timeline, noise=CounterNoise(args.seed), latent_size=(SIZE, SIZE))


def _progress(stream: Rollout, args: Args, frames: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """uint8 frames [n, h, w, 3] chunk by chunk, with a progress line on a terminal."""
    from unspool.models.identity import IdentityCodec

    codec, state = IdentityCodec(), None
    began = time.perf_counter()
    for chunk in stream:
        pixels, state = codec.decode_stream(chunk.latents, state)
        block = _uint8(pixels)
        frames.append(block)
        yield block
        if chunk.switched:
            print(f"\rprompt switch ({args.switch}) at latent frame {chunk.frames.start}" + " " * 20, file=sys.stderr)
        done = chunk.index + 1
        rate = done / (time.perf_counter() - began)
        end = "\r" if sys.stderr.isatty() and done < args.chunks else "\n"
        if sys.stderr.isatty() or done == args.chunks:
            print(f"chunk {done}/{args.chunks}  {rate * CHUNK:.1f} frames/s", end=end, file=sys.stderr, flush=True)


def _uint8(pixels) -> NDArray[np.uint8]:  # type: ignore[no-untyped-def]
    from einops import rearrange

    scaled = ((pixels[0] * 0.22 + 0.5).clamp(0, 1) * 255).round().byte()
    enlarged = scaled.repeat_interleave(ENLARGE, -1).repeat_interleave(ENLARGE, -2)
    return rearrange(enlarged, "f c y x -> f y x c").contiguous().numpy()


def _settings(args: Args) -> dict[str, object]:
    from dataclasses import asdict

    return {"command": "demo", **asdict(args)}
