"""Sentences, speakers and clips as numbers: the same values have the same number, and are found once."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_part

import identities as module
from corpora import sentence_key, sentence_keys
from data import ShardDataset
from identities import NONE, distinct, identities, is_among

TEXTS = ["One, two!", "one two", "ÌṢẸ́ṢE", "ìṣẹ́ṣe", "…", "", "ΟΔΥΣΣΕΥΣ", "οδυσσευς", "two\nlines", "a\u0301", "\u0301a"]


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    rows = [
        (f"clip {number}", samples, text, "" if number % 3 == 0 else f"speaker {number % 2}")
        for number, (text, (_, samples, _, _)) in enumerate(zip(TEXTS, make_rows(len(TEXTS), seed=4), strict=True))
    ]
    rows[-1] = (rows[-1][0], rows[0][1], *rows[-1][2:])
    write_part(tmp_path / "data" / "train" / "part_1", rows)
    return ShardDataset(tmp_path / "data" / "train")


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:8], TEXTS[-2:], ["\n"], [""], []])
def test_keys_of_many_sentences_are_those_of_each(texts: list[str]) -> None:
    assert sentence_keys(texts) == list(map(sentence_key, texts))


def test_equal_values_have_equal_numbers_and_what_is_missing_has_none(dataset: ShardDataset) -> None:
    found = identities(dataset)
    keys, speakers = list(map(sentence_key, TEXTS)), list(dataset.column("speaker"))
    for numbers, values in ((found.sentences, keys), (found.speakers, speakers)):
        for one, number in zip(values, numbers, strict=True):
            assert (number == NONE) == (one == "")
            assert [one == other for other in values] == (numbers == number).tolist()
    assert (found.clips[0] == found.clips).nonzero()[0].tolist() == [0, len(TEXTS) - 1]
    # The same in every process, else they could not be kept.
    expected = hashlib.blake2b(b"one two", digest_size=8).digest()
    assert found.sentences[0] == np.frombuffer(expected, np.uint64)[0]


def test_they_are_found_once(dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identities(dataset)
    monkeypatch.setattr(module, "_find", lambda _: pytest.fail("found a second time"))
    again = identities(ShardDataset(dataset.folder))
    for name in ("sentences", "speakers", "clips"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))


@pytest.mark.parametrize("count", [0, 1, 50])
def test_membership_is_that_of_numpy(count: int) -> None:
    rng = np.random.default_rng(count)
    values, others = rng.integers(0, 60, 100).astype(np.uint64), rng.integers(0, 60, count).astype(np.uint64)
    np.testing.assert_array_equal(distinct(others), np.unique(others))
    np.testing.assert_array_equal(is_among(values, distinct(others)), np.isin(values, others))
