"""Runs that end before their set is made, and what the next start makes of what they left."""

import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatrain.data.format import HELD_OUT, TRAIN
from megatrain.data_prep import pipeline
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.pipeline import run
from megatrain.data_prep.report import Report
from megatrain.data_prep.tokenizer.config import TokenizerConfig
from megatrain.errors import GaveUp
from tests.data_prep.running import WORDS, documents, files, largest_file, report, text, write_jsonl


def test_no_space_left(config: PrepConfig, tmp_path: Path) -> None:
    """What was done before is kept, and the next start does the rest."""
    write_jsonl(config, "a.jsonl", *map(text, range(200)))
    write_jsonl(config, "b.jsonl", " ".join(WORDS * 100))
    with largest_file(40_000), pytest.raises(GaveUp, match=r"/train\.ids: can't be written: File too large"):
        run(config)
    kept = [path for path in files(config) if path.startswith(".work/units/")]
    assert len(kept) > 10
    assert not any("manifest" in name for name in files(config))
    assert report(config)["reason"].endswith("File too large")
    before = {path: (Path(config.output) / path).stat().st_ino for path in kept if "partial" not in path}

    with largest_file(60_000), pytest.raises(GaveUp, match="File too large"):  # for all units, not for a shard
        run(replace(config, shard_bytes=10**6, member_bytes=10**6))
    assert {path: (Path(config.output) / path).stat().st_ino for path in before} == before
    assert run(config) == 0
    whole = replace(config, output=str(tmp_path / "whole"))
    assert run(whole) == 0
    assert files(whole) == files(config)


@pytest.mark.usefixtures("processes")
def test_a_worker_that_dies_is_replaced(config: PrepConfig, tmp_path: Path) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(300)))
    whole = replace(config, output=str(tmp_path / "whole"))
    assert run(whole) == 0
    killed = threading.Event()

    def kill_the_first_worker() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()
        killed.set()

    threading.Thread(target=kill_the_first_worker, daemon=True).start()
    assert run(replace(config, workers=2)) == 0
    assert killed.is_set()
    assert files(config) == files(whole)
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("processes")
def test_a_unit_that_fails_is_named_and_the_others_are_kept(
    config: PrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(20)))
    write_jsonl(config, "b.jsonl", *map(text, range(20, 40)))
    whole = replace(config, output=str(tmp_path / "whole"))
    assert run(whole) == 0

    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import megatrain.data_prep.read.reader as reader\n"
        "def fail(unit, *_):\n"
        "    if unit[0].name == 'a.jsonl':\n"
        "        raise ZeroDivisionError('a bug')\n"
        "    return reader.read_unit(unit, *_)\n"
        "import megatrain.data_prep.units as units\n"
        "units.read_unit = fail\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
        with pytest.raises(
            GaveUp, match=r"preparing: . of .* failed, the first is a\.jsonl: ZeroDivisionError: a bug; "
        ):
            run(replace(config, retries=1))
    assert report(config)["failed_units"] == {"a.jsonl": "ZeroDivisionError: a bug"}
    assert any(path.startswith(".work/units/") for path in files(config))
    assert run(config) == 0
    assert files(config) == files(whole)


def test_a_file_that_changed_since_the_last_start_is_read_again(config: PrepConfig, tmp_path: Path) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(100)))
    with largest_file(40_000), pytest.raises(GaveUp, match="File too large"):  # for a shard: all units are done
        run(replace(config, shard_bytes=10**6, member_bytes=10**6))
    write_jsonl(config, "a.jsonl", text(0), text(2), text(1), *map(text, range(3, 100)))
    assert run(config) == 0
    found = [value for split in (TRAIN, HELD_OUT) for value, _ in documents(config, split)]
    assert sorted(found) == sorted(map(text, range(100)))
    whole = replace(config, output=str(tmp_path / "whole"))
    assert run(whole) == 0
    assert files(whole) == files(config)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("moment", ["write_lineage", "write_manifest held_out", "write_manifest train", "Report.write"])
def test_a_run_that_dies_while_it_commits(
    config: PrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool, moment: str
) -> None:
    """The next start makes the same set, whatever was committed already."""
    write_jsonl(config, "a.jsonl", *map(text, range(60)))
    more = replace(config, input=str(tmp_path / "more"), append=True, tokenizer=TokenizerConfig())
    Path(more.input or "").mkdir()
    write_jsonl(more, "b.jsonl", *map(text, range(60, 90)))
    for output in ("whole", "killed"):
        config.output = more.output = str(tmp_path / output)
        last = more if append else config
        if append:
            assert run(config) == 0
        if output == "killed":
            with monkeypatch.context() as patch:
                die_after(moment, patch)
                with pytest.raises(KeyboardInterrupt):
                    run(last)
            if moment != "Report.write":
                assert (Path(last.output) / ".work").exists()
        assert run(last) == 0
    whole, killed = (replace(config, output=str(tmp_path / name)) for name in ("whole", "killed"))
    assert files(killed) == files(whole)
    assert report(killed)["exit_code"] == 0


def die_after(moment: str, patch: pytest.MonkeyPatch) -> None:
    """Ends the run, as a kill would, after a call; "write_manifest train" is that of the train split."""
    name, _, split = moment.partition(" ")
    owner: Any = Report if name.startswith("Report") else pipeline
    attribute = name.rpartition(".")[2]
    original = getattr(owner, attribute)

    def dying(*arguments: Any) -> Any:
        result = original(*arguments)
        if not split or arguments[0].name == split:
            raise KeyboardInterrupt
        return result

    patch.setattr(owner, attribute, dying)
