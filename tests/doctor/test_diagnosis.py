"""What is said of a cluster: versions, clocks, bandwidth."""

from __future__ import annotations

import pytest

from megatrain.doctor import diagnosis
from megatrain.doctor.diagnosis import CLUSTER, Speeds
from megatrain.doctor.finding import Finding
from megatrain.doctor.node import Report
from megatrain.errors import DONE, GAVE_UP

FAST = Speeds(ring=20.0, pairs=(18.0, 22.0), slow_ranks=(), slow_links=())


def report(host: str, **versions: str) -> Report:
    return Report(host, (Finding("disk", "10 GB"),), {"torch": "2.13.0", **versions})


def test_nodes_that_differ_from_most_are_named() -> None:
    reports = [report(f"node-{i}", driver="550.90.07") for i in range(3)]
    assert diagnosis.same_versions(reports)[1] == Finding("versions", "3 nodes, torch 2.13.0, driver 550.90.07")
    reports[1] = report("node-1", driver="535.183.01")
    reports[2] = report("node-2")
    assert diagnosis.same_versions(reports)[1].problem == (
        "node-1 has driver 535.183.01, most have 550.90.07; node-2 has driver none, most have 550.90.07"
    )


def test_clocks_that_are_off_are_named() -> None:
    _, found = diagnosis.clocks({"node-1": 0.002, "node-2": -3.5}, most=1.0)
    assert found.value == "at most 3500.0 ms apart"
    assert found.problem == "the clock of node-2 is -3.500 s off"
    assert diagnosis.clocks({"node-1": 0.002, "node-2": -0.9}, most=1.0)[1].problem is None


@pytest.mark.parametrize(
    ("speeds", "least", "expected"),
    [
        (FAST, None, [None, None]),
        (FAST, 10.0, [None, None]),
        (
            FAST,
            19.0,
            ["the slowest pair reaches 18 GB/s, less than bandwidth_gigabytes=19", None],
        ),
        (
            FAST,
            21.0,
            [
                "the slowest pair reaches 18 GB/s, less than bandwidth_gigabytes=21",
                "all-reduce over all ranks reaches 20 GB/s, less than bandwidth_gigabytes=21",
            ],
        ),
        (
            Speeds(3.0, (2.0, 22.0), ("rank 8 (node-1)",), ("rank 0 (node-0) and rank 16 (node-2)",)),
            None,
            [
                "rank 8 (node-1) is slow with all others; "
                "the link between rank 0 (node-0) and rank 16 (node-2) is slow",
                None,
            ],
        ),
    ],
)
def test_bandwidth(speeds: Speeds, least: float | None, expected: list[str | None]) -> None:
    assert [finding.problem for _, finding in diagnosis.network(speeds, least)] == expected


def test_the_table_has_every_row_and_a_line_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    rows = diagnosis.of_nodes([report("node-0"), report("node-1")])
    assert diagnosis.show(rows) == DONE
    shown = capsys.readouterr().out
    assert [shown.count(word) for word in ("node-0", "node-1", "disk", "not well")] == [1, 1, 2, 0]
    assert diagnosis.show([*rows, (CLUSTER, Finding("clocks", "far apart", "the clock of node-1 is off"))]) == GAVE_UP
    assert capsys.readouterr().out.splitlines()[-1] == "not well: all nodes: the clock of node-1 is off"
