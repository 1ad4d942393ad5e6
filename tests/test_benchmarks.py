"""Benchmarks: a real one at a tiny size, the JSON they write, the exit code."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import block, block_peers, checkpoint, common, corpus, loader, loader_peers, packing, prep, prep_peers
from megatrain import objectives
from megatrain.batch import Batch
from megatrain.config import ModelConfig, ObjectiveConfig
from tests import samples
from tests.data.sets import EOS, row, write_set

aten = torch.ops.aten


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


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: x.view(32).unsqueeze(0), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch.zeros_like(x), 2 * 128),
        (lambda x: x.add_(1), 2 * 128),
        (lambda x: x.copy_(x[:1].bfloat16().expand(4, 8)), (32 + 16) + (128 + 16 + 128)),
        (lambda x: x + x[:, :2].sum(), (32 + 4) + (128 + 4 + 128)),
        (lambda x: torch.cat([x, x]).chunk(2), 128 + 128 + 256),
    ],
)
def test_bytes_of_an_operation(operation: Callable[[Tensor], object], expected: int) -> None:
    with FakeTensorMode(), block.Traffic() as traffic:
        operation(torch.empty(4, 8))
    assert traffic.bytes.total() == expected


def test_what_a_layer_costs() -> None:
    """Of x W^T * table and its exponential, whose result is what its gradient needs."""

    def make(config: ModelConfig, length: int) -> block_peers.Block:
        layer = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False, dtype=block_peers.DTYPE)
        table = torch.zeros(length, config.hidden_size, dtype=block_peers.DTYPE)
        return block_peers.Block(layer, lambda x: (layer(x) * table).exp(), [table])

    cost = block.cost(make, samples.MODEL, length=8)
    weight, rows = (2 * size * samples.MODEL.hidden_size for size in (samples.MODEL.hidden_size, 8))
    assert cost.traffic.calls == {aten.mm.default: 3, aten.mul.Tensor: 3, aten.exp.default: 1}
    assert cost.traffic.bytes == {
        aten.mm.default: 3 * (weight + 2 * rows),
        aten.mul.Tensor: 3 * (3 * rows),
        aten.exp.default: 2 * rows,
    }
    assert cost.bytes_without_products == 11 * rows
    assert (cost.saved, cost.saved_with_input) == (rows, 2 * rows)


def test_one_norm_is_one_operation_as_on_cuda() -> None:
    def calls() -> list[str]:
        x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(8)
        with block.Traffic() as traffic:
            torch.autograd.grad(F.rms_norm(x, (8,), weight, 1e-5), x, torch.ones(2, 8))
        return [str(operation) for operation in traffic.calls if "ones" not in str(operation)]

    with block.as_on_cuda():
        assert calls() == ["aten._fused_rms_norm.default", "aten._fused_rms_norm_backward.default"]
    assert len(calls()) > 2


def test_a_layer_of_llama_against_that_of_transformers(tmp_path: Path) -> None:
    arguments = argparse.Namespace(model="llama_7b", sequence_length=4096, peers=str(tmp_path))
    result = block.measure(arguments)
    assert all(bar.holds for bar in result.bars)
    amounts = {(row["what"], row["contender"]): row["amount"] for row in result.rows}
    hidden, intermediate = (2 * 4096 * width / 1e9 for width in (4096, 11008))
    # Each norm's input in fp32, its output before and after the weight; q, k, v, what attention gives; the MLP's four.
    expected = 2 * (2 + 1 + 1) * hidden + 4 * hidden + 4 * intermediate
    assert amounts["GB saved", block_peers.TRANSFORMERS] == pytest.approx(expected, rel=2e-3)
    # Norms' outputs, qkv, what attention gives, the residual stream between; gate and up.
    assert amounts["GB saved", block_peers.OURS] == pytest.approx(7 * hidden + 2 * intermediate, rel=2e-3)


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
