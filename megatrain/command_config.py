"""The typed configurations of the commands around training; `prep` has its own in data_prep."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatrain.config import Precision
from megatrain.data_config import Packing


@dataclass
class EvalDataConfig:
    """What `megatrain eval` reads."""

    path: str | None = None
    """A folder that `megatrain prep` wrote, or its URL; its held-out split is evaluated."""
    index_path: str | None = None
    """The folder that keeps the tables of large sets; null: beside the manifest."""


@dataclass
class EvalConfig:
    """`megatrain eval`."""

    checkpoint: str = MISSING
    """A run directory (its newest whole checkpoint), a step's folder or a Hugging Face folder."""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    text: str | None = None
    """A UTF-8 text file to evaluate instead of data.path."""
    output: str | None = None
    """A JSON file for the results."""
    precision: Precision = Precision.fp32
    """What the forward pass computes in."""
    sequence_length: int | None = None
    """Tokens of a sample; null: as in training."""
    micro_batch_size: int = 8
    """Samples computed at once."""
    max_samples: int | None = None
    """Samples to take; null: the whole held-out split."""


@dataclass
class GenerateConfig:
    """`megatrain generate`."""

    checkpoint: str = MISSING
    """A run directory (its newest whole checkpoint), a step's folder or a Hugging Face folder."""
    prompt: str = ""
    """The text to go on from."""
    max_new_tokens: int = 100
    """Tokens to add at most; the end of the document may come sooner."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 50
    """Sample among so many likeliest tokens; 0: all."""
    seed: int = 0
    """Of the sampling."""
    precision: Precision = Precision.fp32
    """What the model computes in."""


@dataclass
class ExportConfig:
    """`megatrain export`."""

    checkpoint: str = MISSING
    """A run directory (its newest whole checkpoint), a step's folder or a Hugging Face folder."""
    output: str = MISSING
    """The Hugging Face folder to write."""
    precision: Precision = Precision.fp32
    """What the weights are written in."""


@dataclass
class ImportConfig:
    """`megatrain import`."""

    source: str = MISSING
    """A Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3: config.json, safetensors, tokenizer.json."""
    output: str = MISSING
    """The run directory to make, with a checkpoint of the weights."""


@dataclass
class AverageConfig:
    """`megatrain average`."""

    checkpoint: str = MISSING
    """A run directory."""
    last: int | None = None
    """How many of its newest whole checkpoints to average; or give steps."""
    steps: list[int] = field(default_factory=list)
    """The steps whose checkpoints to average."""
    output: str = MISSING
    """The run directory to make, with a checkpoint of the mean weights."""


@dataclass
class ReportConfig:
    """`megatrain report`."""

    run_dir: str = MISSING
    """The run directory to report on."""
    output: str | None = None
    """The HTML file; null: RUN_DIR/report.html."""


@dataclass
class InspectConfig:
    """`megatrain inspect`."""

    path: str = MISSING
    """A shard set, a run directory or a step's folder, or the URL of one."""
    sample: int | None = None
    """Show the text of this sample of the training order instead: a run's own, or that of a set alone."""
    order: str | None = None
    """FIRST:LAST, samples of the training order: show which documents each of them is of; LAST itself is not."""
    sequence_length: int | None = None
    """Tokens of a set's samples; null: 2048. Where given, the share of padding is shown too. A run has its own."""
    packing: Packing | None = None
    """How a set's documents are put into samples; null: concat. A run has its own."""
    index_path: str | None = None
    """The folder that keeps the tables of best_fit and of large sets; null: beside the manifest of a set, and a run's
    own."""
    seed: int | None = None
    """Of a set's order; null: 0. A run has its own."""


@dataclass
class DoctorLaunchConfig:
    """The processes that measure the network; one alone measures none."""

    processes: int | None = None
    """Processes of this node; null: its GPUs, else 1."""
    nodes: int = 1
    """Nodes; the same command is started on each."""
    rendezvous: str | None = None
    """HOST:PORT of one of the nodes, where they meet; needed with more than one."""


@dataclass
class DoctorConfig:
    """`megatrain doctor`."""

    path: str = "."
    """The folder whose disk is looked at: where the run directory will lie."""
    gpus: int | None = None
    """GPUs that a node should have; null: as many as are on its PCI bus."""
    disk_gigabytes: float = 10.0
    """Free space there that is too little to train, in GB."""
    memory_gigabytes: float = 2.0
    """Host memory available that is too little, in GB."""
    xid_hours: float = 24.0
    """How far back Xid errors in the kernel's log count."""
    clock_skew_seconds: float = 1.0
    """How far the clock of a node may be from the first node's."""
    megabytes: float = 64.0
    """What is sent in each measurement of the network, in MB."""
    bandwidth_gigabytes: float | None = None
    """GB/s that every pair of ranks and the all-reduce over all has to reach; null: ranks are only compared."""
    launch: DoctorLaunchConfig = field(default_factory=DoctorLaunchConfig)
