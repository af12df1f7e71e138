"""Splits: shares, groups that stay whole, rules for too few speakers, refusals."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from config import PrepareConfig
from corpora import Corpus, SourceRow
from errors import UsageError
from splits import plan_splits


def corpus_of(rows: list[tuple[str, str, str, str | None]]) -> Corpus:
    """A corpus from (id, speaker, text, split)."""
    source = [SourceRow(i, split, i, text, speaker, {}) for i, speaker, text, split in rows]
    return Corpus("manifest", Path("somewhere"), lambda: iter(source))


def spoken(num_speakers: int, clips_each: int, split: str | None = None) -> list[tuple[str, str, str, str | None]]:
    return [
        (f"{speaker}-{clip}", f"speaker{speaker}", f"sentence {clip}", split)
        for speaker in range(num_speakers)
        for clip in range(clips_each)
    ]


def split_up(rows: list, **settings: object) -> tuple[dict[str, str], tuple[str, ...]]:
    corpus = corpus_of(rows)
    plan = plan_splits(corpus, PrepareConfig(corpus="x", data_dir="y", **settings))
    return {row.id: plan.split_of(row) for row in corpus.read()}, plan.notes


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ([0.8, 0.1, 0.1], {"train": 800, "dev": 100, "test": 100}),
        ([0.7, 0.3, 0.0], {"train": 700, "dev": 300}),
        ([0.7, 0.3], {"train": 700, "dev": 300}),
        ([0.5, 0.0, 0.5], {"train": 500, "test": 500}),
    ],
)
def test_utterances_are_divided_exactly(fractions, expected):
    found, _ = split_up(spoken(10, 100), split_by="utterance", split_fractions=fractions)
    assert Counter(found.values()) == expected


@pytest.mark.parametrize("by", ["speaker", "sentence"])
def test_groups_stay_whole(by):
    rows = spoken(50, 20)
    found, _ = split_up(rows, split_by=by)
    splits_of = defaultdict(set)
    for row_id, speaker, text, _ in rows:
        splits_of[speaker if by == "speaker" else text].add(found[row_id])
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert Counter(found.values()) == {"train": 800, "dev": 100, "test": 100}


def test_sentences_that_differ_in_case_and_punctuation_are_one():
    rows = [
        (f"{i}", "", text, None) for i, text in enumerate(["Ọjọ́ dára.", "ọjọ́ dára", "OJO DARA", "b", "c", "d", "e"])
    ]
    found, _ = split_up(rows, split_by="sentence", split_fractions=[0.5, 0.5])
    assert found["0"] == found["1"]


def test_division_depends_on_the_seed_and_not_on_the_order():
    rows = spoken(10, 50)
    first, _ = split_up(rows, split_by="utterance", seed=1)
    again, _ = split_up(rows[::-1], split_by="utterance", seed=1)
    other, _ = split_up(rows, split_by="utterance", seed=2)
    assert first == again
    assert first != other


def test_test_speakers_with_a_dev_share_from_the_others_said_aloud():
    found, notes = split_up(spoken(4, 90), test_speakers=["speaker3"])
    counts = Counter((row_id.split("-")[0], split) for row_id, split in found.items())
    assert counts["3", "test"] == 90
    assert Counter(found.values()) == {"train": 240, "dev": 30, "test": 90}
    assert all(counts[speaker, "test"] == 0 for speaker in "012")
    assert "dev is taken from the other speakers by utterance" in " ".join(notes)


def test_test_speakers_and_dev_by_speaker():
    found, _ = split_up(spoken(5, 10), test_speakers=["speaker0"], split_by="speaker")
    by_split = defaultdict(set)
    for row_id, split in found.items():
        by_split[split].add(row_id.split("-")[0])
    assert by_split["test"] == {"0"}
    assert len(by_split["dev"]) == 1
    assert by_split["train"] | by_split["dev"] == set("1234")


def test_two_speakers_for_three_splits_are_said_aloud():
    found, notes = split_up(spoken(2, 100), split_by="speaker")
    assert Counter(found.values()) == {"train": 89, "dev": 11, "test": 100}
    assert len({row_id.split("-")[0] for row_id, split in found.items() if split == "test"}) == 1
    assert "two speakers are too few" in " ".join(notes)


def test_three_speakers_give_one_to_each_split_and_the_shares_are_said():
    found, notes = split_up(spoken(3, 10), split_by="speaker")
    assert Counter(found.values()) == {"train": 10, "dev": 10, "test": 10}
    assert "train 33.3% (asked 80%)" in " ".join(notes)


def test_own_splits_are_kept_or_overridden_aloud():
    rows = spoken(2, 50, "train") + [(f"t{i}", "s", f"t{i}", "test") for i in range(7)]
    kept, _ = split_up(rows)
    assert Counter(kept.values()) == {"train": 100, "test": 7}
    divided, notes = split_up(rows, split_by="utterance", split_fractions=[0.7, 0.3])
    assert Counter(divided.values()) == {"train": 70, "dev": 30, "test": 7}
    assert "own 7 test rows stay test" in " ".join(notes)
    _, notes = split_up(rows, split_by="utterance")
    assert "overrides the corpus's own splits" in " ".join(notes)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (spoken(2, 5), {}, "nothing says which rows are for training"),
        (spoken(1, 5), {"split_by": "speaker"}, "--split_by sentence or utterance"),
        (spoken(1, 2), {"split_by": "utterance"}, "2 for 3 splits"),
        ([("a", "", "t", None)] * 9, {"split_by": "speaker"}, "has no speaker"),
        (spoken(3, 5), {"test_speakers": ["speker1"]}, "near: speaker1"),
        (spoken(1, 5), {"test_speakers": ["speaker0"]}, "has 0 for 2 splits"),
    ],
)
def test_refusals_name_the_remedy(rows, settings, message):
    with pytest.raises(UsageError, match=message):
        split_up(rows, **settings)
