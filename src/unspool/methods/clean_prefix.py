"""Training on a clean prefix and one noisy chunk behind it: ViD-GPT and Ca2-VDM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unspool.causal.chunks import ChunkPlan, check_prefix
from unspool.causal.context import Backend, FullSequence
from unspool.causal.mask import MaskSpec, clean_prefix_mask, open_mask
from unspool.causal.position import Absolute, Cyclic, PositionPolicy, WindowRelative, check_circle
from unspool.causal.prefix import PrefixEnhanced
from unspool.causal.visibility import Full, Kind, Segment, Visibility, Window, capacity_of, check_window
from unspool.data.batch import Batch
from unspool.diffusion.iddpm import IDDPM
from unspool.methods.base import StepResult
from unspool.methods.common import (
    BatchPrompts,
    Student,
    check_share,
    chosen,
    clean_latents,
    noise_like,
    student_only,
)
from unspool.methods.draws import shared_integer, uniform
from unspool.rollout.recompute import with_past
from unspool.shapes import to_device


@dataclass(frozen=True, kw_only=True)
class CleanPrefixConfig:
    """What decides the objective.

    Fields: `plan` (its first chunk is what will be given at the start), `visibility`, `backend` as the rollout's;
    `prefix_frames` clean frames that prefix-enhanced attentions read (None: the network has none); `circle` number of
    cyclic positions (None: absolute ones); `prefix_noise` level to which the prefix is noised while the network is told
    that it is clean, the rollout's `commit_noise` (0: not at all); `drop_text` probability that a sample loses its
    prompts; `process`; `makes_first`: the first chunk is not given, so it is trained too, behind nothing;
    `bidirectional`: the noisy chunk and what `visibility` gives it of the prefix all read each other, at positions from
    0 on, for a rollout that computes its past anew (OS-Fix, OS-Ext).

    Raises ValueError for what no rollout could do: a window that holds no chunk, positions that meet in a window, a
    chunk shorter than `prefix_frames`, a circle that `bidirectional` never turns.
    """

    plan: ChunkPlan
    visibility: Full | Window
    prefix_frames: int | None
    circle: int | None
    prefix_noise: float
    drop_text: float
    process: IDDPM
    makes_first: bool = False
    backend: Backend = "slices"
    bidirectional: bool = False

    def __post_init__(self) -> None:
        check_window(self.visibility, self.plan.longest)
        check_share("prefix_noise", self.prefix_noise)
        check_share("drop_text", self.drop_text)
        check_prefix(self.plan.chunk, self.prefix_frames)
        if self.circle is not None:  # clips are cut to the circle, so a past without a bound fits too
            unbounded = capacity_of(self.visibility) is None
            check_circle(Cyclic(length=self.circle), self.visibility, self.circle if unbounded else None)
            least = self.plan.lead + self.plan.chunk
            if self.circle < least:
                raise ValueError(
                    f"circle={self.circle} positions leave no room for a past beside chunks of {self.plan.chunk}: "
                    f"expected at least {least}; use such a circle, or None"
                )
        if self.bidirectional and self.circle is not None:
            raise ValueError(
                f"bidirectional=True with circle={self.circle}: expected circle=None, since a past that is computed "
                "anew stands at 0 and on in every forward"
            )

    @property
    def sees(self) -> Visibility:
        """What the attentions of the network read."""
        if self.prefix_frames is None:
            return self.visibility
        return PrefixEnhanced(base=self.visibility, frames=self.prefix_frames)


def prefix_lengths(plan: ChunkPlan, num_frames: int) -> tuple[int, ...]:
    """Every prefix, at least what is given, behind which a clip of `num_frames` latent frames goes on; what follows the
    longest may be less than a chunk, as published. Raises ValueError for a clip that ends with what is given.
    """
    starts = tuple(c.start for c in plan.chunks(0, num_frames) if c.start > 0)
    if not starts:
        raise ValueError(
            f"clips of {num_frames} latent frames: expected more than the {plan.lead} that are given, best whole "
            f"chunks of {plan.chunk}; use longer clips or another plan"
        )
    return starts


def drawn_positions(circle: int | None, num_frames: int, rng: torch.Generator) -> PositionPolicy:
    """Positions of a clip (arXiv:2411.16375 section 3.3): turned by chance where it fills the circle, else from 0 on.

    A shorter clip turned would teach nothing that a stream meets: its frames stand at 0 and on before the first wrap,
    and afterwards the window fills the circle. A longer one (`num_frames` before it is cut to the circle) is turned, as
    what it is cut to is met anywhere. Always consumes one draw where there is a circle.
    """
    if circle is None:
        return Absolute()
    offset = shared_integer(circle, rng)
    return Cyclic(length=circle, offset=offset if num_frames >= circle else 0)


class CleanPrefix:
    """Squared error and variational bound on one noisy chunk, given clean frames before it, which bear no loss.

    The length of the prefix is drawn for the batch. The clip is cut behind the chunk, and in front of what the circle
    has positions for or, where all latent frames read each other, what the chunk reads. The noise level is drawn for
    each sample from all steps. Source: arXiv:2411.16375 section 3.2 and appendix C, the perturbed prefix from the
    published code (implements `Method`; role "student").

    Args: `backbone` an `STDiT`, or another network for IDDPM; `text`, `null_text` as `FlowMatching`. Batches of a
    network without text need none.
    """

    def __init__(
        self,
        config: CleanPrefixConfig,
        *,
        backbone: nn.Module,
        text: nn.Module | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        self.config = config
        self.student = Student(backbone, text, null_text)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        student_only(role)
        config, x0 = self.config, clean_latents(batch)
        choices: tuple[int, ...] = (0,) if config.makes_first else ()
        if not choices or x0.shape[1] > config.plan.lead:
            choices += prefix_lengths(config.plan, x0.shape[1])
        prefix = choices[shared_integer(len(choices), rng)]
        stop = min(config.plan.frames(config.plan.chunk_of(prefix)).stop, x0.shape[1])
        taken, mask = self._sequence(prefix, stop, rng)
        frames, prefix = len(taken), len(taken) - (stop - prefix)
        prompts = self._prompts(batch, taken, chosen((len(x0),), config.drop_text, rng))
        x0 = _frames_of(x0, taken)
        level = 1.0 + (config.process.num_steps * uniform((len(x0), 1), rng)).floor()
        sigma = (level / config.process.num_steps).repeat(1, frames)
        sigma[:, :prefix] = 0.0
        noise = noise_like(x0, rng)
        x = config.process.add_noise(x0, noise, sigma)
        if config.prefix_noise and prefix:
            perturbed = config.process.add_noise(x0[:, :prefix], noise_like(x0[:, :prefix], rng), config.prefix_noise)
            x = torch.cat([perturbed, x[:, prefix:]], dim=1)
        prediction = self.student(x, sigma, prompts, FullSequence(frames, mask, backend=config.backend))
        loss = config.process.loss(x0, noise, x, prediction, sigma)
        metrics = {"loss": loss.total.detach(), "mse": loss.mse.mean().detach(), "bits": loss.bits.mean().detach()}
        return StepResult(loss=loss.total, metrics=metrics)

    def _sequence(self, prefix: int, stop: int, rng: torch.Generator) -> tuple[list[int], MaskSpec]:
        """The latent frames of the forward, the noisy ones [prefix, stop) last, and who reads whom."""
        config = self.config
        if not config.bidirectional:
            positions, start = drawn_positions(config.circle, stop, rng), self._start(prefix, stop)
            mask = clean_prefix_mask(config.plan, stop - start, prefix - start, config.sees, positions)
            return list(range(start, stop)), mask
        noisy = Segment(kind=Kind.DENOISE, frames=range(prefix, stop))
        segments = with_past(noisy, config.plan, config.sees, 0.0)
        taken = [frame for segment in segments for frame in segment.frames]
        return taken, open_mask(segments, config.sees, WindowRelative())

    def _start(self, prefix: int, stop: int) -> int:
        """First latent frame that is kept: of a longer prefix as much as the circle has positions for, in whole chunks
        counted from there, as a stream without a cache would encode it."""
        circle = self.config.circle
        if circle is None or stop <= circle:
            return 0
        ends = [c.stop for c in self.config.plan.chunks(0, prefix)]
        return prefix - max(end for end in ends if end <= circle - (stop - prefix))

    def _prompts(self, batch: Batch, frames: list[int], dropped: Tensor) -> BatchPrompts:
        if batch.text is None and batch.captions is None:
            return BatchPrompts(states=torch.zeros(len(dropped), 1, 1, 1))  # a network with text refuses it
        prompts = self.student.prompts_of(batch, dropped)
        return prompts if prompts.index is None else replace(prompts, index=_frames_of(prompts.index, frames))


def _frames_of(x: Tensor, frames: list[int]) -> Tensor:
    """Some latent frames of [b, t, ...]."""
    return x.index_select(1, to_device(torch.tensor(frames), x.device))
