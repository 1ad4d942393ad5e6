"""AdamW's groups and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain import optimizer, schedule
from megatrain.config import ModelConfig, Norm, OptimConfig, Schedule
from megatrain.model.transformer import Transformer

PEAK = 2.0
COSINE = OptimConfig(learning_rate=PEAK, schedule=Schedule.cosine, warmup_steps=4, final_ratio=0.1)
STABLE = replace(COSINE, schedule=Schedule.warmup_stable_decay)
CONSTANT = replace(COSINE, schedule=Schedule.constant)


def rates(config: OptimConfig, max_steps: int) -> list[float]:
    return [schedule.learning_rate(config, step, max_steps) for step in range(max_steps)]


def test_warm_up_is_linear_and_its_last_step_has_the_peak() -> None:
    for config in (COSINE, STABLE, CONSTANT):
        assert rates(config, 20)[:4] == [0.5, 1.0, 1.5, 2.0]


def test_without_a_number_a_hundredth_of_the_steps_warms_up() -> None:
    config = replace(CONSTANT, warmup_steps=None)
    assert schedule.warmup_steps(config, 1) == 1
    assert rates(config, 201)[:4] == pytest.approx([PEAK / 3, PEAK * 2 / 3, PEAK, PEAK])


def test_cosine() -> None:
    """16 steps of decay: after half of them the rate is half-way, and it ends at final_ratio of the peak."""
    found = rates(COSINE, 20)
    assert found[4] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 16)) / 2))
    assert found[11] == pytest.approx(PEAK * 0.55)
    assert found[19] == pytest.approx(PEAK * 0.1)


def test_cosine_over_its_last_steps_only() -> None:
    found = rates(replace(COSINE, decay_steps=2), 10)
    assert found[4:8] == [PEAK] * 4
    assert found[8:] == pytest.approx([PEAK * 0.55, PEAK * 0.1])


def test_warmup_stable_decay() -> None:
    """A fifth of the steps falls linearly, unless decay_steps says otherwise."""
    found = rates(replace(STABLE, final_ratio=0.0), 20)
    assert found[3:16] == [PEAK] * 13
    assert found[16:] == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert rates(replace(STABLE, decay_steps=1), 20)[18:] == pytest.approx([PEAK, PEAK * 0.1])
    assert rates(replace(STABLE, decay_steps=0), 20)[4:] == [PEAK] * 16


def test_constant() -> None:
    assert rates(CONSTANT, 20)[4:] == [PEAK] * 16
    assert rates(replace(CONSTANT, decay_steps=5), 20)[4:] == [PEAK] * 16


def test_one_step() -> None:
    assert rates(replace(COSINE, warmup_steps=0), 1) == pytest.approx([PEAK * 0.1])
    assert rates(replace(COSINE, warmup_steps=1), 1) == [PEAK]
    assert rates(replace(CONSTANT, warmup_steps=0), 1) == [PEAK]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    max_steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, max_steps))
    decay = draw(st.none() | st.integers(0, max_steps - warmup))
    config = OptimConfig(
        learning_rate=PEAK,
        schedule=draw(st.sampled_from(Schedule)),
        warmup_steps=warmup,
        decay_steps=decay,
        final_ratio=draw(st.floats(0, 1)),
    )
    return config, max_steps


@settings(deadline=None, max_examples=200)
@given(schedules())
def test_every_schedule_rises_then_never_rises_again_and_stays_in_bounds(drawn: tuple[OptimConfig, int]) -> None:
    config, max_steps = drawn
    found = rates(config, max_steps)
    rising, after = found[: config.warmup_steps], found[config.warmup_steps :]
    assert rising == sorted(rising)
    assert after == sorted(after, reverse=True)
    assert all(0 <= rate <= PEAK for rate in found)
    if schedule.decay_steps(config, max_steps) and after:
        assert after[-1] == pytest.approx(PEAK * config.final_ratio)
        assert min(after) >= PEAK * config.final_ratio * (1 - 1e-12)


MODEL = ModelConfig(
    name="test",
    vocab_size=16,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=12,
    tie_embeddings=True,
)
LAYER = "attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"
MATRICES = {f"layers.{i}.{name}.weight" for i in range(2) for name in LAYER}
BIASES = {name.replace("weight", "bias") for name in MATRICES}
NORMS = {f"layers.{i}.{name}_norm.weight" for i in range(2) for name in ("attention", "mlp")} | {"norm.weight"}
QK_NORMS = {f"layers.{i}.attention.{name}_norm.weight" for i in range(2) for name in ("query", "key")}
NORM_BIASES = {name.replace("weight", "bias") for name in NORMS}


def groups(config: OptimConfig, model: ModelConfig) -> dict[float, set[str]]:
    """The names of the parameters at each weight decay."""
    parameters = dict(Transformer(model).named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    built = optimizer.build(config, model, parameters.items())
    assert sum(len(group["params"]) for group in built.param_groups) == len(parameters)
    found: dict[float, set[str]] = {}
    for group in built.param_groups:
        found.setdefault(group["weight_decay"], set()).update(names[p] for p in group["params"])
    return found


@pytest.mark.parametrize(
    ("model", "decayed", "plain"),
    [
        (MODEL, MATRICES, NORMS | {"embedding.weight"}),
        (replace(MODEL, tie_embeddings=False), MATRICES | {"head.weight"}, NORMS | {"embedding.weight"}),
        (
            replace(MODEL, attention_bias=True, mlp_bias=True),
            MATRICES,
            NORMS | BIASES | {"embedding.weight"},
        ),
        (replace(MODEL, qk_norm=True), MATRICES, NORMS | QK_NORMS | {"embedding.weight"}),
        (replace(MODEL, norm=Norm.layer), MATRICES, NORMS | NORM_BIASES | {"embedding.weight"}),
    ],
    ids=["tied", "untied", "biases", "qk norm", "layer norm"],
)
def test_weight_decay_takes_the_matrices(model: ModelConfig, decayed: set[str], plain: set[str]) -> None:
    assert groups(OptimConfig(weight_decay=0.25), model) == {0.25: decayed, 0.0: plain}


def test_weight_decay_takes_what_it_is_told_to() -> None:
    model = replace(MODEL, attention_bias=True, mlp_bias=True)
    config = OptimConfig(weight_decay=0.25)
    assert groups(replace(config, decay_norms=True), model)[0.0] == BIASES | {"embedding.weight"}
    assert groups(replace(config, decay_biases=True), model)[0.0] == NORMS | {"embedding.weight"}
    assert groups(replace(config, decay_embeddings=True), model)[0.0] == NORMS | BIASES
    every = replace(config, decay_norms=True, decay_biases=True, decay_embeddings=True)
    assert groups(every, model) == {0.25: MATRICES | BIASES | NORMS | {"embedding.weight"}}


def test_the_settings_arrive_and_found_inf_skips() -> None:
    weight = torch.nn.Parameter(torch.ones(16, 8))
    config = OptimConfig(learning_rate=0.5, beta1=0.7, beta2=0.8, eps=1e-3)
    built = optimizer.build(config, MODEL, [("embedding.weight", weight)])
    (group,) = built.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.7, 0.8), 1e-3, True)
    weight.grad = torch.ones_like(weight)
    built.found_inf = torch.ones(())  # type: ignore[attr-defined]
    built.step()
    assert weight.eq(1).all()
    assert built.state[weight]["step"] == 0
    built.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    built.step()
    assert weight.detach().flatten().tolist() == pytest.approx([1 - 0.5 / 1.001] * 128)
    assert built.state[weight]["step"] == 1
