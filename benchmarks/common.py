"""What all benchmarks share: how a contender is timed, the table, the JSON file, the exit code.

    python -m benchmarks.NAME [--rounds N] [--json FILE] ...

Design choices:
- Contenders take turns, round by round, so that a slow minute of a shared machine hits all of them; what is reported
  is the median over rounds, with the lowest and the highest.
- CPU seconds of this process, all its threads included: other load on the machine counts less than in wall time.
- A bar is a promise with a number. Exit code 0: all hold; 1: one doesn't. The figures are printed either way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from megatrain import device
from megatrain.errors import BUG, DONE
from megatrain.observe.events import versions
from megatrain.resilience.files import write_whole

Row = Mapping[str, str | int | float]
Contender = Callable[[], float]
"""Does the work once and returns how fast it was."""


@dataclass(frozen=True)
class Bar:
    """What has to hold: value >= target."""

    name: str
    value: float
    target: float

    @property
    def holds(self) -> bool:
        return self.value >= self.target


@dataclass(frozen=True)
class Result:
    """The rows of the table, all with the same keys, and the bars."""

    rows: Sequence[Row]
    bars: Sequence[Bar]


def rate(amount: Callable[[], float]) -> float:
    """What `amount` returns, by CPU second that it took."""
    before = time.process_time()
    done = amount()
    return done / (time.process_time() - before)


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """The rates of each contender, one a round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            rates[name].append(contender())
    return rates


def row(name: str, rates: Sequence[float], base: Sequence[float], unit: str) -> Row:
    """A row: the median rate, the lowest, the highest, and the median over that of `base`."""
    median = statistics.median(rates)
    return {
        "contender": name,
        unit: round(median, 3),
        "lowest": round(min(rates), 3),
        "highest": round(max(rates), 3),
        "ratio": round(median / statistics.median(base), 3),
    }


def main(
    description: str,
    measure: Callable[[argparse.Namespace], Result],
    argv: Sequence[str] | None = None,
    **options: bool | int | str,
) -> int:
    """Measures and reports; the exit code. `options` are further options and their defaults, of whose type they are;
    False: a switch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    for name, default in options.items():
        how: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=" ", **how)
    arguments = parser.parse_args(argv)
    load = os.getloadavg()[0]
    result = measure(arguments)
    show(description, result)
    if arguments.json:
        write_whole(arguments.json, json.dumps(as_json(result, load), indent=1).encode())
    return DONE if all(bar.holds for bar in result.bars) else BUG


def show(description: str, result: Result) -> None:
    """Prints the table and the bars."""
    console = Console(highlight=False)
    table = Table(*result.rows[0], title=description, title_justify="left")
    for each in result.rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int | float) else value for value in each.values()))
    console.print(table)
    for bar in result.bars:
        verdict = "holds" if bar.holds else "DOESN'T HOLD"
        console.print(f"{bar.name}: {bar.value:.3g}, at least {bar.target:g} is asked for: {verdict}", soft_wrap=True)


def as_json(result: Result, load: float) -> dict[str, object]:
    """The object of --json. load: running processes of the machine when the benchmark began."""
    return {
        "machine": {**machine(), "load_at_start": round(load, 2)},
        "versions": versions(),
        "rows": [dict(each) for each in result.rows],
        "bars": [{**asdict(bar), "holds": bar.holds} for bar in result.bars],
    }


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": device.count(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
