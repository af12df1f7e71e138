"""Who trains, and why the others do not."""

import csv
import itertools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_part

from cache import FactCache
from config import TrainConfig
from data import ShardDataset
from findings import Finding
from overlap import find_overlap
from selection import Selection, draw_subset, select_training_rows, write_drop_list, write_suspects
from text import LARGE_960H_VOCABULARY, TextNormalizer, Vocabulary
from transcripts import measure_texts

# Frames of 20 ms, without overlap: 320 samples each.
ENCODER = SimpleNamespace(
    conv_kernel=[20, 16], conv_stride=[20, 16], mask_time_prob=0.05, mask_time_length=10, mask_feature_prob=0.0
)
FRAME = 320
LARGE_960H = Vocabulary(LARGE_960H_VOCABULARY)
UPPER = TextNormalizer(',?.!-;:"', "upper")


def make_dataset(folder: Path, clips: list[tuple[int, str]], rows_per_batch: int = 3) -> ShardDataset:
    """A training split of silent clips with these lengths in samples and texts; ids are u0, u1, ..."""
    rows = [(f"u{index}", np.zeros(length, np.int16), text, "ann") for index, (length, text) in enumerate(clips)]
    write_part(folder / "data" / "train" / "part_1", rows, rows_per_batch)
    return ShardDataset(folder / "data" / "train")


def select(dataset: ShardDataset, encoder: object = ENCODER, **settings: object) -> Selection:
    cache = FactCache(dataset.folder.parent)
    texts = measure_texts(dataset, UPPER, LARGE_960H, cache)
    overlap = find_overlap(sets_beside(dataset))
    return select_training_rows(dataset, TrainConfig(**settings), texts, overlap, encoder)


def sets_beside(dataset: ShardDataset) -> dict[str, ShardDataset]:
    """The training split, and the others that lie beside it."""
    folders = {split: dataset.folder.parent / split for split in ("dev", "test")}
    return {"train": dataset} | {split: ShardDataset(folder) for split, folder in folders.items() if folder.exists()}


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
    selection = select(make_dataset(tmp_path, clips), **settings)
    finding = selection.findings[0]
    assert (finding.check, finding.verdict) == ("training clips", "refused")
    assert message in f"{finding.result}: {finding.remedy}"
    assert finding.facts == {"kept": 0, "left_out": dict(selection.drops_by_reason)}
    assert len(list(selection.dropped)) == len(clips)


def test_what_is_left_is_counted_by_reason(tmp_path: Path) -> None:
    finding = select(make_dataset(tmp_path, MIXED), max_train_samples=4).findings[0]
    assert (finding.check, finding.verdict) == ("training clips", "ok")
    assert finding.result == (
        "4 of 11 take part; left out: no_labels 2, more_labels_than_frames 2, too_short 1, too_long 1, not_in_subset 1"
    )


def test_identical_audio_is_left_out_of_training_with_its_reason(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clips = [rng.integers(-9_000, 9_000, 16_000).astype(np.int16) for _ in range(6)]
    splits = {"train": clips[:4], "dev": [clips[1], clips[4]], "test": [clips[5], clips[3], clips[1]]}
    for split, audio in splits.items():
        content = [(f"{split}{number}", samples, "one", "ann") for number, samples in enumerate(audio)]
        write_part(tmp_path / "data" / split / "part_1", content)
    dataset = ShardDataset(tmp_path / "data" / "train")
    selection = select(dataset)
    assert selection.rows.tolist() == [0, 2]
    write_drop_list(tmp_path / "drop_list.csv", dataset, selection)
    assert (tmp_path / "drop_list.csv").read_text().splitlines()[1:] == [
        "train,train1,audio_in_dev,the same samples as dev utterance dev0",
        "train,train3,audio_in_test,the same samples as test utterance test1",
    ]


@pytest.mark.parametrize(("mask_time_prob", "apply"), [(0.05, True), (0.05, False), (0.0, True)])
def test_clips_shorter_than_a_time_mask_are_counted_and_stay(
    tmp_path: Path, mask_time_prob: float, apply: bool
) -> None:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1 * FRAME, 30 * FRAME, 60).tolist(), 10 * FRAME - 1, 10 * FRAME, 16_000]
    dataset = make_dataset(tmp_path, [(length, "a") for length in lengths])
    encoder = SimpleNamespace(
        **(vars(ENCODER) | {"mask_time_prob": mask_time_prob, "apply_spec_augment": apply, "mask_time_length": 10})
    )
    selection = select(dataset, encoder, min_duration_in_seconds=0.05, max_train_samples=40)
    shorter = sum(int(dataset.num_samples[row]) // FRAME < 10 for row in selection.rows)
    assert 5 < shorter < 40
    alignment = next(finding for finding in selection.findings if finding.check == "alignment")
    if mask_time_prob and apply:
        assert alignment.facts["unmasked"] == shorter
        assert f"{shorter} are shorter than a time mask of 10 frames: unmasked" in alignment.result
    else:
        assert alignment.facts["unmasked"] == 0
        assert "time mask" not in alignment.result
    assert "time mask" not in select(dataset, encoder, min_duration_in_seconds=0.2).findings[1].result


# --- Speaking rate -------------------------------------------------------------------------------------------------


# Seconds and letters: 29 clips of 8 to 12 letters a second, and three that are none of them.
RATES = [(1.0 + 0.1 * (index % 5), 10 + index % 5) for index in range(29)] + [(2.0, 1), (1.0, 45), (0.5, 20)]
ODD_ROWS = {29: "0.5", 30: "45.0", 31: "40.0"}


def make_speech(folder: Path, clips: list[tuple[float, int]], silent_seconds: float = 0.0) -> ShardDataset:
    """Noise with so many different letters in so many seconds, between silences."""
    rng = np.random.default_rng(0)
    silence = np.zeros(int(silent_seconds * 16_000), np.int16)
    rows = []
    for index, (seconds, letters) in enumerate(clips):
        half = rng.integers(-9_000, 9_000, int(seconds * 8_000)).astype(np.int16)
        noise = np.concatenate((half, -half))  # without an offset, which would make the silence loud
        rows.append(
            (f"u{index}", np.concatenate((silence, noise, silence)), "AB" * (letters // 2) + "C" * (letters % 2), "")
        )
    write_part(folder / "data" / "train" / "part_1", rows, 40)
    return ShardDataset(folder / "data" / "train")


def usual_range(clips: list[tuple[float, int]]) -> tuple[float, float]:
    """Median of the logarithms, and four robust deviations to each side."""
    logarithms = sorted(math.log(letters / seconds) for seconds, letters in clips)
    median = statistics.median(logarithms)
    spread = statistics.median(abs(value - median) for value in logarithms)
    reach = 4 * max(1.4826 * spread, 0.1)
    return math.exp(median - reach), math.exp(median + reach)


# Speakers who differ much: the range is three times as wide.
WIDE_RATES = [(1.0, 6 + 2 * (index % 8)) for index in range(29)] + [(2.0, 1), (1.0, 45), (0.5, 20)]


@pytest.mark.parametrize("silent_seconds", [0.0, 0.32])
@pytest.mark.parametrize("clips", [RATES, WIDE_RATES])
def test_the_usual_range_is_robust_and_leaves_silence_out(
    tmp_path: Path, clips: list[tuple[float, int]], silent_seconds: float
) -> None:
    selection = select(make_speech(tmp_path, clips, silent_seconds))
    finding = speaking_rate(selection)
    slowest, fastest = usual_range(clips)
    assert (finding.facts["slowest"], finding.facts["fastest"]) == pytest.approx((slowest, fastest), rel=0.03)
    expected = [row for row, (seconds, letters) in enumerate(clips) if not slowest <= letters / seconds <= fastest]
    assert np.flatnonzero(selection.suspects).tolist() == expected
    assert finding.facts["suspects"] == len(expected) > 0


def speaking_rate(selection: Selection) -> Finding:
    return next(finding for finding in selection.findings if finding.check == "speaking rate")


def test_suspects_are_listed_and_train_unless_they_are_pruned(tmp_path: Path) -> None:
    dataset = make_speech(tmp_path, RATES)
    for pruned in (False, True):
        selection = select(dataset, prune_suspects=pruned)
        assert np.flatnonzero(selection.suspects).tolist() == list(ODD_ROWS)
        finding = speaking_rate(selection)
        assert finding.facts | {"slowest": 0, "fastest": 0} == {
            "slowest": 0, "fastest": 0, "suspects": 3, "pruned": pruned,
        }  # fmt: skip
        assert finding.verdict == ("ok" if pruned else "warning")
        assert "3 clips lie outside (" in finding.result
        assert ("--prune_suspects" in finding.remedy) == (not pruned)
        kept = [row for row in range(len(RATES)) if not (pruned and row in ODD_ROWS)]
        assert selection.rows.tolist() == kept
        assert selection.drops_by_reason == ({"suspect_rate": 3} if pruned else {})
        write_suspects(tmp_path / "suspects.csv", dataset, selection)
        write_drop_list(tmp_path / "drop_list.csv", dataset, selection)
        usual = f"the corpus has {finding.facts['slowest']:.1f} to {finding.facts['fastest']:.1f}"
        listed = [["train", f"u{row}", "suspect_rate", f"{rate} labels/s, {usual}"] for row, rate in ODD_ROWS.items()]
        header = ["split", "id", "reason", "detail"]
        with (tmp_path / "suspects.csv").open(newline="") as file:
            assert list(csv.reader(file)) == [header, *listed]
        with (tmp_path / "drop_list.csv").open(newline="") as file:
            assert list(csv.reader(file)) == [header, *(listed if pruned else [])]


def test_a_clip_that_cannot_train_is_no_suspect(tmp_path: Path) -> None:
    """Its own reason says more; and it has no part in the range."""
    dataset = make_speech(tmp_path, [*RATES[:29], (0.2, 40), (1.0, 0)])
    selection = select(dataset, prune_suspects=True)
    assert not selection.suspects.any()
    assert selection.drops_by_reason == {"more_labels_than_frames": 1, "no_labels": 1}


@pytest.mark.parametrize(("clips", "judged"), [(19, False), (20, True)])
def test_few_clips_have_no_range(tmp_path: Path, clips: int, judged: bool) -> None:
    selection = select(make_speech(tmp_path, [*RATES[: clips - 1], (1.0, 45)]), prune_suspects=True)
    assert selection.suspects.sum() == judged
    assert ("not judged" in speaking_rate(selection).result) == (not judged)


def test_few_suspects_are_no_warning(tmp_path: Path) -> None:
    finding = speaking_rate(select(make_speech(tmp_path, [*(RATES[:29] * 7), (1.0, 45)])))
    assert (finding.verdict, finding.facts["suspects"]) == ("ok", 1)


# --- Subsets -------------------------------------------------------------------------------------------------------


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
