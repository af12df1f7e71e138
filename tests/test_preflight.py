"""Who trains and why not, whether vocabulary and disk fit, and what is said about it."""

import csv
import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_part

from config import TrainConfig
from data import ShardDataset
from errors import UsageError
from preflight import (
    Selection,
    check_coverage,
    check_disk,
    draw_subset,
    select_training_rows,
    show_utterances,
    write_drop_list,
)
from text import LARGE_960H_VOCABULARY, TextNormalizer, Vocabulary

# Frames of 20 ms, without overlap: 320 samples each.
ENCODER = SimpleNamespace(conv_kernel=[20, 16], conv_stride=[20, 16])
FRAME = 320
LARGE_960H = Vocabulary(LARGE_960H_VOCABULARY)
UPPER = TextNormalizer(',?.!-;:"', "upper")


def make_dataset(folder: Path, clips: list[tuple[int, str]], rows_per_batch: int = 3) -> ShardDataset:
    """A training split of silent clips with these lengths in samples and texts; ids are u0, u1, ..."""
    rows = [(f"u{index}", np.zeros(length, np.int16), text, "ann") for index, (length, text) in enumerate(clips)]
    write_part(folder / "data" / "train" / "part_1", rows, rows_per_batch)
    return ShardDataset(folder / "data" / "train")


def select(dataset: ShardDataset, **settings: object) -> Selection:
    return select_training_rows(dataset, TrainConfig(**settings), UPPER, LARGE_960H, ENCODER)


MIXED = [
    (16_000, "good"),
    (16_000, "?!"),  # no label
    (1_599, "a"),  # below 0.1 s
    (1_600, "a"),  # 0.1 s exactly
    (320_000, "twenty seconds"),  # 20 s exactly
    (320_001, "more"),
    (5 * FRAME, "aabb"),  # 4 labels and 2 repeats need 6 frames
    (6 * FRAME, "aabb"),
    (6 * FRAME, "abcdefg"),
    (100, "   "),  # no label and too short: the first reason counts
    (16_000, "A B"),
]
MIXED_DROPS = [
    (1, "no_labels", "the text is empty after normalisation"),
    (9, "no_labels", "the text is empty after normalisation"),
    (2, "too_short", "0.100 s of at least 0.1 s"),
    (5, "too_long", "20.000 s of at most 20.0 s"),
    (6, "more_labels_than_frames", "5 frames, 6 needed for 4 labels"),
    (8, "more_labels_than_frames", "6 frames, 7 needed for 7 labels"),
]


def test_promise_4_each_reason_with_its_figures(tmp_path: Path) -> None:
    selection = select(make_dataset(tmp_path, MIXED))
    assert selection.rows.tolist() == [0, 3, 4, 7, 10]
    assert selection.num_labels.tolist() == [4, 1, 14, 4, 3]
    assert list(selection.dropped) == sorted(MIXED_DROPS)
    assert selection.drops_by_reason == {
        "no_labels": 2, "too_short": 1, "too_long": 1, "more_labels_than_frames": 2,
    }  # fmt: skip
    assert np.flatnonzero(selection.reasons == 0).tolist() == [0, 3, 4, 7, 10]


@pytest.mark.parametrize("max_train_samples", [None, 1, 3, 100])
@pytest.mark.parametrize("train_fraction", [1.0, 0.5, 0.01])
def test_promise_4_nothing_dropped_in_silence(
    tmp_path: Path, train_fraction: float, max_train_samples: int | None
) -> None:
    dataset = make_dataset(tmp_path, MIXED * 3)
    selection = select(dataset, train_fraction=train_fraction, max_train_samples=max_train_samples)
    dropped = [row for row, _, _ in selection.dropped]
    assert sorted([*selection.rows, *dropped]) == list(range(len(dataset)))
    assert all(reason and detail for _, reason, detail in selection.dropped)
    assert selection.drops_by_reason.total() == len(dropped)
    write_drop_list(tmp_path / "drop_list.csv", dataset, selection)
    with (tmp_path / "drop_list.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["id"] for row in listed] == [f"u{row}" for row in sorted(dropped)]


def test_promise_4_drop_list_says_split_id_reason_detail(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, MIXED)
    write_drop_list(tmp_path / "drop_list.csv", dataset, select(dataset, max_train_samples=4))
    lines = (tmp_path / "drop_list.csv").read_text().splitlines()
    assert lines[:4] == [
        "split,id,reason,detail",
        "train,u1,no_labels,the text is empty after normalisation",
        "train,u2,too_short,0.100 s of at least 0.1 s",
        "train,u5,too_long,20.000 s of at most 20.0 s",
    ]
    assert '"5 frames, 6 needed for 4 labels"' in lines[4]
    assert [line for line in lines if "not_in_subset,train_fraction or max_train_samples" in line] != []
    assert len(lines) == 1 + 11 - 4


def test_drop_list_survives_ids_with_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    odd = 'a,"b"\nc;ü'
    write_part(tmp_path / "data" / "train" / "part_1", [(odd, np.zeros(10, np.int16), "x", ""), MIXED_ROW])
    dataset = ShardDataset(tmp_path / "data" / "train")
    write_drop_list(tmp_path / "drop_list.csv", dataset, select(dataset))
    with (tmp_path / "drop_list.csv").open(newline="", encoding="utf-8") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [odd]


MIXED_ROW = ("fine", np.zeros(16_000, np.int16), "fine", "")


def test_a_run_that_drops_nothing_has_an_empty_list(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [(16_000, "one"), (16_000, "two")])
    write_drop_list(tmp_path / "drop_list.csv", dataset, select(dataset))
    assert (tmp_path / "drop_list.csv").read_text() == "split,id,reason,detail\n"


@pytest.mark.parametrize(
    ("clips", "settings", "message"),
    [
        ([(16_000, "one")], {"min_duration_in_seconds": 2.0}, "too_short 1): lower --min_duration_in_seconds"),
        ([(64_000, "one")], {"max_duration_in_seconds": 2.0}, "too_long 1): raise --max_duration_in_seconds"),
        ([(16_000, "!?")] * 3, {}, "of 3 is left (no_labels 3): check the text column and --characters_to_ignore"),
        (
            [(10 * FRAME, "abc def ghi jkl")] * 2 + [(16_000, "!")],
            {},
            "(more_labels_than_frames 2, no_labels 1): check that texts and clips belong together",
        ),
    ],
)
def test_nothing_left_names_what_took_it(
    tmp_path: Path, clips: list[tuple[int, str]], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        select(make_dataset(tmp_path, clips), **settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_subsets_are_fixed_by_the_seed_and_lie_in_each_other(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [(16_000, "one")] * 60, rows_per_batch=60)
    subsets = [select(dataset, train_fraction=share).rows.tolist() for share in (0.1, 0.25, 0.5, 1.0)]
    assert [len(rows) for rows in subsets] == [6, 15, 30, 60]
    assert all(set(small) < set(large) for small, large in itertools.pairwise(subsets))
    assert all(rows == sorted(rows) for rows in subsets)
    assert select(dataset, max_train_samples=15).rows.tolist() == subsets[1]
    assert select(dataset, train_fraction=0.5, max_train_samples=6).rows.tolist() == subsets[0]
    assert select(dataset, train_fraction=0.25).rows.tolist() == subsets[1]
    assert select(dataset, train_fraction=0.25, seed=1).rows.tolist() != subsets[1]
    assert len(select(dataset, train_fraction=1e-6).rows) == 1


def test_evaluation_subset_is_fixed_by_the_seed_alone() -> None:
    rows = np.arange(100, 200)
    assert draw_subset(rows, None, 1).tolist() == rows.tolist()
    assert draw_subset(rows, 100, 1).tolist() == rows.tolist()
    assert draw_subset(rows, 1_000, 1).tolist() == rows.tolist()
    first, second = draw_subset(rows, 10, 1).tolist(), draw_subset(rows, 20, 1).tolist()
    assert set(first) < set(second) < set(rows.tolist())
    assert (first, len(first)) == (sorted(first), 10)
    np.random.seed(5)
    assert draw_subset(rows, 10, 1).tolist() == first
    assert draw_subset(rows, 10, 2).tolist() != first


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


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
    dataset = make_dataset(tmp_path, [(16_000, text) for text in texts])
    with pytest.raises(UsageError) as refused:
        check_coverage(dataset, normalizer, LARGE_960H)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def test_promise_5_coverage_says_value_limit_and_characters(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [(16_000, "aabb c"), (16_000, "b")])
    with pytest.raises(UsageError, match=r"knows 0.00% of the training characters, at least 99.5% .* unknown: b a c;"):
        check_coverage(dataset, TextNormalizer(case="lower"), LARGE_960H)


def test_a_few_unknown_characters_are_said_and_allowed(tmp_path: Path) -> None:
    texts = ["A" * 200] * 5
    fits = make_dataset(tmp_path / "fits", [(16_000, text) for text in texts])
    assert check_coverage(fits, UPPER, LARGE_960H) == "100.00% of 1000 characters known"
    nearly = make_dataset(tmp_path / "nearly", [(16_000, text) for text in [*texts[:4], "A" * 196 + "ÉÉÈ&"]])
    assert check_coverage(nearly, UPPER, LARGE_960H) == "99.60% of 1000 characters known; unknown: 'É' 2, '&' 1, 'È' 1"
    limit = make_dataset(tmp_path / "limit", [(16_000, text) for text in [*texts[:4], "A" * 195 + "É" * 5]])
    assert check_coverage(limit, UPPER, LARGE_960H).startswith("99.50%")
    above = make_dataset(tmp_path / "above", [(16_000, text) for text in [*texts[:4], "A" * 194 + "É" * 6]])
    with pytest.raises(UsageError, match=r"99\.40%"):
        check_coverage(above, UPPER, LARGE_960H)


def test_spaces_need_a_word_delimiter(tmp_path: Path) -> None:
    """Otherwise each space would be learned as an unknown character, with a coverage of 100 %."""
    vocabulary = Vocabulary({"<pad>": 0, "<unk>": 1, "A": 2, "B": 3})
    spaced = make_dataset(tmp_path / "spaced", [(16_000, "AB BA")])
    with pytest.raises(UsageError, match="unknown: \u2423; no such setting mends it: build a vocabulary"):
        check_coverage(spaced, TextNormalizer(), vocabulary)
    together = make_dataset(tmp_path / "together", [(16_000, "ABBA")])
    assert check_coverage(together, TextNormalizer(), vocabulary) == "100.00% of 4 characters known"


def test_three_utterances_are_shown_as_text_ids_and_text(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [(16_000, text) for text in ("Aunt, it's", "É", "two", "three", "four")])
    lines = show_utterances(dataset, np.array([1, 0, 3, 4]), UPPER, LARGE_960H)
    assert lines[4:8] == [
        "  text       Aunt, it's",
        "  normalised AUNT IT'S",
        "  ids        [7, 16, 9, 6, 4, 10, 6, 27, 12]",
        "  decoded    AUNT IT'S",
    ]
    assert lines[:4] == ["  text       É", "  normalised É", "  ids        [3]", "  decoded    <unk>"]
    assert len(lines) == 3 * 4


def test_promise_5_a_round_trip_that_differs_is_refused(tmp_path: Path) -> None:
    """Here a tokenizer that cleans up spaces takes one out of the text, as WE 'RE becomes WE'RE."""
    vocabulary = Vocabulary(LARGE_960H_VOCABULARY, cleans_up_spaces=True)
    dataset = make_dataset(tmp_path, [(16_000, "rock ' roll")])
    with pytest.raises(UsageError, match='"ROCK \' ROLL" became "ROCK\'ROLL"; check --vocabulary, --case and'):
        show_utterances(dataset, np.array([0]), UPPER, vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# Disk


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=5_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    wanted = tmp_path / "runs" / "new"
    assert check_disk(wanted, 5_000_000_000) == "5.00 GB needed, 5.0 GB free"
    with pytest.raises(UsageError, match=r"has 5.0 GB free, the run needs 6.1 GB: lower --save_total_limit or choose"):
        check_disk(wanted, 6_100_000_000)
    assert set(asked) == {tmp_path}, "the folder is not made to look at its disk"
    assert not wanted.exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is a file: choose another --output_dir than .*file/runs/new"):
        check_disk(tmp_path / "file" / "runs" / "new", 0)
    # Root writes into folders of mode 0555 (trap 36), so the answer is put into the system's mouth.
    monkeypatch.setattr(os, "access", lambda folder, mode: (folder, mode) != (tmp_path, os.W_OK))
    with pytest.raises(UsageError, match=r"cannot be written to: choose another --output_dir than .*runs/new"):
        check_disk(tmp_path / "runs" / "new", 0)


def test_a_relative_folder_is_looked_up_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_disk(Path("runs/new"), 0).startswith("0.00 GB needed, ")
