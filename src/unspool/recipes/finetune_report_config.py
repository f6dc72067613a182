"""What is measured after a fine-tuning on videos; see `finetune_report`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FinetuneReportConfig:
    """Fields: `steps` of denoising and `guidance` of the samples; `seed`; `context` pixel frames that a continuation is
    given before a held-out tail (whole chunks: 9 is one chunk of 3 latent frames)."""

    steps: int = 50
    guidance: float = 2.0
    seed: int = 0
    context: int = 9
