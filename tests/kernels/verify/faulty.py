"""Kernels that are wrong, each in one way that the tools have to see."""

import triton
import triton.language as tl


@triton.jit
def beyond(x, y, size, BLOCK: tl.constexpr):
    """No mask at the end of what it writes."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < size, other=0.0))


@triton.jit
def unmasked(x, y, size, BLOCK: tl.constexpr):
    """No mask at the end of what it reads, and sums it."""
    place = tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + place)) + size * 0)


@triton.jit
def unwritten(x, y, size, BLOCK: tl.constexpr):
    """The last element is left out."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < size), mask=place < size - 1)


@triton.jit
def twice(x, y, size, BLOCK: tl.constexpr):
    """Every program writes what the first does."""
    place = tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < size), mask=place < size)


@triton.jit
def shifted(x, y, size, BLOCK: tl.constexpr):
    """Given x for y: reads what the next program writes, which is right only as long as programs run in order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place + 1, mask=place + 1 < size, other=0.0), mask=place < size)


@triton.jit
def atomic(x, y, size, BLOCK: tl.constexpr):
    """Adds up as programs come."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + place, mask=place < size, other=0.0)))


@triton.jit
def narrow(x, y, size, BLOCK: tl.constexpr):
    """Adds in the dtype of x."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < size)
    tl.store(y + place, value + value, mask=place < size)


@triton.jit
def narrow_sum(x, y, size, BLOCK: tl.constexpr):
    """Sums in the dtype of x."""
    place = tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + place, mask=place < size, other=0.0)))


@triton.jit
def product(a, b, y, SIZE: tl.constexpr):
    """Not wrong: the product of two [SIZE, SIZE] matrices."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    result = tl.dot(tl.load(a + row * SIZE + column), tl.load(b + row * SIZE + column))
    tl.store(y + row * SIZE + column, result)


@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    """Holds more than one warp has registers, while it waits for the sum."""
    place = tl.arange(0, BLOCK)
    value = tl.load(x + place)
    tl.store(y + place, value - tl.sum(value))


@triton.jit
def swiglu_beyond(gate_up, y, width, BLOCK: tl.constexpr):
    """SwiGLU, and one element too many of each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * width + column, mask=column < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=column < width, other=0.0).to(tl.float32)
    result = (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty)
    tl.store(y + row * width + column, result, mask=column < width + 1)


@triton.jit
def swiglu_of_narrow_rows(gate_up, y, width, BLOCK: tl.constexpr):
    """SwiGLU of rows up to 10 wide; beyond, what is multiplied is left out."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside & (width <= 10), other=1.0).to(tl.float32)
    tl.store(y + row * width + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)
