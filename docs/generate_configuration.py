"""Writes docs/configuration.md: every key of every command, with its type, default and meaning.

    python docs/generate_configuration.py           (`make docs`)

Design choices:
- The typed tree is the only source: types and docstrings are read from the dataclasses' source, defaults are what
  `megatrain COMMAND` composes with no arguments. A key without a docstring takes its enum's; with neither it is an
  error.
- A group of which one of several dataclasses is chosen (engine) has a table for each.
- Keys of a preset (conf/model) are shown without it: what the dataclass says, "needed" where every preset says its own.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from megatrain.__main__ import COMMANDS
from megatrain.compose import CONF, SCHEMAS, compose
from megatrain.config import ENGINES, EngineConfig

PAGE = Path(__file__).parent / "configuration.md"
WITHOUT_PRESET = ("model.",)
HEAD = """# Configuration

Every key of every command. Written by `make docs` from `megatrain/config.py`, `data_config.py`, `command_config.py` and
`data_prep/config.py`; a test fails
when it is out of date.

Arguments are `key=value`. `megatrain COMMAND --help` prints a command's keys and presets, `megatrain COMMAND ...
--cfg job` what a command line resolves to, without running it. An unknown key or a value of a wrong type is an error in
one line, with exit code 2. "needed" means that there is no default.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of a table."""

    name: str
    type: str
    default: str
    meaning: str


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, (_, description) in COMMANDS.items():
        module, _, name = SCHEMAS[command].partition(":")
        schema = getattr(importlib.import_module(module), name)
        needed = [f"{each.name}=0" for each in dataclasses.fields(schema) if each.default is MISSING]
        parts.append(f"## megatrain {command}\n\n{_sentence(description)}\n")
        parts.extend(_groups(schema, compose(command, needed), ""))
    return "\n".join(parts)


def _groups(schema: type, values: Any, prefix: str) -> Iterator[str]:
    """The table of a dataclass, then those of the groups in it. values: None where there is no instance."""
    hints = get_type_hints(schema)
    keys, groups = [], []
    for each in dataclasses.fields(schema):
        name, hint = f"{prefix}{each.name}", hints[each.name]
        group, is_dict = _group(hint), get_origin(hint) is dict
        if group is None or is_dict or _is_optional(hint):
            keys.append(_key(schema, each, hint, name, values))
        if group is not None:
            inner = None if is_dict else getattr(values, each.name, None)
            groups.append((f"{name}.NAME" if is_dict else name, group, inner))
    if keys:
        yield _table(keys)
    for name, group, inner in groups:
        yield f"### {name}\n\n{inspect.cleandoc(group.__doc__ or '')}{_presets(name)}\n"
        if group is not EngineConfig:
            yield from _groups(group, inner, f"{name}.")
            continue
        for engine, own in ENGINES.items():
            yield f"#### engine={engine}\n\n{inspect.cleandoc(own.__doc__ or '')}\n"
            composed = compose("train", ["run_dir=0", "max_steps=0", f"engine={engine}"])
            yield from _groups(own, composed.engine, f"{name}.")


def _key(schema: type, field: dataclasses.Field[Any], hint: Any, name: str, values: Any) -> Key:
    meaning = field_docstrings(schema).get(field.name) or _enum_docstring(hint)
    if meaning is None:
        raise ValueError(f"{schema.__name__}.{field.name} has no docstring")
    composed = values is not None and not name.startswith(WITHOUT_PRESET) and field.default is not MISSING
    default = getattr(values, field.name) if composed else _own_default(field)
    return Key(name, _type(hint), _show(default), meaning)


def _enum_docstring(hint: Any) -> str | None:
    """What the type says, where the field says nothing itself."""
    is_enum = isinstance(hint, type) and issubclass(hint, Enum)
    return " ".join((hint.__doc__ or "").split()) if is_enum else None


def field_docstrings(schema: type) -> dict[str, str]:
    """The string below each field of a dataclass and of those it is made of, on one line."""
    found: dict[str, str] = {}
    for base in schema.__mro__[1:]:
        if dataclasses.is_dataclass(base):
            found |= field_docstrings(base)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match below:
                case ast.Expr(ast.Constant(str(text))):
                    found[statement.target.id] = " ".join(text.split())
    return found


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_optional(hint: Any) -> bool:
    return type(None) in _alternatives(hint)


def _group(hint: Any) -> type | None:
    """The dataclass that a field holds, or a dict's values do."""
    candidates = get_args(hint)[1:] if get_origin(hint) is dict else _alternatives(hint)
    return next((each for each in candidates if isinstance(each, type) and dataclasses.is_dataclass(each)), None)


def _type(hint: Any) -> str:
    names = [_type_name(each) for each in _alternatives(hint) if each is not type(None)]
    return " or ".join([*names, "null"] if _is_optional(hint) else names)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "group"
    if get_origin(kind) is list:
        return f"list of {_type_name(get_args(kind)[0])}"
    if issubclass(kind, Enum):
        return ", ".join(str(each.value) for each in kind)
    return str(kind.__name__)


def _own_default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _show(value: Any) -> str:
    """A default as it is written on the command line."""
    if value is MISSING or value == MISSING:
        return "needed"
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def _presets(group: str) -> str:
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if not names:
        return ""
    defaults = OmegaConf.load(CONF / "train.yaml").defaults
    chosen = {key: value for entry in defaults if isinstance(entry, DictConfig) for key, value in entry.items()}
    return f"\n\nPresets, `{group}=NAME`: {', '.join(names)}; {chosen[group]} unless given."


def _table(keys: list[Key]) -> str:
    rows = [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" for key in keys]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    PAGE.write_text(page())
