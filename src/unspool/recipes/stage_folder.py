"""A trained stage network with its codec and text encoder as a model folder, ready to load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from unspool.diffusion.schedule import uniform
from unspool.engine.model_folder import ModelSpec, Part, save_model_folder
from unspool.engine.settings import RolloutSettings
from unspool.geometry import Geometry
from unspool.recipes.stage_parts import CHUNK, CLIP

if TYPE_CHECKING:
    from torch import Tensor

    from unspool.methods.samples import StepList
    from unspool.models.wan.config import WanConfig

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
    kind: Literal["causal", "bidirectional"],
    size_px: int,
    network: WanConfig,
    weights: Mapping[str, Tensor],
    codec: str | os.PathLike[str],
    text: str | os.PathLike[str],
    provenance: Mapping[str, Any] | None = None,
    card: str | None = None,
    few: StepList | None = None,
    fewer: Sequence[StepList] = (),
    window: int = WINDOW,
    sigma_commit: float = 0.0,
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
        kind=kind, size_px=size_px, transformer=Part(kind="wan"), provenance=provenance, few=few, fewer=fewer,
        window=window, sigma_commit=sigma_commit,
    )  # fmt: skip
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
    kind: Literal["causal", "bidirectional"],
    size_px: int,
    transformer: Part,
    provenance: Mapping[str, Any] | None = None,
    few: StepList | None = None,
    fewer: Sequence[StepList] = (),
    window: int = WINDOW,
    sigma_commit: float = 0.0,
) -> ModelSpec:
    """How a stage network is run, as `model.json` states it; files are filled in when it is saved. `few`: the steps of
    a distilled student, which has its guidance inside; `fewer`: shorter lists that it may also be run with; `window`
    latent frames in reach; `sigma_commit` level told in the commit pass."""
    schedule = uniform(STEPS[kind], shift=SHIFT) if few is None else few.schedule
    return ModelSpec(
        name="stage" if kind == "causal" else "stage-teacher",
        kind=kind,
        transformer=transformer, codec=Part(kind="taehv"), text=Part(kind="caption"),
        height_px=size_px, width_px=size_px, fps=16.0, geometry=Geometry(), clip=CLIP,
        rollout=RolloutSettings(
            chunk=CHUNK, window=window, sink=SINK, sigmas=schedule.sigmas, conditioning=schedule.conditioning,
            other_sigmas=tuple(steps.schedule.sigmas for steps in fewer),
            solver="few_step" if few else "euler", shift=None if few else SHIFT,
            guidance_scale=1.0 if few else GUIDANCE, sigma_commit=sigma_commit, switch_policy="keep",
            positions="relative" if kind == "causal" else "absolute",
        ),
        seconds=5.0,
        about="sprites under a sky from captions, trained by this package on clips that it renders itself",
        examples=EXAMPLES, vocabulary=VOCABULARY, licence="Apache-2.0", provenance=dict(provenance or {}),
    )  # fmt: skip


def card_of(kind: Literal["causal", "bidirectional"], size_px: int, provenance: Mapping[str, Any]) -> str:
    """README.md of a stage model's folder: what it is and how it was made."""
    what = {
        "causal": "causal: it streams, chunk by chunk of 3 latent frames, and follows a prompt that changes",
        "bidirectional": "bidirectional: clips of up to 81 frames at once; the teacher of the causal model",
    }[kind]
    config = provenance["config"]
    minutes = ", ".join(f"{part} {value}" for part, value in provenance["minutes"].items() if value is not None)
    return f"""# The stage model, {size_px} px
Sprites under a sky from captions, 16 frames per second; {what}.

- Run: `unspool generate "{EXAMPLES[0]}" -o out.mp4`; it knows {VOCABULARY}.
- Made by `unspool stage-model --size {size_px}` from nothing: recipe `{provenance["recipe"]}`, seed
  {config["train"]["seed"]}, {provenance["clips"]} clips that the package rendered itself, no other data.
- Minutes by part: {minutes}. Hardware: {provenance["hardware"]}, torch {provenance["torch"]}.
- Scores, and what is wrong with it: docs/stage-model.md of the repository. Every setting is in model.json.
"""


def machine() -> dict[str, str]:
    """Hardware and version of torch, for a model's provenance."""
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"hardware": f"{platform.machine()}, {device}", "torch": str(torch.__version__)}
