"""`python -m unspool`: the command line, for `torchrun -m unspool train ...`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from unspool.cli.main import main

    sys.exit(main())
