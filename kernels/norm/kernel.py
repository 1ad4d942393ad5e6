"""RMSNorm and LayerNorm with a residual sum, in Triton. x is [rows, width], contiguous.

Design choices:
- Bound by memory, so each byte moves once: the residual is added where the norm is taken, and a tile holds whole rows
  as long as registers can. Wider rows are read twice, in tiles (`forward_tiled`; `backward_sums` before `backward`).
- What is normalised is the sum as it was stored, rounded: the backward pass reads that, and shall see the same.
- The gradient of the weight is summed by each program over its own rows, and then over programs by torch: no atomics,
  the same bits each time.
- There is one program a multiprocessor, so that such sums are few, and no other that computes while it waits for
  memory. So the next rows are loaded while these are computed, in tiles of up to 8 KiB: with larger ones it spills.
- Mean and variance of a tiled row are merged tile by tile (Chan et al. 1979), for a sum of squares would cancel.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    x, residual, weight, bias, y, summed, mean, rstd, rows, width, eps,
    HAS_RESIDUAL: tl.constexpr, CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms of ROWS whole rows; BLOCK >= width. CENTERED: LayerNorm, which has a mean and a bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTERED:
        center = tl.sum(value, 1) / width
        tl.store(mean + row, center, mask=row < rows)
        value = tl.where(inside, value - center[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    result = value * scale[:, None] * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if CENTERED:
        result += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def forward_tiled(
    x, residual, weight, bias, y, summed, mean, rstd, width, eps,
    HAS_RESIDUAL: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The norm of one row of any width, in two passes over tiles of BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    center = 0.0
    squares = 0.0  # of the distances to center
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        place = row * width + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(summed.dtype.element_ty)
            tl.store(summed + place, rounded, mask=inside)
            value = rounded.to(tl.float32)
        if CENTERED:
            count = tl.minimum(width - first, BLOCK)
            here = tl.sum(value, 0) / count
            value = tl.where(inside, value - here, 0.0)
            squares += (here - center) * (here - center) * first * count / (first + count)
            center += (here - center) * count / (first + count)
        squares += tl.sum(value * value, 0)
    scale = tl.rsqrt(squares / width + eps)
    tl.store(rstd + row, scale)
    if CENTERED:
        tl.store(mean + row, center)
    # The second pass reads what other threads of this program have stored.
    tl.debug_barrier()
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        place = row * width + column
        value = tl.load((summed if HAS_RESIDUAL else x) + place, mask=inside, other=0.0).to(tl.float32)
        result = (value - center) * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_sums(
    dy, summed, weight, mean, rstd, along_norm, along_mean, width, CENTERED: tl.constexpr, BLOCK: tl.constexpr
):
    """Of one row of any width the means over its elements that `backward` subtracts."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(rstd + row)
    norm_total = 0.0
    mean_total = 0.0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        normed = tl.load(summed + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            normed -= tl.load(mean + row)
        gradient = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
        gradient *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        norm_total += tl.sum(gradient * normed, 0) * scale
        mean_total += tl.sum(gradient, 0)
    tl.store(along_norm + row, norm_total / width)
    if CENTERED:
        tl.store(along_mean + row, mean_total / width)


@triton.jit
def backward(
    dy, dsummed, summed, weight, mean, rstd, along_norm, along_mean, dx, dweight, dbias, rows, width, share,
    HAS_DSUMMED: tl.constexpr, CENTERED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of `share` rows, ROWS at a time, in BLOCK columns; and those rows' part of the weight's and bias's.

    WHOLE: the columns are all, so the means over a row are taken here. dweight, dbias: fp32[programs, width].
    """
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scales = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    weight_total = tl.zeros([BLOCK], tl.float32)
    bias_total = tl.zeros([BLOCK], tl.float32)
    small: tl.constexpr = ROWS * BLOCK * summed.dtype.element_ty.primitive_bitwidth <= 8 * 8192
    last = tl.minimum(rows, (program + 1) * share)
    for first in tl.range(program * share, last, ROWS, num_stages=2 if small else 1):
        row = first + tl.arange(0, ROWS)
        real = (row < rows) & (row < (program + 1) * share)
        inside = real[:, None] & (column < width)[None, :]
        place = tl.cast(row, tl.int64)[:, None] * width + column[None, :]
        normed = tl.load(summed + place, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=real, other=0.0)[:, None]
        if CENTERED:
            normed -= tl.load(mean + row, mask=real, other=0.0)[:, None]
            bias_total += tl.sum(upstream, 0)
        normed *= scale
        weight_total += tl.sum(upstream * normed, 0)
        gradient = upstream * scales
        if WHOLE:
            norm_part = (tl.sum(gradient * normed, 1) / width)[:, None]
        else:
            norm_part = tl.load(along_norm + row, mask=real, other=0.0)[:, None]
        result = gradient - normed * norm_part
        if CENTERED:
            if WHOLE:
                result -= (tl.sum(gradient, 1) / width)[:, None]
            else:
                result -= tl.load(along_mean + row, mask=real, other=0.0)[:, None]
        result *= scale
        if HAS_DSUMMED:
            result += tl.load(dsummed + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
    part = program.to(tl.int64) * width + column
    tl.store(dweight + part, weight_total, mask=column < width)
    if CENTERED:
        tl.store(dbias + part, bias_total, mask=column < width)
