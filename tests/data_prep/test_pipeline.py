"""`megatrain prep` from end to end: the documents come back, the bytes don't depend on who made them, and every way
the input, the output or the machine can be wrong ends in its exit code and one line."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from megatrain.compose import compose
from megatrain.data.format import HELD_OUT, TRAIN, open_set
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.deduplicate.config import ParagraphsConfig
from megatrain.data_prep.pipeline import run
from megatrain.data_prep.tokenizer import EOS
from megatrain.data_prep.tokenizer.config import TokenizerConfig
from megatrain.errors import GaveUp, InputError
from tests.data_prep.running import documents, files, report, text, write_jsonl


def test_documents_come_back_in_order_and_on_their_side(config: PrepConfig) -> None:
    folder = Path(config.input or "")
    (folder / "a.txt").write_text(text(0))
    write_jsonl(config, "b.jsonl", *(text(number) for number in range(1, 200)))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": f"with {EOS} inside", "url": "u", "lang": "en"}) + "\n")
    pq.write_table(pa.table({"text": [text(200), text(201)], "id": ["x", "y"]}), folder / "d.parquet")
    assert run(config) == 0

    written = [text(0), *map(text, range(1, 200)), f"with {EOS} inside", text(200), text(201)]
    held_out = [value for value in written if xxhash.xxh3_64_intdigest(value.encode()) < 0.1 * 2**64]
    trained = [value for value in written if value not in held_out]
    assert len(held_out) > 5
    found = documents(config, TRAIN)
    assert [value for value, _ in found] == trained
    assert [value for value, _ in documents(config, HELD_OUT)] == held_out
    rows = dict(found + documents(config, HELD_OUT))
    assert rows[text(200)] == {"id": "x", "url": None, "source": None, "language": None, "metadata": None}
    assert rows[f"with {EOS} inside"]["url"] == "u"
    assert rows[f"with {EOS} inside"]["metadata"] == '{"lang": "en"}'
    assert rows[f"with {EOS} inside"]["id"] == "c.jsonl.gz:0"

    opened = open_set(config.output)
    assert len(opened.manifest.shards) > 1
    assert opened.manifest.vocab_size == 400
    summary = report(config)
    assert (summary["exit_code"], summary["reason"], summary["files"]) == (0, None, 4)
    assert summary["documents"] == {TRAIN: len(trained), HELD_OUT: len(held_out)}
    assert summary["text_bytes"] == sum(len(value.encode()) for value in written)
    assert summary["tokens"][TRAIN] == opened.manifest.tokens
    assert summary["backend"] == "tiktoken"
    assert not (Path(config.output) / ".work").exists()


@pytest.mark.usefixtures("processes")
def test_bytes_depend_on_neither_workers_nor_units(config: PrepConfig, tmp_path: Path) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(300)))
    assert run(config) == 0
    two = replace(config, workers=2, output=str(tmp_path / "two"))
    assert run(two) == 0
    assert files(two) == files(config)
    # How many documents' ids are compared is a matter of units.
    whole = replace(config, unit_bytes=10**9, output=str(tmp_path / "whole"))
    assert run(whole) == 0
    different = {name for name, data in files(config).items() if files(whole).get(name) != data}
    assert different == {"train/manifest.json", "held_out/manifest.json"}


def test_a_tokenizer_trained_on_the_input(config: PrepConfig, tmp_path: Path) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(300)))
    config.tokenizer = TokenizerConfig(train=True, vocab_size=350)
    assert run(config) == 0
    found = documents(config, TRAIN) + documents(config, HELD_OUT)
    assert {value for value, _ in found} == set(map(text, range(300)))
    assert open_set(config.output).manifest.vocab_size == 350
    again = replace(config, output=str(tmp_path / "again"))
    assert run(again) == 0
    assert files(again) == files(config)


def test_a_vocabulary_above_uint16(config: PrepConfig, tokenizer: Path, tmp_path: Path) -> None:
    value = json.loads(tokenizer.read_bytes())
    value["model"]["vocab"] |= {f"Ā{number}": number for number in range(400, 65537)}
    config.tokenizer.path = str(tmp_path / "wide.json")
    Path(config.tokenizer.path).write_text(json.dumps(value))
    write_jsonl(config, "a.jsonl", text(1))
    assert run(replace(config, held_out_share=0.0)) == 0
    assert open_set(config.output).manifest.id_dtype == "uint32"
    assert [value for value, _ in documents(config, TRAIN)] == [text(1)]
    assert not (Path(config.output) / HELD_OUT).exists()


def test_source_and_language(config: PrepConfig) -> None:
    (Path(config.input or "") / "a.jsonl").write_text('{"text": "one", "source": "web"}\n{"text": "two"}\n')
    assert run(replace(config, source="books", language="en", held_out_share=0.0)) == 0
    found = documents(config, TRAIN)
    assert [(row["source"], row["language"]) for _, row in found] == [("web", "en"), ("books", "en")]
    entry = open_set(config.output).manifest.shards[0]
    assert (entry.source, entry.language) == (None, "en")


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_file_is_left_out_whole_and_named(config: PrepConfig, workers: int) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(20)))
    packed = gzip.compress("".join(json.dumps({"text": text(n)}) + "\n" for n in range(20, 200)).encode())
    (Path(config.input or "") / "b.jsonl.gz").write_bytes(packed[:-20])
    (Path(config.input or "") / "c.parquet").write_bytes(b"PAR1")
    write_jsonl(config, "d.jsonl", *map(text, range(200, 220)))
    assert run(replace(config, workers=workers, held_out_share=0.0)) == 3
    assert [value for value, _ in documents(config, TRAIN)] == [*map(text, range(20)), *map(text, range(200, 220))]
    found = report(config)
    assert found["exit_code"] == 3
    assert set(found["broken_files"]) == {"b.jsonl.gz", "c.parquet"}
    assert found["reason"] == "2 broken file(s) left out, the first is b.jsonl.gz: Truncated compressed stream"


def test_bad_records_are_counted_and_too_many_are_an_end(config: PrepConfig, tmp_path: Path) -> None:
    write_jsonl(config, "a.jsonl", text(0), "", text(1), 5, text(2))
    (Path(config.input or "") / "b.txt").write_bytes(b"\xff\xfe")
    (Path(config.input or "") / "c.txt").touch()
    assert run(replace(config, held_out_share=0.0, max_bad_share=0.6)) == 0
    found = report(config)
    assert found["problems"] == {"a.jsonl": {"empty": 1, "no_text": 1}, "b.txt": {"not_utf8": 1}, "c.txt": {"empty": 1}}
    second = (Path(config.input or "") / "a.jsonl").read_text().index("\n") + 1
    assert found["first_problem"]["empty"] == f"a.jsonl:{second}"

    strict = replace(config, held_out_share=0.0, max_bad_share=0.5, output=str(tmp_path / "strict"))
    assert run(strict) == 3
    assert len(documents(strict, TRAIN)) == 3
    assert report(strict)["reason"].startswith(
        "4 of 7 records are bad, above max_bad_share=0.5; first empty at a.jsonl:"
    )


def test_no_usable_document(config: PrepConfig) -> None:
    write_jsonl(config, "a.jsonl", "", " ")
    with pytest.raises(GaveUp, match=r"no usable document to train on; 2 of 2 records are bad"):
        run(config)
    assert report(config)["exit_code"] == 3
    with pytest.raises(InputError):
        open_set(config.output)


def test_a_finished_set_is_not_touched(config: PrepConfig) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(30)))
    assert run(config) == 0
    before = files(config)
    with pytest.raises(InputError, match=r"output=.*: already holds a finished set"):
        run(config)
    assert files(config) == before


def test_other_peoples_files_are_not_touched(config: PrepConfig) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(30)))
    (Path(config.output) / "train").mkdir(parents=True)
    (Path(config.output) / "train" / "mine").touch()
    with pytest.raises(InputError, match=r"output=.*: holds other files"):
        run(config)
    assert list(files(config)) == ["train/mine"]
    with pytest.raises(InputError, match=r"output=.*a\.jsonl: a file"):
        run(replace(config, output=str(Path(config.input or "") / "a.jsonl")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": TokenizerConfig()}, "tokenizer.path=None: give this or tokenizer.train=true, not both"),
        ({"held_out_share": 1.0}, "held_out_share=1.0: at least 0 and below 1"),
        ({"max_bad_share": 2.0}, "max_bad_share=2.0: from 0 to 1"),
        ({"workers": 0}, "workers=0: at least 1"),
        ({"unit_bytes": 0}, "unit_bytes=0: at least 1"),
        ({"tokenizer": TokenizerConfig(path="none.json")}, "tokenizer.path=none.json: No such file or directory"),
        ({"tokenizer": TokenizerConfig(train=True, vocab_size=9999)}, "tokenizer.vocab_size=9999: the text has only"),
    ],
)
def test_bad_keys_end_before_anything_is_written(config: PrepConfig, change: dict[str, Any], message: str) -> None:
    write_jsonl(config, "a.jsonl", text(0))
    with pytest.raises(InputError) as error:
        run(replace(config, **change))
    assert str(error.value).startswith(message)
    assert not Path(config.output).exists()


def test_a_set_is_added_to(config: PrepConfig, tmp_path: Path) -> None:
    write_jsonl(config, "a.jsonl", *map(text, range(100)))
    assert run(config) == 0
    before = files(config)
    more = replace(config, input=str(tmp_path / "more"), append=True, tokenizer=TokenizerConfig())
    Path(more.input or "").mkdir()
    write_jsonl(more, "b.jsonl", *map(text, range(100, 150)))
    assert run(more) == 0
    after = files(more)
    changed = {"train/manifest.json", "held_out/manifest.json", "lineage.json"}
    assert all(after[name] == data for name, data in before.items() if name not in changed)
    written = [value for split in (TRAIN, HELD_OUT) for value, _ in documents(more, split)]
    assert sorted(written) == sorted(map(text, range(150)))
    assert len(json.loads(after["lineage.json"])) == 2

    with pytest.raises(InputError, match="append=true: the set has this input already"):
        run(more)
    assert files(more) == after
    with pytest.raises(InputError, match=r"append=True: output=.* holds no finished set to append to"):
        run(replace(more, output=str(tmp_path / "none")))


def test_several_inputs(config: PrepConfig, tmp_path: Path) -> None:
    write_jsonl(config, "a.jsonl", text(0), text(1))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text(text(2))
    inputs = {"web": config.input or "", "books": str(tmp_path / "books")}
    assert run(replace(config, input=None, inputs=inputs, held_out_share=0.0)) == 0
    found = [(value, row["source"]) for value, row in documents(config, TRAIN)]
    assert found == [(text(0), "web"), (text(1), "web"), (text(2), "books")]
    with pytest.raises(InputError, match=r"input=.*: give this or inputs\.NAME=\.\.\., not both"):
        run(replace(config, inputs=inputs))


def test_every_key_can_be_given_on_the_command_line() -> None:
    arguments = ["input=in", "output=out", "tokenizer.vocab_size=9", "columns.text=content", "workers=3"]
    composed = compose("prep", arguments)
    assert isinstance(composed, PrepConfig)
    assert (composed.tokenizer.vocab_size, composed.columns.text, composed.workers) == (9, "content", 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_there_twice_is_left_out(config: PrepConfig, workers: int) -> None:
    """The first in the order of the input stays, of documents and of lines, whatever unit it is in."""
    one, two, three, four = (f"document {number} has but one line, and that line is its own" for number in range(4))
    line = "a line of more than twenty characters that several documents have"
    write_jsonl(config, "a.jsonl", one, two, f"{three}\n{line}")
    write_jsonl(config, "b.jsonl", two.replace(" ", "  "), f"{line}\n{four}", one, line)
    wanted = replace(config, workers=workers, unit_bytes=100, held_out_share=0.0)
    wanted.deduplicate.exact = True
    wanted.deduplicate.paragraphs = ParagraphsConfig(enabled=True, min_characters=20, min_left_characters=20)
    assert run(wanted) == 0
    assert [value for value, _ in documents(wanted, TRAIN)] == [one, two, f"{three}\n{line}", four]
    found = report(wanted)
    assert found["duplicates"]["exact"] == 2
    pairs = [(example["kept_text"], example["dropped_text"]) for example in found["duplicates"]["examples"]]
    assert sorted(pairs) == [(one, one), (two, two.replace(" ", "  "))]
    dropped = found["steps"]["dropped"]
    assert dropped["duplicates"]["exact"]["documents"] == 2
    assert dropped["paragraphs"]["little_left"]["documents"] == 1
    assert found["steps"]["changed"]["paragraphs"]["repeated_lines"]["documents"] == 1
    assert (found["records"], found["documents"]) == (7, {TRAIN: 4, HELD_OUT: 0})
