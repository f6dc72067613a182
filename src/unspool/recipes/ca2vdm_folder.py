"""A causal STDiT with its codec and text encoder as a model folder: the engine then streams it as any other model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from unspool.causal.visibility import Full
from unspool.config import to_dict
from unspool.diffusion.iddpm import IDDPM
from unspool.engine.model_folder import ModelSpec, Part, save_model_folder
from unspool.engine.settings import RolloutSettings
from unspool.geometry import Geometry
from unspool.methods.clean_prefix import CleanPrefixConfig
from unspool.recipes.stage_folder import machine
from unspool.train.callbacks import Callback
from unspool.train.export import read_weights, rebuilt

if TYPE_CHECKING:
    from unspool.train.loop import Trainer


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the trained network is run: denoising `steps` of ancestral sampling and the scale of `guidance`."""

    steps: int = 50
    guidance: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What a training clip was: `frames` latent frames of `height_px` x `width_px` at `fps`."""

    frames: int
    height_px: int
    width_px: int
    fps: float


def settings_of(method: CleanPrefixConfig, sampling: SamplingConfig) -> RolloutSettings:
    """The rollout that a training prepares for. Raises ValueError for a method that model.json cannot state."""
    usual = to_dict(IDDPM())
    options = {name: value for name, value in to_dict(method.process).items() if value != usual[name]}
    sees, anew = method.visibility, method.bidirectional
    positions = "relative" if anew else "absolute" if method.circle is None else "cyclic"
    settings = RolloutSettings(
        chunk=method.plan.chunk, first=method.plan.first, window="full" if isinstance(sees, Full) else sees.window,
        sink=0 if isinstance(sees, Full) else sees.sink, within=sees.within,
        commit_within=getattr(sees, "commit_within", None),
        positions=positions,
        position_options={} if method.circle is None else {"length": method.circle},
        sigmas=method.process.schedule(sampling.steps).sigmas, solver="ancestral", shift=None,
        process="iddpm", process_options=options,
        guidance_scale=sampling.guidance, sigma_commit=0.0, commit_noise=method.prefix_noise, switch_policy="keep",
        prefix_frames=method.prefix_frames, commit="recompute" if anew else "separate", bidirectional_past=anew,
    )  # fmt: skip
    stated = settings.config().visibility
    if stated != method.sees:
        raise ValueError(
            f"method.visibility={sees}: expected one that model.json can state ({stated} is what it would say); use "
            "window, sink, within and commit_within only"
        )
    return settings


def describe_prefix_model(
    method: CleanPrefixConfig,
    sampling: SamplingConfig,
    clip: Clip,
    *,
    name: str,
    about: str,
    examples: Sequence[str],
    vocabulary: str = "",
) -> ModelSpec:
    """The model as `model.json` states it; files and provenance are filled in when it is saved."""
    return ModelSpec(
        name=name, kind="causal", transformer=Part(kind="stdit"), codec=Part(kind="taehv"), text=Part(kind="caption"),
        height_px=clip.height_px, width_px=clip.width_px, fps=clip.fps, geometry=Geometry(), clip=clip.frames,
        rollout=settings_of(method, sampling), seconds=Geometry().pixel_frames(clip.frames) / clip.fps, about=about,
        examples=tuple(examples), vocabulary=vocabulary, licence="Apache-2.0",
    )  # fmt: skip


def card_of(spec: ModelSpec) -> str:
    """README.md of a folder whose provenance is filled in."""
    made, rollout = spec.provenance, spec.rollout
    past = "all of it" if rollout.window == "full" else f"{rollout.window - rollout.chunk} latent frames"
    knows = f" It knows {spec.vocabulary}." if spec.vocabulary else ""
    return f"""# {spec.name}, {spec.width_px}x{spec.height_px} px
{spec.about[:1].upper()}{spec.about[1:]}; {spec.fps:g} frames per second.

- Run: `unspool generate "{spec.examples[0]}" --model FOLDER -o out.mp4`.{knows}
- Chunks of {rollout.chunk} latent frames; of the past it reads {past}; {len(rollout.sigmas) - 1} steps of ancestral
  sampling with guidance {rollout.guidance_scale:g}.
- Made by `unspool train {made["recipe"]}`: {made["config"]["train"]["steps"]} steps, {made["minutes"]} minutes
  on {made["hardware"]}, torch {made["torch"]}. Every setting is in model.json.
"""


class PrefixModel(Callback):
    """Writes `model/` at the end of a training, the network in bfloat16. `spec` and `codec` are asked for then."""

    def __init__(self, spec: Callable[[], ModelSpec], codec: Callable[[], object]) -> None:
        self.spec, self.codec = spec, codec

    def on_end(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        student: Any = trainer.method.networks["student"]
        weights = read_weights(trainer.out)
        network = rebuilt(student.backbone, weights, "backbone.").to(torch.bfloat16)
        spec, folder = replace(self.spec(), provenance=self._provenance(trainer)), trainer.out / "model"
        save_model_folder(
            folder, spec, transformer=network, codec=self.codec(), text=rebuilt(student.text, weights, "text."),
            card=card_of(spec),
        )  # fmt: skip
        print(f"model       {folder} (unspool generate --model {folder} {spec.examples[0]!r})")

    def _provenance(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "recipe": trainer.name,
            "minutes": round(trainer.seconds / 60, 1),
            **machine(),
            "config": to_dict(trainer.recipe),
        }


__all__ = ["Clip", "PrefixModel", "SamplingConfig", "describe_prefix_model", "settings_of"]
