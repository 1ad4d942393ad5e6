"""The typed configuration of the data: what is trained on, and what changes while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Packing(Enum):
    """How documents are put into samples.

    concat: one after the other, cut where a sample is full. best_fit: whole where they fit, with some padding.
    """

    concat = "concat"
    best_fit = "best_fit"


class WhenBad(Enum):
    """A member of a shard that was altered since it was written, or lies beyond the end of a shard that was cut off.

    error: it ends the run, by name. skip: its samples keep their place in the order, as padding without targets. What
    can't be read at all (a missing shard, a store that doesn't answer) is an error always.
    """

    error = "error"
    skip = "skip"


@dataclass
class SourceConfig:
    """One set of shards of a mixture."""

    path: str = MISSING
    """A folder that `megatrain prep` wrote, or its URL."""
    weight: float = 1.0
    """Share of samples, relative to the other sources; 0: none, until a phase gives it one."""
    max_epochs: float | None = None
    """How often it may be seen; null: without limit."""


@dataclass
class RemoteConfig:
    """Reading sets from a remote store."""

    timeout_seconds: float = 30.0
    """How long one request may take, of at most 8 MiB."""
    retries: int = 4
    """How often a request that failed is sent again, after 0.5 s, 1 s, 2 s, ..., before the run gives up."""


@dataclass
class CacheConfig:
    """Where what was read from remote stores is kept. The ranks of a node share it, and so may runs."""

    path: str | None = None
    """The folder, on a local disk; null: megatrain-UID in the system's folder for temporary files."""
    bytes: int = 10_000_000_000
    """Members that it holds at most, on each node; the oldest go first. Indexes of shards aren't counted."""


@dataclass
class DataConfig:
    """What is trained on, and how samples are cut from it."""

    path: str | None = None
    """A folder that `megatrain prep` wrote, or its URL (s3://..., gs://..., https://...); or give data.sources."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sets with weights: data.sources.NAME.path=DIR."""
    packing: Packing = Packing.concat
    """How documents are put into samples: concat or best_fit."""
    index_path: str | None = None
    """The folder that keeps the tables of best_fit and of large sets; null: beside the manifest of each set."""
    pass_over: list[Any] = field(default_factory=list)
    """Windows of samples that are left out, as [[FIRST,LAST],...], where the loss spiked for instance. A step that
    would touch one moves behind it."""
    allow_change: bool = False
    """Continue a run on other data, weights or lengths than it was trained on, from where it is."""
    document_mask: bool = True
    """Attention stays within a document, and positions start again with each."""
    prefetch: int = 2
    """Global batches read ahead, by one thread a rank."""
    shuffle_block: int | None = None
    """Consecutive samples that are read near each other, so that a slow store sees long sequential reads: blocks are
    shuffled, and samples within windows of shuffle_blocks of them. null: all samples, anywhere."""
    shuffle_blocks: int = 64
    """Blocks, from all over a source, whose samples are mixed with each other; of no effect without shuffle_block."""
    bad_member: WhenBad = WhenBad.error
    """What becomes of a member whose bytes aren't those that were written."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def named(self) -> dict[str, SourceConfig]:
        """The sources by name; data.path is the source `data`."""
        return dict(self.sources) or {"data": SourceConfig(path=str(self.path))}


@dataclass
class PhaseConfig:
    """What is other from a step on; null: as before."""

    after_step: int = MISSING
    """Steps that are trained before it begins."""
    weights: dict[str, float] = field(default_factory=dict)
    """Shares of sources by name, instead of data.sources.NAME.weight; 0: none. Those not named keep theirs."""
    sequence_length: int | None = None
    """Tokens of a sample."""
    global_batch_size: int | None = None
    """Samples of an optimizer step."""
    micro_batch_size: int | None = None
    """Samples that a rank computes at once."""
