"""Checksums of tensors: of the bits alone, wherever they lie; no bit can flip unseen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatrain.engines.checksums import checksums

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def checksum(tensor: Tensor) -> int:
    ((what, sums),) = checksums([("weights", [tensor])])
    assert (what, sums.shape, sums.dtype) == ("weights", (1,), torch.int64)
    return int(sums[0])


@given(st.binary(max_size=64), st.integers(0, 5), st.sampled_from(DTYPES))
def test_it_is_the_sum_of_words_of_64_bits_wherever_they_lie(raw: bytes, offset: int, dtype: torch.dtype) -> None:
    raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    words = [int.from_bytes(raw[start : start + 8], "little") for start in range(0, len(raw), 8)]
    everything = bytearray(bytes(offset * dtype.itemsize) + raw + bytes(8))
    tensor = torch.frombuffer(everything, dtype=dtype)[offset:][: len(raw) // dtype.itemsize]
    assert checksum(tensor) % 2**64 == sum(words) % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (4, 8)])
def test_any_flipped_bit_shows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    whole, found = checksum(tensor), set()
    bytes_of = tensor.reshape(-1).view(torch.uint8)
    for byte in range(len(bytes_of)):
        for bit in range(8):
            bytes_of[byte] ^= 1 << bit
            found.add(checksum(tensor))
            bytes_of[byte] ^= 1 << bit
    assert checksum(tensor) == whole
    assert whole not in found
