"""`megatrain prep`: text to a set of shards.

The steps: find the files and cut them into units; train or load the tokenizer and store it; prepare the units; say
where shards end and write them; the manifests commit the set.

Design choices:
- This process decides and counts; everything that costs is a task for an executor, and its results are files. So the
  same runs in a pool of processes, on Ray and in Slurm arrays, and a run that was killed at any moment goes on when it
  is started again: a task whose results are there and whole does nothing.
- Documents stand in the shards in the order of the input, wherever and in whatever order units were prepared.
- DIR/.work holds the results of units until the set is committed: about twice the bytes of its tokens.
- A unit that fails again and again is named, and so is every other one that fails, when all that can be done is done;
  there is no set then (exit code 3). A broken file or too many bad records leave a committed set without them, and
  exit code 3.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console

from megatrain.data.format import TOKENIZER, TRAIN
from megatrain.data_prep.config import PrepConfig, check
from megatrain.data_prep.counts import Counts
from megatrain.data_prep.execute import Failure, each
from megatrain.data_prep.files import said
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.plan import WORK, Input, find_inputs, plan_shards, plan_units, what_matters
from megatrain.data_prep.report import Meter, Report
from megatrain.data_prep.results import Done
from megatrain.data_prep.shards.manifest import (
    extended,
    new_lineage,
    read_lineage,
    read_manifests,
    write_lineage,
    write_manifest,
)
from megatrain.data_prep.shards.write import read_record, write_shard
from megatrain.data_prep.tokenizer import Vocabulary
from megatrain.data_prep.units import SPLITS, Settings, prepare
from megatrain.data_prep.vocabulary import store, vocabulary
from megatrain.errors import DONE, GAVE_UP, GaveUp, bad_value


class _Named(Protocol):
    """What a task says of itself: its input in bytes, and what people call it."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


Task = TypeVar("Task", bound=_Named)


def run(config: PrepConfig) -> int:
    """Prepares the input into config.output. The exit code: 0, or 3 where something had to be left out.

    Raises InputError before anything is written, GaveUp where the set can't be finished (disk full, a unit that fails,
    no usable document): report.json then says so, what was done is kept for the next start, and there is no manifest.
    """
    started = time.monotonic()
    check(config)
    output, console = Path(config.output), Console()
    inputs = find_inputs(config)
    _check_output(output, config.append)
    found = vocabulary(config, inputs)
    report = Report(files=sum(len(each.files) for each in inputs), ignored_files=sum(each.ignored for each in inputs))
    with _claimed(output):
        try:
            _make_set(config, inputs, found, report, console)
        except (GaveUp, OSError) as error:
            report.exit_code, report.reason = GAVE_UP, str(error)
            report.seconds = time.monotonic() - started
            with contextlib.suppress(GaveUp):  # where the disk is full
                report.write(output)
            raise GaveUp(str(error)) from error
        report.seconds = time.monotonic() - started
        report.write(output)
        shutil.rmtree(output / WORK)
    report.show(console, output)
    return report.exit_code


def _check_output(output: Path, append: bool) -> None:
    """Refuses a folder that holds a finished set, or anything that an unfinished run of ours didn't leave."""
    finished = output.is_dir() and bool(read_manifests(output))
    if append and not finished:
        raise bad_value("append", append, f"output={output} holds no finished set to append to")
    if not output.exists() or append:
        return
    if not output.is_dir():
        raise bad_value("output", output, "a file; give a new folder")
    if finished:
        raise bad_value("output", output, "already holds a finished set; give another folder, or append=true")
    if not (output / WORK).is_dir() and any(output.iterdir()):
        raise bad_value("output", output, "holds other files; give a new or empty folder")


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Makes the output folder, and holds it against other runs. Raises InputError where it can't be had."""
    try:
        for folder in (WORK, *SPLITS):
            (output / folder).mkdir(parents=True, exist_ok=True)
        lock = (output / WORK / "lock").open("w")
    except OSError as error:
        raise bad_value("output", output, f"can't be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise bad_value("output", output, "another run is writing it") from None
        except OSError:
            pass  # a file system without locks
        for left in output.rglob(".*.partial"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _make_set(config: PrepConfig, inputs: list[Input], found: Vocabulary, report: Report, console: Console) -> None:
    """Everything after the output is ours. Fills `report`, and commits the set last."""
    output, work = Path(config.output), Path(config.output) / WORK
    tokenizer, report.backend_reason = store(found, config, inputs)
    report.backend = tokenizer.backend
    units = plan_units(inputs, config, tokenizer.sha256, work / "units")
    files = [(file.name, file.size) for each in inputs for file in each.files]
    lineage = new_lineage(what_matters(config), files, read_lineage(output))
    _each(config, console, "preparing", partial(prepare, settings=Settings(config, tokenizer)), units, report)
    for unit in units:
        results = said(Path(unit.folder))
        report.counts.add(Counts.from_json(results["counts"]))
        report.notes.add(Notes.from_json(results["notes"]))
    report.reason = _reason(report.counts, config.max_bad_share)
    if not report.counts.total(TRAIN).documents:
        raise GaveUp(f"no usable document to train on; {report.reason or 'all are held out or dropped'}")
    report.exit_code = GAVE_UP if report.reason else DONE
    before = read_manifests(output)
    shards = {split: plan_shards(config, units, tokenizer, before.get(split), split) for split in SPLITS}
    _each(config, console, "writing shards", write_shard, [task for tasks in shards.values() for task in tasks], report)
    entries = {split: [read_record(task).entry for task in tasks] for split, tasks in shards.items()}
    report.shards = sum(len(found) for found in entries.values())
    shutil.copyfile(tokenizer.path, output / TOKENIZER)
    write_lineage(output, lineage)
    for split in reversed(SPLITS):  # the train split's last
        if entries[split]:
            write_manifest(output / split, extended(before.get(split), split, tokenizer, entries[split]))
        elif split not in before:
            (output / split).rmdir()


def _each(
    config: PrepConfig,
    console: Console,
    what: str,
    function: Callable[[Task], Done],
    tasks: Sequence[Task],
    report: Report,
) -> None:
    """function(task) for all of them, by the executor. Raises GaveUp, naming them, where some failed for good."""
    failed = {}
    with Meter(console, what, sum(task.size for task in tasks)) as meter:
        for number, result in each(function, tasks, config, Path(config.output) / WORK):
            if isinstance(result, Failure):
                failed[tasks[number].name] = result.reason
            else:
                meter.advance(tasks[number].size, *result)
    if failed:
        report.failed = failed
        first, reason = next(iter(failed.items()))
        raise GaveUp(
            f"{what}: {len(failed)} of {len(tasks)} failed, the first is {first}: {reason}; the others are done, "
            "and are kept for the next start"
        )


def _reason(counts: Counts, max_bad_share: float) -> str | None:
    """Why a finished set is incomplete, in one line; None if it isn't."""
    reasons = []
    if counts.broken:
        name, why = next(iter(counts.broken.items()))
        reasons.append(f"{len(counts.broken)} broken file(s) left out, the first is {name}: {why}")
    records = counts.bad + counts.records
    if counts.bad > max_bad_share * records:
        first = ", ".join(f"{kind} at {place}" for kind, place in counts.first_problem.items())
        reasons.append(f"{counts.bad} of {records} records are bad, above max_bad_share={max_bad_share}; first {first}")
    return "; ".join(reasons) or None
