"""The characters of n-grams, against loops that say what they are."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.filters.languages import find
from megatrain.data_prep.filters.ngrams import ngrams, repeated_characters, top_characters
from megatrain.data_prep.filters.words import divide

TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=40).map(" ".join), min_size=1, max_size=6
)


def top(words: list[str], n: int) -> int:
    grams = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    return sum(len(" ".join(gram)) * count for gram, count in grams.most_common(1))


def repeated(words: list[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    at = characters = 0
    while at <= len(words) - n:
        gram = tuple(words[at : at + n])
        if gram in seen:
            characters += len("".join(gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_characters_of_ngrams(texts: list[str]) -> None:
    words = divide(texts, [find("en")] * len(texts))
    for n, grams in enumerate(ngrams(words, 4), 1):
        assert top_characters(words, grams, n).tolist() == [top(text.split(), n) for text in texts]
        assert repeated_characters(words, grams, n).tolist() == [repeated(text.split(), n) for text in texts]
