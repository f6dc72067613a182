"""What does the past do for quality? Ca2-VDM's tables 3 and 4 on a reduced stage: one sprite, a small network.

    python bench/ca2vdm_quality.py --out runs/ca2vdm-quality          all arms; run again to continue
    python bench/ca2vdm_quality.py --arms pmax25,os_ext25             some of them
    python bench/ca2vdm_quality.py --table --plot quality.png         what is there so far
    python bench/ca2vdm_quality.py network.dim=64 short:train.steps=500 long:train.batch=8

Needs codec and text encoder of the 64 px stage in `--stage`. All arms have chunks of 8 latent frames (2 s) and the same
number of steps on the same clips of 57; those with causal and those with bidirectional time begin with one training on
short clips each. They differ in how long the past is, whether the spatial attention reads it too, and whether it is
cached or computed anew in every forward (OS-Fix, OS-Ext; time is bidirectional). "_anew" arms are the weights of
another arm, the last Pmax frames encoded again for each chunk: what the cache remembers of frames that it no longer
holds.

Sprites bounce or orbit, so that no chunk is right by standing still; but where they go follows from the last seconds,
so a longer past can cost here and hardly gain. Each arm makes 81 latent frames from nothing for every test prompt: the
first one, then ten chunks. The stage's scorer judges 2 s at a time; these begin one pixel frame before the chunk. The
truth is rendered, without the codec. Intervals are those of prompts, not of trainings. Last line of the output: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arms import Trainings
from unspool.causal.chunks import ChunkPlan
from unspool.causal.visibility import Window
from unspool.config import to_dict
from unspool.data.encoding import encode_source, load_file_or_name
from unspool.data.shard_format import replace_text
from unspool.data.stage import StageClips
from unspool.data.worlds.stage import StageConfig
from unspool.diffusion.iddpm import IDDPM
from unspool.engine.load import load
from unspool.engine.pipeline import Pipeline
from unspool.evaluate.protocol import ClipProtocol, StageProtocol, StreamProtocol
from unspool.evaluate.report import summarise
from unspool.evaluate.runner import Arm as Tested
from unspool.evaluate.runner import mark, plain, scorer_mark
from unspool.evaluate.stage import STUDENT, TRUTH, Evaluation
from unspool.evaluate.stats import Interval, paired_difference
from unspool.methods.clean_prefix import CleanPrefixConfig
from unspool.models.stdit.config import STDiTConfig
from unspool.recipes.ca2vdm import PREFIX, PrefixStageRecipe, small_stdit
from unspool.recipes.stage import train_config
from unspool.train.config import TrainConfig

CHUNK, CLIP, SHORT = 8, 57, 9
"""Latent frames of a chunk, of a clip (the first, Pmax 41 and a chunk, and one chunk more, so that every arm sees full
windows without the first), of a short clip."""
STAGE = StageConfig(sprites=(1.0,), events=(1.0,), motions=("bounces", "orbits"))
PREFIX_NOISE = 0.03
CHUNKS, SEGMENT_S = 10, 2.0
BASE = "pmax25"
METRICS = ("adherence", "strict", "psnr", "motion_over_truth")
PAIRED = ("adherence", "strict", "psnr")
HEADS = {"adherence": "adherence", "strict": "all right", "psnr": "manifold dB", "motion_over_truth": "motion / truth"}
PAPER = {
    "pmax25": "274.8 / 244.5 / 275.1", "pmax25_prefix": "257.4 / 216.5 / 238.5", "pmax41": "187.3 / 209.3 / 263.2",
    "pmax41_prefix": "185.0 / 202.9 / 240.5",
    "os_fix": "table 3, chunks 2 to 6 against its first: 182.9 to 315.1, Ca2-VDM 160.6 to 304.7",
}  # fmt: skip
"""FVD, lower is better, of three times 16 frames of SkyTimelapse (arXiv:2411.16375 table 4), or of MSR-VTT at chunks of
16 (table 3); of all this only the order compares."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`about` for the table; a past of `pmax` latent frames; `prefix`-enhanced attention; `is_open`: time is
    bidirectional and the past computed anew; `of`: the weights of that arm, its past computed anew by the causal rule;
    `against`: the arm that it is compared with.
    """

    about: str
    pmax: int = 25
    prefix: bool = False
    is_open: bool = False
    of: str = ""
    against: str = BASE

    @property
    def short(self) -> str:
        """The training on short clips with which it begins: in these no past is cut off, whatever Pmax. The prefix
        joins an attention that is there, so it adds no weights."""
        return f"short-{'open' if self.is_open else 'causal'}"

    @property
    def evicts(self) -> int:
        """Index of the first chunk whose past lacks the first latent frame."""
        return 1 + (self.pmax - 1) // CHUNK

    def method(self) -> CleanPrefixConfig:
        window = self.pmax + CHUNK
        return CleanPrefixConfig(
            plan=ChunkPlan(chunk=CHUNK, first=1), circle=None if self.is_open else window, bidirectional=self.is_open,
            visibility=Window(window=window, within="full" if self.is_open else "causal"),
            prefix_noise=PREFIX_NOISE, prefix_frames=PREFIX if self.prefix else None, drop_text=0.1,
            process=IDDPM(predicts="velocity"), makes_first=True,
        )  # fmt: skip

    def network(self) -> STDiTConfig:
        """2 M parameters."""
        return replace(small_stdit(prefix=self.prefix), dim=128, num_layers=6, num_heads=2)


ARMS: dict[str, Arm] = {
    "pmax25": Arm(about="Ca2-VDM, Pmax 25", against=""),
    "os_fix": Arm(about="OS-Fix, a past of 8", pmax=CHUNK, is_open=True),
    "os_ext25": Arm(about="OS-Ext, a past of up to 25", is_open=True),
    "pmax25_prefix": Arm(about="Ca2-VDM, Pmax 25, prefix-enhanced", prefix=True),
    "pmax25_anew": Arm(about="Pmax 25, the same weights without a cache", of="pmax25"),
    "pmax41": Arm(about="Ca2-VDM, Pmax 41", pmax=41),
    "pmax41_prefix": Arm(about="Ca2-VDM, Pmax 41, prefix-enhanced", pmax=41, prefix=True, against="pmax41"),
    "os_ext41": Arm(about="OS-Ext, a past of up to 41", pmax=41, is_open=True, against="pmax41"),
    "pmax41_anew": Arm(about="Pmax 41, the same weights without a cache", pmax=41, of="pmax41", against="pmax41"),
    "os_ext25_prefix": Arm(
        about="OS-Ext, up to 25, prefix-enhanced", is_open=True, prefix=True, against="os_ext25"
    ),
}  # fmt: skip

Found = dict[str, Any]
"""What `scores` gives: `chunks` and `truth`, each a list of metric -> value; `prompts`: metric -> prompt -> chunk."""


class Quality:
    """Makes what is missing of an arm, in order: data, short clips, training, scores."""

    def __init__(
        self, out: Path, stage: Path, seed: int, overrides: list[str], *, clips: int, steps: int, guidance: float
    ) -> None:
        self.out, self.stage, self.steps, self.guidance = out, stage, steps, guidance
        self.home = out / f"seed-{seed}"
        self.clips, self.codec = clips, stage / "codec.safetensors"
        self.latents = out / f"latents-{clips}"  # their path is in the recipes: another number is another training
        self.trainings = Trainings(self.home, seed, overrides)

    def data(self) -> None:
        codec = load_file_or_name(str(self.codec), {"Taehv": "unspool.models.taehv:Taehv"})
        clips = StageClips(STAGE, frames=1 + 4 * (CLIP - 1))
        encode_source(clips, codec, self.latents, fps=16.0, limit=self.clips, batch=4, bf16=True)

    def recipe(self, arm: Arm, frames: int, train: TrainConfig) -> PrefixStageRecipe:
        return PrefixStageRecipe(
            network=arm.network(), method=arm.method(), text=str(self.stage / "text.safetensors"),
            data=str(self.latents), frames=frames, train=train,
        )  # fmt: skip

    def short(self, arm: Arm) -> Path:
        """Short clips first, where a step shows the most of them. Shared: their window is the default arm's."""
        like = replace(arm, pmax=25, prefix=False)
        return self.trainings.run(arm.short, "short", self.recipe(like, SHORT, train(steps=4000, batch=32, lr=1e-3)))

    def pipeline(self, name: str) -> Pipeline:
        """The model of an arm."""
        arm = ARMS[name]
        if arm.of:
            model = self.pipeline(arm.of)
            return model.with_settings(replace(model.spec.rollout, commit="recompute"))
        recipe = self.recipe(arm, CLIP, train(steps=1500, batch=12, lr=7e-4))
        start = self.short(arm) / "student.safetensors"
        recipe = replace(recipe, start=str(start), codec=str(self.codec))
        return load(self.trainings.run(name, "long", recipe, last="model/model.json") / "model")

    def file(self, name: str, prompts: int) -> Path:
        return self.home / "scores" / f"{name}-{prompts}-{self.steps}-{self.guidance:g}.json"

    def scores(self, name: str, prompts: int) -> Found:
        """What the arm makes of the test prompts, chunk by chunk; kept beside its weights."""
        config = StageProtocol(
            stage=STAGE, clips=ClipProtocol(prompts=2, held_out=0, sprites=(1.0,), unconditional=0),
            streams=StreamProtocol(prompts=prompts, seconds=CHUNKS * SEGMENT_S, segment_s=SEGMENT_S),
        )  # fmt: skip
        tested = Tested(name=name, pipeline=self.pipeline(name), steps=self.steps, guidance=self.guidance)
        facts = (tested.pipeline.weights, to_dict(tested.settings), to_dict(config), scorer_mark())
        kept, made_of = self.file(name, prompts), mark(*facts)
        if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8"))).get("made_of") == made_of:
            return found
        evaluation = Evaluation(config, tested, folder=self.out / "evaluation")
        with torch.autocast("cpu", torch.bfloat16, enabled=not torch.cuda.is_available()):
            results = evaluation.run(("streams",))
        streams, own = summarise(evaluation, results).streams, results.streams[STUDENT]
        values = {
            metric: [[plain(one.get(f"{metric}.{k}", math.nan)) for k in range(CHUNKS)] for one in own.values]
            for metric in PAIRED
        }
        rows = {
            row: [{m: plain(group[m].value) if m in group else None for m in METRICS} for group in streams[of]]
            for row, of in (("chunks", STUDENT), ("truth", TRUTH))
        }
        found = {"made_of": made_of, **rows, "prompts": values}
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps(found) + "\n")
        return found


def train(*, steps: int, batch: int, lr: float) -> TrainConfig:
    """As the stage's recipes of Ca2-VDM."""
    return train_config(
        steps=steps, batch=batch, lr=lr, muon_lr=1.5 * lr, decay=0.999, curve="wsd", compile=True,
        keep_adamw=("final_layer", "t_block"),
    )  # fmt: skip


# ---- what came of it -----------------------------------------------------------------------------------------------

Rows = dict[str, dict[int, Found]]
"""Arm -> seed -> what was found."""


def by_chunk(rows: dict[int, Found], metric: str, row: str = "chunks") -> list[float]:
    """Means over seeds, chunk by chunk; NaN where nothing could be judged."""
    values = [[chunk.get(metric) for chunk in found[row]] for found in rows.values()]
    return np.array(values, np.float64).mean(0).tolist()


def values_of(found: Found, metric: str) -> np.ndarray:
    """[prompt, chunk], NaN where nothing could be judged."""
    return np.array(found["prompts"][metric], np.float64)


def differences(results: Rows, name: str) -> dict[str, Interval]:
    """Of every paired metric the last chunk minus the first ("<metric>_last"), and the arm minus the one it is compared
    with, same seeds, over the chunks from the first eviction of either on ("<metric>_against"): prompts are drawn
    again, whole over all seeds."""
    out, arm = {}, ARMS[name]
    own, other = results[name], results.get(arm.against, {})
    both = [seed for seed in own if seed in other]
    for metric in PAIRED:
        ends, clusters = _stacked(own, list(own), metric)
        out[f"{metric}_last"] = paired_difference(ends[:, -1], ends[:, 0], clusters)
        if not both:
            continue
        first = min(arm.evicts, ARMS[arm.against].evicts)
        (a, clusters), (b, _) = (_stacked(rows, both, metric) for rows in (own, other))
        known = (a - b)[:, first:]  # NaN but for chunks that both show
        with np.errstate(invalid="ignore"):
            mean = np.nansum(known, 1) / (~np.isnan(known)).sum(1)
        out[f"{metric}_against"] = paired_difference(mean, np.zeros_like(mean), clusters)
    return out


def _stacked(rows: dict[int, Found], seeds: list[int], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [seed prompt, chunk] and the prompt of each row."""
    values = [values_of(rows[seed], metric) for seed in seeds]
    return np.concatenate(values), np.concatenate([np.arange(len(one)) for one in values])


def table(results: Rows) -> str:
    """Markdown: means over chunks and what was compared, then every chunk."""
    ends = [f"{HEADS[m]}, {what}" for what in ("last - first", "against") for m in ("adherence", "psnr")]
    head = ["arm", "seeds", *(HEADS[m] for m in METRICS), *ends, "FVD of the paper (table 4)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, rows in results.items():
        differ = differences(results, name)
        cells = [f"{np.nanmean(by_chunk(rows, m)):.3g}" for m in METRICS]
        for what in ("last", "against"):
            cells += [_words(differ.get(f"{m}_{what}")) for m in ("adherence", "psnr")]
        about = ARMS[name].about + (f" (against {ARMS[name].against})" if ARMS[name].against else "")
        lines.append(f"| {about} | {len(rows)} | {' | '.join(cells)} | {PAPER.get(name, '')} |")
    for metric in METRICS:
        lines += ["", f"| {HEADS[metric]} by chunk | {' | '.join(str(k + 1) for k in range(CHUNKS))} |"]
        lines.append("|---" * (CHUNKS + 1) + "|")
        shown = {ARMS[name].about: by_chunk(rows, metric) for name, rows in results.items()}
        if results:
            shown["the truth"] = by_chunk(next(iter(results.values())), metric, "truth")
        lines += [f"| {about} | {' | '.join(f'{v:.3g}' for v in values)} |" for about, values in shown.items()]
    return "\n".join(lines)


def _words(value: Interval | None) -> str:
    return "" if value is None else f"{value.value:+.3g} [{value.low:.3g}, {value.high:.3g}]"


def plot(results: Rows, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    shown = {"adherence": (0, 1), "psnr": (25, 35), "motion_over_truth": (0, 1.6)}
    for axes, (metric, limits) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        for name, rows in results.items():
            style = ":" if ARMS[name].of else "--" if ARMS[name].is_open else "-"
            label = ARMS[name].about if metric == "psnr" else None
            axes.plot(range(1, CHUNKS + 1), by_chunk(rows, metric), style, label=label)
        axes.set_xlabel("chunk")
        axes.set_ylabel(HEADS[metric])
        axes.set_ylim(*limits)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def collect(args: argparse.Namespace, names: list[str]) -> Rows:
    """The scores of all arms, made where they are missing; with `--table` only what is there."""
    results: Rows = {name: {} for name in names}
    for seed in range(args.seeds):
        quality = Quality(args.out, args.stage, seed, args.overrides, clips=args.clips, steps=args.steps,
                          guidance=args.guidance)  # fmt: skip
        if not args.table:
            quality.data()
        for name in names:
            kept = quality.file(name, args.prompts)
            if args.table and not kept.is_file():
                continue
            found = json.loads(kept.read_text(encoding="utf-8")) if args.table else quality.scores(name, args.prompts)
            results[name][seed] = found
            words = [f"{chunk[m]:.3g}" if chunk[m] is not None else "-" for m in ("adherence", "psnr")
                     for chunk in (found["chunks"][0], found["chunks"][-1])]  # fmt: skip
            print(f"seed {seed}, {name}: adherence {words[0]} in the first chunk and {words[1]} in the last, "
                  f"manifold {words[2]} and {words[3]} dB", flush=True)  # fmt: skip
    return {name: rows for name, rows in results.items() if rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ca2vdm-quality"))
    parser.add_argument("--stage", type=Path, default=Path("runs/stage-64"), help="folder of codec and text encoder")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", default=",".join(ARMS), help="names, separated by commas")
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25, help="steps of ancestral sampling; the paper takes 100")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--table", action="store_true", help="show what is there and make nothing")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*", help="a.b=c for all trainings, or short:, long: before it")
    args = parser.parse_args()
    names = args.arms.split(",")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        parser.error(f"--arms {unknown[0]}: expected some of {', '.join(ARMS)}")
    results = collect(args, names)
    text = table(results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if args.plot is not None:
        plot(results, args.plot)
    facts = {
        name: {
            "seeds": list(rows), "chunks": {m: [plain(v) for v in by_chunk(rows, m)] for m in METRICS},
            "differences": {k: [plain(x) for x in (v.value, v.low, v.high)]
                            for k, v in differences(results, name).items()},
            "made_of": [found["made_of"] for found in rows.values()],
        }
        for name, rows in results.items()
    }  # fmt: skip
    setting = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"setting": setting, "torch": str(torch.__version__), "results": facts}))


if __name__ == "__main__":
    main()
