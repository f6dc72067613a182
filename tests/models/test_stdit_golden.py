"""STDiT against the published Ca2-VDM: layers, blocks, whole networks under masks, cached loops, what a cache holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from einops import rearrange
from stdit_tiny import (
    CHUNK,
    CYCLIC,
    LENGTH,
    PMAX,
    PREFIX,
    call,
    captions,
    config_of,
    levels,
    part,
    recorded,
    sees,
    swap,
)
from torch import Tensor

from unspool.causal.cache.streams import StreamCaches
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.mask import clean_prefix_mask
from unspool.causal.position import Cyclic
from unspool.causal.prefix import SEPARATE
from unspool.causal.visibility import MAIN, Full, Kind, Segment
from unspool.diffusion.iddpm import IDDPM
from unspool.models.base import Conditioning
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.layers import Captions, Frames, position_features, spatial_features
from unspool.models.stdit.network import STDiT
from unspool.models.wan.layers import time_features
from unspool.ops.attention import sdpa
from unspool.rollout.guidance import combine

Golden = Callable[[str], dict[str, Tensor]]
Read = Callable[[str], Any]

SINGLE, DEEP, GUIDED = 1e-5, 5e-5, 2e-4  # stated with the tensors; single layers, networks, guided outputs
GRADIENT = 2e-3  # stated; the recorded bound is that of float32 tables
TIME = 2e-5  # ours has its angles in fp64, the recorded one in fp32: 1e-4 at timestep 999
EVERYTHING = dict(
    prefix_enhanced_spatial=True, mask_channel=True, text=True, temporal_attention="causal"
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def cases(golden: Golden) -> Callable[[str], dict[str, Tensor]]:
    tensors = golden("ca2vdm_cases")
    return lambda name: part(tensors, name)


@pytest.fixture
def network(golden: Golden) -> STDiT:
    return recorded(golden, EVERYTHING)


def agree(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert want.std() > 1e-3, "a recorded output that is nearly constant shows nothing"
    worst = (got - want).abs().max().item()
    assert worst <= tolerance, f"largest difference {worst:.3g} > {tolerance:.3g}"


# ---- tables and layers --------------------------------------------------------------------------------------------


def test_position_tables(cases: Golden) -> None:
    want = cases("tables")
    grid = torch.arange(LENGTH)
    agree(spatial_features(2, 3, 48, 1.0).float(), want["spatial"][0], 1e-6)
    agree(position_features(grid, 48, 1.0).float(), want["temporal"][0], 2e-6)
    agree(spatial_features(8, 4, 32, 2.0), want["spatial_8x4_dim32_scale2"], 1e-12)
    agree(spatial_features(16, 16, 8, 1.0).float(), want["spatial_16x16_dim8_scale1"], 1e-6)
    agree(position_features(torch.arange(65), 32, 1.0).float(), want["temporal_len65_dim32_scale1"], 1e-6)
    agree(position_features(torch.arange(9), 24, 0.5), want["temporal_len9_dim24_scale0p5"], 1e-12)
    agree(position_features(grid, 1152, 1.0)[[0, 1, 17, 32]].float(), want["xl_temporal_rows"], 1e-6)
    agree(spatial_features(16, 16, 1152, 1.0)[[0, 1, 37, 255]].float(), want["xl_spatial_rows"], 1e-6)


@pytest.mark.parametrize("name", ["tpe_ids_long", "tpe_ids_small", "tpe_ids_own"])
def test_cyclic_ids(name: str, cases: Golden, golden_json: Read) -> None:
    """Of a chunk, and of what it reads: the same when a frame is denoised and when its keys are written."""
    want, facts = cases(name), golden_json("ca2vdm_config")["cases"][name]["params"]
    policy = Cyclic(length=facts["L"])
    window = sees(chunk=facts["l"], pmax=facts["Pmax"], prefix=None)
    given = Segment(kind=Kind.PREFILL, frames=range(facts["given"]))
    assert policy.assign(given, window.visible(given))[1] == want["given_ids"].tolist()
    for start, own, held in zip(want["start"].tolist(), want["chunk_ids"], want["window_ids"], strict=True):
        for kind in (Kind.DENOISE, Kind.COMMIT):
            segment = Segment(kind=kind, frames=range(start, start + facts["l"]))
            past, ids = policy.assign(segment, window.visible(segment))
            assert ids == own.tolist()
            assert past + ids == [i for i in held.tolist() if i >= 0]


def test_timestep_embedding(network: STDiT, cases: Golden) -> None:
    want = cases("timestep_embedding")
    agree(time_features(want["t"], 256).float(), want["sinusoid"], 1e-4)
    embedding, time = network._time(levels(want["t"]))
    agree(embedding[:, 0], want["temb"], TIME)
    agree(time[:, 0].flatten(1), want["mod"], TIME)
    embedding, time = network._time(levels(want["t_frames"]))
    agree(embedding, want["temb_frames"], TIME)
    agree(time.flatten(2), want["mod_frames"], TIME)


def test_patches(network: STDiT, cases: Golden) -> None:
    want = cases("patch_embed")
    got = network._embed(swap(want["x"]), (2, 3))
    agree(got, want["tokens_plus_spatial"], SINGLE)
    table = spatial_features(2, 3, 48, 1.0).repeat(5, 1)
    agree(got - table, want["tokens"], SINGLE)


@pytest.mark.parametrize("name", ["attention_self", "attention_causal", "attention_cached", "attention_cross_frame"])
def test_attention(name: str, network: STDiT, cases: Golden) -> None:
    """The projections around attention; what is read is said here by hand."""
    want, block = cases(name), network.blocks[1]
    layer = {"attention_self": block.attn, "attention_cross_frame": block.attn_cf}.get(name, block.attn_temp)
    q, k, v = layer.project(want["x"])
    agree(torch.cat([k.flatten(2), v.flatten(2)], -1), want["kv"], SINGLE)
    n, mask = q.shape[1], None
    if "ctx_kv" in want:
        past = [part.unflatten(-1, (4, 12)) for part in want["ctx_kv"].chunk(2, -1)]
        own = layer.project(want["context"])[1:] if "context" in want else (k, v)
        if name == "attention_cross_frame":
            agree(layer.proj(sdpa(q, *past).flatten(2)), want["out_from_kv"], SINGLE)
            k, v = own
        else:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    if name in ("attention_causal", "attention_cached"):
        mask = torch.ones(n, k.shape[1], dtype=torch.bool).tril(k.shape[1] - n)
    agree(layer.proj(sdpa(q, k, v, mask).flatten(2)), want["out"], SINGLE)


def test_text_attention(network: STDiT, cases: Golden) -> None:
    want = cases("cross_attention")
    agree(network.y_embedder(want["caption"]), want["caption_proj"], SINGLE)
    prompts = network.prepare(want["caption"][:, 0] * want["mask"][..., None])
    assert prompts.mask is not None and torch.equal(prompts.mask[:, 0], want["mask"].bool())
    text = Captions(keys=prompts.keys[1][:, 0], values=prompts.values[1][:, 0], mask=prompts.mask[:, 0])
    agree(network.blocks[1].cross_attn(want["x"], text), want["out"], SINGLE)


def test_final_layer(network: STDiT, cases: Golden) -> None:
    want = cases("final_layer")

    def latents(tokens: Tensor, frames: int) -> Tensor:
        return rearrange(tokens, "b (t h w) (p q c) -> b c t (h p) (w q)", t=frames, h=2, p=2, q=2)

    out = network.final_layer(want["x"], want["temb"])
    agree(out, want["tokens_out"], SINGLE)
    agree(latents(out, 5), want["latents_out"], SINGLE)
    agree(latents(network.final_layer(want["x_tiny"], want["temb"][:1, :2]), 2), want["latents_out_tiny"], SINGLE)


# ---- blocks and networks in the form of training -------------------------------------------------------------------


def train_context(prefix: int, frames: int, facts: dict[str, Any], offset: int = 0) -> FullSequence:
    """A clean prefix and noisy frames after it, in one sequence."""
    form = facts["features"]["temporal_attention"]
    if form == "bidirectional":
        return FullSequence(frames)
    plan = ChunkPlan(chunk=max(1, frames - prefix), first=prefix)
    visibility = sees(within="causal" if form == "causal" else "full")
    return FullSequence(
        frames, clean_prefix_mask(plan, frames, prefix, visibility, Cyclic(length=LENGTH, offset=offset))
    )


BLOCKS = [
    "block_plain",
    "block_prefix_enhanced",
    "block_prefix_enhanced_short_prefix",
    "block0_all",
    "block_shared_timestep",
    "block_tiny_input",
]


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, golden: Golden, cases: Golden, golden_json: Read) -> None:
    case, facts = cases(name), golden_json("ca2vdm_config")["cases"][name]
    network = recorded(golden, facts["features"])
    outputs = []
    for row in range(len(case["x"])):  # prefixes may differ from sample to sample, and a mask is for all samples
        clean = case["prefix"][row]
        prefix, count = int(clean.sum()), len(clean)
        assert clean[:prefix].all()
        mod = case["mod"][row : row + 1]
        frames = Frames(
            count=count,
            time=(mod[:, None] if mod.ndim == 2 else mod).unflatten(-1, (6, -1)),
            positions=position_features(case.get("tpe_ids", torch.arange(count)), 48, 1.0).float(),
            clean=clean[None],
        )
        text = None
        if "caption" in case:
            prompts = captions(network, {k: v[row : row + 1] for k, v in case.items()}, 1).prompts
            text = network._captions(prompts, 0, None)
        block = network.blocks[0 if name.startswith("block0") else 1]
        outputs.append(block(case["x"][row : row + 1], frames, text, train_context(prefix, count, facts)))
    agree(torch.cat(outputs), case["out"], DEEP)


NETWORKS = {
    "net_plain": 0,
    "net_first_frame_only": 0,
    "net_prefix_enhanced": 0,
    "net_mask_channel": 0,
    "net_prefix_enhanced_mask": 0,
    "net_text": 0,
    "net_full_length_rotated_ids": 5,
    "net_ragged_prefix": 0,
    "net_shared_timestep": 0,
    "net_chunk_bidirectional": 0,
    "net_bidirectional": 0,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, golden: Golden, cases: Golden, golden_json: Read) -> None:
    case, facts = cases(name), golden_json("ca2vdm_config")["cases"][name]
    network = recorded(golden, facts["features"])
    shared = case["t"].ndim == 1  # one timestep for all frames, clean ones too
    sigma = levels(case["t"]) if shared else levels(case["t"], case["prefix"])
    outputs = []
    for prefix, rows in itertools.groupby(range(len(case["x"])), lambda row: int(case["prefix"][row].sum())):
        own = list(rows)
        at = {name: tensor[own] for name, tensor in case.items()}
        context = train_context(prefix, case["x"].shape[2], facts, NETWORKS[name])
        outputs.append(call(network, at["x"], sigma[own], captions(network, at, len(own)), context))
    agree(torch.cat(outputs), case["out"], DEEP)


def test_every_recorded_network_is_tested(golden_json: Read) -> None:
    names = set(golden_json("ca2vdm_config")["cases"])
    assert {n for n in names if n.startswith("block")} == set(BLOCKS)
    assert {n for n in names if n.startswith("net_")} == set(NETWORKS)
    assert {n for n in names if n.startswith("rollout")} == set(LOOPS)


# ---- cached loops ---------------------------------------------------------------------------------------------------

LOOPS = [
    "rollout_plain",
    "rollout_prefix_enhanced_mask",
    "rollout_prefix_enhanced",
    "rollout_misaligned_window",
    "rollout_text_guided",
    "rollout_chunk_bidirectional",
]


def held(caches: StreamCaches, stream: str) -> Tensor:
    """[layers, frames, tokens, 2 C] keys and values of sample 0, oldest frame first, as the published cache."""
    cache, layers = caches.caches[stream], []
    for site, entry in zip(cache.sites.values(), cache.entries.values(), strict=True):
        n = cache.tokens(site)
        slots = [cache.slots.promoted[f] for f in cache.frames]
        rows = cache.rows(site) // cache.batch
        both = [
            torch.stack([part[:rows, s * n : (s + 1) * n] for s in slots]).flatten(-2)
            for part in (entry.keys, entry.values)
        ]
        layers.append(torch.cat(both, -1).flatten(1, 2))
    return torch.stack(layers)


@pytest.mark.parametrize("grad", [False, True], ids=["ring", "functional"])
@pytest.mark.parametrize("name", LOOPS)
def test_cached_loop(name: str, grad: bool, golden: Golden, cases: Golden, golden_json: Read) -> None:
    """Per chunk an evaluation that only reads, then a commit; through eviction and the wrap of the ids."""
    case, facts = cases(name), golden_json("ca2vdm_config")["cases"][name]
    network, rows = recorded(golden, facts["features"]), case["given"].shape[0]
    guided, factor = "caption" in case, 2 if "caption" in case else 1
    if guided:
        mask = case["caption_mask"][..., None]
        texts = torch.cat([case["null_caption"][:, 0] * mask, case["caption"][:, 0] * mask])
        cond = Conditioning(prompts=network.prepare(texts))
    else:
        cond = captions(network, case, rows)
    form = facts["features"]["temporal_attention"]
    cache = StreamCaches(
        network.sites,
        batch=factor * rows,
        tokens_per_frame=6,
        visibility=sees(within="causal" if form == "causal" else "full"),
        positions=CYCLIC,
    )

    def run(kind: Kind, frames: range, x: Tensor, sigma: Tensor) -> Tensor:
        context = cache.begin((Segment(kind=kind, frames=frames),))
        return call(network, x.repeat(factor, 1, 1, 1, 1), sigma, cond, context)

    clean = torch.zeros(1, 1)
    outputs = []
    with torch.set_grad_enabled(grad):
        run(Kind.PREFILL, range(case["given"].shape[2]), case["given"], clean)
        cache.promote()
        for i, start in enumerate(facts["chunk_start"]):
            frames = range(start, start + CHUNK)
            outputs.append(run(Kind.DENOISE, frames, case["noisy"][i], levels(case["t"][i]).repeat(factor, 1)).detach())
            run(Kind.COMMIT, frames, case["commit"][i], clean)
            cache.promote()
            for key, stream in ((f"temporal_kv_after_chunk{i}", MAIN), (f"spatial_kv_after_chunk{i}", SEPARATE)):
                if key in case:
                    agree(held(cache, stream)[:, -case[key].shape[2] :], case[key][:, 0], DEEP)
    agree(torch.stack(outputs), case["out"], DEEP)
    if guided:
        uncond, cond_part = (swap(x) for x in torch.stack(outputs)[-1].chunk(2))
        agree(swap(combine(cond_part, uncond, 3.0, channels=4)), case["guided"][-1], GUIDED)


@pytest.mark.parametrize("name", ["train_loss", "train_loss_prefix_noise100"])
def test_loss_and_gradients(name: str, golden: Golden, cases: Golden, golden_json: Read) -> None:
    """A step of training: clean prefix (as it is, or noised though told to be clean), noisy chunk, both loss terms."""
    case, facts = cases(name), golden_json("ca2vdm_config")["cases"][name]
    network, process = recorded(golden, facts["features"]).requires_grad_(), IDDPM()
    sigma = levels(case["t"][:, None].expand(case["prefix"].shape), case["prefix"])
    x0, noise = swap(case["x0"]), swap(case["noise"])
    x = process.add_noise(x0, noise, sigma)
    if "prefix_noise" in case:
        perturbed = process.add_noise(x0, swap(case["prefix_noise"]), 101 / 1000)
        x = torch.where(sigma[:, :, None, None, None] == 0, perturbed, x)
    agree(swap(x), case["net_in"], SINGLE)
    with torch.enable_grad():
        prediction = network(x, sigma, captions(network, case, len(x)), train_context(9, x.shape[1], facts))
        loss = process.loss(x0, noise, x, prediction, sigma)
        loss.total.backward()
    agree(loss.mse.detach(), case["mse"], DEEP)
    assert torch.allclose(loss.bits, case.get("vb_exact", case["vb"]), rtol=1e-2 if "prefix_noise" in case else 2e-5)
    parameters = dict(network.named_parameters())
    recorded_gradients = [key for key in case if key.startswith("grad/")]
    assert recorded_gradients
    for key in recorded_gradients:
        gradient = parameters[key.removeprefix("grad/")].grad
        assert gradient is not None and (gradient - case[key]).abs().max() <= GRADIENT
        assert case[key].abs().max() > 3 * GRADIENT, "a gradient below its tolerance shows nothing"


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_published_formula_and_the_staged_chunk(golden_json: Read) -> None:
    """2 bytes * 2 * rows * layers * tokens * width * frames; ours also hold the chunk that is being made."""
    facts = golden_json("ca2vdm_config")["cases"]["memory"]["values"]["xl_window25_prefix_enhanced"]
    with torch.device("meta"):
        sites = STDiT(STDiTConfig.xl(prefix_attention="separate")).sites
    cache = StreamCaches(
        sites, batch=1, tokens_per_frame=256, visibility=sees(), positions=CYCLIC, dtype=torch.bfloat16, device="meta"
    )
    per_frame = facts["temporal_bytes"] // PMAX
    assert facts["spatial_bytes"] == PREFIX * per_frame
    for frames in (range(1), *(range(s, s + CHUNK) for s in range(1, 60, CHUNK))):
        cache.begin((Segment(kind=Kind.PREFILL, frames=frames),))
        for one in cache.caches.values():
            one._view._written.update(one.sites)  # type: ignore[union-attr]
        cache.promote()
    assert cache.num_bytes == facts["total_bytes"] + 2 * CHUNK * per_frame


def test_configs_of_recorded_cases_differ(golden_json: Read) -> None:
    """The recorded parts reach the networks: no case silently runs another one."""
    cases = golden_json("ca2vdm_config")["cases"]
    assert len({config_of(cases[n]["features"]) for n in NETWORKS}) == 5
    assert Full().within == "full"
