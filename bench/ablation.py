"""Which part of the distillation does what? The papers' ablations on a reduced stage: one sprite, a small network.

    python bench/ablation.py --out runs/ablation --seeds 3            all arms; run again to continue
    python bench/ablation.py --out runs/ablation --arms ode,full      some of them
    python bench/ablation.py --out runs/ablation --table              what is there so far
    python bench/ablation.py --table --results docs/ablation.json     adds it to what other runs found, and shows all

Needs codec and text encoder of the 64 px stage (`unspool stage-model --until text`). Base networks are made once per
seed: a bidirectional one, then as many steps more of it with bidirectional and with causal time. Arms of a seed start
from the same causal network and are judged on the same prompts and noise, in streams whose window is as long as the
clips of their training (which saw no eviction); they differ in what their line says. Two differences follow from the
methods: paths are sampled for the first `--paths` clips only (consistency sees all), and an arm without first few-step
weights has had their training steps less, as in the paper. Seed 0 also gives a picture of some arms on the same prompts
and noise. Arms may be made by several runs at once, with one thread each (OMP_NUM_THREADS=1), where none of them makes
what another one needs.
Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arms import Trainings
from unspool.config import to_dict
from unspool.data.encoding import encode_source, load_file_or_name
from unspool.data.stage import StageClips
from unspool.data.worlds.stage import StageConfig
from unspool.evaluate.protocol import ClipProtocol, StageProtocol, StreamProtocol
from unspool.evaluate.runner import mark, scorer_mark
from unspool.evaluate.sheet import Sample, beside
from unspool.methods.consistency import ConsistencyConfig
from unspool.methods.dmd import DmdConfig
from unspool.methods.ode_regression import OdeRegressionConfig
from unspool.methods.on_policy import OnPolicyConfig
from unspool.methods.samples import NoisedDataConfig, StepList
from unspool.methods.scores import ScoreConfig, ScoreLevels
from unspool.models.wan.config import WanConfig
from unspool.recipes.stage import network, student_64, teacher_64, train_config
from unspool.recipes.stage_distil import ConsistencyRecipe, DmdRecipe, OdeRecipe
from unspool.recipes.stage_folder import GUIDANCE, SHIFT, Kind, usual_rollout, write_folder
from unspool.recipes.stage_parts import ShortClips, chunks
from unspool.recipes.stage_paths import PathsConfig, write_stage_paths

FRAMES, LATENTS, SIZE = 33, 9, (8, 8)
PICTURE, SHOWN = ("teacher", "causal", "ode", "consistency", "full", "rollout"), 6
STAGE = StageConfig(sprites=(1.0,), events=(1.0,))
LISTS = {1: (1000.0,), 2: (1000.0, 500.0), 4: (1000.0, 750.0, 500.0, 250.0),
         8: (1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)}  # fmt: skip
PAPER = {
    "teacher": "94.6 / 62.7 / 29.6", "causal": "92.4 / 60.1 / 28.5",
    "no_init": "93.4 / 60.6 / 29.4", "ode": "92.9 / 48.1 / 25.3",
    "causal_teacher": "91.9 / 61.7 / 28.2", "full": "94.7 / 64.4 / 30.1",
}  # fmt: skip
"""CausVid's Table 4 (temporal / frame / text quality): another model, data and metric; only the order compares."""


@dataclass(frozen=True)
class Arm:
    """`about` what it changes; `steps` of the student; the rest says how it is made."""

    about: str
    steps: int = 4
    init: str = "ode"
    loss: str = "noised"
    teacher: str = "bidirectional"


ARMS: dict[str, Arm] = {
    "teacher": Arm("bidirectional, 24 steps with guidance", 24, "", ""),
    "causal": Arm("causal, teacher forcing, 24 steps with guidance", 24, "", ""),
    "causal_few": Arm("the same causal weights in 4 steps without guidance", init="", loss=""),
    "ode": Arm("ODE regression alone", init="ode", loss=""),
    "consistency": Arm("causal consistency alone", init="consistency", loss=""),
    "no_init": Arm("DMD on noised data, no few-step init", init=""),
    "full": Arm("CausVid: ODE init, DMD on noised data, the score of the bidirectional network"),
    "causal_teacher": Arm("as full, the score of the causal network", teacher="causal"),
    "rollout": Arm("Self-Forcing: ODE init, DMD on rollouts", loss="rollout"),
    "consistency_rollout": Arm("consistency init, DMD on rollouts", init="consistency", loss="rollout"),
    "shipped": Arm(
        "consistency init, DMD on rollouts, the score of the causal network",
        init="consistency",
        loss="rollout",
        teacher="causal",
    ),
    "rollout_kv": Arm("as rollout, gradients through K/V writing", loss="rollout_kv"),
    "rollout_1": Arm("as rollout, 1 step", steps=1, loss="rollout"),
    "rollout_2": Arm("as rollout, 2 steps", steps=2, loss="rollout"),
    "rollout_8": Arm("as rollout, 8 steps", steps=8, loss="rollout"),
}


class Ablation:
    """Makes what is missing of an arm, in order: data, teacher, causal network, paths, init, distillation, scores."""

    def __init__(self, out: Path, stage: Path, seed: int, overrides: list[str], paths: int = 1000) -> None:
        self.out, self.stage, self.count = out, stage, paths
        self.home = out / f"seed-{seed}"
        self.latents, self.text = out / "latents", stage / "text.safetensors"
        self.trainings = Trainings(self.home, seed, overrides)

    def data(self, clips: int) -> None:
        codec = load_file_or_name(str(self.stage / "codec.safetensors"), {"Taehv": "unspool.models.taehv:Taehv"})
        source = StageClips(STAGE, frames=FRAMES)
        encode_source(source, codec, self.latents, fps=16.0, limit=clips, batch=32, bf16=True)

    def trained(self, name: str, part: str, recipe: Any) -> Path:
        """Weights of a training, run where it is not finished."""
        return self.trainings.run(name, part, replace(recipe, text=str(self.text), codec="")) / "student.safetensors"

    def small(self) -> WanConfig:
        return network(dim=128, layers=6, heads=2)

    def base(self) -> Path:
        recipe = replace(teacher_64(), network=self.small(), data=str(self.latents), short=ShortClips())
        return self.trained("base", "base", replace(recipe, train=replace(recipe.train, steps=3000)))

    def teacher(self) -> Path:
        """As many steps more as the causal network, so that the two differ in nothing else."""
        recipe = replace(
            teacher_64(), network=self.small(), data=str(self.latents), short=ShortClips(), start=str(self.base())
        )
        return self.trained("teacher", "base", replace(recipe, train=replace(student_64().train, steps=1500)))

    def causal(self) -> Path:
        recipe = replace(student_64(), network=self.small(), data=str(self.latents), short=ShortClips(),
                         start=str(self.base()))  # fmt: skip
        return self.trained("causal", "base", replace(recipe, train=replace(recipe.train, steps=1500)))

    def paths(self) -> Path:
        """Paths with the states of the longest list of steps, which has the levels of the others."""
        folder = self.home / "paths"
        config = PathsConfig(
            weights=str(self.teacher()), data=str(self.latents), text=str(self.text), network=self.small(),
            steps=StepList(steps=LISTS[8], shift=SHIFT), count=self.count,
        )  # fmt: skip
        write_stage_paths(config, folder)
        return folder

    def init(self, arm: Arm) -> Path:
        if arm.init == "consistency":
            recipe = ConsistencyRecipe(
                network=self.small(), text="", data=str(self.latents), start=str(self.causal()),
                method=ConsistencyConfig(
                    grid=24, shift=SHIFT, guidance_from_uncond=GUIDANCE, plan=chunks(), decay=0.95
                ),
                train=train_config(steps=800, batch=32, lr=5e-4, muon_lr=1e-3, decay=0.99, curve="wsd", compile=True),
            )  # fmt: skip
            return self.trained("consistency", "init", recipe)
        if arm.init == "ode":
            steps = StepList(steps=LISTS[8], shift=SHIFT)  # the levels of all lists, so that one training serves all
            ode = OdeRecipe(
                network=self.small(), text="", data=str(self.paths()), start=str(self.causal()), steps=steps,
                method=OdeRegressionConfig(steps=steps, plan=chunks()),
                train=train_config(steps=800, batch=32, lr=5e-4, muon_lr=1e-3, decay=0.99, curve="wsd", compile=True),
            )  # fmt: skip
            return self.trained("ode", "init", ode)
        return self.causal()

    def file(self, name: str, arm: Arm) -> Path:
        """Where the weights of an arm are, made or not."""
        return self.home / (name if arm.loss or name == "teacher" else arm.init or "causal") / "student.safetensors"

    def weights(self, name: str, arm: Arm) -> Path:
        """The weights of an arm, which are made where they are missing."""
        if name in ("teacher", "causal"):
            return getattr(self, name)()
        if not arm.loss:
            return self.init(arm)
        steps = StepList(steps=LISTS[arm.steps], shift=SHIFT)
        sample: OnPolicyConfig | NoisedDataConfig = NoisedDataConfig(steps=steps, plan=chunks())
        if arm.loss != "noised":
            sample = OnPolicyConfig(
                steps=steps, plan=chunks(), frames=LATENTS, latent_size=SIZE, through_kv=arm.loss == "rollout_kv"
            )
        score = ScoreConfig(guidance_from_uncond=GUIDANCE)
        if arm.teacher == "causal":
            score = replace(score, reads="clean_past", plan=chunks())
        train = train_config(steps=600, batch=32, lr=2e-4, muon_lr=4e-4, decay=0.99, curve="wsd", compile=True)
        recipe = DmdRecipe(
            network=self.small(), text="", data=str(self.latents), start=str(self.init(arm)), steps=steps,
            teacher=str(self.causal() if arm.teacher == "causal" else self.teacher()),
            method=DmdConfig(
                sample=sample, levels=ScoreLevels(shift=SHIFT), teacher=score, ratio=5,
                critic=replace(score, guidance_from_uncond=1.0),
            ),
            train=replace(train, critic=replace(train.optim, lr=4e-4, muon_lr=8e-4)),
        )  # fmt: skip
        return self.trained(name, "dmd", recipe)

    def scores(self, name: str, arm: Arm, prompts: int, streams: int) -> dict[str, Any]:
        """What the arm makes of the test prompts, kept beside its weights."""
        from unspool.engine.load import load
        from unspool.evaluate.report import summarise
        from unspool.evaluate.runner import Arm as Tested
        from unspool.evaluate.stage import Evaluation
        from unspool.weights.read import read_checkpoint

        config = protocol(prompts, streams)
        weights = self.weights(name, arm)
        assert weights == self.file(name, arm)
        made_of = scored_by(weights, arm, prompts, streams)
        kept = self.home / "scores" / f"{name}-{prompts}-{streams}.json"
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if found.get("made_of") == made_of and ("adherence_10x" in found) == ("still_10x" in found):
            return found
        few = None if arm.steps > 8 else StepList(steps=LISTS[arm.steps], shift=SHIFT)
        folder = self.home / "models" / name
        kind: Kind = "bidirectional" if name == "teacher" else "causal"
        write_folder(
            folder, kind=kind, size_px=64, network=self.small(),
            weights=read_checkpoint(weights).tensors, codec=self.stage / "codec.safetensors", text=self.text,
            rollout=usual_rollout(kind, few=few, window=LATENTS),
        )  # fmt: skip
        tested = Tested(name="student", pipeline=load(folder), steps=None if few else arm.steps)
        evaluation = Evaluation(config, tested, folder=self.home / "evaluation" / name)
        parts = ("clips", "streams") if streams and name != "teacher" else ("clips",)
        with torch.autocast("cpu", torch.bfloat16, enabled=not torch.cuda.is_available()):
            summary = summarise(evaluation, evaluation.run(parts))
        self.keep_samples(name, evaluation.samples(SHOWN))
        clips = summary.clips["test"]["student"]["all"]
        found = {"made_of": made_of, **{m: clips[m].value for m in ("adherence", "strict", "psnr", "permanence")}}
        found["motion"] = clips["motion_over_truth"].value
        if summary.streams:
            ends = summary.streams["student"]
            found |= {f"{m}_10x": ends[-1][m].value for m in ("adherence", "strict", "psnr")}
            found["motion_10x"] = ends[-1]["motion_over_truth"].value
            found["still_10x"] = summary.streams["frozen"][-1]["adherence"].value
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return found

    def keep_samples(self, name: str, samples: list[Sample]) -> None:
        file = self.home / "scores" / f"{name}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        words = json.dumps([{"caption": s.caption, "values": s.values} for s in samples])
        np.savez_compressed(file, frames=np.stack([s.frames for s in samples]), words=words)

    def samples(self, name: str) -> list[Sample]:
        """What `scores` kept of an arm; nothing before it ran."""
        file = self.home / "scores" / f"{name}.npz"
        if not file.is_file():
            return []
        with np.load(file) as kept:
            rows = json.loads(str(kept["words"]))
            return [
                Sample(name, row["caption"], own, row["values"]) for own, row in zip(kept["frames"], rows, strict=True)
            ]


def protocol(prompts: int, streams: int) -> StageProtocol:
    return StageProtocol(
        stage=STAGE, batch=32,
        clips=ClipProtocol(prompts=prompts, held_out=0, sprites=(1.0,), frames=FRAMES, unconditional=0),
        streams=StreamProtocol(prompts=max(streams, 1), seconds=20.0, segment_s=5.0),
    )  # fmt: skip


def scored_by(weights: Path, arm: Arm, prompts: int, streams: int) -> str:
    """What scores are of: weights, steps, scorer and streams. Those of anything else are never shown beside them."""
    digest, told = hashlib.sha256(weights.read_bytes()).hexdigest(), to_dict(protocol(prompts, streams))
    return mark(digest, LATENTS, arm.steps, scorer_mark(), told["streams"] if streams else {})


def picture(ablation: Ablation, path: Path) -> None:
    """The arms of PICTURE that are there, under each other."""
    found = [samples for name in PICTURE if (samples := ablation.samples(name))]
    if found:
        beside(list(zip(*found, strict=True))).save(path)


COLUMNS = {
    "adherence": "adherence", "strict": "all right", "psnr": "manifold dB", "permanence": "permanence",
    "motion": "motion / truth", "adherence_10x": "adherence at 10x", "strict_10x": "all right at 10x",
    "psnr_10x": "manifold dB at 10x", "motion_10x": "motion / truth at 10x",
}  # fmt: skip


def found_scores(out: Path, setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Seed -> arm -> scores of all that `out` holds for as many prompts and streams, by the present protocol."""
    rows: dict[str, dict[str, Any]] = {}
    prompts, streams = setting["prompts"], setting["streams"]
    for file in sorted(out.glob(f"seed-*/scores/*-{prompts}-{streams}.json")):
        seed, name = file.parts[-3].removeprefix("seed-"), file.name.split("-")[0]
        row = json.loads(file.read_text(encoding="utf-8"))
        weights = Ablation(out, Path(), int(seed), []).file(name, ARMS[name])
        if weights.is_file() and row["made_of"] != scored_by(weights, ARMS[name], prompts, streams):
            print(f"seed {seed}, {name}: scored by an earlier protocol or of other weights, left out; run it again")
            continue
        rows.setdefault(seed, {})[name] = row
    return rows


def merge(path: Path | None, setting: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`rows` and those of the file, which is then written. Raises ValueError where its setting is another."""
    if path is None:
        return rows
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["setting"] != setting:
            raise ValueError(f"{path} is of {before['setting']}, got {setting}: give another --results")
        for seed, own in before["seeds"].items():
            rows[seed] = {**own, **rows.get(seed, {})}
    path.write_text(json.dumps({"setting": setting, "seeds": rows}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return rows


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean over seeds, and the smallest and largest where there are several."""
    lines = [f"| arm | {' | '.join(COLUMNS.values())} | seeds | CausVid |", "|---|" + "---|" * (len(COLUMNS) + 2)]
    for name, rows in results.items():
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in rows if row.get(column) is not None]
            digits = 1 if column.startswith("psnr") else 2
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.{digits}f}{spread}" if values else "")
        lines.append(f"| {ARMS[name].about} | {' | '.join(cells)} | {len(rows)} | {PAPER.get(name, '')} |")
    still = [row["still_10x"] for rows in results.values() for row in rows if "still_10x" in row]
    if still:
        cells = [f"{still[0]:.2f}" if column == "adherence_10x" else "" for column in COLUMNS]
        lines.append(f"| the truth, standing still | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--stage", type=Path, default=Path("runs/stage-64"), help="folder of codec and text encoder")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--arms", default=",".join(ARMS), help="names, separated by commas")
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--paths", type=int, default=1000, help="paths of the teacher for ODE regression")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--streams", type=int, default=16, help="streams of 20 s, ten times the training length")
    parser.add_argument("--table", action="store_true", help="show what is there and make nothing")
    parser.add_argument(
        "--results", type=Path, help="JSON to which the scores are added, and from which others are read"
    )
    parser.add_argument("overrides", nargs="*", help="a.b=c for all trainings, or base:, init:, dmd: before it")
    args = parser.parse_args()
    names = args.arms.split(",")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        parser.error(f"--arms {unknown[0]}: expected some of {', '.join(ARMS)}")
    if not args.table:
        for seed in range(args.first, args.first + args.seeds):
            ablation = Ablation(args.out, args.stage, seed, args.overrides, args.paths)
            ablation.data(args.clips)
            for name in names:
                print(
                    f"seed {seed}, {name}: {ablation.scores(name, ARMS[name], args.prompts, args.streams)}", flush=True
                )
    setting = {name: getattr(args, name) for name in ("clips", "paths", "prompts", "streams", "overrides")}
    setting |= {"motions": list(StreamProtocol().motions), "scorer": scorer_mark()}  # of the streams
    rows = merge(args.results, setting, found_scores(args.out, setting))
    results = {
        name: own for name in names if (own := [rows[seed][name] for seed in sorted(rows) if name in rows[seed]])
    }
    picture(Ablation(args.out, args.stage, 0, args.overrides), args.out / "arms.png")
    text = table(results)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(json.dumps({"setting": setting, "torch": str(torch.__version__), "results": results}))


if __name__ == "__main__":
    main()
