"""The loop: step, log, evaluate, save, stop.

Design choices:
- It owns nothing that computes: engine, loader, metrics and checkpoints are given to it by train.py, so a test can give
  it others.
- It never waits for the device. Counts, losses and the decision to skip are tensors; metrics are read when they have
  arrived, at most MetricStream's lag of steps later.
- A step is over for good only when a checkpoint has it; what is logged after one is logged again (law 7).
- Going back to a checkpoint in mid-run is what a new start does, in place: the same reader, loader and cut of the logs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain import schedule
from megatrain.batch import IGNORE, Batch
from megatrain.checkpoint.background import BackgroundSaver
from megatrain.checkpoint.folders import step_folder
from megatrain.checkpoint.format import TrainerState
from megatrain.config import TrainConfig
from megatrain.data.loader import Loader, RankBatch
from megatrain.data.segments import Segment
from megatrain.data.state import State
from megatrain.engines.checksums import CorruptionCheck
from megatrain.engines.engine import Engine
from megatrain.errors import GaveUp
from megatrain.observe.events import EventLog
from megatrain.observe.metrics import DIGEST, MetricStream
from megatrain.parallel.mesh import Mesh
from megatrain.resilience.agreement import Notices
from megatrain.resilience.anomalies import Anomalies, Series
from megatrain.resilience.progress import Progress
from megatrain.resilience.stopping import StopAgreement

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Trains until max_steps, the end of the data or a request to stop.

    step: steps done so far. held_out: makes this rank's micro-batches of an evaluation. events: rank 0's.
    kept_state: what every checkpoint says besides step, samples and data (config, tokenizer, wandb_run_id).
    saved_step: the last one that has a checkpoint. held_out_loss: of which step, 0-dim on the device.
    blocked_seconds: how long the last save kept training waiting.
    anomalies: says which steps to skip and when to go back; among the sinks of metrics is one that tells it.
    open_metrics: a stream for a run that goes on after a step; records of later ones are dropped.
    undone: steps that this start trained and then went back behind.
    progress: is told where this is, for the watchdog.
    bad_members: where ranks say which ones they skipped; None where that is an error.
    corruption: compares what ranks hold alike; None: nothing does.
    """

    config: TrainConfig
    device: torch.device
    mesh: Mesh
    engine: Engine
    loader: Loader
    metrics: MetricStream
    saver: BackgroundSaver
    stopping: StopAgreement
    events: EventLog | None
    held_out: Callable[[], Iterator[Batch]]
    kept_state: dict[str, Any]
    anomalies: Anomalies
    open_metrics: Callable[[int], MetricStream]
    step: int = 0
    undone: int = 0
    saved_step: int | None = None
    progress: Progress = field(default_factory=Progress)
    bad_members: Notices | None = None
    corruption: CorruptionCheck | None = None
    held_out_loss: tuple[int, Tensor] = (-1, torch.tensor(0.0))
    blocked_seconds: float = 0.0

    def run(self) -> str | None:
        """Trains. Returns the reason to stop if it was asked to, None when the run is complete; saves either way."""
        began = time.perf_counter()
        reason = None
        while self.step < self.config.max_steps and reason is None:
            self.progress.at(self.step + 1, "data")
            batch = next(self.loader, None)
            if batch is None:
                break
            self.begin_segments(batch.begun)
            self.note_bad_members(batch.bad_members)
            self.train_step(batch, began)
            began = time.perf_counter()
            if series := self.anomalies.series(self.step):
                self.go_back(series)
            else:
                self.after_step()
            # Counted on where the run goes back: a stop that is agreed is to come as soon.
            reason = self.stopping.poll(self.step + self.undone)
        self.save_last()
        self.note_bad_members()  # All ranks have come to the end.
        return reason

    def begin_segments(self, segments: Sequence[Segment]) -> None:
        """Those that begin with the next step."""
        for segment in segments:
            self.event("segment", **segment)
            if segment["passed_over"] is None:
                self.anomalies.begin_anew(self.step + 1)

    def note_bad_members(self, met: Sequence[str] = ()) -> None:
        """Leaves those that this rank met first in the step at hand to rank 0, which writes down each once."""
        if self.bad_members is None:
            return
        for line in met:
            self.bad_members.give(line)
        if self.events is not None:
            for line in self.bad_members.take():
                self.event("bad_member", reason=line)

    def train_step(self, batch: RankBatch, began: float) -> None:
        """One optimizer step. began: when the one before it was over, in perf_counter's seconds."""
        self.progress.at(self.step + 1, "accumulate")
        micro_batches = [micro_batch.to(self.device) for micro_batch in batch.micro_batches]
        target_count, digest = self._global_counts(micro_batches, batch.digest)
        stats = self.engine.accumulate(micro_batches, target_count)
        assert stats.gradient_norm is not None
        loss = stats.loss()
        limits = self.anomalies.limits(self.step)
        finite = torch.isfinite(loss) & torch.isfinite(stats.gradient_norm)
        above = (loss > limits.loss) | (stats.gradient_norm > limits.gradient_norm)
        skip = (target_count == 0) | ~finite | above
        learning_rate = schedule.learning_rate(self.config.optim, self.step, self.config.max_steps)
        self.progress.at(self.step + 1, "apply")
        self.engine.apply(learning_rate, skip)
        self.step += 1
        self.progress.at(self.step, "metrics")
        seconds = time.perf_counter() - began
        tokens = batch.samples * batch.sequence_length
        self.metrics.push(
            {
                "step": self.step,
                "tokens": batch.tokens,
                "first_sample": batch.first,
                "last_sample": batch.last,
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
        """What is due between steps. Raises GaveUp where ranks that should hold the same bits don't."""
        if self.corruption is not None and (differs := self.corruption.after_step(self.step)):
            self.event("corruption", reason=differs)
            raise GaveUp(differs)
        if _due(self.config.evaluation.every, self.step):
            self.evaluate()
        saving = self.config.saving
        if _due(saving.every, self.step) or _due(saving.keep_every, self.step):
            self.save()
        self.note_save()

    def go_back(self, series: Series) -> None:
        """Goes on from the newest checkpoint that is older than `series`, behind the samples trained on since.

        Raises GaveUp where there is none, or the run has gone back often enough.
        """
        self.progress.at(self.step, "go_back")
        config = self.config.resilience.anomalies
        reason = f"{len(series.steps)} steps skipped from {series.steps[0]} to {series.steps[-1]}: {series.reason}"
        if self.anomalies.rollbacks >= config.rollbacks:
            self.give_up(f"{reason}; resilience.anomalies.rollbacks={config.rollbacks} are used up")
        self.saver.wait()
        self.note_save()
        self.metrics.close()
        reader, altered = self.saver.manager.load(self.engine.load_shards, series.steps[0], self.progress.goes_on)
        if reader is None:
            self.give_up(f"{reason}; there is no checkpoint from before to go back to")
        saved, left = reader.state, self.step
        self.saver.manager.remove_after(saved["step"])
        self.undone += left - saved["step"]
        # The checkpoint that is there knows nothing of the samples to pass over.
        self.step, self.saved_step = saved["step"], None
        self.held_out_loss = self.step, torch.tensor(saved.get("held_out_loss", math.nan))
        self.anomalies.restore(saved.get("anomalies"))
        self.anomalies.rollbacks += 1
        data = cast(State, saved["data"])
        self.loader = self.loader.go_back(data, self.step, series.last_sample, reason)
        self.metrics = self.open_metrics(self.step)
        segments = self.loader.state()["segments"][len(data["segments"]) :]
        passed_over = segments[-1]["passed_over"]
        self.event("rollback", reason=reason, left_step=left, passed_over=passed_over, notes=altered)
        self.begin_segments(segments)
        # At once: a start after this one is to know of it.
        self.save()

    def give_up(self, reason: str) -> NoReturn:
        """Ends the run with exit code 3."""
        self.event("give_up", reason=reason)
        raise GaveUp(f"{self.config.run_dir}: {reason}")

    def evaluate(self) -> None:
        """The held-out loss, as a record of its own."""
        self.progress.at(self.step, "evaluate")
        stats = self.engine.evaluate(batch.to(self.device) for batch in self.progress.parts(self.held_out()))
        self.held_out_loss = self.step, stats.loss()
        self.metrics.push({"step": self.step}, {"held_out_loss": stats.loss()})

    def save(self) -> None:
        """Begins a checkpoint of this step. The metrics up to it are durable first."""
        self.progress.at(self.step, "save")
        began = time.perf_counter()
        if not self.saver.ready():
            self.event("save_skipped", reason="the one before is still being written")
            return
        self.note_save()
        self.metrics.flush()
        if name := self.engine.differing_weights():
            raise RuntimeError(f"{name}: at step {self.step} its weights aren't its masters: not saved")
        self.saver.begin(self.step, self.engine.shards, self._state())
        self.blocked_seconds = time.perf_counter() - began

    def save_last(self) -> None:
        """A checkpoint of this step, unless there is one. Raises GaveUp where it can't be written."""
        self.progress.at(self.step, "save")
        self.saver.wait()
        self.note_save()
        if self.saved_step == self.step:
            return
        self.save()
        self.saver.wait()
        if failure := self.note_save(last=True):
            raise GaveUp(failure)

    def note_save(self, last: bool = False) -> str | None:
        """Writes down what came of a save, if one has ended; why it failed, if it did. last: there is none after it."""
        save = self.saver.collect()
        if save is None:
            return None
        seconds = {"seconds": round(save.seconds, 3), "blocked_seconds": round(self.blocked_seconds, 3)}
        if save.failure is None:
            self.saved_step = save.step
            path = Path(*step_folder(Path(self.config.run_dir), save.step).parts[-2:])
            self.event("save", step=save.step, path=str(path), removed=save.removed, **seconds)
        else:
            self.event("save_failed", step=save.step, reason=save.failure, attempts=save.attempts, **seconds)
        if save.not_uploaded is not None:
            self.event("upload_failed", step=save.step, reason=save.not_uploaded)
        problem = save.not_uploaded or (None if last else save.failure)
        if problem is not None and self.events is not None:
            log.warning("%s; the run goes on", problem)
        return save.failure

    def _state(self) -> TrainerState:
        """What this step's checkpoint has besides tensors. Reads the device."""
        data = self.loader.state()
        state = TrainerState(
            step=self.step,
            optimizer_step=self.engine.optimizer_step(),
            samples=data["n"],
            data=dict(data),
            config=self.kept_state["config"],
            tokenizer=self.kept_state["tokenizer"],
            wandb_run_id=self.kept_state["wandb_run_id"],
            anomalies=self.anomalies.state(),
        )
        evaluated_step, loss = self.held_out_loss
        if evaluated_step == self.step and torch.isfinite(loss):
            state["held_out_loss"] = float(loss)
        return state

    def event(self, kind: str, *, step: int | None = None, **details: object) -> None:
        """Writes an event of `step` (this one, if not said) down, on rank 0."""
        if self.events is not None:
            self.events.write(kind, self.step if step is None else step, **details)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
