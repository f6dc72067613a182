"""What needs a CUDA device: `make test-gpu`. The same comparisons as on the CPU, and what only a GPU can run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import toy_methods

from unspool.causal.context import FullSequence
from unspool.causal.mask import causal_mask
from unspool.evaluate.exactness import SETTINGS, Clip, Setting, cached, difference, masked, new_cache, random_network
from unspool.models.base import Conditioning, Prompts
from unspool.models.wan.network import WanTransformer
from unspool.ops.compile import compile_backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


def on_device(net: WanTransformer, clip: Clip) -> Clip:
    prompts = Prompts(
        keys=tuple(k.to(DEVICE) for k in clip.prompts.keys), values=tuple(v.to(DEVICE) for v in clip.prompts.values)
    )
    return Clip(clip.clean.to(DEVICE), clip.noisy.to(DEVICE), clip.sigma, prompts, clip.prompt_index)


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_cached_equals_masked_on_cuda(setting: Setting, dtype: torch.dtype, bound: float):
    net = random_network(dtype)
    clip = on_device(net, Clip.random(net, setting, dtype))
    net = net.to(DEVICE)
    cache = new_cache(net, setting, dtype, device=DEVICE)
    assert difference(cached(net, setting, clip, cache), masked(net, setting, clip)) <= bound


@torch.no_grad()
def test_cuda_equals_cpu_for_the_same_noise():
    net, setting = random_network(torch.float64), SETTINGS[6]
    clip = Clip.random(net, setting, torch.float64)
    expected = masked(net, setting, clip)
    moved = on_device(net, clip)
    assert difference(masked(net.to(DEVICE), setting, moved).cpu(), expected) <= 1e-10


def test_flex_attention_trains_like_slices():
    """Head dimension 24 is padded by no one: flex needs a power of two, so this network has heads of 32."""
    setting = SETTINGS[6]
    net = random_network(torch.float32, dim=64).to(DEVICE).requires_grad_(True)
    clip = on_device(net, Clip.random(net, setting, torch.float32))
    prompts = net.prepare(torch.randn(2, 10, 24, device=DEVICE))
    mask = causal_mask(setting.plan, setting.frames, setting.visibility, setting.positions)
    gradients = []
    for backend in ("slices", "flex"):
        context = FullSequence(setting.frames, mask, backend=backend)
        net.zero_grad()
        net(clip.noisy, clip.sigma, Conditioning(prompts=prompts), context).square().mean().backward(retain_graph=True)
        gradients.append(net.blocks[0].self_attn.qkv.weight.grad.clone())
    assert difference(gradients[1], gradients[0]) <= 1e-3


@torch.no_grad()
def test_compiled_equals_eager_on_cuda():
    setting = SETTINGS[6]
    net = random_network(torch.float32)
    clip = on_device(net, Clip.random(net, setting, torch.float32))
    net = net.to(DEVICE)
    expected = cached(net, setting, clip, new_cache(net, setting, torch.float32, device=DEVICE))
    compile_backbone(net)
    got = cached(net, setting, clip, new_cache(net, setting, torch.float32, device=DEVICE, compiled=True))
    assert difference(got, expected) <= 2e-5


@torch.no_grad()
def test_denoising_loop_does_not_wait_for_the_device():
    """No hidden synchronisation: torch raises at one. A first chunk may, it fills tables; later ones may not."""
    setting = SETTINGS[6]
    net = random_network(torch.float32)
    clip = on_device(net, Clip.random(net, setting, torch.float32))
    net = net.to(DEVICE)
    cache = new_cache(net, setting, torch.float32, device=DEVICE)
    early = Setting("", setting.plan, setting.visibility, setting.positions, frames=12)
    cached(net, early, clip, cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cached(net, setting, clip, cache, first=12)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["teacher_forcing", "causvid", "consistency", "ode"])
def test_a_training_step_does_not_wait_for_the_device(name: str):
    """As `methods/test_waits.py` sees on an emulated device. The first step may, it fills tables."""
    method = toy_methods.CASES[name]()
    for network in toy_methods.networks_of(method):
        network.to(DEVICE)
    batch = toy_methods.batch(name, DEVICE)
    method.step(batch, "student", 0, torch.Generator().manual_seed(0)).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.step(batch, "student", 1, torch.Generator().manual_seed(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
