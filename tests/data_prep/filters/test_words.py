# ruff: noqa: RUF001
"""Words are those of spaCy, whatever was divided before; what is known of them is summed by document."""

from importlib.util import find_spec

import numpy as np
import pytest
import spacy

from megatrain.data_prep.filters import words as words_module
from megatrain.data_prep.filters.languages import find, known
from megatrain.data_prep.filters.segment import segmenter
from megatrain.data_prep.filters.words import LETTER, LONGEST_PIECE, SYMBOL, Words, divide
from tests.data_prep.filters.peer import FEW, real_documents

ODD = (
    "I can't, e.g. (see http://a.b/c?d=e).  \n\n “Quoted”… 5km U.S.A. :-) ...... x-y--z 3.5% "
    "'tis dont foo-don't. colon(:) foo:) x:-))) ----- a....... 5km/h. ¯\\(ツ)/¯ 12:30pm"
)


def spellings(words: Words) -> list[list[str]]:
    """The words as text, by document."""
    names = list(words.vocabulary.words)
    flat = [names[word] for word in words.ids]
    offsets = words.rows.offsets
    return [flat[offsets[row] : offsets[row + 1]] for row in range(len(offsets) - 1)]


@pytest.mark.parametrize("code", ["en", "de", "other"])
def test_words_are_those_of_spacy(code: str) -> None:
    texts = [*real_documents(15, FEW), ODD, "", " ", "Ärzt*innen l'été aujourd'hui z.B. d.h. Straße. Mme. № 5"]
    pipeline = spacy.blank(find(code).words)
    wanted = [[token.text for token in pipeline.tokenizer(text) if token.text.strip()] for text in texts]
    assert spellings(divide(texts, [find(code)] * len(texts))) == wanted


def test_words_do_not_depend_on_what_was_divided_before(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, languages = [ODD, "one two", ODD], [find("en"), find("zh"), find("de")]
    before = spellings(divide(texts, languages))
    monkeypatch.setattr(words_module, "MOST_CHARACTERS", -1)  # A new dictionary for each batch.
    assert spellings(divide(texts, languages)) == before
    assert spellings(divide(texts[1:], languages[1:])) == before[1:]


def test_a_long_piece_is_divided_part_by_part() -> None:
    words = divide(["ab" * (LONGEST_PIECE * 3)], [find("en")])
    assert words.rows.counts.tolist() == [6]
    assert words.lengths.tolist() == [LONGEST_PIECE] * 6


def test_what_is_known_of_words() -> None:
    words = divide(["Well - the 2 of us, the …", "", "a1 ?! 。"], [find("en")] * 3)
    assert words.rows.counts.tolist() == [9, 0, 4]
    assert words.rows.sums(words.have(SYMBOL)).tolist() == [3, 0, 3]
    assert words.rows.sums(words.have(LETTER)).tolist() == [5, 0, 1]
    assert words.stop_words([find("en")] * 3).tolist() == [2, 0, 0]
    kept = words.keep(np.array([False, False, True]))
    assert spellings(kept) == [["a1", "?", "!", "。"]]
    assert kept.lengths.tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two! Three?", 3),
        ("One.) Two", 2),
        ("... ! One", 2),
        ("!", 1),
        ("A 3.5 B. ", 1),
        ("一。二！三", 3),
    ],
)
def test_sentences(text: str, sentences: int) -> None:
    language = find("zh" if "一" in text else "en")
    words = divide([text, "One. Two."], [language, find("en")])
    assert words.sentences().tolist() == [sentences, 2]


def test_sentences_are_those_of_spacy() -> None:
    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    lines = [" ".join(line.split()) for text in real_documents(15, FEW) for line in text.splitlines() if line.strip()]
    wanted = [len(list(pipeline(line).sents)) for line in lines]
    assert divide(lines, [find("en")] * len(lines)).sentences().tolist() == wanted


@pytest.mark.parametrize(
    ("code", "text", "words"),
    [
        ("zh", "我来到北京，2024年。", ["我", "来到", "北京", "，", "2024", "年", "。"]),
        ("ja", "東京タワーに行きました。NHK2", ["東京", "タワー", "に", "行", "きました", "。", "NHK2"]),
        ("th", "สวัสดีครับabc", ["สวัส", "ดีคร", "ับ", "abc"]),
        ("bo", "བོད་ཡིག་", ["བོད་", "ཡིག་"]),
        ("ko", "한국어 문장.", ["한국어", "문장", "."]),
    ],
)
def test_languages_without_spaces(code: str, text: str, words: list[str]) -> None:
    assert spellings(divide([text], [find(code)])) == [words]


def test_every_language_has_words_and_figures() -> None:
    for language in known().values():
        assert find_spec(f"spacy.lang.{language.words}") or segmenter(language.words)("word 1") == ["word", " ", "1"]
        assert len(language.top_ngrams) == 3
        assert len(language.repeated_ngrams) == 6


@pytest.mark.parametrize(
    ("code", "like"),
    [("zh-CN", "zh"), ("cmn_Hani", "zh"), ("EN", "en"), ("eng_Latn", "en"), (None, "other"), ("tlh", "other")],
)
def test_codes_of_languages(code: str | None, like: str) -> None:
    assert find(code) is find(like)
