"""The stage model from nothing: codec, text, latents, teacher, student, its distillation, model folders, in turn.

Every part ends in a file or a folder of clips. It is skipped where `parts.json` says that it was made and that file is
there; a part that was stopped is continued. So the whole may be run in legs of any length, and one part again by
deleting what it made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, Literal

from unspool.config import apply_overrides, locate
from unspool.data.shard_format import HEADER
from unspool.data.worlds.stage import StageConfig
from unspool.recipes import RECIPES

if TYPE_CHECKING:
    from unspool.train.recipe import Recipe

Tell = Callable[[str], None]
Kind = Literal["causal", "bidirectional"]
PARTS = ("codec", "text", "latents", "teacher", "student", "motion", "few", "distil", "long", "models")
RECIPE_OF = {"codec": "codec", "text": "text", "teacher": "teacher", "student": "student",
             "motion": "motion", "few": "consistency", "distil": "self-forcing", "long": "long"}  # fmt: skip
"""What trains a part: "stage-<size>-<recipe>"."""
TAKEN = ("codec.safetensors", "text.safetensors")
"""Files of a model folder that may be taken instead of trained."""
OFTEN = (*3 * ("bounces", "orbits"), "drifts left", "drifts right", "rises", "rests")
"""Motions of the clips that are encoded: what is there three times comes three times as often."""
_MEASURED_CLIPS, _FAR = 128, 10_000_000


@dataclass(frozen=True, kw_only=True)
class StageModelConfig:
    """What is built, and where.

    Fields: `size_px` 64 or 128; `out` folder of the runs; `clips` encoded for training; `max_minutes` of this leg
    (None: to the end); `until` the last part to do; `parts` model folder whose codec and text encoder are taken instead
    of trained ones, by other recipes' latents for instance; `assets` folder that the few-step student's model goes to,
    `weights` folder for those of the teacher and of the many-step student (None: under `out`); `overrides` of the
    parts' recipes, such as "teacher.train.steps=100", and of the stage whose clips are encoded, such as
    "latents.motions=[bounces,orbits,orbits,rests]" (a motion that is there twice comes twice as often).
    """

    size_px: int = 64
    out: Path = Path("runs")
    clips: int = 24_000
    max_minutes: float | None = None
    until: str = "models"
    parts: Path | None = None
    assets: Path | None = None
    weights: Path | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size_px not in (64, 128):
            raise ValueError(f"size_px={self.size_px}: expected 64 or 128, the sizes that there are recipes for")
        if self.until not in PARTS:
            raise ValueError(f"until={self.until!r}: expected one of {', '.join(PARTS)}")
        for override in self.overrides:
            if override.partition(".")[0] not in (*RECIPE_OF, "latents"):
                known = ", ".join((*RECIPE_OF, "latents"))
                raise ValueError(f"override {override!r}: expected PART.a.b=c with a part {known}")
        colours = self.stage.colours  # raises now for names that the stage does not have
        if len(set(colours)) < len(colours):
            raise ValueError(
                f"latents.colours={list(colours)}: expected each once, for sprites of a scene differ in it"
            )
        missing = [name for name in TAKEN if self.parts is not None and not (self.parts / name).is_file()]
        if missing:
            raise ValueError(
                f"parts={str(self.parts)!r} lacks {missing}: expected a model folder with {', '.join(TAKEN)}"
            )
        if self.clips < 64:
            raise ValueError(f"clips={self.clips}: expected at least 64")

    @property
    def home(self) -> Path:
        """Folder of this size's runs."""
        return self.out / f"stage-{self.size_px}"

    @property
    def stage(self) -> StageConfig:
        """The stage whose clips are encoded: its two curved motions three times as often, as they take longest."""
        return apply_overrides(StageConfig(motions=OFTEN), self.of("latents"))

    def of(self, part: str) -> list[str]:
        """The overrides of one part."""
        return [o.partition(".")[2] for o in self.overrides if o.partition(".")[0] == part]


class StageModel:
    """Runs the parts. `tell` gets a line about each."""

    def __init__(self, config: StageModelConfig, tell: Tell = print) -> None:
        self.config, self.tell, self.home = config, tell, config.home
        self._began = time.monotonic()

    def run(self) -> str | None:
        """Do every part up to `until`; the part in which the time of the leg ran out, or None when all is done."""
        for part in PARTS[: PARTS.index(self.config.until) + 1]:
            if self._is_made(part):
                self.tell(f"{part}: already made")
                continue
            self.tell(f"{part}: begins")
            began = time.monotonic()
            is_made = getattr(self, f"_make_{part}")()
            self._note(part, time.monotonic() - began, is_made)
            if not is_made:
                self.tell(f"{part}: saved, the time of this leg is over; run the same command again")
                return part
        return None

    # ---- parts -------------------------------------------------------------------------------------------------

    def _make_codec(self) -> bool:
        if self._take("codec"):
            return True
        if not self._train("codec"):
            return False
        from unspool.data.stage import StageClips
        from unspool.methods.codec import measure_latents
        from unspool.models.taehv import Taehv

        recipe: Any = self._recipe("codec")
        codec = Taehv.from_single_file(recipe.start) if recipe.start else Taehv(recipe.codec)
        codec.load_state_dict(self._weights("codec", ""))
        if not recipe.frozen_encoder:  # whose latents are what they were
            clips = StageClips(frames=41, size_px=self.config.size_px, first=_FAR)
            mean, std = measure_latents(codec, (clips.batch(k, 8) for k in range(_MEASURED_CLIPS // 8)))
            codec = codec.with_normalisation(mean, std)
        codec.save(self.home / "codec.safetensors")
        return True

    def _make_text(self) -> bool:
        if self._take("text"):
            return True
        if not self._train("text"):
            return False
        from unspool.models.caption import CaptionEncoder

        text = CaptionEncoder(self._recipe("text").text)  # type: ignore[attr-defined]
        text.load_state_dict(self._weights("text", "text."))
        text.save(self.home / "text.safetensors")
        return True

    def _make_latents(self) -> bool:
        from unspool.data.encoding import encode_source, load_file_or_name
        from unspool.data.stage import StageClips

        clips = StageClips(self.config.stage, frames=81, size_px=self.config.size_px)
        codec = load_file_or_name(str(self.home / "codec.safetensors"), {"Taehv": "unspool.models.taehv:Taehv"})
        step = max(1, self.config.clips // 20)
        encode_source(
            clips, codec, self.home / "latents", fps=clips.fps, limit=self.config.clips, batch=16, bf16=True,
            device=_device(),
            progress=lambda done, total: self.tell(f"latents: {done} of {total} clips") if done % step < 16 else None,
        )  # fmt: skip
        return True

    def _make_teacher(self) -> bool:
        return self._train("teacher")

    def _make_student(self) -> bool:
        return self._train("student")

    def _make_motion(self) -> bool:
        return self._train("motion")

    def _make_few(self) -> bool:
        return self._train("few")

    def _make_distil(self) -> bool:
        return self._train("distil")

    def _make_long(self) -> bool:
        return self._train("long")

    def _make_models(self) -> bool:
        home = self.config.weights or self.home
        self._write("long", self.config.assets or self.home / "model", "causal")
        self._write("motion", home / f"stage-{self.config.size_px}-many-step", "causal")
        self._write("teacher", home / f"stage-{self.config.size_px}-teacher", "bidirectional")
        return True

    def _write(self, part: str, folder: Path, kind: Kind) -> None:
        """The model folder of what a part trained."""
        from unspool.recipes.stage_folder import card_of, write_folder

        recipe: Any = self._recipe(part)
        write_folder(
            folder, kind=kind, size_px=self.config.size_px, network=recipe.network, weights=self._weights(part, ""),
            codec=self.home / "codec.safetensors", text=self.home / "text.safetensors", rollout=recipe.rollout(),
            provenance=self._provenance(part), card=card_of(kind, self.config.size_px, self._provenance(part)),
        )  # fmt: skip
        self.tell(f"models: {folder}")

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _take(self, part: str) -> bool:
        """Copy a part from the folder of parts; False where there is none."""
        if self.config.parts is None:
            return False
        self.home.mkdir(parents=True, exist_ok=True)
        copyfile(self.config.parts / f"{part}.safetensors", self.home / f"{part}.safetensors")
        self.tell(f"{part}: taken from {self.config.parts}")
        return True

    def _recipe(self, part: str) -> Recipe:
        made: Any = locate(self._name(part), RECIPES)()
        if part not in ("codec", "text"):
            codec = str(self.home / "codec.safetensors")
            made = replace(made, text=str(self.home / "text.safetensors"), data=str(self.home / "latents"), codec=codec,
                           watch=replace(made.watch, codec=codec))  # fmt: skip
        begins = {"student": "teacher", "motion": "student", "few": "motion", "distil": "few", "long": "distil"}.get(
            part
        )
        if begins is not None:
            made = replace(made, start=self._trained(begins))
        if part == "long":
            made = replace(made, critic=str(self.home / "distil" / "critic.safetensors"))
        if part in ("distil", "long"):
            made = replace(made, teacher=self._trained("teacher" if made.method.teacher.reads == "all" else "motion"))
        return apply_overrides(made, self.config.of(part))

    def _name(self, part: str) -> str:
        """The recipe's; captions do not depend on the size."""
        return f"stage-{64 if part == 'text' else self.config.size_px}-{RECIPE_OF[part]}"

    def _trained(self, part: str) -> str:
        return str(self.home / part / "student.safetensors")

    def _train(self, part: str) -> bool:
        """One leg of a part; whether it is done."""
        from unspool.train.loop import Trainer

        recipe = self._recipe(part)
        if self.config.max_minutes is not None:
            left = self.config.max_minutes - (time.monotonic() - self._began) / 60
            if left <= 0.1:
                return False
            recipe = replace(recipe, train=replace(recipe.train, max_minutes=left))
        trainer = Trainer(recipe, self.home / part, name=self._name(part))
        return trainer.run().is_done

    def _weights(self, part: str, prefix: str) -> dict[str, Any]:
        from unspool.train.export import read_weights

        tensors = read_weights(self._trained(part))
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def _is_made(self, part: str) -> bool:
        if part == "models":
            return False
        is_made = self._notes().get(part, {"made": False}).get("made", True) and self._made_by(part).is_file()
        if is_made and part == "latents":
            self._check_latents()
            return self._num_latents() >= self.config.clips  # those of a smaller set are kept, and more are made
        return is_made

    def _num_latents(self) -> int:
        from unspool.data.shard_format import read_index

        return len(read_index(self.home / "latents"))

    def _check_latents(self) -> None:
        """Raise ValueError for clips of another stage than this command says, which the models would state."""
        from unspool.data.shard_format import read_header
        from unspool.data.stage import StageClips

        folder = self.home / "latents"
        got, expected = json.loads(read_header(folder)[0].source), StageClips(self.config.stage).describe()
        if got != json.loads(json.dumps(expected)):
            raise ValueError(
                f"{folder} holds clips of {got}; expected {expected}, as latents.* say; give the latents.* that it was "
                "made with, or another --out"
            )

    def _made_by(self, part: str) -> Path:
        """The file with which a part ends."""
        if part in ("codec", "text"):
            return self.home / f"{part}.safetensors"
        return self.home / part / HEADER if part == "latents" else Path(self._trained(part))

    def _notes(self) -> dict[str, Any]:
        path = self.home / "parts.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _note(self, part: str, seconds: float, is_made: bool) -> None:
        """Whether a part is made, and the minutes of all its legs."""
        from unspool.data.shard_format import replace_text

        notes = self._notes()
        before = notes.get(part, {}).get("minutes", 0.0)
        taken = {"taken": self.config.parts.name} if self.config.parts and part in ("codec", "text") else {}
        notes[part] = {"made": is_made, "minutes": round(before + seconds / 60, 1), **taken}
        self.home.mkdir(parents=True, exist_ok=True)
        replace_text(self.home / "parts.json", json.dumps(notes, indent=1) + "\n")

    def _provenance(self, role: str) -> dict[str, Any]:
        from unspool.config import to_dict
        from unspool.recipes.stage_folder import machine

        minutes = {part: note.get("minutes") for part, note in self._notes().items()}
        taken = {part: note["taken"] for part, note in self._notes().items() if "taken" in note}
        return {
            "recipe": self._name(role), **({"taken": taken} if taken else {}), "clips": self._num_latents(),
            "stage": to_dict(self.config.stage), "minutes": minutes, **machine(),
            "config": to_dict(self._recipe(role)),
        }  # fmt: skip


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
