"""Every engine in every layout and precision against one process: how far they are apart, and what law 4 allows.

    python -m benchmarks.parity [--only "zero3 pp2 bf16"] [--json FILE]

Design choices:
- The rows are those of tests/distributed/matrix.py, which `make test-parity` asserts; here they are printed as a table.
- A row that raises is a row that doesn't hold, with the last line of what it said.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from benchmarks.common import Bar, Result, main
from tests.distributed import matrix
from tests.distributed.matrix import ROWS, Row
from tests.distributed.pool import Pool


def measure(arguments: argparse.Namespace) -> Result:
    """A line for each row; the bar is that law 4 holds in all of them."""
    torch.set_num_threads(1)
    words = set(arguments.only.split())
    pool = Pool()
    lines = []
    for row in ROWS:
        if words <= set(str(row).split()):
            lines.append(_line(pool, row))
            # A whole run takes an hour on two cores.
            print(*lines[-1].values(), file=sys.stderr, flush=True)
    pool.close()
    held = sum(line["holds"] == "yes" for line in lines)
    return Result(lines, [Bar("share of rows that hold", held / len(lines), 1.0)])


def _line(pool: Pool, row: Row) -> dict[str, str | float]:
    began = time.perf_counter()
    layout = matrix.LAYOUTS[row.layout]
    options = {
        layout.model: layout.model != "plain",
        "skip": layout.skip,
        "recompute": layout.recompute,
    }
    try:
        found = matrix.measure(pool, row)
        figures = {"difference": f"{found.difference:.1e}", "allowed": f"{found.allowed:.1e}"}
        holds = "yes" if found.holds else "no"
    except AssertionError as error:
        figures = {"difference": str(error).strip().splitlines()[-1], "allowed": ""}
        holds = "no"
    return {
        "engine": row.engine,
        "layout": row.layout,
        "precision": row.precision.value,
        "options": " ".join(name for name, on in options.items() if on),
        **figures,
        "holds": holds,
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    sys.exit(main("Layouts against one process, 20 steps", measure, only=""))
