"""How far off is what a model makes of a past that is true? By motion, in pixels, chunk after chunk.

    python bench/continuation.py --model stage
    python bench/continuation.py --model weights/stage-64-many-step --past 12 --chunks 3

A clip of one sprite is encoded, its first `--past` latent frames are given, and the next chunks are generated: of a
motion that has no choice left, the sprite has one right place in every frame. Columns: median distance from it in each
chunk (in brackets the 90th percentile), that of the codec's own copy of the clip, that of a sprite which stands still
from the last given frame on, and the share of frames in which nothing of its colour is seen. A number that looks at
one ability alone, for clips cannot tell a wrong beginning from a wrong continuation.

"speed kept", of what drifts or rises at a constant speed: the slope of the way that the model's sprites go in half a
second over the way that they should go, over the clips. 1 reads the speed off the past, 0 draws a new one. `--commit`
tells the network another level for the past than the model does. Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unspool.data.stage import StageClips, to_pixels
from unspool.data.worlds.motion import MOTIONS
from unspool.data.worlds.scorer import analyse
from unspool.data.worlds.stage import Scene, StageConfig
from unspool.engine.load import load
from unspool.engine.pipeline import Pipeline
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout

Places = NDArray[np.float64]


def scenes_of(motion: str, clips: int, frames: int) -> tuple[StageClips, list[Scene]]:
    """Clips of the split dev with one sprite that keeps to `motion`."""
    source = StageClips(StageConfig(sprites=(1.0,), events=(1.0,), motions=(motion,)), split="dev", frames=frames)
    return source, list(islice((source.scene(i) for i in count()), clips))


def true_places(scenes: list[Scene], source: StageClips) -> Places:
    """Where the sprite is, [clips, frames, 2] in stage units."""
    return np.stack([np.stack(scene.actors[0].path(source.times), axis=1) for scene in scenes])


def seen_places(frames: NDArray[np.uint8], scenes: list[Scene], fps: float) -> Places:
    """Where the sprite of the right colour is seen, NaN where it is not."""
    places = np.full((*frames.shape[:2], 2), np.nan)
    for place, own, scene in zip(places, frames, scenes, strict=True):
        for track in analyse(own, fps).tracks:
            if track.colour == scene.actors[0].look(0.0).colour:
                place[:] = np.stack([track.x, track.y], axis=1)
    return places


@torch.no_grad()
def continued(
    pipe: Pipeline, latents: torch.Tensor, scenes: list[Scene], past: int, chunks: int, commit: float | None = None
) -> torch.Tensor:
    """The true latents [b, past, c, h, w] and what the model makes of them."""
    config = pipe.spec.rollout.config()
    if commit is not None:
        config = replace(config, sigma_commit=commit)
    texts = [scene.prompts[0].caption.text for scene in scenes]
    negative = pipe.wording.states([""] * len(texts)) if config.guidance.is_active else None
    stream = Rollout(
        pipe.transformer, config, pipe.wording.states(texts), noise=CounterNoise(0),
        latent_size=(latents.shape[3], latents.shape[4]), prefix=latents[:, :past], negative=negative,
        compiled=pipe.is_compiled, cache=pipe.spec.rollout.cache,
    )  # fmt: skip
    return torch.cat([latents[:, :past], *(stream.next_chunk().latents for _ in range(chunks))], dim=1)


def speed_kept(truth: Places, seen: Places, first: int) -> float | None:
    """Slope of the models' ways over the true ones, from the last frames of the past to half a second on, over the
    clips that keep their speed; None for fewer than eight of them, speeds that hardly differ, or less than half a
    second made."""
    if truth.shape[1] < first + 9:
        return None
    before = np.hypot(*np.moveaxis(truth[:, first - 1] - truth[:, first - 5], 1, 0)) / 4
    after = np.hypot(*np.moveaxis(truth[:, first + 8] - truth[:, first - 1], 1, 0)) / 9
    ways = []
    for places in (truth, seen):
        way = places[:, first + 5 : first + 8].mean(1) - truth[:, first - 3 : first].mean(1)
        ways.append(np.hypot(*np.moveaxis(way, 1, 0)))
    keeps = (np.abs(before - after) < 0.03 * after) & ~np.isnan(ways[1])
    if keeps.sum() < 8 or ways[0][keeps].std() < 0.003:
        return None
    return round(float(np.polyfit(ways[0][keeps], ways[1][keeps], 1)[0]), 2)


def measure(
    pipe: Pipeline, motion: str, clips: int, past: int, chunks: int, commit: float | None = None
) -> dict[str, Any]:
    """The numbers of one motion, in pixels."""
    geometry, size = pipe.spec.geometry, pipe.spec.rollout.config().plan.chunk
    total = geometry.pixel_frames(past + chunks * size)
    source, scenes = scenes_of(motion, clips, total)
    frames = np.stack([scene.render(source.times, pipe.spec.height_px) for scene in scenes])
    parts = [frames[i : i + 32] for i in range(0, clips, 32)]  # so that memory does not grow with the clips
    latents = torch.cat([pipe.codec.encode(to_pixels(part).to(pipe.device)) for part in parts])
    made = continued(pipe, latents, scenes, past, chunks, commit)
    truth, first = true_places(scenes, source), geometry.pixel_frames(past)
    copy = seen_places(_frames(pipe.codec.decode(latents)), scenes, source.fps)
    seen = seen_places(_frames(pipe.codec.decode(made.to(latents.dtype))), scenes, source.fps)
    still = np.repeat(truth[:, first - 1 : first], total, axis=1)
    out: dict[str, Any] = {"unseen": round(float(np.isnan(seen[:, first:]).any(2).mean()), 3)}
    out["speed_kept"] = None if motion in ("bounces", "orbits", "rests") else speed_kept(truth, seen, first)
    for number in range(chunks):
        span = slice(first + number * (total - first) // chunks, first + (number + 1) * (total - first) // chunks)
        for name, places in (("model", seen), ("codec", copy), ("still", still)):
            off = np.hypot(*np.moveaxis(places[:, span] - truth[:, span], 2, 0)) * pipe.spec.height_px
            out[f"{name}_{number + 1}"] = [round(float(np.nanquantile(off, q)), 2) for q in (0.5, 0.9)]
    return out


def _frames(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 [b, f, y, x, 3] of pixels [b, f, 3, y, x] in [-1, 1]."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return bytes_.movedim(2, -1).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stage", help="name or folder of a causal stage model")
    parser.add_argument("--clips", type=int, default=32, help="of each motion")
    parser.add_argument("--past", type=int, default=12, help="true latent frames, whole chunks")
    parser.add_argument("--chunks", type=int, default=2, help="that are generated after them")
    parser.add_argument("--commit", type=float, default=None, help="level that is told for the past (the model's own)")
    parser.add_argument("--motions", nargs="*", default=list(MOTIONS), choices=MOTIONS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe = load(args.model, dtype=args.dtype, device=args.device)
    if not pipe.spec.is_causal:
        parser.error(f"--model {args.model} is bidirectional and continues nothing: give a causal one")
    results = {}
    numbers = range(1, args.chunks + 1)
    print(f"| motion | {' | '.join(f'chunk {n}: model, codec, still' for n in numbers)} | speed kept | unseen |")
    print("|---|" + "---|" * (args.chunks + 2))
    for motion in args.motions:
        found = results[motion] = measure(pipe, motion, args.clips, args.past, args.chunks, args.commit)
        cells = [
            ", ".join("{} ({})".format(*found[f"{what}_{n}"]) for what in ("model", "codec", "still")) for n in numbers
        ]
        kept = "-" if found["speed_kept"] is None else found["speed_kept"]
        print(f"| {motion} | {' | '.join(cells)} | {kept} | {found['unseen']} |", flush=True)
    setting = {name: getattr(args, name) for name in ("model", "clips", "past", "chunks", "commit", "dtype", "device")}
    print(json.dumps({"setting": setting, "weights": pipe.weights, "torch": str(torch.__version__), "px": results}))


if __name__ == "__main__":
    main()
