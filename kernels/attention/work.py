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

from megatrain.kernels.attention.configs import Tile, Tiles
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
    # Bytes of Q (and O, DO, DQ), of K (and V, DK, DV), of LSE (and DLSE, DELTA), and of both bounds.
    query, key = 2 * head_dim * batch * heads * queries, 2 * head_dim * batch * kv_heads * keys
    number, mask, column_mask = 4 * batch * heads * queries, 8 * batch * queries, 8 * batch * keys
    product = 2 * head_dim * heads * int((seen.end - seen.start).sum())

    def launch(kernel: str, tile: Tile, walked: Walk, moved: Work, products: int, more: int = 0) -> Launch:
        """products: how many a tile. more: exponentials of a tile that aren't of a score."""
        scores, computed = tile.queries * tile.keys, heads * walked.tiles
        flops = 2 * scores * (1 << (head_dim - 1).bit_length())  # of the padded head
        work = moved + Work(products=computed * products * flops, exponentials=computed * (scores + more))
        programs = walked.programs * (kv_heads if kernel == "backward_keys" else heads)
        return Launch(kernel, work, f"{compiled} {kernel}", programs, heads * walked.once, heads * walked.whole)

    def by_queries(tile: Tile) -> tuple[Walk, Work]:
        """The walk of blocks of queries, and what it reads of K, V and the mask: a block 4 bounds twice."""
        walked = walk(seen.start, seen.end, keys, tile.queries, tile.keys)
        loaded = heads * (4 * head_dim * walked.positions + mask + 16 * walked.programs)
        return walked, Work(read=2 * key + mask, again=loaded - 2 * key - mask)

    walked, read = by_queries(tiles.forward)
    moved = Work(read=query, written=query + number)
    least = moved + Work(read=2 * key + mask, products=2 * product)
    # Of a tile's every query one more exponential: what the sum so far shrinks by.
    of_all = launch("forward", tiles.forward, walked, moved + read, products=2, more=tiles.forward.queries)
    yield Pass("attention forward", least, (of_all,))

    walked, read = by_queries(tiles.backward_queries)
    moved = Work(read=3 * query + 2 * number, written=query + number)
    of_queries = launch("backward_queries", tiles.backward_queries, walked, moved + read, products=3)

    tile = tiles.backward_keys
    walked = walk(seen.column_start, seen.column_end, queries, tile.keys, tile.queries)
    read = Work(read=2 * key + column_mask, again=(kv_heads - 1) * column_mask + kv_heads * 16 * walked.programs)
    others = 2 * query + 2 * number  # Q, DO, LSE and DELTA: every block walks over those that see it.
    loaded = heads * (4 * head_dim + 8) * walked.positions
    moved = Work(read=others, again=loaded - others, written=2 * key)
    of_keys = launch("backward_keys", tile, walked, moved + read, products=4)

    least = Work(3 * query + 2 * key + 2 * number + mask, written=query + 2 * key, products=5 * product)
    yield Pass("attention backward", least, (of_queries, of_keys))


def excess(document: int, rows: int, columns: int) -> tuple[float, float]:
    """Scores computed over scores needed, of causal documents of one length, for blocks of rows x columns.

    Where documents begin with a block of rows, and at worst of all places where they may begin. By the period that
    lengths and tiles have in common. Blocks of keys are the same, mirrored.
    """
    period = math.lcm(document, rows, columns)
    shift = torch.arange(min(document, math.lcm(rows, columns)), dtype=torch.int32)[:, None]
    m = torch.arange(3 * period, dtype=torch.int32) - shift
    start, end = (m // document * document + shift).clamp(min=0), m + shift + 1
    first = torch.arange(period, 2 * period, rows)
    tiles = -(-end[:, first + rows - 1] // columns) - start[:, first] // columns
    ratios = tiles.sum(1) * rows * columns / (period // document * document * (document + 1) / 2)
    return float(ratios[0]), float(ratios.max())
