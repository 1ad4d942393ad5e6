"""What cross-entropy needs of a chunk of logits, in Triton. logits is [rows, width], contiguous.

Design choices:
- Of a row only its first `count` columns exist: the rest are padding, of a part of the vocabulary that has fewer.
- The gradient takes the logits' place, so a chunk has one matrix of that size.
- Exponentials are tl.exp2, for tl.exp looks after denormal results: three instructions more each, and instructions
  are what these kernels wait for next after memory.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward(logits, targets, lse, of_target, width, first, count, BLOCK: tl.constexpr):
    """Of one row the log-sum-exp (fp32), and the target's logit, 0 where it isn't among the ids from `first` on."""
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    total = 0.0
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * width + column, mask=column < count, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp2((largest - higher) * LOG2_E) + tl.sum(tl.exp2((value - higher) * LOG2_E), 0)
        largest = higher
    tl.store(lse + row, largest + tl.log(total))
    target = tl.load(targets + row) - first
    here = (target >= 0) & (target < count)
    tl.store(of_target + row, tl.load(logits + row * width + target, mask=here, other=0.0).to(tl.float32))


@triton.jit
def backward(logits, targets, lse, dlse, dof_target, width, first, count, BLOCK: tl.constexpr):
    """Puts the gradient in the place of the logits, of one row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * width + column
    value = tl.load(place, mask=column < count, other=-float("inf")).to(tl.float32)
    gradient = tl.exp2((value - tl.load(lse + row)) * LOG2_E) * tl.load(dlse + row)
    target = tl.load(targets + row) - first
    gradient += tl.where(column == target, tl.load(dof_target + row), 0.0)
    gradient = tl.where(column < count, gradient, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < width)
