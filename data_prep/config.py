"""The configuration of `megatrain prep`. Only types and the checks that need nothing but the values."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatrain.data_prep.clean import config as clean
from megatrain.data_prep.clean.config import CleanConfig
from megatrain.data_prep.deduplicate import config as deduplicate
from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.execute import config as execute
from megatrain.data_prep.execute.config import ExecuteConfig
from megatrain.data_prep.filters import config as filters
from megatrain.data_prep.filters.config import FiltersConfig
from megatrain.data_prep.read import config as read
from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.screening import config as screening
from megatrain.data_prep.screening.config import DecontaminateConfig, PersonalDataConfig
from megatrain.data_prep.tokenizer import config as tokenizer
from megatrain.data_prep.tokenizer.config import TokenizerConfig
from megatrain.errors import bad_value


@dataclass
class PrepConfig(ExecuteConfig):
    """`megatrain prep`: text to shards."""

    input: str | None = None
    """A file, a folder (with all below it) or a glob, on a file system or as a URL: .txt (a file is a document),
    .jsonl, .csv, .tsv, .html, .warc, .wet, each also with .gz, .zst, .bz2 or .xz; .parquet, .arrow."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Several inputs, each with a name: inputs.NAME=PATTERN. Documents that don't name their source get NAME; of equal
    documents the first one's stays, in the order in which inputs are given."""
    output: str = MISSING
    """The folder to write: new, empty, or left by a run that didn't finish."""
    append: bool = False
    """Add the shards of this input to the finished set in `output`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    source: str | None = None
    """The source of documents that don't name theirs."""
    language: str | None = None
    """The language of documents that don't name theirs."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    personal_data: PersonalDataConfig = field(default_factory=PersonalDataConfig)
    deduplicate: DeduplicateConfig = field(default_factory=DeduplicateConfig)
    held_out_share: float = 0.01
    """Share of documents that are never trained on, chosen by a hash of the text."""
    shard_bytes: int = 1024 * 1024 * 1024
    """Largest size of a shard."""
    member_bytes: int = 4 * 1024 * 1024
    """Largest size of the tokens of a member; a document above it is a member by itself."""
    unit_bytes: int = 64 * 1024 * 1024
    """Input that a worker takes at once. A larger .jsonl is cut; other files are taken whole."""
    max_bad_share: float = 0.01
    """Share of records that are empty, not UTF-8 or not JSON, above which the exit code is 3."""


def check(config: PrepConfig) -> None:
    """Raises InputError for a value that can't be had."""
    if (config.input is None) == (not config.inputs):
        raise bad_value("input", config.input, "give this or inputs.NAME=..., not both")
    execute.check(config)
    read.check(config.read)
    clean.check(config.clean)
    filters.check(config.filters)
    screening.check(config.personal_data, config.decontaminate)
    deduplicate.check(config.deduplicate)
    if not config.append:
        tokenizer.check(config.tokenizer)
    elif config.tokenizer.path is not None or config.tokenizer.train:
        raise bad_value("append", config.append, "takes the set's own tokenizer; leave tokenizer.path and train out")
    if not 0 <= config.held_out_share < 1:
        raise bad_value("held_out_share", config.held_out_share, "at least 0 and below 1")
    if not 0 <= config.max_bad_share <= 1:
        raise bad_value("max_bad_share", config.max_bad_share, "from 0 to 1")
    sizes = {"shard_bytes": config.shard_bytes, "member_bytes": config.member_bytes, "unit_bytes": config.unit_bytes}
    for key, value in sizes.items():
        if value < 1:
            raise bad_value(key, value, "at least 1")
