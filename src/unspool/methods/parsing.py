"""Supervised pre-training of a caption encoder: its slots must tell what a caption states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.data.batch import Batch, ParsedBatch
from unspool.methods.base import StepResult
from unspool.methods.common import student_only
from unspool.models.caption import CaptionEncoder
from unspool.shapes import to_device

ABSENT = -1
"""Label of what a caption does not state."""


@dataclass(frozen=True, kw_only=True)
class CaptionParsingConfig:
    """Fields: `classes` per attribute, how many values it has (ABSENT is not counted and gets a class of its own)."""

    classes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.classes or any(n < 1 for n in self.classes):
            raise ValueError(f"classes={self.classes}: expected a number of values, at least 1, for every attribute")


class Parser(nn.Module):
    """What is trained: `text.*` and one linear head per attribute, shared by all slots (`heads.*`)."""

    def __init__(self, text: CaptionEncoder, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.text = text
        self.heads = nn.ModuleList(nn.Linear(text.config.out_dim, n + 1) for n in classes)

    def forward(self, captions: list[str]) -> list[Tensor]:
        """Per attribute the scores [n, slots, classes + 1], the last for ABSENT, in at least fp32."""
        slots = self.text(captions)[:, : self.text.config.slots]
        return [head(slots).float() for head in self.heads]


class CaptionParsing:
    """E sum over slots and attributes of -log p(label | slot): cross-entropy of linear heads on the encoder's slots.

    Own objective (no paper): slots that separate the things of a caption before a network has to draw them (implements
    `Method`; role "student"). Metrics: loss; accuracy over all labels; accuracy_stated over those that are not ABSENT;
    accuracy_captions, the share of captions with every label right.

    Raises ValueError for an encoder without slots.
    """

    def __init__(self, config: CaptionParsingConfig, *, text: CaptionEncoder) -> None:
        if text.config.slots < 1:
            raise ValueError(
                "the caption encoder has slots=0; parsing needs one for every thing that a caption tells of"
            )
        self.config = config
        self.student = Parser(text, config.classes)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        student_only(role)
        batch.need("captions")
        assert batch.captions is not None
        if any(len(prompts) != 1 for prompts in batch.captions):
            raise ValueError("parsing takes one caption per sample, and some have none or several; split them")
        scores = self.student([prompts[0] for prompts in batch.captions])
        labels = to_device(self._labels(batch), scores[0].device)
        parts, right = [], []
        for number, (logits, n) in enumerate(zip(scores, self.config.classes, strict=True)):
            wanted = labels[..., number]
            wanted = torch.where(wanted == ABSENT, n, wanted)
            parts.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
            right.append(logits.detach().argmax(-1) == wanted)
        correct, stated = torch.stack(right, -1), labels != ABSENT
        loss = torch.stack(parts).mean()
        return StepResult(
            loss=loss,
            metrics={
                "loss": loss.detach(),
                "accuracy": correct.float().mean(),
                "accuracy_stated": (correct & stated).sum() / stated.sum(),
                "accuracy_captions": correct.flatten(1).all(1).float().mean(),
            },
        )

    def _labels(self, batch: Batch) -> Tensor:
        if not isinstance(batch, ParsedBatch) or batch.labels is None:
            raise ValueError(f"a {type(batch).__name__} without labels; use a source of ParsedBatch that gives them")
        labels = batch.labels
        slots, classes = self.student.text.config.slots, self.config.classes
        expected = (len(batch), slots, len(classes))
        if tuple(labels.shape) != expected or labels.dtype != torch.int64:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}, {labels.dtype}: expected [b, slots, attributes] = "
                f"{list(expected)}, int64"
            )
        if labels.device.type == "cpu" and bool(((labels < ABSENT) | (labels >= torch.tensor(classes))).any()):
            raise ValueError(f"labels reach from {int(labels.min())} to {int(labels.max())}: expected -1 (absent) or "
                             f"numbers below the classes {classes}")  # fmt: skip
        return labels
