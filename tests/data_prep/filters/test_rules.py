# ruff: noqa: RUF001
"""Each rule drops what it is there for, and says so; other languages aren't judged by English."""

import re
import textwrap

import pytest

from megatrain.data_prep.filters.c4 import C4
from megatrain.data_prep.filters.chain import filters
from megatrain.data_prep.filters.config import (
    C4Config,
    FiltersConfig,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LengthConfig,
)
from megatrain.data_prep.filters.fineweb import FineWeb
from megatrain.data_prep.filters.gopher_quality import GopherQuality
from megatrain.data_prep.filters.gopher_repetition import GopherRepetition
from megatrain.data_prep.filters.length import Length
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.step import Step
from tests.data_prep.filters.peer import batch

PROSE = (
    "When the ship had passed the last of the islands, nobody on deck spoke for a while. The captain went below to "
    "look at his charts, and the boy who kept the lamps stood beside the wheel.\n"
    "It was the third evening without wind. They had bread for ten days and water for rather less, so that every man "
    "thought about rain, though none of them would have said it.\n"
    "Later, somebody began to sing an old song about a house near the river. Its words were of another time; still the "
    "others joined in, one by one, until the whole crew was singing with him."
)
CHINESE = (
    "这座小城在河的北边，城里的人大多以种茶为生。每年春天，山上的茶树发出新芽，姑娘们便背着竹篓上山去采茶，一直忙到太阳下山。\n"
    "老李今年六十多岁了，他在镇上开了一家小小的书店。书店里没有什么畅销书，但是有很多旧书，都是他几十年来一本一本收集起来的。\n"
    "有一天，一个年轻人走进店里，问他有没有一本关于航海的书。老李想了很久，终于在最里面的书架上找到了它，书页已经发黄，却还很完整。\n"
    "年轻人高兴极了，他说自己的祖父年轻的时候就是靠着这本书学会了看星星，后来在海上走了四十年，从来没有迷过路。"
)
JAPANESE = (
    "昨日は朝から雨が降っていたので、家で古い本を読んでいました。その本は祖父が若いころに買ったもので、海と船の話が書いてあります。\n"
    "午後になると雨がやみ、窓の外に小さな虹が見えました。庭の木の葉はまだ濡れていて、風が吹くたびに光っていました。\n"
    "夕方、友達が訪ねてきて、一緒にお茶を飲みながら長い間話をしました。彼は来月から遠い町で働くことになったそうです。"
)
ALL: list[Step] = [
    GopherQuality(GopherQualityConfig()),
    GopherRepetition(GopherRepetitionConfig()),
    FineWeb(FineWebConfig()),
    C4(C4Config(min_sentences=3)),
]


def reasons(step: Step, texts: list[str], language: str | None = "en") -> dict[str, int]:
    notes = Notes()
    left = step(batch(texts, language), notes)
    dropped = {reason: tally.documents for reason, tally in notes.dropped.get(step.name, {}).items()}
    assert notes.entered[step.name] == len(texts)
    assert len(left) + sum(dropped.values()) == len(texts)
    return dropped


@pytest.mark.parametrize(("text", "language"), [(PROSE, "en"), (CHINESE, "zh"), (JAPANESE, "ja")])
def test_prose_stays_in_every_language(text: str, language: str) -> None:
    for step in ALL:
        assert reasons(step, [text, text], language) == {}
        assert step(batch([text], language), Notes()).texts == [text]


def test_chinese_by_the_rules_of_english_would_be_lost() -> None:
    found = [list(reasons(step, [CHINESE], "en")) for step in ALL]
    assert found == [["min_words"], ["max_top_ngram_shares[2]"], ["max_newlines_per_word"], ["min_sentences"]]


def test_a_language_is_found_where_none_is_named() -> None:
    config = FiltersConfig(gopher_quality=GopherQualityConfig(enabled=True), c4=C4Config(enabled=True, min_sentences=3))
    documents, notes = batch([PROSE, CHINESE, JAPANESE], None), Notes()
    for step in filters(config):
        documents = step(documents, notes)
    assert documents.column("language") == ["en", "zh", "ja"]
    assert documents.texts == [PROSE, CHINESE, JAPANESE]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short to be of use.", "min_words"),
        ("\n".join([PROSE] * 1000), "max_words"),
        ("of a b c to be in it is on " * 10, "min_mean_word_length"),
        ("incomprehensibilities internationalization that with " * 20, "max_mean_word_length"),
        (re.sub(" the ", " # # # the ", PROSE * 2), "max_hashes_per_word"),
        (
            PROSE.replace(" the ", " the... ").replace(" of ", " of… ").replace(" a ", " a... ").replace(",", "..."),
            "max_ellipses_per_word",
        ),
        ("\n".join(f"- {line}" for line in re.split(r"[.,;]\s", PROSE)), "max_bullet_line_share"),
        ("\n".join(f"{line} …" for line in PROSE.split("\n")), "max_ellipsis_line_share"),
        (PROSE.replace(" ", " 12 "), "min_alphabetic_share"),
        (re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "such", PROSE), "min_stop_words"),
    ],
)
def test_gopher_quality(text: str, reason: str) -> None:
    assert reasons(GopherQuality(GopherQualityConfig()), [PROSE, text]) == {reason: 1}


NUMBERED = [f"Line {number} says nothing that was said by line {number + 500}, or so it hopes." for number in range(40)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n\n".join([*NUMBERED[:6], *["It is so."] * 6]), "max_repeated_paragraph_share"),
        ("\n\n".join([*NUMBERED[:6], PROSE, PROSE]), "max_repeated_paragraph_character_share"),
        ("\n".join([*NUMBERED[:6], *["It is so."] * 6]), "max_repeated_line_share"),
        ("\n".join([*PROSE.split("\n"), *NUMBERED[:6], *PROSE.split("\n")[:2]]), "max_repeated_line_character_share"),
        ("spam " * 200, "max_top_ngram_shares[2]"),
        (f"{PROSE} {PROSE}", "max_repeated_ngram_shares[5]"),
    ],
)
def test_gopher_repetition(text: str, reason: str) -> None:
    assert reasons(GopherRepetition(GopherRepetitionConfig()), [PROSE, text]) == {reason: 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE.replace(".\n", "\n")[:-1], "min_terminal_line_share"),
        ("\n".join(f"{line}." for line in textwrap.wrap(PROSE, 28)), "max_short_line_share"),
        ("\n".join([*NUMBERED, NUMBERED[3]]), "max_repeated_line_character_share"),
        (
            "\n\n\n\n".join(
                f"Number {number} of the longest words: antidisestablishmentarianism." for number in range(9)
            ),
            "max_newlines_per_word",
        ),
    ],
)
def test_fineweb(text: str, reason: str) -> None:
    assert reasons(FineWeb(FineWebConfig()), [PROSE, text]) == {reason: 1}


def test_c4_keeps_good_lines() -> None:
    good = PROSE.split("\n")
    bad = [
        "Home | About",
        "Two words.",
        f"A {'very' * 300} long word.",
        "Please enable Javascript to go on.",
        "We use cookies.",
    ]
    ugly = ["An ellipsis is no end...", "Nor is a comma,", "  "]
    text = "\n".join([bad[0], good[0], *bad[1:], "  " + good[1] + "\r", *ugly, "The sea is wide [1][citation needed]."])
    notes = Notes()
    left = C4(C4Config())(batch([text, PROSE]), notes)
    assert left.texts == ["\n".join([good[0], good[1], "The sea is wide ."]), PROSE]
    assert notes.changed["c4"]["lines"].documents == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("One. Two? Three! And four of them.", "min_sentences"),
        (PROSE + "\nLorem ipsum dolor sit amet.", "lorem_ipsum"),
        (PROSE + "\nif (a) { return it; }.", "curly_bracket"),
        ("", "min_sentences"),
    ],
)
def test_c4_drops_documents(text: str, reason: str) -> None:
    assert reasons(C4(C4Config()), [PROSE, text]) == {reason: 1}


def test_c4_as_fineweb_has_it() -> None:
    text = "\n".join(NUMBERED).replace(".", "")
    assert reasons(C4(C4Config(min_sentences=2)), [text]) == {"min_sentences": 1}
    config = C4Config(require_terminal_punctuation=False, min_sentences=2)
    assert C4(config)(batch([text]), Notes()).texts == [text]


def test_length() -> None:
    config = LengthConfig(min_characters=4, max_characters=40, min_words=2, max_words=5)
    texts = ["ab", "x" * 41, "single", "one two three four five six", "just right"]
    wanted = {"min_characters": 1, "max_characters": 1, "min_words": 1, "max_words": 1}
    assert reasons(Length(config), texts) == wanted
    assert reasons(Length(config), ["我来到北京", "我们"], "zh") == {"min_characters": 1}
