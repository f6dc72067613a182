"""The rollout against one that keeps no cache; forwards counted; streams that must not touch each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import (
    NOISE,
    Setting,
    assert_close,
    counted,
    differs,
    make_network,
    make_rollout,
    reference,
    run,
    shared_network,
    text,
)
from torch import Tensor

from unspool.models.wan.network import WanTransformer
from unspool.rollout.branches import FrameInputs
from unspool.rollout.noise import CounterNoise
from unspool.rollout.prompts import Switch
from unspool.rollout.rollout import rollout

FUZZ = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
EULER = (1.0, 0.93, 0.8, 0.55, 0.2, 0.0)
KEEP = (Switch(frame=3, text=text(1), policy="keep"), Switch(frame=6, text=text(2), policy="keep"))
BLEND = (Switch(frame=2, text=text(1), policy="keep", over=2), Switch(frame=6, text=text(2, rows=3), policy="keep"))


def network(dtype: torch.dtype = torch.float64) -> WanTransformer:
    return shared_network(dtype)


# ---- against a rollout without a cache ----------------------------------------------------------------------------

CASES = {
    "full": Setting(),
    "chunk 1": Setting(chunk=1, num_frames=5),
    "chunk 3, short end": Setting(chunk=3, num_frames=8),
    "first 1": Setting(chunk=3, first=1, num_frames=9),
    "first longer": Setting(chunk=2, first=3, num_frames=8),
    "shorter than a chunk": Setting(chunk=5, num_frames=3),
    "window": Setting(window=4),
    "window is the chunk": Setting(chunk=3, num_frames=8, window=3),
    "window off the chunk grid": Setting(chunk=3, window=8, num_frames=14),
    "window and sink": Setting(window=5, sink=1, num_frames=12),
    "sink off the chunk grid": Setting(chunk=3, window=8, sink=4, num_frames=14),
    "relative": Setting(window=5, sink=2, num_frames=12, relative=True),
    "relative, first 1": Setting(chunk=3, first=1, window=7, sink=3, num_frames=14, relative=True, offset=5),
    "one step": Setting(sigmas=(1.0, 0.0)),
    "euler, guided": Setting(solver="euler", sigmas=EULER, scale=4.0, window=5, sink=1),
    "multistep, guided": Setting(solver="multistep", sigmas=EULER, scale=2.5, chunk=3),
    "multistep, relative": Setting(solver="multistep", sigmas=EULER, scale=2.5, window=4, sink=2, relative=True),
    "few steps, guided": Setting(scale=3.0, window=4, sink=1),
    "scale 0": Setting(scale=0.0),
    "commit level": Setting(sigma_commit=0.1, window=4),
    "told another level": Setting(told=(0.97, 0.7)),
    "first chunk has more steps": Setting(first_sigmas=(1.0, 0.9, 0.5, 0.0)),
}


@pytest.mark.parametrize("commit", ["separate", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_rollout_without_a_cache(name: str, commit: str) -> None:
    """fp64, 1e-10: sizes that break, batch 2 with different prompts, two switches that keep the past."""
    setting = CASES[name]
    mode = "two_caches" if len(name) % 2 else "batch"
    got = run(network(), setting, text(0), KEEP, commit=commit, mode=mode)
    assert_close(got, torch.cat(reference(network(), setting, text(0), KEEP), 1))


@pytest.mark.parametrize("commit", ["separate", "fused"])
def test_equals_a_rollout_without_a_cache_in_fp32(commit: str) -> None:
    setting = Setting(window=5, sink=1, num_frames=12, relative=True, scale=2.0)
    prompt = text(0, dtype=torch.float32)
    got = run(network(torch.float32), setting, prompt, commit=commit)
    assert_close(got, torch.cat(reference(network(torch.float32), setting, prompt), 1))


@FUZZ
@given(data=st.data())
def test_any_sizes_equal_a_rollout_without_a_cache(data: st.DataObject) -> None:
    """Chunk, first chunk, length, window, sink, positions, prompts along the clip and batch drawn at random."""
    chunk, first = data.draw(st.integers(1, 4)), data.draw(st.none() | st.integers(1, 5))
    num_frames, sink = data.draw(st.integers(1, 11)), data.draw(st.integers(0, 5))
    longest = max(chunk, first or 0)
    window = data.draw(st.none() | st.integers(longest + sink, longest + sink + 5))
    setting = Setting(
        chunk=chunk, first=first, num_frames=num_frames, window=window, sink=0 if window is None else sink,
        relative=data.draw(st.booleans()), solver=data.draw(st.sampled_from(["few_step", "euler"])),
        scale=data.draw(st.sampled_from([1.0, 2.0])), sigma_commit=data.draw(st.sampled_from([0.0, 0.05])),
    )  # fmt: skip
    batch = data.draw(st.integers(1, 2))
    marks = sorted(data.draw(st.lists(st.integers(0, num_frames), max_size=3)))
    over = data.draw(st.integers(1, 3))
    switches = [Switch(frame=f, text=text(i + 1, batch), policy="keep", over=over) for i, f in enumerate(marks)]
    commit = data.draw(st.sampled_from(["separate", "fused"]))
    mode = data.draw(st.sampled_from(["batch", "two_caches"]))
    got = run(network(), setting, text(0, batch), switches, commit=commit, mode=mode)
    assert_close(got, torch.cat(reference(network(), setting, text(0, batch), switches), 1), 1e-9)


def test_the_comparison_can_fail() -> None:
    """One frame more in the window, another sink, another commit level or prompt shows in the latents."""
    setting = Setting(window=5, sink=1, num_frames=12)
    base = run(network(), setting, text(0))
    for changed in (
        replace(setting, window=6), replace(setting, sink=2), replace(setting, sigma_commit=0.1),
        replace(setting, relative=True), replace(setting, scale=1.2), replace(setting, told=(0.99, 0.8)),
        replace(setting, first_sigmas=(1.0, 0.7, 0.0)), replace(setting, solver="euler"),
    ):  # fmt: skip
        assert differs(run(network(), changed, text(0)), base), changed
    assert differs(run(network(), setting, text(0), KEEP), base)


# ---- how many forwards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "two_caches"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("commit", ["separate", "fused", "none"])
def test_forwards_per_chunk(commit: str, scale: float, mode: str) -> None:
    """steps + 1 with a commit of its own and steps otherwise; the last chunk is never committed."""
    setting = Setting(chunk=3, num_frames=12, sigmas=(1.0, 0.9, 0.6, 0.0), scale=scale, window=6)
    stream = make_rollout(network(), setting, text(0), commit=commit, mode=mode)
    copies = 2 if scale != 1.0 and mode == "two_caches" else 1
    with counted(network()) as calls:
        spent = []
        for _ in stream:
            spent.append(len(calls))
            calls.clear()
    per_chunk = 4 if commit == "separate" else 3
    assert spent == [3 * copies, *[per_chunk * copies] * 3]
    assert stream.is_finished


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_blended_prompt_stays_fused(scale: float) -> None:
    """While texts blend, the commit under the old text and the denoise under the new one share a forward."""
    switch = Switch(frame=2, text=text(1), policy="keep", over=4)
    stream = make_rollout(network(), Setting(num_frames=12, scale=scale), text(0), [switch], commit="fused")
    with counted(network()) as calls:
        list(stream)
    assert len(calls) == 6 * 2


def test_a_kept_switch_stays_fused() -> None:
    """A switch that leaves the past alone has no need of a separate commit: 2 forwards a chunk, not 3."""
    stream = make_rollout(network(), Setting(), text(0), KEEP, commit="fused")
    with counted(network()) as calls:
        list(stream)
    assert len(calls) == 4 * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("scale", "mode"), [(1.0, "batch"), (2.0, "batch"), (2.0, "two_caches")])
def test_fused_equals_separate(scale: float, mode: str, dtype: torch.dtype) -> None:
    """Across switches and a blend, where the two segments of a forward follow different prompts."""
    setting = Setting(num_frames=12, scale=scale, window=5, sink=1)
    for switches in (KEEP, BLEND):
        cast = [replace(s, text=s.text.to(dtype)) for s in switches]
        args = (network(dtype), setting, text(0, dtype=dtype), cast)
        fused = run(*args, commit="fused", mode=mode)
        assert_close(fused, run(*args, mode=mode))
        assert differs(fused, run(*args[:3], commit="fused", mode=mode))


def test_commit_none_keeps_what_the_last_step_wrote() -> None:
    """Without commit passes later chunks read other keys: same first chunk, other ones after."""
    none, separate = (run(network(), Setting(), text(0), commit=c) for c in ("none", "separate"))
    assert torch.equal(none[:, :2], separate[:, :2])
    assert differs(none[:, 2:], separate[:, 2:])


# ---- guidance and other inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["separate", "fused", "none"])
def test_one_batch_equals_two_caches(commit: str) -> None:
    setting = Setting(window=5, sink=2, num_frames=12, scale=3.0, relative=True)
    switches = [*KEEP, Switch(frame=8, text=text(3), policy="recache")]
    one, two = (run(network(), setting, text(0), switches, commit=commit, mode=m) for m in ("batch", "two_caches"))
    assert_close(one, two)


@pytest.mark.parametrize("mode", ["batch", "two_caches"])
def test_scale_one_is_no_guidance(mode: str) -> None:
    """Bit for bit, with and without a negative text, and with one cache of the plain size."""
    plain = make_rollout(network(), Setting(), text(0))
    with_text = make_rollout(network(), Setting(), text(0), mode=mode, negative=text(99))
    assert plain.branches.num_bytes == with_text.branches.num_bytes
    for a, b in zip(plain, with_text, strict=True):
        assert torch.equal(a.latents, b.latents)


def conditioned(batch: int, scale: float, mode: str) -> Tensor:
    net = make_network(extra_channels=2, frame_vector_dim=3).requires_grad_(False)
    draw = torch.Generator().manual_seed(5)
    channels = torch.randn(2, 8, 2, 2, 4, generator=draw, dtype=torch.float64)[:batch]
    vectors = torch.randn(2, 8, 3, generator=draw, dtype=torch.float64)[:batch]

    def inputs(frames: range) -> FrameInputs:
        return FrameInputs(channels=channels[:, list(frames)], vectors=vectors[:, list(frames)])

    outs = [
        run(net, Setting(scale=scale), text(0, batch), commit=c, mode=mode, frame_conditions=inputs)
        for c in ("separate", "fused")
    ]
    assert_close(*outs)
    return outs[0]


def test_frame_conditions_follow_their_frames() -> None:
    """Fused equals separate with channels and vectors per frame, and one batch equals two caches."""
    assert_close(conditioned(2, 2.0, "batch"), conditioned(2, 2.0, "two_caches"))
    assert_close(conditioned(2, 1.0, "batch")[:1], conditioned(1, 1.0, "batch"))


def test_frame_conditions_of_one_sample_with_guidance_in_one_batch() -> None:
    """Batch 1 is the common case of a stream; the network gets 2 samples of x and 1 of channels."""
    assert_close(conditioned(1, 2.0, "batch"), conditioned(1, 2.0, "two_caches"))


# ---- streams do not touch each other ------------------------------------------------------------------------------


def test_samples_do_not_depend_on_the_batch() -> None:
    setting = Setting(window=5, sink=1, num_frames=12, scale=2.0)
    both = run(network(), setting, text(0), KEEP, noise=CounterNoise(3, sample_ids=(7, 4)))
    for row, sample in enumerate((7, 4)):
        alone = [replace(s, text=s.text[row : row + 1]) for s in KEEP]
        negative = text(99)[row : row + 1]
        one = run(
            network(), setting, text(0)[row : row + 1], alone, noise=CounterNoise(3, sample_ids=(sample,)),
            negative=negative,
        )  # fmt: skip
        assert_close(one, both[row : row + 1])


@dataclass
class Watched:
    """A noise source that remembers what it gave, frame by frame."""

    given: dict[tuple[int, int], Tensor]

    def draw(self, frames: range, step: int, *rest: Any) -> Tensor:
        drawn = NOISE.draw(frames, step, *rest)
        for i, frame in enumerate(frames):
            self.given[frame, step] = drawn[:, i]
        return drawn


def test_noise_does_not_depend_on_the_chunk_size() -> None:
    """A stream cut otherwise draws the same numbers for a latent frame and step, each of which is used once."""
    seen = []
    for setting in (Setting(), Setting(chunk=3), Setting(chunk=3, first=1), Setting(chunk=5)):
        watched: Any = Watched({})
        run(network(), setting, text(0), noise=watched)
        seen.append(watched.given)
    assert set(seen[0]) == {(f, s) for f in range(8) for s in range(2)}
    for other in seen[1:]:
        assert set(other) == set(seen[0]) and all(torch.equal(other[k], seen[0][k]) for k in other)


@pytest.mark.parametrize("commit", ["separate", "fused"])
def test_interleaved_rollouts_are_bitwise_what_they_are_alone(commit: str) -> None:
    """Two streams of different settings and prompts take turns on one network."""
    a, b = Setting(window=5, sink=1, num_frames=12, relative=True), Setting(window=4, num_frames=12, scale=2.0)
    switch = [Switch(frame=6, text=text(5), policy="recache")]
    alone = run(network(), a, text(0), switch, commit=commit), run(network(), b, text(1), commit=commit)
    one = make_rollout(network(), a, text(0), switch, commit=commit)
    two = make_rollout(network(), b, text(1), commit=commit)
    turns = [(one.next_chunk().latents, two.next_chunk().latents) for _ in range(6)]
    for want, got in zip(alone, zip(*turns, strict=True), strict=True):
        assert torch.equal(torch.cat(got, 1), want)


def test_rollout_function_and_chunks() -> None:
    """`rollout` yields what `Rollout` does: consecutive frames, the prompt's number, whether a switch began."""
    stream = make_rollout(network(), Setting(chunk=3), text(0), KEEP)
    chunks = list(rollout(network(), stream.config, text(0), noise=NOISE, latent_size=(2, 4)))
    assert [c.frames for c in chunks] == [range(0, 3), range(3, 6), range(6, 8)]
    assert [(c.prompt, c.switched) for c in stream] == [(0, False), (1, True), (2, True)]


# ---- length and position ------------------------------------------------------------------------------------------


def test_a_long_stream_keeps_its_bytes() -> None:
    """60 chunks in fp32, relative positions: bytes constant from the first chunk, positions within the window."""
    setting = Setting(window=6, sink=2, relative=True, num_frames=None)
    stream = make_rollout(network(torch.float32), setting, text(0, dtype=torch.float32))
    sizes = set()
    for _ in range(60):
        latents = stream.next_chunk().latents
        assert latents.isfinite().all() and latents.abs().max() < 100
        sizes.add(stream.branches.num_bytes)
    cache = stream.branches.caches[0]
    held = sum(t.numel() * 4 for e in cache.entries.values() for t in (e.keys, e.values, e.masters) if t is not None)
    assert sizes == {held}
    cache.slots.check()
    assert cache.frames.intervals == ((0, 2), (116, 118))
    assert len(stream.history.chunks) <= 1 + 3 + 1 and len(stream.starts) <= 64
    # Keys are written at the position of their turn and later read up to one common shift: it must stay bounded.
    assert all(abs(p) < 1000 for p in cache.slots.baked.values())


@pytest.mark.parametrize("offset", [10**6 + 7])
def test_a_position_above_a_million(offset: int) -> None:
    setting = Setting(window=5, sink=1, num_frames=12)
    assert_close(run(network(), replace(setting, offset=offset), text(0)), run(network(), setting, text(0)), 1e-8)
