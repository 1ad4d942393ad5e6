"""Law 5 at start: what was asked for can be had, or one line says why not. No torch.

Design choices:
- The launcher asks before it spawns anything, and every rank asks again, since `torchrun -m megatrain.train` has no
  launcher of ours.
- Each check names the key, what was given, and the nearest legal choice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from megatrain import layout, objectives, storage
from megatrain.checkpoint import remote
from megatrain.checkpoint.folders import every, read_state, resolve
from megatrain.checkpoint.format import BrokenCheckpoint, TrainerState
from megatrain.checkpoint.huggingface.config import is_hugging_face, read_config
from megatrain.compose import plain
from megatrain.config import ENGINES, CommunicationDtype, DeepSpeedConfig, Precision, TrainConfig, WandbMode
from megatrain.data.format import HELD_OUT, TOKENIZER
from megatrain.data.plan import Plan
from megatrain.data.remote_folder import longest_wait
from megatrain.data.samples import Source, open_sources
from megatrain.data.segments import mixture_of
from megatrain.data.state import State
from megatrain.errors import bad_value
from megatrain.model import spec
from megatrain.schedule import decay_steps, warmup_steps
from megatrain.storage import StorageError

CLUSTER_VARIABLE = re.compile("(NCCL|OFI_NCCL|TORCH_NCCL|FI|GLOO)_[A-Z0-9_]+")
"""What cluster.environment may set."""


def check(config: TrainConfig) -> list[Source]:
    """What can be told before the number of ranks is known. Raises InputError. Returns the data, opened."""
    _check_numbers(config)
    _check_together(config)
    spec.check(config.model)
    objectives.check(config.objective)
    _check_engine(config)
    _check_cluster(config)
    layout.check(config)
    if config.launch.nodes > 1 and config.launch.rendezvous is None:
        raise bad_value("launch.rendezvous", "null", f"launch.nodes={config.launch.nodes} need HOST:PORT to meet at")
    if config.logger.tensorboard.enabled and importlib.util.find_spec("tensorboard") is None:
        raise bad_value("logger.tensorboard.enabled", "true", "tensorboard isn't installed; pip install tensorboard")
    if config.logger.wandb.mode is not WandbMode.disabled and importlib.util.find_spec("wandb") is None:
        raise bad_value("logger.wandb.mode", config.logger.wandb.mode.value, "wandb isn't installed; legal: disabled")
    sources = _check_data(config)
    _check_run_dir(config, sources)
    return sources


def check_writable(config: TrainConfig) -> None:
    """The remote store takes what is written: asked once, by the launcher. Raises InputError."""
    if config.saving.remote is not None:
        remote.check_writable(storage.root(config.saving.remote, "saving.remote"))


def _check_numbers(config: TrainConfig) -> None:
    positive = {
        "sequence_length": config.sequence_length,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "max_steps": config.max_steps,
        "data.prefetch": config.data.prefetch,
        "data.shuffle_block": 1 if config.data.shuffle_block is None else config.data.shuffle_block,
        "data.shuffle_blocks": config.data.shuffle_blocks,
        "data.remote.timeout_seconds": config.data.remote.timeout_seconds,
        "data.cache.bytes": config.data.cache.bytes,
        "launch.nodes": config.launch.nodes,
        "launch.processes": 1 if config.launch.processes is None else config.launch.processes,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.eps": config.optim.eps,
        "resilience.heartbeat_seconds": config.resilience.heartbeat_seconds,
        "resilience.anomalies.window": config.resilience.anomalies.window,
        "resilience.anomalies.within": config.resilience.anomalies.within,
        "resilience.time_limit_seconds": 1 if (limit := config.resilience.time_limit_seconds) is None else limit,
    }
    not_negative = {
        "optim.weight_decay": config.optim.weight_decay,
        "optim.gradient_clip": config.optim.gradient_clip,
        "optim.warmup_steps": config.optim.warmup_steps or 0,
        "optim.decay_steps": config.optim.decay_steps or 0,
        "optim.final_ratio": config.optim.final_ratio,
        "data.remote.retries": config.data.remote.retries,
        "saving.every": config.saving.every,
        "saving.keep_last": config.saving.keep_last,
        "saving.keep_every": config.saving.keep_every,
        "saving.keep_best": config.saving.keep_best,
        "saving.retries": config.saving.retries,
        "saving.retry_seconds": config.saving.retry_seconds,
        "evaluation.every": config.evaluation.every,
        "logger.console.every": config.logger.console.every,
        "resilience.restarts": config.resilience.restarts,
        "resilience.crash_loop": config.resilience.crash_loop,
        "launch.max_idle_share": config.launch.max_idle_share,
        "resilience.anomalies.deviations": config.resilience.anomalies.deviations,
        "resilience.anomalies.repeats": config.resilience.anomalies.repeats,
        "resilience.anomalies.rollbacks": config.resilience.anomalies.rollbacks,
        "resilience.corruption_every": config.resilience.corruption_every,
    }
    for key, value in positive.items():
        if not value > 0:
            raise bad_value(key, value, "legal: above 0")
    for key, value in not_negative.items():
        if not value >= 0:
            raise bad_value(key, value, "legal: 0 or more")
    for key, value in (("optim.beta1", config.optim.beta1), ("optim.beta2", config.optim.beta2)):
        if not 0 <= value < 1:
            raise bad_value(key, value, "legal: from 0 to below 1")


def _check_together(config: TrainConfig) -> None:
    """Keys that have to fit each other."""
    if config.saving.keep_best and not config.evaluation.every:
        raise bad_value("saving.keep_best", config.saving.keep_best, "nothing is evaluated; legal: evaluation.every=N")
    for window in config.data.pass_over:
        first, last = window if isinstance(window, list) and len(window) == 2 else (1, 0)
        if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last):
            raise bad_value("data.pass_over", config.data.pass_over, "legal: [[FIRST,LAST],...], samples")
    anomalies = config.resilience.anomalies
    if anomalies.repeats > anomalies.within:
        rule = f"legal: at most resilience.anomalies.within={anomalies.within}"
        raise bad_value("resilience.anomalies.repeats", anomalies.repeats, rule)
    least = 4 * config.resilience.heartbeat_seconds
    if not config.resilience.timeout_seconds >= least:
        given, rule = config.resilience.timeout_seconds, "four resilience.heartbeat_seconds"
        raise bad_value("resilience.timeout_seconds", given, f"legal: at least {least}, {rule}")
    warmup = warmup_steps(config.optim, config.max_steps)
    decay = decay_steps(config.optim, config.max_steps)
    if warmup + decay > config.max_steps:
        raise bad_value(
            "optim.warmup_steps",
            warmup,
            f"and {decay} steps of decay don't fit into max_steps={config.max_steps}; "
            f"legal: at most {max(0, config.max_steps - decay)}",
        )


def _check_cluster(config: TrainConfig) -> None:
    """The names, as far as they can be told: what no library reads would be a setting without effect."""
    for name in config.cluster.environment:
        if not CLUSTER_VARIABLE.fullmatch(name):
            legal = "legal: variables of NCCL, its libfabric plugin, PyTorch's NCCL, libfabric and gloo"
            raise bad_value("cluster.environment", name, f"{legal}: NCCL_, OFI_NCCL_, TORCH_NCCL_, FI_, GLOO_")


def _check_engine(config: TrainConfig) -> None:
    engine = config.engine
    if type(engine) is not ENGINES[engine.name.value]:
        raise bad_value("engine.name", engine.name.value, f"legal: engine={engine.name.value}, which has its own keys")
    if not isinstance(engine, DeepSpeedConfig):
        return
    for key in ("bucket_elements", "prefetch_elements", "max_live_elements", "persistence_elements"):
        least = 1 if key == "bucket_elements" else 0
        if getattr(engine, key) < least:
            raise bad_value(f"engine.{key}", getattr(engine, key), f"legal: {least} or more")
    if engine.zero_stage not in (0, 1, 2, 3):
        raise bad_value("engine.zero_stage", engine.zero_stage, "legal: 0, 1, 2, 3")
    if engine.zero_stage == 0 and config.precision is Precision.bf16:
        raise bad_value("engine.zero_stage", 0, "not in bf16 (its masters would step on no gradients); legal: 1")
    if engine.zero_stage == 0 and engine.communication_dtype is not CommunicationDtype.fp32:
        raise bad_value("engine.communication_dtype", "bf16", "not at engine.zero_stage=0; legal: fp32")
    if engine.zero_stage == 0 and engine.offload_optimizer:
        raise bad_value("engine.offload_optimizer", "true", "needs sharded state; legal: engine.zero_stage=1, 2 or 3")


def _check_data(config: TrainConfig) -> list[Source]:
    """The sets are whole and their ids fit the model. Returns them."""
    if any(storage.URL.match(source.path) for source in config.data.named().values()):
        wait, limit = longest_wait(config.data.remote), config.resilience.timeout_seconds
        if not wait < limit:
            given = config.data.remote.timeout_seconds
            legal = f"with data.remote.retries it is {wait} s until a server is given up; legal: less in all than "
            raise bad_value("data.remote.timeout_seconds", given, f"{legal}resilience.timeout_seconds={limit}")
    sources = open_sources(config.data, config.sequence_length)
    plan = Plan(config, sources)
    for step in (0, *(phase.after_step for phase in config.phases.values())):
        mixture_of(plan.state(step)["segments"][0])
    for source in sources:
        needed = source.manifest.vocab_size
        if needed > config.model.vocab_size:
            raise bad_value(
                "model.vocab_size",
                config.model.vocab_size,
                f"the tokenizer of {source.config.path} has {needed} ids; legal: at least {needed}",
            )
    if config.evaluation.every:
        open_sources(config.data, config.sequence_length, HELD_OUT)
    return sources


def _check_run_dir(config: TrainConfig, sources: list[Source]) -> None:
    """The run directory can be written, and what it holds can be continued."""
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise bad_value("run_dir", run_dir, "is a file; legal: a folder")
    parent = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise bad_value("run_dir", run_dir, f"{parent} can't be written")
    try:
        checkpoints = every(run_dir, config.saving.remote)
    except StorageError as error:
        raise bad_value("saving.remote", config.saving.remote, str(error)) from error
    for one in checkpoints:
        with suppress(BrokenCheckpoint):  # Who loads says so, and takes the next.
            _check_continues(config, sources, read_state(one.path))
            return
    if config.checkpoint is not None:
        _check_starts(config, sources, config.checkpoint)


def _check_continues(config: TrainConfig, sources: list[Source], saved: TrainerState) -> None:
    """The checkpoint is of this model, data and run. Raises InputError naming the keys that differ."""
    if saved.get("weights_only"):
        legal = f"holds weights alone; legal: checkpoint={config.run_dir} and another run_dir"
        raise bad_value("run_dir", config.run_dir, legal)
    _check_model(config, saved["config"]["model"], f"run_dir={config.run_dir}", ", or another run_dir")
    if saved["step"] > config.max_steps:
        raise bad_value("max_steps", config.max_steps, f"run_dir={config.run_dir} is at step {saved['step']} already")
    Plan(config, sources).resume(cast(State, saved["data"]), saved["step"])


def _check_starts(config: TrainConfig, sources: list[Source], path: str) -> None:
    """The weights are of this model, and the data of its tokenizer. Raises InputError."""
    if is_hugging_face(Path(path)):
        model, tokenizer = plain(read_config(Path(path)).model), Path(path, TOKENIZER)
        sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None
    else:
        state = read_state(resolve(path))
        model, sha256 = state["config"]["model"], state["tokenizer"]["sha256"]
    _check_model(config, model, f"checkpoint={path}")
    for source in sources:
        if sha256 not in (None, source.manifest.tokenizer_sha256):
            raise bad_value(
                "checkpoint", path, f"made with another tokenizer than {source.config.path} (sha256 differs)"
            )


def _check_model(config: TrainConfig, held: Mapping[str, Any], where: str, otherwise: str = "") -> None:
    """The model is the one that `where` holds. Raises InputError naming the keys that differ."""
    model = plain(config)["model"]
    differing = [key for key, value in held.items() if key != "name" and model.get(key) != value]
    if differing:
        legal = " ".join(f"model.{key}={json.dumps(held[key])}" for key in differing)
        key = differing[0]
        raise bad_value(f"model.{key}", model.get(key), f"{where} holds another model; legal: {legal}{otherwise}")
