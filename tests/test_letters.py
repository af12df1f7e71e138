"""Recall per letter: metrics.LetterCounts against alignments by hand and by brute force, and letters.py's words."""

import random
from collections import Counter

import pytest

from alignment import align_characters
from letters import MIN_OCCURRENCES, describe_letters, find_rare, letter_lines
from metrics import LetterCounts, count_letters

HAUSA = ("sh", "ts", "ƙw")


def test_what_stands_in_a_letters_place_is_that_of_the_alignment() -> None:
    """Against alignment.py, which the report uses."""
    random.seed(1)
    counts = LetterCounts()
    occurrences, hits, mistaken, written = Counter(), Counter(), Counter(), Counter()
    for _ in range(300):
        reference, hypothesis = ("".join(random.choices("abɓ o", k=random.randrange(9))).strip() for _ in range(2))
        counts.add(reference, hypothesis)
        for expected, found in align_characters(reference, hypothesis):
            if found not in (None, " "):
                written[found] += 1
            if expected in (None, " "):
                continue
            occurrences[expected] += 1
            hits[expected] += expected == found
            if expected != found:
                mistaken[expected, found or ""] += 1
    assert counts.occurrences == occurrences
    assert counts.hits == hits
    assert counts.mistaken == mistaken
    assert counts.written == written


@pytest.mark.parametrize(
    ("reference", "hypothesis", "hits", "mistaken"),
    [
        ("shi", "shi", {"sh": 1}, {}),
        ("shi", "si", {}, {("sh", "s"): 1}),
        ("shi", "suhi", {}, {("sh", "suh"): 1}),  # Both letters are there, and something between them.
        ("shi", "chi", {}, {("sh", "ch"): 1}),
        ("shi", "i", {}, {("sh", ""): 1}),
        ("SHI TSA", "SHI SA", {"sh": 1}, {("ts", "S"): 1}),
        ("ƙwai", "kwai", {}, {("ƙw", "kw"): 1}),
        ("sshh", "sshh", {"sh": 1}, {}),
        ("si hi", "shi", {}, {}),
    ],
)
def test_a_digraph_is_found_where_all_of_it_is(
    reference: str, hypothesis: str, hits: dict[str, int], mistaken: dict[tuple[str, str], int]
) -> None:
    counts = LetterCounts(HAUSA)
    counts.add(reference, hypothesis)
    assert {letter: count for letter, count in counts.hits.items() if len(letter) > 1} == hits
    assert {pair: count for pair, count in counts.mistaken.items() if len(pair[0]) > 1} == mistaken


def test_the_longest_digraph_counts() -> None:
    counts = LetterCounts(("dz", "dzs", "zs"))
    counts.add("dzsungel zseb edz", "dzsungel zseb edz")
    assert {letter: count for letter, count in counts.occurrences.items() if len(letter) > 1} == {
        "dzs": 1, "zs": 1, "dz": 1,
    }  # fmt: skip
    assert count_letters(["dzsungel zseb edz"], ("dz", "dzs", "zs")) == counts.occurrences


def test_counts_of_parts_add_up() -> None:
    """As of two processes."""
    pairs = [("shi da", "si da"), ("tsa", "sa"), ("ƙwai", ""), ("", "sh")]
    whole, parts = LetterCounts(HAUSA), [LetterCounts(HAUSA), LetterCounts(HAUSA)]
    for number, pair in enumerate(pairs):
        whole.add(*pair)
        parts[number % 2].add(*pair)
    assert sum(parts, LetterCounts()) == whole
    assert whole.written["sh"] == 1


def test_letters_as_rows_and_in_words() -> None:
    counts = LetterCounts(("sh",))
    for _ in range(MIN_OCCURRENCES):
        counts.add("ɗa", "da")
    counts.add("ƴa shi", "ya si")
    counts.add("ɗo", "o")
    described = describe_letters(counts, {"a": 400, "ɗ": 90, "ƴ": 11, "ɓ": 3})
    assert list(described)[:2] == ["a", "ɗ"]
    assert described["ɗ"] == {
        "occurrences": 21, "recall": 0.0, "written": 0, "taken_for": "d", "times": 20, "in_training": 90,
    }  # fmt: skip
    assert described["a"]["taken_for"] is None
    assert described["i"]["in_training"] == 0
    assert "in_training" not in describe_letters(counts)["a"]
    rare = find_rare({"a": 400, "ɗ": 90, "ƴ": 11, "ɓ": 3})
    assert list(rare.items()) == [("ɓ", 3), ("ƴ", 11)]
    assert letter_lines(described, rare, "results.json") == [
        "letters found least: ɗ 0.0% of 21 (20 as d), a 100.0% of 21",
        "digraphs: sh 0.0% of 1 (1 as s)",
        "rare letters (fewer than 20): h 0% of 1, i 100% of 1, o 100% of 1, s 100% of 1, ƴ 0% of 1",
        "seen fewer than 20 times in the training text: ɓ 3, ƴ 11",
        "never written: ɗ (of 21), h (of 1), sh (of 1), ƴ (of 1)",
    ]
    assert letter_lines({}, {}, "results.json") == []
