"""Paths of a teacher's sampler, stored for a student to learn from: ODE pairs (arXiv:2412.07772 section 4.2).

From a bidirectional teacher a path follows the prompts alone; from a causal one (arXiv:2602.02214) every chunk of it is
sampled with the clean clip before it as its past. The data set is a folder of latents (`ShardWriter`) with one array
more; its header states the teacher, its steps, shift and guidance, and the sigmas of what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import Context, FullSequence
from unspool.causal.mask import teacher_forcing_mask
from unspool.causal.position import Absolute, PositionPolicy
from unspool.causal.visibility import Visibility
from unspool.data.batch import TrajectoryBatch
from unspool.data.shard_format import TEXT, ShardHeader
from unspool.data.shard_writer import ShardWriter
from unspool.data.shards import LatentShards, LatentShardsConfig
from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.schedule import Schedule
from unspool.models.base import Backbone, Conditioning, Text
from unspool.rollout.guidance import combine
from unspool.rollout.solvers.euler import Euler

TRAJECTORY = "trajectory"
_FLOW = FlowMatching()


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """How paths are sampled.

    Fields: `schedule` of the teacher's Euler steps; `keep` the sigmas that are stored, all of them in the schedule, 0
    last; `guidance_from_uncond`: s in uncond + s (cond - uncond); `plan` and `visibility`, `positions` of a causal
    teacher, None for a bidirectional one.
    """

    schedule: Schedule
    keep: tuple[float, ...]
    guidance_from_uncond: float
    plan: ChunkPlan | None = None
    visibility: Visibility | None = None
    positions: PositionPolicy = Absolute()  # noqa: RUF009  (frozen, no state)

    def __post_init__(self) -> None:
        missing = [s for s in self.keep if _nearest(self.schedule.sigmas, s) is None]
        if missing or not self.keep or self.keep[-1] != 0.0:
            told = f"{missing[0]:.6f} is none of its sigmas" if missing else f"it ends at {self.keep[-1:]}"
            raise ValueError(
                f"keep={self.keep} of a schedule of {self.schedule.num_steps} steps: {told}; expected the student's "
                "sigmas, 0 last, all among the teacher's: give both the same shift and the teacher a multiple of its "
                "number of steps"
            )
        if (self.plan is None) != (self.visibility is None):
            raise ValueError("plan and visibility belong together: both for a causal teacher, none for another")

    def describe(self) -> dict[str, object]:
        """What a header keeps of it."""
        return {
            "steps": self.schedule.num_steps, "sigmas": list(self.keep), "from": self.schedule.sigmas[0],
            "guidance_from_uncond": self.guidance_from_uncond, "kind": "causal" if self.plan else "bidirectional",
        }  # fmt: skip


def _nearest(sigmas: Sequence[float], wanted: float) -> int | None:
    place = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - wanted))
    return place if abs(sigmas[place] - wanted) <= 1e-6 else None


@torch.no_grad()
def sample_trajectory(
    network: Backbone,
    config: TrajectoryConfig,
    noise: Tensor,
    text: Tensor,
    negative: Tensor,
    *,
    prompt_index: Tensor | None = None,
    clean: Tensor | None = None,
) -> Tensor:
    """States [b, kept, t, c, h, w] of Euler's path from `noise` [b, t, c, h, w] at the kept sigmas.

    `text`, `negative` [b, prompts, rows, channels]; `prompt_index` [b, t]; `clean` [b, t, c, h, w] what the chunks of a
    causal teacher read. Raises ValueError for a causal teacher without `clean`.
    """
    if (config.plan is None) != (clean is None):
        raise ValueError("a causal teacher reads a clean clip, a bidirectional one none; pass clean= with plan= only")
    guided = config.guidance_from_uncond != 1.0
    prepared = network.prepare(Text(states=torch.cat(_alike(text, negative)) if guided else text))
    copies, frames = (2 if guided else 1), noise.shape[1]
    index = None if prompt_index is None else prompt_index.repeat(copies, 1)
    context: Context = FullSequence(frames)
    if config.plan is not None:
        assert config.visibility is not None
        mask = teacher_forcing_mask(config.plan, frames, config.visibility, config.positions)
        context = FullSequence(2 * frames, mask)
        index = None if index is None else torch.cat([index, index], dim=1)
    cond = Conditioning(prompts=prepared, prompt_index=index)
    wanted = [_nearest(config.schedule.sigmas, sigma) for sigma in config.keep]
    x, solver = noise, Euler()
    kept = [noise] if 0 in wanted else []
    for step in config.schedule.steps:
        both = x if clean is None else torch.cat([clean.to(x.dtype), x], dim=1)
        told = [0.0] * (both.shape[1] - frames) + [step.conditioning] * frames
        levels = torch.tensor([told], dtype=torch.float64)
        out = network(both.repeat(copies, 1, 1, 1, 1), levels, cond, context)[:, -frames:].to(x.dtype)
        if guided:
            with_text, without = out.chunk(2)
            out = combine(with_text, without, config.guidance_from_uncond)
        x, _ = solver.step(x, _FLOW.to_x0(x, out, step.sigma), step.sigma, step.next_sigma, None, ())
        if step.index + 1 in wanted:
            kept.append(x)
    return torch.stack(kept, dim=1)


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Text states [b, prompts, rows, channels] padded to the same number of prompts and rows; a padded prompt repeats
    the last one."""
    prompts, rows = (max(one.shape[i], other.shape[i]) for i in (1, 2))

    def padded(states: Tensor) -> Tensor:
        states = torch.nn.functional.pad(states, (0, 0, 0, rows - states.shape[2]))
        return torch.cat([states, states[:, -1:].expand(-1, prompts - states.shape[1], -1, -1)], dim=1)

    return padded(one), padded(other)


def write_trajectories(
    sample: Callable[[Tensor, range], tuple[Tensor, Tensor]],
    clips: LatentShards,
    folder: Path,
    config: TrajectoryConfig,
    *,
    count: int,
    batch: int,
    teacher: Mapping[str, object],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write paths for the prompts of the first `count` clips; continues what is there. How many were written.

    `sample(entries, numbers)` gives (states [b, kept, t, c, h, w], latents that belong to them) for clip numbers;
    `teacher` states which network it was (its hash). Raises ValueError for a folder of other paths.
    """
    source = {"source": "trajectories", "teacher": dict(teacher), **config.describe(),
              "clips": json.loads(clips.header.source)}  # fmt: skip
    header: ShardHeader = replace(clips.header, source=json.dumps(source))
    written = 0
    with ShardWriter(folder, header) as writer:
        while writer.next_item < min(count, len(clips)):
            numbers = range(writer.next_item, min(writer.next_item + batch, count, len(clips)))
            states, latents = sample(clips.clips(list(numbers)).latents, numbers)  # type: ignore[arg-type]
            for row, number in enumerate(numbers):
                entry = clips.entries[number]
                text = None if header.text_rows is None else _rows(clips.array(number, TEXT), header.text_rows)
                writer.add(
                    number, latents[row], entry.captions, prompt_index=entry.prompt_index[: latents.shape[1]],
                    text=text, extra={TRAJECTORY: states[row].to(torch.float16)},
                )  # fmt: skip
                written += 1
            if progress is not None:
                progress(writer.next_item, count)
    return written


def _rows(states: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, rows - states.shape[1]))


class TrajectoryShards:
    """A `Source` of `TrajectoryBatch`es from a folder that `write_trajectories` made.

    Raises ValueError where the folder holds latents without paths.
    """

    def __init__(self, config: LatentShardsConfig) -> None:
        self.shards = LatentShards(config)
        facts = json.loads(self.shards.header.source)
        if facts.get("source") != "trajectories":
            raise ValueError(
                f"{config.path}: got latents of {facts.get('source')!r}; expected a teacher's trajectories"
            )
        self.sigmas = tuple(float(sigma) for sigma in facts["sigmas"])
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def codec_sha256(self) -> str | None:
        """Of the codec whose latents the paths lead to."""
        return self.shards.codec_sha256

    def describe(self) -> dict[str, object]:
        """Provenance: the teacher, its steps and guidance."""
        return dict(json.loads(self.shards.header.source))

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> TrajectoryBatch:
        """Paths of the samples of `rank` at `step`; see `Source`."""
        plain = self.shards.batch(step, size, rank=rank, world=world)
        assert plain.indices is not None
        states = torch.stack([self._states(int(index)) for index in plain.indices])
        return TrajectoryBatch(
            trajectory=states, sigmas=self.sigmas, latents=plain.latents, captions=plain.captions,
            prompt_index=plain.prompt_index, text=plain.text, indices=plain.indices,
        )  # fmt: skip

    def _states(self, index: int) -> Tensor:
        if index not in self._kept:
            states = self.shards.array(index, TRAJECTORY).float()
            if not self.shards.config.in_memory:
                return states
            self._kept[index] = states
        return self._kept[index]
