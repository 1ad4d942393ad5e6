"""What all nodes' reports and measurements say together, and the table that shows it. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatrain.doctor.finding import Finding
from megatrain.doctor.node import Report
from megatrain.errors import DONE, GAVE_UP

CLUSTER = "all nodes"
Row = tuple[str, Finding]
"""A host, or CLUSTER, and what was found there."""


@dataclass(frozen=True)
class Speeds:
    """What was measured between ranks. slow_ranks, slow_links: named. ring: GB/s. pairs: lowest and highest GB/s."""

    ring: float
    pairs: tuple[float, float]
    slow_ranks: tuple[str, ...]
    slow_links: tuple[str, ...]


def of_nodes(reports: Sequence[Report]) -> list[Row]:
    """Every finding of every node."""
    return [(report.host, finding) for report in reports for finding in report.findings]


def same_versions(reports: Sequence[Report]) -> Row:
    """Whether all nodes have the same software and GPUs; named are those that differ from most."""
    problems = []
    for name in sorted({name for report in reports for name in report.versions}):
        have = {report.host: report.versions.get(name, "none") for report in reports}
        usual, _ = Counter(have.values()).most_common(1)[0]
        problems += [f"{host} has {name} {it}, most have {usual}" for host, it in have.items() if it != usual]
    shown = ", ".join(
        f"{name} {reports[0].versions[name]}" for name in ("torch", "driver") if name in reports[0].versions
    )
    return CLUSTER, Finding("versions", f"{len(reports)} nodes, {shown}", "; ".join(problems) or None)


def clocks(offsets: Mapping[str, float], most: float) -> Row:
    """offsets: seconds that each host's clock is ahead of the first node's."""
    off = [f"the clock of {host} is {offset:+.3f} s off" for host, offset in offsets.items() if abs(offset) > most]
    farthest = max(map(abs, offsets.values()))
    return CLUSTER, Finding("clocks", f"at most {farthest * 1000:.1f} ms apart", "; ".join(off) or None)


def network(speeds: Speeds, least: float | None) -> list[Row]:
    """least: GB/s that pairs and ring have to reach; None: only who is slower than the others is a problem."""
    low, high = speeds.pairs
    problems = [f"{name} is slow with all others" for name in speeds.slow_ranks]
    problems += [f"the link between {name} is slow" for name in speeds.slow_links]
    if least is not None and low < least and not problems:
        problems.append(f"the slowest pair reaches {low:.3g} GB/s, less than bandwidth_gigabytes={least:g}")
    ring = None
    if least is not None and speeds.ring < least:
        ring = f"all-reduce over all ranks reaches {speeds.ring:.3g} GB/s, less than bandwidth_gigabytes={least:g}"
    return [
        (CLUSTER, Finding("pairs of ranks", f"{low:.3g} to {high:.3g} GB/s", "; ".join(problems) or None)),
        (CLUSTER, Finding("all ranks", f"{speeds.ring:.3g} GB/s", ring)),
    ]


def show(rows: Sequence[Row]) -> int:
    """Prints the table, and a line for each problem; the exit code."""
    table = Table("node", "check", "found", "well")
    for host, finding in rows:
        verdict = Text("yes") if finding.problem is None else Text("no", style="red")
        table.add_row(Text(host), Text(finding.check), Text(finding.value, overflow="fold"), verdict)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table, soft_wrap=False)
    problems = [f"{host}: {finding.problem}" for host, finding in rows if finding.problem is not None]
    for problem in problems:
        console.print(f"not well: {problem}", style="red")
    return GAVE_UP if problems else DONE
