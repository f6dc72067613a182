"""The TAEHV codec: published tensors, streams equal to whole clips, causality, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from unspool.models.taehv import Taehv, TaehvConfig
from unspool.models.taehv.layers import MemoryBlock

Golden = Callable[[str], dict[str, Tensor]]
Read = Callable[[str], Any]

TOLERANCE = 2e-5  # fp32 on both sides, values up to 6
TINY = TaehvConfig(encoder_widths=8, decoder_widths=(16, 12, 8, 8), padding="end")
SMALL = TaehvConfig(
    encoder_widths=(4, 5, 6, 7), decoder_widths=(7, 6, 5, 4), latent_channels=3, num_blocks=1, padding="start",
    latent_mean=(0.5, -1.0, 0.0), latent_std=(2.0, 0.5, 1.5),
)  # fmt: skip
FULL = TaehvConfig(decoder_widths=(256, 128, 64, 64), padding="end")
PADDINGS = pytest.mark.parametrize("padding", ["start", "end"])


def make(config: TaehvConfig, dtype: torch.dtype = torch.float64) -> Taehv:
    """Seeded weights, none of them zero, so that every memory matters."""
    torch.manual_seed(0)
    codec = Taehv(config)
    for module in codec.modules():
        if isinstance(module, MemoryBlock):
            torch.nn.init.normal_(module.last.weight, std=0.1)
    return codec.to(dtype)


def clip(frames: int, *, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, 8, 16, generator=rng, dtype=dtype) * 2 - 1


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    worst = (got - want).abs().max().item()
    assert worst <= tolerance, f"largest difference {worst:.3g} > {tolerance:.3g}"


# ---- published tensors --------------------------------------------------------------------------------------------


@pytest.fixture
def weights(golden: Golden) -> dict[str, Tensor]:
    return {name[8:]: tensor for name, tensor in golden("codec_tiny").items() if name.startswith("weights/")}


@pytest.fixture
def published(weights: dict[str, Tensor]) -> Taehv:
    codec = Taehv(TINY)
    codec.load_state_dict(weights, strict=True)
    return codec


ENCODE = ("encode_9_frames", "encode_12_frames", "encode_6_frames")
DECODE = ("decode_3_latents", "decode_5_latents")


def test_every_golden_case_is_tested(golden_json: Read) -> None:
    assert set(golden_json("codec_tiny")["cases"]) == {*ENCODE, *DECODE, "decode_half_rate"}


@pytest.mark.parametrize("case", ENCODE)
def test_golden_encode(case: str, golden: Golden, golden_json: Read, published: Taehv) -> None:
    tensors, facts = golden("codec_tiny"), golden_json("codec_tiny")["cases"][case]
    pixels, want = tensors[f"{case}/frames"] * 2 - 1, tensors[f"{case}/latents"]
    assert want.std() > 0.5
    near(published.encode(pixels), want, TOLERANCE)
    near(published.encode_raw(pixels).detach(), want, TOLERANCE)
    state, ready, parts = None, [], []
    for index in range(pixels.shape[1]):
        latents, state = published.encode_stream(pixels[:, index : index + 1], state)
        ready += [index] * latents.shape[1]
        parts.append(latents)
    assert ready == facts["frame_index_after_which_a_latent_is_ready"] and state is not None
    near(torch.cat([*parts, published.encode_rest(state)], 1), tensors[f"{case}/latents_sequential"], TOLERANCE)


@pytest.mark.parametrize("case", DECODE)
def test_golden_decode(case: str, golden: Golden, golden_json: Read, published: Taehv) -> None:
    tensors, facts = golden("codec_tiny"), golden_json("codec_tiny")["cases"][case]
    latents, want = tensors[f"{case}/latents"], tensors[f"{case}/frames"]
    near(published.decode(latents), want * 2 - 1, TOLERANCE)
    near(published.decode_raw(latents).detach(), tensors[f"{case}/raw"][:, 3:] * 2 - 1, TOLERANCE)
    state, parts = None, []
    for latent in latents.split(1, dim=1):
        pixels, state = published.decode_stream(latent, state)
        parts.append(pixels)
    assert [p.shape[1] for p in parts] == facts["frames_ready_after_each_latent"]
    near(torch.cat(parts, 1), tensors[f"{case}/frames_sequential"] * 2 - 1, TOLERANCE)


def test_golden_half_rate(golden: Golden, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Half the frames from the same file: a growth layer keeps its last rows."""
    tensors = golden("codec_tiny")
    save_file(weights, tmp_path / "published.safetensors")
    codec = Taehv.from_single_file(tmp_path / "published.safetensors", growth=(1, 1, 2))
    near(codec.decode(tensors["decode_3_latents/latents"]), tensors["decode_half_rate/frames"] * 2 - 1, TOLERANCE)


def test_full_width_has_the_published_keys_and_parameters(golden_json: Read) -> None:
    with torch.device("meta"):
        codec = Taehv(FULL)
    facts = golden_json("codec_tiny")["real_model"]
    assert {name: list(tensor.shape) for name, tensor in codec.state_dict().items()} == facts["shapes"]
    assert sum(p.numel() for p in codec.parameters()) == facts["parameters"] == 11_315_539


# ---- streams ------------------------------------------------------------------------------------------------------


def pieces(total: int, cuts: list[int]) -> list[int]:
    """Lengths of what `total` falls into when cut after each of `cuts`."""
    marks = sorted({0, total, *(cut for cut in cuts if cut < total)})
    return [b - a for a, b in itertools.pairwise(marks)]


@PADDINGS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@settings(max_examples=8, deadline=None)
@given(groups=st.integers(0, 4), cuts=st.lists(st.integers(1, 16), max_size=5))
def test_streams_equal_whole_clips(
    padding: Any, dtype: torch.dtype, tolerance: float, groups: int, cuts: list[int]
) -> None:
    codec = make(replace(SMALL, padding=padding), dtype)
    pixels = clip(1 + 4 * groups, dtype=dtype)
    whole = codec.encode_raw(pixels).detach()
    assert whole.shape == (2, 1 + groups, 3, 1, 2)
    state, parts = None, []
    for piece in pixels.split(pieces(1 + 4 * groups, cuts), dim=1):
        latents, state = codec.encode_stream(piece, state)
        parts.append(latents)
    assert state is not None
    near(torch.cat([*parts, codec.encode_rest(state)], 1), whole, tolerance)

    decoded = codec.decode_raw(whole).detach().clamp(-1, 1)
    assert decoded.shape == pixels.shape
    place, parts = None, []
    for piece in whole.split(pieces(1 + groups, cuts), dim=1):
        frames, place = codec.decode_stream(piece, place)
        parts.append(frames)
    near(torch.cat(parts, 1), decoded, tolerance)


@PADDINGS
@settings(max_examples=6, deadline=None)
@given(groups=st.integers(0, 5), frames_per_call=st.integers(1, 24))
def test_long_clips_go_through_in_pieces(padding: Any, groups: int, frames_per_call: int) -> None:
    codec, pixels = make(replace(SMALL, padding=padding)), clip(1 + 4 * groups)
    latents = codec.encode_raw(pixels).detach()
    frames = codec.decode_raw(latents).detach().clamp(-1, 1)
    seen: list[int] = []
    for half in (codec.encoder, codec.decoder):
        half.register_forward_pre_hook(lambda half, args: seen.append(len(args[0]) // args[1]))
    near(codec.encode(pixels, frames_per_call=frames_per_call), latents, 1e-12)
    assert max(seen) <= max(4, frames_per_call + 3)  # the three repeats of start padding join the first piece
    seen.clear()
    near(codec.decode(latents, frames_per_call=frames_per_call), frames, 1e-12)
    assert max(seen) <= max(1, frames_per_call // 4) and sum(seen) == 1 + groups


def test_two_streams_do_not_disturb_each_other() -> None:
    codec = make(SMALL)
    first, second = clip(13, seed=1), clip(13, seed=2)
    states: dict[int, Any] = {0: None, 1: None}
    latents: dict[int, list[Tensor]] = {0: [], 1: []}
    for piece in range(0, 13, 2):
        for number, pixels in enumerate((first, second)):
            found, states[number] = codec.encode_stream(pixels[:, piece : piece + 2], states[number])
            latents[number].append(found)
    joined = [torch.cat(latents[number], 1) for number in (0, 1)]
    near(joined[0], codec.encode(first), 1e-12)
    near(joined[1], codec.encode(second), 1e-12)
    places: list[Any] = [None, None]
    frames: list[list[Tensor]] = [[], []]
    for index in range(4):
        for number in (0, 1):
            found, places[number] = codec.decode_stream(joined[number][:, index : index + 1], places[number])
            frames[number].append(found)
    near(torch.cat(frames[0], 1), codec.decode(joined[0]), 1e-12)
    near(torch.cat(frames[1], 1), codec.decode(joined[1]), 1e-12)


def test_a_state_is_a_value() -> None:
    """A state that was used once gives the same again, so a session can be rewound to it."""
    codec, latents = make(SMALL), make(SMALL).encode(clip(9))
    _, state = codec.decode_stream(latents[:, :1], None)
    once, _ = codec.decode_stream(latents[:, 1:], state)
    again, _ = codec.decode_stream(latents[:, 1:], state)
    assert torch.equal(once, again)


# ---- time ---------------------------------------------------------------------------------------------------------


def test_start_padding_repeats_the_first_frame() -> None:
    pixels = clip(9)
    longer = torch.cat([pixels[:, :1]] * 3 + [pixels], dim=1)
    near(make(SMALL).encode(pixels), make(replace(SMALL, padding="end")).encode(longer), 1e-12)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8])
def test_end_padding_repeats_the_last_frame(frames: int) -> None:
    codec, pixels = make(replace(SMALL, padding="end")), clip(frames)
    longer = torch.cat([pixels] + [pixels[:, -1:]] * (-frames % 4), dim=1)
    near(codec.encode(pixels), codec.encode_raw(longer).detach(), 1e-12)
    assert codec.encode(pixels).shape[1] == -(-frames // 4)


@PADDINGS
@pytest.mark.parametrize("frame", range(9))
def test_latents_depend_on_what_the_padding_says(padding: Any, frame: int) -> None:
    codec, pixels = make(replace(SMALL, padding=padding)), clip(9)
    changed = pixels.clone()
    changed[:, frame] = -pixels[:, frame]
    differs = (codec.encode(pixels) != codec.encode(changed)).flatten(2).any(2).any(0)
    first = -(-frame // 4) if padding == "start" else frame // 4
    assert differs.tolist() == [latent >= first for latent in range(3)]


@pytest.mark.parametrize("latent", range(3))
def test_frames_do_not_depend_on_later_latents(latent: int) -> None:
    codec = make(SMALL)
    latents = codec.encode(clip(9))
    changed = latents.clone()
    changed[:, latent] += 1.0
    differs = (codec.decode_raw(latents) != codec.decode_raw(changed)).flatten(2).any(2).any(0)
    assert differs.tolist() == [frame >= 4 * latent - 3 for frame in range(9)]


# ---- training -----------------------------------------------------------------------------------------------------


def test_forward_is_decode_of_encode_with_noise_in_units_of_std() -> None:
    codec, pixels = make(SMALL), clip(5)
    noise = torch.randn(2, 2, 3, 1, 2, dtype=torch.float64)
    found, latents = codec(pixels, noise)
    near(latents, codec.encode_raw(pixels), 0.0)
    std = latents.detach().transpose(0, 2).flatten(1).std(1, correction=0)
    near(found, codec.decode_raw(latents + noise * std[:, None, None]), 1e-12)
    near(codec(pixels)[0], codec.decode_raw(latents), 0.0)
    found.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in codec.parameters())


def test_gradients_are_those_of_finite_differences() -> None:
    codec = make(replace(SMALL, latent_mean=None, latent_std=None))
    pixels = clip(5, batch=1)[..., :8, :8].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: codec(x)[0].sum(dim=(0, 1, 3, 4)), pixels, fast_mode=True)


def test_decode_clamps_and_carries_no_gradient() -> None:
    codec, latents = make(SMALL), 30 * make(SMALL).encode(clip(5))
    codec.decoder[-1].weight.data.mul_(30)  # type: ignore[union-attr, operator]
    raw = codec.decode_raw(latents)
    pixels = codec.decode(latents)
    assert raw.abs().max() > 2 and pixels.abs().max() == 1 and raw.requires_grad
    assert not pixels.requires_grad and not codec.encode(clip(5)).requires_grad


def test_a_fresh_codec_begins_simple() -> None:
    """Memory blocks are the identity of what is not negative, and latents of zero are grey."""
    codec = Taehv(replace(SMALL, latent_mean=None, latent_std=None))
    block = next(m for m in codec.modules() if isinstance(m, MemoryBlock))
    x = torch.rand(4, block.last.out_channels, 2, 2)
    assert torch.equal(block(x, x[:2]), x)
    assert torch.equal(codec.decode(torch.zeros(1, 2, 3, 2, 2)), torch.zeros(1, 5, 3, 16, 16))


def test_bf16_and_autocast_stay_near() -> None:
    codec, pixels = make(SMALL, torch.float32), clip(5, dtype=torch.float32)
    exact = codec.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        near(codec.encode(pixels), exact, 0.2)
    near(make(SMALL, torch.bfloat16).encode(pixels), exact, 0.2)
    near(make(SMALL, torch.bfloat16).decode(exact), codec.decode(exact), 0.1)


def test_training_after_inference_mode() -> None:
    """The normalisation was made in inference mode and then stood in the graph, which torch refuses."""
    codec = make(SMALL)
    with torch.inference_mode():
        codec.decode(codec.encode(clip(5)))
    codec(clip(5))[0].mean().backward()


# ---- normalisation ------------------------------------------------------------------------------------------------


def test_normalisation_is_outside_of_the_network() -> None:
    plain = make(replace(SMALL, latent_mean=None, latent_std=None))
    scaled = plain.with_normalisation(torch.tensor([1.0, 2.0, 3.0]), (0.5, 1.0, 2.0))
    pixels, own = clip(5), plain.encode(clip(5))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((1.0, 2.0, 3.0), (0.5, 1.0, 2.0)))
    near(scaled.encode(pixels), (own - mean) / std, 1e-12)
    near(scaled.decode(scaled.encode(pixels)), plain.decode(own), 1e-12)
    assert plain.config.latent_mean is None and scaled.config.latent_std == (0.5, 1.0, 2.0)
    near(scaled.with_normalisation((0.0,) * 3, (1.0,) * 3).encode(pixels), own, 1e-12)
    scaled.encoder[0].weight.data.zero_()  # type: ignore[union-attr, operator]
    near(plain.encode(pixels), own, 0.0)


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encoder_widths": (8, 8, 8)}, "encoder_widths"),
        ({"encoder_widths": 0}, "encoder_widths"),
        ({"decoder_widths": (8, 8, 8, 0)}, "decoder_widths"),
        ({"decoder_widths": 8}, "decoder_widths"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"padding": "middle"}, "padding='middle'"),
        ({"growth": (1, 2, 3)}, "growth"),
        ({"latent_mean": (0.0,) * 3}, "or neither"),
        ({"latent_mean": (0.0,) * 16, "latent_std": (1.0,) * 3}, "16 values"),
        ({"latent_mean": (0.0,) * 16, "latent_std": (0.0,) * 16}, "above 0"),
    ],
)
def test_bad_sizes_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((5, 3, 16, 16), r"\[b, f, 3, y, x\]"),
        ((1, 5, 4, 16, 16), r"\[b, f, 3, y, x\]"),
        ((1, 0, 3, 16, 16), "none of them 0"),
        ((1, 5, 3, 20, 16), "height_px=20 is not a positive multiple of 8; try 16 or 24"),
        ((1, 5, 3, 16, 15), "width_px=15"),
        ((1, 6, 3, 16, 16), "num_frames=6 cannot be encoded: expected 1 \\+ 4 k; try 5 or 9"),
    ],
)
def test_bad_pixels_are_refused(shape: tuple[int, ...], match: str) -> None:
    codec = make(SMALL, torch.float32)
    for encode in (codec.encode, codec.encode_raw, codec):
        with pytest.raises(ValueError, match=match):
            encode(torch.zeros(shape))


def test_bytes_bad_latents_and_strange_states_are_refused() -> None:
    codec = make(SMALL, torch.float32)
    with pytest.raises(ValueError, match="uint8"):
        codec.encode(torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8))
    for shape in ((1, 2, 4, 2, 2), (1, 0, 3, 2, 2), (2, 3, 2, 2)):
        for decode in (codec.decode, codec.decode_raw):
            with pytest.raises(ValueError, match=r"expected \[b, t, 3, h, w\]"):
                decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected floats"):
        codec.decode(torch.zeros(1, 1, 3, 2, 2, dtype=torch.int64))
    _, place = codec.decode_stream(torch.zeros(1, 1, 3, 2, 2), None)
    _, state = codec.encode_stream(torch.zeros(1, 2, 3, 16, 16), None)
    for latents in (torch.zeros(2, 1, 3, 2, 2), torch.zeros(1, 1, 3, 4, 2)):
        with pytest.raises(ValueError, match="start a new one with state=None"):
            codec.decode_stream(latents, place)
    for pixels in (torch.zeros(2, 1, 3, 16, 16), torch.zeros(1, 1, 3, 32, 16)):
        with pytest.raises(ValueError, match="start a new one with state=None"):
            codec.encode_stream(pixels, state)
    with pytest.raises(ValueError, match="1 frames are left over"):
        codec.encode_rest(state)
