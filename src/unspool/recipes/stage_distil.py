"""From the many-step student of the stage to a few-step one: consistency, stored paths, distribution matching."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unspool.causal.position import WindowRelative
from unspool.causal.visibility import Window
from unspool.methods.consistency import ConsistencyConfig
from unspool.methods.dmd import DmdConfig
from unspool.methods.gan import GanConfig
from unspool.methods.ode_regression import OdeRegressionConfig
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.samples import NoisedDataConfig, StepList
from unspool.methods.scores import ScoreConfig, ScoreLevels
from unspool.recipes.stage import network_64, network_128, train_config
from unspool.recipes.stage_folder import GUIDANCE, SHIFT, SIGMA_COMMIT, SINK, WINDOW
from unspool.recipes.stage_parts import CHUNK, CLIP, LatentRecipe, ShortClips, chunks, need
from unspool.train.config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from unspool.data.batch import Source
    from unspool.methods.base import Method
    from unspool.models.caption import CaptionEncoder
    from unspool.models.wan.network import WanTransformer

FEW_STEPS = StepList(steps=(1000.0, 750.0, 500.0, 250.0), shift=SHIFT)
"""The four steps of the shipped student."""
TWO_STEPS = StepList(steps=(1000.0, 500.0), shift=SHIFT)
"""Half of them, for `--steps 2`."""
SHORT = 9
"""Latent frames, three chunks, of most steps: what a network does next to its past is learnt from few of them."""
SCORED = ScoreLevels(shift=5.0)
"""Where samples are scored: nearer to noise than steps are, for motion is decided there (docs/stage-model.md)."""
GRID = 24
"""Steps of the many-step networks while they teach; a multiple of the student's number, at the same shift."""


@dataclass(frozen=True, kw_only=True)
class DistilRecipe(LatentRecipe):
    """Base: the text encoder is used as it is, and weights give networks of the student's sizes.

    Fields: `steps` of the student that comes out, `fewer` shorter lists that it may also be run with; `start` its first
    weights.
    """

    steps: StepList = FEW_STEPS
    fewer: tuple[StepList, ...] = (TWO_STEPS,)

    kind: ClassVar[Literal["causal", "bidirectional"]] = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_text:
            raise ValueError("learn_text=true: distillation uses the text encoder as it is; leave it false")
        known = self.steps.schedule.sigmas
        strange = [each.steps for each in self.fewer if not set(each.schedule.sigmas) <= set(known)]
        if strange:
            raise ValueError(
                f"fewer={strange}: expected levels of steps={self.steps.steps} (shift {self.steps.shift:g}), as others "
                "are not learnt; set fewer too, to [] for none"
            )

    @property
    def few(self) -> StepList | None:
        return self.steps

    def parts(self, device: torch.device, *files: str) -> tuple[list[WanTransformer], CaptionEncoder]:
        """A network for each weight file ("" leaves new weights), the first one with `progress` added, and the text
        encoder. Raises ValueError for weights of other sizes, of other codecs than the data, or of a model that reads
        captions with another encoder."""
        from unspool.recipes.first_weights import add_progress, check_text, load_network

        self.check_codecs(*files, *self.progress.paths)
        first, text = self.student_parts(device)
        made = [first, *(self.student_parts(device)[0] for _ in files[1:])]
        for network, file in zip(made, files, strict=True):
            load_network(network, file)
        add_progress(first, self.progress)
        check_text(text, self.text, *files, *self.progress.paths)
        return made, text


@dataclass(frozen=True, kw_only=True)
class ConsistencyRecipe(DistilRecipe):
    """Causal consistency: `start` gives the first weights and the first average, and the teacher too unless `teacher`
    names the many-step student's weights: then `start` may be the few-step student of the leg before."""

    method: ConsistencyConfig
    teacher: str = ""

    def build_method(self, device: torch.device) -> Method:
        from unspool.methods.consistency import CausalConsistency

        (student, teacher), text = self.parts(device, self.start, self.teacher or self.start)
        return CausalConsistency(self.method, backbone=student, teacher=teacher, text=text)


@dataclass(frozen=True, kw_only=True)
class OdeRecipe(DistilRecipe):
    """Regression on a teacher's paths. `data` is a folder of them; or of latents, and then `teacher` (weights, of
    `teacher_kind`) samples `paths` of them for their prompts first, into the run's folder."""

    method: OdeRegressionConfig
    teacher: str = ""
    teacher_kind: Literal["bidirectional", "causal"] = "bidirectional"
    paths: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.short.legs:
            raise ValueError("short.legs has no effect on stored paths; leave it empty")
        if self.changes:
            raise ValueError("changes=true has no effect on stored paths; leave it false")
        if self.steps != self.method.steps:
            raise ValueError(f"steps={self.steps.steps}, method.steps={self.method.steps.steps}: expected the same")
        if self.teacher_kind == "causal" and self.method.past != "clean":
            raise ValueError(
                f"teacher_kind='causal' with method.past={self.method.past!r}: a causal teacher's paths go on behind "
                "clean chunks; use method.past=clean method.clean=false"
            )

    def prepare(self, out: Path) -> OdeRecipe:
        """Sample the paths where they are not there."""
        if not self.teacher:
            return self
        need("data", self.data, self.size_px)
        self.check_codecs(self.start, self.teacher)
        from unspool.recipes.stage_paths import PathsConfig, write_stage_paths

        folder = out / "paths"
        config = PathsConfig(
            weights=self.teacher, data=self.data, text=self.text, kind=self.teacher_kind, count=self.paths,
            network=self.network, steps=self.steps, compile=self.train.compile,
        )  # fmt: skip
        write_stage_paths(config, folder)
        return replace(self, data=str(folder), teacher="")

    def build_method(self, device: torch.device) -> Method:
        from unspool.methods.ode_regression import OdeRegression

        (student,), text = self.parts(device, self.start)
        return OdeRegression(self.method, backbone=student, text=text)

    def build_source(self) -> Source:
        from unspool.data.shards import LatentShardsConfig
        from unspool.data.trajectories import TrajectoryShards

        if self.teacher:
            raise ValueError(
                f"the paths of teacher={self.teacher} are not sampled yet, which the run itself does first; begin it, "
                "or give data=RUN/paths of one that was begun, and teacher="
            )
        return TrajectoryShards(LatentShardsConfig(path=self.data, in_memory=self.in_memory))


@dataclass(frozen=True, kw_only=True)
class DmdRecipe(DistilRecipe):
    """Distribution matching: `teacher` gives the score of the data, and the critic's first weights too unless `critic`
    names those of the leg before; `codec` also opens the windows of long rollouts (`method.sample.longest`)."""

    method: DmdConfig
    teacher: str
    critic: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != self.method.sample.steps:
            raise ValueError(_other_steps(self.steps, self.method.sample.steps))

    @property
    def is_long(self) -> bool:
        """Whether the codec takes part in training."""
        return isinstance(self.method.sample, OnPolicyConfig) and self.method.sample.is_long

    def may_differ(self) -> tuple[str, ...]:
        return tuple(name for name in self.harmless if name != "codec" or not self.is_long)

    def build_method(self, device: torch.device) -> Method:
        from unspool.methods.dmd import DistributionMatching

        files = (self.start, self.teacher, self.critic or self.teacher)
        (student, teacher, critic), text = self.parts(device, *files)
        codec = None
        if self.is_long and self.codec:
            from unspool.models.taehv import Taehv

            need("codec", self.codec, self.size_px)
            codec = Taehv.from_single_file(self.codec).to(device).eval().requires_grad_(False)
        return DistributionMatching(
            self.method, backbone=student, teacher=teacher, critic=critic, text=text, codec=codec
        )


@dataclass(frozen=True, kw_only=True)
class GanRecipe(DistilRecipe):
    """Adversarial distillation: `teacher` gives the weights whose features the discriminator reads."""

    method: GanConfig
    teacher: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != self.method.sample.steps:
            raise ValueError(_other_steps(self.steps, self.method.sample.steps))

    def build_method(self, device: torch.device) -> Method:
        import torch

        from unspool.methods.gan import Adversarial

        (student, critic), text = self.parts(device, self.start, self.teacher)
        torch.manual_seed(self.train.seed)  # the discriminator's heads are new
        method = Adversarial(self.method, backbone=student, critic=critic, text=text)
        method.discriminator.to(device)
        return method


def _other_steps(own: StepList, learnt: StepList) -> str:
    return (
        f"steps={own.steps}, method.sample.steps={learnt.steps}: give one list, or the model would be run with other "
        "steps than it learns"
    )


def consistency_64() -> ConsistencyRecipe:
    """Few-step initialisation of the 64 px stage: the many-step student taught to jump, guidance included."""
    recipe = _consistency(64, train_config(
        steps=2000, batch=16, lr=3e-4, muon_lr=6e-4, decay=0.99, curve="wsd", compile=True))  # fmt: skip
    return replace(recipe, short=ShortClips(legs=((SHORT, 1650),)))


def consistency_128() -> ConsistencyRecipe:
    """Few-step initialisation of the 128 px stage, without stored paths; for one GPU, not run yet."""
    return _consistency(128, train_config(
        steps=1500, batch=48, lr=3e-4, muon_lr=6e-4, decay=0.99, curve="wsd", compile=True))  # fmt: skip


def ode_64() -> OdeRecipe:
    """Few-step initialisation from paths of the bidirectional teacher, sampled first (CausVid)."""
    return OdeRecipe(
        **_files(64), start=_weights(64, "motion"), teacher=_weights(64, "teacher"),
        method=OdeRegressionConfig(steps=FEW_STEPS, plan=chunks()),
        train=train_config(steps=600, batch=16, lr=3e-4, muon_lr=6e-4, decay=0.99, curve="wsd", compile=True),
    )  # fmt: skip


def self_forcing_64() -> DmdRecipe:
    """Rollouts of three chunks (Self-Forcing), scored by the many-step student: what comes before long tuning.

    At this budget the many-step student knows more than the bidirectional teacher does (that one:
    `stage-64-self-forcing-bidirectional`)."""
    steps, score = 1300, ScoreConfig(guidance_from_uncond=GUIDANCE, reads="clean_past", plan=chunks())
    recipe = _dmd(64, replace(_rollouts(64), frames=SHORT), steps=steps, batch=16)
    method = replace(
        recipe.method, teacher=score, critic=replace(score, guidance_from_uncond=1.0), ratio=3, levels=SCORED
    )
    return replace(recipe, method=method, teacher=_weights(64, "motion"), short=ShortClips(legs=((SHORT, steps),)))


def self_forcing_64_bidirectional() -> DmdRecipe:
    """Rollouts of whole clips against the bidirectional teacher, as published."""
    return _dmd(64, _rollouts(64), steps=1500, batch=16)


def self_forcing_128() -> DmdRecipe:
    """Rollouts of whole clips against the bidirectional teacher at 128 px; for one GPU, not run yet."""
    return _dmd(128, _rollouts(128), steps=1500, batch=48)


def long_64() -> DmdRecipe:
    """Long tuning (arXiv:2509.22622) after `stage-64-self-forcing`: the end of long rollouts whose prompt changes.

    Up to eleven chunks, in the window that streams are run with; the change comes near what is scored.

    Two CPU cores: 46 minutes. Measured before `stage-64-motion` was: untouched things after a change of prompt .91
    (.86), clips and streams as before (docs/stage-model.md)."""
    return _long(64, self_forcing_64(), steps=700)


def long_128() -> DmdRecipe:
    """Long tuning at 128 px, after `stage-128-self-forcing`; for one GPU, not run yet."""
    return _long(128, self_forcing_128(), steps=500)


def causvid_64() -> DmdRecipe:
    """Noised data against the bidirectional teacher (CausVid)."""
    return _dmd(64, NoisedDataConfig(steps=FEW_STEPS, plan=chunks()), steps=1500, batch=16)


def gan_64() -> GanRecipe:
    """Rollouts against a discriminator that sees data (the GAN variant of Self-Forcing)."""
    train = train_config(steps=1500, batch=16, lr=1e-4, muon_lr=2e-4, decay=0.99, curve="wsd", compile=True)
    return GanRecipe(
        **_files(64), start=_weights(64, "few"), teacher=_weights(64, "teacher"),
        method=GanConfig(sample=_rollouts(64), levels=ScoreLevels(shift=SHIFT)),
        train=replace(train, critic=replace(train.optim, lr=2e-4, muon_lr=4e-4)),
    )  # fmt: skip


def _weights(size_px: int, part: str) -> str:
    return f"runs/stage-{size_px}/{part}/student.safetensors"


def _files(size_px: int) -> dict[str, Any]:
    """What all distillations of a size share."""
    sizes = {64: network_64, 128: network_128}[size_px]()
    home = f"runs/stage-{size_px}"
    return {"size_px": size_px, "network": sizes, "text": f"{home}/text.safetensors", "data": f"{home}/latents",
            "codec": f"{home}/codec.safetensors"}  # fmt: skip


def _consistency(size_px: int, train: TrainConfig) -> ConsistencyRecipe:
    method = ConsistencyConfig(grid=GRID, shift=SHIFT, guidance_from_uncond=GUIDANCE, plan=chunks(), decay=0.95)
    return ConsistencyRecipe(**_files(size_px), start=_weights(size_px, "motion"), method=method, train=train)


def _rollouts(size_px: int) -> OnPolicyConfig:
    return OnPolicyConfig(steps=FEW_STEPS, plan=chunks(), frames=CLIP, latent_size=(size_px // 8, size_px // 8))


def _dmd(size_px: int, sample: OnPolicyConfig | NoisedDataConfig, *, steps: int, batch: int) -> DmdRecipe:
    train = train_config(steps=steps, batch=batch, lr=1e-4, muon_lr=2e-4, decay=0.99, curve="wsd", compile=True)
    method = DmdConfig(
        sample=sample, levels=ScoreLevels(shift=SHIFT), teacher=ScoreConfig(guidance_from_uncond=GUIDANCE), ratio=5
    )
    return DmdRecipe(
        **_files(size_px), start=_weights(size_px, "few"), teacher=_weights(size_px, "teacher"), method=method,
        train=replace(train, critic=replace(train.optim, lr=2e-4, muon_lr=4e-4)),
    )  # fmt: skip


def _long(size_px: int, before: DmdRecipe, *, steps: int) -> DmdRecipe:
    home, optim, critic = f"runs/stage-{size_px}", before.train.optim, before.train.critic
    assert critic is not None
    sample = replace(
        _rollouts(size_px), frames=SHORT, longest=CLIP + 4 * CHUNK, switch=1.0, sigma_commit=SIGMA_COMMIT,
        visibility=Window(window=WINDOW, sink=SINK), positions=WindowRelative(),
    )  # fmt: skip
    train = replace(
        before.train, steps=steps, seed=1, optim=replace(optim, warmup_steps=20),
        critic=replace(critic, warmup_steps=20),
    )  # fmt: skip
    return replace(
        before, train=train, method=replace(before.method, sample=sample),
        short=ShortClips(), changes=True,  # whole clips, for their prompts
        start=_weights(size_px, "distil"), critic=f"{home}/distil/critic.safetensors",
    )  # fmt: skip


__all__ = [
    "FEW_STEPS",
    "ConsistencyRecipe",
    "DistilRecipe",
    "DmdRecipe",
    "GanRecipe",
    "OdeRecipe",
    "causvid_64",
    "consistency_64",
    "consistency_128",
    "gan_64",
    "long_64",
    "long_128",
    "ode_64",
    "self_forcing_64",
    "self_forcing_64_bidirectional",
    "self_forcing_128",
]  # fmt: skip
