"""Groups of utterances, and their rates, against direct counts over the same rows."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_part

from data import ShardDataset
from errors import UsageError
from metrics import ErrorCounts, score_text
from result_layout import MIN_UTTERANCES
from slices import UNKNOWN, Breakdown, Grouping, Trained, draw_stratified, find_groupings, worst_slice

SPEAKERS = ("ann", "ben", "cem", "")


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    """A dev split of 60 with accents, and a training split that shares voices and a sentence with it."""
    accents = [{"accent": ("north", "south", "south", "")[row % 4], "client": f"c{row}"} for row in range(60)]
    write_part(tmp_path / "data" / "dev" / "part_1", make_rows(60, 2, SPEAKERS), metadata=accents)
    shared = make_rows(60, 2)[7][2]
    rows = [("t0", np.ones(9_000, np.int16), shared.lower() + "!", "ann"), *make_rows(6, 5, ("ben", "dan"))]
    write_part(tmp_path / "data" / "train" / "part_1", rows)
    return ShardDataset(tmp_path / "data" / "dev")


def train_of(dataset: ShardDataset) -> ShardDataset:
    return ShardDataset(dataset.folder.parent / "train")


def members(dataset: ShardDataset, name: str, **settings: object) -> dict[str, list[int]]:
    """Rows of each group of one grouping, in the order of the groups."""
    rows = np.arange(len(dataset))
    num_labels = np.array([len(text) for text in dataset.column("text")])
    (grouping,) = find_groupings(dataset, rows, num_labels, settings.get("trained"), [name])
    return {group: np.flatnonzero(grouping.codes == code).tolist() for code, group in enumerate(grouping.groups)}


def test_a_column_of_the_corpus(dataset: ShardDataset) -> None:
    groups = members(dataset, "accent")
    assert list(groups) == ["south", "north", UNKNOWN]
    assert groups["north"] == list(range(0, 60, 4))
    assert groups[UNKNOWN] == list(range(3, 60, 4))


def test_durations_and_rates(dataset: ShardDataset) -> None:
    seconds = dataset.num_samples / 16_000
    assert members(dataset, "duration") == {"under 2 s": list(range(60))}
    labels = np.array([len(text) for text in dataset.column("text")])
    groups = members(dataset, "speech_rate")
    assert sorted(row for rows in groups.values() for row in rows) == list(range(60))
    rates = [np.mean((labels / seconds)[rows]) for rows in groups.values()]
    assert rates == sorted(rates)


def test_what_was_trained_on(dataset: ShardDataset) -> None:
    trained = Trained.of(train_of(dataset))
    voices = members(dataset, "speaker_in_train", trained=trained)
    assert voices["yes"] == sorted([*range(0, 60, 4), *range(1, 60, 4)])
    assert voices["no"] == list(range(2, 60, 4))
    assert voices[UNKNOWN] == list(range(3, 60, 4))
    assert 7 in members(dataset, "sentence_in_train", trained=trained)["yes"]
    only_ben = Trained.of(train_of(dataset), np.arange(7) > 0)
    assert members(dataset, "speaker_in_train", trained=only_ben)["yes"] == list(range(1, 60, 4))
    assert 7 not in members(dataset, "sentence_in_train", trained=only_ben)["yes"]


def test_without_names_all_that_divide(dataset: ShardDataset) -> None:
    rows, labels = np.arange(60), np.full(60, 5)
    found = find_groupings(dataset, rows, labels, Trained.of(train_of(dataset)))
    # All clips are short, and 60 clients are no kinds of utterances.
    assert [grouping.name for grouping in found if grouping.name != "snr"] == [
        "speech_rate", "sentence_in_train", "speaker_in_train", "speaker", "accent",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"--slices accents: .* has duration, speech_rate, .*accent, client"):
        find_groupings(dataset, rows, labels, None, ["accents"])


def test_a_column_of_many_values_keeps_its_largest(dataset: ShardDataset) -> None:
    groups = members(dataset, "client")
    assert len(groups) == 20
    assert len(groups["others"]) == 60 - 19


def test_rates_of_a_slice_are_those_of_its_rows(dataset: ShardDataset) -> None:
    rows = np.arange(0, 60, 2)
    texts = [score_text("a b c", "", "a x" if row % 3 else "a b c") for row in rows]
    breakdown = Breakdown.of(dataset, rows, np.full(len(rows), 5), None, ["accent"])
    slices = {one.group: one for one in breakdown.score(np.array([text.counts for text in texts]))}
    accents = list(dataset.column("accent"))
    for group, one in slices.items():
        inside = [text for row, text in zip(rows, texts, strict=True) if accents[row] == group]
        assert one.utterances == len(inside)
        assert one.wer.rate == sum((text.words for text in inside), ErrorCounts()).rate
        assert one.cer == sum((text.characters for text in inside), ErrorCounts()).rate
        assert one.wer.low < one.wer.rate < one.wer.high


def test_small_slices_are_never_the_worst(dataset: ShardDataset) -> None:
    counts = np.zeros((60, 8), np.int64)
    counts[:, 3] = counts[:, 7] = 4
    counts[::4, 2] = 4  # all of the north
    breakdown = Breakdown.of(dataset, np.arange(60), np.full(60, 5), None, ["accent"])
    slices = breakdown.score(counts)
    assert [one.is_small for one in slices] == [False, True, True]
    assert MIN_UTTERANCES == 30
    assert worst_slice(slices, 0.25)[0].group == "south"
    assert worst_slice(slices[1:], 0.25) is None


def test_the_worst_of_many_like_slices_is_not_beyond_chance() -> None:
    """Forty slices of one kind, again and again: one in forty sets may be called worse, not one in four."""
    generator, called = np.random.default_rng(0), 0
    for _ in range(100):
        counts = np.zeros((2_000, 8), np.int64)
        counts[:, 2] = generator.binomial(8, 0.1, 2_000)
        counts[:, 3] = 8 - counts[:, 2]
        codes = generator.integers(0, 40, 2_000).astype(np.int32)
        groups = tuple(f"g{code}" for code in range(40))
        breakdown = Breakdown([Grouping("kind", groups, codes)], np.full(2_000, -1))
        wer = counts[:, 2].sum() / 16_000
        called += worst_slice(breakdown.score(counts), wer)[1]
    assert called <= 10
    counts[codes == 7, 2], counts[codes == 7, 3] = 4, 4
    worst, is_beyond_chance = worst_slice(breakdown.score(counts), wer)
    assert (worst.group, is_beyond_chance) == ("g7", True)


def test_a_column_of_the_corpus_does_not_hide_what_is_known_of_a_clip(tmp_path: Path) -> None:
    metadata = [{"duration": f"{row}.5", "accent": "a"} for row in range(6)]
    write_part(tmp_path / "data" / "test" / "part_1", make_rows(6, 2), metadata=metadata)
    dataset = ShardDataset(tmp_path / "data" / "test")
    assert list(members(dataset, "duration")) == ["under 2 s"]
    assert list(members(dataset, "corpus_duration")) == [f"{row}.5" for row in range(6)]


def test_a_column_of_ids_is_not_read_to_its_end(dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = Counter(), ShardDataset.column

    def column(self: ShardDataset, name: str, rows: np.ndarray | None = None) -> Iterator[str]:
        for value in original(self, name, rows):
            read[name] += 1
            yield value

    monkeypatch.setattr(ShardDataset, "column", column)
    found = find_groupings(dataset, np.arange(60), np.full(60, 5), None)
    assert "client" not in [grouping.name for grouping in found]
    assert read["client"] == 21
    assert read["accent"] == 60


def test_a_stratified_subset_keeps_the_shares(dataset: ShardDataset) -> None:
    trained = Trained.of(train_of(dataset))
    rows = np.arange(60)
    for wanted in (8, 20, 59):
        chosen = draw_stratified(dataset, rows, trained, wanted, seed=1)
        assert len(set(chosen.tolist())) == wanted
        assert (np.diff(chosen) > 0).all()
        speakers = Counter(SPEAKERS[row % 4] for row in chosen)
        # Known, new and unnamed voices are the first thing to be kept in proportion.
        known = speakers["ann"] + speakers["ben"]
        assert abs(known - wanted / 2) <= 1
        assert abs(speakers["cem"] - wanted / 4) <= 1
    assert (
        draw_stratified(dataset, rows, trained, 8, seed=1).tolist()
        == draw_stratified(dataset, rows, trained, 8, seed=1).tolist()
    )
    assert len({tuple(draw_stratified(dataset, rows, trained, 8, seed=seed)) for seed in range(5)}) > 1
