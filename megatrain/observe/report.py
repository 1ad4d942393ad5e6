"""`megatrain report run_dir=DIR`: one HTML page of a run that needs no network and no other file.

Design choices:
- plotly.js is inlined whole, as its wheel has it: 4.8 MB, which is what a page that opens anywhere costs. All else is
  small: a curve has at most 2 * BUCKETS points, the lowest and the highest of each bucket, so that no spike is lost.
- Smoothing happens before thinning, over all steps.
- What the page shows was written by others (names, paths, reasons): Jinja escapes it as HTML, `tojson` inside the
  script, and Plotly's own markup is escaped before it gets there.
"""

from __future__ import annotations

import html
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf
from plotly.offline import get_plotlyjs

from megatrain.command_config import ReportConfig
from megatrain.config import ModelConfig
from megatrain.errors import DONE, bad_value
from megatrain.model.spec import parameter_count
from megatrain.observe.records import Record, read, without_secrets
from megatrain.observe.sinks import duration
from megatrain.resilience.files import write_whole
from megatrain.resilience.outcome import Outcome, read_outcome

BUCKETS = 1000
"""Stretches of steps that a curve is thinned to."""
LAST = 20
"""Steps that the loss at the end is the mean of."""


@dataclass
class Run:
    """What a run directory says, as far as the report shows it."""

    folder: Path
    config: dict[str, Any]
    steps: list[Record]
    evaluations: list[Record]
    events: list[dict[str, Any]]
    outcome: Outcome | None


@dataclass
class Curve:
    """A line of a chart. style: raw, smooth, or points."""

    name: str
    style: str
    x: list[int]
    y: list[float | None]


@dataclass
class Chart:
    """A chart over steps; form is the d3 format of its values."""

    title: str
    form: str
    curves: list[Curve]
    log: bool = False
    marks: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


def run(config: ReportConfig) -> int:
    """Writes the page; the exit code. Raises InputError for a run directory that holds no metrics."""
    loaded = load(Path(config.run_dir))
    output = Path(config.output) if config.output else loaded.folder / "report.html"
    if not output.parent.is_dir():
        raise bad_value("output", output, f"the folder {output.parent} doesn't exist")
    write_whole(output, page(loaded).encode())
    print(output)
    return DONE


def load(folder: Path) -> Run:
    """Reads a run directory. Raises InputError where it isn't one or no step was written yet."""
    if not folder.is_dir():
        raise bad_value("run_dir", folder, "no such folder")
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise bad_value("run_dir", folder, "no config.yaml in it, so it isn't a run directory")
    records = list(read(folder / "metrics.jsonl"))
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise bad_value("run_dir", folder, "its metrics.jsonl holds no step yet")
    config = without_secrets(OmegaConf.to_container(OmegaConf.load(config_file)))
    return Run(
        folder=folder,
        config=config,
        steps=steps,
        evaluations=[record for record in records if "held_out_loss" in record],
        events=[dict(event) for event in read(folder / "events.jsonl")],
        outcome=read_outcome(folder),
    )


def page(run: Run) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    events = [event for event in run.events if event["event"] != "save"]
    return environment.get_template("report.html.jinja").render(
        name=run.folder.resolve().name,
        summary=summary(run),
        charts=[asdict(chart) for chart in charts(run)],
        events=[(event["step"], _when(event), event["event"], _details(event)) for event in events],
        saves=len(run.events) - len(events),
        config=OmegaConf.to_yaml(OmegaConf.create(run.config)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=get_plotlyjs(),
    )


def charts(run: Run) -> list[Chart]:
    """What is drawn, the loss first."""
    loss = Chart("Loss", ".4f", _raw_and_smooth(run.steps, "loss"), marks=_marks(run.events))
    if run.evaluations:
        loss.curves.append(Curve("held out", "points", *_points(run.evaluations, "held_out_loss")))
    return [
        loss,
        Chart("Gradient norm, before clipping", ".3f", _raw_and_smooth(run.steps, "grad_norm"), log=True),
        Chart("Learning rate", ".2e", [Curve("learning rate", "smooth", *_points(run.steps, "learning_rate"))]),
        Chart("Tokens per second", ",.0f", _raw_and_smooth(run.steps, "tokens_per_second")),
        Chart("Waiting for data, seconds a step", ".4f", _raw_and_smooth(run.steps, "data_wait_seconds")),
    ]


def summary(run: Run) -> list[tuple[str, str]]:
    """The table at the top: what, and its value."""
    started: dict[str, Any] = next((event for event in reversed(run.events) if "world_size" in event), {})
    config, last = run.config, run.steps[-1]
    batch = f"{config['global_batch_size']:,} samples of {config['sequence_length']:,} tokens"
    return [
        ("Status", _status(run.outcome)),
        ("Model", _model(config["model"])),
        ("Steps", f"{last['step']:,} of {config['max_steps']:,}"),
        ("Tokens", f"{last['tokens']:,}"),
        *_results(run),
        ("Layout", _layout(config, started)),
        ("Batch", f"{batch}, {config['micro_batch_size']:,} a micro-batch, {config['precision']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in started.get("versions", {}).items())),
    ]


def _results(run: Run) -> Iterator[tuple[str, str]]:
    """The rows of the table that come from the metrics."""
    if losses := _numbers(run.steps, "loss"):
        end = losses[-LAST:]
        yield "Loss at start", f"{losses[0]:.4f}"
        yield "Loss at end", f"{statistics.fmean(end):.4f} (mean of the last {len(end)} steps)"
    if len(losses) < len(run.steps):
        yield "Steps without a finite loss", f"{len(run.steps) - len(losses):,}"
    if evaluated := [record for record in run.evaluations if _number(record, "held_out_loss") is not None]:
        loss = _numbers(evaluated, "held_out_loss")[-1]
        perplexity = math.exp(min(loss, 700.0))
        yield "Held-out perplexity", f"{perplexity:,.2f} (loss {loss:.4f} at step {evaluated[-1]['step']})"
    if rates := _numbers(run.steps, "tokens_per_second"):
        yield "Tokens per second", f"{statistics.median(rates):,.0f} (median)"
    yield "Time in steps", duration(sum(_numbers(run.steps, "step_seconds")))


def _status(outcome: Outcome | None) -> str:
    """How the run ended."""
    return f"{outcome.reason} (exit code {outcome.exit_code})" if outcome else "no outcome.json: running, or killed"


def _model(config: dict[str, Any]) -> str:
    """The name of a model, and its size."""
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config))
    assert isinstance(model, ModelConfig)
    return f"{model.name}, {parameter_count(model):,} parameters"


def _layout(config: dict[str, Any], started: dict[str, Any]) -> str:
    """Processes, device, engine, and the parallel dimensions that are more than 1."""
    engine = config["engine"]
    parts = [f"{started['world_size']} processes"] if "world_size" in started else []
    parts += [str(started["device"])] if "device" in started else []
    sharding = f"ZeRO-{engine['zero_stage']}" if "zero_stage" in engine else f"shard={engine['shard']}"
    parts.append(f"{engine['name']} {sharding}")
    parts += [f"{name} {size}" for name, size in config["parallel"].items() if isinstance(size, int) and size > 1]
    return ", ".join(parts)


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    """The finite values of a metric."""
    return [value for record in records if (value := _number(record, name)) is not None]


def _number(record: Record, name: str) -> float | None:
    """A metric of a record; None where it is missing or not finite."""
    value = record.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _points(records: Sequence[Record], name: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of a metric, thinned."""
    return thin([int(record["step"] or 0) for record in records], [_number(record, name) for record in records])


def _raw_and_smooth(records: Sequence[Record], name: str) -> list[Curve]:
    """A metric as it is and smoothed."""
    steps = [int(record["step"] or 0) for record in records]
    values = [_number(record, name) for record in records]
    return [
        Curve("each step", "raw", *thin(steps, values)),
        Curve("smoothed", "smooth", *thin(steps, smooth(values, reach=max(2, len(values) // 80)))),
    ]


def smooth(values: Sequence[float | None], reach: int) -> list[float | None]:
    """The mean over up to `reach` values to each side, so a slope isn't shifted. Gaps aren't counted, and stay."""
    sums = list(itertools.accumulate((value or 0.0 for value in values), initial=0.0))
    counts = list(itertools.accumulate((value is not None for value in values), initial=0))
    out: list[float | None] = []
    for i, value in enumerate(values):
        begin, end = max(0, i - reach), min(len(values), i + reach + 1)
        out.append(None if value is None else (sums[end] - sums[begin]) / (counts[end] - counts[begin]))
    return out


def thin(
    steps: Sequence[int], values: Sequence[float | None], buckets: int = BUCKETS
) -> tuple[list[int], list[float | None]]:
    """At most 2 * buckets points of a curve, in order: the lowest and the highest of each bucket, gaps left out
    where the bucket has any value."""
    if len(steps) <= 2 * buckets:
        return list(steps), list(values)
    kept: list[int] = []
    for bucket in range(buckets):
        inside = range(bucket * len(steps) // buckets, (bucket + 1) * len(steps) // buckets)
        filled = [(value, i) for i in inside if (value := values[i]) is not None]
        kept += sorted({min(filled)[1], max(filled)[1]}) if filled else [inside[0]]
    return [steps[i] for i in kept], [values[i] for i in kept]


def _marks(events: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, str]]]:
    """The events to mark on a curve: by kind, the step and what the pointer shows there, in Plotly's markup."""
    marks: dict[str, list[tuple[int, str]]] = {}
    for event in events:
        if event["event"] != "start":
            text = f"{event['event']} at step {event['step']}\n{_when(event)}\n{_details(event)}".strip()
            line = "<br>".join(html.escape(part) for part in text.splitlines())
            marks.setdefault(str(event["event"]), []).append((int(event["step"]), line))
    return marks


def _when(event: dict[str, Any]) -> str:
    return datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _details(event: dict[str, Any]) -> str:
    """What an event says beyond its kind, step and time."""
    shown = {name: value for name, value in event.items() if name not in ("event", "step", "time", "versions")}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value != [])
