"""MinHash signatures, cut into bands.

Design choices:
- The n-grams are hashed in numpy (words.py), their signatures are rensa's R-MinHash: each n-gram goes to few of the
  places instead of being hashed once for each (Fast Similarity Sketching, Dahlgaard, Knudsen and Thorup 2017), with the
  chance of MinHash that two sets agree in a place: their Jaccard similarity.
- A band is kept as one 64-bit hash. That two documents differ and their hashes don't happens at 2**-64 for each pair
  and band: less than one wrong pair is to be expected among 1e9 documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatrain.data_prep.deduplicate.config import FuzzyConfig
from megatrain.data_prep.deduplicate.words import BASE, Bools, Int64, UInt64, mix, ngrams, words
from megatrain.errors import InputError


def band_keys(texts: Sequence[str], config: FuzzyConfig) -> tuple[UInt64, Bools]:
    """The key of each band of each text, uint64[texts, bands]; and which texts have any word, bool[texts].

    Those without are like no other. Raises InputError where rensa isn't installed.
    """
    grams, starts = ngrams(*words(texts), config.ngram)
    signatures = _signatures(grams, starts, config).reshape(len(texts), config.bands, config.rows)
    keys = np.zeros(signatures.shape[:2], np.uint64)
    for row in range(config.rows):
        keys = mix(keys * np.uint64(BASE) + signatures[:, :, row])
    return keys, np.diff(starts) > 0


def _signatures(grams: UInt64, starts: Int64, config: FuzzyConfig) -> npt.NDArray[np.uint32]:
    """uint32[texts, bands * rows] of the sets of n-grams that begin at `starts`, int64[texts + 1]."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise InputError(
            "deduplicate.fuzzy.enabled=true: needs rensa, which isn't installed; pip install 'megatrain[prep]'"
        ) from None
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        grams, starts.astype(np.uint64), num_perm=config.bands * config.rows, seed=config.seed
    )
    return np.array(matrix.to_rows(), np.uint32).reshape(len(starts) - 1, config.bands * config.rows)
