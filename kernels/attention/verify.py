"""The attention kernels for kernels/verify: what is run in the interpreter, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Generator, Tensor

from megatrain.kernels.attention import configs, op, reference, work
from megatrain.kernels.attention.configs import Tile, Tiles
from megatrain.kernels.verify.case import DTYPES, FP32_TERMS, INTERPRETER, Case, Compilation, Pass, Shape, generator_of
from megatrain.kernels.verify.targets import BULK_LOAD, BULK_STORE, MATRIX_PRODUCT, WIDE_LOAD, WIDE_STORE

FLOPS_PER_CYCLE = {"sm_80": 2048, "sm_90": 4096}
"""Dense bf16 products of a multiprocessor (NVIDIA's A100 and H100 architecture papers)."""


def case(
    name: str, generator: Generator, start: Tensor, end: Tensor, keys: int, heads: tuple[int, int], head_dim: int,
    dtype: torch.dtype, packed: bool = False,
) -> Case:  # fmt: skip
    """Attention of the queries of int32[B, Sq] start and end over `keys` keys; heads: (key-value heads, group).

    packed: q, k and v are views of one projection [B, S, H, G + 2, D]; Sq has to be `keys`.
    """
    (batch, queries), (kv_heads, group) = start.shape, heads

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if packed:
        qkv = random(batch, queries, kv_heads, group + 2, head_dim).permute(3, 0, 2, 1, 4)
        q, k, v = qkv[:group].permute(1, 2, 0, 3, 4), qkv[group], qkv[group + 1]
    else:
        q = random(batch, kv_heads, group, queries, head_dim)
        k, v = random(batch, kv_heads, keys, head_dim), random(batch, kv_heads, keys, head_dim)
    return Case(
        name=f"{name}, {queries}x{keys}, heads {kv_heads}x{group}x{head_dim}{', packed' if packed else ''}, {dtype}",
        operation=_fused,
        reference=_eager,
        inputs={"q": q, "k": k, "v": v, "start": start, "end": end},
        shared=head_dim,  # A query's sum of output and gradient is in all of the query's gradient.
    )


def _fused(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    return op.attention(q, k, v, op.intervals(start, end, k.shape[2]))


def _eager(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """What a model without a fused kernel computes: the softmax in fp32, all else in the inputs' dtype."""
    scores = q @ k[:, :, None].mT / q.shape[-1] ** 0.5
    seen = reference.visible(start, end, k.shape[2])[:, None, None]
    scores = scores.masked_fill(~seen, float("-inf")).to(torch.promote_types(q.dtype, torch.float32))
    return scores.softmax(-1).to(q.dtype) @ v[:, :, None], scores.logsumexp(-1)


def masks(batch: int, length: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A name, start and end, int32[batch, length], of each kind of mask that training has."""
    m = torch.arange(length, dtype=torch.int32).expand(batch, length)
    document = (m + torch.arange(batch, dtype=torch.int32)[:, None]) // 23 * 23
    document = torch.where(document > m, m, document)
    whole = torch.full_like(m, length)
    yield "causal", torch.zeros_like(m), m + 1
    yield "documents", document, m + 1
    yield "window", (m - 16).clamp(min=0), m + 1
    yield "documents and window", torch.maximum(document, m - 16), m + 1
    yield "prefix", torch.zeros_like(m), (m + 1).clamp(min=length // 3)
    yield "bidirectional", torch.zeros_like(m), whole
    yield "bidirectional documents", document, torch.minimum(document + 23, whole)


def random_mask(batch: int, length: int, generator: Generator, rises: float) -> tuple[Tensor, Tensor]:
    """Start and end that each rise at a share of the queries, to anywhere that is legal; int32[batch, length]."""
    m = torch.arange(length, dtype=torch.int32).expand(batch, length)
    rising, share = torch.rand(2, 2, batch, length, generator=generator).unbind()
    start = torch.where(rising[0] < rises, (share[0] * (m + 1)).int(), 0).cummax(1).values
    end = torch.where(rising[1] < rises, m + 1 + (share[1] * (length - m)).int(), m + 1).cummax(1).values
    return start, end


def cases(generator: Generator) -> Iterator[Case]:
    """Every mask in fp32; of both dtypes head dimensions, groups, packed views, and a part of the queries."""
    for name, start, end in masks(2, 75):
        yield case(name, generator, start, end, 75, (1, 2), 32, torch.float32)
    _, start, end = next(masks(1, 75))
    for dtype in (torch.float32, torch.bfloat16):
        for heads, head_dim in (((2, 1), 64), ((1, 3), 40), ((1, 1), 128), ((1, 1), 256)):
            yield case("causal", generator, start, end, 75, heads, head_dim, dtype)
        yield case("causal", generator, start, end, 75, (2, 2), 48, dtype, packed=True)
        yield case("the last queries", generator, start[:, 50:], end[:, 50:], 75, (2, 2), 32, dtype)


HEADS = ((1, 1, 32), (2, 1, 64), (1, 4, 64), (1, 4, 128), (2, 2, 128), (1, 3, 40), (2, 1, 80), (1, 2, 256))
"""Key-value heads, group and dimension of random cases. Each is compiled anew, which is what costs time."""


def random_case(draw: Random, size: int) -> Case:
    """Any mask over any number of keys, of all queries or the last."""
    (kv_heads, group, head_dim), dtype, batch = draw.choice(HEADS), draw.choice(DTYPES), draw.choice((1, 2))
    longest = FP32_TERMS // group if dtype == torch.float32 else 2048
    keys = draw.randint(24, max(48, min(longest, size // (batch * kv_heads * group * head_dim))))
    generator = generator_of(draw)
    rises = draw.choice((0.1, 4 / keys))
    name, start, end = draw.choice([*masks(batch, keys), ("any", *random_mask(batch, keys, generator, rises))])
    first = draw.choice((0, 0, keys // 2))
    packed = first == 0 and draw.random() < 0.5
    heads = (kv_heads, group)
    return case(name, generator, start[:, first:], end[:, first:], keys, heads, head_dim, dtype, packed)


def compilations(target: str) -> Iterator[Compilation]:
    """Grouped heads of each size in bf16, of one that is padded; heads without groups (Llama 7B), also in fp32."""
    for head_dim in (32, 64, 80, 128, 256):
        yield from _kernels(target, head_dim, group=4, dtype="bf16")
    for head_dim in (64, 128):
        yield from _kernels(target, head_dim, group=1, dtype="bf16")
        yield from _kernels(target, head_dim, group=1, dtype="fp32")


QUERIES, KEYS = ("Q", "O", "DO", "DQ"), ("K", "V", "DK", "DV")
NUMBERS = {
    **dict.fromkeys(("LSE", "DLSE", "DELTA"), "*fp32"),
    **dict.fromkeys(("START", "END", "COLUMN_START", "COLUMN_END"), "*i32"),
    **dict.fromkeys(("queries", "keys"), "i32"),
    "scale": "fp32",
}


def _name(head_dim: int, group: int, dtype: str) -> str:
    return f"{head_dim} x{group} {dtype}"


def _tiles(target: str, head_dim: int, dtype: str = "bf16") -> Tiles:
    if target == INTERPRETER:
        return configs.INTERPRETER
    return configs.tiles(target, head_dim, 2 if dtype == "bf16" else 4)


def _kernels(target: str, head_dim: int, group: int, dtype: str) -> Iterator[Compilation]:
    tiles = _tiles(target, head_dim, dtype)
    amd = target == "gfx942"
    loads_and_stores: tuple[str, ...] = (BULK_LOAD, BULK_STORE) if tiles.tma else (WIDE_LOAD, WIDE_STORE)
    if amd:  # What a thread holds of a product are four columns, which it stores as they are.
        loads_and_stores = (WIDE_LOAD,)
    product = (MATRIX_PRODUCT,) if dtype == "bf16" or amd else ()
    for kernel in ("forward", "backward_queries", "backward_keys"):
        tile: Tile = getattr(tiles, kernel)
        rows = dict.fromkeys(QUERIES, tile.queries) | dict.fromkeys(KEYS, tile.keys)
        yield Compilation(
            name=f"{_name(head_dim, group, dtype)} {kernel}",
            function=f"megatrain.kernels.attention.kernel:{kernel}",
            types=NUMBERS | {name: _operand(tiles, dtype, n, head_dim) for name, n in rows.items()},
            constants={"HEADS": 8, "GROUP": group, "D": head_dim, "M": tile.queries, "N": tile.keys},
            divisible=() if tiles.tma else (*QUERIES, *KEYS),
            num_warps=tile.warps,
            num_stages=tile.stages,
            instructions=(*loads_and_stores, *product),
            loop_cycles=_matrix_cycles(target, tile, head_dim) if kernel == "forward" and product else None,
        )


def _matrix_cycles(target: str, tile: Tile, head_dim: int) -> int | None:
    """Of a forward tile's two products in bf16. Below 64 there are fewer of them than exponentials, which decide."""
    if target not in FLOPS_PER_CYCLE or head_dim < 64:
        return None
    return 4 * tile.queries * tile.keys * head_dim // FLOPS_PER_CYCLE[target]


def _operand(tiles: Tiles, dtype: str, rows: int, head_dim: int) -> str | tuple[str, ...]:
    """The type of what launch.operand gives."""
    padded = 1 << (head_dim - 1).bit_length()
    return f"tensordesc<{dtype}[1,1,1,{rows},{padded}]>" if tiles.tma else (f"*{dtype}", *["i32"] * 5)


def passes(shape: Shape, target: str, processors: int) -> Iterator[Pass]:  # noqa: ARG001
    """Causal attention."""
    m = torch.arange(shape.length, dtype=torch.int32).expand(shape.batch, shape.length)
    seen = op.intervals(torch.zeros_like(m), m + 1, shape.length)
    group = shape.heads // shape.kv_heads
    compiled, tiles = _name(shape.head_dim, group, "bf16"), _tiles(target, shape.head_dim)
    return work.passes(seen, shape.kv_heads, group, shape.head_dim, tiles, compiled)


DOCUMENTS = (0.25, 0.5, 1, 2, 3, 4, 8, 16)
"""Lengths, in blocks."""


def packed_documents(target: str, head_dim: int) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Of each kernel the scores computed over those needed, for DOCUMENTS: where they begin with a block, and at worst.

    A block is what a program holds: queries, or in backward_keys keys.
    """
    tiles = _tiles(target, head_dim)
    for kernel in ("forward", "backward_queries", "backward_keys"):
        tile: Tile = getattr(tiles, kernel)
        rows, columns = (tile.keys, tile.queries) if kernel == "backward_keys" else (tile.queries, tile.keys)
        yield kernel, [work.excess(int(length * rows), rows, columns) for length in DOCUMENTS]
