"""`unspool <command>`: find the command, let tyro fill its `Args`, run it, turn user errors into one line.

Nothing of a command is imported before it is chosen, so help and mistakes answer at once and without torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("unspool.cli.demo:run", "make a 20 s video with two changes of prompt, and say how fast that was"),
    "generate": ("unspool.cli.generate:run", "make a video of a prompt, or of several after each other"),
    "stream": ("unspool.cli.stream:run", "stream in the terminal or to a file; type a prompt to change what comes"),
    "replay": ("unspool.cli.replay:run", "make a video again from its metadata and compare the frames"),
    "models": ("unspool.cli.models:run", "list the models that can be loaded by name"),
    "train": ("unspool.cli.train:run", "train or continue a recipe, with a.b=c changes"),
    "stage-model": ("unspool.cli.stage_model:run", "train the shipped model from nothing, in legs"),
    "evaluate": ("unspool.cli.evaluate:run", "measure a stage model against the exact scorer"),
    "encode": ("unspool.cli.encode:run", "encode a folder of videos to latents, once and for all trainings"),
    "data": ("unspool.cli.data:run", "look at training data and at what the scorer says about it"),
    "convert": ("unspool.cli.convert:run", "turn a published checkpoint into safetensors with a metadata header"),
    "exactness": ("unspool.cli.exactness:run", "print how exactly streaming agrees with its references"),
    "doctor": ("unspool.cli.doctor:run", "check this installation: versions, devices, compiler, known conflicts"),
}
"""Command -> ("module:function", one line of help). The module also holds `Args`, the dataclass that tyro fills."""

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: its own, 2 for a user error, 130 for Ctrl-C.

    Bad options and `unspool <command> --help` end in SystemExit, as with argparse. The environment variable
    UNSPOOL_DEBUG=1 shows the traceback of a user error instead of one line.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text(), file=sys.stdout if args else sys.stderr)
        return 0 if args else USER_ERROR
    if args[0] == "--version":
        import unspool

        print(unspool.__version__)
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        from unspool.config import nearest

        return _fail(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        print("unspool: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("UNSPOOL_DEBUG"):
            raise
        return _fail(_one_line(error))


def help_text() -> str:
    """What `unspool --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: unspool <command> [options]",
            "",
            "Streaming autoregressive video diffusion.",
            "",
            "commands:",
            *lines,
            "",
            "unspool <command> --help lists its options; unspool --version prints the version.",
        ]
    )


def _run(name: str, rest: Sequence[str]) -> int:
    import tyro

    from unspool.log import setup_console

    module_name, _, function = COMMANDS[name][0].partition(":")
    module = importlib.import_module(module_name)
    args = tyro.cli(module.Args, prog=f"unspool {name}", args=list(rest))
    setup_console()
    return int(getattr(module, function)(args))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> int:
    print(f"unspool: error: {message}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
