"""Which layouts are refused, by which line, and that the legal choice it names is legal."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from megatrain import layout
from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, ModelConfig, ParallelConfig, TrainConfig
from megatrain.data_config import PhaseConfig
from megatrain.errors import InputError

MODEL = ModelConfig(num_layers=6, num_heads=8, num_kv_heads=2, intermediate_size=96)


def config(engine: EngineConfig | None = None, **parallel: Any) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        sequence_length=32,
        global_batch_size=16,
        engine=engine or FsdpConfig(),
        parallel=ParallelConfig(**parallel),
    )


def check(given: TrainConfig, ranks: int = 16, ranks_of_a_node: int = 8) -> None:
    layout.check(given)
    layout.check_ranks(given, ranks, ranks_of_a_node)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor": 2},
        {"tensor": 8},  # Four ranks to a key-value head.
        {"pipeline": 2},
        {"pipeline": 4, "tensor": 2},
        {"pipeline": 2, "virtual_stages": 3, "schedule": "interleaved_1f1b"},
        {"replicate": 4},
        {"tensor": 2, "replicate": 2, "pipeline": 2},
    ],
    ids=str,
)
def test_legal(parallel: dict[str, Any]) -> None:
    check(config(**parallel))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"tensor": 0}, "parallel.tensor=0: legal: 1 or more"),
    "context": ({"context": 2}, "parallel.context=2: context parallelism doesn't exist yet; legal: 1"),
    "heads": ({"tensor": 3}, "parallel.tensor=3: has to divide model.num_heads=8, model.intermediate_size=96 and"),
    "schedule": ({"schedule": "gpipe"}, "parallel.schedule=gpipe: legal: 1f1b, interleaved_1f1b"),
    "virtual": (
        {"pipeline": 2, "virtual_stages": 2},
        "parallel.virtual_stages=2: needs parallel.schedule=interleaved_1f1b",
    ),
    "interleaved": (
        {"schedule": "interleaved_1f1b", "pipeline": 2},
        "parallel.schedule=interleaved_1f1b: needs parallel.pipeline and parallel.virtual_stages above 1",
    ),
    "stages": ({"pipeline": 7}, "parallel.pipeline=7: each stage needs one of the 6 layers; legal: at most 6"),
    "virtual stages": (
        {"pipeline": 2, "virtual_stages": 4, "schedule": "interleaved_1f1b"},
        "parallel.virtual_stages=4: each stage needs one of the 6 layers; legal: at most 3",
    ),
    "pipeline": (
        {"pipeline": 3},
        "parallel.pipeline=3: parallel.tensor=1 and it have to divide the 16 ranks; legal: 2",
    ),
    "replicate": ({"replicate": 3}, "parallel.replicate=3: has to divide the 16 data-parallel ranks; legal: 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    parallel, line = REFUSED[case]
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        check(config(**parallel))


def test_a_tensor_parallel_group_stays_on_a_node() -> None:
    with pytest.raises(
        InputError, match=r"^parallel.tensor=4: its ranks have to be on one node, which has 2; legal: 2$"
    ):
        check(config(tensor=4), ranks_of_a_node=2)


def test_zero_shards_over_all_data_parallel_ranks() -> None:
    with pytest.raises(InputError, match=r"^parallel.replicate=2: engine=deepspeed shards over all"):
        layout.check(replace(TrainConfig(model=MODEL), parallel=ParallelConfig(replicate=2)))


def test_nothing_overlaps_in_a_pipeline() -> None:
    given = config(DeepSpeedConfig(overlap_communication=True), pipeline=2)
    with pytest.raises(InputError, match=r"^engine.overlap_communication=true: not in a pipeline; legal: null or"):
        layout.check(given)
    layout.check(config(DeepSpeedConfig(), pipeline=2))
    layout.check(config(DeepSpeedConfig(overlap_communication=True)))


def test_a_pipeline_needs_enough_micro_batches() -> None:
    given = config(pipeline=4)
    with pytest.raises(InputError, match=r"^global_batch_size=8: is 2 micro-batches .* legal: 16$"):
        check(replace(given, global_batch_size=8))
    check(replace(given, global_batch_size=16))


@pytest.mark.parametrize("case", ["heads", "pipeline", "replicate"])
def test_the_legal_choice_is_legal(case: str) -> None:
    parallel, _ = REFUSED[case]
    with pytest.raises(InputError, match=r"legal: \d+$") as error:
        check(config(**parallel))
    legal = int(str(error.value).rpartition(" ")[2])
    named: dict[str, Any] = dict.fromkeys(parallel, legal)
    check(config(**named))


def test_what_a_phase_asks_for_is_named_as_its_own() -> None:
    phases = {
        "long": PhaseConfig(after_step=1, sequence_length=30),
        "few": PhaseConfig(after_step=2, global_batch_size=6),
        "wide": PhaseConfig(after_step=3, micro_batch_size=3),
    }
    given = replace(config(), micro_batch_size=1, phases={"few": phases["few"]})
    with pytest.raises(InputError, match=r"^phases\.few\.global_batch_size=6: 8 ranks need a sample each"):
        check(given, ranks=8)
    with pytest.raises(InputError, match=r"^phases\.few\.global_batch_size=6: leaves 25\.0% of the slots of 4 ranks"):
        check(given, ranks=4)
    given = replace(given, phases={"wide": phases["wide"]})
    with pytest.raises(InputError, match=r"^global_batch_size=16: .* with phases\.wide\.micro_batch_size=3 empty"):
        check(given, ranks=8)
    given = replace(config(tensor=4), phases={"long": phases["long"]})
    with pytest.raises(InputError, match=r"^parallel\.tensor=4: .* phases\.long\.sequence_length=30, and"):
        check(given, ranks=8)
