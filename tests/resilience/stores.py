"""Stores as ranks have them: one server, a client of its own for each."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]


def tcp_stores(world_size: int) -> list[TCPStore]:
    """A client for each rank, of a server on a free port of this machine."""
    wait = timedelta(seconds=20)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    return [server, *(TCPStore("127.0.0.1", server.port, timeout=wait) for _ in range(world_size - 1))]
