"""Classes of word errors, each from texts whose class a reader would say."""

import unicodedata

import pytest

from error_classes import CLASSES, INSERTED, ErrorClasses, align, classify

MISSING, SPLIT, BOTH = "space missing", "space inserted", "space and letters"
SHORT, LONG = "short word lost", "long word lost"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "classes", "inserted"),
    [
        ("a b c", "a b c", [None, None, None], {}),
        ("", "", [], {}),
        ("", "a b", [], {0: 2}),
        ("a word", "", [SHORT, LONG], {}),
        ("wani abu", "waniabu", [MISSING, MISSING], {}),
        ("jin tsoron wani abu", "jn sorin wania", ["letters", "letters", BOTH, BOTH], {}),
        ("one two three four", "onetwothreefour", [MISSING] * 4, {}),
        ("together", "to gether", [SPLIT], {}),
        ("come together now", "come to gather now", [None, BOTH, None], {}),
        ("he is at home", "he at home", [None, SHORT, None, None], {}),
        ("she went home", "she home", [None, LONG, None], {}),
        ("she home", "she went home", [None, None], {1: 1}),
        ("go home", "go home again now", [None, None], {2: 2}),
        ("ọba ní ilé", "oba ni ilé", ["marks", "marks", None], {}),
        ("ọba ní ilé", "ọbaní ilé", [MISSING, MISSING, None], {}),
        ("ọba ní ilé", "oba nu ilé", ["marks", "letters", None], {}),
        ("the cat sat", "the bat sat", [None, "letters", None], {}),
        ("ẹ̀yà", "ẹyà", ["marks"], {}),
    ],
)
def test_classes(reference: str, hypothesis: str, classes: list[str | None], inserted: dict[int, int]) -> None:
    for form in ("NFC", "NFD"):
        found = classify(reference, unicodedata.normalize(form, hypothesis))
        assert found == (classes, inserted)
    assert set(filter(None, classes)) <= set(CLASSES)


def test_every_word_is_in_one_pair() -> None:
    reference, hypothesis = ["a", "bc", "def", "g", "hij", "k", "lm"], ["abc", "de", "f", "x", "hijk", "lm", "lm"]
    pairs = list(align(reference, hypothesis))
    assert [word for own, _ in pairs for word in own] == reference
    assert [word for _, heard in pairs for word in heard] == hypothesis


def test_what_is_mended_and_what_is_broken() -> None:
    found = ErrorClasses()
    found.add("wani abu yana nan", "waniabu yana na", "wani abu yana nan")
    found.add("shi ne gida", "shi ne gida um", "ne gidan")
    assert found.words == 7
    assert found.first == {MISSING: 2, "letters": 1, INSERTED: 1}
    assert found.second == {SHORT: 1, "letters": 1}
    assert found.mended == {MISSING: 2, "letters": 1, INSERTED: 1}
    assert found.broken == {SHORT: 1, "letters": 1}
    row = found.facts()["classes"]["letters"]
    assert row == {"greedy": 1, "with_lm": 1, "mended": 1, "broken": 1}


def test_parts_add_up() -> None:
    texts = [("a b", "ab", "a b"), ("wani abu", "wani", "wani abu nan"), ("x", "", "y")]
    whole, parts = ErrorClasses(), ErrorClasses()
    for one in texts:
        whole.add(*one)
        part = ErrorClasses()
        part.add(*one)
        parts += part
    assert parts == whole
    # What goes and what comes is the difference; a word may go from one class to another.
    assert whole.first.total() - whole.mended.total() + whole.broken.total() == whole.second.total()


def test_a_long_text_that_is_all_wrong_is_aligned() -> None:
    classes, inserted = classify(" ".join(["xyz"] * 300), " ".join(["ab"] * 250))
    assert len(classes) == 300
    assert not inserted
    assert classes.count("long word lost") + classes.count("short word lost") == 50
