"""The tokenizer of a set: the one that was asked for, the set's own, or one that is trained on the input.

Design choices:
- It is trained on documents as they will be tokenized: after the steps, and on none that is held out.
- A trained tokenizer is kept with the work of an unfinished run: the next start has the same.
- What Hugging Face's tokenizers gives is the truth. tiktoken encodes where its ids are the same on text of this input;
  each unit checks again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import xxhash

from megatrain.data.format import TOKENIZER
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.documents import SCHEMA, Documents
from megatrain.data_prep.files import AtomicFile
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.plan import WORK, Input, what_matters
from megatrain.data_prep.read.reader import sample
from megatrain.data_prep.steps import steps
from megatrain.data_prep.tokenizer import Vocabulary, load, pick_backend, train
from megatrain.data_prep.units import StoredTokenizer, is_held_out, text_digests, through

PARITY_BYTES = 1 << 18
"""Text on which tiktoken has to give the ids of tokenizers before it is used."""
SAMPLED_TOGETHER = 256
"""Documents that go through the steps at once."""


def vocabulary(config: PrepConfig, inputs: list[Input]) -> Vocabulary:
    """The tokenizer of the set; nothing is written. Raises InputError where it can't be had."""
    wanted, output = config.tokenizer, Path(config.output)
    if wanted.path is not None:
        return load(Path(wanted.path), wanted.eos_token, wanted.split)
    if config.append:
        return load(output / TOKENIZER, wanted.eos_token)
    trained = _trained(config, inputs)
    if trained.is_file():
        return load(trained, None)
    return train(_texts(config, inputs, wanted.train_bytes), wanted.vocab_size)


def store(found: Vocabulary, config: PrepConfig, inputs: list[Input]) -> tuple[StoredTokenizer, str]:
    """Writes the tokenizer where tasks find it, with what encodes by it; and why that does."""
    path = _trained(config, inputs) if config.tokenizer.train else Path(config.output) / WORK / TOKENIZER
    with AtomicFile(path) as file:
        file.write(found.data)
    backend, reason = pick_backend(found, list(_sampled(inputs, config, PARITY_BYTES)))
    sha256 = hashlib.sha256(found.data).hexdigest()
    return StoredTokenizer(str(path), sha256, found.eos_id, found.vocab_size, backend), reason


def _trained(config: PrepConfig, inputs: list[Input]) -> Path:
    """Where the tokenizer of a run that trains one is, from when it was trained on."""
    key = xxhash.xxh3_64_hexdigest(repr((what_matters(config), [each.files for each in inputs])).encode())
    return Path(config.output) / WORK / f"tokenizer-{key}.json"


def _texts(config: PrepConfig, inputs: list[Input], limit: int) -> Iterator[str]:
    """The texts that a tokenizer is trained on, about `limit` bytes before the steps. Texts of evaluation sets may be
    among them: what is looked for is built later."""
    taken, texts = steps(config, None), _sampled(inputs, config, limit)
    while together := list(islice(texts, SAMPLED_TOGETHER)):
        left = through(taken, _documents(together), Notes())
        held_out = is_held_out(text_digests(left.batch.column("text")), config.held_out_share)
        yield from (text for text, out in zip(left.texts, held_out, strict=True) if not out)


def _sampled(inputs: list[Input], config: PrepConfig, limit: int) -> Iterator[str]:
    """Texts from all over the inputs, of each according to its size."""
    sizes = [sum(file.size for file in each.files) for each in inputs]
    for each, size in zip(inputs, sizes, strict=True):
        yield from sample(each.files, config.columns, config.read, limit * size // sum(sizes))


def _documents(texts: list[str]) -> Documents:
    nothing = [None] * len(texts)
    columns = {"text": texts, "id": [str(number) for number in range(len(texts))]}
    arrays = [pa.array(columns.get(field.name, nothing), field.type) for field in SCHEMA]
    return Documents(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
