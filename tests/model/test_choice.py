"""Which kernels are chosen on which GPU, and what is refused: what the GPU is, is given; what is chosen, is real."""

from __future__ import annotations

import sys
from dataclasses import astuple, replace
from typing import Any

import pytest

from megatrain import device
from megatrain.config import AttentionKernel, Kernel, KernelsConfig, LossKernel, ModelConfig, Precision
from megatrain.errors import InputError
from megatrain.kernels import stamps
from megatrain.kernels.attention import flash
from megatrain.model.choice import TORCH, choose
from tests import samples
from tests.kernels.attention.flash_in_torch import Module

AUTO = KernelsConfig()
KERNELS = ("attention", "norm", "rotary", "swiglu", "linear_cross_entropy")
HEADS_OF_128 = replace(samples.MODEL, head_dim=128)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """on(architecture, stamped, flash): pretends that this machine has such a GPU."""

    def pretend(architecture: str, stamped: bool = False, package: str | None = None) -> None:
        monkeypatch.setattr(device, "accelerator", lambda: "cuda")
        monkeypatch.setattr(device, "architecture", lambda: architecture)
        monkeypatch.setattr(
            stamps, "missing", lambda kernel, arch: None if stamped else f"{kernel} has no stamp: {arch}"
        )
        versions = {"flash-attn": package} if package else {}
        monkeypatch.setattr(flash.Library, "installed", lambda library: versions.get(library.package))
        monkeypatch.setitem(sys.modules, "flash_attn", Module("flash_attn", returns_lse=False))

    return pretend


def names(kernels: KernelsConfig) -> list[str]:
    return [choice.value for choice in (getattr(kernels, name) for name in KERNELS)]


def error(asked: KernelsConfig, model: ModelConfig = HEADS_OF_128, precision: Precision = Precision.bf16) -> str:
    with pytest.raises(InputError) as raised:
        choose(asked, model, precision)
    return str(raised.value)


def test_the_cpu_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = choose(AUTO, samples.MODEL, Precision.bf16)
    assert chosen.kernels == TORCH
    assert chosen.reasons == dict.fromkeys(KERNELS, "torch: there is no GPU")


def test_a_gpu_takes_what_was_verified_on_it(on: Any) -> None:
    on("sm_90", stamped=True)
    chosen = choose(AUTO, HEADS_OF_128, Precision.bf16)
    assert names(chosen.kernels) == ["triton"] * 5
    assert chosen.reasons["norm"] == "triton: it was verified on sm_90"
    assert "flash-attn is taken from" in chosen.reasons["attention"]


def test_without_a_stamp_it_takes_torch_and_says_why(on: Any) -> None:
    on("sm_90")
    chosen = choose(AUTO, HEADS_OF_128, Precision.bf16)
    assert chosen.kernels == TORCH
    assert chosen.reasons["swiglu"] == "torch: triton: swiglu has no stamp: sm_90"


def test_flash_comes_first_where_it_is_installed(on: Any) -> None:
    on("sm_90", stamped=True, package="2.8.3")
    chosen = choose(AUTO, HEADS_OF_128, Precision.bf16)
    assert names(chosen.kernels) == ["flash", *["triton"] * 4]
    assert choose(AUTO, HEADS_OF_128, Precision.fp32).kernels.attention is AttentionKernel.triton
    assert choose(AUTO, HEADS_OF_128, Precision.fp64).kernels == TORCH


def test_what_is_asked_for_needs_no_stamp(on: Any) -> None:
    on("sm_90", package="2.8.3")
    asked = KernelsConfig(AttentionKernel.flash, Kernel.triton, Kernel.torch, Kernel.triton, LossKernel.chunked)
    chosen = choose(asked, HEADS_OF_128, Precision.bf16)
    assert chosen.kernels == asked
    assert set(chosen.reasons.values()) == {
        "flash: as asked",
        "triton: as asked",
        "torch: as asked",
        "chunked: as asked",
    }


def test_the_cpu_runs_triton_in_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = KernelsConfig(norm=Kernel.triton)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(asked, samples.MODEL, Precision.fp32).kernels == replace(TORCH, norm=Kernel.triton)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert error(asked) == (
        "kernels.norm=triton: it needs a GPU, or TRITON_INTERPRET=1 to be tried; legal: auto, torch"
    )


TRITON = KernelsConfig(attention=AttentionKernel.triton)


@pytest.mark.parametrize(
    ("asked", "model", "precision", "architecture", "expected"),
    [
        (TRITON, replace(HEADS_OF_128, head_dim=100), "bf16", "sm_90", "model.head_dim is 100"),
        (TRITON, replace(HEADS_OF_128, head_dim=264), "bf16", "sm_90", "model.head_dim is 264"),
        (TRITON, HEADS_OF_128, "bf16", "sm_75", "this GPU is sm_75"),
        (KernelsConfig(swiglu=Kernel.triton), HEADS_OF_128, "fp64", "sm_90", "precision=fp64"),
        (KernelsConfig(attention=AttentionKernel.flash), HEADS_OF_128, "bf16", "sm_90", "installed: none"),
        (KernelsConfig(attention=AttentionKernel.flash), HEADS_OF_128, "fp32", "sm_90", "bf16, not in float32"),
    ],
)
def test_what_cannot_be_had_is_refused(
    on: Any, asked: KernelsConfig, model: ModelConfig, precision: str, architecture: str, expected: str
) -> None:
    on(architecture, stamped=True)
    line = error(asked, model, Precision(precision))
    assert expected in line
    assert line.startswith("kernels.")
    assert "legal: auto" in line
    assert "\n" not in line


def test_the_default_is_auto_everywhere() -> None:
    assert {value.value for value in astuple(AUTO)} == {"auto"}
