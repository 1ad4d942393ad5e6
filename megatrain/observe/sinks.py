"""Where records go: metrics.jsonl, the console, W&B, TensorBoard.

Design choices:
- metrics.jsonl is the record of a run; the others are views of it. It alone is cut back on resume, so that the parts of
  a run that was stopped make the file of a run that wasn't.
- A record is flat. One of a training step has `loss`; one of an evaluation has `held_out_loss`; both have `step`.
- W&B starts in a thread: importing and starting it takes 0.7 s offline (measured on two cores) and as long as the
  network likes online, and the first record is needed only after the first step. What can be wrong with the request
  itself is found in the constructor.
- W&B that is lost later (its process was killed, say) is said once, and doesn't end the training.
- A resumed W&B run keeps its id. W&B is append-only, so steps that were trained twice after a crash appear twice there.
"""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatrain.compose import plain
from megatrain.config import TrainConfig, WandbMode
from megatrain.errors import InputError, bad_value
from megatrain.observe.records import LineFile, Record, decode, without_secrets

if TYPE_CHECKING:
    import wandb

CONSOLE_SECONDS = 10.0
"""Where the console is no terminal, a line is printed this often at most."""


class Sink(Protocol):
    """Takes records, in order."""

    def write(self, record: Record) -> None:
        """Takes one record. Doesn't change it."""
        ...

    def flush(self) -> None:
        """Makes what was written durable."""
        ...

    def close(self) -> None:
        """Ends the sink; nothing is written after."""
        ...


class JsonlSink:
    """metrics.jsonl: a line a record, written whole.

    path: the file; continued where it exists.
    resume_step: the step the run continues from, 0 for a fresh start. Records of later steps, which will be made
        again, and lines that aren't whole are dropped before anything is added.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        if path.exists():
            _keep_until(path, resume_step)
        self._lines = LineFile(path)

    def write(self, record: Record) -> None:
        self._lines.write(record)

    def flush(self) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


def _keep_until(path: Path, step: int) -> None:
    """Rewrites a JSON lines file with its whole records of steps up to `step`, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            record = decode(line)
            at = record.get("step") if record and line.endswith(b"\n") else None
            if isinstance(at, int) and at <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)


class ConsoleSink:
    """Where a run stands: a progress line on a terminal, else a line of text every CONSOLE_SECONDS.

    max_steps: of the whole run. every: steps between updates of the progress line.
    """

    def __init__(self, max_steps: int, every: int, console: Console | None = None) -> None:
        self.max_steps = max_steps
        self.every = every
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.step_seconds: float | None = None
        self.held_out = ""
        self.printed_at = -math.inf
        self.progress: Progress | None = None
        if self.console.is_terminal:
            columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(20), TextColumn("{task.description}")
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task("starting", total=max_steps)
            self.progress.start()
            self.console.show_cursor(True)  # which a run that is killed couldn't bring back

    def write(self, record: Record) -> None:
        step = record["step"]
        assert isinstance(step, int)
        if "held_out_loss" in record:
            self.held_out = f"held out {record['held_out_loss']:.4f}"
            return
        text = self._describe(step, record)
        if step % self.every and step != self.max_steps:
            return
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.printed_at >= CONSOLE_SECONDS or step == self.max_steps:
            self.printed_at = time.monotonic()
            self.console.print(f"step {step}/{self.max_steps}  {text}", markup=False)

    def _describe(self, step: int, record: Record) -> str:
        """What a line says of a step. The time left comes from a mean over about ten steps."""
        seconds = record.get("step_seconds")
        if isinstance(seconds, float):
            old = self.step_seconds if self.step_seconds is not None else seconds
            self.step_seconds = 0.9 * old + 0.1 * seconds
        parts = [
            f"{label} {value:{form}}"
            for label, name, form in (
                ("loss", "loss", ".4f"),
                ("grad norm", "grad_norm", ".3f"),
                ("lr", "learning_rate", ".2e"),
                ("tokens/s", "tokens_per_second", ",.0f"),
            )
            if isinstance(value := record.get(name), int | float)
        ]
        if self.step_seconds is not None:
            parts.append(f"left {duration((self.max_steps - step) * self.step_seconds)}")
        return "  ".join([*parts, self.held_out]).rstrip()

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class TensorboardSink:
    """Event files under `folder`, a scalar for each number of a record.

    resume_step: TensorBoard hides what an earlier part of the run wrote for later steps.
    Raises InputError where the package isn't installed.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise InputError("logger.tensorboard.enabled=true: tensorboard isn't installed; pip install tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """A W&B run whose files lie in run_dir/wandb. Offline, `wandb sync` uploads them later, all parts as one run.

    run_id: kept in the checkpoint, so that a resumed run is the same W&B run.
    Raises InputError where it is asked to be online without being logged in.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str) -> None:
        if config.logger.wandb.mode is WandbMode.online:
            _check_wandb_login()
        self.lost = False
        starter = ThreadPoolExecutor(1, "wandb")
        self.run: Future[wandb.Run] = starter.submit(_start_wandb, config, run_dir, run_id)
        starter.shutdown(wait=False)

    def write(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._tell(lambda run: run.log(numbers))

    def flush(self) -> None:
        """W&B writes in a process of its own, which outlives a crash of this one."""

    def close(self) -> None:
        self._tell(lambda run: run.finish())

    def _tell(self, what: Callable[[wandb.Run], None]) -> None:
        """Does `what` with the run, unless W&B was lost. An error of its start is the run's own."""
        run = self.run.result()
        if self.lost:
            return
        try:
            what(run)
        except Exception as error:  # whatever its client raises: a view that is gone doesn't end the training
            self.lost = True
            print(
                f"megatrain train: W&B is lost ({error}); training goes on, metrics.jsonl has it all", file=sys.stderr
            )


def _check_wandb_login() -> None:
    """Raises InputError where W&B has no valid key, instead of the prompt that would hold up every rank."""
    import wandb

    try:
        problem = None if wandb.login(prompt=False) else "not logged in; use `wandb login` or WANDB_API_KEY"
    except wandb.Error as error:
        problem = " ".join(str(error).split())
    if problem:
        raise bad_value("logger.wandb.mode", "online", f"{problem} (or logger.wandb.mode=offline)")


def _start_wandb(config: TrainConfig, run_dir: Path, run_id: str) -> wandb.Run:
    """Starts the run: quiet, no code and no console output uploaded, `step` as the axis of every metric."""
    import wandb

    wanted = config.logger.wandb
    try:
        run = wandb.init(
            dir=run_dir,
            id=run_id,
            resume="allow",
            mode=wanted.mode.value,
            project=wanted.project,
            entity=wanted.entity,
            name=wanted.name or run_dir.resolve().name,
            tags=wanted.tags,
            config=without_secrets(plain(config)),
            settings=wandb.Settings(silent=True, console="off", disable_code=True),
        )
    except wandb.Error as error:
        raise bad_value("logger.wandb.mode", wanted.mode.value, " ".join(str(error).split())) from error
    run.define_metric("*", step_metric="step")
    return run


def new_wandb_run_id() -> str:
    """An id for a run that has none yet: 8 hexadecimal digits."""
    return secrets.token_hex(4)


def build_sinks(config: TrainConfig, run_dir: Path, resume_step: int, wandb_run_id: str) -> list[Sink]:
    """The sinks that `config.logger` asks for, for rank 0. `run_dir` exists; resume_step is 0 for a fresh start.

    Raises InputError for a sink that can't be had.
    """
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl", resume_step)]
    if config.logger.tensorboard.enabled:
        sinks.append(TensorboardSink(run_dir / "tensorboard", resume_step))
    if config.logger.wandb.mode is not WandbMode.disabled:
        sinks.append(WandbSink(config, run_dir, wandb_run_id))
    if config.logger.console.every:
        sinks.append(ConsoleSink(config.max_steps, config.logger.console.every))
    return sinks
