"""Finished sets become one."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatrain.data.format import HELD_OUT, TRAIN, open_set
from megatrain.data_prep import merge
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.merge_config import MergeConfig
from megatrain.data_prep.pipeline import run
from megatrain.errors import InputError
from tests.data_prep.running import documents, text, write_jsonl


def test_finished_sets_become_one(config: PrepConfig, tmp_path: Path) -> None:
    texts = [*map(text, range(90))]
    for name, own in (("a", texts[:60]), ("b", texts[60:])):
        write_jsonl(config, f"{name}.jsonl", *own)
        wanted = replace(config, input=f"{config.input}/{name}.jsonl", source=name, output=str(tmp_path / name))
        assert run(wanted) == 0
    merged = replace(config, output=str(tmp_path / "merged"))
    sets = [str(tmp_path / name) for name in "ab"]
    assert merge.run(MergeConfig(sets=sets, output=merged.output)) == 0
    found = [value for split in (TRAIN, HELD_OUT) for value, _ in documents(merged, split)]
    assert sorted(found) == sorted(texts)
    manifest = open_set(merged.output).manifest
    assert [(source, count) for source, _, count, _ in manifest.counts] == [
        (name, open_set(tmp_path / name).manifest.documents) for name in "ab"
    ]
    tars = list((tmp_path / "merged" / "train").glob("*.tar"))
    assert all(path.stat().st_nlink == 2 for path in tars)
    assert len(tars) == sum(len(open_set(each).manifest.shards) for each in sets)
    for wrong, message in (
        (MergeConfig(sets, merged.output), "output=.*: is there already"),
        (MergeConfig(sets[:1], "new"), "sets=.*: give two or more folders"),
        (MergeConfig([sets[0], config.input or ""], "new"), "sets=.*: holds no finished set"),
    ):
        with pytest.raises(InputError, match=message):
            merge.run(wrong)
    assert not Path("new").exists()
