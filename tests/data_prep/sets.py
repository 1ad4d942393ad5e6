"""Whole sets from a small input, with everything on that compares documents, for tests of who makes them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.deduplicate.config import DeduplicateConfig, FuzzyConfig, ParagraphsConfig
from megatrain.data_prep.filters.config import FiltersConfig, LengthConfig
from megatrain.data_prep.pipeline import run
from megatrain.data_prep.tokenizer.config import TokenizerConfig
from tests.tokenizer import make_tokenizer

WORDS = [
    "the",
    "set",
    "that",
    "is",
    "made",
    "is",
    "the",
    "same",
    "whoever",
    "made",
    "it",
    "and",
    "in",
    "whatever",
    "order",
    "the",
    "units",
    "of",
    "its",
    "input",
    "were",
    "done",
]


def write_input(folder: Path) -> None:
    """Documents of which some are there twice, some almost, and some share a line; and a tokenizer."""
    random = Random(0)
    texts = [" ".join(random.choices(WORDS, k=random.randrange(20, 200))) for _ in range(120)]
    texts += [texts[number] for number in range(0, 120, 9)]
    texts += [texts[number] + " and so on" for number in range(4, 120, 11)]
    texts += [f"{texts[number][:200]}\nthis line stands in several documents\nnumber {number}" for number in range(20)]
    texts += ["too short"] * 3
    random.shuffle(texts)
    (folder / "input").mkdir(parents=True)
    for number in range(3):
        records = (json.dumps({"text": text, "source": f"source {number}"}) + "\n" for text in texts[number::3])
        (folder / "input" / f"{number}.jsonl").write_text("".join(records))
    make_tokenizer(folder / "tokenizer.json")


def prepare(folder: Path, output: Path, **changes: Any) -> dict[str, bytes]:
    """The files of the set that `megatrain prep` makes of it, but for the reports, which hold times."""
    config = PrepConfig(
        input=str(folder / "input"),
        output=str(output),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer.json")),
        filters=FiltersConfig(length=LengthConfig(enabled=True, min_characters=20)),
        deduplicate=DeduplicateConfig(
            exact=True,
            fuzzy=FuzzyConfig(enabled=True),
            paragraphs=ParagraphsConfig(enabled=True, min_characters=30, min_left_characters=20),
            memory_bytes=1 << 20,
        ),
        held_out_share=0.1,
        shard_bytes=30_000,
        member_bytes=6_000,
        unit_bytes=10_000,
        **changes,
    )
    assert run(config) == 0
    paths = (path for path in output.rglob("*") if path.is_file() and path.stem != "report")
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}
