from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megatrain import device
from megatrain.observe.metrics import MetricStream
from megatrain.observe.records import Record


@dataclass
class ListSink:
    """Keeps what it is given."""

    records: list[Record] = field(default_factory=list)
    flushed: int = 0
    closed: bool = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed = True


class Device:
    """Copies as a device makes them: they land when it gets there, or when the host waits, in order."""

    def __init__(self) -> None:
        self.done = 0
        self.queued = 0

    def copy_to_host(self, tensors: dict[str, Tensor]) -> LateCopy:
        self.queued += 1
        return LateCopy(self, self.queued, {name: tensor.clone() for name, tensor in tensors.items()})


@dataclass
class LateCopy:
    owner: Device
    number: int
    tensors: dict[str, Tensor]

    def ready(self) -> bool:
        return self.owner.done >= self.number

    def wait(self) -> dict[str, Tensor]:
        self.owner.done = max(self.owner.done, self.number)
        return self.tensors


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Device:
    stand_in = Device()
    monkeypatch.setattr(device, "copy_to_host", stand_in.copy_to_host)
    return stand_in


def push(stream: MetricStream, step: int) -> None:
    stream.push({"step": step}, {"loss": torch.tensor(step / 2)})


def steps(sink: ListSink) -> list[object]:
    return [record["step"] for record in sink.records]


def test_on_the_cpu_a_record_is_written_at_once_and_later_changes_do_not_show() -> None:
    sink = ListSink()
    stream = MetricStream([sink])
    loss = torch.tensor(1.5, requires_grad=True)
    digest = torch.tensor(-2, dtype=torch.int64)
    stream.push({"step": 1, "mode": "x"}, {"loss": loss, "batch_digest": digest, "target_count": torch.tensor(7)})
    with torch.no_grad():
        loss.fill_(9.0)
    expected = {"step": 1, "mode": "x", "loss": 1.5, "batch_digest": "fffffffffffffffe", "target_count": 7}
    assert sink.records == [expected]
    assert list(sink.records[0]) == list(expected)


def test_the_host_waits_for_the_record_lag_steps_back(late: Device) -> None:
    sink = ListSink()
    stream = MetricStream([sink], lag=2)
    push(stream, 1)
    push(stream, 2)
    assert (steps(sink), late.done) == ([], 0)
    push(stream, 3)
    assert (steps(sink), late.done) == ([1], 1)
    push(stream, 4)
    assert (steps(sink), late.done) == ([1, 2], 2)


def test_records_that_arrived_are_written_in_order_without_waiting(late: Device) -> None:
    sink = ListSink()
    stream = MetricStream([sink], lag=3)
    for step in (1, 2, 3):
        push(stream, step)
    late.done = 2
    push(stream, 4)
    assert (steps(sink), late.done) == ([1, 2], 2)


def test_the_bound_holds_on_ranks_without_sinks(late: Device) -> None:
    stream = MetricStream([], lag=2)
    for step in range(1, 8):
        push(stream, step)
        assert late.queued - late.done <= 2


@pytest.mark.usefixtures("late")
def test_flush_waits_for_all_and_close_ends_the_sinks() -> None:
    sinks = [ListSink(), ListSink()]
    stream = MetricStream(sinks, lag=5)
    for step in (1, 2, 3):
        push(stream, step)
    stream.flush()
    assert [steps(sink) for sink in sinks] == [[1, 2, 3], [1, 2, 3]]
    assert [sink.flushed for sink in sinks] == [1, 1]
    push(stream, 4)
    stream.close()
    assert [steps(sink) for sink in sinks] == [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert all(sink.closed for sink in sinks)
