"""`make demo`: from raw text to a trained, stopped, resumed, evaluated and exported model, in six minutes on two cores.

    python examples/demo.py [OUTPUT_DIR]        default: demo_output

Design choices:
- Every stage is a command line that a user would type, in a process of its own; its output is in OUTPUT_DIR/logs.
- The stop is a real SIGTERM to the launcher halfway through, and the resume is the same command again.
- A few steps are timed first, and the length of the training follows from them (between MIN_STEPS and MAX_STEPS): so
  the whole fits its budget on a slow machine, and a fast one doesn't end early.
- Exit code 0: everything held. 1: a bar was missed (the loss, the time). 2: OUTPUT_DIR isn't the demo's to overwrite.
  3: a stage failed. One line says what, and names the log.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatrain import device
from megatrain.errors import BAD_INPUT, BUG, DONE, GAVE_UP, STOPPED, InputError, MegatrainError
from megatrain.observe.records import Record, read

EXAMPLES = Path(__file__).resolve().parent
MARK = ".megatrain-demo"
"""A file that says that a folder is the demo's own, to be made anew by the next one."""
PROMPT = "    def __init__(self, "

BUDGET_SECONDS = 360
"""What the whole may take, after the installation."""
TRAINING_SECONDS = 170
"""What the training steps shall take."""
STAGE_SECONDS = 600
"""After this a stage hangs and is ended."""
PROBE_STEPS, WARM_STEPS = 12, 4
"""Steps that are timed, after the first ones, which are slower."""
MIN_STEPS, MAX_STEPS = 320, 800
LAST = 20
"""Steps that the loss at the end is the mean of."""
LOSS_BAR = 0.65
"""The loss at the end is below this share of the first step's."""

GLOBAL_BATCH_SIZE = 4
"""Samples of a step, or as many as GPUs. So few, since this early the loss follows the steps more than the tokens."""

Watch = Callable[[subprocess.Popen[bytes], Progress], None]


class Failed(MegatrainError):
    """A stage didn't end as it should."""

    exit_code = GAVE_UP


class BarMissed(MegatrainError):
    """All stages ended well, but not with the result they should have."""

    exit_code = BUG


@dataclass
class Demo:
    """One run of the demo in the folder `output`."""

    output: Path
    console: Console
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, command: list[str], expected: int = DONE, watch: Watch | None = None) -> str:
        """Runs a command to its end, which has to be the exit code `expected`, and returns what it printed.

        `watch` is called while it runs, to show where it stands. Raises Failed.
        """
        log = self.output / "logs" / f"{name}.log"
        log.write_text(f"$ {shlex.join(command)}\n")
        began = time.monotonic()
        title, state = TextColumn("{task.description:<9}"), TextColumn("{task.fields[state]}")
        bar = Progress(title, BarColumn(30), TimeElapsedColumn(), state, console=self.console)
        with bar as progress, log.open("ab") as file:
            task = progress.add_task(name, total=None, state="")
            with subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as process:
                try:
                    while process.poll() is None and time.monotonic() - began < STAGE_SECONDS:
                        time.sleep(0.1)
                        if watch is not None:
                            watch(process, progress)
                finally:
                    end(process)
            if process.returncode == expected:
                progress.update(task, total=1, completed=1)
        self.seconds[name] = time.monotonic() - began
        printed = log.read_text(errors="replace").split("\n", 1)[1].strip()
        if process.returncode != expected:
            said = printed.splitlines()[-1] if printed else "it printed nothing"
            raise Failed(f"{name}: exit code {process.returncode}, not {expected}: {said} (see {log})")
        return printed

    def megatrain(self, *arguments: str) -> list[str]:
        """A megatrain command line."""
        return [sys.executable, "-m", "megatrain", *arguments]

    def train_command(self, run_dir: str, steps: int, *arguments: str) -> list[str]:
        """`megatrain train` with what the probe and the training have in common."""
        accelerators = device.count()
        batch = max(GLOBAL_BATCH_SIZE, accelerators)
        return self.megatrain(
            "train",
            "model=tiny",
            f"data.path={self.output / 'shards'}",
            f"run_dir={self.output / run_dir}",
            "engine.zero_stage=3",
            f"launch.processes={accelerators or 2}",
            f"precision={'bf16' if accelerators else 'fp32'}",
            "sequence_length=256",
            f"global_batch_size={batch}",
            f"micro_batch_size={1 if accelerators else batch // 2}",
            "launch.max_idle_share=0.5",
            f"max_steps={steps}",
            "optim.learning_rate=3e-3",
            f"optim.warmup_steps={steps // 10}",
            *arguments,
        )

    def train(self, steps: int) -> float:
        """Trains, stops halfway by a signal, and goes on; seconds from the command to the first step."""
        metrics = self.output / "run" / "metrics.jsonl"
        command = self.train_command("run", steps, f"evaluation.every={steps // 10}", "evaluation.samples=16")
        began = time.monotonic()
        first_step_after = math.inf
        asked = False

        def watch(process: subprocess.Popen[bytes], progress: Progress) -> None:
            nonlocal asked, first_step_after
            done = training_steps(metrics)
            if not done:
                return
            first_step_after = min(first_step_after, time.monotonic() - began)
            step, loss = int(number(done[-1], "step")), number(done[-1], "loss")
            state = f"step {step}/{steps}  loss {loss:.2f}"
            progress.update(progress.task_ids[0], total=steps, completed=step, state=state)
            if step >= steps // 2 and not asked:
                asked = True
                process.send_signal(signal.SIGTERM)

        self.stage("train", command, expected=STOPPED, watch=watch)
        self.stage("resume", command, watch=watch)
        trained = [record["step"] for record in training_steps(metrics)]
        if trained != list(range(1, steps + 1)):
            raise Failed(f"resume: {metrics} doesn't hold each of {steps} steps once; see {self.output / 'logs'}")
        return first_step_after

    def run(self) -> Table:
        """All stages. Raises Failed or BarMissed; the table of results."""
        output = self.output
        self.stage("collect", [sys.executable, str(EXAMPLES / "python_text.py"), str(output / "text")])
        paths = f"input={output / 'text'}", f"output={output / 'shards'}"
        choices = "tokenizer.train=true", "tokenizer.vocab_size=8192", "held_out_share=0.02"
        self.stage("prep", self.megatrain("prep", *paths, *choices))
        self.stage("probe", self.train_command("probe", PROBE_STEPS, "logger.wandb.mode=disabled"))
        steps = steps_in(TRAINING_SECONDS, training_steps(output / "probe" / "metrics.jsonl")[WARM_STEPS:])
        first_step_after = self.train(steps)
        checkpoint = f"checkpoint={output / 'run'}"
        scores = output / "held_out.json"
        self.stage("eval", self.megatrain("eval", checkpoint, f"data.path={output / 'shards'}", f"output={scores}"))
        self.stage("export", self.megatrain("export", checkpoint, f"output={output / 'hf'}"))
        program = str(EXAMPLES / "generate_with_transformers.py")
        sample = self.stage("generate", [sys.executable, program, str(output / "hf"), PROMPT])
        self.stage("report", self.megatrain("report", f"run_dir={output / 'run'}"))
        return self.results(first_step_after, json.loads(scores.read_text()), sample)

    def results(self, first_step_after: float, scores: dict[str, Any], sample: str) -> Table:
        """The table at the end."""
        done = training_steps(self.output / "run" / "metrics.jsonl")
        first, last = loss_at_ends(done)
        in_steps = sum(number(record, "step_seconds") for record in done)
        rate = statistics.median(number(record, "tokens_per_second") for record in done)
        table = Table(show_header=False)
        rows = {
            "tokens": f"{done[-1]['tokens']:,} in {len(done)} steps",
            "loss at start": f"{first:.3f}",
            "loss at end": f"{last:.3f}, {last / first:.1%} of it (mean of the last {LAST} steps; bar {LOSS_BAR:.0%})",
            "held-out perplexity": f"{scores['perplexity']:,.1f}",
            "tokens per second": f"{rate:,.0f} (median)",
            "first step after": f"{first_step_after:.1f} s",
            "time by stage": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()),
            "time for training": f"{in_steps:.0f} s in steps of {time.monotonic() - self.began:.0f} s in all "
            f"(at most {BUDGET_SECONDS} s)",
            "text, shards": f"{self.output / 'text'}, {self.output / 'shards'}",
            "run, report": f"{self.output / 'run'}, {self.output / 'run' / 'report.html'}",
            "Hugging Face folder": str(self.output / "hf"),
            "logs": str(self.output / "logs"),
            "it writes": sample,
        }
        for name, value in rows.items():
            table.add_row(name, escape(value))
        return table

    def check(self) -> None:
        """Raises BarMissed where the results aren't what they should be."""
        first, last = loss_at_ends(training_steps(self.output / "run" / "metrics.jsonl"))
        logs = self.output / "logs"
        if not last < LOSS_BAR * first:
            raise BarMissed(f"the loss at the end is {last / first:.1%} of the first, bar {LOSS_BAR:.0%}; see {logs}")
        seconds = time.monotonic() - self.began
        if seconds > BUDGET_SECONDS:
            raise BarMissed(f"took {seconds:.0f} s, bar {BUDGET_SECONDS} s; see {logs}")


def training_steps(metrics: Path) -> list[Record]:
    """The records of training steps in a metrics.jsonl."""
    return [record for record in read(metrics) if "loss" in record]


def number(record: Record, name: str) -> float:
    """A metric of a record."""
    value = record[name]
    assert isinstance(value, int | float), f"{name} is {value}"
    return value


def loss_at_ends(done: list[Record]) -> tuple[float, float]:
    """The loss of the first step, and its mean over the last ones."""
    losses = [number(record, "loss") for record in done]
    return losses[0], statistics.fmean(losses[-LAST:])


def steps_in(seconds: float, probed: list[Record]) -> int:
    """How many steps fit into `seconds` by the time of the probed ones."""
    each = statistics.median(number(record, "step_seconds") for record in probed)
    return max(MIN_STEPS, min(MAX_STEPS, int(seconds / each)))


def make_folder(output: Path) -> None:
    """An empty folder of the demo's own. Raises InputError for a folder that something else made."""
    if output.exists() and not (output / MARK).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} wasn't made by the demo; give another folder, or remove it")
    if output.exists():
        shutil.rmtree(output)
    (output / "logs").mkdir(parents=True)
    (output / MARK).touch()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that still runs, and all it started, if it doesn't end itself when asked to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    """The command line."""
    if len(sys.argv) > 2:
        print("python examples/demo.py [OUTPUT_DIR]", file=sys.stderr)
        return BAD_INPUT
    output = Path(sys.argv[1] if len(sys.argv) == 2 else "demo_output").resolve()
    # The stages are in sessions of their own: whoever ends the demo ends them through it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        make_folder(output)
        demo = Demo(output, Console(highlight=False))
        demo.console.print(demo.run())
        demo.check()
    except MegatrainError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    return DONE


if __name__ == "__main__":
    sys.exit(main())
