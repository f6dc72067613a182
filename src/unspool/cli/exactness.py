"""`unspool exactness`: prove on this machine that streaming equals the masked forward, and print the table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Args:
    """Compare cached streaming with one masked forward, and with recorded tensors of the published networks."""

    golden: str | None = None
    """Folder of recorded tensors; default: the environment variable UNSPOOL_GOLDEN, then tests/golden, else none."""
    markdown: str | None = None
    """Also write the table between the markers of this Markdown file (docs/exactness.md)."""


BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def run(args: Args) -> int:
    from unspool.evaluate.exactness import all_rows
    from unspool.evaluate.golden import missing

    carried = "tests/golden" if Path("tests/golden").is_dir() else None
    chosen = args.golden or os.environ.get("UNSPOOL_GOLDEN") or carried
    if args.golden is not None and not Path(args.golden).is_dir():
        raise FileNotFoundError(f"--golden {args.golden}: no such folder; give the folder of the recorded tensors")
    target = None if args.markdown is None else Path(args.markdown)
    if target is not None and (not target.exists() or BEGIN not in target.read_text() or END not in target.read_text()):
        raise ValueError(f"--markdown {target}: expected a file with the lines {BEGIN} and {END}")
    absent = missing(Path(chosen)) if chosen else ["all of them: set UNSPOOL_GOLDEN or --golden"]
    if target is not None and absent:
        raise ValueError(f"--markdown {target}: a table without recorded tensors would look complete; not found in "
                         f"{chosen or 'any folder'}: {', '.join(absent)}")  # fmt: skip
    lines, failed, count, section = [], 0, 0, ""
    for name, row in all_rows(Path(chosen) if chosen else None):
        if name != section:
            section = name
            print(f"\n{section}")
            lines += ["", f"**{section}**", "", "| comparison | precision | largest difference | bound | |",
                      "|---|---|---|---|---|"]  # fmt: skip
        verdict = ("noticed" if row.control else "ok") if row.ok else "FAILED"
        sign = ">" if row.control else "<="
        print(f"  {row.what:<58} {row.dtype}  {row.value:9.2e} {sign} {row.bound:7.0e}  {verdict}", flush=True)
        lines.append(f"| {row.what} | {row.dtype} | {row.value:.1e} | {sign} {row.bound:.0e} | {verdict} |")
        failed += not row.ok
        count += 1
    print(f"\n{count - failed} passed, {failed} failed")
    if absent:
        print(f"published networks: cases left out, for want of recorded tensors: {', '.join(absent)}")
    if target is not None:
        head, rest = target.read_text().split(BEGIN, 1)
        target.write_text(head + BEGIN + "\n" + "\n".join(lines).strip() + "\n\n" + END + rest.split(END, 1)[1])
        print(f"table written to {target}")
    return 1 if failed else 0
