"""Paths of a teacher: sampled, stored, read, and learnt from by regression and by consistency."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
from tiny import CHANNELS, SIZE, TEXT_DIM, TEXT_ROWS, make_network, text

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Full
from unspool.data.batch import Batch, TrajectoryBatch
from unspool.data.shard_format import ShardHeader
from unspool.data.shard_writer import ShardWriter
from unspool.data.shards import LatentShards, LatentShardsConfig
from unspool.data.trajectories import TrajectoryConfig, TrajectoryShards, sample_trajectory, write_trajectories
from unspool.diffusion.schedule import uniform
from unspool.engine.whole_clip import NoCache
from unspool.methods.consistency import CausalConsistency, ConsistencyConfig
from unspool.methods.ode_regression import OdeRegression, OdeRegressionConfig
from unspool.methods.samples import StepList
from unspool.rollout.guidance import Guidance
from unspool.rollout.noise import RecordedNoise
from unspool.rollout.rollout import Rollout
from unspool.rollout.settings import RolloutConfig
from unspool.rollout.solvers.euler import Euler

STEPS = StepList(steps=(1000.0, 750.0, 500.0, 250.0), shift=3.0)
PLAN, FRAMES = ChunkPlan(chunk=2), 4
SHAPE = (2, FRAMES, CHANNELS, *SIZE)
NULL = torch.zeros(TEXT_ROWS, TEXT_DIM, dtype=torch.float64)


def config(**values: Any) -> TrajectoryConfig:
    given = {"schedule": uniform(8, shift=3.0), "keep": STEPS.schedule.sigmas, "guidance_from_uncond": 2.0}
    return TrajectoryConfig(**{**given, **values})


def prompts() -> tuple[Tensor, Tensor]:
    return text(0)[:, None], NULL.expand(2, 1, -1, -1)


def test_a_bidirectional_path_is_that_of_the_one_rollout() -> None:
    network, noise = make_network().requires_grad_(False), torch.randn(SHAPE, dtype=torch.float64)
    path = sample_trajectory(network, config(), noise, *prompts())
    assert path.shape == (2, 5, *SHAPE[1:]) and torch.equal(path[:, 0], noise)
    whole = RolloutConfig(
        plan=ChunkPlan(chunk=FRAMES, num_frames=FRAMES), schedule=uniform(8, shift=3.0), visibility=Full(),
        solver=Euler(), guidance=Guidance(2.0),
    )  # fmt: skip
    stream = Rollout(
        network, whole, text(0), noise=RecordedNoise(noise), latent_size=SIZE, negative=NULL.expand(2, -1, -1),
        cache=NoCache,
    )  # fmt: skip
    torch.testing.assert_close(path[:, -1], stream.next_chunk().latents, rtol=0, atol=1e-10)


def test_a_causal_path_reads_the_clean_clip() -> None:
    """Its second chunk is that of a rollout that was given the clean first one."""
    network, noise = make_network().requires_grad_(False), torch.randn(SHAPE, dtype=torch.float64)
    clean = torch.randn(SHAPE, dtype=torch.float64)
    made = config(plan=PLAN, visibility=Full())
    path = sample_trajectory(network, made, noise, *prompts(), clean=clean)
    stream = Rollout(
        network,
        RolloutConfig(
            plan=PLAN, schedule=uniform(8, shift=3.0), visibility=Full(), solver=Euler(), guidance=Guidance(2.0)
        ),
        text(0), noise=RecordedNoise(noise), latent_size=SIZE, negative=NULL.expand(2, -1, -1), prefix=clean[:, :2],
    )  # fmt: skip
    torch.testing.assert_close(path[:, -1, 2:], stream.next_chunk().latents, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="pass clean="):
        sample_trajectory(network, made, noise, *prompts())


def test_states_that_the_teacher_does_not_visit_are_refused() -> None:
    """48 steps at shift 8 for a student's list at shift 5: the mistake of a published script."""
    keep = StepList(steps=(1000.0, 750.0, 500.0, 250.0), shift=5.0).schedule.sigmas
    TrajectoryConfig(schedule=uniform(48, shift=5.0), keep=keep, guidance_from_uncond=3.0)
    with pytest.raises(ValueError, match="same shift"):
        TrajectoryConfig(schedule=uniform(48, shift=8.0), keep=keep, guidance_from_uncond=3.0)
    with pytest.raises(ValueError, match="0 last"):
        config(keep=keep[:-1])


def test_texts_of_other_lengths_are_padded() -> None:
    network, noise = make_network().requires_grad_(False), torch.randn(SHAPE, dtype=torch.float64)
    prompt, null = prompts()
    two = torch.cat([prompt, text(1)[:, None]], dim=1)
    index = torch.zeros(2, FRAMES, dtype=torch.int64)
    one = sample_trajectory(network, config(), noise, prompt, null)
    torch.testing.assert_close(
        sample_trajectory(network, config(), noise, two, null[:, :, :2], prompt_index=index), one
    )


def clips_folder(folder: Path, count: int = 5) -> LatentShards:
    header = ShardHeader(
        codec="none", codec_sha256=None, normalisation="none", dtype="float32", fps=16.0, num_frames=13, height_px=16,
        width_px=32, latent_shape=(CHANNELS, *SIZE), frames_rule="1 + 4k",
    )  # fmt: skip
    with ShardWriter(folder, header) as writer:
        for item in range(count):
            index = [0, 0, 1, 1] if item % 2 else [0] * FRAMES
            writer.add(item, torch.randn(SHAPE[1:]), ["one", "two"][: 1 + item % 2], prompt_index=index)
    return LatentShards(LatentShardsConfig(path=str(folder)))


def written(tmp_path: Path, count: int = 5) -> TrajectoryShards:
    clips = clips_folder(tmp_path / "clips")

    def sample(latents: Tensor, numbers: range) -> tuple[Tensor, Tensor]:
        states = torch.stack([latents * (1 + k) for k in range(5)], dim=1)
        return states, states[:, -1]

    write_trajectories(
        sample, clips, tmp_path / "paths", config(), count=count, batch=2, teacher={"sha256": "a"}
    )  # fmt: skip
    return TrajectoryShards(LatentShardsConfig(path=str(tmp_path / "paths"), shuffle=False, in_memory=True))


def test_paths_are_stored_and_continued(tmp_path: Path) -> None:
    assert len(written(tmp_path, 3)) == 3
    (tmp_path / "clips").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / "clips")
    source = TrajectoryShards(LatentShardsConfig(path=str(tmp_path / "paths"), shuffle=False))
    batch = source.batch(0, 2)
    assert isinstance(batch, TrajectoryBatch) and batch.trajectory is not None
    assert batch.trajectory.shape == (2, 5, *SHAPE[1:]) and batch.sigmas == STEPS.schedule.sigmas
    torch.testing.assert_close(batch.trajectory[:, -1], batch.latents, rtol=1e-3, atol=1e-3)
    assert batch.captions == (("one",), ("one", "two"))
    facts = source.describe()
    assert facts["guidance_from_uncond"] == 2.0 and facts["teacher"] == {"sha256": "a"} and facts["steps"] == 8
    with pytest.raises(ValueError, match="expected a teacher's trajectories"):
        TrajectoryShards(LatentShardsConfig(path=str(tmp_path / "clips")))


def test_another_teacher_does_not_continue_a_folder(tmp_path: Path) -> None:
    written(tmp_path, 3)
    clips = LatentShards(LatentShardsConfig(path=str(tmp_path / "clips")))
    with pytest.raises(ValueError, match="source"):
        write_trajectories(lambda x, n: (x[:, None], x), clips, tmp_path / "paths", config(), count=5, batch=2,
                           teacher={"sha256": "b"})  # fmt: skip


def regression(**values: Any) -> OdeRegression:
    made = OdeRegressionConfig(**{"steps": STEPS, "plan": PLAN, **values})
    return OdeRegression(made, backbone=make_network(), null_text=NULL)


def path_batch(sigmas: tuple[float, ...] | None = STEPS.schedule.sigmas) -> TrajectoryBatch:
    states = torch.randn(2, 5, *SHAPE[1:], dtype=torch.float64)
    return TrajectoryBatch(trajectory=states, sigmas=sigmas, latents=torch.randn(SHAPE, dtype=torch.float64),
                           text=text(0)[:, None])  # fmt: skip


@pytest.mark.parametrize("past", ["noisy", "clean"])
def test_regression_reads_states_and_aims_at_the_end(past: Any) -> None:
    method = regression(past=past, clean=past == "noisy")
    batch = path_batch()
    assert batch.trajectory is not None
    which = torch.tensor([[0, 0, 3, 3], [2, 2, 1, 1]])
    prediction, x, sigma = method.predict(batch, batch.trajectory, which)
    assert torch.equal(x[1, :2], batch.trajectory[1, 2, :2]) and torch.equal(x[0, 2:], batch.trajectory[0, 3, 2:])
    assert sigma[0].tolist() == pytest.approx([1.0, 1.0, STEPS.schedule.sigmas[3], STEPS.schedule.sigmas[3]])
    assert prediction.shape == SHAPE
    # what chunk 1 reads: the noisy state of chunk 0, or the clean clip and not that state
    assert batch.latents is not None
    other = replace(batch, latents=batch.latents + 1)
    changed = method.predict(other, batch.trajectory, which)[0]
    assert torch.equal(changed, prediction) == (past == "noisy")
    moved = batch.trajectory.clone()
    moved[0, 0, :2] += 1  # the state that chunk 0 of sample 0 was read at
    changed = method.predict(batch, moved, which)[0]
    assert torch.equal(changed[0, 2:], prediction[0, 2:]) == (past == "clean")
    loss = method.step(batch, "student", 0, torch.Generator().manual_seed(0)).loss
    loss.backward()
    assert loss.item() > 0


def test_regression_at_the_answer_is_zero_and_clean_chunks_do_not_count() -> None:
    """With states that are the end point itself, and a velocity of 0, nothing is left; all-clean draws give 0."""
    method = regression()
    torch.nn.init.zeros_(method.student.backbone.head.head.weight)  # type: ignore[union-attr, arg-type]
    torch.nn.init.zeros_(method.student.backbone.head.head.bias)  # type: ignore[union-attr, arg-type]
    end = torch.randn(SHAPE, dtype=torch.float64)
    batch = replace(path_batch(), trajectory=end[:, None].expand(-1, 5, -1, -1, -1, -1))
    assert method.step(batch, "student", 0, torch.Generator().manual_seed(0)).loss.item() == 0.0


@pytest.mark.parametrize("sigmas", [None, (1.0, 0.9, 0.75, 0.4, 0.0), (1.0, 0.5, 0.0)])
def test_regression_refuses_other_sigmas(sigmas: Any) -> None:
    with pytest.raises(ValueError, match="student's steps"):
        regression().step(path_batch(sigmas), "student", 0, torch.Generator())
    with pytest.raises(ValueError, match="no trajectory"):
        regression().step(Batch(latents=torch.zeros(SHAPE)), "student", 0, torch.Generator())
    with pytest.raises(ValueError, match="carry no loss"):
        regression(past="clean", clean=True)


def test_paths_of_more_steps_serve_fewer() -> None:
    """A student of two steps sees of four-step paths what it would see of its own."""
    two = StepList(steps=(1000.0, 500.0), shift=3.0)
    method, many = regression(steps=two), path_batch()
    assert many.trajectory is not None and many.sigmas is not None
    own = replace(many, trajectory=many.trajectory[:, [0, 2, 4]], sigmas=two.schedule.sigmas)
    losses = [method.step(b, "student", 0, torch.Generator().manual_seed(0)).loss for b in (many, own)]
    assert torch.equal(*losses) and losses[0].item() > 0
    with pytest.raises(ValueError, match="5 states for 3 sigmas"):
        method.step(replace(many, sigmas=two.schedule.sigmas), "student", 0, torch.Generator())


def consistency(**values: Any) -> CausalConsistency:
    made = ConsistencyConfig(**{"grid": 12, "shift": 3.0, "guidance_from_uncond": 1.0, "plan": PLAN, **values})
    return CausalConsistency(
        made, backbone=make_network(), teacher=make_network(), average=make_network(), null_text=NULL
    )


@pytest.mark.parametrize("per_chunk", [False, True])
def test_consistency_reaches_the_student_alone(per_chunk: bool) -> None:
    method = consistency(per_chunk=per_chunk, guidance_from_uncond=2.0)
    batch = Batch(latents=torch.randn(SHAPE, dtype=torch.float64), text=text(0)[:, None])
    method.step(batch, "student", 0, torch.Generator().manual_seed(0)).loss.backward()
    assert any(p.grad is not None for p in method.student.parameters())
    assert all(p.grad is None for net in (method.teacher, method.average) for p in net.parameters())
    assert set(method.frozen) == {"teacher"} and method.followers["average"].role == "student"


@pytest.mark.parametrize("to_end", [True, False])
def test_the_last_interval_keeps_the_end(to_end: bool) -> None:
    """A student that says the same x0 everywhere is consistent with itself; only the teacher's end tells it apart."""
    method = consistency(to_end=to_end)

    class Constant(torch.nn.Module):
        """x0 = 0."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def prepare(self, given: Any) -> Any:
            return make_network().prepare(given)

        def forward(self, x: Tensor, sigma: Tensor, cond: Any, context: Any) -> Tensor:
            return self.scale * x / sigma.double().clamp(min=1e-9)[..., None, None, None]

    method.student.backbone = method.average.backbone = Constant()
    batch = Batch(latents=torch.randn(SHAPE, dtype=torch.float64), text=text(0)[:, None])
    losses = [method.step(batch, "student", 0, torch.Generator().manual_seed(s)).loss.item() for s in range(40)]
    assert (max(losses) > 1e-2) == to_end


def test_a_student_that_follows_the_teachers_line_is_consistent() -> None:
    """A teacher whose velocity is constant has straight paths: the same network is its own few-step student."""
    method = consistency()
    for network in (method.student, method.teacher, method.average):
        head: Any = network.backbone.head
        torch.nn.init.zeros_(head.head.weight)
    batch = Batch(latents=torch.randn(SHAPE, dtype=torch.float64), text=text(0)[:, None])
    loss = method.step(batch, "student", 0, torch.Generator().manual_seed(0)).loss
    assert loss.item() < 1e-12
