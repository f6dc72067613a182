"""Gaussian latents whose optimal velocity is known, and networks that compute it from what they may read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unspool.data.batch import Batch
from unspool.models.base import Conditioning, Prompts, Text


@dataclass(frozen=True)
class Walk:
    """Scalar latents x0[t]: stationary, mean `mean`, standard deviation `scale`, correlation `decay`^|t - u|."""

    mean: float = 0.0
    scale: float = 1.0
    decay: float = 0.0

    def covariance(self, frames: Tensor) -> Tensor:
        apart = (frames[:, None] - frames[None, :]).abs().double()
        return self.scale**2 * torch.where(apart == 0, 1.0, torch.tensor(self.decay, dtype=torch.float64) ** apart)

    def batch(self, size: int, frames: int, seed: int = 0, **fields: Any) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        root = torch.linalg.cholesky(self.covariance(torch.arange(frames)))
        x0 = self.mean + torch.randn(size, frames, generator=draw, dtype=torch.float64) @ root.T
        return Batch(latents=x0[..., None, None, None], text=torch.zeros(size, 1, 1, 1), **fields)

    def optimum(self, y: Tensor, sigma: Tensor, reads: Tensor, clip: int) -> tuple[Tensor, Tensor]:
        """E[noise - x0 | what is read] and its variance [b, n] for sequence frames y [b, n] at levels sigma [b, n].

        `reads` [n, n]: who reads whom. Sequence frame q is latent frame q modulo `clip`; noises are independent.
        """
        n = y.shape[1]
        frames = torch.arange(n) % clip
        prior = self.covariance(frames)
        keep = 1 - sigma
        cov = keep[:, :, None] * keep[:, None] * prior + torch.diag_embed(sigma**2)  # of y with y
        best, variance = [], []
        for q in range(n):
            k = reads[q].nonzero()[:, 0]
            cross = -keep[:, k] * prior[q, k] + sigma[:, q : q + 1] * (k == q)  # of the velocity of q with y
            gain = torch.linalg.solve(cov[:, k][:, :, k], cross)
            best.append(-self.mean + (gain * (y[:, k] - keep[:, k] * self.mean)).sum(1))
            variance.append(1 + self.scale**2 - (gain * cross).sum(1))
        return torch.stack(best, 1), torch.stack(variance, 1)


@dataclass(eq=False)
class Call:
    """One forward that a network saw, and what it said."""

    x: Tensor
    sigma: Tensor
    cond: Conditioning
    context: Any
    prediction: Tensor = field(default_factory=lambda: torch.empty(0))


class Recorder(nn.Module):
    """A network and all of its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[Call] = []

    @property
    def sites(self) -> Any:
        return self.network.sites

    @property
    def latent_channels(self) -> Any:
        return self.network.latent_channels

    def tokens_per_frame(self, rows: int, columns: int) -> int:
        return self.network.tokens_per_frame(rows, columns)  # type: ignore[operator]

    def prepare(self, text: Text) -> Prompts:
        return self.network.prepare(text)  # type: ignore[operator]

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        call = Call(x.detach(), sigma, cond, context)
        prediction = self.network(x, sigma, cond, context)
        call.prediction = prediction.detach()
        self.calls.append(call)
        return prediction


class Oracle(nn.Module):
    """The optimal velocity plus a linear map of what each frame may read, which is zero: `wrong` [n, n] and `bias` [n].

    At the optimum the loss has no gradient in either. `clip`: latent frames of the clip, where the sequence of n frames
    holds it twice.
    """

    def __init__(self, walk: Walk, n: int, clip: int | None = None) -> None:
        super().__init__()
        self.walk, self.clip = walk, clip or n
        self.wrong = nn.Parameter(torch.zeros(n, n, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.variance = torch.empty(0)

    def prepare(self, text: Text) -> Prompts:
        return Prompts(keys=(text.states,), values=(text.states,))

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        y = x[..., 0, 0, 0]
        n = y.shape[1]
        mask = context.mask
        reads = torch.ones(n, n, dtype=torch.bool) if mask is None else torch.tensor(mask.allowed())
        best, self.variance = self.walk.optimum(y, sigma, reads, self.clip)
        out = best + y @ (self.wrong * reads).T + self.bias
        return out[..., None, None, None]
