"""What torch's flight recorder knows of this rank's collectives: for the watchdog, and for torch's own analyzer.

The recorder notes each collective as it is entered: group, operation, number, sizes, the lines that called it. It is
always on, and keeps the last 2,000 (TORCH_FR_BUFFER_SIZE; 0 turns it off). NCCL and gloo have one each.

Design choices:
- Whether a GPU has finished a collective the recorder asks CUDA, which may never answer when a device hangs. So it is
  asked through the handler that torch has for its debug server, which doesn't hold the interpreter's lock; only the
  thread that asks is held up. What the handlers don't give, the calling lines, is fetched after that answer only.
- On one communicator NCCL's works end in order: what is older than one that ended is over too. Sends and receives in a
  batch are never marked.
- gloo doesn't record sends and receives. With a pipeline over gloo a rank could be waiting where nothing shows it, so
  nothing is told of any.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch._C import _distributed_c10d
from torch.distributed.distributed_c10d import _world

from megatrain import device
from megatrain.resilience.collectives import GroupRecord, Operation

c10d: Any = _distributed_c10d

KINDS = {
    "mesh_dp": "data-parallel",
    "mesh_tp": "tensor-parallel",
    "mesh_cp": "context-parallel",
    "mesh_pp": "pipeline",
    "mesh_model": "model-parallel",
    "mesh_shard": "sharding",
    "mesh_replicate": "replicating",
}
"""How people call the ranks of a group, by torch's description of it; the groups of parallel/mesh.py."""

PEER = re.compile(r"(?:send|recv) \d+(?:->|<-)(\d+)")
"""The peer in the name of a send or a receive, "recv 1<-0", as the group counts its ranks."""
UNKNOWN = -1


class Group(NamedTuple):
    """A process group: torch's description, and its ranks in order."""

    description: str
    ranks: list[int]


class FlightRecorder:
    """This rank's. pipeline: whether ranks send each other activations."""

    def __init__(self, pipeline: bool) -> None:
        self._nccl = device.backend() == "nccl"
        self._sees_all = self._nccl or not pipeline

    def records(self) -> tuple[GroupRecord, ...]:
        """What is known of each group of several ranks; nothing where there is a wait that the recorder doesn't see."""
        return read(self._entries(), _groups()) if self._sees_all else ()

    def trace(self) -> bytes:
        """The pickle that `torchfrtrace` reads."""
        self._entries()  # Comes back only where the device answers; the dump, which holds the lock, does so then.
        dump = c10d._dump_nccl_trace if self._nccl else c10d._dump_fr_trace
        trace = {"entries": [], **pickle.loads(dump())}  # Bytes that this process has just made.
        # gloo has left out which ranks are in which group.
        trace["pg_config"] = {
            name: {"name": name, "desc": group.description, "ranks": str(group.ranks)}
            for name, group in _groups().items()
        }
        return pickle.dumps(trace)

    def _entries(self) -> list[dict[str, Any]]:
        """The oldest first, without the calling lines."""
        answer = _Answer()
        c10d._get_handler("dump_nccl_trace_json" if self._nccl else "fr_trace_json")(_Question(), answer)
        return cast(list[dict[str, Any]], json.loads(answer.content).get("entries", []))


class _Question(c10d._Request):  # type: ignore[misc]
    """A request to one of torch's handlers, with its defaults."""

    def body(self) -> bytes:
        return b""

    def params(self) -> dict[str, str]:
        return {}


class _Answer(c10d._Response):  # type: ignore[misc]
    """Keeps what a handler answers."""

    content = "{}"

    def set_content(self, content: str, _: str) -> None:
        self.content = content

    def set_status(self, status: int) -> None:
        """An error says why in its content, which is no JSON."""


def read(entries: Sequence[dict[str, Any]], groups: Mapping[str, Group]) -> tuple[GroupRecord, ...]:
    """What entries of the recorder, the oldest first, say of each group of several ranks."""
    entered: dict[str, int] = {}
    waiting: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry["process_group"][0]
        if not entry["is_p2p"]:
            entered[name] = entry["collective_seq_id"]
        if entry["retired"] or entry["state"] == "completed":
            waiting.pop(name, None)
        else:
            waiting.setdefault(name, entry)
    oldest = next(iter(waiting), None)  # They are in the order in which they were entered.
    return tuple(
        GroupRecord(
            name,
            group.ranks[0],
            KINDS.get(group.description, ""),
            len(group.ranks),
            entered.get(name, 0),
            _operation(waiting[name], group.ranks, name == oldest) if name in waiting else None,
        )
        for name, group in groups.items()
        if len(group.ranks) > 1
    )


def _operation(entry: dict[str, Any], ranks: Sequence[int], oldest: bool) -> Operation:
    """The entry of an operation that isn't over. ranks: the group's."""
    name = entry["profiling_name"].partition(":")[2]
    elements = sum(math.prod(sizes) for sizes in entry["input_sizes"])
    peer = None
    if entry["is_p2p"]:
        match = PEER.fullmatch(name)
        peer = ranks[int(match[1])] if match else UNKNOWN
    return Operation(name.partition(" ")[0], entry["collective_seq_id"], elements, peer, oldest)


def _groups() -> dict[str, Group]:
    """The process groups of this rank, by their names."""
    names = dict(_world.pg_names)
    return {name: Group(group.group_desc, sorted(_world.pg_group_ranks[group])) for group, name in names.items()}
