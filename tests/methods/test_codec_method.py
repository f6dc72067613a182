"""Codec training: closed forms of the loss, focus, crops, noise, latent statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unspool.data.batch import Batch
from unspool.methods.base import Method
from unspool.methods.codec import SMALLEST_ERROR, CodecTraining, CodecTrainingConfig, focus_map, measure_latents
from unspool.models.taehv import Taehv, TaehvConfig

PLAIN = CodecTrainingConfig(l1=1.0, mse=2.0, noise=0.0, latent_penalty=0.0, focus="none", focus_strength=0.0)
SIZES = TaehvConfig(encoder_widths=4, decoder_widths=(6, 5, 4, 4), latent_channels=2, padding="start", num_blocks=1)

HIGHEST = pytest.approx(10 * math.log10(4 / SMALLEST_ERROR), abs=1e-3)


class Stub(nn.Module):
    """Returns `error(pixels)` added to the pixels, and the latents it was given; keeps what it was called with."""

    temporal, spatial, latent_channels = 4, 8, 2

    def __init__(self, error: Any = 0.0, latents: Tensor | None = None) -> None:
        super().__init__()
        self.error, self.latents = error, torch.randn(2, 2, 2, 2, 2) if latents is None else latents
        self.pixels: list[Tensor] = []
        self.noises: list[Tensor | None] = []

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.pixels.append(pixels)
        self.noises.append(noise)
        return pixels + (self.error(pixels) if callable(self.error) else self.error), self.latents


def method(config: CodecTrainingConfig, codec: nn.Module) -> CodecTraining:
    return CodecTraining(config, codec=codec)  # type: ignore[arg-type]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sprites(batch: int = 2, *, size: int = 64) -> tuple[Tensor, Tensor]:
    """Clips of 5 frames with a sky that fades downwards and an 8 px sprite; and the sprite's pixels [b, f, 1, y, x]."""
    sky = torch.linspace(-0.5, 0.5, size)[:, None].expand(size, size)
    pixels, mask = sky.expand(batch, 5, 3, size, size).clone(), torch.zeros(batch, 5, 1, size, size, dtype=torch.bool)
    for sample in range(batch):
        y, x = (5 + 13 * sample) % (size - 8), (3 + 29 * sample) % (size - 8)
        mask[sample, ..., y : y + 8, x : x + 8] = True
    return torch.where(mask, 1.0, pixels), mask


def run(config: CodecTrainingConfig, codec: nn.Module, pixels: Tensor, seed: int = 0) -> dict[str, float]:
    metrics = method(config, codec).step(Batch(pixels=pixels), "student", 0, seeded(seed)).metrics
    return {name: float(value) for name, value in metrics.items()}


def test_an_exact_codec_has_no_loss() -> None:
    config = CodecTrainingConfig(
        l1=1.0, mse=1.0, noise=0.5, latent_penalty=0.0, focus="deviation", focus_strength=3.0, gradient=1.0,
        temporal=1.0, crop_px=16, crop_share=0.5,
    )  # fmt: skip
    codec = Stub()
    trained = method(config, codec)
    assert isinstance(trained, Method) and trained.networks == {"student": codec} and trained.roles(7) == ("student",)
    for seed in range(6):
        metrics = run(config, codec, sprites()[0], seed)
        assert metrics["loss"] == 0.0 and metrics["psnr"] == HIGHEST and metrics["psnr_focus"] == HIGHEST
    assert {tuple(p.shape[-2:]) for p in codec.pixels} == {(16, 16), (64, 64)}


def test_a_constant_error_has_its_closed_form() -> None:
    """Also with the terms of differences, which a constant does not touch; PSNR is 10 log10(2^2 / d^2)."""
    pixels = sprites()[0] * 0.5
    metrics = run(replace(PLAIN, gradient=5.0, temporal=5.0), Stub(0.1), pixels)
    assert math.isclose(metrics["loss"], 0.1 + 2 * 0.01, rel_tol=1e-4)
    assert math.isclose(metrics["psnr"], 10 * math.log10(4 / 0.01), rel_tol=1e-4)


def test_psnr_is_of_clamped_pixels_and_the_loss_is_not() -> None:
    metrics = run(PLAIN, Stub(0.5), torch.ones(1, 5, 3, 8, 8))
    assert metrics["psnr"] == HIGHEST and math.isclose(metrics["loss"], 0.5 + 2 * 0.25, rel_tol=1e-5)


def test_the_gradient_term_is_that_of_the_errors_differences() -> None:
    ramp = 0.01 * torch.arange(16.0)
    config = replace(PLAIN, l1=0.0, mse=1e-9, gradient=1.0)
    assert math.isclose(run(config, Stub(ramp), torch.zeros(1, 1, 3, 8, 16))["loss"], 0.01, rel_tol=1e-4)
    assert math.isclose(run(config, Stub(2 * ramp[:, None]), torch.zeros(1, 1, 3, 16, 8))["loss"], 0.02, rel_tol=1e-4)


def test_the_temporal_term_is_that_of_the_errors_change() -> None:
    """None of an error that stays; of one that grows by .01 a frame that of an error of .01; none of one frame."""
    config = replace(PLAIN, l1=1e-9, mse=2e-9, temporal=1e9)
    pixels = torch.zeros(2, 5, 3, 8, 8)
    assert run(config, Stub(0.3), pixels)["loss"] < 1e-6
    growing = 0.01 * torch.arange(5.0)[:, None, None, None]
    assert math.isclose(run(config, Stub(growing), pixels)["loss"], 0.01 + 2e-4, rel_tol=1e-3)
    assert run(config, Stub(0.3), pixels[:, :1])["loss"] < 1e-6


@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_focus_weighs_what_stands_out(strength: float) -> None:
    """An error on the sprite alone counts 1 + strength times, one on the sky once."""
    pixels, mask = sprites()
    config = replace(PLAIN, mse=0.0, l1=1.0, focus="deviation", focus_strength=strength)
    share = mask.float().mean().item()
    on_sprite = run(config, Stub(-0.1 * mask), pixels)
    on_sky = run(config, Stub(0.1 * ~mask), pixels)
    assert math.isclose(on_sprite["loss"], 0.1 * share * (1 + strength), rel_tol=1e-4)
    assert math.isclose(on_sky["loss"], 0.1 * (1 - share), rel_tol=1e-4)
    assert on_sky["psnr_focus"] == HIGHEST and math.isclose(
        on_sprite["psnr_focus"], 20 * math.log10(2 / 0.1), rel_tol=1e-4
    )


def test_focus_maps_know_no_world() -> None:
    pixels, mask = sprites()
    for axis in (-1, -2):  # a sky that fades to one side is not looked at, whichever side
        turned, sprite = (pixels, mask) if axis == -1 else (pixels.mT, mask.mT)
        assert torch.equal(focus_map(turned, "deviation") > 0, sprite)
    edges = focus_map(pixels, "gradient")
    inside = torch.zeros_like(mask)
    inside[..., 2:-2, 2:-2] = mask[..., 4:, 4:] & mask[..., :-4, :-4]
    assert bool((edges[~mask & (edges > 0.9)].numel() > 0) and (edges[inside] < 0.3).all())
    assert not focus_map(pixels, "none").any() and focus_map(pixels, "none").shape == mask.shape


def test_the_latent_penalty_is_the_divergence_from_the_standard_normal() -> None:
    latents = torch.randn(2, 2, 2, 4, 4)
    flat = latents.transpose(0, 2).flatten(1)
    shape = (1, 1, 2, 1, 1)
    white = (latents - flat.mean(1).view(shape)) / flat.std(1, correction=0).view(shape)
    config, pixels = replace(PLAIN, latent_penalty=0.5), torch.zeros(1, 5, 3, 8, 8)
    assert abs(run(config, Stub(0.0, white), pixels)["loss"]) < 1e-6
    metrics = run(config, Stub(0.0, white * torch.tensor([2.0, 1.0]).view(shape) + 1.0), pixels)
    expected = 0.25 * ((1 + 4 - math.log(4) - 1) + (1 + 1 - 0 - 1)) / 2
    assert math.isclose(metrics["loss"], expected, rel_tol=1e-5)
    assert math.isclose(metrics["latent_std"], 1.5, rel_tol=1e-5) and math.isclose(
        metrics["latent_std_min"], 1.0, rel_tol=1e-5
    )
    assert math.isclose(metrics["latent_offset"], 1.0, rel_tol=1e-5)


def test_crops_show_the_sprite_on_the_codecs_grid() -> None:
    """Every crop is a piece of its clip at multiples of 8 px, and nearly all show a part of the sprite."""
    pixels, mask = sprites(8)
    place = torch.arange(64 * 64).reshape(64, 64).float()  # tells where a crop was cut
    pixels[:, :, 2] = torch.where(mask[:, :, 0], pixels[:, :, 2], place / 1e6)
    codec, seen = Stub(), 0
    config = replace(PLAIN, focus="deviation", focus_strength=1.0, crop_px=24, crop_share=1.0)
    for seed in range(5):
        run(config, codec, pixels, seed)
        crops = codec.pixels[-1]
        assert crops.shape == (8, 5, 3, 24, 24)
        for sample, crop in enumerate(crops):
            cuts = [(y, x) for y in range(0, 41, 8) for x in range(0, 41, 8)
                    if torch.equal(crop, pixels[sample, ..., y : y + 24, x : x + 24])]  # fmt: skip
            assert len(cuts) == 1
            ((y, x),) = cuts
            seen += bool(mask[sample, ..., y : y + 24, x : x + 24].any())
    assert seen >= 36
    everywhere = replace(PLAIN, crop_px=24, crop_share=1.0)
    run(everywhere, codec, pixels[:1].expand(64, -1, -1, -1, -1))
    assert len({tuple(crop[0, 2, 0].tolist()) for crop in codec.pixels[-1]}) > 15


def test_a_share_of_the_batches_is_cropped() -> None:
    codec = Stub()
    for seed in range(60):
        run(replace(PLAIN, crop_px=8, crop_share=0.25), codec, torch.zeros(1, 1, 3, 16, 16), seed)
    assert 6 <= sum(p.shape[-1] == 8 for p in codec.pixels) <= 26


def test_noise_has_a_level_per_clip() -> None:
    codec, pixels = Stub(), torch.zeros(64, 9, 3, 32, 32)
    run(replace(PLAIN, noise=0.4), codec, pixels)
    noise = codec.noises[0]
    assert noise is not None and noise.shape == (64, 3, 2, 4, 4)
    levels = noise.flatten(1).std(1)
    assert levels.max() < 0.4 * 1.3 and levels.min() < 0.1 and 0.12 < levels.mean() < 0.28
    run(PLAIN, codec, pixels)
    assert codec.noises[1] is None


def real(seed: int = 0) -> Taehv:
    torch.manual_seed(seed)
    return Taehv(SIZES)


def test_the_generator_decides_everything() -> None:
    config = replace(
        PLAIN, noise=0.5, latent_penalty=1e-3, focus="gradient", focus_strength=1.0, crop_px=16, crop_share=0.5
    )
    codec, pixels = real(), sprites(4, size=32)[0]
    losses = [[run(config, codec, pixels, seed)["loss"] for seed in range(4)] for _ in range(2)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


def test_the_mean_over_parts_is_that_of_the_batch() -> None:
    config = replace(PLAIN, focus="deviation", focus_strength=2.0, gradient=0.5)
    codec, pixels = real(), sprites(4, size=32)[0]
    parts = [run(config, codec, part, 1)["loss"] for part in pixels.split(1)]
    assert math.isclose(run(config, codec, pixels)["loss"], sum(parts) / 4, rel_tol=1e-5)


def test_training_learns_to_reconstruct() -> None:
    config = replace(PLAIN, noise=0.1, latent_penalty=1e-3, focus="deviation", focus_strength=2.0)
    pixels, _ = sprites(2, size=16)
    torch.manual_seed(0)
    codec = Taehv(replace(SIZES, encoder_widths=12, decoder_widths=(16, 16, 12, 12), latent_channels=4))
    trained = method(config, codec)
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    before = run(config, codec, pixels)
    for step in range(40):
        optimizer.zero_grad()
        trained.step(Batch(pixels=pixels), "student", step, seeded(step)).loss.backward()
        optimizer.step()
    after = run(config, codec, pixels)
    assert after["loss"] < 0.4 * before["loss"] and after["psnr"] > before["psnr"] + 4


def test_measured_latents_normalise_the_codec() -> None:
    codec = real().double()
    batches = [
        Batch(pixels=torch.rand(n, 5, 3, 16, 16, generator=seeded(n), dtype=torch.float64) * 2 - 1) for n in (1, 3)
    ]
    mean, std = measure_latents(codec, batches)
    normal = codec.with_normalisation(mean, std)
    latents = torch.cat([normal.encode(b.pixels) for b in batches]).transpose(0, 2).flatten(1)  # type: ignore[arg-type]
    assert torch.allclose(latents.mean(1), torch.zeros(2).double(), atol=1e-9)
    assert torch.allclose(latents.std(1, correction=0), torch.ones(2).double(), atol=1e-9)
    again = measure_latents(normal, batches)
    assert torch.allclose(torch.tensor(again), torch.tensor((mean, std)), atol=1e-9)


def test_bad_measurements_are_refused() -> None:
    codec = real()
    with pytest.raises(ValueError, match="no batch"):
        measure_latents(codec, [])
    with pytest.raises(ValueError, match="the batch has no pixels"):
        measure_latents(codec, [Batch(captions=(("a",),))])
    codec.encoder[-1].weight.data[1] = 0.0  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"channels \[1\] are constant"):
        measure_latents(codec, [Batch(pixels=sprites(size=16)[0])])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"l1": -1.0}, "l1=-1.0"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"l1": 0.0, "mse": 0.0}, "nothing asks"),
        ({"focus": "sprites"}, "expected one of 'none', 'deviation', 'gradient'"),
        ({"focus": "deviation"}, "set both or neither"),
        ({"focus_strength": 1.0}, "set both or neither"),
        ({"crop_px": 32}, "set both or neither"),
        ({"crop_share": 0.5}, "set both or neither"),
        ({"crop_share": 1.5, "crop_px": 8}, "probability"),
        ({"crop_share": 0.5, "crop_px": 12}, "multiple of 8"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(PLAIN, **change)


def test_bad_batches_are_refused() -> None:
    good = sprites(size=16)[0]
    for pixels, match in (
        (None, "no pixels"),
        (good[0], r"expected floats \[b, f, 3, y, x\]"),
        ((good * 127).to(torch.uint8), "uint8"),
        (good[..., :15], "width_px=15"),
        (good[:, :4], "num_frames=4"),
    ):
        with pytest.raises(ValueError, match=match):
            method(PLAIN, real()).step(Batch(pixels=pixels, captions=(("a",),) * 2), "student", 0, seeded())
    with pytest.raises(ValueError, match="role='critic'"):
        method(PLAIN, real()).step(Batch(pixels=good), "critic", 0, seeded())
    with pytest.raises(ValueError, match="crop_px=24 of clips of 16x16 px"):
        run(replace(PLAIN, crop_px=24, crop_share=1.0), real(), good)
