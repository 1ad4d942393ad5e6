from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megatrain.command_config import ReportConfig
from megatrain.compose import plain
from megatrain.config import ModelConfig, TrainConfig
from megatrain.errors import InputError
from megatrain.observe.events import EventLog
from megatrain.observe.records import Record
from megatrain.observe.report import run, smooth, thin
from megatrain.observe.sinks import JsonlSink
from megatrain.resilience.outcome import write_outcome

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_run(folder: Path, steps: int = 40) -> Path:
    """A run directory of a run that was stopped at step 20 and went on; its names and reasons mean ill."""
    folder.mkdir()
    config = TrainConfig(run_dir=str(folder), max_steps=50, global_batch_size=16, sequence_length=128)
    config.model = ModelConfig(
        name=HOSTILE,
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
        tie_embeddings=True,
    )
    config.logger.wandb.tags = [HOSTILE]
    OmegaConf.save(OmegaConf.create(plain(config) | {"api_key": "hush"}), folder / "config.yaml")
    metrics, events = JsonlSink(folder / "metrics.jsonl", 0), EventLog(folder / "events.jsonl")
    events.write("start", 0, world_size=2, device="cpu", versions={"torch": "2.13.0"})
    for step in range(1, steps + 1):
        loss = math.nan if step == 7 else 8.0 - step / 10
        record: Record = {"step": step, "tokens": 2048 * step, "loss": loss, "grad_norm": 1.5}
        record |= {"learning_rate": 1e-3 * step, "step_seconds": 2.0}
        record |= {"tokens_per_second": 1000.0 + step, "data_wait_seconds": 0.001}
        metrics.write(record)
        if step == 20:
            metrics.write({"step": step, "held_out_loss": math.log(50.0)})
            events.write("save", step)
            events.write("stop", step, reason=HOSTILE)
            events.write("resume", step, world_size=4, device="cpu", versions={"torch": "2.13.0"})
    write_outcome(folder, 75, "stopped by SIGTERM", steps, rank=0)
    return folder


def charts_of(page: str) -> list[dict[str, Any]]:
    """The charts that the page's script draws."""
    line = next(line for line in page.splitlines() if line.startswith("const charts = "))
    charts: list[dict[str, Any]] = json.loads(line.removeprefix("const charts = ").removesuffix(";"))
    return charts


def test_the_page_holds_the_points_the_summary_and_the_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    assert run(ReportConfig(run_dir=str(folder))) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    page = (folder / "report.html").read_text()
    charts = {chart["title"]: chart for chart in charts_of(page)}
    loss = {curve["name"]: curve for curve in charts["Loss"]["curves"]}
    steps = list(range(1, 41))
    assert loss["each step"]["x"] == steps
    assert loss["each step"]["y"] == [None if step == 7 else 8.0 - step / 10 for step in steps]
    assert (loss["held out"]["x"], loss["held out"]["y"]) == ([20], [math.log(50.0)])
    assert charts["Learning rate"]["curves"][0]["y"] == [1e-3 * step for step in steps]
    assert {kind: [mark[0] for mark in marks] for kind, marks in charts["Loss"]["marks"].items()} == {
        "save": [20],
        "stop": [20],
        "resume": [20],
    }
    rows = dict(
        row.split("</th><td>")[0:2]
        for row in page.replace('<tr><th scope="row">', "\n>").replace("</td></tr>", "\n").splitlines()
        if "</th><td>" in row
    )
    assert rows[">Status"] == "stopped by SIGTERM (exit code 75)"
    assert rows[">Steps"] == "40 of 50"
    assert rows[">Tokens"] == "81,920"
    assert rows[">Loss at start"] == "7.9000"
    assert rows[">Loss at end"] == "4.9500 (mean of the last 20 steps)"
    assert rows[">Steps without a finite loss"] == "1"
    assert rows[">Held-out perplexity"] == "50.00 (loss 3.9120 at step 20)"
    assert rows[">Tokens per second"] == "1,020 (median)"
    assert rows[">Time in steps"] == "0:01:20"
    assert rows[">Layout"] == "4 processes, cpu, deepspeed ZeRO-3"


def test_the_page_needs_no_network_and_what_others_wrote_stays_text(tmp_path: Path) -> None:
    page_file = tmp_path / "page.html"
    assert run(ReportConfig(run_dir=str(write_run(tmp_path / "run")), output=str(page_file))) == 0
    page = page_file.read_text()
    before, script, after = page.partition("<script>/**")
    library, ending, drawing = after.partition("</script>")
    assert (script, ending) == ("<script>/**", "</script>")
    assert len(library) > 1_000_000
    ours = before + drawing
    # Neither what is loaded nor what runs comes from anywhere else; hostile text is only there escaped.
    assert "http" not in ours
    assert "src=" not in ours.replace("src=x", "")
    assert "<img" not in ours
    assert ours.count("<script>") == 1
    assert ours.count("</script>") == 1
    assert "&lt;img src=x onerror=alert(2)&gt;" in before
    assert "hush" not in page
    # Plotly reads a markup of its own in what it shows: there too the text stays text.
    mark = charts_of(page)[0]["marks"]["stop"][0][1]
    assert "&lt;img" in mark
    assert "<img" not in mark


def test_a_run_directory_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run_dir=.*missing: no such folder"):
        run(ReportConfig(run_dir=str(tmp_path / "missing")))
    with pytest.raises(InputError, match=r"no config\.yaml in it"):
        run(ReportConfig(run_dir=str(tmp_path)))
    folder = write_run(tmp_path / "run", steps=0)
    with pytest.raises(InputError, match=r"metrics\.jsonl holds no step yet"):
        run(ReportConfig(run_dir=str(folder)))
    folder = write_run(tmp_path / "other", steps=1)
    with pytest.raises(InputError, match=r"output=.*nowhere/page\.html: the folder .* doesn't exist"):
        run(ReportConfig(run_dir=str(folder), output=str(tmp_path / "nowhere/page.html")))


CURVES = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=300)


@settings(deadline=None, max_examples=60)
@given(values=CURVES, buckets=st.integers(1, 20))
def test_thinning_keeps_the_order_the_lowest_and_the_highest(values: list[float | None], buckets: int) -> None:
    steps, kept = thin(range(1, len(values) + 1), values, buckets)
    assert len(steps) <= 2 * buckets or len(values) <= 2 * buckets
    assert steps == sorted(set(steps))
    assert kept == [values[step - 1] for step in steps]
    finite, left = [v for v in values if v is not None], [v for v in kept if v is not None]
    assert (min(finite, default=0), max(finite, default=0)) == (min(left, default=0), max(left, default=0))


@settings(deadline=None, max_examples=60)
@given(values=CURVES, reach=st.integers(0, 10))
def test_smoothing_is_the_mean_of_the_neighbours(values: list[float | None], reach: int) -> None:
    smoothed = smooth(values, reach)
    for i, value in enumerate(smoothed):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if v is not None]
        assert (value is None) == (values[i] is None)
        assert value is None or value == pytest.approx(sum(near) / len(near), rel=1e-6, abs=1e-3)
