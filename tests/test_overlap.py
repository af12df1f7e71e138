"""Overlap of the splits: literal tables of texts, speakers and clips, and what is found in them."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_part

from cache import FactCache
from corpora import sentence_key
from data import ShardDataset
from findings import Finding
from overlap import Overlap, find_overlap

SILENT = np.zeros(400, np.int16)
CONSTANT = np.full(400, 77, np.int16)


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9_000, 9_000, 400).astype(np.int16)


def compare(folder: Path, **splits: list[tuple[str, np.ndarray, str, str]]) -> Overlap:
    """Rows are (id, audio, text, speaker)."""
    for split, rows in splits.items():
        write_part(folder / split / "part_1", rows, rows_per_batch=2)
    return find_overlap({split: ShardDataset(folder / split) for split in splits})


def texts(split: str, *values: str) -> list[tuple[str, np.ndarray, str, str]]:
    seed = {"train": 1_000, "dev": 2_000, "test": 3_000}[split]
    return [(f"{split}{row}", clip(seed + row), text, "") for row, text in enumerate(values)]


def speakers(split: str, *values: str) -> list[tuple[str, np.ndarray, str, str]]:
    return [
        (name, audio, name, speaker) for (name, audio, _, _), speaker in zip(texts(split, *values), values, strict=True)
    ]


def clips(split: str, *values: np.ndarray) -> list[tuple[str, np.ndarray, str, str]]:
    return [(f"{split}{row}", audio, f"{split}{row}", "") for row, audio in enumerate(values)]


def said(overlap: Overlap) -> list[Finding]:
    assert [finding.check for finding in overlap.findings] == ["shared sentences", "shared speakers", "shared audio"]
    return overlap.findings


# train texts, dev texts, utterances and sentences of dev that are shared, verdict
SENTENCES = {
    "none": (["one", "two"], ["three"], 0, 0, "ok"),
    "case, punctuation and composition": (["It\u2019s caf\u00e9!", "b"], ["IT S CAFE\u0301", "z"], 1, 1, "warning"),
    "words in another order": (["a b"], ["b a"], 0, 0, "ok"),
    "a mark makes another sentence": (["o"], ["\u1ecd"], 0, 0, "ok"),
    "empty and punctuation only": (["", "...", "a"], ["", "?", "b"], 0, 0, "ok"),
    "the same sentence twice": (["a", "b"], ["a", "A.", "c", "d"], 2, 1, "warning"),
    "one in ten": (["a", "b"], ["a", *"cdefghijk"], 1, 1, "ok"),
    "two in ten": (["a", "b"], ["a", "b", *"cdefghij"], 2, 2, "warning"),
    "a closed set": (["yes", "no"] * 10, ["yes", "no"], 2, 2, "ok"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_shared_sentences(tmp_path: Path, case: str) -> None:
    train, dev, utterances, sentences, verdict = SENTENCES[case]
    finding = said(compare(tmp_path, train=texts("train", *train), dev=texts("dev", *dev)))[0]
    facts = finding.facts["train-dev"]
    assert (facts["utterances"], facts["values"], finding.verdict) == (utterances, sentences, verdict)
    assert facts["share"] == pytest.approx(utterances / len(dev))
    assert len(facts["examples"]) == min(3, sentences)
    if not utterances:
        assert finding.result == "no dev sentence is in training: the dev WER is that of unseen sentences"
    elif case == "a closed set":
        assert "a closed set, the dev WER says how well known phrases are told apart" in finding.result
    else:
        assert f'("{dev[0]}"' in finding.result and "repeats known sentences" in finding.result
    assert ("--split_by sentence" in finding.remedy) == (verdict == "warning")


def test_the_english_figure(tmp_path: Path) -> None:
    train = texts("train", *(f"sentence {number}" for number in range(100)))
    dev = texts("dev", *(f"Sentence {number}." if number < 31 else f"other {number}" for number in range(100)))
    finding = said(compare(tmp_path, train=train, dev=dev))[0]
    assert finding.result.startswith(
        "31 % of the dev utterances (31; 31 of 100 sentences) have a sentence that is also"
    )


KNOWN = "all dev speakers (2) are in training: WER on known voices"
NEW = "no dev speaker (1 in all) is in training: WER on new voices"
MIXED = "1 of 2 dev speakers (ann) are in training, with 75 % of its utterances: the WER mixes known and new voices"
UNKNOWN = "dev voices cannot be compared"
SPEAKERS = {
    "all known": (["ann", "ben", "cem"], ["ann", "ben", "ann"], KNOWN),
    "all new": (["ann"], ["ben"], NEW),
    "one of two": (["ann"], ["ann", "ann", "ben", "ann"], MIXED),
    "some unknown": (["ann", ""], ["ben", "", ""], NEW + " (speaker unknown: 1 of 2 in train, 2 of 3 in dev)"),
    "none known": (["", ""], [""], UNKNOWN + " (speaker unknown: 2 of 2 in train, 1 of 1 in dev)"),
    "none known in dev": (["ann"], [""], UNKNOWN + " (speaker unknown: 1 of 1 in dev)"),
}


@pytest.mark.parametrize("case", SPEAKERS)
def test_shared_speakers_are_said_and_never_warned_of(tmp_path: Path, case: str) -> None:
    train, dev, expected = SPEAKERS[case]
    finding = said(compare(tmp_path, train=speakers("train", *train), dev=speakers("dev", *dev)))[1]
    assert finding.result.startswith(expected) and finding.verdict == "ok"
    assert "cannot" in expected or "cannot" not in finding.result


def test_long_speaker_ids_are_shortened(tmp_path: Path) -> None:
    name = "c" * 128
    overlap = compare(tmp_path, train=speakers("train", name), dev=speakers("dev", name, "other"))
    (shown,) = said(overlap)[1].facts["train-dev"]["examples"]
    assert len(shown) == 60 and shown.endswith("\u2026")


def test_identical_audio_is_left_out_of_training_with_the_name_of_its_twin(tmp_path: Path) -> None:
    overlap = compare(
        tmp_path,
        train=clips("train", clip(1), clip(2), clip(3), clip(4), clip(2), clip(9)),
        dev=clips("dev", clip(5), clip(2), clip(4)),
        test=clips("test", clip(4), clip(3), clip(5)),
    )
    assert {reason: rows.tolist() for reason, rows in overlap.leaked.items()} == {
        "audio_in_dev": [False, True, False, True, True, False],
        "audio_in_test": [False, False, True, False, False, False],
    }
    named = [
        (reason, row, overlap.details[reason](row))
        for reason, rows in overlap.leaked.items()
        for row in np.flatnonzero(rows)
    ]
    assert named == [
        ("audio_in_dev", 1, "the same samples as dev utterance dev1"),
        ("audio_in_dev", 3, "the same samples as dev utterance dev2"),
        ("audio_in_dev", 4, "the same samples as dev utterance dev1"),
        ("audio_in_test", 2, "the same samples as test utterance test1"),
    ]
    finding = said(overlap)[2]
    facts = finding.facts
    assert facts["left_out"] == 4 and facts["repeated_in_train"] == 1
    assert [facts[pair]["utterances"] for pair in ("train-dev", "train-test", "dev-test")] == [2, 2, 2]
    assert "2 dev clips (67 %: dev1, dev2) are also in train" in finding.result
    assert "4 training clips are left out for it" in finding.result
    assert finding.verdict == "warning"


def test_a_single_clip_in_two_splits_is_no_warning(tmp_path: Path) -> None:
    dev = clips("dev", *(clip(100 + number) for number in range(100)))
    overlap = compare(tmp_path, train=clips("train", clip(100), clip(1)), dev=dev)
    assert overlap.leaked["audio_in_dev"].tolist() == [True, False]
    assert said(overlap)[2].verdict == "ok"


@pytest.mark.parametrize("silence", [SILENT, CONSTANT])
def test_silent_clips_are_no_leak_and_no_repetition(tmp_path: Path, silence: np.ndarray) -> None:
    overlap = compare(tmp_path, train=clips("train", silence, silence, clip(1)), dev=clips("dev", silence, clip(2)))
    assert not overlap.leaked["audio_in_dev"].any()
    assert said(overlap)[2].result == "no two clips are the same"


@pytest.mark.parametrize(("repeats", "verdict"), [(2, "ok"), (4, "warning")])
def test_repeated_training_clips_are_counted_and_stay(tmp_path: Path, repeats: int, verdict: str) -> None:
    train = [clip(1)] * repeats + [clip(number) for number in range(2, 20 - repeats + 2)]
    overlap = compare(tmp_path, train=clips("train", *train), dev=clips("dev", clip(50)))
    finding = said(overlap)[2]
    assert finding.facts["repeated_in_train"] == repeats - 1
    assert f"{repeats - 1} training clips repeat another one and stay" in finding.result
    assert finding.verdict == verdict and not overlap.leaked["audio_in_dev"].any()


def test_training_alone_has_nothing_to_compare_with(tmp_path: Path) -> None:
    overlap = compare(tmp_path, train=texts("train", "a", "b"))
    assert not overlap.leaked
    assert [finding.verdict for finding in said(overlap)] == ["ok"] * 3


def test_counts_equal_sets_of_strings_on_a_random_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def draw(split: str, count: int) -> list[tuple[str, np.ndarray, str, str]]:
        return [
            (f"{split}{row}", clip(int(rng.integers(40))), f"Text {rng.integers(60)}!", f"s{rng.integers(9)}")
            for row in range(count)
        ]

    splits = {"train": draw("train", 50), "dev": draw("dev", 30), "test": draw("test", 20)}
    overlap = compare(tmp_path, **splits)
    for name, key in (
        ("sentences", lambda row: sentence_key(row[2])),
        ("speakers", lambda row: row[3]),
        ("audio", lambda row: row[1].tobytes()),
    ):
        for known, scored in (("train", "dev"), ("train", "test"), ("dev", "test")):
            values = {key(row) for row in splits[known]}
            expected = [key(row) for row in splits[scored] if key(row) in values]
            facts = next(finding.facts for finding in overlap.findings if finding.check == f"shared {name}")
            assert facts[f"{known}-{scored}"]["utterances"] == len(expected)
            assert facts[f"{known}-{scored}"]["values"] == len(set(expected))
    held_out = {row[1].tobytes() for split in ("dev", "test") for row in splits[split]}
    leaked = np.any(list(overlap.leaked.values()), axis=0)
    assert leaked.tolist() == [row[1].tobytes() in held_out for row in splits["train"]]


def test_what_was_found_is_kept_for_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tmp_path, train=texts("train", "a", "b"), dev=clips("dev", clip(1)))
    sets = {split: ShardDataset(tmp_path / split) for split in ("train", "dev")}
    first = find_overlap(sets, FactCache(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(ShardDataset, "column", None)
        again = find_overlap(sets, FactCache(tmp_path))
    assert again.findings == first.findings
    assert {reason: rows.tolist() for reason, rows in again.leaked.items()} == {"audio_in_dev": [False, False]}
