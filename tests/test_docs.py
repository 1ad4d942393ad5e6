"""The documentation says what is true: the page of keys is the tree's, links lead somewhere, every key is explained."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from megatrain.__main__ import COMMANDS
from megatrain.config import ModelConfig


@dataclass
class Silent:
    """A group whose key says nothing."""

    key: int = 0


ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/generate_configuration.py, which is a script and in no package."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("generate_configuration")


def test_the_page_of_keys_is_up_to_date(generator: ModuleType) -> None:
    assert generator.PAGE.read_text() == generator.page(), "run `make docs` and commit docs/configuration.md"


def test_a_key_without_a_docstring_is_an_error(generator: ModuleType) -> None:
    assert generator.field_docstrings(ModelConfig)["hidden_size"] == "Width of the residual stream."
    with pytest.raises(ValueError, match=r"Silent\.key has no docstring"):
        list(generator._groups(Silent, None, ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_the_readme_shows_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [command for command in COMMANDS if f"megatrain {command} " not in readme] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert [page for page in pages if f"({page})" not in index] == []
