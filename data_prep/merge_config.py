"""The configuration of `megatrain merge`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class MergeConfig:
    """`megatrain merge`: one set of several."""

    sets: list[str] = field(default_factory=list)
    """Folders that `megatrain prep` finished, in the order in which their shards are to stand."""
    output: str = MISSING
    """The folder to make."""
