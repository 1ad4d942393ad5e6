"""How much was found in the input, and what became of it: what the report and the manifests say in numbers.

Design choices:
- Counts of two parts of the input add up to those of both. They are JSON: those of a unit lie beside its results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data_prep.read.records import Problem

LENGTH_BINS = 32
"""Documents of [2^k, 2^(k+1)) tokens, k = 0 .. 31."""


@dataclass
class Amount:
    """Of documents: their number, UTF-8 bytes, characters, words between spaces, and tokens (EOS counts)."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0

    def add(self, other: Amount) -> None:
        """Adds other documents."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


Kind = tuple[str | None, str | None]
"""Source and language."""


@dataclass
class Counts:
    """amounts: of the documents in the set, by split, and in it by source and language. lengths: documents by bins.

    problems: bad records by file and kind; first_problem: where, by kind. broken: files, and why.
    records: documents that were read, whatever became of them. compared, different: documents whose ids were compared
    with those of tokenizers, and how many were others.
    """

    amounts: dict[str, dict[Kind, Amount]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [0] * LENGTH_BINS)
    problems: dict[str, Counter[str]] = field(default_factory=dict)
    first_problem: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    records: int = 0
    compared: int = 0
    different: int = 0

    def add(self, other: Counts) -> None:
        """Adds what a later part of the input held."""
        for split, kinds in other.amounts.items():
            for kind, amount in kinds.items():
                self.amount(split, kind).add(amount)
        self.lengths = [own + others for own, others in zip(self.lengths, other.lengths, strict=True)]
        for name, problems in other.problems.items():
            self.problems[name] = self.problems.get(name, Counter()) + problems
        self.first_problem = other.first_problem | self.first_problem
        self.broken |= other.broken
        self.records += other.records
        self.compared += other.compared
        self.different += other.different

    def amount(self, split: str, kind: Kind) -> Amount:
        """That of one kind of documents, to be added to."""
        return self.amounts.setdefault(split, {}).setdefault(kind, Amount())

    def add_lengths(self, tokens: npt.NDArray[Any]) -> None:
        """Counts documents by their tokens, int[documents], at least 1 each."""
        bins = np.bincount(np.log2(tokens).astype(np.int64), minlength=LENGTH_BINS)
        self.lengths = [own + more for own, more in zip(self.lengths, bins.tolist(), strict=True)]

    def add_problem(self, name: str, problem: Problem) -> None:
        """Counts a bad record of the file `name`."""
        self.problems.setdefault(name, Counter())[problem.kind] += 1
        self.first_problem.setdefault(problem.kind, problem.place)

    def add_broken(self, name: str, why: str) -> None:
        """Notes a file that gives nothing."""
        self.broken[name] = why

    @property
    def bad(self) -> int:
        """Records that can't be used."""
        return sum(kinds.total() for kinds in self.problems.values())

    def total(self, split: str | None = None) -> Amount:
        """Of one split, or of all."""
        splits = self.amounts.values() if split is None else [self.amounts.get(split, {})]
        return total(amount for kinds in splits for amount in kinds.values())

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        amounts = {
            split: [[*kind, vars(amount)] for kind, amount in kinds.items()] for split, kinds in self.amounts.items()
        }
        return vars(self) | {"amounts": amounts}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Counts:
        """The reverse of to_json."""
        amounts = {
            split: {(source, language): Amount(**amount) for source, language, amount in rows}
            for split, rows in value["amounts"].items()
        }
        problems = {name: Counter(kinds) for name, kinds in value["problems"].items()}
        return Counts(**value | {"amounts": amounts, "problems": problems})


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum."""
    found = Amount()
    for amount in amounts:
        found.add(amount)
    return found
