"""What every rank runs: builds the parts of a run, joins them in a trainer, and says how it ended.

Started by megatrain.launcher, or by `torchrun ... -m megatrain.train key=value ...`.

Design choices:
- A fresh start and a continued run differ in one thing: the reader that the engine is loaded from. Which one it is
  shows when its bytes were read.
- A rank's own exit code is 0 when it is done and when it was stopped: a launcher would take any other for a failure.
  How the run ended is in outcome.json.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megatrain import checks, device, layout, objectives, optimizer
from megatrain.batch import Batch
from megatrain.checkpoint.background import BackgroundSaver
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.compose import compose, plain
from megatrain.config import ActivationCheckpointing, AttentionKernel, KernelsConfig, TrainConfig
from megatrain.data.format import HELD_OUT
from megatrain.data.loader import Loader, Objective, held_out_batches
from megatrain.data.plan import Plan
from megatrain.data.samples import Source, open_sources
from megatrain.data.state import State
from megatrain.data_config import WhenBad
from megatrain.engines import select
from megatrain.engines.checksums import CorruptionCheck
from megatrain.engines.engine import Engine
from megatrain.engines.ranges import ShardReader, WeightsOnly
from megatrain.errors import BUG, DONE, GAVE_UP, STOPPED, MegatrainError
from megatrain.evaluate.loading import open_checkpoint
from megatrain.model import choice
from megatrain.model.initialization import InitialWeights
from megatrain.model.partition import stages
from megatrain.model.transformer import Transformer
from megatrain.observe.events import EventLog, SkipSink, versions
from megatrain.observe.metrics import LAG, MetricStream
from megatrain.observe.pace import ComputeTimer, PaceSink
from megatrain.observe.records import without_secrets
from megatrain.observe.sinks import Sink, build_sinks, new_wandb_run_id
from megatrain.parallel import mesh as meshes
from megatrain.parallel.flight_recorder import FlightRecorder
from megatrain.parallel.mesh import Mesh
from megatrain.resilience.agreement import Agreement, Notices
from megatrain.resilience.anomalies import Anomalies
from megatrain.resilience.beats import FIRST_STEP
from megatrain.resilience.corruption import Comparison
from megatrain.resilience.files import write_whole
from megatrain.resilience.lease import Lease, end_at_once, start_name
from megatrain.resilience.outcome import clear_outcome, write_outcome
from megatrain.resilience.parent import LAUNCHER, die_with_launcher
from megatrain.resilience.progress import Progress
from megatrain.resilience.stopping import StopAgreement, StopSignal
from megatrain.resilience.stragglers import Stragglers
from megatrain.resilience.time_limit import TimeLimit, end_of_time
from megatrain.resilience.watchdog import Watchdog
from megatrain.trainer import Trainer

log = logging.getLogger(__name__)

START_SECONDS = 1800.0
"""How long the slowest rank may take to load."""


def main(arguments: Sequence[str]) -> int:
    """A rank's life. Returns its own exit code; outcome.json has the run's."""
    die_with_launcher()
    stop = StopSignal()
    stop.install()
    rank = int(os.environ.get("RANK", "0"))
    try:
        config: TrainConfig | None = compose("train", arguments)
        if config is None:
            return DONE
        sources = checks.check(config)
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        lease = Lease(run_dir, start_name(1, None), end_at_once)
        if rank == 0 and LAUNCHER not in os.environ:
            lease.take()
    except MegatrainError as error:
        if rank == 0:
            print(f"megatrain train: {error}", file=sys.stderr)
        return error.exit_code
    try:
        return _run(config, sources, stop, rank)
    finally:
        lease.release()


def _run(config: TrainConfig, sources: list[Source], stop: StopSignal, rank: int) -> int:
    """Trains in a run directory that is this run's; the rank's exit code."""
    run_dir = Path(config.run_dir)
    if rank == 0:
        # Under plain torchrun nobody has; another rank of this start may have failed already.
        clear_outcome(run_dir, before=psutil.Process().create_time())
    watchdog: Watchdog | None = None
    try:
        # Not in the launcher, which plain torchrun hasn't. They are read when a process group is made.
        os.environ.update(config.cluster.environment)
        where = device.start(waiting_seconds(config), config.deterministic)
        layout.check_ranks(config, dist.get_world_size(), device.ranks_of_this_node())
        stragglers = Stragglers()
        trainer = build(config, sources, where, stop, stragglers)
        watchdog = watch(trainer, stragglers)
        reason = train(trainer, watchdog)
        step = trainer.step
        write_outcome(run_dir, STOPPED if reason else DONE, reason or f"step {step} of {config.max_steps}", step, rank)
        device.finish()
    except Exception as error:
        return _failed(error, run_dir, rank, watchdog)
    return DONE


def _failed(error: Exception, run_dir: Path, rank: int, watchdog: Watchdog | None) -> int:
    """Says why this rank failed, in outcome.json, on the terminal and to the other ranks; its exit code.

    Only the first rank that fails has something to say: the others see no more than that it is gone.
    """
    # What gloo raises is a plain RuntimeError that begins with the place in its source.
    if watchdog is not None and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        watchdog.ask_who_is_gone()
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = error.exit_code if isinstance(error, MegatrainError) else GAVE_UP if no_space else BUG
    reason = f"{run_dir}: {error}" if no_space else str(error)
    if code == BUG:  # As the watchdog and the launcher say it: launch/slurm/pretrain.sbatch looks for the host.
        reason = f"rank {rank} ({socket.gethostname()}): {type(error).__name__}: {error}"
    line = " ".join(reason.split())
    try:
        first = write_outcome(run_dir, code, line, None, rank)
    except OSError:
        first = True  # No space even for this: the terminal has it, and the launcher takes the exit code.
    if first and code == BUG:
        traceback.print_exception(error)
    elif first:
        print(f"megatrain train: {reason}", file=sys.stderr)
    if watchdog is not None:
        watchdog.tell(code, line)
    return code


def train(trainer: Trainer, watchdog: Watchdog) -> str | None:
    """Runs the trainer between its start and stop events, and closes what it holds. The reason to stop, if any."""
    try:
        watchdog.start()
        reason = trainer.run()
        watchdog.stop()
        if reason:
            trainer.event("signal", reason=reason)
        trainer.event("stop", reason=reason or "done")
    finally:
        trainer.loader.close()
    trainer.metrics.close()
    return reason


def build(
    config: TrainConfig, sources: list[Source], where: torch.device, stop: StopSignal, stragglers: Stragglers
) -> Trainer:
    """All parts of a run on this rank, as new or as the newest whole checkpoint of run_dir has them."""
    run_dir, rank = Path(config.run_dir), dist.get_rank()
    mesh = meshes.build(config.parallel, config.model.num_kv_heads)
    progress = Progress()
    saver = make_saver(config, progress)
    events = EventLog(run_dir / "events.jsonl") if rank == 0 else None
    cleaned = saver.manager.clean()
    chosen = choice.choose(config.kernels, config.model, config.precision)
    engine = make_engine(config, mesh, chosen.kernels, len(sources), progress)
    saved, passed_over = load(config, engine, saver.manager)
    documents = chosen.kernels.attention is AttentionKernel.flash
    objective = objectives.build(config.objective, config.data.document_mask, documents)
    loader = make_loader(Plan(config, sources), objective, saved, mesh)
    step = saved["step"] if saved else 0
    wandb_run_id = (saved["wandb_run_id"] if saved else None) or new_wandb_run_id()
    if events is not None:
        write_run_files(config, run_dir, sources)
    anomalies = Anomalies(config.resilience.anomalies, LAG)
    anomalies.restore(saved.get("anomalies") if saved else None)
    told: list[Sink] = [SkipSink(anomalies, events), PaceSink(progress.meter, stragglers, events)]
    open_metrics = partial(make_metrics, config, wandb_run_id, told)
    trainer = Trainer(
        config=config,
        device=where,
        mesh=mesh,
        engine=engine,
        loader=loader,
        metrics=open_metrics(step),
        saver=saver,
        stopping=StopAgreement(stop, _store(), _attempt(), rank, limit=None if rank else time_limit(config, saver)),
        events=events,
        held_out=make_held_out(config, objective, mesh),
        kept_state={
            "config": without_secrets(plain(config)),
            "tokenizer": {"sha256": sources[0].manifest.tokenizer_sha256, "eos_id": sources[0].manifest.eos_id},
            "wandb_run_id": wandb_run_id,
        },
        anomalies=anomalies,
        open_metrics=open_metrics,
        step=step,
        saved_step=step if saved else None,
        progress=progress,
        corruption=make_corruption_check(config, engine),
        bad_members=Notices(_store(), _attempt()) if config.data.bad_member is WhenBad.skip else None,
    )
    trainer.event(
        "resume" if saved else "start",
        world_size=dist.get_world_size(),
        device=str(where.type),
        versions=versions(),
        kernels=chosen.reasons,
        notes=[*cleaned, *passed_over],
    )
    if saved:  # One more where something else is asked for now.
        trainer.begin_segments(loader.state()["segments"][len(saved["data"]["segments"]) :])
    return trainer


def load(config: TrainConfig, engine: Engine, manager: CheckpointManager) -> tuple[TrainerState | None, list[str]]:
    """Fills the engine; what the checkpoint says besides, None for a new run, and why newer ones were passed over."""
    reader, passed_over = manager.load(engine.load_shards)
    for reason in passed_over if dist.get_rank() == 0 else ():
        log.warning("passed over: %s", reason)
    if reader is None:
        engine.load_shards(first_weights(config))
    return None if reader is None else reader.state, passed_over


def first_weights(config: TrainConfig) -> ShardReader:
    """What a run begins with that has no checkpoint yet."""
    if config.checkpoint is None:
        return InitialWeights(config.model, config.seed)
    return WeightsOnly(open_checkpoint(config.checkpoint).reader)


def make_saver(config: TrainConfig, progress: Progress) -> BackgroundSaver:
    """What saves and loads the checkpoints of this run. progress: the main thread's."""
    background, slowest = Progress(), timedelta(seconds=waiting_seconds(config))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    agree = background.meeting(Agreement(_store(), ranks, f"checkpoint/{_attempt()}", slowest))
    manager = CheckpointManager(Path(config.run_dir), rank, ranks, agree, config.saving.remote)
    busy = progress.meeting(Agreement(_store(), ranks, f"saving/{_attempt()}", slowest))
    return BackgroundSaver(manager, config.saving, progress, background, busy)


def time_limit(config: TrainConfig, saver: BackgroundSaver) -> TimeLimit | None:
    """The end of the run's time, counted from when its launcher started; None where there is none."""
    ends = end_of_time(config.resilience.time_limit_seconds, psutil.Process(os.getppid()).create_time())
    return None if ends is None else TimeLimit(ends, lambda: saver.longest_seconds)


def make_corruption_check(config: TrainConfig, engine: Engine) -> CorruptionCheck | None:
    """What compares ranks' bits; None where there is nobody to compare with."""
    every, rank, ranks = config.resilience.corruption_every, dist.get_rank(), dist.get_world_size()
    if every == 0 or ranks == 1:
        return None
    return CorruptionCheck(engine.alike, Comparison(_store(), _attempt(), rank, ranks, socket.gethostname()), every)


def watch(trainer: Trainer, stragglers: Stragglers) -> Watchdog:
    """The watchdog of this rank. It begins with the training: before, ranks may load as long as they need."""
    trainer.progress.at(trainer.step + 1, "data")
    resilience = trainer.config.resilience
    return Watchdog(
        trainer.progress,
        _store(),
        _attempt(),
        Path(trainer.config.run_dir),
        dist.get_rank(),
        dist.get_world_size(),
        heartbeat=resilience.heartbeat_seconds,
        timeout=resilience.timeout_seconds,
        stragglers=stragglers if dist.get_rank() == 0 else None,
        recorder=FlightRecorder(pipeline=trainer.mesh.pipeline_size > 1),
    )


def waiting_seconds(config: TrainConfig) -> float:
    """How long a rank waits for others by itself; the watchdog, which can name them, comes first."""
    return max(START_SECONDS, (FIRST_STEP + 1) * config.resilience.timeout_seconds)


def make_engine(config: TrainConfig, mesh: Mesh, kernels: KernelsConfig, sources: int, progress: Progress) -> Engine:
    """The engine of this rank, to be loaded. kernels: without auto. sources: how many its statistics tell apart.

    progress: is told how fast it computes.
    """
    torch.manual_seed(config.seed)
    clip = config.optim.gradient_clip
    engine = select.make(config.engine, config.precision, config.micro_batch_size, clip, sources)
    mine = chunks(config, mesh, kernels)
    engine.build(mine, mesh, partial(optimizer.build, config.optim, config.model))
    first = next(iter(mine[0].layers.values()))
    ComputeTimer(first.get_submodule("mlp.gate_up"), progress.meter, progress)
    return engine


def chunks(config: TrainConfig, mesh: Mesh, kernels: KernelsConfig) -> list[Transformer]:
    """The stages of the model that this rank computes, on the meta device; stage i is pipeline rank i % pipeline's."""
    parallel = config.parallel
    every = stages(config.model, parallel.pipeline * parallel.virtual_stages, config.sequence_length)
    recompute = config.activation_checkpointing is ActivationCheckpointing.full
    with torch.device("meta"):
        mine = every[mesh.pipeline_rank :: parallel.pipeline]
        return [Transformer(config.model, stage, mesh.tensor, recompute, kernels) for stage in mine]


def make_loader(plan: Plan, objective: Objective, saved: TrainerState | None, mesh: Mesh) -> Loader:
    """The loader of this rank, where the run is. Raises InputError if the saved run had another order of samples."""
    step = saved["step"] if saved is not None else 0
    state = plan.state(step) if saved is None else plan.resume(cast(State, saved["data"]), step)
    return Loader(plan, objective, state, step=step, rank=mesh.data_rank, ranks=mesh.data_size)


def make_held_out(config: TrainConfig, objective: Objective, mesh: Mesh) -> Callable[[], Iterator[Batch]]:
    """Makes this rank's micro-batches of an evaluation; the held-out split is opened only if one will take place."""
    if not config.evaluation.every:
        return lambda: iter(())
    return partial(
        held_out_batches,
        open_sources(config.data, config.sequence_length, HELD_OUT),
        objective,
        samples=config.evaluation.samples,
        micro_batch_size=config.micro_batch_size,
        rank=mesh.data_rank,
        ranks=mesh.data_size,
    )


def make_metrics(config: TrainConfig, wandb_run_id: str, told: Sequence[Sink], step: int) -> MetricStream:
    """The stream of a run that goes on after `step`. told: who is told of every record, on every rank."""
    written = build_sinks(config, Path(config.run_dir), step, wandb_run_id) if dist.get_rank() == 0 else []
    return MetricStream([*written, *told])


def write_run_files(config: TrainConfig, run_dir: Path, sources: list[Source]) -> None:
    """config.yaml and tokenizer.json: what evaluation, export and a person need beside the checkpoints."""
    text = OmegaConf.to_yaml(without_secrets(plain(config)))
    write_whole(run_dir / "config.yaml", text.encode())
    write_whole(run_dir / "tokenizer.json", sources[0].tokenizer.read_bytes())


def _store() -> Store:
    """A client of its own: a request doesn't wait for those of another thread."""
    store: Store = _get_default_store().clone()  # type: ignore[attr-defined]
    return PrefixStore("megatrain", store)


def _attempt() -> str:
    """A name for this start of the ranks: a launcher's store may outlive them and meet the next start."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: native threads of the libraries (gloo's, DeepSpeed's) sometimes abort the interpreter's teardown,
    # and a finished run would look like a crash.
    os._exit(code)
