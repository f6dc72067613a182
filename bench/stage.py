"""How many frames of the Sprite Stage does one core draw, and how many does it score?

Measured on one thread over the same clips: `scenes` making up scenes (per second), `frames` drawing them, `scored`
scoring them (frames per second). Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before numpy is imported


def main() -> None:
    from unspool.data.worlds.scorer import score_clip
    from unspool.data.worlds.stage import Stage, frame_times

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (
        ("clips", 100), ("scored", 10), ("size", 64), ("sprites", 2), ("events", 1), ("frames", 81),
    ):  # fmt: skip
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    stage, times = Stage(), frame_times(args.frames, 16.0)
    stage.scene("train", 0).render(times, args.size)

    began = time.process_time()
    scenes = [stage.scene("train", i, sprites=args.sprites, events=args.events) for i in range(args.clips)]
    made = time.process_time()
    for scene in scenes:
        scene.render(times, args.size)
    drawn = time.process_time()
    clips = [(scene.render(times, args.size), scene.prompts) for scene in scenes[: args.scored]]
    score_clip(clips[0][0], 16.0, clips[0][1])  # fills the banks of curves
    scoring = time.process_time()
    for frames, prompts in clips:
        score_clip(frames, 16.0, prompts)
    scored = time.process_time()
    result = {
        "scenes_per_s": round(args.clips / (made - began)),
        "frames_per_s": round(args.clips * args.frames / (drawn - made)),
        "scored_frames_per_s": round(len(clips) * args.frames / (scored - scoring)),
        "size_px": args.size,
        "sprites": args.sprites,
    }
    print(
        f"{args.clips} clips of {args.frames} frames, {args.size} px, {args.sprites} sprites; one core, processor time"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
