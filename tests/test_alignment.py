"""Pairs against tables, against jiwer and against the counts of metrics.py; letters stay whole."""

import random
import unicodedata

import jiwer
import pytest

from alignment import Confusions, align_characters, align_words, count_errors, highlight, letters
from metrics import count_character_errors, count_word_errors

YORUBA = ["ọ́", "ẹ̀", "ṣ", "n", "é", "gb", "àwọn", "ọmọ", "ń́", "ɔ̃", "o", "e"]


def random_text(generator: random.Random) -> str:
    """Up to six words of Yoruba letters, some decomposed."""
    words = ["".join(generator.choices(YORUBA, k=generator.randint(1, 4))) for _ in range(generator.randint(0, 6))]
    return unicodedata.normalize(generator.choice(["NFC", "NFD"]), " ".join(words))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "pairs"),
    [
        ("a b c", "a b c", [("a", "a"), ("b", "b"), ("c", "c")]),
        ("a b c", "a c", [("a", "a"), ("b", None), ("c", "c")]),
        ("a c", "a b c", [("a", "a"), (None, "b"), ("c", "c")]),
        ("a b", "a x", [("a", "a"), ("b", "x")]),
        ("", "a b", [(None, "a"), (None, "b")]),
        ("a b", "", [("a", None), ("b", None)]),
        ("", "", []),
        ("  a\tb ", "a b", [("a", "a"), ("b", "b")]),
        ("e\u0301", "\u00e9", [("\u00e9", "\u00e9")]),  # one text, written in two ways
    ],
)
def test_words(reference: str, hypothesis: str, pairs: list) -> None:
    assert align_words(reference, hypothesis) == pairs


def test_pairs_have_the_counts_of_metrics_and_of_jiwer() -> None:
    generator = random.Random(1)
    for _ in range(300):
        reference, hypothesis = random_text(generator), random_text(generator)
        for align, count in ((align_words, count_word_errors), (align_characters, count_character_errors)):
            pairs, counts = align(reference, hypothesis), count(reference, hypothesis)
            assert count_errors(pairs) == (counts.errors, counts.reference_length)
            found = Confusions()
            found.add(pairs)
            assert found.substitutions.total() == counts.substitutions
            assert found.deletions.total() == counts.deletions
            assert found.insertions.total() == counts.insertions
            assert found.reference_length == counts.reference_length
        composed = [unicodedata.normalize("NFC", text) for text in (reference, hypothesis)]
        if composed[0]:
            assert jiwer.wer(*composed) == pytest.approx(count_word_errors(reference, hypothesis).rate)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ọ́ka", ["ọ́", "k", "a"]),
        ("o\u0323\u0301", ["\u1ecd\u0301"]),  # the dot is composed, the tone has no composed form
        ("ẹ̀gbọ́n", ["ẹ̀", "g", "b", "ọ́", "n"]),
        ("हिन्दी", ["हि", "न्", "दी"]),
        ("مُحَمَّد", ["مُ", "حَ", "مَّ", "د"]),
        ("נָא", ["נָ", "א"]),
        ("👩\u200d💻x", ["👩\u200d💻", "x"]),
        ("\u0301a", ["\u0301", "a"]),  # a mark without a letter
        ("", []),
    ],
)
def test_letters_keep_their_marks(text: str, expected: list[str]) -> None:
    assert letters(text) == [unicodedata.normalize("NFC", letter) for letter in expected]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "pieces"),
    [
        ("seven", "sefen", (["se", "v", "en"], ["se", "f", "en"])),
        ("six", "sixty", (["six"], ["six", "ty"])),
        ("ọ́mọ", "ọmọ", (["", "ọ́", "mọ"], ["", "ọ", "mọ"])),  # the tone is lost: the whole letter shows it
        ("si", "on", (["", "si"], ["", "on"])),
    ],
)
def test_differences_inside_a_word(reference: str, hypothesis: str, pieces: tuple) -> None:
    composed = tuple([unicodedata.normalize("NFC", piece) for piece in side] for side in pieces)
    assert highlight(reference, hypothesis) == composed


def test_pieces_are_whole_letters_and_make_up_the_word() -> None:
    generator = random.Random(2)
    for _ in range(300):
        words = ["".join(generator.choices(YORUBA, k=generator.randint(1, 6))) for _ in range(2)]
        for word, pieces in zip(words, highlight(*words), strict=True):
            assert "".join(pieces) == unicodedata.normalize("NFC", word)
            assert all(pieces[1:]), "only the first piece may be empty"
            for piece in pieces[1:]:
                assert not unicodedata.combining(piece[0]), f"{piece!r} begins with a mark"


def test_confusions_count_what_stands_for_what() -> None:
    found = Confusions()
    for reference, hypothesis in (("a b c", "a x c"), ("b", "x"), ("a", "a y"), ("b", ""), ("b", "b")):
        found.add(align_words(reference, hypothesis))
    assert found.substitutions == {("b", "x"): 2}
    assert (found.insertions, found.deletions) == ({"y": 1}, {"b": 1})
    assert found.occurrences == {"a": 2, "b": 4, "c": 1}
