"""The readers that benchmarks/loader.py is compared with: each writes the tokens as it would, and reads them once.

Design choices:
- All get the same row of ids and give all of it as int32 tensors [at most batch, S + 1], in the training process:
  workers would add the cost of sending each batch between processes.
- What they give is made into a Batch as a training script does that has nothing but ids: a document begins after each
  EOS (their formats keep no lengths), the rest is the loader's own objective.
- Each as its documentation says to read tokens: a flat file through a Dataset and a DataLoader, webdataset's tars,
  litdata's TokensLoader. Only the memmap is less than anyone runs: slices of one array, no epoch, no state.
- litdata and torchdata are no dependencies of the project, and litdata wants torchvision for what isn't used here:
  `pip install --no-deps litdata==0.2.76 torchdata==0.11.0 lightning-utilities==0.15.3`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import Dataset

from megatrain.batch import Batch, Sequences
from megatrain.data.loader import Objective
from megatrain.data.samples import spread

UInt16 = npt.NDArray[np.uint16]
SAMPLES_OF_MEMBER = 256
CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Peer:
    """A way to keep and read tokens.

    write: writes a row of ids below a new folder for samples of `length` tokens. read: all batches of `batch` samples.
    package: what it needs besides the project's own.
    """

    name: str
    write: Callable[[UInt16, Path, int], None]
    read: Callable[[Path, int, int], Iterator[Tensor]]
    package: str | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def to_batch(ids: Tensor, eos: int, objective: Objective) -> Batch:
    """Inputs, targets, positions and masks of ids int32[B, S + 1]."""
    row, place = np.nonzero(ids[:, :-1].numpy() == eos)
    document = spread(row * ids.shape[1] + place + 1, ids.shape)
    length = torch.full((len(ids),), ids.shape[1], dtype=torch.int32)
    return objective(Sequences(ids, torch.from_numpy(document), length, torch.zeros_like(length)))


def write_flat(ids: UInt16, folder: Path, length: int) -> None:  # noqa: ARG001
    """One file of all ids."""
    ids.tofile(folder / "tokens.bin")


def read_memmap(folder: Path, length: int, batch: int) -> Iterator[Tensor]:
    """Windows in a shuffled order."""
    stored = np.memmap(folder / "tokens.bin", np.uint16, mode="r")
    starts = np.random.default_rng(0).permutation((len(stored) - 1) // length) * length
    for at in range(0, len(starts), batch):
        yield torch.from_numpy(np.stack([stored[s : s + length + 1] for s in starts[at : at + batch]]).astype(np.int32))


class Windows(Dataset[Tensor]):
    """The windows of a flat file."""

    def __init__(self, path: Path, length: int) -> None:
        self._stored = np.memmap(path, np.uint16, mode="r")
        self._length = length

    def __len__(self) -> int:
        return (len(self._stored) - 1) // self._length

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._length
        return torch.from_numpy(self._stored[start : start + self._length + 1].astype(np.int32))


def read_stateful(folder: Path, length: int, batch: int) -> Iterator[Tensor]:
    """The same windows, shuffled and collated by torchdata."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    yield from StatefulDataLoader(Windows(folder / "tokens.bin", length), batch_size=batch, shuffle=True, num_workers=0)


def write_members(ids: UInt16, folder: Path, length: int, samples: int) -> None:
    """Tars of stock webdataset with so many samples a member, each with the id that the next begins with."""
    windows = sliding_window_view(ids, length + 1)[::length]
    with webdataset.TarWriter(str(folder / "shard.tar")) as tar:
        for at in range(0, len(windows), samples):
            rows = windows[at : at + samples] if samples > 1 else windows[at]
            tar.write({"__key__": f"{at:09d}", "npy": rows})


def write_one(ids: UInt16, folder: Path, length: int) -> None:
    """A sample a member."""
    write_members(ids, folder, length, 1)


def write_many(ids: UInt16, folder: Path, length: int) -> None:
    """Hundreds of samples a member."""
    write_members(ids, folder, length, SAMPLES_OF_MEMBER)


def read_one(folder: Path, length: int, batch: int) -> Iterator[Tensor]:
    """Samples shuffled in a buffer of a thousand, collated in batches."""
    samples: Any = webdataset.WebDataset(str(folder / "shard.tar"), shardshuffle=False).shuffle(1000)
    members = samples.decode().map(lambda member: member["npy"])
    for rows in members.batched(batch, collation_fn=np.stack, partial=True):
        assert rows.shape[1] == length + 1
        yield torch.from_numpy(rows.astype(np.int32))


def read_many(folder: Path, length: int, batch: int) -> Iterator[Tensor]:
    """Samples in the order of the tar, sliced from each member."""
    for member in webdataset.WebDataset(str(folder / "shard.tar"), shardshuffle=False).decode():
        windows = member["npy"]
        assert windows.shape[1] == length + 1
        for at in range(0, len(windows), batch):
            yield torch.from_numpy(windows[at : at + batch].astype(np.int32))


def write_litdata(ids: UInt16, folder: Path, length: int) -> None:
    """Chunks of tokens, by the writer that its `optimize` uses in each process."""
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=CHUNK_TOKENS, item_loader=TokensLoader(block_size=length + 1))
    for number, at in enumerate(range(0, len(ids), CHUNK_TOKENS // 4)):
        writer.add_item(number, torch.from_numpy(ids[at : at + CHUNK_TOKENS // 4]))
    writer.done()
    writer.merge(1)


def read_litdata(folder: Path, length: int, batch: int) -> Iterator[Tensor]:
    """Blocks of S + 1 tokens, which don't overlap, shuffled as it does: within chunks, whose order is shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    blocks = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=length + 1), shuffle=True, seed=1)
    for rows in StreamingDataLoader(blocks, batch_size=batch, num_workers=0):
        yield rows.to(torch.int32)


MEMMAP = "numpy memmap"
STATEFUL = "torchdata StatefulDataLoader"
WEBDATASET_ONE = "webdataset, one sample a member"
WEBDATASET_MANY = f"webdataset, {SAMPLES_OF_MEMBER} a member"
LITDATA = "litdata"

PEERS = (
    Peer(MEMMAP, write_flat, read_memmap),
    Peer(STATEFUL, write_flat, read_stateful, "torchdata"),
    Peer(WEBDATASET_ONE, write_one, read_one),
    Peer(WEBDATASET_MANY, write_many, read_many),
    Peer(LITDATA, write_litdata, read_litdata, "litdata"),
)
