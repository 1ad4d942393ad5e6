"""The Triton kernels of attention: forward, the gradient of the queries, the gradients of keys and values.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691): scores a tile at a time, an online softmax, and a
backward pass that computes the scores again from their log-sum-exp.

Design choices:
- One mask vocabulary. Each row of the block that a program holds sees one interval of the other side: query m the keys
  start[m] <= n < end[m]; key n is seen by the queries column_start[n] <= m < column_end[n], the same relation. No bound
  ever decreases, so those of a block's first and last row say which tiles nobody sees (skipped), which everybody sees
  whole (no mask arithmetic) and which lie on a boundary. Causal attention, documents, windows, prefixes and queries
  that are a part of the sequence (context parallelism) are all this, and the same compiled kernel.
- No atomics: a program owns what it writes, so the backward pass gives the same bits each time. It costs 7 matrix
  products instead of 5, for the gradients of queries and of keys each compute the scores.
- The program of a tile of keys walks the query heads of its group and their tiles in one loop: nested ones spill.
- A tensor comes as a TMA descriptor (sm_90 and later) or as a tuple (pointer, four strides, S): what the compiler makes
  of descriptors on hardware without TMA has no wide loads. Both take any strides, compute offsets in 64 bits, read
  zeros behind the length and the head dimension (which needn't be a power of two) and write nothing there.
- Scores are in base 2, which is what the hardware has an instruction for; log-sum-exps in memory are natural.

H key-value heads of G query heads each, D the head dimension. Q, O, DO, DQ are [B, H, G, Sq, D]; K, V, DK, DV
[B, H, 1, Sk, D]; LSE, DLSE, DELTA fp32[B, H, G, Sq], START and END int32[B, Sq], COLUMN_START and COLUMN_END
int32[B, Sk], all contiguous. What is in memory has a name in capitals, and so have constants: M queries and N keys a
tile. Grids have one axis: the tiles of a head one after the other.
"""

# ruff: noqa: E741, N806

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _pointers(X, b, h, g, row, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """[ROWS, PADDED] pointers. Only offsets within the tile have 32 bits."""
    pointer, batch, head, group, stride, _ = X
    base = pointer + tl.cast(b, tl.int64) * batch + tl.cast(h, tl.int64) * head
    base += tl.cast(g, tl.int64) * group + tl.cast(row, tl.int64) * stride
    return base + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, PADDED)[None, :]


@triton.jit
def _load(X, b, h, g, row, CLIP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, PADDED] of a head, from `row` on. CLIP: the tile may reach over the tensor's length."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    if isinstance(X, tl.core.tensor_descriptor_base):
        tile = X.load([b, h, g, row, 0]).reshape(ROWS, PADDED)
    else:
        inside = tl.arange(0, PADDED)[None, :] < D
        if CLIP:
            inside = inside & (row + tl.arange(0, ROWS)[:, None] < X[5])
        tile = tl.load(_pointers(X, b, h, g, row, ROWS, PADDED), mask=inside, other=0.0)
    return tile


@triton.jit
def _store(X, tile, b, h, g, row, ROWS: tl.constexpr, D: tl.constexpr):
    """Writes [ROWS, PADDED] to a head, from `row` on."""
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    if isinstance(X, tl.core.tensor_descriptor_base):
        X.store([b, h, g, row, 0], tile.to(X.dtype).reshape(1, 1, 1, ROWS, PADDED))
    else:
        inside = (tl.arange(0, PADDED)[None, :] < D) & (row + tl.arange(0, ROWS)[:, None] < X[5])
        tl.store(_pointers(X, b, h, g, row, ROWS, PADDED), tile.to(X[0].dtype.element_ty), mask=inside)


@triton.jit
def _intervals(LOW, HIGH, b, row, length, ROWS: tl.constexpr, OTHER: tl.constexpr):
    """What the rows from `row` on see: low and high [ROWS], and of the other side's tiles begin, whole, broken, stop.

    Tiles in [begin, stop) are seen by any row; of these those in [whole, broken) by all rows, whole.
    """
    LOW += tl.cast(b, tl.int64) * length
    HIGH += tl.cast(b, tl.int64) * length
    rows = row + tl.arange(0, ROWS)
    low = tl.load(LOW + rows, mask=rows < length, other=0)
    high = tl.load(HIGH + rows, mask=rows < length, other=0)
    last = tl.minimum(row + ROWS, length) - 1
    begin = tl.load(LOW + row) // OTHER
    stop = (tl.load(HIGH + last) + OTHER - 1) // OTHER
    whole = (tl.load(LOW + last) + OTHER - 1) // OTHER
    broken = tl.load(HIGH + row) // OTHER
    none = whole >= broken
    return low, high, begin, tl.where(none, stop, whole), tl.where(none, stop, broken), stop


@triton.jit
def _boundary(i, begin, whole, broken):
    """The i-th tile of those that need a mask: the ones before `whole`, then the ones from `broken` on."""
    return tl.where(begin + i < whole, begin + i, broken + i - (whole - begin))


@triton.jit
def _seen(low, high, positions):
    """bool[rows, tile]: whether the row sees the position."""
    return (positions[None, :] >= low[:, None]) & (positions[None, :] < high[:, None])


@triton.jit
def _attend(
    acc, total, top, q, K, V, b, h, n, low, high, scale,
    MASKED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The online softmax (acc [M, PADDED], total [M], top [M]) with the keys from n on."""
    k = _load(K, b, h, 0, n, MASKED, N, D)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        scores = tl.where(_seen(low, high, n + tl.arange(0, N)), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new_top
    if MASKED:  # What has seen nothing yet stays at 0: -inf - -inf isn't a number.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale - base[:, None])  # One instruction and the exponential: scaled only here.
    shrink = tl.exp2(top - base)
    v = _load(V, b, h, 0, n, MASKED, N, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new_top


@triton.jit
def forward(
    Q, K, V, O, LSE, START, END, queries, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """O and LSE of M queries of one query head. A query that sees no key gets 0 and -inf."""
    tiles = (queries + M - 1) // M
    m = (tiles - 1 - tl.program_id(0) % tiles) * M  # The last first: under a causal mask they have the most to do.
    head = tl.program_id(0) // tiles
    b, h, g = head // (HEADS * GROUP), head // GROUP % HEADS, head % GROUP
    low, high, begin, whole, broken, stop = _intervals(START, END, b, m, queries, M, N)
    q = _load(Q, b, h, g, m, True, M, D)
    acc = tl.zeros([M, triton.next_power_of_2(D)], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    scale = scale * LOG2_E
    for i in tl.range(0, whole - begin + stop - broken):
        n = _boundary(i, begin, whole, broken) * N
        acc, total, top = _attend(acc, total, top, q, K, V, b, h, n, low, high, scale, True, N, D)
    for i in tl.range(whole, broken):
        acc, total, top = _attend(acc, total, top, q, K, V, b, h, i * N, low, high, scale, False, N, D)
    total = tl.where(total == 0.0, 1.0, total)
    _store(O, acc / total[:, None], b, h, g, m, M, D)
    rows = m + tl.arange(0, M)
    tl.store(LSE + tl.cast(head, tl.int64) * queries + rows, (top + tl.log2(total)) * LN_2, mask=rows < queries)


@triton.jit
def _add_to_dq(
    dq, q, do, lse, delta, K, V, b, h, n, low, high, scale,
    MASKED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq [M, PADDED] with what comes from the keys from n on."""
    k = _load(K, b, h, 0, n, MASKED, N, D)
    v = _load(V, b, h, 0, n, MASKED, N, D)
    p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        p = tl.where(_seen(low, high, n + tl.arange(0, N)), p, 0.0)
    dscores = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def backward_queries(
    Q, K, V, O, DO, DQ, LSE, DLSE, DELTA, START, END, queries, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """DQ of M queries of one query head; and DELTA = sum(O * DO) - DLSE, which backward_keys needs."""
    tiles = (queries + M - 1) // M
    m = (tiles - 1 - tl.program_id(0) % tiles) * M
    head = tl.program_id(0) // tiles
    b, h, g = head // (HEADS * GROUP), head // GROUP % HEADS, head % GROUP
    low, high, begin, whole, broken, stop = _intervals(START, END, b, m, queries, M, N)
    rows = m + tl.arange(0, M)
    row = tl.cast(head, tl.int64) * queries + rows
    do = _load(DO, b, h, g, m, True, M, D)
    o = _load(O, b, h, g, m, True, M, D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) - tl.load(DLSE + row, mask=rows < queries, other=0.0)
    tl.store(DELTA + row, delta, mask=rows < queries)
    lse = tl.load(LSE + row, mask=rows < queries, other=0.0) * LOG2_E
    q = _load(Q, b, h, g, m, True, M, D)
    dq = tl.zeros([M, triton.next_power_of_2(D)], tl.float32)
    scale2 = scale * LOG2_E
    for i in tl.range(0, whole - begin + stop - broken):
        n = _boundary(i, begin, whole, broken) * N
        dq = _add_to_dq(dq, q, do, lse, delta, K, V, b, h, n, low, high, scale2, True, N, D)
    for i in tl.range(whole, broken):
        dq = _add_to_dq(dq, q, do, lse, delta, K, V, b, h, i * N, low, high, scale2, False, N, D)
    _store(DQ, dq * scale, b, h, g, m, M, D)


@triton.jit
def _add_to_dk_dv(
    dk, dv, k, v, Q, DO, LSE, DELTA, b, h, g, m, queries, low, high, scale,
    MASKED: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk and dv [N, PADDED] with what comes from the queries of head g from m on. Scores are [N, M] here."""
    q = _load(Q, b, h, g, m, MASKED, M, D)
    do = _load(DO, b, h, g, m, MASKED, M, D)
    columns = m + tl.arange(0, M)
    inside = columns < queries
    lse = tl.load(LSE + g * queries + columns, mask=inside, other=0.0) * LOG2_E
    delta = tl.load(DELTA + g * queries + columns, mask=inside, other=0.0)
    p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])
    if MASKED:
        p = tl.where(_seen(low, high, columns), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dscores = p * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
    return tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def backward_keys(
    Q, K, V, DO, DK, DV, LSE, DELTA, COLUMN_START, COLUMN_END, queries, keys, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """DK and DV of N keys of one key-value head."""
    tiles = (keys + N - 1) // N
    n = tl.program_id(0) % tiles * N
    head = tl.program_id(0) // tiles
    b, h = head // HEADS, head % HEADS
    low, high, begin, whole, broken, stop = _intervals(COLUMN_START, COLUMN_END, b, n, keys, N, M)
    k = _load(K, b, h, 0, n, True, N, D)
    v = _load(V, b, h, 0, n, True, N, D)
    dk = tl.zeros([N, triton.next_power_of_2(D)], tl.float32)
    dv = tl.zeros([N, triton.next_power_of_2(D)], tl.float32)
    scale2 = scale * LOG2_E
    LSE += tl.cast(head, tl.int64) * GROUP * queries
    DELTA += tl.cast(head, tl.int64) * GROUP * queries
    count = whole - begin + stop - broken
    for i in tl.range(0, count * GROUP):
        g = i // count
        m = _boundary(i % count, begin, whole, broken) * M
        dk, dv = _add_to_dk_dv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, g, m, queries, low, high, scale2, True, M, D)
    count = broken - whole
    for i in tl.range(0, count * GROUP):
        g = i // count
        m = (whole + i % count) * M
        dk, dv = _add_to_dk_dv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, g, m, queries, low, high, scale2, False, M, D)
    _store(DK, dk * scale, b, h, 0, n, N, D)
    _store(DV, dv, b, h, 0, n, N, D)
