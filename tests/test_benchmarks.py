"""Benchmarks: a real one at a tiny size, the JSON they write, the exit code."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import checkpoint, common, corpus, loader, loader_peers, packing, prep, prep_peers
from megatrain import objectives
from megatrain.batch import Batch
from megatrain.config import ObjectiveConfig
from tests.data.sets import EOS, row, write_set


@pytest.mark.parametrize(("value", "code"), [(0.9, 0), (0.7, 1)])
def test_a_bar_that_does_not_hold_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, code: int
) -> None:
    def measure(arguments: argparse.Namespace) -> common.Result:
        rows = [common.row("ours", [1.0, 3.0, 2.0], [1.0], "MB/s")]
        return common.Result(rows, [common.Bar("speed", value, 0.8), common.Bar("size", arguments.size, 4)])

    file = tmp_path / "result.json"
    assert common.main("A benchmark", measure, ["--json", str(file)], size=4) == code
    written = json.loads(file.read_text())
    assert set(written) == {"machine", "versions", "rows", "bars"}
    assert written["rows"] == [{"contender": "ours", "MB/s": 2.0, "lowest": 1.0, "highest": 3.0, "ratio": 2.0}]
    assert written["bars"] == [
        {"name": "speed", "value": value, "target": 0.8, "holds": code == 0},
        {"name": "size", "value": 4, "target": 4, "holds": True},
    ]
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["torch"] == torch.__version__
    assert ("DOESN'T HOLD" in capsys.readouterr().out) == (code == 1)


def test_contenders_take_turns() -> None:
    order = []

    def contender(name: str) -> float:
        order.append(name)
        return float(len(order))

    rates = common.take_turns({"a": lambda: contender("a"), "b": lambda: contender("b")}, rounds=2)
    assert order == ["a", "b", "a", "b"]
    assert rates == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


def test_the_loader_is_measured_at_both_lengths(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    code = common.main("", loader.measure, ["--json", str(file), "--rounds", "1"], tokens=200_000, rounds=5, steps=3)
    written = json.loads(file.read_text())
    assert code == (0 if all(bar["holds"] for bar in written["bars"]) else 1)
    contenders = [peer.name for peer in loader_peers.PEERS if peer.installed] + ["megatrain"]
    expected = [(length, work, name) for length in (512, 2048) for work in ("ids", "batch") for name in contenders]
    assert [(row["S"], row["work"], row["contender"]) for row in written["rows"]] == expected
    assert all(row["Mtok/s"] > 0 for row in written["rows"])


@pytest.mark.parametrize("work", loader.WORKS)
def test_readers_read_the_same_tokens(tmp_path: Path, work: str) -> None:
    """No contender is fast by reading less: up to the ends of members, blocks and units, all give all tokens."""
    shards = loader.make_set(tmp_path / "set", 300_000)
    ids = row(shards)[0].astype(np.uint16)
    amounts = [loader.read_ours(tmp_path / "set", 512, work)]
    for number, peer in enumerate(loader_peers.PEERS):
        if peer.installed:
            (tmp_path / str(number)).mkdir()
            peer.write(ids, tmp_path / str(number), 512)
            amounts.append(loader.read_peer(peer, tmp_path / str(number), 512, work))
    assert amounts == pytest.approx([shards.manifest.tokens / 1e6] * len(amounts), abs=512 * 3 / 1e6)


def test_peers_make_the_batches_of_the_loader(tmp_path: Path) -> None:
    """Targets, positions and masks too, in whatever order."""
    shards = loader.make_set(tmp_path / "set", 100_000)
    ids = row(shards)[0].astype(np.uint16)
    peer = loader_peers.PEERS[0]
    peer.write(ids, tmp_path, 512)
    objective = objectives.build(ObjectiveConfig(), document_mask=True)

    def rows(batch: Batch) -> set[tuple[int, ...]]:
        parts = torch.cat([batch.input_ids, batch.targets, batch.positions, batch.start], dim=1)
        return {tuple(row) for row in parts.tolist()}

    peers = [rows(loader_peers.to_batch(each, EOS, objective)) for each in peer.read(tmp_path, 512, 64)]
    with loader.open_loader(tmp_path / "set", 512, max_epochs=1.0) as opened:
        ours = [rows(batch) for step in opened for batch in step.micro_batches]
    assert set().union(*peers) <= set().union(*ours)
    assert len(set().union(*peers)) == (len(ids) - 1) // 512


@pytest.mark.long
def test_prep_and_its_peers_make_the_same_tokens(tmp_path: Path) -> None:
    texts = [text[:2000] for text in prep.documents("", 1)[:300]]
    prep.write_vocabulary(tmp_path, texts, 400)
    assert prep.write_text(tmp_path, texts, 1) > 0.1
    written = set()
    for each in prep_peers.contenders(tmp_path):
        if each.name in (prep_peers.PREP, prep_peers.ALONE, prep_peers.MEGATRON, prep_peers.DATATROVE[0]):
            cost = prep.cost(each.command(tmp_path, tmp_path / each.name))
            assert cost.cpu_seconds > 0.1
            assert cost.peak_bytes > 2e7
            found = prep.inspect(each, tmp_path / each.name)
            assert 2 <= found.bytes_a_token < 2.5
            written.add((found.digest, found.tokens))
    assert len(written) == 1


@pytest.mark.parametrize(
    ("package", "place", "language"),
    [
        ("libreoffice-help-zh-cn", "usr/share/libreoffice/help/zh-CN/a.html", "zh"),
        ("gnome-user-docs", "usr/share/help/pt_BR/a.page", "pt"),
        ("debian-handbook", "usr/share/doc/debian-handbook/html/ja-JP/a.html", "ja"),
        ("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/html/fb/a.html", "en"),
        ("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/Documentation/translations/it_IT/a.rst.gz", "it"),
    ],
)
def test_the_language_of_a_page(package: str, place: str, language: str) -> None:
    assert corpus.language(package, place) == language


def test_a_manual_page_without_its_macros(tmp_path: Path) -> None:
    path = tmp_path / "man" / "cp.1.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b'.\\" a comment\n.SH NAME\ncp \\- \\fBcopy\\fR files\n'))
    assert corpus.page_text(path) == "NAME\ncp - copy files"


def test_a_contender_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="a reason"):
        prep.cost([sys.executable, "-c", "raise SystemExit('a reason')"])


def test_only_concatenation_cuts_documents_that_fit(tmp_path: Path) -> None:
    write_set(tmp_path, [[[50] * 60]])
    result = packing.measure(argparse.Namespace(set=str(tmp_path), rounds=1, megabytes=0))
    assert [(row["S"], row["packing"], row["samples"]) for row in result.rows[:2]] == [
        (2048, "concat", 2),
        (2048, "best_fit", 2),
    ]
    # Of 60 documents the 41st lies across the end of the first window; 40 of 50 ids fit into 2049 places.
    assert [row["cut %"] for row in result.rows] == [round(100 / 60, 2), 0, *[0] * 6]
    assert [row["padded %"] for row in result.rows[:2]] == [
        round(100 * (1 - 2999 / 4096), 3),
        round(100 * (1 - 2998 / 4096), 3),
    ]
    assert not list(tmp_path.glob("**/*.index"))


@pytest.mark.distributed
def test_checkpoints_of_both_are_written_read_and_timed(tmp_path: Path) -> None:
    arguments = argparse.Namespace(hidden_size=32, rounds=1, folder=str(tmp_path))
    result = checkpoint.measure(arguments)
    assert [(row["operation"], row["contender"]) for row in result.rows] == [
        ("save", "plain writes"),
        ("save", "megatrain"),
        ("save", "DCP"),
        ("begin to save", "megatrain"),
        ("begin to save", "DCP"),
        ("load", "megatrain"),
        ("load", "DCP"),
        ("begin to save", "megatrain, first"),
    ]
    assert all(float(row["GB/s"]) > 0 for row in result.rows)
    assert len(result.bars) == 5
    (read,) = (bar for bar in result.bars if "bytes read" in bar.name)
    assert read.holds
    assert list(tmp_path.iterdir()) == []
