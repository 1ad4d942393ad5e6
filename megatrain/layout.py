"""Law 5 for layouts: whether the ranks can be divided as asked, or one line that says why not. No torch.

Design choices:
- What can't be is refused with the key and the nearest legal choice; docs/parallelism.md has the whole table.
- `check` knows the configuration only; `check_ranks` the number of ranks too.
"""

from __future__ import annotations

from collections.abc import Callable

from megatrain.config import EngineName, TrainConfig
from megatrain.data.plan import Settings, every
from megatrain.data.slots import idle_share, micro_batches
from megatrain.errors import bad_value
from megatrain.parallel.schedules import INTERLEAVED, ONE_F_ONE_B, nearest_micro_batches


def check(config: TrainConfig) -> None:
    """What can be told before the number of ranks is known. Raises InputError."""
    for name in ("tensor", "pipeline", "virtual_stages", "context", "replicate"):
        if getattr(config.parallel, name) < 1:
            raise bad_value(f"parallel.{name}", getattr(config.parallel, name), "legal: 1 or more")
    if config.parallel.context != 1:
        raise bad_value("parallel.context", config.parallel.context, "context parallelism doesn't exist yet; legal: 1")
    if config.parallel.replicate > 1 and config.engine.name is not EngineName.fsdp:
        raise bad_value(
            "parallel.replicate",
            config.parallel.replicate,
            f"engine={config.engine.name.value} shards over all data-parallel ranks; legal: 1, or engine=fsdp",
        )
    if config.parallel.pipeline > 1 and getattr(config.engine, "overlap_communication", None):
        # Gathers and reductions of other streams between a pipeline's sends: NCCL may hang, and no GPU has tried it.
        raise bad_value("engine.overlap_communication", "true", "not in a pipeline; legal: null or false")
    for phase in every(config):
        _check_tensor(config, phase)
    _check_pipeline(config)


def _check_tensor(config: TrainConfig, phase: Settings) -> None:
    given, model = config.parallel.tensor, config.model

    def fits(size: int) -> bool:
        shares_heads = model.num_kv_heads % size == 0 or size % model.num_kv_heads == 0
        whole = (model.num_heads, model.intermediate_size, phase.sequence_length)
        return shares_heads and all(number % size == 0 for number in whole)

    if not fits(given):
        raise bad_value(
            "parallel.tensor",
            given,
            f"has to divide model.num_heads={model.num_heads}, model.intermediate_size={model.intermediate_size} and "
            f"{phase.keys['sequence_length']}={phase.sequence_length}, and model.num_kv_heads={model.num_kv_heads} or "
            f"be a multiple; legal: {_nearest(given, fits)}",
        )


def _check_pipeline(config: TrainConfig) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.schedule not in (ONE_F_ONE_B, INTERLEAVED):
        raise bad_value("parallel.schedule", parallel.schedule, f"legal: {ONE_F_ONE_B}, {INTERLEAVED}")
    if parallel.virtual_stages > 1 and parallel.schedule != INTERLEAVED:
        legal = f"needs parallel.schedule={INTERLEAVED}; legal: that, or 1"
        raise bad_value("parallel.virtual_stages", parallel.virtual_stages, legal)
    if parallel.schedule == INTERLEAVED and (parallel.pipeline == 1 or parallel.virtual_stages == 1):
        legal = f"needs parallel.pipeline and parallel.virtual_stages above 1; legal: that, or {ONE_F_ONE_B}"
        raise bad_value("parallel.schedule", parallel.schedule, legal)
    if parallel.pipeline * parallel.virtual_stages > layers:
        key = "parallel.pipeline" if parallel.pipeline > layers else "parallel.virtual_stages"
        most = layers if parallel.pipeline > layers else layers // parallel.pipeline
        given = parallel.pipeline if parallel.pipeline > layers else parallel.virtual_stages
        raise bad_value(key, given, f"each stage needs one of the {layers} layers; legal: at most {most}")


def check_ranks(config: TrainConfig, ranks: int, ranks_of_a_node: int) -> None:
    """What depends on the number of ranks, and how many of them a node has. Raises InputError."""
    parallel = config.parallel
    if ranks_of_a_node % parallel.tensor:
        raise bad_value(
            "parallel.tensor",
            parallel.tensor,
            f"its ranks have to be on one node, which has {ranks_of_a_node}; "
            f"legal: {_nearest(parallel.tensor, lambda size: ranks_of_a_node % size == 0)}",
        )
    together = parallel.tensor * parallel.pipeline
    if ranks % together:
        left = ranks // parallel.tensor
        raise bad_value(
            "parallel.pipeline",
            parallel.pipeline,
            f"parallel.tensor={parallel.tensor} and it have to divide the {ranks} ranks; "
            f"legal: {_nearest(parallel.pipeline, lambda size: left % size == 0)}",
        )
    data = ranks // together
    if data % parallel.replicate:
        raise bad_value(
            "parallel.replicate",
            parallel.replicate,
            f"has to divide the {data} data-parallel ranks; "
            f"legal: {_nearest(parallel.replicate, lambda size: data % size == 0)}",
        )
    for phase in every(config):
        _check_batch(config, phase, data)


def _check_batch(config: TrainConfig, phase: Settings, ranks: int) -> None:
    """The global batch gives every data-parallel rank something to do, and a pipeline enough to go round."""
    given, micro_batch_size, key = phase.global_batch_size, phase.micro_batch_size, phase.keys["global_batch_size"]
    if given < ranks:
        raise bad_value(key, given, f"{ranks} ranks need a sample each; legal: at least {ranks}")
    idle = idle_share(given, micro_batch_size, ranks)
    if idle > config.launch.max_idle_share:
        whole = micro_batch_size * ranks
        nearest = max(whole, round(given / whole) * whole)
        raise bad_value(
            key,
            given,
            f"leaves {idle:.1%} of the slots of {ranks} ranks with "
            f"{phase.keys['micro_batch_size']}={micro_batch_size} empty; "
            f"legal: {nearest}, or launch.max_idle_share={idle:.3f}",
        )
    if config.parallel.pipeline > 1:
        number = micro_batches(given, micro_batch_size, ranks)
        legal = nearest_micro_batches(config.parallel.schedule, config.parallel.pipeline, number)
        if number != legal:
            raise bad_value(
                key,
                given,
                f"is {number} micro-batches of {micro_batch_size} for each of {ranks} data-parallel ranks, which "
                f"parallel.schedule={config.parallel.schedule} with {config.parallel.pipeline} stages can't take; "
                f"legal: {legal * micro_batch_size * ranks}",
            )


def _nearest(given: int, legal: Callable[[int], bool]) -> int:
    """The legal number nearest to `given`; the smaller of two. 1 is always legal."""
    return min(filter(legal, range(1, 2 * given + 1)), key=lambda number: abs(number - given))
