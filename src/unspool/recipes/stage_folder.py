"""A trained stage network with its codec and text encoder as a model folder, ready to load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unspool.causal.position import Absolute, Cyclic, ReanchoredSink, WindowRelative
from unspool.causal.visibility import Full, Window
from unspool.config import to_dict
from unspool.diffusion.schedule import uniform
from unspool.engine.model_folder import ModelSpec, Part, save_model_folder
from unspool.engine.settings import RolloutSettings
from unspool.geometry import Geometry
from unspool.recipes.stage_parts import CHUNK, CLIP, LatentRecipe, made_first
from unspool.train.callbacks import Callback

if TYPE_CHECKING:
    from torch import Tensor

    from unspool.methods.samples import StepList
    from unspool.models.wan.config import WanConfig
    from unspool.train.loop import Trainer

Kind = Literal["causal", "bidirectional"]

STEPS = {"causal": 25, "bidirectional": 50}
"""Denoising steps of student and teacher; with 25 two CPU cores stream the student at its own 16 frames/s."""
SHIFT, GUIDANCE = 2.5, 3.0
"""Shift of the sigmas and guidance scale that the stage's networks are run with."""
WINDOW, SINK = CLIP, CHUNK
SIGMA_COMMIT = 0.1
"""Level that the shipped student is told in its commit pass, as if what later chunks read were a little noisy: its
streams hold out better so (measured: docs/stage-model.md)."""
EXAMPLES = (
    "a red ball bounces at sunset",
    "a blue star drifts left at night",
    "a small green triangle rests and a big yellow square rises by day",
    "a purple ball orbits at sunset",
)
VOCABULARY = (
    "one to three sprites: small or big; red, orange, yellow, green, teal, blue, purple, pink; ball, square, triangle, "
    "star; bounces, drifts left, drifts right, rises, orbits, rests; by day, at sunset, at night"
)


def write_folder(
    folder: str | os.PathLike[str],
    *,
    kind: Kind,
    size_px: int,
    network: WanConfig,
    weights: Mapping[str, Tensor],
    codec: str | os.PathLike[str],
    text: str | os.PathLike[str],
    rollout: RolloutSettings,
    provenance: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> ModelSpec:
    """Write the folder of a student ("causal") or teacher. `weights` has keys `backbone.*` and, where the text encoder
    was trained along, `text.*`; the network's are stored in bfloat16. The rest: `describe_model`."""
    import torch

    from unspool.models.caption import CaptionEncoder
    from unspool.models.taehv import Taehv
    from unspool.models.wan.network import WanTransformer

    transformer, encoder = WanTransformer(network), CaptionEncoder.from_single_file(text)
    for module, prefix in ((transformer, "backbone."), (encoder, "text.")):
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if own or prefix == "backbone.":
            module.load_state_dict(own)
    spec = describe_model(
        kind=kind, size_px=size_px, transformer=Part(kind="wan"), rollout=rollout, provenance=provenance
    )
    return save_model_folder(
        folder,
        spec,
        transformer=transformer.to(torch.bfloat16),
        codec=Taehv.from_single_file(codec),
        text=encoder,
        card=card,
    )


def describe_model(
    *,
    kind: Kind,
    size_px: int,
    transformer: Part,
    rollout: RolloutSettings,
    provenance: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """A stage network as `model.json` states it; files are filled in when it is saved. `rollout`: `usual_rollout`, or
    that of the recipe which trained it."""
    return ModelSpec(
        name="stage" if kind == "causal" else "stage-teacher",
        kind=kind,
        transformer=transformer, codec=Part(kind="taehv"), text=Part(kind="caption"),
        height_px=size_px, width_px=size_px, fps=16.0, geometry=Geometry(), clip=CLIP,
        rollout=rollout,
        seconds=5.0,
        about="sprites under a sky from captions, trained by this package on clips that it renders itself",
        examples=EXAMPLES, vocabulary=VOCABULARY, licence="Apache-2.0", provenance=dict(provenance or {}),
    )  # fmt: skip


def usual_rollout(
    kind: Kind,
    *,
    few: StepList | None = None,
    fewer: Sequence[StepList] = (),
    window: int = WINDOW,
    sigma_commit: float = 0.0,
) -> RolloutSettings:
    """How the stage's networks are run. `few`: the steps of a distilled student, which has its guidance inside;
    `fewer`: shorter lists that it may also be run with; `window` latent frames in reach; `sigma_commit` level told in
    the commit pass."""
    schedule = uniform(STEPS[kind], shift=SHIFT) if few is None else few.schedule
    return RolloutSettings(
        chunk=CHUNK, window=window, sink=SINK, sigmas=schedule.sigmas, conditioning=schedule.conditioning,
        other_sigmas=tuple(steps.schedule.sigmas for steps in fewer),
        solver="few_step" if few else "euler", shift=None if few else SHIFT,
        guidance_scale=1.0 if few else GUIDANCE, sigma_commit=sigma_commit, switch_policy="keep",
        positions="relative" if kind == "causal" else "absolute",
    )  # fmt: skip


def trained_rollout(
    kind: Kind, method: Any, *, few: StepList | None = None, fewer: Sequence[StepList] = ()
) -> RolloutSettings:
    """The rollout that a training prepares for: chunks, reach, positions and commit level of a causal objective's
    config (of its `sample` where samples are rollouts).

    A network that read all of its clips (`Full`) at absolute positions streams with the window of a clip, the usual
    sink, and positions in that window, so that it stays within what it has seen; a `Window` or a visibility of one's
    own, and other positions, are taken at their word. Raises ValueError for what `model.json` cannot state.
    """
    settings = usual_rollout(kind, few=few, fewer=fewer)
    if kind == "bidirectional":
        return settings
    past = getattr(method, "sample", method)
    sees, positions = past.visibility, past.positions
    if past.plan.num_frames is not None:
        raise ValueError(f"plan.num_frames={past.plan.num_frames}: expected none, a plan for streams without end")
    settings = replace(
        settings, chunk=past.plan.chunk, first=past.plan.first, within=sees.within,
        sigma_commit=getattr(past, "sigma_commit", 0.0),
    )  # fmt: skip
    is_usual = isinstance(sees, Full) and positions == Absolute()
    if type(sees) is Window:
        settings = replace(settings, window=sees.window, sink=sees.sink, commit_within=sees.commit_within)
    elif not isinstance(sees, Full):  # one of a user's own
        named = f"{type(sees).__module__}:{type(sees).__qualname__}"
        settings = replace(settings, visibility=named, visibility_options=to_dict(sees))
    if not is_usual:
        settings = replace(settings, positions=POSITIONS[type(positions)], position_options=_options(positions))
    stated = settings.config()
    for name, asked, said in (("visibility", sees, stated.visibility), ("positions", positions, stated.positions)):
        if asked != said and not is_usual and not isinstance(asked, Full):
            raise ValueError(
                f"{name}={asked}: expected what model.json can state ({said} is what it would say); leave its other "
                "options at their defaults, or train without codec= and watch.codec="
            )
    return settings


POSITIONS = {Absolute: "absolute", WindowRelative: "relative", ReanchoredSink: "reanchored", Cyclic: "cyclic"}
"""Names of position policies in `model.json`."""


def _options(positions: Any) -> dict[str, int]:
    """The counts of a policy that are not at their defaults."""
    values = {f.name: getattr(positions, f.name) for f in fields(positions)}
    defaults = {f.name: f.default for f in fields(positions)}
    return {name: v for name, v in values.items() if not isinstance(v, bool) and v != defaults[name]}


def card_of(kind: Kind, size_px: int, provenance: Mapping[str, Any]) -> str:
    """README.md of a stage model's folder: what it is and how it was made."""
    what = {
        "causal": "causal: it streams, chunk by chunk of 3 latent frames, and follows a prompt that changes",
        "bidirectional": "bidirectional: clips of up to 81 frames at once; the teacher of the causal model",
    }[kind]
    config = provenance["config"]
    taken = provenance.get("taken", {})
    source = ", ".join(f"{part} of {name}" for part, name in taken.items())
    begun = f"with another model's parts ({source})" if taken else "from nothing"
    minutes = ", ".join(f"{part} {value}" for part, value in provenance["minutes"].items() if value is not None)
    return f"""# The stage model, {size_px} px
Sprites under a sky from captions, 16 frames per second; {what}.

- Run: `unspool generate "{EXAMPLES[0]}" -o out.mp4`; it knows {VOCABULARY}.
- Made by `unspool stage-model --size {size_px}` {begun}: recipe `{provenance["recipe"]}`, seed
  {config["train"]["seed"]}, {provenance["clips"]} clips that the package rendered itself, no other data.
- Minutes by part: {minutes}. Hardware: {provenance["hardware"]}, torch {provenance["torch"]}.
- Scores, and what is wrong with it: docs/stage-model.md of the repository. Every setting is in model.json.
"""


class StageFolder(Callback):
    """Writes `model/` into a run at the end of a training on the stage, the network in bfloat16; says at the beginning
    whether it will: without the recipe's codec file it writes none."""

    def on_start(self, trainer: Trainer) -> None:
        self._tell(trainer, f"{trainer.out / 'model'} at the end")

    def on_end(self, trainer: Trainer) -> None:
        from unspool.train.export import read_weights

        folder, recipe = trainer.out / "model", _latent(trainer)
        if not trainer.world.is_main:
            return
        if not Path(recipe.codec).is_file():
            return self._tell(trainer, "")
        made = {"recipe": trainer.name, "minutes": round(trainer.seconds / 60, 1), **machine()}
        write_folder(
            folder, kind=recipe.kind, size_px=recipe.size_px, network=recipe.network, codec=recipe.codec,
            weights=read_weights(trainer.out / "student.safetensors"), text=recipe.text, rollout=recipe.rollout(),
            provenance=made | {"config": to_dict(recipe)}, card=run_card(recipe, made),
        )  # fmt: skip
        self._tell(trainer, f"{folder} (unspool generate --model {folder} {EXAMPLES[0]!r})")

    def _tell(self, trainer: Trainer, there: str) -> None:
        """Print `there`, or what is missing for it."""
        recipe = _latent(trainer)
        none = f"none: codec={recipe.codec} is not there; {made_first(recipe.size_px)}"
        if trainer.world.is_main:
            print(f"model       {there if Path(recipe.codec).is_file() else none}", flush=True)


def _latent(trainer: Trainer) -> LatentRecipe:
    recipe = trainer.recipe
    assert isinstance(recipe, LatentRecipe)
    return recipe


def run_card(recipe: LatentRecipe, made: Mapping[str, Any]) -> str:
    """README.md of the folder that a run leaves."""
    rollout, size = recipe.rollout(), recipe.size_px
    what = f"clips of up to {CLIP} latent frames at once"
    if recipe.kind == "causal":
        what = (
            f"causal, in chunks of {rollout.chunk} latent frames, window {rollout.window} with {rollout.sink} of sink"
        )
    return f"""# A network of the Sprite Stage, {size} px
Sprites under a sky from captions, 16 frames per second; {what}; {rollout.steps} steps, guidance
{rollout.guidance_scale:g}, commit passes told {rollout.sigma_commit:g}.

- Run: `unspool generate "{EXAMPLES[0]}" --model FOLDER -o out.mp4`; it knows {VOCABULARY}.
- Made by `unspool train {made["recipe"]}`: {recipe.train.steps} steps, {made["minutes"]} minutes on
  {made["hardware"]}, torch {made["torch"]}. Every setting is in model.json.
"""


def machine() -> dict[str, str]:
    """Hardware and version of torch, for a model's provenance."""
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"hardware": f"{platform.machine()}, {device}", "torch": str(torch.__version__)}
