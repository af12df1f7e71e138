"""How often an epoch hears each clip: exact counts against brute force, turns, copies, cuts, and what is refused."""

import csv
import dataclasses
from collections import Counter
from decimal import Decimal, getcontext
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_part
from test_data import common_voice_lengths, make_collator

import sampling
from augment import Augmenter
from config import TrainConfig
from data import BatchPlan, CutSettings, ShardDataset, Utterance, training_loader
from errors import UsageError
from joined import JoinedDataset
from sampling import Sampling, check_column, check_sampling, describe, plan_sampling, share_out, write_sampling

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 5.0, 20.0, 1e6, "balanced")
getcontext().prec = 50


class Labelled:
    """A training split of clips with one column, or of two sets with a column."""

    folder = Path("data/train")
    column_names = ("id", "num_samples", "speaker", "accents", "gender", "rms")

    def __init__(self, *sets: list[str]) -> None:
        self._values = [value for values in sets for value in values]
        self._sets = np.repeat(np.arange(len(sets)), list(map(len, sets)))
        self.names = [f"set_{number}" for number in range(len(sets))]
        self.num_samples = common_voice_lengths(len(self._values))

    def column(self, name: str, rows: np.ndarray) -> list[str]:
        return [self.names[self._sets[row]] if name == "corpus" else self._values[row] for row in rows]

    def sets_of(self, rows: np.ndarray) -> np.ndarray:
        return self._sets[rows]


def plan(dataset: Labelled, rows: np.ndarray | None = None, **settings: object) -> Sampling:
    rows = np.arange(len(dataset.num_samples)) if rows is None else rows
    return plan_sampling(dataset, rows, TrainConfig(data_dir="d", **{"sample_by": "accents", **settings}))


def random_accents(seed: int) -> list[str]:
    """Between 1 and 400 clips of up to nine accents, some of them without a name."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 400, rng.integers(2, 10)).tolist()
    values = [name for name, size in zip(["", *"abcdefgh"], sizes, strict=False) for _ in range(size)]
    return rng.permutation(values).tolist()


def hamilton(total: int, weights: list[Decimal]) -> list[int]:
    """Whole parts first, and one more each to the largest remainders, the first of equals."""
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda place: (counts[place] - quotas[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


# --- Counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [1, 2, 1], [3, 5, 2]),
        (7, [0.5, 0.5], [4, 3]),
        (1, [1, 5], [0, 1]),
        (100, [47, 16, 15.8, 12, 6.1, 3.1], [47, 16, 16, 12, 6, 3]),
        (3, [1e-9, 1.0], [0, 3]),
        (5, [3.0], [5]),
    ],
)
def test_literal_shares(total: int, weights: list[float], expected: list[int]) -> None:
    assert share_out(total, np.array(weights)).tolist() == expected


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", range(4))
def test_counts_are_exact_in_every_epoch_and_those_of_the_formula(seed: int, temperature: float | str) -> None:
    """Against a brute-force count, and Hamilton's method in 50 digits over n^(1/T)."""
    values = random_accents(seed)
    found = plan(Labelled(values), sampling_temperature=temperature)
    sizes = Counter(values)
    order = sorted(sizes, key=lambda name: (name == "", -sizes[name], name))
    exponent = Decimal(0) if temperature == "balanced" else 1 / Decimal(temperature)
    wanted = hamilton(len(values), [Decimal(sizes[name]) ** exponent for name in order])
    expected = dict(zip(order, wanted, strict=True))
    for epoch in range(5):
        drawn = found.draw(epoch)
        assert len(drawn) == len(values)
        assert Counter(values[row] for row in drawn) == +Counter(expected)
    assert [group.draws for group in found.groups] == wanted
    assert [group.num_clips for group in found.groups] == [sizes[name] for name in order]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_clips_of_a_group_take_turns(temperature: float | str) -> None:
    """Within an epoch floor or ceil of draws over clips; over all epochs so far no clip is more than one ahead."""
    values = random_accents(9)
    found = plan(Labelled(values), sampling_temperature=temperature)
    so_far = np.zeros(len(values), np.int64)
    for epoch in range(12):
        counts = np.bincount(found.draw(epoch), minlength=len(values))
        so_far += counts
        for code, group in enumerate(found.groups):
            inside = counts[found.codes == code]
            assert set(inside) <= {group.draws // group.num_clips, -(-group.draws // group.num_clips)}
            assert np.ptp(so_far[found.codes == code]) <= 1


def test_who_comes_once_more_changes_with_epoch_and_seed() -> None:
    values = ["a"] * 90 + ["b"] * 10
    balanced = plan(Labelled(values), sampling_temperature="balanced")
    epochs = [balanced.draw(epoch) for epoch in range(3)]
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(plan(Labelled(values), sampling_temperature="balanced").draw(1), epochs[1])
    other = plan(Labelled(values), sampling_temperature="balanced", seed=1)
    assert not np.array_equal(other.draw(0), epochs[0])
    assert set(np.diff(np.flatnonzero(np.bincount(epochs[0])[:90]))) != {1}, "no block of the corpus"


def test_a_larger_temperature_is_flatter_and_balanced_is_its_limit() -> None:
    values = ["a"] * 800 + ["b"] * 150 + ["c"] * 50
    draws = [[group.draws for group in plan(Labelled(values), sampling_temperature=t).groups] for t in TEMPERATURES]
    assert draws[0] == [800, 150, 50]
    assert draws[-1] == draws[-2] == [334, 333, 333]
    spreads = [max(of_one) - min(of_one) for of_one in draws]
    assert spreads == sorted(spreads, reverse=True)


def test_clips_without_a_value_are_a_group_of_their_own() -> None:
    found = plan(Labelled(["x", "", " ", "x", "y"]), sampling_temperature="balanced")
    assert [(group.name, group.num_clips) for group in found.groups] == [("x", 2), ("y", 1), ("not given", 2)]


def test_only_rows_that_take_part_are_counted() -> None:
    values = ["a", "b"] * 20
    rows = np.array([0, 1, 2, 4, 6, 8])
    found = plan(Labelled(values), rows, sampling_temperature="balanced")
    assert [(group.name, group.num_clips, group.draws) for group in found.groups] == [("a", 5, 3), ("b", 1, 3)]
    assert np.bincount(found.draw(0), minlength=6)[1] == 3, "positions among the rows, not rows"


def test_weights_divide_an_epoch_among_sets_and_the_temperature_within_each() -> None:
    dataset = Labelled(["a"] * 60 + ["b"] * 20, ["b"] * 10 + ["c"] * 10)
    two = {"data_dir": ["x", "y"], "data_weights": [1.0, 3.0]}
    sets = plan_sampling(dataset, np.arange(100), TrainConfig(**two))
    assert [(group.corpus, group.name, group.draws) for group in sets.groups] == [("", "set_0", 25), ("", "set_1", 75)]
    both = TrainConfig(**two, sample_by="accents", sampling_temperature="balanced")
    found = plan_sampling(dataset, np.arange(100), both)
    assert [(group.corpus, group.name, group.num_clips, group.draws) for group in found.groups] == [
        ("set_0", "a", 60, 13), ("set_0", "b", 20, 12), ("set_1", "b", 10, 38), ("set_1", "c", 10, 37),
    ]  # fmt: skip
    assert len(found.draw(3)) == 100


def test_a_set_without_a_clip_to_draw_is_refused() -> None:
    config = TrainConfig(data_dir=["x", "y"], data_weights=[1.0, 1.0])
    with pytest.raises(UsageError, match="no clip of set_1 takes part in training"):
        plan_sampling(Labelled(["a"] * 5, ["a"] * 5), np.arange(5), config)


def test_nothing_is_planned_where_nothing_is_asked_for() -> None:
    assert plan_sampling(Labelled(["a"]), np.arange(1), TrainConfig(data_dir="d")) is None
    assert plan(Labelled(["a"]), np.arange(0)) is None, "the preflight refuses it, with the reasons"


# --- The plan of updates -------------------------------------------------------------------------------------------


def skewed_plan(size: int = 16, rare: int = 10, count: int = 1_003, **settings: object) -> BatchPlan:
    values = ["a"] * (count - rare) + ["b"] * rare
    found = plan(Labelled(values), **{"sampling_temperature": "balanced", **settings})
    return BatchPlan(np.arange(count) * 2 + 1, common_voice_lengths(count), size, 3, found)


@pytest.mark.parametrize("values", [random_accents(2), ["a", "b"] * 100])
def test_temperature_1_is_a_run_without_the_setting_bit_for_bit(values: list[str]) -> None:
    lengths, rows = common_voice_lengths(len(values)), np.arange(len(values))
    bare = BatchPlan(rows, lengths, 8, 3)
    sampled = BatchPlan(rows, lengths, 8, 3, plan(Labelled(values), sampling_temperature=1.0))
    for epoch in range(3):
        np.testing.assert_array_equal(sampled.epoch_order(epoch), bare.epoch_order(epoch))
    assert all(not copies.any() for *_, copies in sampled.updates_with_copies(0, 40))
    assert sampled.samples_per_epoch == pytest.approx(bare.samples_per_epoch)


def test_an_epoch_keeps_its_length_and_holds_what_is_drawn() -> None:
    plan = skewed_plan()
    assert plan.updates_per_epoch == 63
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(plan.epoch_order(epoch)), plan.sampling.draw(epoch))
    hours = [plan.num_samples[plan.epoch_order(epoch)].sum() for epoch in range(2_000, 2_020)]
    assert plan.samples_per_epoch == pytest.approx(np.mean(hours), rel=0.02)


@pytest.mark.parametrize("rare", [10, 30, 300])
def test_an_update_does_not_hear_the_same_clip_over_and_over(rare: int) -> None:
    """Ten clips are half of the epoch: sorted by length alone, whole updates would be one clip."""
    plan = skewed_plan(rare=rare)
    most = [np.unique(positions, return_counts=True)[1].max() for _, _, positions in plan.updates(0, 62)]
    assert max(most) <= 2


def test_padding_stays_small_with_repeated_clips() -> None:
    """Of 13,674 clips a tenth are drawn as often as the others together."""
    count = 13_674
    plan = skewed_plan(8, count // 10, count)
    lengths = plan.num_samples
    updates = [lengths[positions] for _, _, positions in plan.updates(0, plan.updates_per_epoch)]
    padded = sum(int(one.max()) * len(one) for one in updates)
    assert 1 - sum(int(one.sum()) for one in updates) / padded < 0.1


def test_copies_count_how_often_a_clip_came_before_in_the_epoch() -> None:
    plan = skewed_plan()
    for epoch in range(2):
        seen: Counter[int] = Counter()
        first = epoch * plan.updates_per_epoch
        for _, _, positions, copies in plan.updates_with_copies(first, first + plan.updates_per_epoch):
            for position, copy in zip(positions.tolist(), copies.tolist(), strict=True):
                assert copy == seen[position]
                seen[position] += 1
        assert max(seen.values()) > 40


@pytest.mark.parametrize("first", [0, 1, 40, 62, 63, 64, 150, 189])
def test_promise_3_the_position_in_sampled_data_is_the_step(first: int) -> None:
    """A resume at any step goes on with the updates, and the copies, that an unbroken run would make."""
    unbroken = list(skewed_plan().updates_with_copies(0, 189))
    resumed = list(skewed_plan().updates_with_copies(first, 189))
    assert len(resumed) == 189 - first
    for found, expected in zip(resumed, unbroken[first:], strict=True):
        assert found[:2] == expected[:2]
        np.testing.assert_array_equal(found[2], expected[2])
        np.testing.assert_array_equal(found[3], expected[3])


@pytest.mark.parametrize("limit", [None, 3.0])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_promise_1_ranks_and_cuts_share_the_sampled_update(tmp_path: Path, processes: int, limit: float | None) -> None:
    """Whatever the cut, the same utterances in an update, each with the same masks, speed and noise."""
    accents = [{"accents": "north" if number < 10 else "south"} for number in range(13)]
    write_part(tmp_path / "data" / "train" / "part_1", make_rows(13, seed=1), metadata=accents)
    dataset = ShardDataset(tmp_path / "data" / "train")
    found = plan(dataset, np.arange(13), sampling_temperature="balanced")
    plan_ = BatchPlan(np.arange(13), dataset.num_samples, 5, 1, found)
    collate = make_collator(mask_time_prob=0.4, mask_time_length=2, mask_feature_prob=0.3, mask_feature_length=4)
    changes = TrainConfig(augment_speed=[0.9, 1.1], augment_noise=["white"], augment_noise_probability=1.0)
    needed = np.ones(13, np.int32)
    augmenter = Augmenter.of(changes, collate.seed, dataset, np.arange(13), needed, collate.hf_config)
    collate = dataclasses.replace(collate, augmenter=augmenter)

    def seen(number: int, seconds: float | None) -> list[Counter]:
        """Of each update the utterances with their waveforms and masks, over all ranks."""
        loaders = [
            training_loader(dataset, plan_, np.ones(13), collate, CutSettings(rank, number, 2, seconds), 0, 6, 0)
            for rank in range(number)
        ]
        return [
            Counter(
                (batch.ids[row], batch.time_mask_BT[row, : batch.frame_lengths_B[row]].numpy().tobytes(),
                 batch.feature_mask_BH[row].numpy().tobytes(),
                 batch.input_values_BS[row, : batch.sample_lengths_B[row]].numpy().tobytes())
                for update in updates for batch in update.micro_batches for row in range(len(batch.ids))
            )
            for updates in zip(*loaders, strict=True)
        ]  # fmt: skip

    alone = seen(1, None)
    assert seen(processes, limit) == alone
    assert [one.total() for one in alone] == [5, 5, 3] * 2
    south = {f"u1_{number}" for number in range(10, 13)}
    heard = [key for one in alone[:3] for key in one.elements() if key[0] in south]
    assert Counter(name for name, *_ in heard) == dict.fromkeys(south, 2), "each of them twice an epoch"
    for part in (slice(1, 3), slice(3, None)):
        assert len({(key[0], key[part]) for key in heard}) == 6, "with other masks, and another waveform, each time"


def test_a_copy_has_masks_of_its_own_and_the_first_those_of_a_run_without_sampling() -> None:
    collate = make_collator(mask_time_prob=0.4, mask_time_length=2, mask_feature_prob=0.3, mask_feature_length=4)
    clip = Utterance("u", np.ones(16_000, np.int16), "A")
    bare = collate([clip], np.array([5]), 2)
    batch = collate([clip] * 4, np.array([5, 5, 5, 5]), 2, np.array([0, 1, 2, 1]))
    assert (batch.time_mask_BT[0] == bare.time_mask_BT[0]).all()
    assert (batch.feature_mask_BH[0] == bare.feature_mask_BH[0]).all()
    assert (batch.time_mask_BT[1] == batch.time_mask_BT[3]).all()
    masks = [batch.time_mask_BT[row].numpy().tobytes() for row in range(3)]
    assert len(set(masks)) == 3


# --- What is said and written --------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_group_and_adds_up(tmp_path: Path) -> None:
    values = random_accents(5)
    dataset = Labelled(values)
    found = plan(dataset, sampling_temperature=3.0)
    write_sampling(tmp_path / "sampling.csv", found)
    with (tmp_path / "sampling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(sampling.COLUMNS)
    assert sum(int(row["clips"]) for row in rows) == sum(int(row["drawn_per_epoch"]) for row in rows) == len(values)
    for row in rows:
        name = "" if row["group"] == "not given" else row["group"]
        of_group = [length for value, length in zip(values, dataset.num_samples, strict=True) if value == name]
        assert int(row["clips"]) == len(of_group)
        assert float(row["hours"]) == pytest.approx(sum(of_group) / 16_000 / 3_600, abs=1e-4)
        drawn = Counter(values[position] for position in found.draw(7))[name]
        assert int(row["drawn_per_epoch"]) == drawn
        assert float(row["times_per_clip"]) == pytest.approx(drawn / len(of_group), abs=1e-4)
        assert row["column"] == "accents"


def test_the_screen_shows_counts_and_shares_of_the_first_groups() -> None:
    lines = describe(plan(Labelled(["a"] * 75 + ["b"] * 25), sampling_temperature="balanced"))
    assert lines[0] == "by accents, 2 groups; an epoch draws 100 clips"
    assert lines[1].startswith("a: 75 clips, 0.1")
    assert lines[1].endswith("75.0%; drawn 50, 50.0%, each 0.67 times")
    assert lines[2].endswith("25.0%; drawn 50, 50.0%, each 2.00 times")
    many = describe(plan(Labelled(list(map(str, range(20))))))
    assert (len(many), many[-1]) == (14, "and 8 more groups: sampling.csv")


@pytest.mark.parametrize(
    ("rare", "settings", "verdict", "said"),
    [
        (20, {"sampling_temperature": "balanced"}, "ok", "the 20 clips of b, 2.50 times"),
        (2, {"sampling_temperature": "balanced"}, "warning", "the 2 clips of b, 25.00 times"),
        (2, {"sampling_temperature": 1.0}, "ok", "1.00 times"),
    ],
)
def test_repetition_that_is_learned_by_heart_is_a_warning(
    rare: int, settings: dict[str, object], verdict: str, said: str
) -> None:
    (finding,) = check_sampling(plan(Labelled(["a"] * (100 - rare) + ["b"] * rare), **settings), 1)
    assert (finding.verdict, said in finding.result) == (verdict, True)
    assert check_sampling(None, 1) == []


def test_promise_4_clips_that_the_run_never_hears_are_counted() -> None:
    """Against the draws themselves."""
    sampling = plan(Labelled(["a"] * 90 + ["b"] * 10), sampling_temperature="balanced")
    for epochs in (1, 2):
        heard = np.unique(np.concatenate([sampling.draw(epoch) for epoch in range(epochs)]))
        assert sampling.num_unheard(epochs) == 100 - len(heard)
    (finding,) = check_sampling(sampling, 1)
    assert "40 clips are never heard in the 1 epochs of the run" in finding.result


def test_a_set_whose_weight_gives_it_no_clip_is_a_warning() -> None:
    config = TrainConfig(data_dir=["x", "y"], data_weights=[1e6, 1.0])
    (finding,) = check_sampling(plan_sampling(Labelled(["a"] * 5, ["a"] * 5), np.arange(10), config), 1)
    assert (finding.verdict, "never set_1" in finding.result) == ("warning", True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("accent", "--sample_by accent: did you mean accents? data/train has speaker, accents, gender"),
        ("zzz", "--sample_by zzz: data/train has speaker, accents, gender"),
        ("rms", "--sample_by rms: data/train has speaker, accents, gender"),
        ("id", "--sample_by id: data/train has speaker, accents, gender"),
        ("corpus", "data/train has speaker, accents, gender; corpus needs several folders in --data_dir"),
    ],
)
def test_an_unknown_column_names_those_that_are_there(name: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_column(Labelled([]), name)
    assert str(refused.value).endswith(message)


def test_columns_of_the_corpus_and_the_set_are_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_part(tmp_path / name / "train" / "part_1", make_rows(2, 1), metadata=[{"gender": "x"}] * 2)
    dataset = JoinedDataset(["a", "b"], [ShardDataset(tmp_path / name / "train") for name in ("a", "b")])
    for name in (None, "speaker", "gender", "corpus"):
        check_column(dataset, name)


REFUSED = {
    "too few weights": (
        {"data_dir": ["a", "b", "c"], "data_weights": [1.0, 2.0]},
        "--data_weights has 2 numbers for 3 folders: give one for each",
    ),
    "weights of one folder": ({"data_weights": [1.0]}, "--data_weights belongs to several folders"),
    "negative weight": ({"data_dir": ["a", "b"], "data_weights": [1.0, -2.0]}, "--data_weights is 1 -2, each must be"),
    "weight of zero": ({"data_dir": ["a", "b"], "data_weights": [0.0, 1.0]}, "--data_weights is 0 1, each must be"),
    "weights and corpus": (
        {"data_dir": ["a", "b"], "data_weights": [1.0, 2.0], "sample_by": "corpus"},
        "--data_weights and --sample_by corpus both divide an epoch among the sets",
    ),
    "sharpening": ({"sample_by": "x", "sampling_temperature": 0.5}, "--sampling_temperature is 0.5, at least 1"),
    "negative temperature": ({"sample_by": "x", "sampling_temperature": -1.0}, "--sampling_temperature is -1, at"),
    "temperature without a column": ({"sampling_temperature": 2.0}, "--sampling_temperature belongs to --sample_by"),
    "balanced without a column": ({"sampling_temperature": "balanced"}, "--sampling_temperature belongs to --sample"),
    "the same folder": ({"data_dir": ["a", "b", "./b/../a"]}, "/a 2 times: name a set once"),
    "demo of several": (
        {"data_dir": ["a", "b"], "demo_corpus": True},
        "demo_corpus makes one folder, --data_dir names",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_sense_are_refused(case: str) -> None:
    settings, message = REFUSED[case]
    found = TrainConfig(**{"data_dir": "a", "output_dir": "o", "model_name_or_path": "m", **settings}).errors()
    assert [error for error in found if message in error] == found
    assert len(found) == 1
