"""Flow matching on Gaussian clips, whose best velocity is known; prompts, dropping, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from gaussian import Oracle, Recorder, Walk
from torch import Tensor, nn

from unspool.config import apply_overrides, from_dict, locate, to_dict
from unspool.data.batch import Batch
from unspool.diffusion.schedule import bell_weight, shift_sigma
from unspool.methods import METHODS
from unspool.methods.base import Method, StepResult
from unspool.methods.common import TERCILES, SigmaLaw, velocity_loss
from unspool.methods.flow_matching import FlowMatching, FlowMatchingConfig
from unspool.models.base import Conditioning, Prompts, Text
from unspool.models.caption import CaptionConfig, CaptionEncoder
from unspool.models.wan.config import WanConfig
from unspool.models.wan.network import WanTransformer

UNIFORM = SigmaLaw(law="uniform", shift=1.0)
PLAIN = FlowMatchingConfig(sigma=UNIFORM, weight="none", drop_text=0.0)
CAPTIONS = (("red",), ("red", "blue ball"), ("",))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(sigma: float) -> SigmaLaw:
    """Always this level."""
    return SigmaLaw(law="logit_normal", shift=1.0, mean=math.log(sigma / (1 - sigma)), std=0.0)


def change(config: FlowMatchingConfig = PLAIN, **values: Any) -> FlowMatchingConfig:
    return dataclasses.replace(config, **values)


class Echo(nn.Module):
    """Prepares the text states as they are and predicts zero; `states` [b, prompts, rows, c] of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.states = torch.empty(0)
        self.index: Tensor | None = None

    def prepare(self, text: Text) -> Prompts:
        self.states = text.states
        return Prompts(keys=(text.states,), values=(text.states,))

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, context: Any) -> Tensor:
        self.index = cond.prompt_index
        return self.weight * x


def encoder(rows: int = 4) -> CaptionEncoder:
    torch.manual_seed(0)
    return CaptionEncoder(CaptionConfig(words=("red", "blue", "ball"), dim=16, out_dim=8, layers=1, rows=rows, slots=1))


def tiny_wan(text_len: int = 5) -> WanTransformer:
    torch.manual_seed(1)
    network = WanTransformer(
        WanConfig(dim=24, ffn_dim=32, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=8,
                  text_len=text_len, freq_dim=16)
    )  # fmt: skip
    nn.init.normal_(network.head.head.weight, std=0.1)
    return network


def clips(size: int = 3, frames: int = 3, **fields: Any) -> Batch:
    draw = rng(9)
    fields = {"captions": CAPTIONS[:size], **fields}
    return Batch(latents=torch.randn(size, frames, 4, 2, 2, generator=draw), **fields)


# ---- the optimum -------------------------------------------------------------------------------------------------


def test_the_best_velocity_has_the_least_loss_and_no_gradient() -> None:
    walk, size = Walk(mean=0.7, scale=0.5), 20_000
    oracle = Oracle(walk, 1)
    result = FlowMatching(PLAIN, backbone=oracle).step(walk.batch(size, 1), "student", 0, rng())
    assert abs(result.loss.item() - float(oracle.variance.mean())) < 5 * 1.5 * float(oracle.variance.mean()) / size**0.5
    result.loss.backward()
    assert oracle.wrong.grad is not None and oracle.bias.grad is not None
    for grad in (oracle.wrong.grad, oracle.bias.grad):
        assert grad.abs().max() < 5 * 2 / size**0.5
    other = Oracle(Walk(mean=0.4, scale=0.5), 1)  # the test can fail: the best answer to other data is not the best
    FlowMatching(PLAIN, backbone=other).step(walk.batch(size, 1), "student", 0, rng()).loss.backward()
    assert other.bias.grad is not None and other.bias.grad.abs().max() > 20 * 2 / size**0.5


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_least_squares_at_one_sigma_finds_the_closed_form(sigma: float) -> None:
    """Slope c / V and loss s^2 / V with c = sigma - (1 - sigma) s^2 and V = (1 - sigma)^2 s^2 + sigma^2."""
    walk, size = Walk(mean=-0.3, scale=0.8), 20_000
    oracle = Oracle(walk, 1)
    method = FlowMatching(change(sigma=at(sigma)), backbone=oracle)
    batch = walk.batch(size, 1)

    def loss() -> Tensor:
        return method.step(batch, "student", 0, rng(3)).loss

    # The loss is quadratic in (slope, bias): one Newton step from the oracle's answer lands on the least squares.
    gradient = torch.autograd.grad(loss(), [oracle.wrong, oracle.bias], create_graph=False)
    g = torch.stack([gradient[0][0, 0], gradient[1][0]])
    rows = []
    for parameter in (oracle.wrong, oracle.bias):
        with torch.no_grad():
            parameter.add_(1.0)
        moved = torch.autograd.grad(loss(), [oracle.wrong, oracle.bias])
        rows.append(torch.stack([moved[0][0, 0], moved[1][0]]) - g)
        with torch.no_grad():
            parameter.sub_(1.0)
    off = torch.linalg.solve(torch.stack(rows), -g)
    assert off.abs().max() < 5 * 2 / size**0.5
    variance = (1 - sigma) ** 2 * 0.64 + sigma**2
    assert math.isclose(float(oracle.variance.mean()), 0.64 / variance, rel_tol=1e-9)
    assert math.isclose(loss().item(), 0.64 / variance, rel_tol=0.03)


def test_loss_weights_and_terciles_equal_plain_loops() -> None:
    walk = Walk(scale=0.6)
    config = change(sigma=SigmaLaw(law="uniform", shift=3.0), weight="bell", clean_first=0.5)
    network = Recorder(Oracle(Walk(scale=2.0), 3))
    batch = walk.batch(64, 3)
    result = FlowMatching(config, backbone=network).step(batch, "student", 0, rng(4))
    call = network.calls[0]
    assert batch.latents is not None
    total, thirds = 0.0, [list[float](), [], []]
    for b in range(64):
        used = [t for t in range(3) if float(call.sigma[b, t]) > 0]
        assert used in ([0, 1, 2], [1, 2])
        for t in used:
            sigma, x0 = float(call.sigma[b, t]), float(batch.latents[b, t])
            noise = (float(call.x[b, t]) - (1 - sigma) * x0) / sigma
            error = (float(call.prediction[b, t]) - (noise - x0)) ** 2
            total += bell_weight(sigma, shift=3.0) * error / len(used) / 64
            thirds[min(int(3 * sigma), 2)].append(error)
    assert math.isclose(result.loss.item(), total, rel_tol=1e-9)
    for name, errors in zip(TERCILES, thirds, strict=True):
        assert errors and math.isclose(float(result.metrics[name]), sum(errors) / len(errors), rel_tol=1e-9)


def test_a_third_without_latent_frames_is_nan_and_the_loss_is_not() -> None:
    result = FlowMatching(change(sigma=at(0.2)), backbone=Echo()).step(Walk().batch(4, 2), "student", 0, rng())
    assert math.isfinite(result.loss.item()) and math.isfinite(float(result.metrics[TERCILES[0]]))
    assert math.isnan(float(result.metrics[TERCILES[1]])) and math.isnan(float(result.metrics[TERCILES[2]]))


def test_the_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    draw = rng(5)
    prediction, target = torch.randn(2, 6, 4, 3, 2, 2, generator=draw).unbind(0)
    sigma, weights = torch.rand(2, 6, 4, generator=draw).unbind(0)
    counted = torch.rand(6, 4, generator=draw) > 0.3
    counted[:, 3] = True

    def loss(part: slice) -> float:
        result = velocity_loss(
            prediction[part], target[part], sigma[part], weights=weights[part], counted=counted[part]
        )
        return result.loss.item()

    assert math.isclose(loss(slice(0, 6)), (loss(slice(0, 3)) + loss(slice(3, 6))) / 2, rel_tol=1e-5)


# ---- noise levels ------------------------------------------------------------------------------------------------


def test_laws_of_sigma() -> None:
    n = 20_000
    uniform = SigmaLaw(law="uniform", shift=5.0).draw((n,), rng())
    normal = SigmaLaw(law="logit_normal", shift=1.0, mean=-0.5, std=1.2).draw((n,), rng())
    for level in (0.2, 0.5, 0.9):
        assert abs(float((uniform < shift_sigma(level, 5.0)).double().mean()) - level) < 5 * 0.5 / n**0.5
        z = (math.log(level / (1 - level)) + 0.5) / 1.2
        assert abs(float((normal < level).double().mean()) - 0.5 * (1 + math.erf(z / 2**0.5))) < 5 * 0.5 / n**0.5
    assert torch.equal(UNIFORM.draw((7,), rng(2)), UNIFORM.draw((7,), rng(2)))


def test_one_sigma_per_clip_and_the_first_latent_frame_given() -> None:
    network = Recorder(Echo())
    batch = Walk().batch(4000, 3)
    FlowMatching(change(clean_first=0.25), backbone=network).step(batch, "student", 0, rng())
    call = network.calls[0]
    given = call.sigma[:, 0] == 0
    assert abs(float(given.double().mean()) - 0.25) < 0.035
    assert (call.sigma[:, 1] == call.sigma[:, 2]).all() and (call.sigma[~given, 0] == call.sigma[~given, 1]).all()
    assert batch.latents is not None
    assert torch.equal(call.x[given, 0], batch.latents[given, 0])
    assert call.context.mask is None


def test_levels_of_their_own_for_a_share_of_the_clips_and_the_same_noise() -> None:
    batch = Walk().batch(4000, 3)
    recorded = []
    for share in (0.0, 0.25):
        network = Recorder(Echo())
        FlowMatching(change(clean_first=0.25, own_levels=share), backbone=network).step(batch, "student", 0, rng())
        recorded.append(network.calls[0])
    one, mixed = recorded
    own = mixed.sigma[:, 1] != mixed.sigma[:, 2]
    assert abs(float(own.double().mean()) - 0.25) < 0.035
    assert torch.equal(one.sigma[~own], mixed.sigma[~own]) and torch.equal(one.x[~own], mixed.x[~own])
    assert torch.equal(one.sigma[:, 0] == 0, mixed.sigma[:, 0] == 0)  # given latent frames stay given
    assert len(torch.unique(mixed.sigma[own, 1:])) == 2 * int(own.sum())


def test_a_given_latent_frame_carries_no_loss() -> None:
    oracle = Oracle(Walk(), 2)
    FlowMatching(change(clean_first=1.0), backbone=oracle).step(Walk().batch(8, 2), "student", 0, rng()).loss.backward()
    assert oracle.bias.grad is not None and oracle.bias.grad[0] == 0 and oracle.bias.grad[1] != 0


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_every_latent_frame_follows_its_prompt() -> None:
    text, network = encoder(), Echo()
    index = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0]])
    FlowMatching(PLAIN, backbone=network, text=text).step(clips(prompt_index=index), "student", 0, rng())
    assert network.index is not None and network.states.shape == (3, 2, 5, 8)
    for b, t in ((0, 2), (1, 0), (1, 2), (2, 1)):
        caption = CAPTIONS[b][int(index[b, t])]
        want = text([caption])[0]
        torch.testing.assert_close(network.states[b, int(network.index[b, t])], want, rtol=1e-5, atol=1e-6)


def test_dropping_takes_whole_samples_at_the_stated_rate() -> None:
    text, network, size = encoder(), Echo(), 4000
    captions = (("red", "blue ball"), ("ball",)) * (size // 2)
    batch = Batch(latents=torch.zeros(size, 2, 1, 1, 1), captions=captions, prompt_index=torch.zeros(size, 2).long())
    FlowMatching(change(drop_text=0.1), backbone=network, text=text).step(batch, "student", 0, rng())
    blank = (network.states - text([""])[0]).abs().amax((2, 3)) < 1e-5
    assert torch.equal(blank[:, 0], blank[:, 1])
    assert abs(float(blank[:, 0].double().mean()) - 0.1) < 5 * 0.3 / size**0.5


def test_ready_made_text_is_dropped_to_the_null_text() -> None:
    network, null = Echo(), torch.full((3, 2), 7.0)
    batch = Batch(latents=torch.zeros(200, 2, 1, 1, 1), text=torch.ones(200, 1, 2, 2))
    method = FlowMatching(change(drop_text=0.5), backbone=network, null_text=null)
    method.step(batch, "student", 0, rng())
    gone = (network.states == 7.0).flatten(1).all(1)
    assert 60 < int(gone.sum()) < 140
    kept = network.states[~gone]
    assert (kept[:, :, :2] == 1).all() and (kept[:, :, 2:] == 0).all()
    assert not [name for name in method.networks["student"].state_dict() if not name.startswith("backbone.")]
    with pytest.raises(ValueError, match="null_text"):
        FlowMatching(change(drop_text=0.5), backbone=network).step(batch, "student", 0, rng())
    with pytest.raises(ValueError, match="null_text"):
        FlowMatching(PLAIN, backbone=network, text=encoder(), null_text=null)


def test_a_trained_network_and_its_text_get_gradients_under_one_name_each() -> None:
    method = FlowMatching(PLAIN, backbone=tiny_wan(), text=encoder())
    result = method.step(clips(), "student", 0, rng())
    result.loss.backward()
    student = method.networks["student"]
    assert {name.partition(".")[0] for name, _ in student.named_parameters()} == {"backbone", "text"}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in student.named_parameters() if "text." in n)
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in result.metrics.values())


def test_autocast_keeps_the_loss_in_full_precision() -> None:
    method = FlowMatching(PLAIN, backbone=tiny_wan(), text=encoder())
    exact = method.step(clips(), "student", 0, rng()).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = method.step(clips(), "student", 0, rng()).loss
    assert rough.dtype == torch.float32 and abs(rough.item() - exact.item()) < 0.01 * exact.item()
    half = dataclasses.replace(clips(), latents=clips().latents.bfloat16())  # type: ignore[union-attr]
    assert method.step(half, "student", 0, rng()).loss.dtype == torch.float32


def test_a_step_is_a_function_of_the_generator() -> None:
    method = FlowMatching(change(drop_text=0.3, clean_first=0.3), backbone=tiny_wan(), text=encoder())

    def loss(seed: int) -> float:
        return method.step(clips(), "student", 0, rng(seed)).loss.item()

    assert loss(1) == loss(1) and loss(1) != loss(2)


def test_settings_do_not_change_each_other_s_draws() -> None:
    calls = []
    for config in (PLAIN, change(drop_text=1.0), change(weight="bell")):
        network = Recorder(Echo())
        FlowMatching(config, backbone=network, text=encoder()).step(clips(), "student", 0, rng())
        calls.append(network.calls[0])
    assert all(torch.equal(c.x, calls[0].x) and torch.equal(c.sigma, calls[0].sigma) for c in calls)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_contexts_are_kept() -> None:
    network = Recorder(Echo())
    method = FlowMatching(PLAIN, backbone=network)
    for frames in (3, 2, 3):
        method.step(Walk().batch(2, frames), "student", 0, rng())
    assert network.calls[0].context is network.calls[2].context is not network.calls[1].context


def test_bad_batches_are_refused() -> None:
    method = FlowMatching(PLAIN, backbone=tiny_wan(), text=encoder())
    index = torch.zeros(3, 3, dtype=torch.int64)
    bad = [
        (Batch(captions=CAPTIONS), "no latents"),
        (Batch(latents=clips().latents), "no captions"),
        (clips(captions=(("red",), (), ("red",))), "at least one"),
        (clips(captions=CAPTIONS[:2]), "2 samples"),
        (clips(prompt_index=index[:, :2]), "prompt_index"),
        (clips(prompt_index=index + 1), "sample 0"),
        (dataclasses.replace(clips(), latents=torch.zeros(3, 4, 2, 2)), "b, t, c, h, w"),
    ]
    for batch, match in bad:
        with pytest.raises(ValueError, match=match):
            method.step(batch, "student", 0, rng())
    with pytest.raises(ValueError, match="no text"):
        FlowMatching(PLAIN, backbone=tiny_wan()).step(clips(), "student", 0, rng())
    with pytest.raises(ValueError, match="role"):
        method.step(clips(), "critic", 0, rng())
    with pytest.raises(ValueError, match="longer clips"):
        FlowMatching(change(clean_first=0.1), backbone=Echo()).step(Walk().batch(2, 1), "student", 0, rng())


def test_configs() -> None:
    assert from_dict(FlowMatchingConfig, to_dict(PLAIN)) == PLAIN
    moved = apply_overrides(PLAIN, ["sigma.law=logit_normal", "sigma.mean=0", "sigma.std=1", "drop_text=0.1"])
    assert moved.sigma.std == 1.0 and moved.drop_text == 0.1
    for overrides in (["sigma.shift=0"], ["sigma.std=1"], ["sigma.law=logit_normal"], ["weight=gauss"],
                      ["drop_text=1.5"], ["clean_first=-0.1"], ["own_levels=2"]):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected|leave|needs"):
            apply_overrides(PLAIN, overrides)


def test_the_method_is_found_by_name() -> None:
    method = locate("flow_matching", METHODS)(PLAIN, backbone=Echo())
    assert isinstance(method, Method) and method.roles(7) == ("student",)
    assert isinstance(method.step(Walk().batch(2, 2), "student", 0, rng()), StepResult)
