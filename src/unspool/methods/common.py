"""What the objectives share: the student's container, prompts of a batch, noise levels, and the velocity loss.

All draws are made on the CPU from the generator that the loop hands over, always in the same order, so that a setting
does not change what another one draws. Noise levels stay on the CPU, where networks look for equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unspool.annotations import check_word
from unspool.causal.context import Context, FullSequence
from unspool.data.batch import Batch
from unspool.diffusion.flow import FlowMatching
from unspool.diffusion.schedule import bell_weight, shift_sigma
from unspool.methods.base import StepResult
from unspool.methods.draws import normal, uniform
from unspool.models.base import Conditioning, Text
from unspool.shapes import to_device

FLOW = FlowMatching()
Weight = Literal["none", "bell"]
"""Weight of a latent frame's loss by its sigma: none, or `bell_weight`."""


# ---- noise levels ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SigmaLaw:
    """How training draws sigma: u from a law on [0, 1], then `shift u / (1 + (shift - 1) u)`.

    Fields: `law`: "uniform", or "logit_normal" (arXiv:2403.03206 section 3.1): u = sigmoid(`mean` + `std` z), both
    given then and None otherwise; `shift` towards noise, 1 leaves u as it is.
    """

    law: Literal["uniform", "logit_normal"]
    shift: float
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        shift_sigma(0.5, self.shift)
        if self.law not in ("uniform", "logit_normal"):
            raise ValueError(f"law={self.law!r}: expected 'uniform' or 'logit_normal'")
        if self.law == "uniform" and (self.mean is not None or self.std is not None):
            raise ValueError(f"mean={self.mean}, std={self.std} have no effect with law='uniform'; leave them None")
        if self.law == "logit_normal" and (
            self.mean is None or self.std is None or not math.isfinite(self.mean) or not 0 <= self.std < math.inf
        ):
            raise ValueError(f"mean={self.mean}, std={self.std}: law='logit_normal' needs both, std at least 0")

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Sigmas of `shape`, float64 on the CPU."""
        if self.law == "uniform":
            level = uniform(shape, rng)
        else:
            assert self.mean is not None and self.std is not None
            level = torch.sigmoid(self.mean + self.std * normal(shape, rng, torch.float64))
        return shift_sigma(level, self.shift)

    def weigh(self, sigma: Tensor, weight: Weight) -> Tensor:
        """Loss weights of `sigma`, of the same shape."""
        return torch.ones_like(sigma) if weight == "none" else bell_weight(sigma, shift=self.shift)


def check_weight(weight: str) -> None:
    """Raise ValueError for a name that is no `Weight`."""
    check_word("weight", weight, Weight)


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a probability."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value}: expected a probability in [0, 1]")


def chosen(shape: tuple[int, ...], share: float, rng: torch.Generator) -> Tensor:
    """Independent draws that are True with probability `share`; always consumes the same random numbers."""
    draw = uniform(shape, rng) if shape else torch.rand((), generator=rng, dtype=torch.float64)  # one for the batch
    return draw < share


def noise_like(latents: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise, drawn on the CPU, on the device and in the dtype of `latents`."""
    return to_device(normal(latents.shape, rng, latents.dtype), latents.device)


def clean_latents(batch: Batch) -> Tensor:
    """The batch's latents in at least float32. Raises ValueError where there are none or they are no clips."""
    batch.need("latents")
    latents = batch.latents
    assert latents is not None
    if latents.ndim != 5 or 0 in latents.shape:
        raise ValueError(f"latents of shape {tuple(latents.shape)}: expected [b, t, c, h, w], none of them 0")
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


# ---- prompts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BatchPrompts:
    """The prompts of a batch: distinct `captions` and `which` [b, prompts] of them each sample follows in order of
    time, or ready text `states` [b, prompts, rows, channels]; `index` [b, t] the prompt of each latent frame."""

    captions: tuple[str, ...] = ()
    which: Tensor | None = None
    states: Tensor | None = None
    index: Tensor | None = None

    def doubled(self) -> BatchPrompts:
        """For a sequence that holds every latent frame twice, one copy after the other."""
        return self if self.index is None else replace(self, index=torch.cat([self.index, self.index], dim=1))


class Student(nn.Module):
    """What a student's optimizer owns and a checkpoint holds: `backbone.*` and, where it is trained along, `text.*`.

    Args: `backbone` a Backbone; `text` maps a list of captions to states [n, rows, channels] (a `CaptionEncoder`), or
    None where batches bring their text states; `null_text` [rows, channels], the states of the empty caption, which
    dropping of ready-made text needs (kept as a buffer outside the checkpoint).
    """

    null_text: Tensor | None

    def __init__(self, backbone: nn.Module, text: nn.Module | None = None, null_text: Tensor | None = None) -> None:
        super().__init__()
        if text is not None and null_text is not None:
            raise ValueError(
                "got null_text beside a text encoder, which encodes the empty caption itself; leave it out"
            )
        self.backbone = backbone
        if text is not None:
            self.text = text
        self.register_buffer("null_text", null_text, persistent=False)

    @property
    def encodes(self) -> bool:
        """Whether captions are encoded here, instead of text states coming in."""
        return "text" in self._modules

    def prompts_of(self, batch: Batch, dropped: Tensor) -> BatchPrompts:
        """The prompts of a batch, those of the samples in `dropped` [b] replaced by the unconditional one.

        Samples with fewer prompts than others repeat their last one. Raises ValueError for a batch without what the
        student needs, or with a prompt index that points at nothing.
        """
        frames = None if batch.latents is None else batch.latents.shape[1]  # where none are needed, none to compare
        index = None if batch.prompt_index is None else _check_index(batch.prompt_index, len(dropped), frames)
        if not self.encodes:
            batch.need("text")
            return BatchPrompts(states=self._replaced(Text.of(batch.text).states, dropped), index=index)  # type: ignore[arg-type]
        batch.need("captions")
        captions = batch.captions
        assert captions is not None
        empty = [i for i, prompts in enumerate(captions) if not prompts]
        if empty or len(captions) != len(dropped):
            raise ValueError(
                f"captions of {len(captions)} samples, {len(empty)} of them without any: expected at least one for "
                f"each of {len(dropped)} samples; the empty caption is ''"
            )
        _check_counts(captions, index)
        most = max(len(prompts) for prompts in captions)
        spoken = [
            [""] * most if gone else [*prompts, *[prompts[-1]] * (most - len(prompts))]
            for prompts, gone in zip(captions, dropped.tolist(), strict=True)
        ]
        places = {caption: place for place, caption in enumerate(dict.fromkeys(c for row in spoken for c in row))}
        which = torch.tensor([[places[caption] for caption in row] for row in spoken])
        return BatchPrompts(captions=tuple(places), which=which, index=index if most > 1 else None)

    def _replaced(self, states: Tensor, dropped: Tensor) -> Tensor:
        if not bool(dropped.any()):
            return states
        if self.null_text is None:
            raise ValueError("a batch of ready-made text is to be dropped; pass null_text, the empty caption's states")
        null = to_device(self.null_text, states.device).to(states.dtype)
        rows = max(states.shape[2], null.shape[0])
        states = nn.functional.pad(states, (0, 0, 0, rows - states.shape[2]))
        null = nn.functional.pad(null, (0, 0, 0, rows - null.shape[0]))
        return torch.where(to_device(dropped, states.device)[:, None, None, None], null, states)

    def states_of(self, prompts: BatchPrompts) -> Tensor:
        """Text states [b, prompts, rows, channels]."""
        if prompts.states is not None:
            return prompts.states
        assert prompts.which is not None
        encoded = self.text(list(prompts.captions))
        return encoded[to_device(prompts.which, encoded.device)]

    def forward(
        self,
        x: Tensor | Callable[[], Any],
        sigma: Tensor | None = None,
        prompts: BatchPrompts | None = None,
        context: Context | None = None,
    ) -> Any:
        """Prediction [b, t, c, h, w]: prompts are encoded and prepared, then the backbone is called, all in here, so
        that wrappers of the whole module (data parallel, compiled) see one forward.

        A function as the only argument is called instead: what calls the backbone several times (a rollout) happens
        inside one forward of this module too. It returns tensors, or a tuple of them.
        """
        if not isinstance(x, Tensor):
            return x()
        assert sigma is not None and prompts is not None
        backbone: Any = self.backbone
        prepared = backbone.prepare(Text(states=self.states_of(prompts)))
        return backbone(x, sigma, Conditioning(prompts=prepared, prompt_index=prompts.index), context)


def _check_index(index: Tensor, batch: int, frames: int | None) -> Tensor:
    if index.ndim != 2 or index.shape[0] != batch or (frames is not None and index.shape[1] != frames):
        expected = f"[b, t] = [{batch}, {'any' if frames is None else frames}]"
        raise ValueError(
            f"prompt_index of shape {tuple(index.shape)}: expected {expected}, a prompt for every latent frame"
        )
    return index


def _check_counts(captions: tuple[tuple[str, ...], ...], index: Tensor | None) -> None:
    """A number past a sample's own prompts would silently read a repeated one. On a GPU the values are not looked at:
    that would wait for it."""
    if index is None or index.device.type != "cpu":
        return
    counts = torch.tensor([len(prompts) for prompts in captions])[:, None]
    if bool(((index < 0) | (index >= counts)).any()):
        sample = int(((index < 0) | (index >= counts)).any(1).nonzero()[0])
        raise ValueError(
            f"prompt_index of sample {sample} holds {sorted(set(index[sample].tolist()))} for "
            f"{len(captions[sample])} captions; expected values from 0 to {len(captions[sample]) - 1}"
        )


# ---- loss --------------------------------------------------------------------------------------------------------


class Contexts(dict[int, FullSequence]):
    """Contexts by number of latent frames, made at first use and kept, because they hold masks and tables."""

    def __init__(self, make: Callable[[int], FullSequence]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, frames: int) -> FullSequence:
        self[frames] = self._make(frames)
        return self[frames]


TERCILES = ("loss/sigma_low", "loss/sigma_mid", "loss/sigma_high")
"""Metrics: mean squared error, not weighted, of the latent frames with sigma below 1/3, from there to 2/3, above."""


def velocity_loss(
    prediction: Tensor, target: Tensor, sigma: Tensor, *, weights: Tensor, counted: Tensor | None = None
) -> StepResult:
    """Weighted mean squared error of the velocity, in at least float32.

    `prediction`, `target` [b, t, c, h, w]; `sigma` [b, t] (CPU), `weights` [b, t] per latent frame; `counted` [b, t]
    says which latent frames carry loss (None: all). The mean is over a sample's counted latent frames, then over the
    samples, so the mean over parts of a batch is that over the batch. Metrics: the loss and `TERCILES`, NaN for a
    third that no latent frame fell into.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(wide) - target.to(wide)).square().flatten(2).mean(2)  # (b, t)
    counted = torch.ones_like(sigma, dtype=torch.bool) if counted is None else counted
    share = counted.double() / counted.sum(1, keepdim=True) / len(sigma)
    loss = (error * to_device((weights * share).to(wide), error.device)).sum()
    metrics: dict[str, Tensor | float] = {"loss": loss.detach()}
    third = (3.0 * sigma).floor().clamp(0, 2)
    for number, name in enumerate(TERCILES):
        members = counted & (third == number)
        mean = to_device((members.double() / members.sum()).to(wide), error.device)  # 0 / 0: NaN
        metrics[name] = (error.detach() * mean).sum()
    return StepResult(loss=loss, metrics=metrics)


def student_only(role: str) -> None:
    """Raise ValueError for another role than the student."""
    if role != "student":
        raise ValueError(f"role={role!r}: expected 'student', the only role of this method")
