"""`megatrain prep`: text files to a set of shards.

The steps: find the files and cut them into units; train or load the tokenizer and store it; workers tokenize units;
this process writes their documents, in input order, into shards; the manifests commit the set.

Design choices:
- Workers are spawned processes that hold nothing but the tokenizer and a unit, and few units are under way at once:
  memory, and disk for what is tokenized but not yet written, don't grow with the input.
- Documents are written in the order of the input by one process, so the bytes don't depend on `workers`.
- DIR/.work exists from the start until the set is committed. A run that finds it clears what the other left.
- A broken file or too many bad records leave a committed, usable set without them, and exit code 3.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path

from rich.console import Console

from megatrain.data.format import HELD_OUT, MANIFEST, TOKENIZER, TRAIN, Manifest, ShardList, id_dtype_name
from megatrain.data_prep.config import PrepConfig, check
from megatrain.data_prep.pool import WorkerDiedError, in_order
from megatrain.data_prep.readers import Files, Unit, find_files, plan, sample
from megatrain.data_prep.report import Meter, Report
from megatrain.data_prep.shards import AtomicFile, write_manifest
from megatrain.data_prep.splits import SplitWriter
from megatrain.data_prep.tokenizer import Vocabulary, load, pick_backend, train
from megatrain.data_prep.units import (
    SPLITS,
    Counts,
    Settings,
    StoredTokenizer,
    is_held_out,
    prepare,
    result_path,
    results,
)
from megatrain.errors import DONE, GAVE_UP, GaveUp, bad_value

WORK = ".work"
PARITY_BYTES = 1 << 20
"""Text on which tiktoken has to give the ids of tokenizers before it is used."""


def run(config: PrepConfig) -> int:
    """Prepares config.input into config.output. The exit code: 0, or 3 where something had to be left out.

    Raises InputError before anything is written, GaveUp where the set can't be finished (disk full, a worker died, no
    usable document): report.json then says so, shards that were whole stay, and there is no manifest.
    """
    started = time.monotonic()
    check(config)
    output, console = Path(config.output), Console()
    files, ignored = find_files(config.input)
    _check_output(output)
    vocabulary = _vocabulary(config, files, console)
    _claim(output)
    report = Report(Counts(), files=len(files), ignored_files=ignored)
    try:
        _make_set(config, files, vocabulary, report, console)
    except (GaveUp, OSError) as error:
        report.exit_code, report.reason = GAVE_UP, str(error)
        report.seconds = time.monotonic() - started
        with contextlib.suppress(GaveUp):  # where the disk is full
            report.write(output)
        raise GaveUp(str(error)) from error
    report.seconds = time.monotonic() - started
    report.write(output)
    report.show(console, output)
    return report.exit_code


def _check_output(output: Path) -> None:
    """Refuses a folder that holds a finished set, or anything that an unfinished run of ours didn't leave."""
    if not output.exists():
        return
    if not output.is_dir():
        raise bad_value("output", output, "a file; give a new folder")
    if any((output / split / MANIFEST).exists() for split in SPLITS):
        raise bad_value("output", output, "already holds a finished set; give another folder")
    if not (output / WORK).is_dir() and any(output.iterdir()):
        raise bad_value("output", output, "holds other files; give a new or empty folder")


def _claim(output: Path) -> None:
    """Makes the output folder, without what an unfinished run left in it."""
    try:
        (output / WORK).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            shutil.rmtree(output / split, ignore_errors=True)
            (output / split).mkdir()
    except OSError as error:
        raise bad_value("output", output, f"can't be written: {error.strerror}") from None
    _empty(output / WORK)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _vocabulary(config: PrepConfig, files: Files, console: Console) -> Vocabulary:
    """The tokenizer that was asked for, trained on nothing that is held out."""
    tokenizer = config.tokenizer
    if tokenizer.path is not None:
        return load(Path(tokenizer.path), tokenizer.eos_token)
    console.print(f"training a tokenizer of {tokenizer.vocab_size:,} ids", highlight=False)
    documents = sample(files, config.columns, tokenizer.train_bytes)
    texts = (found.text for found in documents if not is_held_out(found.text.encode(), config.held_out_share))
    return train(texts, tokenizer.vocab_size)


def _make_set(config: PrepConfig, files: Files, vocabulary: Vocabulary, report: Report, console: Console) -> None:
    """Everything after the output is ours. Fills `report`, and commits the set last."""
    output = Path(config.output)
    units = plan(files, config.unit_bytes)
    with AtomicFile(output / TOKENIZER) as stored:
        stored.write(vocabulary.data)
    sampled = [document.text for document in sample(files, config.columns, PARITY_BYTES)]
    report.backend, report.backend_reason = pick_backend(vocabulary, sampled)
    tokenizer = StoredTokenizer(
        path=str(output / TOKENIZER),
        sha256=hashlib.sha256(vocabulary.data).hexdigest(),
        eos_id=vocabulary.eos_id,
        vocab_size=vocabulary.vocab_size,
        backend=report.backend,
    )
    settings = Settings(tokenizer, config.columns, config.source, config.language, config.held_out_share)
    manifests = _write_shards(config, units, settings, report, console)
    report.reason = _reason(report.counts, config.max_bad_share)
    if not report.counts.documents[TRAIN]:
        raise GaveUp(f"input={config.input}: no usable document to train on; {report.reason or 'all are held out'}")
    report.exit_code = GAVE_UP if report.reason else DONE
    for split in SPLITS:
        if split not in manifests:
            (output / split).rmdir()
    for split, manifest in manifests.items():
        write_manifest(output / split, manifest)
    shutil.rmtree(output / WORK)


def _reason(counts: Counts, max_bad_share: float) -> str | None:
    """Why a finished set is incomplete, in one line; None if it isn't."""
    reasons = []
    if counts.broken:
        name, why = next(iter(counts.broken.items()))
        reasons.append(f"{len(counts.broken)} broken file(s) left out, the first is {name}: {why}")
    records = counts.bad + counts.documents.total()
    if counts.bad > max_bad_share * records:
        first = ", ".join(f"{kind} at {place}" for kind, place in counts.first_problem.items())
        reasons.append(f"{counts.bad} of {records} records are bad, above max_bad_share={max_bad_share}; first {first}")
    return "; ".join(reasons) or None


def _write_shards(
    config: PrepConfig, units: list[Unit], settings: Settings, report: Report, console: Console
) -> dict[str, Manifest]:
    """Writes all shards. The manifests of the splits that have documents, the train split's last."""
    output, work, tokenizer = Path(config.output), Path(config.output) / WORK, settings.tokenizer
    writers = {split: SplitWriter(output / split, config.member_bytes, config.shard_bytes) for split in SPLITS}
    total = sum(piece.size for unit in units for piece in unit)
    try:
        with (
            Meter(console, total) as meter,
            contextlib.closing(_tokenized(units, settings, work, config.workers)) as done,
        ):
            for number, (unit, counts) in enumerate(done):
                for split, writer in writers.items():
                    for ids, lengths, metadata in results(work, number, split):
                        writer.add(ids, lengths, metadata)
                    result_path(work, number, split).unlink()
                report.counts.add(counts)
                meter.advance(sum(piece.size for piece in unit), counts.documents.total())
        entries = {split: tuple(writer.finish()) for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.discard()
        report.shards = [entry for writer in writers.values() for entry in writer.entries]
        _empty(work)
    return {
        split: Manifest(
            split=split,
            id_dtype=id_dtype_name(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256,
            tokens=sum(entry.tokens for entry in entries[split]),
            documents=sum(entry.documents for entry in entries[split]),
            shards=ShardList.of(entries[split]),
        )
        for split in (HELD_OUT, TRAIN)
        if entries[split]
    }


def _tokenized(
    units: list[Unit], settings: Settings, work: Path, workers: int | None
) -> Generator[tuple[Unit, Counts], None, None]:
    """Prepares the units; gives them in order, each when its results lie in `work`."""
    prepare_one = partial(prepare, settings=settings, folder=work)
    counts = in_order(prepare_one, list(enumerate(units)), workers or len(os.sched_getaffinity(0)))
    try:
        with contextlib.closing(counts):
            yield from zip(units, counts, strict=True)
    except WorkerDiedError as error:
        names = " or ".join(dict.fromkeys(piece.name for piece in units[error.task]))
        raise GaveUp(f"a worker process died (killed, or out of memory) while preparing {names}") from None
