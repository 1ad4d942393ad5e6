"""Who plays whom, who is blamed, and what real ranks over gloo measure when one of them is slow."""

from __future__ import annotations

import time
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatrain.doctor import network
from megatrain.doctor.network import ROUNDS, Pair, Place, slow, tournament
from tests.distributed.command import Command
from tests.distributed.pool import Pool

RANKS = 4


@given(st.integers(2, 40))
def test_a_tournament_pairs_everybody_with_as_many_as_there_are_rounds(count: int) -> None:
    rounds = tournament(range(count))
    pairs = [pair for each in rounds for pair in each]
    assert len(pairs) == len(set(pairs))
    for each in rounds:
        players = [player for pair in each for player in pair]
        assert len(players) == len(set(players)) == count - count % 2
    if count <= ROUNDS:
        assert sorted(pairs) == list(combinations(range(count), 2))


def test_ranks_play_on_their_node_or_on_their_rail() -> None:
    assert Place(rank=2, ranks=4, local_ranks=4).players == [0, 1, 2, 3]
    assert Place(rank=6, ranks=12, local_ranks=4).players == [2, 6, 10]


def speeds(ranks: int, slow_ranks: set[int], slow_links: set[Pair]) -> dict[Pair, float]:
    return {
        pair: 5.0 if pair in slow_links or {*pair} & slow_ranks else 20.0 + pair[0]
        for each in tournament(range(ranks))
        for pair in each
    }


@given(st.integers(5, 32), st.data())
def test_a_slow_rank_is_named_and_a_slow_link(ranks: int, data: st.DataObject) -> None:
    one = data.draw(st.integers(0, ranks - 1))
    others = [pair for pair in speeds(ranks, set(), set()) if one not in pair]
    link = data.draw(st.sampled_from(others))
    assert slow(speeds(ranks, set(), set())) == ([], [])
    assert slow(speeds(ranks, {one}, set())) == ([one], [])
    assert slow(speeds(ranks, {one}, {link})) == ([one], [link])


def test_of_two_nobody_can_be_blamed() -> None:
    assert slow({(0, 1): 0.001}) == ([], [])


def measure(slow_rank: int, seconds: float, ahead: float) -> tuple[dict[Pair, float], float, dict[int, float]]:
    """On each rank: one of them comes to everything later, and each clock is `ahead` of the one before."""
    place = Place(dist.get_rank(), dist.get_world_size(), local_ranks=RANKS)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("batch_isend_irecv", "all_reduce") if place.rank == slow_rank else ():
            patch.setattr(dist, name, delayed(getattr(dist, name), seconds))
        pairs = network.measure_pairs(place, 0.1, torch.device("cpu"))
        ring = network.measure_ring(place, 0.1, torch.device("cpu"))
    by_cpu = dist.new_group(backend="gloo")
    nodes = Place(place.rank, place.ranks, local_ranks=2)
    return pairs, ring, network.clock_offset(nodes, by_cpu, lambda: time.time() + ahead * place.rank)


def delayed(function: Any, seconds: float) -> Any:
    def later(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **named)

    return later


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_real_ranks_measure_and_the_slow_one_is_named(pool: Pool) -> None:
    answers = pool.run(measure, RANKS, timeout=120, slow_rank=2, seconds=0.1, ahead=3.0)
    measured = {pair: speed for pairs, *_ in answers for pair, speed in pairs.items()}
    assert sorted(measured) == list(combinations(range(RANKS), 2))
    assert slow(measured)[0] == [2]  # On a busy machine a link may be slow too.
    # 0.1 MB in 0.1 s at best.
    assert all(0 < ring <= 0.0001 / 0.1 * 2 * (RANKS - 1) / RANKS for _, ring, _ in answers)
    assert answers[0][2] == {2: pytest.approx(6.0, abs=0.2)}
    assert [each[2] for each in answers[1:]] == [{}] * (RANKS - 1)


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_command_on_two_nodes(tmp_path: Any) -> None:
    """Two launchers that meet, as on two nodes."""
    port = 29000 + time.time_ns() % 2000
    keys = ["megabytes=1", f"path={tmp_path}", "launch.processes=2", "launch.nodes=2"]
    arguments = ["-m", "megatrain", "doctor", *keys, f"launch.rendezvous=127.0.0.1:{port}"]
    with Command(arguments, tmp_path) as first, Command(arguments, tmp_path) as second:
        ended = [each.wait(240) for each in (first, second)]
    assert [each.stderr for each in ended] == ["", ""]
    said = "".join(each.stdout for each in ended)
    for check in ("disk", "host memory", "versions", "clocks", "pairs of ranks", "all ranks"):
        assert f" {check} " in said
    # On a busy machine a pair may be slow; nothing else may be wrong, and both ends agree.
    wrong = [line for line in said.splitlines() if line.startswith("not well") and "slow" not in line]
    assert wrong == []
    assert [each.code for each in ended] == [3 if "not well" in said else 0] * 2
