"""The same distillations at the size of Wan2.1-1.3B, with the published schedules; weights and clips are the user's.

    torchrun --nproc-per-node 8 -m unspool train wan-1.3b-self-forcing data=latents null_text=empty.safetensors \
        start=runs/ode/student.safetensors teacher=Wan-AI/Wan2.1-T2V-14B critic=Wan-AI/Wan2.1-T2V-1.3B

`data` are shards (`ShardWriter`) of latents of 81 frames at 480 x 832 with the text states of UMT5, which the package
does not make itself yet. None of them was run at this size here: they build on the meta device and run at toy width on
two gloo ranks (tests). Unlike published code, student and critic see the same prompts at a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Window
from unspool.methods.consistency import ConsistencyConfig
from unspool.methods.dmd import DmdConfig
from unspool.methods.ode_regression import OdeRegressionConfig
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.samples import NoisedDataConfig, StepList
from unspool.methods.scores import ScoreConfig, ScoreLevels
from unspool.models.wan.config import WanConfig
from unspool.presets.data import WAN21_1_3B, WAN21_14B
from unspool.train.config import EmaConfig, OptimConfig, TrainConfig
from unspool.train.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unspool.data.batch import Source
    from unspool.methods.base import Method
    from unspool.models.wan.network import WanTransformer

PLAN = ChunkPlan(chunk=3)
FRAMES = 21
CAUSVID_STEPS = StepList(steps=(1000.0, 757.0, 522.0), shift=8.0, warp=False)
SELF_FORCING_STEPS = StepList(steps=(1000.0, 750.0, 500.0, 250.0), shift=5.0)


@dataclass(frozen=True, kw_only=True)
class WanDistilRecipe(Recipe):
    """A distillation of a Wan network.

    Fields: `network` of student and critic, `teacher_network` where the teacher's differs (None: the same); `start` the
    student's first weights and `teacher` the score's: a run's export, a model folder, or what `load_wan` takes ("":
    new weights, for a dry run); `critic` the critic's first ones ("": the teacher's, where the sizes agree); `data`
    latents with text states, or trajectories for ODE regression; `codec` opens the windows of rollouts longer than what
    is scored (`method.sample.longest`): a file, name or module:Class as of `unspool encode --codec` that pads at the
    start, which the published TAEHV does not; `null_text` a safetensors file with one tensor [rows, channels], the
    states of the empty caption (for published guidance: of the negative prompt); `mixed_codecs`: weights and data may
    come from codecs of different files.
    """

    network: WanConfig = WAN21_1_3B
    teacher_network: WanConfig | None = None
    start: str = ""
    teacher: str = ""
    critic: str = ""
    data: str = ""
    codec: str = ""
    null_text: str = ""
    mixed_codecs: bool = False
    method: DmdConfig | ConsistencyConfig | OdeRegressionConfig

    def __post_init__(self) -> None:
        if self.codec and not isinstance(self.method, DmdConfig):
            raise ValueError(f"codec={self.codec!r} has no effect on {type(self.method).__name__}; leave it empty")

    def build_method(self, device: torch.device) -> Method:
        from unspool.recipes.first_weights import check_codecs

        if not self.mixed_codecs:
            check_codecs(self.data, self.start, self.teacher, self.critic, codec=self.codec)
        null = self._null(device)
        student = self._network(self.network, self.start, device)
        if isinstance(self.method, OdeRegressionConfig):
            from unspool.methods.ode_regression import OdeRegression

            return OdeRegression(self.method, backbone=student, null_text=null)
        if isinstance(self.method, ConsistencyConfig):
            from unspool.methods.consistency import CausalConsistency

            teacher = self._network(self.network, self.start, device, frozen=True)
            return CausalConsistency(self.method, backbone=student, teacher=teacher, null_text=null)
        from unspool.methods.dmd import DistributionMatching

        large = self.teacher_network or self.network
        if self.teacher and not self.critic and large != self.network:
            raise ValueError("the teacher's sizes differ from the critic's; give critic= (a bidirectional network)")
        teacher = self._network(large, self.teacher, device, frozen=True)
        critic = self._network(self.network, self.critic or self.teacher, device)
        return DistributionMatching(
            self.method, backbone=student, teacher=teacher, critic=critic, null_text=null, codec=self._codec(device)
        )

    def build_source(self) -> Source:
        from unspool.data.shards import LatentShards, LatentShardsConfig
        from unspool.data.trajectories import TrajectoryShards

        config = LatentShardsConfig(path=self.data)
        return TrajectoryShards(config) if isinstance(self.method, OdeRegressionConfig) else LatentShards(config)

    def _network(
        self, config: WanConfig, weights: str, device: torch.device, *, frozen: bool = False
    ) -> WanTransformer:
        """A network with its weights. One that is not trained waits on the CPU, in its own dtype: the loop places its
        shards, and the whole of it never lies on one device."""
        import torch

        from unspool.models.wan.load import load_wan
        from unspool.models.wan.network import WanTransformer
        from unspool.recipes.first_weights import load_network, model_at

        place = torch.device("cpu") if frozen and device.type != "meta" else device
        dtype = torch.bfloat16 if frozen and self.train.frozen_dtype == "bf16" else torch.float32
        if not weights:
            with torch.device(place):
                return WanTransformer(config)
        if model_at(weights) or (Path(weights).is_file() and own_export(weights)):
            network = WanTransformer(config)
            load_network(network, weights)
            return network.to(place, dtype)
        return load_wan(weights, config=config, dtype=dtype, device=place)

    def _codec(self, device: torch.device) -> Any:
        if not self.codec:
            return None
        from torch import nn

        from unspool.data.encoding import CODECS, load_file_or_name

        module: Any = load_file_or_name(self.codec, CODECS).module
        return module.to(device).eval().requires_grad_(False) if isinstance(module, nn.Module) else module

    def _null(self, device: torch.device) -> Tensor | None:
        if not self.null_text:
            return None
        from unspool.weights.read import read_checkpoint

        tensors: dict[str, Any] = dict(read_checkpoint(self.null_text, leading=frozenset()).tensors)
        if len(tensors) != 1 or next(iter(tensors.values())).ndim != 2:
            raise ValueError(f"{self.null_text}: expected one tensor [rows, channels], the empty caption's states")
        return next(iter(tensors.values())).float().to(device)


def own_export(file: str) -> bool:
    """Whether a weight file is what a training of this package wrote: names that begin with "backbone."."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return any(name.startswith("backbone.") for name in opened.keys())  # noqa: SIM118  (no dict)
    except SafetensorError:
        return False


def wan_causvid_ode() -> WanDistilRecipe:
    """CausVid's initialisation: 1,000 to 1,500 paths of the bidirectional network, 3,000 steps of 128 (64 GPUs x 2)."""
    return WanDistilRecipe(
        method=OdeRegressionConfig(steps=CAUSVID_STEPS, plan=PLAN),
        train=_train(steps=3000, batch=128, lr=2e-6, betas=(0.9, 0.999)),
    )


def wan_causvid_dmd() -> WanDistilRecipe:
    """CausVid's distribution matching: 3 steps, noised data, guidance g = 3.5 of cond + g (cond - uncond)."""
    train = _train(steps=6000, batch=64, lr=2e-6, betas=(0.9, 0.999))
    return WanDistilRecipe(
        method=DmdConfig(
            sample=NoisedDataConfig(steps=CAUSVID_STEPS, plan=PLAN), levels=ScoreLevels(shift=8.0),
            teacher=ScoreConfig(guidance_from_uncond=4.5),
        ),
        train=train,
    )  # fmt: skip


def wan_consistency() -> WanDistilRecipe:
    """Causal consistency (arXiv:2605.15141): 3,000 steps from a teacher-forced many-step network, no stored paths."""
    return WanDistilRecipe(
        method=ConsistencyConfig(grid=48, shift=5.0, guidance_from_uncond=3.0, plan=PLAN),
        train=_train(steps=3000, batch=64, lr=2e-6, betas=(0.9, 0.999)),
    )


def wan_self_forcing() -> WanDistilRecipe:
    """Self-Forcing: 600 steps of 64 rollouts against a 14B teacher, critic 4e-7, g = 3.

    The average begins at the student's 40th update (step 200). Published code leaves the scores' shift to a default of
    8; here it is the student's 5. A teacher of the student's size: teacher_network=none.
    """
    optim = OptimConfig(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01)
    return WanDistilRecipe(
        teacher_network=WAN21_14B,
        method=DmdConfig(
            sample=OnPolicyConfig(
                steps=SELF_FORCING_STEPS, plan=PLAN, frames=FRAMES, visibility=Window(window=FRAMES),
            ),
            levels=ScoreLevels(shift=5.0), teacher=ScoreConfig(guidance_from_uncond=4.0),
        ),
        train=TrainConfig(
            steps=600, batch=64, optim=optim, critic=OptimConfig(lr=4e-7, betas=(0.0, 0.999), weight_decay=0.01),
            ema=EmaConfig(decay=0.99, warmup=0, start=40), clip_norm=10.0, gradient_checkpointing=True,
            frozen_dtype="bf16",
        ),
    )  # fmt: skip


def _train(*, steps: int, batch: int, lr: float, betas: tuple[float, float]) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch=batch, optim=OptimConfig(lr=lr, betas=betas, weight_decay=0.01), ema=None,
        clip_norm=10.0, gradient_checkpointing=True, frozen_dtype="bf16",
    )  # fmt: skip


__all__ = ["WanDistilRecipe", "wan_causvid_dmd", "wan_causvid_ode", "wan_consistency", "wan_self_forcing"]
