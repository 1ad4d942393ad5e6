"""The filters that a configuration asks for, in the order in which they run."""

from __future__ import annotations

from megatrain.data_prep.filters.c4 import C4
from megatrain.data_prep.filters.classifier import Classifier
from megatrain.data_prep.filters.config import FiltersConfig
from megatrain.data_prep.filters.fineweb import FineWeb
from megatrain.data_prep.filters.gopher_quality import GopherQuality
from megatrain.data_prep.filters.gopher_repetition import GopherRepetition
from megatrain.data_prep.filters.language import LanguageFilter, NameLanguage
from megatrain.data_prep.filters.length import Length
from megatrain.data_prep.filters.lists import UrlList, WordList
from megatrain.data_prep.step import Step


def filters(config: FiltersConfig) -> list[Step]:
    """The steps, the cheap ones first. C4 comes before FineWeb, which judges the lines that C4 has left, as it did.

    InputError: a file or a library that a filter needs isn't there.
    """
    steps: list[Step] = []
    if config.url_list.enabled:
        steps.append(UrlList(config.url_list))
    if config.language.enabled:
        steps.append(LanguageFilter(config.language))
    elif _needs_language(config):
        steps.append(NameLanguage())
    if config.length.enabled:
        steps.append(Length(config.length))
    if config.word_list.enabled:
        steps.append(WordList(config.word_list))
    if config.gopher_quality.enabled:
        steps.append(GopherQuality(config.gopher_quality))
    if config.gopher_repetition.enabled:
        steps.append(GopherRepetition(config.gopher_repetition))
    if config.c4.enabled:
        steps.append(C4(config.c4))
    if config.fineweb.enabled:
        steps.append(FineWeb(config.fineweb))
    if config.classifier.enabled:
        steps.append(Classifier(config.classifier))
    return steps


def _needs_language(config: FiltersConfig) -> bool:
    """Whether a filter goes by the language of documents."""
    judged = (config.word_list, config.gopher_quality, config.gopher_repetition, config.c4, config.fineweb)
    counted = config.length.enabled and (config.length.min_words > 0 or config.length.max_words is not None)
    return counted or any(each.enabled for each in judged)
