"""`unspool evaluate stage`: measure a model of the Sprite Stage and print the table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from unspool.evaluate.runner import Arm
    from unspool.evaluate.stage import Evaluation

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
SAMPLES, BESIDE = 30, 8


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure how a model follows its prompts, with 95 % intervals, beside rows that need no model.

    Reference rows: the truth (the scorer's ceiling), the codec's copy of it, a frozen first frame, shuffled frames, the
    truth under another prompt (chance). Run again with the same --out it continues where it was interrupted, and
    measures only what changed.

    Try `unspool evaluate stage --model stage --preset smoke --out out/evaluation`, then without --preset smoke.
    """

    world: tyro.conf.Positional[Literal["stage"]]
    """What the model was trained on: the Sprite Stage."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Changes of the preset as a.b=c, such as clips.prompts=64 streams.seconds=250 stage.sprites=1."""
    model: str = "stage"
    """Model to measure: a shipped one, or a folder."""
    teacher: str | None = None
    """Its bidirectional teacher, measured on the same prompts and noise."""
    many_step: str | None = None
    """The many-step causal network that a few-step model was distilled from: clips and diversity on the same noise."""
    preset: Literal["smoke", "standard", "full"] = "standard"
    """smoke: does it run; standard: the numbers of a model card; full: for a GPU."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out/evaluation")
    """Folder for results, tables, curves, samples, and what is needed to continue."""
    parts: tuple[Literal["clips", "switches", "streams", "spread"], ...] = ("clips", "switches", "streams", "spread")
    """What to measure: clips under one prompt, changes of prompt, long streams, diversity under one prompt."""
    sheet: bool = False
    """Also write the first 30 samples, good and bad, with captions and verdicts (samples.png, samples.mp4), and the
    first 8 of all models under each other (beside.png)."""
    steps: int | None = None
    """Denoising steps of the model; its own if not given."""
    guidance: float | None = None
    """Guidance of the model; its own if not given."""
    teacher_steps: int | None = None
    """Denoising steps of the teacher; its own if not given."""
    teacher_guidance: float | None = None
    """Guidance of the teacher; its own if not given."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number type; float32 on a CPU and the files' own elsewhere if not given."""
    compile: bool = False
    """Compile the networks first, which takes a minute or two and needs a C++ compiler."""
    workers: int = 1
    """Processes that score while nothing is generated: as many as there are free cores."""
    markdown: Path | None = None
    """Also write the tables between the markers of this Markdown file (README.md, a model card)."""
    quiet: bool = False
    """Show no progress."""


def run(args: Args) -> int:
    """Measure, write, print; every refusal comes before the first clip is made."""
    _check(args)
    from unspool.evaluate.protocol import protocol

    config = protocol(args.preset, args.overrides)
    args.out.mkdir(parents=True, exist_ok=True)

    from unspool.evaluate import report
    from unspool.evaluate.runner import Progress
    from unspool.evaluate.stage import Evaluation

    cost = report.Cost()
    student = _arm("student", args.model, args.steps, args.guidance, args)
    teacher = None
    if args.teacher is not None:
        teacher = _arm("teacher", args.teacher, args.teacher_steps, args.teacher_guidance, args)
        if teacher.pipeline.spec.is_causal:
            raise ValueError(
                f"--teacher {args.teacher}: a causal model; expected a bidirectional one (causal: --many-step)"
            )
    many = None
    if args.many_step is not None:
        many = _arm("many-step", args.many_step, None, None, args)
        if not many.pipeline.spec.is_causal:
            raise ValueError(f"--many-step {args.many_step}: a bidirectional model; that is what --teacher is for")
    evaluation = Evaluation(
        config, student, teacher, many, folder=args.out, workers=args.workers, progress=Progress(quiet=args.quiet)
    )
    results = evaluation.run(args.parts)
    summary = report.summarise(evaluation, results)
    facts = report.results_of(evaluation, results, summary, cost)
    written = report.write(args.out, facts, summary)
    if args.sheet:
        written += _samples(evaluation, args.out)
    text = report.markdown(summary, facts)
    if args.markdown is not None:
        _insert(args.markdown, text)
        written.append(args.markdown)
    print(text)
    print(f"took {facts['cost']['seconds']:.0f} s, processor over wall time {facts['cost']['cpu_over_wall']:.2f}")
    print("written: " + ", ".join(map(str, written)))
    return 0


def _check(args: Args) -> None:
    """Refuse what cannot work before anything slow is imported."""
    if not args.parts:
        raise ValueError("--parts: expected some of clips, switches, streams and spread")
    if not 1 <= args.workers <= 256:
        raise ValueError(f"--workers {args.workers}: expected 1 to 256")
    if args.teacher is None and (args.teacher_steps is not None or args.teacher_guidance is not None):
        raise ValueError("--teacher-steps and --teacher-guidance have no effect without --teacher; give its folder")
    existing = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--out {args.out}: cannot write into {existing}; expected a folder that can be written")
    if args.markdown is not None:
        text = args.markdown.read_text(encoding="utf-8") if args.markdown.is_file() else ""
        if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
            raise ValueError(f"--markdown {args.markdown}: expected a file with the lines {BEGIN} and {END}")


def _arm(name: str, model: str, steps: int | None, guidance: float | None, args: Args) -> Arm:
    from unspool.engine.load import load
    from unspool.evaluate.runner import Arm

    pipeline = load(model, device=args.device, dtype=args.dtype, compile=args.compile)
    return Arm(name=name, pipeline=pipeline, steps=steps, guidance=guidance)


def _samples(evaluation: Evaluation, folder: Path) -> list[Path]:
    from dataclasses import replace

    from unspool.engine.export import write_video
    from unspool.engine.files import replacing
    from unspool.evaluate.sheet import beside, sheet, wall

    samples = evaluation.samples(SAMPLES)
    still, film, compared = (folder / name for name in ("samples.png", "samples.mp4", "beside.png"))
    with replacing(still) as file:
        sheet(samples).save(file, format="PNG")
    write_video(film, wall(samples), evaluation.form.fps, metadata={"command": "evaluate stage"})
    if len(evaluation.arms) == 1:
        return [still, film]
    arms = [[replace(s, title=arm.name) for s in evaluation.samples(BESIDE, arm)] for arm in evaluation.arms]
    with replacing(compared) as file:
        beside(list(zip(*arms, strict=True))).save(file, format="PNG")
    return [still, film, compared]


def _insert(target: Path, text: str) -> None:
    """Put `text` between the markers of a file."""
    from unspool.engine.files import replacing

    head, rest = target.read_text(encoding="utf-8").split(BEGIN, 1)
    content = head + BEGIN + "\n" + text.strip() + "\n\n" + END + rest.split(END, 1)[1]
    with replacing(target) as file:
        file.write_text(content, encoding="utf-8")
