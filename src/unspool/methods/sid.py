"""Score identity distillation: the loss of SiD in place of DMD's; all else is `DistributionMatching`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from unspool.methods.base import StepResult
from unspool.methods.samples import Sample
from unspool.shapes import to_device

if TYPE_CHECKING:
    from unspool.methods.dmd import Scores


def sid_loss(sample: Tensor, teacher: Tensor, critic: Tensor, alpha: float, counted: Tensor | None = None) -> Tensor:
    """mean over the batch of mean[(t - f) ((t - x) - alpha (t - f))] / mean |x - t|, the normaliser without graph.

    t, f are the x0 estimates of teacher and critic *with* their graph down to the sample x (arXiv:2404.04057 eq. 23;
    the form and alpha = 1 of arXiv:2506.08009). `counted` [b, t] latent frames carry loss.
    """
    x, t, f = sample.double(), teacher.double(), critic.double()
    norm = (x - t).detach().abs().flatten(1).mean(1).clamp(min=1e-8)
    product = (t - f) * ((t - x) - alpha * (t - f))
    if counted is None:
        return (product.flatten(1).mean(1) / norm).mean()
    mask = to_device(counted, x.device).reshape(*counted.shape, *(1,) * (x.ndim - 2)).expand_as(x)
    per_sample = (product * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    return (per_sample / norm).mean()


@dataclass(frozen=True, kw_only=True)
class Sid:
    """The loss of SiD (implements `DistributionLoss`); gradients flow through both score networks to the sample."""

    alpha: float = 1.0

    def __call__(self, sample: Sample, scores: Scores) -> StepResult:
        teacher, critic = scores.teacher(grad=True), scores.critic(grad=True)
        loss = sid_loss(sample.latents, teacher, critic, self.alpha, sample.counted)
        distance = (critic - teacher).detach().abs().mean()
        return StepResult(loss=loss, metrics={"loss": loss.detach(), "score_distance": distance})
