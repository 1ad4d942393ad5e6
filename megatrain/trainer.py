"""The loop: step, log, evaluate, save, stop.

Design choices:
- It owns nothing that computes: engine, loader, metrics and checkpoints are given to it by train.py, so a test can give
  it others.
- It never waits for the device. Counts, losses and the decision to skip are tensors; metrics are read when they have
  arrived, at most MetricStream's lag of steps later.
- A step is over for good only when a checkpoint has it; what is logged after one is logged again (law 7).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain import schedule
from megatrain.batch import IGNORE, Batch
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.config import TrainConfig
from megatrain.data.loader import Loader, RankBatch
from megatrain.engines.engine import Engine
from megatrain.observe.events import EventLog
from megatrain.observe.metrics import DIGEST, MetricStream
from megatrain.parallel.mesh import Mesh
from megatrain.resilience.progress import Progress
from megatrain.resilience.stopping import StopAgreement


@dataclass
class Trainer:
    """Trains until max_steps, the end of the data or a request to stop.

    step: steps done so far. held_out: makes this rank's micro-batches of an evaluation. events: rank 0's.
    kept_state: what every checkpoint says besides step, samples and data (config, tokenizer, wandb_run_id).
    progress: is told where this is, for the watchdog.
    """

    config: TrainConfig
    device: torch.device
    mesh: Mesh
    engine: Engine
    loader: Loader
    metrics: MetricStream
    checkpoints: CheckpointManager
    stopping: StopAgreement
    events: EventLog | None
    held_out: Callable[[], Iterator[Batch]]
    kept_state: dict[str, Any]
    step: int = 0
    saved_step: int | None = None
    progress: Progress = field(default_factory=Progress)

    def run(self) -> str | None:
        """Trains. Returns the reason to stop if it was asked to, None when the run is complete; saves either way."""
        began = time.perf_counter()
        reason = None
        while self.step < self.config.max_steps and reason is None:
            self.progress.at(self.step + 1, "data")
            batch = next(self.loader, None)
            if batch is None:
                break
            self.train_step(batch, began)
            began = time.perf_counter()
            self.after_step()
            reason = self.stopping.poll(self.step)
        self.save()
        return reason

    def train_step(self, batch: RankBatch, began: float) -> None:
        """One optimizer step. began: when the one before it was over, in perf_counter's seconds."""
        self.progress.at(self.step + 1, "accumulate")
        micro_batches = [micro_batch.to(self.device) for micro_batch in batch.micro_batches]
        target_count, digest = self._global_counts(micro_batches, batch.digest)
        stats = self.engine.accumulate(micro_batches, target_count)
        assert stats.gradient_norm is not None
        loss = stats.loss()
        skip = (target_count == 0) | ~torch.isfinite(loss) | ~torch.isfinite(stats.gradient_norm)
        learning_rate = schedule.learning_rate(self.config.optim, self.step, self.config.max_steps)
        self.progress.at(self.step + 1, "apply")
        self.engine.apply(learning_rate, skip)
        self.step += 1
        self.progress.at(self.step, "metrics")
        seconds = time.perf_counter() - began
        tokens = batch.samples * self.config.sequence_length
        self.metrics.push(
            {
                "step": self.step,
                "tokens": (batch.last + 1) * self.config.sequence_length,
                "learning_rate": learning_rate,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "data_wait_seconds": batch.wait_seconds,
            },
            {
                "loss": loss,
                "grad_norm": stats.gradient_norm,
                "target_count": target_count,
                "skipped": skip,
                DIGEST: digest,
            },
        )

    def _global_counts(self, micro_batches: Sequence[Batch], digest: int) -> tuple[Tensor, Tensor]:
        """The targets of the global batch and its digest, 0-dim int64 on the device; one collective for both.

        Sums of int64 wrap, which is what the digest's mod 2^64 asks for.
        """
        targets = torch.stack([(batch.targets != IGNORE).sum() for batch in micro_batches]).sum()
        signed = digest - (1 << 64) if digest >= 1 << 63 else digest
        # A fill, not a copy: it carries the number to the device without the host waiting.
        counts = torch.stack([targets, torch.full_like(targets, signed)])
        dist.all_reduce(counts, group=self.mesh.data_group)
        return counts[0], counts[1]

    def after_step(self) -> None:
        """What is due between steps."""
        if _due(self.config.evaluation.every, self.step):
            self.evaluate()
        if _due(self.config.saving.every, self.step):
            self.save()

    def evaluate(self) -> None:
        """The held-out loss, as a record of its own."""
        self.progress.at(self.step, "evaluate")
        stats = self.engine.evaluate(batch.to(self.device) for batch in self.progress.parts(self.held_out()))
        self.metrics.push({"step": self.step}, {"held_out_loss": stats.loss()})

    def save(self) -> None:
        """Writes a checkpoint of this step, unless there is one. The metrics up to it are durable first."""
        if self.saved_step == self.step:
            return
        self.progress.at(self.step, "save")
        self.metrics.flush()
        data = self.loader.state()
        state = TrainerState(
            step=self.step,
            optimizer_step=self.engine.optimizer_step(),
            samples=data["n"],
            data=dict(data),
            config=self.kept_state["config"],
            tokenizer=self.kept_state["tokenizer"],
            wandb_run_id=self.kept_state["wandb_run_id"],
        )
        began = time.perf_counter()
        folder = self.checkpoints.save(self.step, self.progress.pieces(self.engine.shards()), state)
        self.saved_step = self.step
        self.event("save", path=str(Path(*folder.parts[-2:])), seconds=round(time.perf_counter() - began, 3))

    def event(self, kind: str, **details: object) -> None:
        """Writes an event of this step down, on rank 0."""
        if self.events is not None:
            self.events.write(kind, self.step, **details)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
