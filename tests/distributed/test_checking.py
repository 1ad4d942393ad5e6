"""Each rule of the checks catches a wrong program, and says where; right programs pass, and what they call is seen."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from megatrain.config import DeepSpeedConfig, Precision
from tests import samples
from tests.distributed import checking
from tests.distributed.checking import Call, conflict
from tests.distributed.pool import Pool, RankFailedError
from tests.distributed.training import make_engine, train

pytestmark = pytest.mark.distributed


def other_strides() -> None:
    dist.broadcast(torch.ones(8)[::2], 0)


def other_device() -> None:
    dist.all_reduce(torch.ones(4, device="meta"))


def sixteen_bits() -> None:
    dist.all_reduce(torch.ones(4, dtype=torch.int16))


def sixteen_bits_from_a_function() -> None:
    functional_all_reduce(torch.ones(4, dtype=torch.uint16), "sum", [0, 1])


def bits_of_all() -> None:
    dist.all_reduce(torch.ones(4, dtype=torch.int32), op=dist.ReduceOp.BAND)


def tagged() -> None:
    dist.send(torch.ones(4), 1 - dist.get_rank(), tag=7)


def from_anyone() -> None:
    dist.recv(torch.ones(4))


def monitored() -> None:
    dist.monitored_barrier()


def destroyed() -> None:
    group = dist.new_group([0, 1])
    dist.destroy_process_group(group)
    group.allreduce([torch.ones(4)])


def pickled_in_a_step() -> None:
    engine = make_engine(DeepSpeedConfig(), Precision.fp32, 2)

    def gather(*_: object) -> None:
        dist.all_gather_object([None, None], "text")

    with mock.patch.object(engine.chunks[0], "forward", gather):
        train(engine, [samples.batch(samples=4, sequence_length=8, seed=0)], 2)


RULES: dict[Callable[[], None], tuple[str, str]] = {
    sixteen_bits: ("allreduce", "NCCL has no torch.int16"),
    sixteen_bits_from_a_function: ("allreduce", "NCCL has no torch.uint16"),
    other_strides: ("broadcast", "a tensor isn't contiguous: shape (4,), strides (2,)"),
    other_device: ("allreduce", "a tensor is on meta, this rank's device is cpu"),
    bits_of_all: ("allreduce", "NCCL has no reduction BAND"),
    tagged: ("send", "NCCL has no tags: messages between two ranks arrive in their order"),
    from_anyone: ("recv_any_source", "NCCL has no receive from any rank"),
    monitored: ("monitored_barrier", "NCCL has no monitored barrier"),
    destroyed: ("allreduce", "its group is destroyed"),
    pickled_in_a_step: ("allgather", "all_gather_object pickles, within a step"),
}


def messages() -> list[str]:
    found = []
    for program in RULES:
        with pytest.raises(AssertionError) as caught:
            program()
        found.append(str(caught.value))
    return found


def test_what_one_rank_can_tell_fails_at_the_call(pool: Pool) -> None:
    for rank in pool.run(messages, ranks=2):
        for message, (program, (operation, problem)) in zip(rank, RULES.items(), strict=True):
            match = re.fullmatch(r"(\w+) at tests/distributed/test_checking.py:(\d+): (.*)", message)
            assert match, message
            assert (match[1], match[3]) == (operation, problem)
            first_line = program.__code__.co_firstlineno
            assert first_line < int(match[2]) < first_line + 8


def swapped() -> None:
    groups = [dist.new_group([0, 1], group_desc=name) for name in ("rows", "columns")]
    order = groups if dist.get_rank() == 0 else groups[::-1]
    works = [dist.all_reduce(torch.ones(4), group=group, async_op=True) for group in order]
    for work in works:
        work.wait()


def other_dtypes() -> None:
    dist.all_reduce(torch.ones(4, dtype=torch.int32 if dist.get_rank() else torch.float32))


def more_received_than_sent() -> None:
    if dist.get_rank() == 0:
        dist.send(torch.ones(8), 1)
    else:
        dist.recv(torch.ones(10), 0)


def other_sizes() -> None:
    dist.all_reduce(torch.ones(4 + dist.get_rank()))


@pytest.mark.parametrize(
    ("program", "on_rank_0", "on_rank_1"),
    [
        (swapped, r"all_reduce sum float32 4 on rows \d+", r"all_reduce sum float32 4 on columns \d+"),
        (other_dtypes, "all_reduce sum float32 4 on the default group", "all_reduce sum int32 4 on the default group"),
        (
            more_received_than_sent,
            "send 0 to 1 float32 8 on the default group",
            "send 0 to 1 float32 10 on the default group",
        ),
        # Gloo aborts a rank.
        (other_sizes, "all_reduce sum float32 4 on the default group", "all_reduce sum float32 5 on the default group"),
    ],
)
def test_what_takes_all_ranks_fails_the_task(
    pool: Pool, program: Callable[[], None], on_rank_0: str, on_rank_1: str
) -> None:
    with pytest.raises(RankFailedError) as caught:
        pool.run(program, ranks=2)
    first, *ranks = str(caught.value).splitlines()[-3:]
    assert first == "the ranks' collectives don't match, NCCL may hang:"
    for rank, call in enumerate((on_rank_0, on_rank_1)):
        where = r"of ranks 0 1, asked for at tests/distributed/test_checking.py:\d+"
        assert re.fullmatch(f"  rank {rank} waits in {call} {where}", ranks[rank])


def calls(*written: str) -> list[Call]:
    """One for each word such as a01 (on communicator a of ranks 0 and 1); those in one word a01+b12 are one batch."""
    return [
        Call(name[0], tuple(map(int, name[1:])), f"to {name}", "x.py:1", batch)
        for batch, word in enumerate(written)
        for name in word.split("+")
    ]


def test_a_circle_of_three_communicators() -> None:
    found = conflict([calls("a01", "c20"), calls("b12", "a01"), calls("c20", "b12")])
    assert found == (
        "the ranks' collectives don't match, NCCL may hang:\n"
        "  rank 0 waits in to a01 on a of ranks 0 1, asked for at x.py:1\n"
        "  rank 1 waits in to b12 on b of ranks 1 2, asked for at x.py:1\n"
        "  rank 2 waits in to c20 on c of ranks 2 0, asked for at x.py:1"
    )
    assert conflict([calls("a01", "c20"), calls("a01", "b12"), calls("b12", "c20")]) is None


def test_a_call_left_out() -> None:
    ranks = [calls("a01", "a01"), calls("a01")]
    found = conflict(ranks)
    assert found is not None
    assert found.splitlines()[1:] == [
        "  rank 0 waits in to a01 on a of ranks 0 1, asked for at x.py:1",
        "  rank 1 calls nothing more",
    ]
    assert conflict(ranks, complete=False) is None, "rank 1 may have failed before it"


def test_what_is_issued_as_one_has_no_order() -> None:
    assert conflict([calls("a01", "b01"), calls("b01", "a01")])
    assert conflict([calls("a01+b01"), calls("b01+a01")]) is None
    assert conflict([calls("a01+b01", "a01"), calls("b01", "a01", "a01")]) is None
    assert conflict([calls("a01+b01"), calls("a01")])


def right_programs() -> list[str]:
    rank = dist.get_rank()
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    checker = checking.checker
    assert checker is not None
    before = len(checker.calls)
    model(torch.ones(2, 4)).sum().backward()
    dist.all_gather_object([None, None], "the same size")
    functional_all_reduce(torch.ones(3), "max", [0, 1]).add_(0)
    dist.all_to_all_single(torch.ones(2 + 2 * rank), torch.ones(3), [1 + rank] * 2, [1, 2])
    both = [dist.P2POp(dist.isend, torch.ones(2), 1 - rank), dist.P2POp(dist.irecv, torch.ones(2), 1 - rank)]
    for work in dist.batch_isend_irecv(both if rank else both[::-1]):
        work.wait()
    group = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pipeline", "data")).get_group("data")
    thread = threading.Thread(target=dist.broadcast, args=(torch.ones(5, dtype=torch.bool), 0, group))
    thread.start()
    thread.join()
    return [call.what for call in checker.calls[before:]]


def test_what_is_right_passes_and_is_seen(pool: Pool) -> None:
    for rank, seen in enumerate(pool.run(right_programs, ranks=2)):
        assert seen == [
            "all_reduce sum float32 20",  # By DDP's reducer, in C++.
            "all_gather int64 1+1",
            "all_gather uint8 28+28",
            "all_reduce max float32 3",
            f"all_to_all {rank} to {1 - rank} float32 {2 - rank}",
            f"all_to_all {1 - rank} to {rank} float32 {1 + rank}",
            "send 1 to 0 float32 2",
            "send 0 to 1 float32 2",
            "broadcast root 0 bool 5",
        ]


def thousand_sums() -> float:
    total = torch.zeros(())
    for _ in range(1000):
        one = torch.ones(())
        dist.all_reduce(one)
        total += one
    return float(total)


def test_the_check_keeps_no_lock(pool: Pool) -> None:
    """Gloo's threads need the interpreter's to let go of a tensor, while they hold one that the next call waits for."""
    assert pool.run(thousand_sums, ranks=2) == [2000.0, 2000.0]


def engine_step(stage: int) -> list[str]:
    """What one step of one micro-batch calls."""
    engine = make_engine(DeepSpeedConfig(zero_stage=stage), Precision.fp32, 2)
    assert checking.checker is not None
    before = len(checking.checker.calls)
    train(engine, [samples.batch(samples=4, sequence_length=8, seed=0)], 2)
    return [f"{call.what} at {re.sub(':.*', '', call.line)}" for call in checking.checker.calls[before:]]


def test_the_collectives_of_a_zero_1_step(pool: Pool) -> None:
    ours = "megatrain/engines/common.py"
    for rank in pool.run(engine_step, ranks=2, stage=1):
        assert rank == [
            "all_reduce sum float32 109472 at deepspeed/runtime/zero/stage_1_and_2.py",  # All gradients: one bucket.
            f"all_reduce sum float64 1 at {ours}",  # The squared gradient norm.
            f"all_reduce sum float64 2 at {ours}",  # Loss sums, by source.
            f"all_reduce sum int64 2 at {ours}",  # Targets.
            # The weights: the embedding, norms, matrices.
            "all_gather float32 4192 at deepspeed/runtime/utils.py",
            "all_gather float32 272 at deepspeed/runtime/utils.py",
            "all_gather float32 50272 at deepspeed/runtime/utils.py",
        ]
