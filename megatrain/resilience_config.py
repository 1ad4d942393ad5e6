"""The typed configuration of how a run meets failures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ResilienceConfig:
    """How a run notices that a rank is dead or hangs, or that a node isn't fit to train."""

    heartbeat_seconds: float = 5.0
    """How often each rank gives a sign of life and looks for the others'."""
    timeout_seconds: float = 600.0
    """How long a rank may be silent, or its main thread may stand still before the run is ended: while reading a batch,
    computing, updating, evaluating a micro-batch, saving a tensor. Three times as long in the first step of a start.
    At least four heartbeats."""
    corruption_every: int = 100
    """Steps between comparisons of what ranks hold alike; who holds other bits is named and ends the run. 0: never."""
    preflight: bool = False
    """Each node looks at its disk, memory and GPUs, as `megatrain doctor` does, before its ranks are started; one that
    isn't well ends the start with exit code 3."""
