"""Whether the vocabulary fits the text, and which setting mends it."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_part

from cache import FactCache
from coverage import check_coverage, check_round_trip
from data import ShardDataset
from findings import Finding
from text import LARGE_960H_VOCABULARY, TextNormalizer, Vocabulary
from transcripts import measure_texts

LARGE_960H = Vocabulary(LARGE_960H_VOCABULARY)
UPPER = TextNormalizer(',?.!-;:"', "upper")


def make_dataset(folder: Path, texts: list[str], split: str = "train") -> ShardDataset:
    rows = [(f"u{index}", np.zeros(16_000, np.int16), text, "ann") for index, text in enumerate(texts)]
    write_part(folder / "data" / split / "part_1", rows)
    return ShardDataset(folder / "data" / split)


def coverage_of(
    dataset: ShardDataset, normalizer: TextNormalizer = UPPER, vocabulary: Vocabulary = LARGE_960H
) -> Finding:
    facts = measure_texts(dataset, normalizer, vocabulary, FactCache(dataset.folder.parent))
    split = dataset.folder.name
    (finding,) = check_coverage({split: dataset}, {split: facts.coverage}, normalizer, vocabulary)
    return finding


@pytest.mark.parametrize(
    ("texts", "normalizer", "remedy"),
    [
        # The English seed's WER of 1.0 for a whole night: lower-case text, upper-case vocabulary (trap 20).
        (["one two", "three"], TextNormalizer(case="lower"), "with --case upper coverage is 100.00%"),
        (["one two", "three"], TextNormalizer(case="keep"), "with --case upper coverage is 100.00%"),
        (
            ["ONE, TWO!", "THREE (3 IS IT)".replace("3", "TREE")],
            TextNormalizer(case="upper"),
            "with !(), added to --characters_to_ignore coverage is 100.00%",
        ),
        (
            ["one, two!", "“three”"],
            TextNormalizer(case="keep"),
            "with --case upper and !,“” added to --characters_to_ignore coverage is 100.00%",
        ),
        (["один два"], TextNormalizer(case="upper"), "build a vocabulary from the text with --vocabulary train"),
        # Tone marks belong to their letters: nobody is told to throw them away.
        (["o\u0323\u0300 wa"], TextNormalizer(case="upper"), "build a vocabulary from the text"),
        (["route 66", "4 x 4"], TextNormalizer(case="upper"), "build a vocabulary from the text"),
    ],
)
def test_promise_5_a_vocabulary_that_does_not_fit_names_the_setting_that_mends_it(
    tmp_path: Path, texts: list[str], normalizer: TextNormalizer, remedy: str
) -> None:
    finding = coverage_of(make_dataset(tmp_path, texts), normalizer)
    assert (finding.check, finding.verdict) == ("coverage train", "refused")
    assert remedy in finding.remedy
    assert "\n" not in finding.result + finding.remedy


@pytest.mark.parametrize(
    ("texts", "case", "said"),
    [
        (["one two"], "lower", "text is lower-case (--case lower), vocabulary upper-case: with --case upper coverage"),
        (["one two"], "keep", "text is lower-case, vocabulary upper-case: with --case upper coverage is 100.00%"),
        (["один два"], "upper", "no such setting mends it"),
    ],
)
def test_promise_5_the_reason_is_named(tmp_path: Path, texts: list[str], case: str, said: str) -> None:
    assert coverage_of(make_dataset(tmp_path, texts), TextNormalizer(case=case)).remedy.startswith(said)


def test_promise_5_coverage_says_value_limit_and_characters(tmp_path: Path) -> None:
    finding = coverage_of(make_dataset(tmp_path, ["aabb c", "b"]), TextNormalizer(case="lower"))
    assert finding.result == (
        "0.00% of 6 characters known; unknown: b 3 (50.00%), a 2 (33.33%), c 1 (16.67%); at least 99.5% is needed"
    )
    assert finding.facts["unknown"]["c"] == {"count": 1, "example": "aabb c"}


def test_a_few_unknown_characters_are_said_and_allowed(tmp_path: Path) -> None:
    texts = ["A" * 200] * 5
    fits = coverage_of(make_dataset(tmp_path / "fits", texts))
    assert (fits.verdict, fits.result) == ("ok", "100.00% of 1,000 characters known")
    nearly = coverage_of(make_dataset(tmp_path / "nearly", [*texts[:4], "A" * 196 + "ÉÉÈ&"]))
    assert (nearly.verdict, nearly.result) == (
        "ok", "99.60% of 1,000 characters known; unknown: É 2 (0.20%), & 1 (0.10%), È 1 (0.10%)",
    )  # fmt: skip
    limit = coverage_of(make_dataset(tmp_path / "limit", [*texts[:4], "A" * 195 + "É" * 5]))
    assert (limit.verdict, limit.result[:6]) == ("ok", "99.50%")
    above = coverage_of(make_dataset(tmp_path / "above", [*texts[:4], "A" * 194 + "É" * 6]))
    assert (above.verdict, above.result[:6]) == ("refused", "99.40%")


def test_dev_and_test_are_warned_about(tmp_path: Path) -> None:
    finding = coverage_of(make_dataset(tmp_path, ["один"], "dev"))
    assert (finding.check, finding.verdict) == ("coverage dev", "warning")
    assert "an error that no training mends" in finding.remedy


def test_spaces_need_a_word_delimiter(tmp_path: Path) -> None:
    """Otherwise each space would be learned as an unknown character, with a coverage of 100 %."""
    vocabulary = Vocabulary({"<pad>": 0, "<unk>": 1, "A": 2, "B": 3})
    spaced = coverage_of(make_dataset(tmp_path / "spaced", ["AB BA"]), TextNormalizer(), vocabulary)
    assert "unknown: \u2423 1" in spaced.result
    assert spaced.remedy.startswith("no such setting mends it: build a vocabulary")
    together = coverage_of(make_dataset(tmp_path / "together", ["ABBA"]), TextNormalizer(), vocabulary)
    assert together.result == "100.00% of 4 characters known"


def test_what_nobody_sees_is_named_by_its_code_point(tmp_path: Path) -> None:
    finding = coverage_of(make_dataset(tmp_path, ["a\u0301\u0323" * 9 + "\ue000"]), TextNormalizer(case="upper"))
    assert "U+E000 1" in finding.result
    assert "U+0301" in finding.result or "U+0323" in finding.result


def test_three_utterances_are_shown_as_text_ids_and_text(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, ["Aunt, it's", "É", "two", "three", "four"])
    lines, finding = check_round_trip(dataset, np.array([1, 0, 3, 4]), UPPER, LARGE_960H)
    assert lines[4:8] == [
        "  text       Aunt, it's",
        "  normalised AUNT IT'S",
        "  ids        [7, 16, 9, 6, 4, 10, 6, 27, 12]",
        "  decoded    AUNT IT'S",
    ]
    assert lines[:4] == ["  text       É", "  normalised É", "  ids        [3]", "  decoded    <unk>"]
    assert len(lines) == 3 * 4
    assert finding.verdict == "ok"


def test_promise_5_a_round_trip_that_differs_is_refused(tmp_path: Path) -> None:
    """Here a tokenizer that cleans up spaces takes one out of the text, as WE 'RE becomes WE'RE."""
    vocabulary = Vocabulary(LARGE_960H_VOCABULARY, cleans_up_spaces=True)
    dataset = make_dataset(tmp_path, ["rock ' roll"])
    _, finding = check_round_trip(dataset, np.array([0]), UPPER, vocabulary)
    assert (finding.verdict, finding.result) == ("refused", '"ROCK \' ROLL" became "ROCK\'ROLL"')
    assert "check --vocabulary, --case and" in finding.remedy


# ---------------------------------------------------------------------------------------------------------------------
# The cache of what one pass found


def test_facts_are_found_once_for_each_vocabulary_and_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path, ["aé b", "", "cc"])
    cache = FactCache(tmp_path / "data")
    first = measure_texts(dataset, UPPER, LARGE_960H, cache)
    with monkeypatch.context() as patch:
        patch.setattr(ShardDataset, "column", None)
        again = measure_texts(dataset, UPPER, LARGE_960H, FactCache(tmp_path / "data"))
    for facts in (first, again):
        assert facts.num_labels.tolist() == [4, 0, 2]
        assert facts.required_frames.tolist() == [4, 0, 3]
        assert facts.coverage == first.coverage
    assert first.coverage.characters == 5
    assert first.coverage.unknown == {"É": 1}
    assert first.coverage.examples == {"É": "AÉ B"}
    others = (
        (TextNormalizer(case="lower"), LARGE_960H),
        (TextNormalizer("b", "upper"), LARGE_960H),
        (UPPER, Vocabulary(LARGE_960H_VOCABULARY | {"É": 32})),
    )
    for normalizer, vocabulary in others:
        facts = measure_texts(dataset, normalizer, vocabulary, cache)
        assert facts.coverage.unknown != first.coverage.unknown or facts.num_labels.tolist() != [4, 0, 2]
    assert len(list((tmp_path / "data" / "preflight_cache").glob("texts_*.npz"))) == 4


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def find() -> dict[str, np.ndarray]:
        found.append(True)
        return {"values": np.arange(3)}

    cache = FactCache(tmp_path)
    cache.get("kind", [1], find)
    (file,) = cache.folder.iterdir()
    for content in (b"", b"PK\x03\x04 broken", file.read_bytes()[:-40]):
        file.write_bytes(content)
        assert cache.get("kind", [1], find)["values"].tolist() == [0, 1, 2]
    assert len(found) == 4
    monkeypatch.setattr("cache.os.access", lambda *_: False)
    assert cache.get("kind", [2], find)["values"].tolist() == [0, 1, 2]
    assert len(list(cache.folder.iterdir())) == 1


def test_cache_never_unpickles(tmp_path: Path) -> None:
    """Promise 7: a poisoned file is found again, not run."""
    cache = FactCache(tmp_path)
    cache.get("kind", [1], lambda: {"values": np.arange(3)})
    (file,) = cache.folder.iterdir()

    class Poison:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "poisoned",))

    with file.open("wb") as poisoned:
        np.savez(poisoned, values=np.array([Poison()], dtype=object))
    assert cache.get("kind", [1], lambda: {"values": np.arange(3)})["values"].tolist() == [0, 1, 2]
    assert not (tmp_path / "poisoned").exists()


def test_cache_keeps_the_newest_files(tmp_path: Path) -> None:
    cache = FactCache(tmp_path)
    for number in range(20):
        cache.get("kind", [number], lambda: {"values": np.arange(3)})
    assert len(list(cache.folder.iterdir())) == 16
