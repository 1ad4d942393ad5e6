"""The typed configuration of how a run meets failures."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AnomaliesConfig:
    """What becomes of steps whose loss or gradient norm isn't finite, or is far above those before."""

    window: int = 128
    """Good steps that say what is to be expected; before there are so many, only what isn't finite is skipped."""
    deviations: float = 10.0
    """A step is skipped whose loss or gradient norm lies so many standard deviations, estimated by the median absolute
    one, above the median of the window; in logarithms, and a deviation is at least 1%. 0: only what isn't finite."""
    repeats: int = 3
    """So many skipped steps within `within` steps, and the run goes back to a checkpoint from before them. 0: never."""
    within: int = 50
    """The steps in which they are counted."""
    rollbacks: int = 5
    """How often a run goes back; the next time that it should, it ends with exit code 3."""


@dataclass
class ResilienceConfig:
    """How a run notices that a rank is dead, hangs or holds wrong bits, or that a node isn't fit to train; and what it
    does about steps that go wrong."""

    heartbeat_seconds: float = 5.0
    """How often each rank gives a sign of life and looks for the others'."""
    timeout_seconds: float = 600.0
    """How long a rank may be silent, or its main thread may stand still before the run is ended: while reading a batch,
    computing, updating, evaluating a micro-batch, saving a tensor. Three times as long in the first step of a start.
    At least four heartbeats."""
    restarts: int = 0
    """How often, after a rank crashed or hung, a launcher starts the ranks again from the last checkpoint."""
    crash_loop: int = 3
    """So many crashes in a row at the same step, in whatever starts and jobs, end the run with exit code 3; 0: none."""
    time_limit_seconds: float | None = None
    """How long after its start a run saves and ends with exit code 75, less what saving takes; null: what is left of
    its Slurm job."""
    corruption_every: int = 100
    """Steps between comparisons of what ranks hold alike; who holds other bits is named and ends the run. 0: never."""
    preflight: bool = False
    """Each node looks at its disk, memory and GPUs, as `megatrain doctor` does, before its ranks are started; one that
    isn't well ends the start with exit code 3."""
    anomalies: AnomaliesConfig = field(default_factory=AnomaliesConfig)
