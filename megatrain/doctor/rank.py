"""What every rank of `megatrain doctor` runs: measures, tells rank 0 over the CPU store, ends with the common code."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from megatrain import device
from megatrain.command_config import DoctorConfig
from megatrain.compose import compose
from megatrain.doctor import diagnosis, network
from megatrain.doctor.diagnosis import Row, Speeds
from megatrain.doctor.network import Pair, Place
from megatrain.doctor.node import Report, examine
from megatrain.errors import GAVE_UP
from megatrain.resilience.parent import die_with_launcher

SECONDS = 180.0
"""How long a rank waits for another one."""


def main(arguments: Sequence[str]) -> int:
    """A rank's life: 0 where all is well, 3 where something isn't."""
    die_with_launcher()
    config: DoctorConfig = compose("doctor", arguments)
    try:
        code = _diagnose(config)
        device.finish()
    except (dist.DistError, RuntimeError) as error:
        rank, line = os.environ["RANK"], " ".join(str(error).split())
        print(f"megatrain doctor: rank {rank} ({socket.gethostname()}) can't reach the others: {line}", file=sys.stderr)
        return GAVE_UP
    return code


def _diagnose(config: DoctorConfig) -> int:
    where = device.start(SECONDS)
    place = Place(dist.get_rank(), dist.get_world_size(), device.ranks_of_this_node())
    leader = place.rank % place.local_ranks == 0
    report = examine(config) if leader else None
    by_cpu = dist.new_group(backend="gloo")
    offsets = network.clock_offset(place, by_cpu)
    pairs = network.measure_pairs(place, config.megabytes, where)
    ring = network.measure_ring(place, config.megabytes, where)
    store: Store = _get_default_store()
    told = {
        "host": socket.gethostname(),
        "report": report and report.plain(),
        "pairs": [[*pair, speed] for pair, speed in pairs.items()],
        "ring": ring,
    }
    store.set(f"doctor/{place.rank}", json.dumps(told))
    if place.rank == 0:
        everyone = [json.loads(store.get(f"doctor/{rank}")) for rank in range(place.ranks)]
        store.set("doctor/code", str(diagnosis.show(_rows(config, place, everyone, offsets))))
    return int(store.get("doctor/code"))


def _rows(config: DoctorConfig, place: Place, everyone: list[dict[str, Any]], offsets: dict[int, float]) -> list[Row]:
    hosts = [str(each["host"]) for each in everyone]
    reports = [Report.of(each["report"]) for each in everyone if each["report"]]
    rows = diagnosis.of_nodes(reports)
    if len(reports) > 1:
        rows.append(diagnosis.same_versions(reports))
        off = {hosts[leader]: offset for leader, offset in offsets.items()}
        rows.append(diagnosis.clocks(off, config.clock_skew_seconds))
    return rows + diagnosis.network(_speeds(place, everyone, hosts), config.bandwidth_gigabytes)


def _speeds(place: Place, everyone: list[dict[str, Any]], hosts: list[str]) -> Speeds:
    """Who is slow is found among those that played together: of one node, or of one rail."""
    names = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
    speeds: dict[Pair, float] = {}
    for each in everyone:
        for a, b, speed in each["pairs"]:
            speeds[a, b] = min(speed, speeds.get((a, b), speed))
    ranks: list[str] = []
    links: list[str] = []
    rails = 1 if place.ranks == place.local_ranks else place.local_ranks
    for rail in range(rails):
        players = Place(rail, place.ranks, place.local_ranks).players
        slow, between = network.slow({pair: speed for pair, speed in speeds.items() if pair[0] in players})
        ranks += [names[rank] for rank in slow]
        links += [f"{names[a]} and {names[b]}" for a, b in between]
    rings = [float(each["ring"]) for each in everyone]
    return Speeds(min(rings), (min(speeds.values()), max(speeds.values())), tuple(ranks), tuple(links))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: native threads sometimes abort the interpreter's teardown.
    os._exit(code)
