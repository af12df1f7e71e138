"""Whether the vocabulary fits the text, and which setting mends it."""

import io
import os
import shlex
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from conftest import write_part

from cache import FactCache
from config import TrainConfig, parse_arguments
from coverage import check_coverage, check_round_trip
from data import ShardDataset
from findings import Finding
from overlap import find_overlap
from text import LARGE_960H_VOCABULARY, TextNormalizer, Vocabulary
from transcripts import cut_around, measure_texts

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
            "with --characters_to_ignore='!(),' coverage is 100.00%",
        ),
        (
            ["one, two!", "“three”"],
            TextNormalizer(case="keep"),
            "with --case upper --characters_to_ignore='!,“”' coverage is 100.00%",
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
        '0.00% of 6 characters known; unknown: b 3 (50.00%, as in "aabb c"), a 2 (33.33%), c 1 (16.67%); at least '
        "99.5% is needed"
    )
    assert finding.facts["unknown"]["c"] == {"count": 1, "example": "aabb c"}


def test_a_few_unknown_characters_are_said_and_allowed(tmp_path: Path) -> None:
    texts = ["A" * 200] * 5
    fits = coverage_of(make_dataset(tmp_path / "fits", texts))
    assert (fits.verdict, fits.result) == ("ok", "100.00% of 1,000 characters known")
    nearly = coverage_of(make_dataset(tmp_path / "nearly", [*texts[:4], "A" * 196 + "ÉÉÈ&"]))
    assert (nearly.verdict, nearly.result) == (
        "ok",
        "99.60% of 1,000 characters known; unknown: É 2 (0.20%, as in "
        '"…AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAÉÉÈ&"), & 1 (0.10%), È 1 (0.10%)',
    )  # fmt: skip
    limit = coverage_of(make_dataset(tmp_path / "limit", [*texts[:4], "A" * 195 + "É" * 5]))
    assert (limit.verdict, limit.result[:6]) == ("ok", "99.50%")
    above = coverage_of(make_dataset(tmp_path / "above", [*texts[:4], "A" * 194 + "É" * 6]))
    assert (above.verdict, above.result[:6]) == ("refused", "99.40%")


def test_the_remedy_can_be_pasted(tmp_path: Path) -> None:
    """Quotes, a leading hyphen and what a shell would take for its own."""
    texts = ['-it\'s "so" $HOME `x` (y) & z\\!']
    dataset = make_dataset(tmp_path, texts)
    normalizer = TextNormalizer("-?", "lower")
    remedy = coverage_of(dataset, normalizer).remedy
    pasted = remedy.partition(": with ")[2].partition(" coverage is")[0]
    flags = ["--data_dir", "x", "--output_dir", "y", "--model_name_or_path", "z"]
    config = parse_arguments(TrainConfig, [*flags, *shlex.split(pasted)], "")
    mended = TextNormalizer(config.characters_to_ignore, config.case)
    assert set(config.characters_to_ignore) > {"-", "?"}
    assert coverage_of(dataset, mended).facts["unknown_fraction"] == 0


def test_settings_are_tried_on_texts_of_the_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus sorted by source: what is amiss at its end is not seen at its beginning."""
    monkeypatch.setattr("coverage.TEXTS_TRIED", 50)
    dataset = make_dataset(tmp_path, ["ONE TWO"] * 100 + ["one (two)"] * 100)
    normalizer = TextNormalizer(case="keep")
    first, second = (coverage_of(dataset, normalizer).remedy for _ in range(2))
    assert "with --case upper --characters_to_ignore='()' coverage is 100.00%" in first
    assert first == second


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

THREE = {"values": (3,)}


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


def test_a_damaged_cache_costs_time_only(tmp_path: Path) -> None:
    found = []

    def find() -> dict[str, np.ndarray]:
        found.append(True)
        return {"values": np.arange(3)}

    cache = FactCache(tmp_path)
    cache.get("kind", [1], find, THREE)
    (file,) = cache.folder.iterdir()
    single = io.BytesIO()
    np.save(single, np.arange(3))
    for content in (b"", b"PK\x03\x04 broken", file.read_bytes()[:-40], single.getvalue()):
        file.write_bytes(content)
        assert cache.get("kind", [1], find, THREE)["values"].tolist() == [0, 1, 2]
    assert len(found) == 5
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for place, value in zip(rng.integers(0, len(whole), 200), rng.integers(0, 256, 200), strict=True):
        file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        assert cache.get("kind", [1], find, THREE)["values"].shape == (3,)


READ_ONLY = (PermissionError(13, "Permission denied"), OSError(30, "Read-only file system"))


@pytest.mark.parametrize("error", READ_ONLY)
@pytest.mark.parametrize("refused", [("mkdir",), ("open", "unlink"), ("replace", "unlink"), ("unlink",)])
def test_a_folder_of_another_user_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], error: OSError
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cache.MAX_FILES", 1)
    cache = FactCache(tmp_path)
    if refused != ("mkdir",):
        cache.get("kind", [0], lambda: {"values": np.arange(3)}, THREE)
    for name in refused:
        monkeypatch.setattr(Path, name, refuse)
    for _ in range(2):
        assert cache.get("kind", [1], lambda: {"values": np.arange(3)}, THREE)["values"].tolist() == [0, 1, 2]


def test_a_cache_folder_that_cannot_be_made_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "preflight_cache").touch()
    for folder in (tmp_path, tmp_path / "nowhere" / "else"):
        assert FactCache(folder).get("kind", [1], lambda: {"values": np.arange(3)}, THREE)["values"].tolist() == [
            0,
            1,
            2,
        ]


def test_two_runs_that_fill_the_same_file_do_not_destroy_each_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins and ends while the first is in the middle of its file."""
    cache, save, names = FactCache(tmp_path), np.savez, []

    def savez(file: BinaryIO, **arrays: np.ndarray) -> None:
        names.append(Path(file.name))
        if len(names) == 1:
            file.write(b"half")
            file.flush()
            cache.get("kind", [1], lambda: {"values": np.arange(3)}, THREE)
            file.seek(0)
        save(file, **arrays)

    monkeypatch.setattr("cache.np.savez", savez)
    cache.get("kind", [1], lambda: {"values": np.arange(3)}, THREE)
    assert len(set(names)) == 2
    (file,) = cache.folder.iterdir()
    with np.load(file) as whole:
        assert whole["values"].tolist() == [0, 1, 2]


def test_what_a_killed_run_left_in_the_cache_goes(tmp_path: Path) -> None:
    cache = FactCache(tmp_path)
    cache.get("kind", [0], lambda: {"values": np.arange(3)}, THREE)
    left = cache.folder / "kind_0.123_abc.unfinished"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    for number in range(16):
        cache.get("kind", [number], lambda: {"values": np.arange(3)}, THREE)
    assert not left.exists()


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"values": np.arange(2), "total": np.asarray(3)},
        {"values": np.arange(3)},
        {"values": np.arange(3), "total": np.arange(1)},
        {"values": np.arange(6).reshape(3, 2), "total": np.asarray(3)},
    ],
)
def test_a_file_that_lacks_arrays_or_values_is_taken_as_absent(tmp_path: Path, other: dict[str, np.ndarray]) -> None:
    shapes = {"values": (3,), "total": ()}

    def find() -> dict[str, np.ndarray]:
        return {"values": np.arange(3), "total": np.asarray(3)}

    cache = FactCache(tmp_path)
    cache.get("kind", [1], find, shapes)
    (file,) = cache.folder.iterdir()
    np.savez(file, **other)
    for _ in range(2):
        found = cache.get("kind", [1], find, shapes)
        assert (found["values"].tolist(), int(found["total"])) == ([0, 1, 2], 3)
    kept = cache.get("kind", [1], lambda: pytest.fail("the file is whole"), shapes)
    assert kept["values"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["texts", "overlap"])
def test_facts_whose_file_lost_an_array_are_found_again(tmp_path: Path, kind: str) -> None:
    dataset = make_dataset(tmp_path, ["aé b", "", "cc"])
    sets = {"train": dataset, "dev": make_dataset(tmp_path, ["aé b"], "dev")}
    cache = FactCache(tmp_path / "data")
    for _ in range(2):
        assert measure_texts(dataset, UPPER, LARGE_960H, cache).coverage.unknown == {"É": 1}
        assert len(find_overlap(sets, cache).findings) == 3
        for file in cache.folder.glob(f"{kind}_*.npz"):
            np.savez(file, num_labels=np.zeros(3, np.int32))


def test_examples_of_many_unknown_characters_take_little_room(tmp_path: Path) -> None:
    """One text of 100,000 characters with 1,000 unknown ones once made a file of 400 MB."""
    letters = "".join(chr(0x4E00 + number) for number in range(1_000))
    long = "".join("A" * 99 + letter for letter in letters)
    dataset = make_dataset(tmp_path, [long])
    cache = FactCache(tmp_path / "data")
    first = measure_texts(dataset, UPPER, LARGE_960H, cache).coverage
    again = measure_texts(dataset, UPPER, LARGE_960H, cache).coverage
    assert first == again
    assert len(first.examples) == 1_000
    for character, example in first.examples.items():
        assert character in example
        assert len(example) <= 82 and example.strip("…") in long
    (file,) = cache.folder.iterdir()
    assert file.stat().st_size < 1e6


@pytest.mark.parametrize(
    ("text", "excerpt"),
    [
        ("short É", "short É"),
        ("É" + "a" * 100, "É" + "a" * 79 + "…"),
        ("a" * 100 + "É", "…" + "a" * 79 + "É"),
        ("a" * 100 + "É" + "b" * 100, "…" + "a" * 40 + "É" + "b" * 39 + "…"),
    ],
)
def test_an_example_is_cut_around_its_character(text: str, excerpt: str) -> None:
    assert cut_around(text, "É") == excerpt


def test_an_example_in_another_case_than_its_label_is_cut_around_it_too() -> None:
    """A tokenizer that lower-cases has upper-case labels, and so the unknown character is upper-case."""
    assert "é" in cut_around("a" * 300 + "é" + "b" * 300, "É")
    assert len(cut_around("ß" * 300 + "ŉ", "\u02bc")) <= 82


def test_cache_never_unpickles(tmp_path: Path) -> None:
    """Promise 7: a poisoned file is found again, not run."""
    cache = FactCache(tmp_path)
    cache.get("kind", [1], lambda: {"values": np.arange(3)}, THREE)
    (file,) = cache.folder.iterdir()

    class Poison:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "poisoned",))

    with file.open("wb") as poisoned:
        np.savez(poisoned, values=np.array([Poison()], dtype=object))
    assert cache.get("kind", [1], lambda: {"values": np.arange(3)}, THREE)["values"].tolist() == [0, 1, 2]
    assert not (tmp_path / "poisoned").exists()


def test_cache_keeps_the_newest_files(tmp_path: Path) -> None:
    cache = FactCache(tmp_path)
    for number in range(20):
        cache.get("kind", [number], lambda: {"values": np.arange(3)}, THREE)
    assert len(list(cache.folder.iterdir())) == 16
