"""`megatrain prep`: text to a set of shards.

The steps: find the files and cut them into units; train or load the tokenizer and store it; prepare the units; compare
their documents, and take out what is there twice; say where shards end and write them; the manifests commit the set.

Design choices:
- This process decides and counts; everything that costs is a task for an executor, and its results are files. So the
  same runs in a pool of processes, on Ray and in Slurm arrays, and a run that was killed at any moment goes on when it
  is started again: a task whose results are there and whole does nothing.
- Documents stand in the shards in the order of the input, wherever and in whatever order units were prepared.
- DIR/.work holds the results of units until the set is committed: about twice the bytes of its tokens, and where
  documents are compared the packed texts.
- A unit that fails again and again is named, and so is every other one that fails, when all that can be done is done;
  there is no set then (exit code 3). A broken file or too many bad records leave a committed set without them, and
  exit code 3.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console

from megatrain.data.format import TOKENIZER, TRAIN
from megatrain.data_prep.config import PrepConfig, check
from megatrain.data_prep.counts import Counts
from megatrain.data_prep.deduplicate.duplicates import find_duplicates
from megatrain.data_prep.deduplicate.examples import shown
from megatrain.data_prep.deduplicate.paragraphs import find_paragraphs
from megatrain.data_prep.execute import Failure, each, ready
from megatrain.data_prep.files import hidden, said
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.output import check_output, claimed, is_finished, set_before
from megatrain.data_prep.plan import WORK, find_inputs, plan_finish, plan_shards, plan_units, without_places
from megatrain.data_prep.report import Meter, Report
from megatrain.data_prep.results import Done
from megatrain.data_prep.screening.index import build_index
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
from megatrain.data_prep.units import (
    SPLITS,
    FinishTask,
    Settings,
    StoredTokenizer,
    UnitTask,
    compares,
    finish,
    kept_texts,
    prepare,
)
from megatrain.data_prep.vocabulary import store, vocabulary
from megatrain.errors import DONE, GAVE_UP, GaveUp, bad_value


class _Named(Protocol):
    """What a task says of itself: its input in bytes, and what people call it."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


Task = TypeVar("Task")
Result = TypeVar("Result")
Named = TypeVar("Named", bound=_Named)


def run(config: PrepConfig) -> int:
    """Prepares the input into config.output. The exit code: 0, or 3 where something had to be left out.

    Raises InputError before anything is written, GaveUp where the set can't be finished (disk full, a unit that fails,
    no usable document): report.json then says so, what was done is kept for the next start, and there is no manifest.
    """
    started = time.monotonic()
    check(config)
    output = Path(config.output).absolute()  # wherever a task runs
    config = replace(config, output=str(output))
    check_output(output, config.append)
    preparation = _Preparation(config)
    report = preparation.report
    with claimed(output, config.append):
        try:
            preparation.make_set()
        except (GaveUp, OSError) as error:
            report.exit_code, report.reason = GAVE_UP, str(error)
            report.seconds = time.monotonic() - started
            with contextlib.suppress(GaveUp):  # where the disk is full
                report.write(output)
            raise GaveUp(str(error)) from error
        report.seconds = time.monotonic() - started
        report.write(output)
        (output / WORK).rename(hidden(output / WORK))  # who dies while it is removed has finished
    report.show(preparation.console, output)
    return report.exit_code


class _Preparation:
    """One run: what it is asked for, and what it says. Nothing is written before `make_set`."""

    def __init__(self, config: PrepConfig) -> None:
        """Raises InputError where the input, the tokenizer or the executor can't be had."""
        self.config = config
        self.output, self.work = Path(config.output), Path(config.output) / WORK
        self.console = Console()
        self.inputs = find_inputs(config)
        files = [(file.name, file.size) for found in self.inputs for file in found.files]
        self.report = Report(files=len(files), ignored_files=sum(found.ignored for found in self.inputs))
        before = set_before(self.output, config.append)
        self._lineage = new_lineage(without_places(config), files, read_lineage(before))
        if is_finished(self.output) and not config.append and read_lineage(self.output) != self._lineage:
            raise bad_value("output", self.output, "already holds a finished set; give another folder, or append=true")
        ready(config, self.work)
        if config.tokenizer.train:
            self.console.print(f"training a tokenizer of {config.tokenizer.vocab_size:,} ids", highlight=False)
        self._vocabulary: Vocabulary = vocabulary(config, self.inputs)

    def make_set(self) -> None:
        """Everything after the output is ours. Fills the report, and commits the set last."""
        tokenizer, self.report.backend_reason = store(self._vocabulary, self.config, self.inputs)
        self.report.backend = tokenizer.backend
        units = self._prepare(tokenizer)
        self.report.reason = _reason(self.report.counts, self.config.max_bad_share)
        if not self.report.counts.total(TRAIN).documents:
            raise GaveUp(f"no usable document to train on; {self.report.reason or 'all are held out or dropped'}")
        self.report.exit_code = GAVE_UP if self.report.reason else DONE
        self._write_shards(units, tokenizer)

    def _prepare(self, tokenizer: StoredTokenizer) -> Sequence[UnitTask | FinishTask]:
        """The units whose tokens are there, in order, when all are done."""
        screened = self.config.decontaminate
        index = str(build_index(screened, self.work / "evaluation")) if screened.files else None
        settings = Settings(self.config, tokenizer, index)
        units = plan_units(self.inputs, settings, self.work / "units")
        self._each("preparing", partial(prepare, settings=settings), units)
        self._count(units)
        config, folders = self.config.deduplicate, [Path(unit.folder) for unit in units]
        if not compares(config):
            return units
        duplicates = repeated = None
        if config.exact or config.fuzzy.enabled:
            duplicates = find_duplicates(folders, self.work / "duplicates", config, self._run)
            self.report.duplicates = shown(duplicates.summary, lambda unit, rows: kept_texts(folders[unit], rows))
        if config.paragraphs.enabled:
            repeated = find_paragraphs(folders, self.work / "paragraphs", config, self._run, duplicates)
        rest = plan_finish(units, duplicates.folder if duplicates else None, repeated, self.work / "finished")
        self._each("tokenizing", partial(finish, settings=settings), rest)
        self._count(rest)
        return rest

    def _write_shards(self, units: Sequence[UnitTask | FinishTask], tokenizer: StoredTokenizer) -> None:
        """Writes the shards of all splits, and the manifests."""
        before = read_manifests(set_before(self.output, self.config.append))
        shards = {split: plan_shards(self.config, units, tokenizer, before.get(split), split) for split in SPLITS}
        self._each("writing shards", write_shard, [task for tasks in shards.values() for task in tasks])
        records = {split: [read_record(task) for task in tasks] for split, tasks in shards.items()}
        self.report.shards = sum(len(found) for found in records.values())
        shutil.copyfile(tokenizer.path, self.output / TOKENIZER)
        lineage = write_lineage(self.output, self._lineage)
        for split in reversed(SPLITS):  # the train split's last
            if found := records[split]:
                manifest = extended(before.get(split), split, tokenizer, found, self.report.counts, lineage)
                write_manifest(self.output / split, manifest)
            elif split not in before:
                (self.output / split).rmdir()

    def _count(self, tasks: Sequence[UnitTask | FinishTask]) -> None:
        """Adds what tasks that are done have counted and noted, in order."""
        for task in tasks:
            found = said(Path(task.folder))
            self.report.counts.add(Counts.from_json(found["counts"]))
            self.report.notes.add(Notes.from_json(found["notes"]))

    def _each(self, what: str, function: Callable[[Named], Done], tasks: Sequence[Named]) -> None:
        """function(task) for all of them. Raises GaveUp, naming them, where some failed for good."""
        failed = {}
        with (
            Meter(self.console, what, sum(task.size for task in tasks)) as meter,
            contextlib.closing(each(function, tasks, self.config, self.work)) as ended,
        ):
            for number, result in ended:
                if isinstance(result, Failure):
                    failed[tasks[number].name] = result.reason
                else:
                    meter.advance(tasks[number].size, *result)
        if failed:
            self.report.failed = failed
            first, reason = next(iter(failed.items()))
            raise GaveUp(
                f"{what}: {len(failed)} of {len(tasks)} failed, the first is {first}: {reason}; the others are done, "
                "and are kept for the next start"
            )

    def _run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """function(task) of each, in order: work between units, all of which has to be done."""
        results: dict[int, Any] = {}
        with contextlib.closing(each(function, tasks, self.config, self.work)) as ended:
            for number, result in ended:
                if isinstance(result, Failure):
                    raise GaveUp(f"comparing documents: {tasks[number]} failed: {result.reason}")
                results[number] = result
        return [results[number] for number in range(len(tasks))]


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
