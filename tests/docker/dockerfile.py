"""A Dockerfile's instructions, read as far as those of docker/ go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"FROM", "RUN", "ENV", "COPY", "ARG", "WORKDIR", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction. text: what follows its name, continued lines joined. line: where it begins, from 1."""

    line: int
    name: str
    text: str

    def words(self) -> list[str]:
        """Of one in exec form: the list. A health check's is that of its command."""
        value = json.loads(self.text[self.text.index("[") :])
        assert isinstance(value, list)
        assert all(isinstance(word, str) for word in value)
        return value


def parse(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile. Raises ValueError for one that isn't of INSTRUCTIONS."""
    found: list[Instruction] = []
    continued: tuple[int, str] | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("#") or not (line.strip() or continued):
            continue
        first, before = continued or (number, "")
        text = before + line.strip()
        continued = (first, text.removesuffix("\\")) if text.endswith("\\") else None
        if continued is None:
            name, _, rest = text.partition(" ")
            if name not in INSTRUCTIONS or not rest.strip():
                raise ValueError(f"{path.name}:{first}: {text}")
            found.append(Instruction(first, name, rest.strip()))
    if continued is not None:
        raise ValueError(f"{path.name}:{continued[0]}: nothing follows the last backslash")
    return found
