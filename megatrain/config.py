"""The typed configuration tree: a dataclass for each group in conf/, and the commands' own.

Design choices:
- One tree. Hydra merges the YAML of conf/ and the command line into it, so an unknown key or a wrong type is an error
  with the key's name (law 5). What DeepSpeed or W&B need is generated from it.
- Every field says what it means below it; `megatrain COMMAND --help` and --cfg job print the values.
- Lengths and batches count samples; a sample is sequence_length tokens. Rates are per optimizer step.
- Only types here: what may be combined with what is checks.py's, and composing is compose.py's. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from megatrain.data_config import DataConfig, PhaseConfig
from megatrain.resilience_config import ResilienceConfig


class Precision(Enum):
    """What the forward and backward passes compute in. Master weights are fp32 (ZeRO's also at fp64)."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp64 = "fp64"


class Norm(Enum):
    """The normalisation before attention, before the MLP and at the end."""

    rms = "rms"
    layer = "layer"


class WhenBusy(Enum):
    """A save that is due while another is written."""

    wait = "wait"
    skip = "skip"


class Schedule(Enum):
    """How the learning rate goes after warm-up: a half cosine, or stable and then a linear decay, or constant."""

    cosine = "cosine"
    warmup_stable_decay = "warmup_stable_decay"
    constant = "constant"


class EngineName(Enum):
    """Who shards, schedules, clips and steps: ZeRO through DeepSpeed, or PyTorch's FSDP2."""

    deepspeed = "deepspeed"
    fsdp = "fsdp"


class CommunicationDtype(Enum):
    """What gradients are in on their way between ranks. They are added to those of other micro-batches in fp32.

    fp32: as they add up, which at precision=fp64 is fp64 with fsdp. bf16: half the traffic, rounded sums.
    """

    fp32 = "fp32"
    bf16 = "bf16"


class FsdpShard(Enum):
    """When weights are whole.

    full: a layer's, while it computes. gradient: all, from a step's first forward to its last backward. Masters,
    moments and gradients are sharded either way.
    """

    full = "full"
    gradient = "gradient"


class ActivationCheckpointing(Enum):
    """Which activations the backward pass computes again instead of keeping them.

    full: all within a layer; its input is kept.
    """

    none = "none"
    full = "full"


class Kernel(Enum):
    """What computes an operation. auto: on a GPU Triton's kernel if it is known to be right there, else torch.

    triton: ours, in kernels/. torch: PyTorch's own operations.
    """

    auto = "auto"
    triton = "triton"
    torch = "torch"


class AttentionKernel(Enum):
    """The same of attention. auto: on a GPU flash where it is installed and can, else as for the others.

    flash: the flash-attn package. torch: PyTorch's scaled_dot_product_attention, with a mask of all pairs.
    """

    auto = "auto"
    flash = "flash"
    triton = "triton"
    torch = "torch"


class LossKernel(Enum):
    """The same of the head with its loss. torch holds the logits of all tokens, the others of some at a time.

    chunked: PyTorch's operations; the logits are computed again in the backward pass, as Triton's kernel does.
    """

    auto = "auto"
    triton = "triton"
    chunked = "chunked"
    torch = "torch"


class WandbMode(Enum):
    """Where a W&B run goes: to files in the run directory, to the server, nowhere."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class RopeScaling:
    """Llama 3's stretching of rotary frequencies (Dubey et al. 2024, section 3.2)."""

    factor: float = 8.0
    """How much longer the low frequencies' wavelengths become."""
    low_frequency_factor: float = 1.0
    """Wavelengths above original_context / this are stretched whole."""
    high_frequency_factor: float = 4.0
    """Wavelengths below original_context / this are left alone."""
    original_context: int = 8192
    """The sequence length that the frequencies were made for, in tokens."""


@dataclass
class ModelConfig:
    """The shape of a decoder of the Llama family."""

    name: str = MISSING
    """What it is called in logs."""
    vocab_size: int = MISSING
    """Rows of the embedding; at least the tokenizer's ids."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    num_layers: int = MISSING
    """Transformer layers."""
    num_heads: int = MISSING
    """Query heads."""
    num_kv_heads: int = MISSING
    """Key and value heads; divides num_heads."""
    head_dim: int | None = None
    """Width of a head; null: hidden_size / num_heads."""
    intermediate_size: int = MISSING
    """Width inside the SwiGLU MLP."""
    norm: Norm = Norm.rms
    """RMSNorm or LayerNorm."""
    norm_eps: float = 1e-5
    """Added to the mean square, or to the variance, under the root."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's scaling; null: none."""
    sliding_window: int | None = None
    """A query sees this many keys, itself included; null: all."""
    tie_embeddings: bool = False
    """The head is the embedding's matrix."""
    attention_bias: bool = False
    """Biases in the projections of attention."""
    attention_out_bias: bool | None = None
    """A bias in attention's output projection; null: as attention_bias."""
    mlp_bias: bool = False
    """Biases in the three projections of the MLP."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotation."""
    initializer_std: float = 0.02
    """Standard deviation of initial weights; residual projections have it over sqrt(2 num_layers)."""


@dataclass
class ObjectiveConfig:
    """What is predicted."""

    name: str = "causal"
    """causal: position i predicts id i+1."""


@dataclass
class OptimConfig:
    """AdamW and the learning rate."""

    learning_rate: float = 3e-4
    """The peak, after warm-up."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.1
    """Decoupled from the gradient; per step it is learning_rate times this."""
    decay_norms: bool = False
    """Whether weight decay takes the norms' weights."""
    decay_biases: bool = False
    """Whether it takes biases."""
    decay_embeddings: bool = False
    """Whether it takes the embedding; a head tied to it is the embedding."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    schedule: Schedule = Schedule.cosine
    """What follows warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0; null: a hundredth of max_steps."""
    decay_steps: int | None = None
    """Steps of decay at the end; null: all after warm-up (cosine), a fifth of max_steps (warmup_stable_decay)."""
    final_ratio: float = 0.1
    """The last learning rate over the peak."""


@dataclass
class EngineConfig:
    """What all engines have in common; each has keys of its own."""

    name: EngineName = MISSING
    """Which engine it is; engine=NAME chooses it."""
    communication_dtype: CommunicationDtype = CommunicationDtype.fp32
    """What gradients are reduced in."""


@dataclass
class DeepSpeedConfig(EngineConfig):
    """ZeRO through DeepSpeed."""

    name: EngineName = EngineName.deepspeed
    """Which engine it is; engine=NAME chooses it."""
    zero_stage: int = 3
    """What DeepSpeed shards over data-parallel ranks: 1 optimizer state, 2 gradients too, 3 weights too; 0 nothing."""
    offload_optimizer: bool = False
    """Masters and moments live in host memory, and the step runs there."""
    bucket_elements: int = 50_000_000
    """Elements that are reduced or gathered at once."""
    prefetch_elements: int = 50_000_000
    """Elements of weights that ZeRO-3 gathers ahead of their use."""
    max_live_elements: int = 1_000_000_000
    """Gathered elements that ZeRO-3 may hold."""
    persistence_elements: int = 100_000
    """Weights smaller than this stay whole on every rank under ZeRO-3."""
    overlap_communication: bool | None = None
    """Reduce gradients while backward runs (a GPU stream; no effect on the CPU); null: where there is no pipeline."""


@dataclass
class FsdpConfig(EngineConfig):
    """PyTorch's FSDP2."""

    name: EngineName = EngineName.fsdp
    """Which engine it is; engine=NAME chooses it."""
    shard: FsdpShard = FsdpShard.full
    """When weights are whole."""


ENGINES: dict[str, type[EngineConfig]] = {"deepspeed": DeepSpeedConfig, "fsdp": FsdpConfig}
"""The keys below `engine`, by what engine=NAME says."""


@dataclass
class ParallelConfig:
    """How the ranks are divided; data parallel is what is left."""

    tensor: int = 1
    """Ranks that share each layer's matrices, and each sequence between them; on one node."""
    pipeline: int = 1
    """Ranks that the layers are divided among."""
    virtual_stages: int = 1
    """Stages of layers on each of them; more than 1 needs schedule=interleaved_1f1b."""
    schedule: str = "1f1b"
    """Order of forward and backward passes in a pipeline: 1f1b or interleaved_1f1b."""
    context: int = 1
    """Ranks that share each sequence everywhere; only 1 in this version."""
    replicate: int = 1
    """Groups of data-parallel ranks: each group holds everything, sharded among its ranks (engine=fsdp)."""


@dataclass
class KernelsConfig:
    """What computes each operation (docs/kernels.md)."""

    attention: AttentionKernel = AttentionKernel.auto
    """Attention: auto, flash, triton or torch."""
    norm: Kernel = Kernel.auto
    """Norms, with the residual sum before them: auto, triton or torch."""
    rotary: Kernel = Kernel.auto
    """Rotary positions: auto, triton or torch."""
    swiglu: Kernel = Kernel.auto
    """silu(gate) * up: auto, triton or torch."""
    linear_cross_entropy: LossKernel = LossKernel.auto
    """The head's product and its loss: auto, triton, chunked or torch."""


@dataclass
class SavingConfig:
    """When checkpoints are written and how long they stay; one is always written at the end and when stopped."""

    every: int = 500
    """Steps between checkpoints, to start again from; 0: only at the end and when stopped."""
    keep_last: int = 10
    """The newest ones that stay, however they came about; 0: all."""
    keep_every: int = 0
    """Steps between checkpoints that stay for ever; written at these steps, whatever `every` says. 0: none."""
    keep_best: int = 0
    """The ones with the lowest held-out loss that stay, of those steps that were evaluated; needs evaluation.every."""
    asynchronous: bool = True
    """Training stops for a copy to host memory only, which takes as many bytes there as the rank writes; false: it
    stops until the checkpoint is committed."""
    when_busy: WhenBusy = WhenBusy.wait
    """What becomes of a save that is due while another is still being written: it waits, or is skipped."""
    retries: int = 2
    """How often a save that failed is tried again, before the run goes on without it."""
    retry_seconds: float = 10.0
    """How long after the failure."""
    remote: str | None = None
    """URL of a folder in an object store (s3://BUCKET/RUN, gs://..., what fsspec can write to) that each checkpoint is
    copied to when it is committed. A start continues from what is newest, there or in run_dir."""


@dataclass
class EvaluationConfig:
    """The held-out loss while training."""

    every: int = 0
    """Steps between evaluations; 0: none."""
    samples: int = 64
    """Held-out samples taken each time, always the same ones."""


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


@dataclass
class LaunchConfig:
    """The processes of a run."""

    processes: int | None = None
    """Processes of this node; null: its GPUs, else 1."""
    nodes: int = 1
    """Nodes; the same command is started on each."""
    rendezvous: str | None = None
    """HOST:PORT of one of the nodes, where they meet; needed with more than one."""
    max_idle_share: float = 0.05
    """Largest share of a step's sample slots that may stay empty where the global batch doesn't divide."""


@dataclass
class ClusterConfig:
    """What the libraries that move data between the ranks are told of the machines and of the network."""

    name: str = "generic"
    """Which cluster it is; cluster=NAME chooses it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks, over those that the shell has set: cluster.environment.NCCL_DEBUG=INFO. Their
    names begin with NCCL_, OFI_NCCL_, TORCH_NCCL_, FI_ or GLOO_."""


@dataclass
class TrainConfig:
    """`megatrain train`."""

    run_dir: str = MISSING
    """Everything of the run lies here; a run directory that holds a checkpoint is continued."""
    checkpoint: str | None = None
    """What a new run takes its weights from, and nothing else: a run directory, a step's folder, their URL, or a
    Hugging Face folder; null: initial weights. A run that is continued has its own."""
    seed: int = 0
    """Initial weights and the order of samples."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time."""
    precision: Precision = Precision.bf16
    """What is computed in; masters stay fp32."""
    sequence_length: int = 2048
    """Tokens of a sample."""
    global_batch_size: int = 256
    """Samples of an optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Samples that a rank computes at once."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """What is computed again in the backward pass to save memory."""
    max_steps: int = MISSING
    """Optimizer steps of the whole run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """What changes while the run goes on: phases.NAME.after_step=N, and what is other from then on."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=DeepSpeedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
