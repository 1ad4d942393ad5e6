"""What is read of torch's flight recorder: of real ranks over gloo, and of entries such as NCCL's."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatrain.config import ParallelConfig
from megatrain.parallel import mesh as meshes
from megatrain.parallel.flight_recorder import UNKNOWN, FlightRecorder, Group, read
from megatrain.resilience.collectives import GroupRecord, Operation, explain
from tests.distributed.pool import Pool

RANKS, LATE = 4, 2


def all_but_one_enter() -> tuple[tuple[GroupRecord, ...], dict[str, Any]]:
    """A collective of the data-parallel groups, which rank LATE enters only when the records were read."""
    mesh = meshes.build(ParallelConfig(tensor=2), num_kv_heads=4)
    recorder = FlightRecorder(pipeline=False)
    store = dist.distributed_c10d._get_default_store()
    part, whole = torch.ones(3, 5), torch.empty(6, 5)
    dist.all_reduce(part, group=mesh.data_group)
    dist.all_reduce(part)
    work = None
    if dist.get_rank() != LATE:
        work = dist.all_gather_into_tensor(whole, part, group=mesh.data_group, async_op=True)
    if dist.get_rank() not in (LATE, LATE - 2):  # Their group has met.
        while any(record.waiting for record in recorder.records()):
            time.sleep(0.01)
    records, trace = recorder.records(), pickle.loads(recorder.trace())
    if store.add("read", 1) == dist.get_world_size():
        store.set("all have read", "")
    store.wait(["all have read"])
    if work is None:
        work = dist.all_gather_into_tensor(whole, part, group=mesh.data_group, async_op=True)
    work.wait()
    assert FlightRecorder(pipeline=True).records() == (), "gloo doesn't show who waits to receive"
    return records, trace


def test_a_collective_that_a_rank_has_not_entered(pool: Pool) -> None:
    results = pool.run(all_but_one_enter, ranks=RANKS)
    records = {rank: {record.kind: record for record in said if record.kind} for rank, (said, _) in enumerate(results)}
    waiting = {rank: said["data-parallel"] for rank, said in records.items()}
    name = waiting[0].name
    assert waiting[0] == GroupRecord(name, 0, "data-parallel", 2, 2, Operation("all_gather", 2, 15))
    assert waiting[LATE] == replace(waiting[0], entered=1, waiting=None)
    assert all((waiting[rank].entered, waiting[rank].waiting) == (2, None) for rank in (1, 3))
    assert {kind: record.size for kind, record in records[0].items()} == {
        "data-parallel": 2,
        "tensor-parallel": 2,
        "model-parallel": 2,
    }
    found = explain({rank: said for rank, (said, _) in enumerate(results)})
    assert found is not None
    assert found.absent == (LATE,)
    assert found.stands[0].members == (0, LATE)


def test_a_trace_has_the_calling_lines_and_the_groups_ranks(pool: Pool) -> None:
    trace = pool.run(all_but_one_enter, ranks=RANKS)[0][1]
    entry = trace["entries"][-1]
    assert entry["profiling_name"] == "gloo:all_gather"
    assert not entry["retired"]
    lines = {(frame["name"], Path(frame["filename"]).name) for frame in entry["frames"]}
    assert ("all_but_one_enter", "test_flight_recorder.py") in lines
    assert trace["pg_config"]["0"] == {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"}
    assert trace["pg_config"][entry["process_group"][0]]["ranks"] == f"[0, {LATE}]"


GROUPS = {"3": Group("mesh_pp", [1, 5, 9])}


def entry(
    name: str, number: int = 0, over: bool = False, p2p: bool = False, state: str = "scheduled"
) -> dict[str, Any]:
    """Of a group of NCCL's, with an input of six elements."""
    return {
        "process_group": ["3", "mesh_pp"],
        "profiling_name": f"nccl:{name}",
        "collective_seq_id": number,
        "is_p2p": p2p,
        "retired": over,
        "state": state,
        "input_sizes": [[2, 3]],
    }


def record(entered: int, waiting: Operation | None) -> tuple[GroupRecord, ...]:
    return (GroupRecord("3", 1, "pipeline", 3, entered, waiting),)


def test_the_oldest_that_is_not_over_is_waited_in() -> None:
    queue = [entry("all_reduce", 1, over=True), entry("broadcast", 2), entry("all_reduce", 3)]
    assert read(queue, GROUPS) == record(3, Operation("broadcast", 2, 6))


def test_of_several_groups_the_oldest_is_told() -> None:
    groups = {"4": Group("mesh_dp", [1, 2]), **GROUPS}
    dp = {"process_group": ["4", "mesh_dp"]}
    queue = [entry("all_reduce", 1) | dp, entry("all_reduce", 7), entry("all_reduce", 1, over=True) | dp]
    queue.append(entry("all_gather", 2) | dp)
    data, pipeline = read(queue, groups)
    assert data.waiting == Operation("all_gather", 2, 6, oldest=False)
    assert pipeline.waiting == Operation("all_reduce", 7, 6, oldest=True)


def test_what_the_device_has_finished_is_over_before_the_host_has_noticed() -> None:
    assert read([entry("all_reduce", 1, state="completed")], GROUPS) == record(1, None)


def test_a_batch_that_is_over_is_over_whole() -> None:
    """The sends and receives in it are never marked, the batch is."""
    batch = [entry("send 1->2", p2p=True), entry("recv 1<-2", p2p=True), entry("coalesced", over=True, p2p=True)]
    assert read(batch, GROUPS) == record(0, None)
    assert read([*batch, *batch[1:2]], GROUPS) == record(0, Operation("recv", 0, 6, peer=9))


def test_a_batch_of_which_no_part_is_left_has_an_unknown_peer() -> None:
    assert read([entry("coalesced", p2p=True)], GROUPS) == record(0, Operation("coalesced", 0, 6, peer=UNKNOWN))


def test_a_group_of_one_rank_is_left_out() -> None:
    assert read([], {"4": Group("mesh_tp", [1])}) == ()
