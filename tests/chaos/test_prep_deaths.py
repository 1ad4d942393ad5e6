"""kill -9 of `megatrain prep`, the process that was started or any of its workers, at random moments; then start again.

A story is so many deaths, drawn from one seed, which is in the name of the test. MEGATRAIN_CHAOS_SEED=SEED tells one
again. A run that was killed goes on when it is started; one that ended before its death is compared and begun anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest

from megatrain.data_prep.output import is_finished
from megatrain.data_prep.plan import WORK
from tests.tokenizer import make_tokenizer

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

WORKERS = 2
TASKS = ("units", "finished")
SEED = int(os.environ.get("MEGATRAIN_CHAOS_SEED", int.from_bytes(os.urandom(4))))
WORDS = [
    "the",
    "order",
    "of",
    "documents",
    "is",
    "the",
    "order",
    "of",
    "the",
    "input",
    "wherever",
    "and",
    "whenever",
    "they",
    "were",
    "prepared",
    "by",
    "whom",
    "ever",
]


def arguments(folder: Path, output: Path) -> list[str]:
    """Some forty units and a dozen shards."""
    sizes = ("unit_bytes=60000", "member_bytes=8000", "shard_bytes=60000")
    return [
        f"input={folder / 'input'}",
        f"output={output}",
        f"tokenizer.path={folder / 'tokenizer.json'}",
        f"workers={WORKERS}",
        "held_out_share=0.1",
        "deduplicate.exact=true",
        "deduplicate.fuzzy.enabled=true",
        *sizes,
    ]


def start(folder: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatrain", "prep", *arguments(folder, output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def files(output: Path) -> dict[str, bytes]:
    """What was written, but for the reports, which hold times."""
    paths = (path for path in output.rglob("*") if path.is_file() and not path.name.startswith("report"))
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


def units(output: Path) -> dict[str, int]:
    """The units whose results are there, of the first task and of the second, and which folder that is."""
    paths = [path for name in TASKS for path in (output / WORK / name).glob("[!.]*")]
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):
            found[f"{path.parent.name}/{path.name}"] = path.stat().st_ino
    return found


def begun(output: Path) -> list[Path]:
    """What tasks had begun when they died."""
    return [path for name in TASKS for path in (output / WORK / name).glob(".*.partial")]


def kill_one(run: subprocess.Popen[bytes], random: Random) -> bool:
    """Kills the run or one of its workers; whether it was the run."""
    workers = psutil.Process(run.pid).children(recursive=True)
    victim = random.choice([run.pid, *(worker.pid for worker in workers)])
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    return bool(victim == run.pid)


def wait_for_workers(pids: list[psutil.Process]) -> None:
    """Workers end with who started them."""
    _, alive = psutil.wait_procs(pids, timeout=20)
    assert not alive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prep")
    make_tokenizer(folder / "tokenizer.json")
    (folder / "input").mkdir()
    random = Random(0)
    for number in range(3):
        texts = [" ".join(random.choices(WORDS, k=random.randrange(20, 400))) for _ in range(600)]
        records = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "input" / f"{number}.jsonl").write_text(records)
    return folder


@pytest.mark.parametrize("deaths", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(folder: Path, deaths: int, tmp_path: Path) -> None:
    random = Random(SEED)
    began = time.monotonic()
    assert start(folder, tmp_path / "whole").wait(timeout=120) == 0
    longest = time.monotonic() - began
    expected = files(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in expected) > 10

    output, before = tmp_path / "output", dict[str, int]()
    while deaths:
        run = start(folder, output)
        time.sleep(random.uniform(0, longest))
        if run.poll() is None:
            workers = psutil.Process(run.pid).children(recursive=True)
            if not kill_one(run, random) and random.random() < 0.5:
                run.kill()  # after a worker the run too
            deaths -= 1
            if run.poll() is None:
                time.sleep(random.uniform(0, 1))
        if run.poll() is None and run.returncode is None:
            run.wait(timeout=120)
        else:
            wait_for_workers(workers)
        if run.returncode == 0 or (is_finished(output) and not (output / WORK).exists()):
            found = {name: data for name, data in files(output).items() if not name.startswith(f".{WORK}.")}
            assert found == expected, f"MEGATRAIN_CHAOS_SEED={SEED}"
            shutil.rmtree(output)
            before = {}
            continue
        assert run.returncode == -signal.SIGKILL
        # What was whole at the death before was not done again.
        now = units(output)
        assert before.items() <= now.items() or not now, f"MEGATRAIN_CHAOS_SEED={SEED}"
        assert len(begun(output)) <= WORKERS, f"MEGATRAIN_CHAOS_SEED={SEED}"
        before = now
    assert start(folder, output).wait(timeout=120) == 0
    assert files(output) == expected, f"MEGATRAIN_CHAOS_SEED={SEED}"
