"""SwiGLU in Triton. gate_up is [rows, 2 * width], contiguous: in each row the gate, then what it multiplies.

Design choices:
- Both halves are read where the projection left them: one tensor in, and in the backward pass one gradient out.
- silu is computed again in the backward pass from what it came from, so nothing else is kept; and so is the product,
  to the bit, for the gradient of what it was multiplied with next.
"""

import triton
import triton.language as tl


@triton.jit
def forward(gate_up, y, width, BLOCK: tl.constexpr):
    """y [rows, width]; a program for each row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(dy, gate_up, dgate_up, y, width, BLOCK: tl.constexpr):
    """dgate_up [rows, 2 * width] from dy [rows, width], and y as `forward` had it; programs as there."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * 2 * width + column
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + width, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_up + place, dgate.to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(dgate_up + place + width, (gradient * gate * sigmoid).to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(y + row * width + column, (gate * sigmoid * up).to(y.dtype.element_ty), mask=inside)
