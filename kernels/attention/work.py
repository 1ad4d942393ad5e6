"""What the attention kernels do for a mask: tiles, bytes, products, exponentials. Without running them.

Design choices:
- Counted as kernel.py's loops go, from the real mask and tiles; tests compare it with the interpreter's own count.
- Every key is seen by some query, and every query sees some key, as in training. (Where there are others, fewer bytes
  are read than these.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.kernels.attention.configs import Tiles
from megatrain.kernels.attention.op import Intervals
from megatrain.kernels.verify.case import Launch, Pass, Work


@dataclass(frozen=True)
class Walk:
    """What the programs of one head, of all samples, go through.

    programs: how many. tiles: computed. whole: of these those without a mask. once: the other tiles, but at least one
    a program. positions: of the other side read, all programs together.
    """

    programs: int
    tiles: int
    whole: int
    once: int
    positions: int


def walk(low: Tensor, high: Tensor, others: int, rows: int, columns: int) -> Walk:
    """Blocks of `rows` rows, which see int32[B, S] low to high of `others` positions, in tiles of `columns`.

    The rule is that of kernel._intervals.
    """
    first = torch.arange(0, low.shape[1], rows)
    last = (first + rows).clamp(max=low.shape[1]) - 1
    begin, stop = low[:, first] // columns, -(-high[:, last] // columns)
    tiles = stop - begin
    whole = (high[:, first] // columns + (-low[:, last] // columns)).clamp(min=0)
    positions = (stop * columns).clamp(max=others) - begin * columns
    counts = (tiles, whole, (tiles - whole).clamp(min=1), positions)
    return Walk(begin.numel(), *(int(count.sum()) for count in counts))


def passes(seen: Intervals, kv_heads: int, group: int, head_dim: int, tiles: Tiles, compiled: str) -> Iterator[Pass]:
    """Forward and backward in bf16. compiled: what the names of the kernels' compilations begin with."""
    (batch, queries), keys, heads = seen.start.shape, seen.column_start.shape[1], kv_heads * group
    query, key, number = (batch * n for n in (2 * head_dim * heads * queries, 2 * head_dim * kv_heads * keys,
                                              4 * heads * queries))  # fmt: skip
    mask, column_mask = 8 * batch * queries, 8 * batch * keys
    product = 2 * head_dim * heads * int((seen.end - seen.start).sum())

    def launch(kernel: str, work: Work, walked: Walk, products: int, exponentials: int) -> Launch:
        """products, exponentials: of a tile."""
        work += Work(products=products * heads * walked.tiles, exponentials=exponentials * heads * walked.tiles)
        programs = walked.programs * (kv_heads if kernel == "backward_keys" else heads)
        return Launch(kernel, work, f"{compiled} {kernel}", programs, heads * walked.once, heads * walked.whole)

    def by_queries(m: int, n: int) -> tuple[Walk, Work, int]:
        """The walk of a tile of queries, what it reads of keys, values and the mask; the FLOPs of a product."""
        walked = walk(seen.start, seen.end, keys, m, n)
        read = 2 * key + mask
        loaded = heads * (4 * head_dim * walked.positions + mask + 16 * walked.programs)
        return walked, Work(read=read, again=loaded - read), _product(m, n, head_dim)

    m, n = tiles.forward.queries, tiles.forward.keys
    walked, read, flops = by_queries(m, n)
    moved = Work(read=query, written=query + number)
    least = moved + Work(read=2 * key + mask, products=2 * product)
    yield Pass("attention forward", least, (launch("forward", moved + read, walked, 2 * flops, m * n + m),))

    m, n = tiles.backward_queries.queries, tiles.backward_queries.keys
    walked, read, flops = by_queries(m, n)
    moved = Work(read=3 * query + 2 * number, written=query + number)
    of_queries = launch("backward_queries", moved + read, walked, 3 * flops, m * n)

    m, n = tiles.backward_keys.queries, tiles.backward_keys.keys
    walked = walk(seen.column_start, seen.column_end, queries, n, m)
    others = 2 * query + 2 * number
    again = heads * (4 * head_dim + 8) * walked.positions - others
    again += (kv_heads - 1) * column_mask + kv_heads * 16 * walked.programs
    moved = Work(read=2 * key + column_mask + others, again=again, written=2 * key)
    of_keys = launch("backward_keys", moved, walked, 4 * _product(m, n, head_dim), m * n)

    least = Work(3 * query + 2 * key + 2 * number + mask, written=query + 2 * key, products=5 * product)
    yield Pass("attention backward", least, (of_queries, of_keys))


def _product(m: int, n: int, head_dim: int) -> int:
    """FLOPs of one product of a tile, which holds the padded head."""
    return 2 * m * n * (1 << (head_dim - 1).bit_length())


def excess(document: int, rows: int, columns: int) -> tuple[float, float]:
    """Scores computed over scores needed, of causal documents of one length, for blocks of rows x columns.

    Where documents begin with a block of rows, and at worst of all places where they may begin. By the period that
    lengths and tiles have in common.
    """
    period = math.lcm(document, rows, columns)
    shift = torch.arange(min(document, math.lcm(rows, columns)), dtype=torch.int32)[:, None]
    m = torch.arange(3 * period, dtype=torch.int32) - shift
    start, end = (m // document * document + shift).clamp(min=0), m + shift + 1
    first = torch.arange(period, 2 * period, rows)
    tiles = -(-end[:, first + rows - 1] // columns) - start[:, first] // columns
    ratios = tiles.sum(1) * rows * columns / (period // document * document * (document + 1) / 2)
    return float(ratios[0]), float(ratios.max())
