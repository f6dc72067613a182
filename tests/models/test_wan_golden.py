"""The Wan transformer against published implementations: every forward, mask, cached loop, and what a cache ends with.

Golden latents are `b c f h w` with timestep = 1000 sigma; ours are `b t c h w` with sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.causal.cache.kv import KVCache
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.mask import causal_mask, teacher_forcing_mask
from unspool.causal.position import Absolute, PositionPolicy, ReanchoredSink, WindowRelative
from unspool.causal.visibility import Full, Kind, Segment, Visibility, Window
from unspool.models.base import Conditioning
from unspool.models.wan.config import WanConfig
from unspool.models.wan.keys import to_own
from unspool.models.wan.network import WanTransformer
from unspool.ops.rope import Rope, rotate

Golden = Callable[[str], dict[str, Tensor]]
Read = Callable[[str], Any]

TOLERANCE = 1e-4  # stated with the wan_tiny files; outputs have a std of about 1.6
LOOP_TOLERANCE = 2e-5  # suggested by the notes of the later files; fp32 on both sides


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + "/")}
    assert found, f"no golden tensor starts with {prefix}/"
    return found


def swap(x: Tensor) -> Tensor:
    """Channels and time."""
    return x.transpose(1, 2)


def load(config: dict[str, Any], weights: dict[str, Tensor], naming: Any = "original") -> WanTransformer:
    network = WanTransformer(WanConfig.parse(config))
    network.load_state_dict(to_own(weights, naming), strict=True)
    return network


def agree(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert want.std() > 0.5, "a golden output that is nearly constant shows nothing"
    worst = (got - want).abs().max().item()
    assert worst <= tolerance, f"largest difference {worst:.3g} > {tolerance:.3g}"


# ---- forwards -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(golden: Golden, golden_json: Read) -> WanTransformer:
    return load(golden_json("wan_tiny_config"), golden("wan_tiny_weights"))


def cond(network: WanTransformer, context: Tensor) -> Conditioning:
    return Conditioning(prompts=network.prepare(context))


def test_every_case_of_wan_tiny_is_tested(golden: Golden) -> None:
    tested = {"bidirectional", *MASKED, *FORCED, *LOOPS}
    assert {name.split("/")[0] for name in golden("wan_tiny_cases")} == tested


def test_bidirectional(tiny: WanTransformer, golden: Golden) -> None:
    case = part(golden("wan_tiny_cases"), "bidirectional")
    sigma = case["timestep"][:, None] / 1000
    out = tiny(swap(case["latents"]), sigma, cond(tiny, case["context"]), FullSequence(9))
    agree(swap(out), case["flow"], TOLERANCE)


MASKED: dict[str, tuple[ChunkPlan, Visibility]] = {
    "block_causal_3": (ChunkPlan(chunk=3), Full()),
    "block_causal_1": (ChunkPlan(chunk=1), Full()),
    "block_causal_3_window_6": (ChunkPlan(chunk=3), Window(window=6)),
    "block_causal_1_4_4": (ChunkPlan(chunk=4, first=1), Full()),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("backend", ["slices", "dense", "flex"])
@pytest.mark.parametrize("name", MASKED)
def test_block_causal(name: str, backend: Any, tiny: WanTransformer, golden: Golden) -> None:
    case, (plan, visibility) = part(golden("wan_tiny_cases"), name), MASKED[name]
    context = FullSequence(9, causal_mask(plan, 9, visibility, Absolute()), backend=backend)
    out = tiny(swap(case["latents"]), case["timestep"] / 1000, cond(tiny, case["context"]), context)
    agree(swap(out), case["flow"], TOLERANCE)


FORCED = ("teacher_forcing_3", "teacher_forcing_3_context_noise")


@pytest.mark.parametrize("backend", ["slices", "dense"])
@pytest.mark.parametrize("name", FORCED)
def test_teacher_forcing(name: str, backend: Any, tiny: WanTransformer, golden: Golden) -> None:
    case = part(golden("wan_tiny_cases"), name)
    x = torch.cat([swap(case["clean_latents"]), swap(case["latents"])], 1)
    level = case.get("context_timestep", torch.zeros_like(case["timestep"]))
    mask = teacher_forcing_mask(ChunkPlan(chunk=3), 9, Full(), Absolute())
    sigma = torch.cat([level, case["timestep"]], 1) / 1000
    out = tiny(x, sigma, cond(tiny, case["context"]), FullSequence(18, mask, backend=backend))
    agree(swap(out[:, 9:]), case["flow"], TOLERANCE)


# ---- cached loops -------------------------------------------------------------------------------------------------


def loop(
    network: WanTransformer,
    cache: KVCache,
    chunk: int,
    noisy: Tensor,
    clean: Tensor,
    timesteps: tuple[float, ...],
    prompts: Conditioning,
) -> tuple[Tensor, Tensor]:
    """Per chunk: a pass on noisy[i, j] at every timestep, then a commit of clean[i] at 0."""
    flow_noisy, flow_clean = [], []
    for i in range(clean.shape[0]):
        frames = range(i * chunk, (i + 1) * chunk)
        passes = []
        for j, timestep in enumerate(timesteps):
            view = cache.begin((Segment(kind=Kind.DENOISE, frames=frames),))
            passes.append(swap(network(swap(noisy[i, j]), torch.tensor([[timestep / 1000]]), prompts, view)))
        view = cache.begin((Segment(kind=Kind.COMMIT, frames=frames),))
        flow_clean.append(swap(network(swap(clean[i]), torch.zeros(1, 1), prompts, view)))
        cache.promote()
        flow_noisy.append(torch.stack(passes))
    return torch.stack(flow_noisy), torch.stack(flow_clean)


LOOPS: dict[str, tuple[int, Visibility]] = {
    "kv_rollout_chunk3": (3, Full()),
    "kv_rollout_chunk1": (1, Full()),
    "kv_rollout_chunk3_window6": (3, Window(window=6)),
    "kv_rollout_chunk3_window9_sink3": (3, Window(window=9, sink=3)),
    "kv_rollout_chunk1_window4_sink1": (1, Window(window=4, sink=1)),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_cached_loop(name: str, grad: bool, tiny: WanTransformer, golden: Golden) -> None:
    case, (chunk, visibility) = part(golden("wan_tiny_cases"), name), LOOPS[name]
    cache = KVCache(tiny.sites, batch=2, tokens_per_frame=12, visibility=visibility, positions=Absolute())
    with torch.set_grad_enabled(grad):
        prompts = cond(tiny, case["context"])
        noisy, clean = loop(tiny, cache, chunk, case["noisy"], case["clean"], (937.5, 625.0), prompts)
    agree(noisy.detach(), case["flow_noisy"], TOLERANCE)
    agree(clean.detach(), case["flow_clean"], TOLERANCE)


def test_cached_loop_is_the_teacher_forcing_forward(tiny: WanTransformer, golden: Golden) -> None:
    """The identity that stands beside the golden cases, on their own tensors."""
    case = part(golden("wan_tiny_cases"), "kv_rollout_chunk3")
    clean = torch.cat([swap(c) for c in case["clean"]], 1)
    noisy = torch.cat([swap(c[0]) for c in case["noisy"]], 1)
    frames = clean.shape[1]
    sigma = torch.cat([torch.zeros(1, frames), torch.full((1, frames), 0.9375)], 1)
    mask = teacher_forcing_mask(ChunkPlan(chunk=3), frames, Full(), Absolute())
    out = tiny(torch.cat([clean, noisy], 1), sigma, cond(tiny, case["context"]), FullSequence(2 * frames, mask))
    agree(out[:, frames:], torch.cat([swap(c[0]) for c in case["flow_noisy"]], 1), TOLERANCE)
    agree(out[:, :frames], torch.cat([swap(c) for c in case["flow_clean"]], 1), TOLERANCE)


# ---- LongLive's loops ---------------------------------------------------------------------------------------------

LONGLIVE: list[tuple[str, Window, PositionPolicy]] = [
    ("absolute_window9_sink3", Window(window=9, sink=3), Absolute()),
    ("absolute_window9_sink0", Window(window=9), Absolute()),
    ("absolute_window9_sink4", Window(window=9, sink=4), Absolute()),
    ("relative_window9_sink3", Window(window=9, sink=3), WindowRelative()),
    ("relative_window9_sink3", Window(window=9, sink=3), ReanchoredSink()),
    ("relative_window9_sink0", Window(window=9), WindowRelative()),
]


def longlive(
    golden: Golden, golden_json: Read, visibility: Window, positions: PositionPolicy
) -> tuple[KVCache, Tensor, Tensor, dict[str, Tensor]]:
    tensors = golden("longlive")
    network = load(golden_json("longlive")["config"], part(tensors, "weights"))
    cache = KVCache(network.sites, batch=2, tokens_per_frame=6, visibility=visibility, positions=positions)
    inputs, prompts = part(tensors, "loop_inputs"), cond(network, tensors["prompts/p0"])
    noisy, clean = loop(network, cache, 3, inputs["noisy"], inputs["clean"], (937.5, 500.0), prompts)
    return cache, noisy, clean, tensors


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("name", "visibility", "positions"), LONGLIVE, ids=lambda v: getattr(v, "__class__", v).__name__
)
def test_longlive_loop(
    name: str, visibility: Window, positions: PositionPolicy, grad: bool, golden: Golden, golden_json: Read
) -> None:
    with torch.set_grad_enabled(grad):
        _, noisy, clean, tensors = longlive(golden, golden_json, visibility, positions)
    agree(noisy.detach(), tensors[f"{name}/flow_noisy"], LOOP_TOLERANCE)
    agree(clean.detach(), tensors[f"{name}/flow_clean"], LOOP_TOLERANCE)


def held_keys(cache: KVCache, site: int, position_of: Callable[[int], int]) -> Tensor:
    """Keys of the frames held, in order of frame, turned from where they stand to where `position_of` wants them."""
    n, keys = cache.tokens_per_frame, []
    rope = Rope.for_head(cache.sites[site].head_dim, (2, 3))
    for frame in cache.frames:
        slot = cache.slots.promoted[frame]
        key = cache.entries[site].keys[:, slot * n : (slot + 1) * n]
        tables = rope.time_tables([position_of(frame) - cache.slots.baked[frame]], torch.float64)
        keys.append(rotate(key.double(), *tables))
    return torch.cat(keys, 1)


def test_longlive_ends_with_the_same_rotated_keys(golden: Golden, golden_json: Read) -> None:
    """Sink frames 0..2 and the recent 15..20, as they lie in the cache: rotated at their absolute index."""
    cache, _, _, tensors = longlive(golden, golden_json, Window(window=9, sink=3), Absolute())
    assert list(cache.frames) == [0, 1, 2, *range(15, 21)]
    for site, want in enumerate(tensors["absolute_window9_sink3/cached_keys_end"]):
        n = cache.tokens_per_frame
        slots = [cache.slots.promoted[f] for f in cache.frames]
        got = torch.cat([cache.entries[site].keys[:, s * n : (s + 1) * n] for s in slots], 1)
        agree(got, want, LOOP_TOLERANCE)


@pytest.mark.parametrize("positions", [WindowRelative(), ReanchoredSink()], ids=["relative", "reanchored"])
def test_longlive_relative_ends_with_the_same_keys(
    positions: PositionPolicy, golden: Golden, golden_json: Read
) -> None:
    """The published variant keeps keys without rotation; ours, turned back by rows, columns and time, are the same."""
    cache, _, _, tensors = longlive(golden, golden_json, Window(window=9, sink=3), positions)
    rope = Rope.for_head(32, (2, 3))
    for site, want in enumerate(tensors["relative_window9_sink3/cached_keys_end"]):
        at_zero = held_keys(cache, site, lambda frame: 0)
        cos, sin = rope.tables([0] * len(cache.frames), torch.float64)
        agree(rotate(at_zero, cos, -sin).float(), want, LOOP_TOLERANCE)


def test_longlive_stale_slots_are_not_reproduced(golden: Golden, golden_json: Read) -> None:
    """The reference with a sink of 4 and chunks of 3 reads unwritten slots and keeps keys of the first noisy pass."""
    _, noisy, clean, tensors = longlive(golden, golden_json, Window(window=9, sink=4), Absolute())
    stale = part(tensors, "compat_absolute_window9_sink4_stale")
    assert (noisy - stale["flow_noisy"]).abs().max() > 1e-2
    assert (clean - stale["flow_clean"]).abs().max() > 1e-2


# ---- both namings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["per_sample_timestep_0", "per_sample_timestep_1", "per_frame_timestep"])
def test_flows_of_both_namings(name: str, naming: str, golden: Golden, golden_json: Read) -> None:
    """Ours embeds time in fp64 as the original does; diffusers does it in fp32, hence its looser column."""
    tensors, facts = golden("diffusers_wan"), golden_json("diffusers_wan")
    config = {"text_len": 12, **facts[f"config_{naming}"]}
    network = load(config, part(tensors, f"weights_{naming}"), naming)
    case = part(tensors, name)
    timestep = case["timestep"]
    sigma = (timestep if timestep.ndim == 2 else timestep[:, None]) / 1000
    out = swap(network(swap(case["latents"]), sigma, cond(network, case["context"]), FullSequence(5)))
    agree(out, case["flow_original"], LOOP_TOLERANCE)
    agree(out, case["flow_diffusers"], TOLERANCE)


def test_both_namings_are_one_network(golden: Golden) -> None:
    tensors = golden("diffusers_wan")
    first = to_own(part(tensors, "weights_original"), "original")
    second = to_own(part(tensors, "weights_diffusers"), "diffusers")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
