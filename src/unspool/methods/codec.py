"""Training of a video codec: reconstruction of clips through noised latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.annotations import check_word
from unspool.data.batch import Batch
from unspool.methods.base import StepResult
from unspool.methods.common import check_share, chosen, student_only
from unspool.methods.draws import normal, uniform
from unspool.models.taehv import Taehv
from unspool.shapes import to_device

Focus = Literal["none", "deviation", "gradient"]
"""Which pixels count for more: none; those unlike their row and unlike their column; those at edges."""

FULL_FOCUS = 0.2
"""Difference, of pixels in [-1, 1], from which on a pixel has full focus."""
SMALLEST_ERROR = 1e-10
"""Mean squared error where PSNR ends (106 dB), so that an exact codec has a finite one."""


@dataclass(frozen=True, kw_only=True)
class CodecTrainingConfig:
    """What decides the objective.

    Fields: `l1`, `mse` weights of the mean absolute and squared error; `gradient` weight of the mean absolute error of
    the differences of neighbouring pixels; `temporal` weight of the same penalty on how the error changes from frame
    to frame (without it a decoder's errors jump where a latent frame begins); `focus`, `focus_strength`: a pixel weighs
    1 + strength * focus map (see `focus_map`); `noise` largest noise on the latents that the decoder sees, in standard
    deviations; `latent_penalty` weight of the divergence of the latents' channels from the standard normal; `crop_px`
    side of square crops (multiple of 8) that a share `crop_share` of the batches is cut to, where the focus is.
    """

    l1: float
    mse: float
    noise: float
    latent_penalty: float
    focus: Focus
    focus_strength: float
    gradient: float = 0.0
    temporal: float = 0.0
    crop_px: int | None = None
    crop_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "mse", "noise", "latent_penalty", "focus_strength", "gradient", "temporal"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected a weight of at least 0")
        if self.l1 + self.mse <= 0.0:
            raise ValueError("l1=0 and mse=0: nothing asks for a reconstruction; set one of them")
        check_word("focus", self.focus, Focus)
        if (self.focus == "none") != (self.focus_strength == 0.0):
            raise ValueError(f"focus={self.focus!r} with focus_strength={self.focus_strength}: one has no effect "
                             "without the other; set both or neither")  # fmt: skip
        check_share("crop_share", self.crop_share)
        if (self.crop_px is None) != (self.crop_share == 0.0):
            raise ValueError(f"crop_px={self.crop_px}, crop_share={self.crop_share}: set both or neither")
        if self.crop_px is not None and (self.crop_px < Taehv.spatial or self.crop_px % Taehv.spatial):
            raise ValueError(f"crop_px={self.crop_px}: expected a multiple of {Taehv.spatial}")


class CodecTraining:
    """E [ w p(d) ] + gradient E [ w |grad d| ] + temporal E [ w p(d_f - d_(f-1)) ] + latent_penalty KL, with
    d = decode(z + s std e) - x and p(d) = l1 |d| + mse d^2.

    Here z = encode(x), e ~ N(0, 1), s ~ U(0, noise) per clip, std that of each channel of z, w = 1 + focus_strength
    `focus_map(x)`, and KL = mean over channels of (mean^2 + var - log var - 1) / 2, statistics over the batch. The
    noise teaches the decoder to bear what a diffusion model leaves wrong. Own mix of usual parts, nothing adversarial
    (implements `Method`; role "student").

    Metrics: loss; psnr and psnr_focus in dB, of clamped pixels and weighted by the focus map (both through the noise);
    latent_offset, the root mean square of the channels' means; latent_std, latent_std_min over the channels.
    """

    def __init__(self, config: CodecTrainingConfig, *, codec: Taehv) -> None:
        self.config = config
        self.codec = codec

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"student": self.codec}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def step(self, batch: Batch, role: str, step: int, rng: torch.Generator) -> StepResult:
        student_only(role)
        pixels = clip_pixels(batch)
        focus = focus_map(pixels, self.config.focus)
        pixels, focus = self._crop(pixels, focus, rng)
        found, latents = self.codec(pixels, self._noise(pixels, rng))
        error = found - pixels
        weight = 1.0 + self.config.focus_strength * focus
        loss = (weight * self._penalty(error)).mean()
        if self.config.gradient:
            rows, columns = error.diff(dim=-2).abs(), error.diff(dim=-1).abs()
            edges = (weight[..., 1:, :] * rows).mean() + (weight[..., 1:] * columns).mean()
            loss = loss + self.config.gradient * edges
        if self.config.temporal and pixels.shape[1] > 1:
            loss = loss + self.config.temporal * (weight[:, 1:] * self._penalty(error.diff(dim=1))).mean()
        mean, var = channel_statistics(latents)
        divergence = 0.5 * (mean.square() + var - var.clamp_min(1e-12).log() - 1.0).mean()
        loss = loss + self.config.latent_penalty * divergence
        with torch.no_grad():
            wrong = (found.clamp(-1.0, 1.0) - pixels).square()
            metrics: dict[str, Tensor | float] = {
                "loss": loss.detach(),
                "psnr": psnr(wrong.mean()),
                "latent_offset": mean.square().mean().sqrt(),
                "latent_std": var.sqrt().mean(),
                "latent_std_min": var.min().sqrt(),
            }
            if self.config.focus != "none":
                metrics["psnr_focus"] = psnr((wrong.mean(2, keepdim=True) * focus).sum() / focus.sum())
        return StepResult(loss=loss, metrics=metrics)

    def _penalty(self, error: Tensor) -> Tensor:
        return self.config.l1 * error.abs() + self.config.mse * error.square()

    def _crop(self, pixels: Tensor, focus: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        side, (batch, _, _, height, width) = self.config.crop_px, pixels.shape
        is_cropped = bool(chosen((), self.config.crop_share, rng))
        if side is None or not is_cropped:
            return pixels, focus
        if side > height or side > width:
            raise ValueError(f"crop_px={side} of clips of {height}x{width} px; expected at most the smaller side")
        # a little everywhere: also what no focus is on must be seen
        chance = focus.mean(dim=(1, 2)).flatten(1).double().cpu() + 1e-3
        mass = chance.cumsum(1)
        centre = torch.searchsorted(mass, uniform((batch, 1), rng) * mass[:, -1:])[:, 0].clamp(max=chance.shape[1] - 1)
        inside = (uniform((batch, 2), rng) * side).long().T
        corners = zip(
            _grid(centre // width - inside[0], height - side), _grid(centre % width - inside[1], width - side),
            strict=True,
        )  # fmt: skip
        cuts = [(i, ..., slice(y, y + side), slice(x, x + side)) for i, (y, x) in enumerate(corners)]
        return torch.stack([pixels[cut] for cut in cuts]), torch.stack([focus[cut] for cut in cuts])

    def _noise(self, pixels: Tensor, rng: torch.Generator) -> Tensor | None:
        batch, frames, _, height, width = pixels.shape
        cell = self.codec.spatial
        size = (-(-frames // self.codec.temporal), self.codec.latent_channels, height // cell, width // cell)
        level = self.config.noise * uniform((batch, 1, 1, 1, 1), rng, torch.float32)
        noise = level * normal((batch, *size), rng)
        return to_device(noise.to(pixels.dtype), pixels.device) if self.config.noise else None


def _grid(corner: Tensor, largest: int) -> list[int]:
    """The nearest corners inside of the clip and on the codec's grid, so that a crop's latents are like the clip's."""
    step = Taehv.spatial
    values: list[int] = (corner.clamp(0, largest) / step).round().long().mul(step).clamp(max=largest).tolist()
    return values


def clip_pixels(batch: Batch) -> Tensor:
    """The batch's pixels in at least float32. Raises ValueError where there are none or they are no clips."""
    batch.need("pixels")
    pixels = batch.pixels
    assert pixels is not None
    if pixels.ndim != 5 or 0 in pixels.shape or not pixels.is_floating_point():
        raise ValueError(
            f"pixels of shape {tuple(pixels.shape)}, {pixels.dtype}: expected floats [b, f, 3, y, x] in [-1, 1]"
        )
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def focus_map(pixels: Tensor, focus: Focus) -> Tensor:
    """Where a loss should look, [b, f, 1, y, x] in [0, 1], without knowing what is shown.

    "deviation": the difference from the median of the pixel's row or of its column, whichever is less (a sky that
    changes along one axis has none), the largest over the channels; "gradient": the largest difference to a neighbour,
    spread by one pixel. Both are 1 from `FULL_FOCUS` on. "none": zeros.
    """
    with torch.no_grad():
        if focus == "none":
            return torch.zeros_like(pixels[:, :, :1])
        if focus == "deviation":
            along_row = (pixels - pixels.median(dim=-1, keepdim=True).values).abs()
            along_column = (pixels - pixels.median(dim=-2, keepdim=True).values).abs()
            found = torch.minimum(along_row.amax(2, keepdim=True), along_column.amax(2, keepdim=True))
        else:
            rows = F.pad(pixels.diff(dim=-2).abs().amax(2), (0, 0, 1, 0))
            columns = F.pad(pixels.diff(dim=-1).abs().amax(2), (1, 0))
            found = F.max_pool2d(torch.maximum(rows, columns), 3, stride=1, padding=1)[:, :, None]
        return (found / FULL_FOCUS).clamp_(max=1.0)


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance [c] of every channel of latents [b, t, c, h, w]."""
    var, mean = torch.var_mean(latents, dim=(0, 1, 3, 4), correction=0)
    return mean, var


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], at most 106."""
    return 10.0 * torch.log10(4.0 / mean_squared_error.clamp_min(SMALLEST_ERROR))


def measure_latents(codec: Taehv, batches: Iterable[Batch]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the codec's own latents over all batches, in float64.

    They are what `Taehv.with_normalisation` takes, also where the codec is normalised already.
    Raises ValueError for no batch, for one without pixels, and for a channel that never changes.
    """
    device = next(codec.parameters()).device
    count, total, squares = 0, torch.zeros(codec.latent_channels).double(), torch.zeros(codec.latent_channels).double()
    for batch in batches:
        latents = codec.encode(clip_pixels(batch).to(device)).double().cpu()
        count += latents.numel() // codec.latent_channels
        total += latents.sum(dim=(0, 1, 3, 4))
        squares += latents.square().sum(dim=(0, 1, 3, 4))
    if not count:
        raise ValueError("got no batch to measure latents on; expected at least one")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0.0).sqrt()
    if not bool((std > 1e-6).all()):
        dead = (std <= 1e-6).nonzero().flatten().tolist()
        raise ValueError(f"latent channels {dead} are constant (std below 1e-6); train the codec with a larger "
                         "latent_penalty or fewer latent_channels")  # fmt: skip
    if codec.config.latent_mean is not None and codec.config.latent_std is not None:
        scale = torch.tensor(codec.config.latent_std).double()
        mean, std = mean * scale + torch.tensor(codec.config.latent_mean).double(), std * scale
    return tuple(mean.tolist()), tuple(std.tolist())
