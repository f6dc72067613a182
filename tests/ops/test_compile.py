"""torch.compile: the same numbers, no compilation per cache size, and plain eager code where there is no compiler."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch

from unspool import log
from unspool.causal.chunks import ChunkPlan
from unspool.causal.context import FullSequence
from unspool.causal.visibility import Window
from unspool.diffusion.schedule import few_step
from unspool.evaluate.exactness import random_network
from unspool.models.base import Conditioning
from unspool.models.taehv import Taehv, TaehvConfig
from unspool.models.taehv.layers import MemoryBlock
from unspool.ops import compile as compiling
from unspool.ops.rope import rotate
from unspool.rollout.noise import CounterNoise
from unspool.rollout.rollout import Rollout, RolloutConfig


def stream(net, compiled: bool) -> Rollout:
    config = RolloutConfig(
        plan=ChunkPlan(chunk=2), schedule=few_step((1000, 500), shift=5.0), visibility=Window(window=7, sink=1)
    )
    text = torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(0))
    return Rollout(net, config, text, noise=CounterNoise(0), latent_size=(4, 4), compiled=compiled)


def test_compiled_rollout_equals_eager_and_compiles_nothing_anew_as_the_window_fills():
    if not compiling.compiler_works():
        pytest.skip("no working compiler here: torch.compile falls back to eager code")
    from torch._dynamo.utils import counters

    eager = stream(random_network(torch.float32, layers=2), False)
    expected = [eager.next_chunk().latents for _ in range(10)]
    fast = stream(compiling.compile_backbone(random_network(torch.float32, layers=2)), True)
    got = [fast.next_chunk().latents for _ in range(2)]
    graphs = counters["stats"]["unique_graphs"]
    got += [fast.next_chunk().latents for _ in range(8)]
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).abs().max() / b.std()) <= 1e-5


def test_a_compiled_decoder_equals_eager_and_compiles_one_graph():
    """Streams decode a latent frame at a time; the first one, which has nothing before it, is no shape of its own."""
    if not compiling.compiler_works():
        pytest.skip("no working compiler here: torch.compile falls back to eager code")
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    codec = Taehv(TaehvConfig(latent_channels=4, num_blocks=1, decoder_widths=(8, 8, 8, 4), padding="start"))
    for block in codec.decoder:
        if isinstance(block, MemoryBlock):
            torch.nn.init.normal_(block.last.weight, std=0.1)
    latents, decoded = torch.randn(1, 5, 4, 2, 4), []
    expected = codec.decode(latents)
    compiling.compile_backbone(codec.decoder)
    before, state = counters["stats"]["unique_graphs"], None
    with torch.no_grad():
        for frame in latents.split(1, dim=1):
            pixels, state = codec.decode_stream(frame, state)
            decoded.append(pixels)
    assert counters["stats"]["unique_graphs"] == before + 1
    torch.testing.assert_close(torch.cat(decoded, dim=1), expected, rtol=0, atol=1e-5)


def test_without_a_compiler_everything_runs_eagerly_after_one_notice(monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(log, "_told", set())  # another test may have been told already
    compiling._works.cache_clear()
    compiling.compiled.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="unspool"):
            net = random_network(torch.float32, layers=2)
            expected = stream(random_network(torch.float32, layers=2), False).next_chunk().latents
            got = stream(compiling.compile_backbone(net), True).next_chunk().latents
            stream(net, True)
        assert torch.equal(got, expected)
        told = [r for r in caplog.records if "torch.compile is not usable" in r.getMessage()]
        assert len(told) == 1
    finally:
        compiling._works.cache_clear()
        compiling.compiled.cache_clear()


def test_the_probe_runs_on_the_device_that_is_asked_for(monkeypatch, caplog):
    """A machine with a C++ compiler and without Triton compiles for its CPU alone."""
    probed = []

    def probe(kind):
        probed.append(kind)
        if kind == "cuda":
            raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(compiling, "_probe", probe)
    monkeypatch.setattr(log, "_told", set())
    compiling._works.cache_clear()
    compiling.compiled.cache_clear()
    try:
        net = random_network(torch.float32, layers=1)
        with caplog.at_level(logging.INFO, logger="unspool"):
            compiling.compile_backbone(net, torch.device("cuda", 1))
        plain = vars(random_network(torch.float32, layers=1).blocks[0]).keys()
        assert vars(net.blocks[0]).keys() == plain and probed == ["cuda"]
        assert "triton" in caplog.text and "C++" not in caplog.text
        assert compiling.compiled("unspool.ops.rope:rotate", "cuda") is rotate and probed == ["cuda"]
        compiling.compile_backbone(net)
        assert vars(net.blocks[0]).keys() != plain and probed == ["cuda", "cpu"]
    finally:
        compiling._works.cache_clear()
        compiling.compiled.cache_clear()


def test_the_fast_gelu_is_the_same_function():
    """The sigmoid form that is compiled for a CPU against torch's tanh form, far into both tails."""
    from unspool.ops.norm import gelu_tanh

    x = torch.cat([torch.linspace(-30, 30, 20001, dtype=torch.float64), torch.tensor([-1e4, 0.0, 1e4]).double()])
    written_out = x * torch.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    assert (gelu_tanh(x) - written_out).abs().max() <= 1e-12


def test_a_copy_of_a_compiled_network_computes_with_its_own_weights():
    """An EMA copy that ran with the weights of its original would be wrong without a word."""
    if not compiling.compiler_works():
        pytest.skip("no working compiler here: torch.compile falls back to eager code")
    net = compiling.compile_backbone(random_network(torch.float32, layers=1))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    clone = copy.deepcopy(net)
    for parameter in clone.parameters():
        parameter.data.zero_()
    x = torch.randn(1, 2, 4, 4, 4)
    outs = []
    for each in (net, twin, clone):
        cond = Conditioning(prompts=each.prepare(torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(0))))
        outs.append(each(x, torch.ones(1, 1), cond, FullSequence(2)))
    assert torch.allclose(outs[0], outs[1], atol=1e-5) and not outs[2].any() and outs[0].std() > 0.2


def test_many_shapes_and_modes_do_not_exhaust_the_compiler(monkeypatch):
    """dynamo counts variants per function over all networks of a process: eight are soon reached."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    compiling._works.cache_clear()
    compiling._compiled_method.cache_clear()
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            net = compiling.compile_backbone(random_network(dtype, layers=1))
            for grad in (False, True):
                net.requires_grad_(grad)
                for batch, frames in ((1, 3), (2, 3), (1, 1), (2, 1), (3, 5)):
                    with torch.set_grad_enabled(grad):
                        cond = Conditioning(prompts=net.prepare(torch.randn(batch, 10, 24)))
                        out = net(
                            torch.randn(batch, frames, 4, 4, 6), torch.rand(batch, frames), cond, FullSequence(frames)
                        )
                    assert out.isfinite().all()
    finally:
        compiling._works.cache_clear()
        compiling._compiled_method.cache_clear()
