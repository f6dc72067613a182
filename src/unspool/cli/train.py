"""`unspool train`: run a recipe, continue it, or say what it would cost."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from unspool.train.recipe import Named


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train what a recipe describes. The same command continues a run that was stopped, killed or interrupted.

    Ctrl-C and SIGTERM save a checkpoint and end with exit code 0. Under torchrun the same recipe runs on all processes:
    torchrun --nproc-per-node 8 -m unspool train RECIPE
    """

    recipe: tyro.conf.Positional[str] = ""
    """Name of a recipe (--list shows them), or module:function of your own that returns a Recipe."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Changes as a.b=c, such as train.steps=2000 train.optim.lr=1e-4."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the run; by default runs/RECIPE."""
    resume: str = "auto"
    """auto: continue what is in --out; never: refuse to; else a run or a checkpoint to continue."""
    init_from: Path | None = None
    """Weights to begin with: a .safetensors file, or a run (its average)."""
    dry_run: bool = False
    """Print sizes, memory, FLOPs and time to the end; train and write nothing."""
    list: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the recipes and leave."""
    quiet: bool = False
    """Show no progress."""


def run(args: Args) -> int:
    """Train, or list, or tell the cost; 0 also when a signal or the clock ended the leg with a checkpoint."""
    from unspool.recipes import RECIPES
    from unspool.train.recipe import load_recipe

    if args.list:
        _print_list(RECIPES)
        return 0
    if not args.recipe:
        raise ValueError(f"no recipe given; expected module:function or one of: {', '.join(RECIPES) or 'none yet'}")
    if ":" in args.recipe and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own module
    named = load_recipe(args.recipe, RECIPES, args.overrides)
    return _dry_run(named) if args.dry_run else _train(named, args)


def _train(named: Named, args: Args) -> int:
    from unspool.train.loop import Trainer
    from unspool.train.recipe import LegOver

    out = args.out or Path("runs") / re.sub(r"[^\w.-]+", "-", named.name)
    try:
        trainer = Trainer(
            named.recipe, out, name=named.name, resume=args.resume, init_from=args.init_from, show=not args.quiet
        )
    except LegOver as over:
        print(f"run         {out}\nended       {over}\ncontinue    run the same command again")
        return 0
    try:
        start = trainer.step
        outcome = trainer.run()
        if trainer.world.is_main:
            print(f"run         {out}")
            print(f"steps       {outcome.step} of {named.recipe.train.steps} ({outcome.step - start} now)")
            print(f"ended       {outcome.reason}")
            print(f"checkpoint  {outcome.checkpoint}")
            if not outcome.is_done:
                print("continue    run the same command again")
    finally:
        trainer.world.close()
    return 0


def _dry_run(named: Named) -> int:
    from unspool.train.dryrun import estimate

    print(estimate(named).text())
    return 0


def _print_list(recipes: dict[str, str]) -> None:
    import inspect

    from unspool.config import locate

    width = max(map(len, recipes), default=0)
    for name in recipes:
        text = inspect.getdoc(locate(name, recipes)) or ""
        print(f"{name:<{width}}  {text.splitlines()[0] if text else ''}")
    if not recipes:
        print("no recipes; give module:function of your own")
