"""Counts between pixels, latents and tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.geometry import Geometry

FUZZ = settings(max_examples=100, deadline=None, derandomize=True)
GEOMETRIES = st.builds(
    Geometry,
    temporal=st.integers(1, 8),
    spatial=st.integers(1, 16),
    patch=st.integers(1, 4),
    first_alone=st.booleans(),
)


def test_wan_in_numbers() -> None:
    """Wan2.1 at 480 x 832 and 81 frames: 21 latent frames of 60 x 104, 1560 tokens each; chunks of 3 are 9, then 12."""
    wan = Geometry()
    assert wan.latent_frames(81) == 21 and wan.pixel_frames(21) == 81
    assert wan.latent_size(480, 832) == (60, 104) and wan.tokens_per_frame(60, 104) == 1560
    assert [wan.pixel_frames(3, start=s) for s in (0, 3, 6)] == [9, 12, 12]
    assert Geometry(first_alone=False).pixel_frames(3) == 12


@given(geometry=GEOMETRIES, latents=st.integers(1, 40))
@FUZZ
def test_frames_there_and_back(geometry: Geometry, latents: int) -> None:
    assert geometry.latent_frames(geometry.pixel_frames(latents)) == latents


@given(geometry=GEOMETRIES, cuts=st.lists(st.integers(0, 6), min_size=1, max_size=6))
@FUZZ
def test_chunks_add_up_to_the_clip(geometry: Geometry, cuts: list[int]) -> None:
    at, pixels = 0, 0
    for count in cuts:
        pixels += geometry.pixel_frames(count, start=at)
        at += count
    assert pixels == geometry.pixel_frames(at)


@given(geometry=GEOMETRIES, frames=st.integers(-3, 60))
@FUZZ
def test_other_counts_are_refused_with_counts_that_work(geometry: Geometry, frames: int) -> None:
    valid = {geometry.pixel_frames(k) for k in range(1, 70)}
    if frames in valid:
        assert geometry.pixel_frames(geometry.latent_frames(frames)) == frames
        return
    with pytest.raises(ValueError, match="try") as error:
        geometry.latent_frames(frames)
    offered = [int(word) for word in str(error.value).split("try ")[1].split(" or ")]
    assert all(count in valid for count in offered), f"{error.value} offers {offered}"
    if frames > min(valid):
        assert offered[0] < frames < offered[1]


@given(geometry=GEOMETRIES, height=st.integers(-5, 200), width=st.integers(-5, 200))
@FUZZ
def test_sizes(geometry: Geometry, height: int, width: int) -> None:
    step = geometry.spatial * geometry.patch
    if height > 0 and width > 0 and height % step == width % step == 0:
        rows, columns = geometry.latent_size(height, width)
        assert (rows * geometry.spatial, columns * geometry.spatial) == (height, width)
        tokens = geometry.tokens_per_frame(rows, columns)
        assert tokens * geometry.patch**2 == rows * columns
    else:
        with pytest.raises(ValueError, match=rf"_px=-?\d+ is not a positive multiple of {step}; try"):
            geometry.latent_size(height, width)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"height_px=500 .*multiple of 16; try 496 or 512"):
        Geometry().latent_size(500, 832)
    with pytest.raises(ValueError, match=r"5x6.*multiples of 2.*6x6"):
        Geometry().tokens_per_frame(5, 6)
    for name in ("temporal", "spatial", "patch"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Geometry(**{name: 0})
    with pytest.raises(ValueError, match="at least 0"):
        Geometry().pixel_frames(-1)
    with pytest.raises(ValueError, match="at least 0"):
        Geometry().pixel_frames(1, start=-1)
