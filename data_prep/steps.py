"""The list of steps between reading and tokenizing, in their order.

Design choices:
- One list, made of the configuration, is what every executor runs.
- Filters judge texts that are cleaned already. Personal data is replaced last: what is dropped needs no replacing, and
  evaluation sets are looked for in the text as it was.
"""

from __future__ import annotations

from pathlib import Path

from megatrain.data_prep.clean.steps import cleaning
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.filters.chain import filters
from megatrain.data_prep.screening.config import Found
from megatrain.data_prep.screening.decontaminate import Decontaminate
from megatrain.data_prep.screening.personal_data import PersonalData
from megatrain.data_prep.step import Step


def steps(config: PrepConfig, evaluation_index: Path | None) -> list[Step]:
    """The steps that are switched on. evaluation_index: of decontaminate.files, if there are any.

    Raises InputError naming the key of a file or library that can't be had.
    """
    found: list[Step] = [*cleaning(config.clean), *filters(config.filters)]
    if evaluation_index is not None:
        found.append(Decontaminate(config.decontaminate, evaluation_index))
    personal = config.personal_data
    if any(action is not Found.keep for action in (personal.email, personal.ip, personal.phone)):
        found.append(PersonalData(personal))
    return found
