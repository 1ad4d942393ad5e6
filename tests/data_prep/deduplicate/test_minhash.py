"""How many of the documents that are almost alike are found: what the theory of MinHash says, no more and no less."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatrain.data_prep.deduplicate.config import DeduplicateConfig, FuzzyConfig
from megatrain.data_prep.deduplicate.duplicates import find_duplicates
from megatrain.data_prep.deduplicate.keys import document_keys, write_keys
from megatrain.data_prep.deduplicate.minhash import band_keys
from megatrain.data_prep.files import AtomicFolder
from tests.data_prep.deduplicate.common import documents, run

WORDS, NGRAM = 84, 5
"""Of a document: 80 n-grams."""
SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
POINTS = 0.02
"""How far a share may be from the theory's."""


def pair(similarity: float, vocabulary: list[str], generator: random.Random) -> tuple[tuple[str, str], float]:
    """Two documents whose sets of n-grams have about that Jaccard similarity, and what it is exactly."""
    grams = WORDS - NGRAM + 1
    common = round(2 * similarity * grams / (1 + similarity)) + NGRAM - 1
    shared = generator.choices(vocabulary, k=common)
    rests = [generator.choices(vocabulary, k=WORDS - common) for _ in range(2)]
    both = common - NGRAM + 1
    first, second = (" ".join(shared + rest) for rest in rests)
    return (first, second), both / (2 * grams - both)


def found_pairs(
    folder: Path, texts: list[tuple[int, str]], units: int, config: DeduplicateConfig
) -> set[tuple[int, int]]:
    """The (numbers of) pairs of documents that were found, through files."""
    ends = np.linspace(0, len(texts), units + 1).astype(int).tolist()
    parts = [texts[start:end] for start, end in pairwise(ends)]
    folders = [folder / str(number) for number in range(units)]
    for path, part in zip(folders, parts, strict=True):
        with AtomicFolder(path) as result:
            write_keys(result, [document_keys(documents([text for _, text in part]), config)])
            result.commit("", {})
    duplicates = find_duplicates(folders, folder, config, run)
    return {
        (parts[record["first_unit"]][record["first_row"]][0], parts[unit][record["row"]][0])
        for unit in range(units)
        for record in duplicates.removed(unit)
    }


@pytest.mark.parametrize("pairs", [2000, pytest.param(20_000, marks=pytest.mark.long)])
def test_recall_and_precision_are_the_theorys(pairs: int, tmp_path: Path) -> None:
    generator = random.Random(1)
    vocabulary = ["".join(generator.choices("abcdefghijklmnop", k=7)) for _ in range(100_000)]
    config = DeduplicateConfig(fuzzy=FuzzyConfig(enabled=True, ngram=NGRAM))
    texts: list[tuple[int, str]] = []
    theory: dict[float, float] = {}
    for similarity in SIMILARITIES:
        for number in range(pairs):
            both, exact = pair(similarity, vocabulary, generator)
            theory[similarity] = 1 - (1 - exact**config.fuzzy.rows) ** config.fuzzy.bands
            texts += [(2 * (len(theory) * pairs + number) + which, text) for which, text in enumerate(both)]
    generator.shuffle(texts)
    found = found_pairs(tmp_path, texts, 3, config)
    assert all(first // 2 == second // 2 for first, second in found), "unlike documents were found"
    shares = dict.fromkeys(SIMILARITIES, 0.0)
    for first, _ in found:
        shares[SIMILARITIES[first // 2 // pairs - 1]] += 1 / pairs
    assert shares == pytest.approx(theory, abs=POINTS)
    like = [similarity for similarity in SIMILARITIES if similarity >= 0.8]
    precision, expected = (
        sum(each[similarity] for similarity in like) / sum(each.values()) for each in (shares, theory)
    )
    assert precision == pytest.approx(expected, abs=POINTS)


def test_signatures_depend_on_words_and_seed_alone() -> None:
    config = FuzzyConfig(enabled=True)
    keys, has_words = band_keys(
        ["The quick brown fox, it jumps!", "the QUICK  brown fox it jumps", "!?", "漢字"], config
    )
    assert keys.shape == (4, 14)
    assert (keys[0] == keys[1]).all()
    assert (keys[0] != keys[3]).all()
    assert has_words.tolist() == [True, True, False, True]
    other, _ = band_keys(["the quick brown fox it jumps"], FuzzyConfig(enabled=True, seed=2))
    assert (other[0] != keys[0]).all()
    alone, _ = band_keys(["the quick brown fox it jumps"], config)
    assert (alone[0] == keys[0]).all(), "others in the batch make no difference"
    assert keys[0][:2].tolist() == [1195738977067349518, 4900162425027338384], (
        "signatures of one release aren't those of another"
    )
