"""The typed configuration of where metrics go: the group `logger` of config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class WandbMode(Enum):
    """Where a W&B run goes: to files in the run directory, to the server, nowhere."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = WandbMode.offline
    """Offline runs lie in run_dir/wandb; `wandb sync` uploads them."""
    project: str = "megatrain"
    """The project that the run belongs to."""
    entity: str | None = None
    """The user or team that the run belongs to; null: the account's default."""
    name: str | None = None
    """Name of the run; null: the run directory's."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run."""


@dataclass
class TensorboardConfig:
    """TensorBoard."""

    enabled: bool = False
    """Write event files to run_dir/tensorboard."""


@dataclass
class ConsoleConfig:
    """What rank 0 prints."""

    every: int = 1
    """Steps between updates of the progress line of rank 0; 0: none."""


@dataclass
class LoggerConfig:
    """Where metrics go, besides metrics.jsonl, which is always written."""

    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
