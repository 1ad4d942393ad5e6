"""From arguments to the typed configuration, and the line that says what is wrong with them."""

from __future__ import annotations

import pytest

from megatrain.compose import compose
from megatrain.config import RopeScaling, SourceConfig, TrainConfig
from megatrain.errors import InputError


def train_config(*arguments: str) -> TrainConfig:
    config = compose("train", ["run_dir=run", "max_steps=10", *arguments])
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize(
    "path", ["/a b/*.{x,y}[1]", "a=b,c", "it's", 'a "b"', "${oc.env:HOME}", "\\", "a\\'b", "null", "3", "~/x:y", "@a#b"]
)
def test_a_string_is_taken_as_it_stands(path: str) -> None:
    assert train_config(f"run_dir={path}").run_dir == path


def test_null_is_none_where_none_is_legal() -> None:
    assert train_config("data.path=x", "data.path=null").data.path is None


def test_fields_of_what_is_not_there_yet_can_be_given() -> None:
    config = train_config("data.sources.a.path=x,y", "data.sources.a.weight=2", "data.sources.b.path=z")
    assert config.data.sources == {"a": SourceConfig("x,y", weight=2.0), "b": SourceConfig("z")}
    assert train_config("model.rope_scaling.factor=4").model.rope_scaling == RopeScaling(factor=4.0)
    assert train_config("model=llama_7b").model.rope_scaling is None


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("max_step=3", "max_step: no such key; did you mean max_steps?"),
        ("model.name.x=3", "model.name.x: no such key; did you mean model.name?"),
        ("data.sources.a.weight=3", "data.sources.a.path: needed, give data.sources.a.path=..."),
        ("max_steps=ten", "max_steps=ten: Value 'ten' of type 'str' could not be converted to Integer"),
        ("precision=fp8", "precision=fp8: Invalid value 'fp8', expected one of [bf16, fp32, fp64]"),
        ("optim=adam", "optim=adam: no such choice; legal: adamw"),
        ("max_steps", "max_steps: arguments are key=value, such as max_steps=..."),
        ("--steps=3", "--steps=3: no such option; arguments are key=value, or --help, --cfg job"),
        ("+max_steps=3", "+max_steps: no such key; did you mean max_steps?"),
    ],
)
def test_what_is_wrong_is_one_line(argument: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        train_config(argument)
    assert str(raised.value) == said
