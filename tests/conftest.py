"""What all tests share: the pool of ranks, and quiet libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Real processes, started once for the whole test run."""
    pool = Pool()
    yield pool
    pool.close()
