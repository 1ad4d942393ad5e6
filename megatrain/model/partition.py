"""Which part of the model lies where, on paper: the layers of a pipeline stage, the rows of a tensor-parallel rank.

Design choices:
- No torch: planning and checking a configuration need it too.
- A rank's part of a parameter is a few pieces: ranges of the whole, flattened parameter (law 1), one after the other in
  its own, and zeros behind them where the rows don't divide (padding, which belongs to no range). Engines cut what a
  rank holds further; pieces tell them which elements of the whole those are, and how many ranks hold the same.
- All tensor-parallel ranks hold equal shapes. Column-parallel matrices are cut by rows; qkv by groups of key-value
  heads, gate_up by rows of both halves; a key-value head that several ranks need is held by each of them.
- Stages are contiguous layers. The slowest one sets the pace, so the largest share of FLOPs is made as small as it
  can be, the embedding and the head included; among such divisions, the largest share of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from megatrain.config import ModelConfig
from megatrain.model.spec import Cut, Kind, ParameterSpec, flops_per_token, head_dim, parameters

_Cost = Callable[[int, int, int], float]
_Allowed = Callable[[int, int, int], bool]
# Of the stage (index, first layer, last layer + 1).


@dataclass(frozen=True)
class Stage:
    """One of `count` stages of a pipeline: layers [start, stop)."""

    index: int
    count: int
    start: int
    stop: int

    @property
    def first(self) -> bool:
        """It takes ids."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """It gives losses."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a whole, flattened parameter; copy `replica` of `replicas` on other ranks."""

    start: int
    stop: int
    replica: int = 0
    replicas: int = 1


@dataclass(frozen=True)
class Part:
    """What a rank holds of a parameter: the shape of the whole, as it is stored, and the pieces."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def whole(config: ModelConfig) -> Stage:
    """The only stage of a model that isn't divided."""
    return Stage(0, 1, 0, config.num_layers)


def stages(config: ModelConfig, count: int, sequence_length: int) -> tuple[Stage, ...]:
    """The model in `count` stages, balanced. Every stage has a layer, so count is at most num_layers."""
    flops, size = _stage_costs(config, count, sequence_length)
    bounds = _divide(config.num_layers, count, flops, None)
    most = max(flops(i, *bound) for i, bound in enumerate(bounds))
    # Where many divisions are as fast, as with equal layers: the one whose largest stage is smallest.
    bounds = _divide(config.num_layers, count, size, lambda i, start, stop: flops(i, start, stop) <= most * (1 + 1e-9))
    return tuple(Stage(i, count, start, stop) for i, (start, stop) in enumerate(bounds))


def stage_parameters(config: ModelConfig, stage: Stage) -> tuple[ParameterSpec, ...]:
    """The parameters of a stage; a tied embedding belongs to the first and to the last."""
    return tuple(parameter for parameter in parameters(config) if _belongs(config, stage, parameter.name))


def parts(config: ModelConfig, stage: Stage, rank: int, size: int) -> dict[str, Part]:
    """What tensor-parallel rank `rank` of `size` holds in a stage, by the parameter's global name."""
    found = {}
    for parameter in stage_parameters(config, stage):
        held = pieces(config, parameter, rank, size)
        if config.tie_embeddings and stage.count > 1 and parameter.kind is Kind.embedding:
            end = 0 if stage.first else 1
            held = tuple(replace(p, replica=p.replica + end * p.replicas, replicas=2 * p.replicas) for p in held)
        found[parameter.name] = Part(parameter.shape, held)
    return found


def _belongs(config: ModelConfig, stage: Stage, name: str) -> bool:
    if name.startswith("layers."):
        return stage.start <= int(name.split(".")[1]) < stage.stop
    if name == "embedding.weight":
        return stage.first or (stage.last and config.tie_embeddings)
    return stage.last


def _stage_costs(config: ModelConfig, count: int, sequence_length: int) -> tuple[_Cost, _Cost]:
    """FLOPs per token and parameters of the stage (index, start, stop)."""
    head = 2 * config.vocab_size * config.hidden_size
    per_layer = (flops_per_token(config, sequence_length) - head) / config.num_layers
    sizes = {parameter.name: parameter.size for parameter in parameters(config)}
    layer_size = sum(size for name, size in sizes.items() if name.startswith("layers.0."))

    def flops(index: int, start: int, stop: int) -> float:
        return (stop - start) * per_layer + (head if index == count - 1 else 0)

    @cache
    def ends(index: int) -> int:
        stage = Stage(index, count, 0, 0)
        return sum(size for name, size in sizes.items() if _belongs(config, stage, name))

    def size(index: int, start: int, stop: int) -> float:
        return (stop - start) * layer_size + ends(index)

    return flops, size


def _divide(layers: int, count: int, cost: _Cost, allowed: _Allowed | None) -> list[tuple[int, int]]:
    """Bounds of `count` runs of at least one layer whose largest cost is smallest; the earliest bounds of equals."""
    # best[stop]: the largest cost of the stages so far, and their bounds, where they end at layer `stop`.
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {0: (0.0, [])}
    for index in range(count):
        found: dict[int, tuple[float, list[tuple[int, int]]]] = {}
        for start, (so_far, bounds) in best.items():
            for stop in range(start + 1, layers + 1):
                if allowed is None or allowed(index, start, stop):
                    largest = max(so_far, cost(index, start, stop))
                    if stop not in found or largest < found[stop][0]:
                        found[stop] = (largest, [*bounds, (start, stop)])
        best = found
    return best[layers][1]


def local_shape(config: ModelConfig, parameter: ParameterSpec, size: int) -> tuple[int, ...]:
    """The shape of one tensor-parallel rank's part, of `size` ranks; padding included."""
    rows, *rest = parameter.shape
    match parameter.cut:
        case Cut.none:
            return parameter.shape
        case Cut.heads if size > config.num_kv_heads:
            rows = (config.num_heads // size + 2) * head_dim(config)
        case _:
            rows = -(-rows // size)
    return (rows, *rest)


def pieces(config: ModelConfig, parameter: ParameterSpec, rank: int, size: int) -> tuple[Piece, ...]:
    """What tensor-parallel rank `rank` of `size` holds of a parameter, in the order in which it holds it."""
    rows, width = parameter.shape[0], parameter.size // parameter.shape[0]
    if size == 1:
        return (Piece(0, parameter.size),)
    if parameter.cut is Cut.none:
        return (Piece(0, parameter.size, rank, size),)
    if parameter.cut is Cut.halves:
        part = rows // 2 // size
        starts = [(half * rows // 2 + rank * part) * width for half in (0, 1)]
        return tuple(Piece(start, start + part * width) for start in starts)
    if parameter.cut is Cut.heads and size > config.num_kv_heads:
        return _shared_head(config, width, rank, size)
    part = -(-rows // size)
    start, stop = (min(rows, i * part) * width for i in (rank, rank + 1))
    return (Piece(start, stop),) if start < stop else ()


def _shared_head(config: ModelConfig, width: int, rank: int, size: int) -> tuple[Piece, ...]:
    """Some query heads of a key-value head, and all of its key and value, which other ranks hold too."""
    share = size // config.num_kv_heads
    head, replica = divmod(rank, share)
    element = head_dim(config) * width
    queries = config.num_heads // config.num_kv_heads
    group = head * (queries + 2) * element
    first = group + replica * (queries // share) * element
    keys = group + queries * element
    return Piece(first, first + queries // share * element), Piece(keys, keys + 2 * element, replica, share)


def cut(held: Sequence[Piece], start: int, stop: int) -> Iterator[tuple[Piece, int]]:
    """Elements [start, stop) of a rank's own part, as pieces of the whole and where in the part each begins.

    held: what the rank holds, from `pieces`. What lies in no piece is padding.
    """
    offset = 0
    for piece in held:
        size = piece.stop - piece.start
        first, last = max(start, offset), min(stop, offset + size)
        if first < last:
            moved = piece.start - offset
            yield replace(piece, start=first + moved, stop=last + moved), first
        offset += size
