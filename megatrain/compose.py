"""From command-line arguments to a typed configuration, through Hydra.

Design choices:
- Arguments are key=value. For a key whose type is a string everything after the first `=` is taken as it stands, so
  globs, braces, commas and `=` in paths and prompts need no quoting beyond the shell's.
- Every error is one line that names the key, what was given and what is legal (law 5), whatever Hydra's looks like.
- Hydra itself answers --help and --cfg; it makes no folder and no log of its own (conf/base.yaml).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatrain.errors import InputError

CONF = Path(__file__).parent / "conf"

SCHEMAS = {
    "prep": "megatrain.data_prep.config:PrepConfig",
    "merge": "megatrain.data_prep.merge_config:MergeConfig",
    "train": "megatrain.config:TrainConfig",
    "eval": "megatrain.command_config:EvalConfig",
    "generate": "megatrain.command_config:GenerateConfig",
    "export": "megatrain.command_config:ExportConfig",
    "import": "megatrain.command_config:ImportConfig",
    "average": "megatrain.command_config:AverageConfig",
    "report": "megatrain.command_config:ReportConfig",
    "inspect": "megatrain.command_config:InspectConfig",
    "doctor": "megatrain.command_config:DoctorConfig",
}
"""The dataclass of each command's configuration."""
RECIPES = {"prep": ("data_prep",)}
"""The groups of a command that are no key of it: each choice sets keys of several groups."""


def compose(command: str, arguments: Sequence[str]) -> Any:
    """The configuration of `command`, an instance of its dataclass.

    None where Hydra has answered instead (--help, --cfg job). Raises InputError with one line.
    """
    module, _, name = SCHEMAS[command].partition(":")
    schema = _with_choices(getattr(importlib.import_module(module), name), arguments)
    overrides = list(_overrides(arguments, schema, RECIPES.get(command, ())))
    config = _run_hydra(command, overrides, schema)
    if config is None:
        return None
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{missing[0]}: needed, give {missing[0]}=...")
    return OmegaConf.to_object(config)


def _with_choices(schema: type, arguments: Sequence[str]) -> type:
    """`schema` with the keys of the engine that the arguments choose, in place of those that all engines have."""
    from megatrain.config import ENGINES, EngineConfig

    if get_type_hints(schema).get("engine") is not EngineConfig:
        return schema
    chosen = [argument.removeprefix("engine=") for argument in arguments if argument.startswith("engine=")]
    # What is no engine's name Hydra refuses, with the names that are.
    keys = ENGINES.get(chosen[-1], EngineConfig) if chosen else type(schema().engine)
    return dataclasses.make_dataclass(
        schema.__name__, [("engine", keys, dataclasses.field(default_factory=keys))], bases=(schema,)
    )


def plain(config: Any) -> Any:
    """A configuration as dicts, lists and values that JSON and YAML can say."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def _overrides(arguments: Sequence[str], schema: type, recipes: Sequence[str]) -> Iterator[str]:
    """The arguments as Hydra's grammar wants them. Raises InputError for one that isn't a key=value of `schema`."""
    words = iter(arguments)
    for argument in words:
        key, equals, value = argument.partition("=")
        if argument in ("--help", "-h"):
            yield argument
        elif argument in ("--cfg", "-c"):
            if next(words, None) != "job":
                raise InputError(f"{argument}: legal: {argument} job")
            yield from (argument, "job")
        elif argument.startswith("-"):
            raise InputError(f"{argument}: no such option; arguments are key=value, or --help, --cfg job")
        elif not key or not equals:
            raise InputError(f"{argument}: arguments are key=value, such as {key or 'KEY'}={value or '...'}")
        else:
            yield argument if key in recipes else _override(key, value, schema)


def _override(key: str, value: str, schema: type) -> str:
    """One key=value as Hydra's grammar wants it."""
    kind, within_dict = _type_of(schema, key)
    if kind is None:
        hint = _of_another_engine(key) or _nearest(key, _keys(schema))
        raise InputError(f"{key}: no such key{hint}")
    text = value
    if str in _alternatives(kind):
        if value == "???":
            raise InputError(f"{key}=???: stands for a value that is missing; legal: any other text")
        text = value if _is_null(value, kind) else _quote(value)
    elif _is_group(kind) and not (CONF / key).is_dir() and not _is_null(value, kind):
        raise InputError(f"{key}={value}: is a group of keys; legal: {key}.NAME=...")
    # Hydra wants to be told where a key is new; only entries of a dict can be.
    return f"{'++' if within_dict else ''}{key}={text}"


def _type_of(schema: Any, key: str) -> tuple[Any, bool]:
    """The type of a dotted key and whether the path goes through a dict; (None, False) where there is no such key."""
    kind: Any = schema
    within_dict = False
    for part in key.split("."):
        kind = next((a for a in _alternatives(kind) if a is not type(None)), None)
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is dict:
            kind, within_dict = get_args(kind)[1], True
        else:
            kind = None
        if kind is None:
            return None, False
    return kind, within_dict


def _make_entries(node: Any, kind: Any, key: Sequence[str]) -> None:
    """Makes, with their defaults, the dataclasses within `node` that a key goes through: entries of a dict, and what is
    null by default. Hydra sets fields of what is there, and makes nothing.

    node: an instance of `kind`.
    """
    name, *rest = key
    if not rest or _type_of(kind, name)[0] is None:
        return
    inner = next(a for a in _alternatives(_type_of(kind, name)[0]) if a is not type(None))
    found = node.get(name) if isinstance(node, dict) else getattr(node, name)
    if found is None and isinstance(inner, type) and dataclasses.is_dataclass(inner):
        found = inner()
        if isinstance(node, dict):
            node[name] = found
        else:
            setattr(node, name, found)
    _make_entries(found, inner, rest)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, else the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_group(kind: Any) -> bool:
    """Whether keys lie below: a dataclass or a dict of them."""
    return any(dataclasses.is_dataclass(a) or get_origin(a) is dict for a in _alternatives(kind))


def _is_null(value: str, kind: Any) -> bool:
    return value == "null" and type(None) in _alternatives(kind)


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a dataclass."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name
        inner = next((a for a in _alternatives(kind) if dataclasses.is_dataclass(a)), None)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _nearest(word: str, legal: Iterator[str]) -> str:
    """A hint at the legal word that is most like `word`."""
    close = difflib.get_close_matches(word, list(legal), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _of_another_engine(key: str) -> str:
    """A hint at the engine that has such a key."""
    from megatrain.config import ENGINES

    having = [name for name, keys in ENGINES.items() if key.removeprefix("engine.") in get_type_hints(keys)]
    return f"; engine={having[0]} has it" if key.startswith("engine.") and having else ""


def _quote(value: str) -> str:
    """`value` as a quoted string of Hydra's grammar in which nothing is special, interpolation included."""
    # OmegaConf reads a backslash before ${ as an escape, and so a pair of them before that as one.
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    escaped = ""
    for position, character in enumerate(text):
        if character == "'":
            escaped += "\\'"
        elif character == "\\" and text[position:].lstrip("\\")[:1] in ("", "'"):
            # Only backslashes before a quote are escapes, the closing one included.
            escaped += "\\\\"
        else:
            escaped += character
    return f"'{escaped}'"


def _run_hydra(command: str, overrides: list[str], schema: type) -> Any:
    """The composed OmegaConf tree, or None where Hydra printed an answer."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    node = schema()
    for override in overrides:
        _make_entries(node, schema, override.lstrip("+").partition("=")[0].split("."))
    ConfigStore.instance().store(name=f"{command}_schema", node=node)
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        composed.append(config)

    arguments, environment = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"megatrain {command}", *overrides]
    # Makes Hydra raise its errors instead of printing them over several lines and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)(keep)()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_one_line(error, overrides)) from error
    except SystemExit as answered:
        if answered.code:  # After --help it is 0.
            raise
    finally:
        sys.argv = arguments
        if environment is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = environment
    return composed[0] if composed else None


def _one_line(error: BaseException, overrides: list[str]) -> str:
    """What is wrong, in one line that begins with the argument where it can be told."""
    text = str(error.__cause__ or error)
    ambiguous = re.match("Ambiguous value for argument '(.*)'", text)
    unreadable: str | None = ambiguous[1] if ambiguous else getattr(error, "override", None)
    if unreadable:
        return f"{unreadable.lstrip('+')}: can't be read as one key and one value"
    full_key = next((line.split(":", 1)[1].strip() for line in text.splitlines() if "full_key:" in line), "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=", "Check"))]
    sentence = " ".join(told)
    # Of a key that is given twice the last one counts.
    given = next((o.lstrip("+") for o in reversed(overrides) if o.lstrip("+").partition("=")[0] == full_key), full_key)
    if "Available options in" in sentence:
        group = sentence.split("Available options in '")[1].split("'")[0]
        begin = told.index(f"Available options in '{group}':") + 1
        choices = ", ".join(told[begin : told.index("Config search path:")])
        given = next((o for o in overrides if o.startswith(f"{group}=")), group)
        return f"{given}: no such choice; legal: {choices}"
    return f"{given}: {sentence}" if given else sentence
