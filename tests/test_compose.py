"""From arguments to a configuration: strings as they stand, errors of one line, what Hydra answers itself."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.__main__ import main
from megatrain.compose import compose, plain
from megatrain.config import DeepSpeedConfig, FsdpConfig, FsdpShard, Precision, Schedule, TrainConfig
from megatrain.errors import BAD_INPUT, DONE, InputError

NEEDED = ["run_dir=r", "max_steps=1"]

AWKWARD = [
    "a,b={c: ${d}}",
    "\\\\${x}\\",
    "it's \\' \\",
    "${oc.env:HOME}",
    "",
    " padded ",
    "[1]",
    "a=b=c",
    "**/*.txt",
    "'",
    "~x",
]
SPECIAL = ["'", '"', "\\", "${", "$", "{", "}", "[", "]", ",", "=", " ", ":", "(", "null", "~", "+", "@", "#", "%", "*"]
anything = st.lists(st.sampled_from(SPECIAL) | st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).map("".join)
"""Text in which what the grammars of Hydra and OmegaConf know is frequent."""


@settings(deadline=None, max_examples=25)
@given(anything.filter(lambda text: text not in ("???", "null")))
def test_any_text_is_taken_as_it_stands(text: str) -> None:
    config = compose("eval", [f"checkpoint={text}", f"data.path={text}", f"text={text}"])
    assert (config.checkpoint, config.data.path, config.text) == (text, text, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_strings_are_taken_as_they_stand(text: str) -> None:
    keys = ("run_dir", "data.path", "data.sources.a.path", "logger.wandb.project")
    config = compose("train", ["max_steps=1", *(f"{key}={text}" for key in keys)])
    assert (config.run_dir, config.data.path, config.data.sources["a"].path) == (text, text, text)
    assert config.logger.wandb.project == text
    assert compose("generate", ["checkpoint=c", f"prompt={text}"]).prompt == text


def test_null_is_none_where_a_string_is_optional_only() -> None:
    assert compose("eval", ["checkpoint=null", "text=null"]).text is None
    assert compose("eval", ["checkpoint=null"]).checkpoint == "null"


def test_values_have_the_types_of_the_tree() -> None:
    config = compose(
        "train",
        [
            *NEEDED,
            "model=llama_7b",
            "precision=fp32",
            "optim.schedule=warmup_stable_decay",
            "optim.learning_rate=1e-3",
            "deterministic=true",
            "launch.processes=null",
            "logger.wandb.tags=[a,b]",
            "data.sources.web.path=d",
            "data.sources.my-code.weight=0.5",
            "data.sources.my-code.path=e",
            "seed=1",
            "seed=2",
        ],
    )
    assert isinstance(config, TrainConfig)
    assert config.model.hidden_size == 4096
    assert config.precision is Precision.fp32
    assert config.optim.schedule is Schedule.warmup_stable_decay
    assert config.optim.learning_rate == 1e-3
    assert config.deterministic is True
    assert config.launch.processes is None
    assert config.logger.wandb.tags == ["a", "b"]
    assert {name: source.weight for name, source in config.data.sources.items()} == {"web": 1.0, "my-code": 0.5}
    assert config.seed == 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_step=1", "max_step: no such key; did you mean max_steps?"),
        ("optim.learning_rte=1", "optim.learning_rte: no such key; did you mean optim.learning_rate?"),
        ("data.sources.a.pth=x", "data.sources.a.pth: no such key"),
        ("modle=tiny", "modle: no such key; did you mean model?"),
        ("run_dir.x=1", "run_dir.x: no such key; did you mean run_dir?"),
        ("hydra.run.dir=x", "hydra.run.dir: no such key"),
        ("engine=fsdq", "engine=fsdq: no such choice; legal: deepspeed, fsdp"),
        ("engine.shard=full", "engine.shard: no such key; engine=fsdp has it"),
        ("engine.shrd=full", "engine.shrd: no such key"),
        ("model=tin", "model=tin: no such choice; legal: gpt_125m, llama3_70b, "),
        ("precision=bf17", "precision=bf17: Invalid value 'bf17', expected one of [bf16, fp32, fp64]"),
        ("optim.schedule=linear", "optim.schedule=linear: Invalid value 'linear', expected one of [cosine, "),
        ("precision=null", "precision=null: "),
        ("seed=x", "seed=x: "),
        ("seed=1.5", "seed=1.5: "),
        ("seed=", "seed=: "),
        ("deterministic=maybe", "deterministic=maybe: "),
        ("data.sources.a.weight=x", "data.sources.a.weight=x: "),
        ("logger.wandb.tags=a", "logger.wandb.tags=a: "),
        ("seed=1,2", "seed=1,2: can't be read as one key and one value"),
        ("seed=(1", "seed=(1: can't be read as one key and one value"),
        ("data.sources.a b.weight=1", "data.sources.a b.weight=1: can't be read as one key and one value"),
        ("data=x", "data=x: is a group of keys; legal: data.NAME=..."),
        ("data.sources={}", "data.sources={}: is a group of keys; legal: data.sources.NAME=..."),
        ("run_dir=???", "run_dir=???: stands for a value that is missing"),
        ("seed", "seed: arguments are key=value, such as seed=..."),
        ("=3", "=3: arguments are key=value, such as KEY=3"),
        ("+seed=1", "+seed: no such key; did you mean seed?"),
        ("--sed", "--sed: no such option; arguments are key=value, or --help, --cfg job"),
        ("--multirun", "--multirun: no such option"),
        ("--cfg", "--cfg: legal: --cfg job"),
    ],
)
def test_errors_are_one_line_that_begins_with_the_argument(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *NEEDED, argument]) == BAD_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"megatrain train: {message}")
    assert printed.err.endswith("\n")
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine=fsdp", "engine.zero_stage=2"], "engine.zero_stage: no such key; engine=deepspeed has it"),
        (["engine.zero_stage=2", "engine=fsdp"], "engine.zero_stage: no such key; engine=deepspeed has it"),
        (["engine=fsdp", "engine.offload_optimizer=true"], "engine.offload_optimizer: no such key; engine=deepspeed "),
        (
            ["engine=fsdp", "engine.shard=hybrid"],
            "engine.shard=hybrid: Invalid value 'hybrid', expected one of [full, ",
        ),
        (["engine=fsdp", "engine=deepspeed", "engine.shard=full"], "engine.shard: no such key; engine=fsdp has it"),
        (
            ["engine=fsdp", "engine.name=deepspeed"],
            "engine.name=deepspeed: legal: engine=deepspeed, which has its own ",
        ),
    ],
)
def test_keys_of_another_engine_are_no_keys(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *NEEDED, *arguments]) == BAD_INPUT
    printed = capsys.readouterr().err
    assert printed.startswith(f"megatrain train: {message}")
    assert len(printed.splitlines()) == 1


def test_the_engine_brings_its_keys() -> None:
    assert compose("train", NEEDED).engine == DeepSpeedConfig()
    assert compose("train", [*NEEDED, "engine=deepspeed", "engine.zero_stage=1"]).engine == DeepSpeedConfig(
        zero_stage=1
    )
    fsdp = compose("train", [*NEEDED, "engine=fsdp", "engine.shard=gradient"])
    assert isinstance(fsdp, TrainConfig)
    assert fsdp.engine == FsdpConfig(shard=FsdpShard.gradient)
    assert plain(fsdp)["engine"] == {"name": "fsdp", "communication_dtype": "fp32", "shard": "gradient"}


def test_what_is_needed_is_named() -> None:
    with pytest.raises(InputError, match=r"^max_steps: needed, give max_steps=\.\.\.$"):
        compose("train", ["run_dir=r"])
    with pytest.raises(InputError, match=r"^data\.sources\.a\.path: needed, give data\.sources\.a\.path=\.\.\.$"):
        compose("train", [*NEEDED, "data.sources.a.weight=2"])


def test_cfg_job_prints_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert compose("train", ["--cfg", "job", "model=llama_7b", "run_dir=a,b"]) is None
    printed = capsys.readouterr().out.splitlines()
    assert "run_dir: a,b" in printed
    assert "max_steps: ???" in printed
    assert "  hidden_size: 4096" in printed


def test_help_lists_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == DONE
    printed = capsys.readouterr().out
    assert "model: gpt_125m, llama3_70b," in printed
    assert "global_batch_size: 256" in printed
    assert compose("generate", ["-h"]) is None


def test_a_failure_leaves_nothing_behind_for_the_next() -> None:
    with pytest.raises(InputError):
        compose("train", [*NEEDED, "seed=x", "data.sources.a.path=x"])
    config = compose("train", NEEDED)
    assert (config.seed, config.data.sources) == (0, {})


def test_composing_silences_no_logger() -> None:
    """Hydra's own `disabled` switches off every logger that exists by then."""
    before = logging.getLogger("megatrain.made.before")
    compose("report", ["run_dir=run"])
    assert not before.disabled
