"""The stream of metrics: from tensors on the device to the sinks, without making the host wait for the device.

Design choices:
- `push` only starts copies. A record is written when its copies have landed, in the order of the pushes.
- `push` waits for the record `lag` pushes back. So the host never runs more than `lag` steps ahead of the device, which
  bounds what is queued and how late a bad number, a signal or a hang is noticed. That bound is needed on every rank,
  so every rank pushes.
- On the CPU copies have landed at once, and a record is written in its own step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatrain import device
from megatrain.observe.records import Record, Value
from megatrain.observe.sinks import Sink

DIGEST = "batch_digest"
"""The one tensor that isn't a number to plot: 64 bits, int64 on the device, written as 16 hexadecimal digits."""

LAG = 2
"""How many steps the host may be ahead of the device."""


class MetricStream:
    """Takes what each step measured and hands it to the sinks, in order.

    sinks: where records go; those that write are rank 0's.
    lag: see LAG.
    """

    def __init__(self, sinks: Sequence[Sink], lag: int = LAG) -> None:
        self.sinks = sinks
        self.lag = lag
        self.pending: deque[tuple[Record, device.PendingCopy]] = deque()

    def push(self, values: Mapping[str, Value], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Adds a record: `values`, which the host knows, then `tensors`, 0-dim and of any real dtype.

        The tensors may be overwritten by work that is queued after this call. Blocks until the record `lag` pushes
        back has arrived.
        """
        self.pending.append((dict(values), device.copy_to_host(dict(tensors or {}))))
        while self.pending and (len(self.pending) > self.lag or self.pending[0][1].ready()):
            self._write_oldest()

    def flush(self) -> None:
        """Waits for all records, and makes what is written durable. Due before a checkpoint is committed."""
        while self.pending:
            self._write_oldest()
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """Flushes, then closes the sinks."""
        self.flush()
        for sink in self.sinks:
            sink.close()

    def _write_oldest(self) -> None:
        record, copy = self.pending.popleft()
        tensors = copy.wait()
        if self.sinks:
            record |= {name: _value(name, tensor) for name, tensor in tensors.items()}
        for sink in self.sinks:
            sink.write(record)


def _value(name: str, tensor: Tensor) -> Value:
    """The number in a 0-dim CPU tensor; a digest as hexadecimal digits."""
    number: int | float = tensor.item()
    return f"{number & 0xFFFF_FFFF_FFFF_FFFF:016x}" if name == DIGEST and isinstance(number, int) else number
