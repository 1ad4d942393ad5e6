"""The report of `megatrain prep` as one HTML page that needs no network and no other file: report.html.

Design choices:
- It is made of report.json alone, by a template, and runs no script: bars are CSS, what is long is folded by <details>.
- The texts on it come from the web. Jinja escapes all of them; a content security policy forbids scripts and
  addresses besides; no link is made of what looks like one; control characters are replaced.
- Long tables are cut, and say how much more is in report.json.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import jinja2

from megatrain.data.format import HELD_OUT

MOST_ROWS = 50
"""Of a table; of sources and languages those with the most tokens."""
MEASURES = ("documents", "bytes", "characters", "words", "tokens")
"""What report.json counts of the documents of a source and language."""
UNSEEN = (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000))
VISIBLE = {**dict.fromkeys(UNSEEN, "\ufffd"), ord("\t"): "\t", ord("\n"): "\n", ord("\r"): None}
"""For str.translate: control characters, and the lone surrogates of odd file names, are seen as U+FFFD."""
TOKEN = re.compile(r"[\u2e80-\ud7ff]|[^\W\u2e80-\ud7ff]+|\s+|.")
"""What two texts are compared by: a word, a character of a script without spaces, white space, a sign."""


@dataclass(frozen=True)
class Reason:
    """Why documents were dropped, or what was changed in them. share: of those the step was given; None: unknown.

    examples: {"id", "text", "value"} of each.
    """

    name: str
    documents: int
    bytes: int
    share: float | None
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """A step of the funnel. given: documents, None where that wasn't counted. bytes: of the texts that were dropped."""

    name: str
    given: int | None
    documents: int
    bytes: int
    share: float | None
    dropped: list[Reason]
    changed: list[Reason]


@dataclass(frozen=True)
class Row:
    """Documents of one name: how much of each of MEASURES. share: of all tokens."""

    name: str
    amount: Counter[str]
    share: float


@dataclass(frozen=True)
class Table:
    """Rows, the greatest first, the sum of all, and how many are left out."""

    rows: list[Row]
    total: Counter[str]
    more: int


@dataclass(frozen=True)
class Pair:
    """Two documents of a cluster. The texts are in pieces, and whether each piece is in both."""

    kind: str
    kept: str
    dropped: str
    kept_text: list[tuple[str, bool]]
    dropped_text: list[tuple[str, bool]]


def page(report: dict[str, Any]) -> str:
    """The whole page. report: what Report.to_json gives.

    report["duplicates"] is None where none were looked for.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, "ratio": ratio, "share": share, "size": size, "duration": duration}
    amounts = report["sources_and_languages"]
    duplicates = report["duplicates"]
    html = environment.get_template("report.html.jinja").render(
        report=report,
        kept=sum(report["documents"].values()),
        held_out=report["documents"][HELD_OUT],
        tokens=sum(report["tokens"].values()),
        held_out_tokens=report["tokens"][HELD_OUT],
        steps=steps(report["steps"]),
        lengths=lengths(report["documents_by_log2_tokens"]),
        tables={name: table(amounts, name) for name in ("source", "language")},
        duplicates=duplicates,
        pairs=[pair(**example) for example in duplicates["examples"]] if duplicates else [],
        problems=problems(report["problems"]),
        most=MOST_ROWS,
    )
    return html.lstrip().translate(VISIBLE)


def steps(notes: dict[str, Any]) -> list[Step]:
    """The steps in the order in which documents went through them, their reasons by number of documents."""
    found = []
    for name in dict.fromkeys([*notes["entered"], *notes["dropped"], *notes["changed"]]):
        given = notes["entered"].get(name)
        dropped, changed = (_reasons(notes[kind].get(name, {}), given) for kind in ("dropped", "changed"))
        documents = sum(reason.documents for reason in dropped)
        size = sum(reason.bytes for reason in dropped)
        found.append(Step(name, given, documents, size, documents / given if given else None, dropped, changed))
    return found


def _reasons(tallies: dict[str, Any], given: int | None) -> list[Reason]:
    found = [
        Reason(
            name, tally["documents"], tally["bytes"], tally["documents"] / given if given else None, tally["examples"]
        )
        for name, tally in tallies.items()
    ]
    return sorted(found, key=lambda reason: -reason.documents)


def table(amounts: Iterable[dict[str, Any]], by: str) -> Table:
    """The documents of the set by `by`, "source" or "language", over both splits."""
    groups: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for row in amounts:
        amount = {name: row[name] for name in MEASURES}
        groups.setdefault(row[by] or "not named", Counter()).update(amount)
        total.update(amount)
    rows = [Row(name, amount, amount["tokens"] / max(total["tokens"], 1)) for name, amount in groups.items()]
    rows.sort(key=lambda row: -row.amount["tokens"])
    return Table(rows[:MOST_ROWS], total, max(0, len(rows) - MOST_ROWS))


def lengths(documents: Sequence[int]) -> list[tuple[int, int, int]]:
    """First and last length in tokens of each bin, and its documents; without the empty bins at both ends."""
    bins = [(2**power, 2 ** (power + 1) - 1, count) for power, count in enumerate(documents)]
    for _ in range(2):
        bins = list(dropwhile(lambda each: not each[2], reversed(bins)))
    return bins


def problems(by_file: dict[str, dict[str, int]]) -> list[tuple[str, int, int]]:
    """Kinds of bad records, how many there are, and in how many files."""
    kinds = sorted({kind for found in by_file.values() for kind in found})
    counts = [(kind, [found[kind] for found in by_file.values() if kind in found]) for kind in kinds]
    return [(kind, sum(numbers), len(numbers)) for kind, numbers in counts]


def pair(kind: str, kept: str, dropped: str, kept_text: str, dropped_text: str) -> Pair:
    """Two documents of a cluster, compared word by word."""
    ours, theirs = TOKEN.findall(kept_text), TOKEN.findall(dropped_text)
    codes = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    return Pair(
        kind,
        kept,
        dropped,
        [("".join(ours[start:stop]), tag == "equal") for tag, start, stop, _, _ in codes],
        [("".join(theirs[start:stop]), tag == "equal") for tag, _, _, start, stop in codes],
    )


def share(value: float | None) -> str:
    """A share of 1 as people read it."""
    if value is None:
        return ""
    return "< 0.1%" if 0 < value < 0.0005 else f"{value:.1%}"


def ratio(part: int, whole: int) -> str:
    """A quotient, where there is one."""
    return f"{part / whole:.2f}" if whole else ""


def size(number: float) -> str:
    """Bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"


def duration(seconds: float) -> str:
    """A time, in the units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
