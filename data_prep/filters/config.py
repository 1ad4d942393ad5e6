"""The filters' thresholds. Only types and the checks that need nothing but the values.

Design choices:
- Defaults are the published ones. null means the language's own, from filters/languages.yaml: FineWeb2 has measured
  them for many languages, and a figure that is right for English drops whole languages whose words are shorter.
- A reason that the report names is the key of the threshold that decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatrain.errors import bad_value


@dataclass
class UrlListConfig:
    """Drops documents by where they are from. Files have an entry a line; empty lines and those that begin with # are
    passed over. Documents without a URL pass."""

    enabled: bool = False
    """Whether to filter by URL."""
    domains: str | None = None
    """A file of domains; those below them are dropped too."""
    urls: str | None = None
    """A file of whole URLs."""
    substrings: str | None = None
    """A file of what no URL may contain; upper and lower case are alike."""


@dataclass
class LengthConfig:
    """Drops documents that are too short or too long."""

    enabled: bool = False
    """Whether to filter by length."""
    min_characters: int = 0
    """Least characters."""
    max_characters: int | None = None
    """Most characters; null: any."""
    min_words: int = 0
    """Least words, as the language has them."""
    max_words: int | None = None
    """Most words; null: any."""


@dataclass
class WordListConfig:
    """Drops documents that contain a word or phrase of a list (C4: Raffel et al. 2020, section 2.2)."""

    enabled: bool = False
    """Whether to filter by words."""
    words: dict[str, str] = field(default_factory=dict)
    """For each language a file with a word or phrase a line; `all`: for every language. Where words are written
    without spaces between them any occurrence counts, else whole words. Upper and lower case are alike."""


@dataclass
class LanguageConfig:
    """Says what language each document is in, by fastText's lid.176.ftz (Joulin et al. 2016), and drops the others."""

    enabled: bool = False
    """Whether to identify and drop. Where a filter has to know and a document doesn't say, it is identified either
    way."""
    keep: list[str] = field(default_factory=list)
    """ISO 639-1 codes of the languages to keep; empty: all."""
    min_score: float = 0.65
    """Least score of the most likely language (FineWeb: Penedo et al. 2024, section 3.3)."""
    min_scores: dict[str, float] = field(default_factory=dict)
    """The same for single languages."""


@dataclass
class GopherQualityConfig:
    """Documents that don't look like prose (Gopher: Rae et al. 2021, section A1.1)."""

    enabled: bool = False
    """Whether to filter so."""
    min_words: int = 50
    """Least words; those of punctuation alone don't count."""
    max_words: int = 100_000
    """Most words, counted likewise."""
    min_mean_word_length: float | None = None
    """Least mean length of a word in characters; null: the language's, English 3."""
    max_mean_word_length: float | None = None
    """Most; null: the language's, English 10."""
    max_hashes_per_word: float = 0.1
    """Most # for each word."""
    max_ellipses_per_word: float = 0.1
    """Most ellipses for each word."""
    max_bullet_line_share: float = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_line_share: float = 0.3
    """Largest share of lines that end in an ellipsis."""
    min_alphabetic_share: float | None = None
    """Least share of words with a letter in them; null: the language's, English 0.8."""
    min_stop_words: int = 2
    """Least different stop words of the language (filters/languages.yaml); a language without a list passes."""


@dataclass
class GopherRepetitionConfig:
    """Documents that repeat themselves (Gopher: Rae et al. 2021, Table A1). Shares are of lines, of paragraphs, or of
    all characters."""

    enabled: bool = False
    """Whether to filter so."""
    max_repeated_paragraph_share: float = 0.3
    """Largest share of paragraphs that repeat an earlier one."""
    max_repeated_paragraph_character_share: float = 0.2
    """Largest share of characters in them."""
    max_repeated_line_share: float | None = None
    """Largest share of lines that repeat an earlier one; null: the language's, English 0.3."""
    max_repeated_line_character_share: float = 0.2
    """Largest share of characters in them."""
    max_top_ngram_shares: list[float] | None = None
    """Largest shares of characters in the most frequent 2, 3 and 4 words; null: the language's, English 0.2, 0.18 and
    0.16."""
    max_repeated_ngram_shares: list[float] | None = None
    """Largest shares of characters in 5, 6, 7, 8, 9 and 10 words that were there before; null: the language's, English
    0.15, 0.14, 0.13, 0.12, 0.11 and 0.1."""


@dataclass
class C4Config:
    """Leaves out lines that are no prose, and documents with too little left (C4: Raffel et al. 2020, section 2.2)."""

    enabled: bool = False
    """Whether to filter so."""
    require_terminal_punctuation: bool = True
    """Leave out lines that don't end a sentence. FineWeb doesn't ask for this."""
    min_words_per_line: int = 3
    """Lines with fewer words are left out."""
    max_word_length: int = 1000
    """Lines with a longer word are left out, in characters."""
    min_sentences: int = 5
    """Least sentences in the lines that are left."""
    remove_citations: bool = True
    """Take [1], [edit] and [citation needed] out of the lines."""


@dataclass
class FineWebConfig:
    """Documents that are lists or leftovers of a page's frame (FineWeb: Penedo et al. 2024, section 3.6)."""

    enabled: bool = False
    """Whether to filter so."""
    min_terminal_line_share: float | None = None
    """Least share of lines that end in terminal punctuation; null: the language's, English 0.12."""
    short_line_characters: int = 30
    """A line of at most so many characters is short."""
    max_short_line_share: float | None = None
    """Largest share of short lines; null: the language's, English 0.67."""
    max_repeated_line_character_share: float | None = None
    """Largest share of characters in lines that repeat an earlier one; null: the language's, English 0.01."""
    max_newlines_per_word: float | None = None
    """Most line ends for each word; null: the language's, English 0.3."""


@dataclass
class ClassifierConfig:
    """Drops documents that a fastText classifier scores too low."""

    enabled: bool = False
    """Whether to filter by a classifier."""
    path: str | None = None
    """The model: a .bin or .ftz file."""
    label: str = "__label__hq"
    """The label that is asked for."""
    min_score: float = 0.5
    """Least probability of the label."""


@dataclass
class FiltersConfig:
    """The filters, in the order in which they run: each drops before a dearer one looks."""

    url_list: UrlListConfig = field(default_factory=UrlListConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    word_list: WordListConfig = field(default_factory=WordListConfig)
    gopher_quality: GopherQualityConfig = field(default_factory=GopherQualityConfig)
    gopher_repetition: GopherRepetitionConfig = field(default_factory=GopherRepetitionConfig)
    c4: C4Config = field(default_factory=C4Config)
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)


TOP_NGRAMS = (2, 3, 4)
"""Words of the n-grams whose most frequent one is judged."""
REPEATED_NGRAMS = (5, 6, 7, 8, 9, 10)
"""Words of the n-grams whose repeats are judged."""


def check(config: FiltersConfig) -> None:
    """Raises InputError for a value that can't be had. The keys are those of `filters=`."""
    repetition, classifier = config.gopher_repetition, config.classifier
    for key, given, wanted in (
        ("max_top_ngram_shares", repetition.max_top_ngram_shares, TOP_NGRAMS),
        ("max_repeated_ngram_shares", repetition.max_repeated_ngram_shares, REPEATED_NGRAMS),
    ):
        if given is not None and len(given) != len(wanted):
            raise bad_value(f"filters.gopher_repetition.{key}", given, f"a share for each n of {list(wanted)}")
    for key, share in _shares(config):
        if not 0 <= share <= 1:
            raise bad_value(f"filters.{key}", share, "from 0 to 1")
    if classifier.enabled and classifier.path is None:
        raise bad_value("filters.classifier.path", None, "give a fastText model")
    if config.word_list.enabled and not config.word_list.words:
        raise bad_value("filters.word_list.words", {}, "give a file for a language, or for `all`")
    urls = config.url_list
    if urls.enabled and urls.domains is None and urls.urls is None and urls.substrings is None:
        raise bad_value("filters.url_list.domains", None, "give this, urls or substrings")


def _shares(config: FiltersConfig) -> Iterator[tuple[str, float]]:
    """Every value that is a share or a probability, with its key."""
    for name, part in vars(config).items():
        for key, value in vars(part).items():
            if key.endswith(("share", "shares", "score", "scores")) and value is not None:
                values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
                yield from ((f"{name}.{key}", each) for each in values)
