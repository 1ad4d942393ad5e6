"""What needs no ranks: the generated configuration, and the guard on DeepSpeed's insides."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatrain.config import DeepSpeedConfig, Precision
from megatrain.engines import deepspeed_internals
from megatrain.engines.deepspeed import DeepSpeedEngine, json_config
from megatrain.errors import InputError

RELIED_ON = [(owner, method) for owner, methods in deepspeed_internals.RELIED_ON.items() for method in methods]


@given(
    stage=st.sampled_from((0, 1, 2, 3)),
    offload=st.booleans(),
    precision=st.sampled_from(Precision),
    bucket=st.integers(1, 10**9),
)
def test_what_holds_in_every_configuration(stage: int, offload: bool, precision: Precision, bucket: int) -> None:
    config = DeepSpeedConfig(zero_stage=stage, offload_optimizer=offload, bucket_elements=bucket)
    generated = json_config(config, precision, micro_batch_size=3)
    zero = generated["zero_optimization"]
    assert generated["train_micro_batch_size_per_gpu"] == 3
    assert generated["gradient_accumulation_steps"] == 1
    assert generated["gradient_clipping"] == 0.0
    assert generated["data_types"] == {"grad_accum_dtype": "fp32"}
    assert generated["communication_data_type"] == "fp32"
    assert generated["bf16"]["enabled"] == (precision is Precision.bf16)
    assert zero["stage"] == stage
    assert zero["reduce_bucket_size"] == bucket
    # DeepSpeed asserts that it is even.
    assert zero["allgather_bucket_size"] in (bucket, bucket + 1)
    assert zero["allgather_bucket_size"] % 2 == 0
    assert ("offload_optimizer" in zero) == offload
    assert ("compute_grad_norm" in zero) == (stage in (1, 2))
    assert ("stage3_prefetch_bucket_size" in zero) == (stage == 3)


def test_zero_3_and_offload() -> None:
    config = DeepSpeedConfig(
        zero_stage=3, offload_optimizer=True, prefetch_elements=5, max_live_elements=6, persistence_elements=7
    )
    assert json_config(config, Precision.bf16, 1)["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 5,
        "stage3_max_live_parameters": 6,
        "stage3_max_reuse_distance": 6,
        "stage3_param_persistence_threshold": 7,
        "memory_efficient_linear": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }


def test_on_an_accelerator_communication_overlaps_and_host_memory_is_pinned() -> None:
    with mock.patch("megatrain.device.accelerator", return_value="cuda"):
        zero = json_config(DeepSpeedConfig(zero_stage=2, offload_optimizer=True), Precision.bf16, 1)[
            "zero_optimization"
        ]
        piped = json_config(DeepSpeedConfig(zero_stage=2), Precision.bf16, 1, pipeline=True)
    assert zero["overlap_comm"] is True
    assert piped["zero_optimization"]["overlap_comm"] is False
    assert zero["offload_optimizer"]["pin_memory"] is True


def test_the_installed_deepspeed_is_the_one_relied_on() -> None:
    deepspeed_internals.check_version()


@pytest.mark.parametrize(("owner", "method"), RELIED_ON, ids=lambda value: getattr(value, "__name__", value))
def test_another_source_is_refused_before_anything_is_built(owner: type, method: str) -> None:
    with (
        mock.patch.dict(deepspeed_internals.RELIED_ON[owner], {method: "0" * 16}),
        pytest.raises(InputError) as error,
    ):
        DeepSpeedEngine(DeepSpeedConfig(), Precision.fp32, 1, 1.0)
    assert f"{owner.__name__}.{method} of deepspeed 0.19" in str(error.value)
    assert "legal: deepspeed 0.19.8" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_method_that_is_gone_is_refused() -> None:
    owner = next(iter(deepspeed_internals.RELIED_ON))
    with (
        mock.patch.dict(deepspeed_internals.RELIED_ON[owner], {"gone": "0" * 16}),
        pytest.raises(InputError, match=r"DeepSpeedEngine\.gone"),
    ):
        deepspeed_internals.check_version()


def test_an_optimizer_that_is_not_known_is_not_guessed() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError):
        deepspeed_internals.adapt(SimpleNamespace(optimizer=torch.optim.SGD([weight])))
