"""Shards as a dataset, the plan of updates and its cuts, and padding against transformers."""

import hashlib
import math
import mmap
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from conftest import REPOSITORY, TINY_MODEL, make_rows, write_part
from transformers import AutoConfig, Wav2Vec2FeatureExtractor

import data
from corpora import OWN_COLUMNS
from data import (
    SAMPLE_RATE_HZ,
    Batch,
    BatchPlan,
    Collator,
    CutSettings,
    ShardDataset,
    Utterance,
    cut_update,
    evaluation_loader,
    has_utterances,
    training_loader,
)
from errors import UsageError
from integrity import IndexHash, find_damage, read_sealed, write_sealed
from model import num_frames
from text import LARGE_960H_VOCABULARY, TextNormalizer, Vocabulary, build_tokenizer

Mutate = Callable[[Path], object]


def make_collator(seed: int = 7, do_normalize: bool = True, **model_settings: object) -> Collator:
    settings = TINY_MODEL | model_settings
    hf_config = AutoConfig.for_model(**settings)
    return Collator(
        TextNormalizer(',?.!-;:"', "upper"), Vocabulary(LARGE_960H_VOCABULARY), do_normalize, hf_config, seed
    )


def common_voice_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Samples per clip as in Common Voice English: mean about 5.1 s, a long tail up to 15 s."""
    seconds = np.random.default_rng(seed).lognormal(1.56, 0.38, count).clip(1.0, 15.0)
    return (seconds * SAMPLE_RATE_HZ).astype(np.int32)


def plan_of(count: int, size: int, seed: int = 3) -> BatchPlan:
    return BatchPlan(np.arange(count) * 2 + 1, common_voice_lengths(count), size, seed)


# ---------------------------------------------------------------------------------------------------------------------
# ShardDataset


def test_rows_equal_the_source_across_parts_and_record_batches(prepared: Path) -> None:
    dataset, source = ShardDataset(prepared / "train"), make_rows(13, seed=1)
    assert len(dataset) == 13
    assert dataset.num_samples.dtype == np.int32
    for row in (*range(13), 5, 0, 12):
        utterance, (utterance_id, audio, text, _) = dataset[row], source[row]
        assert (utterance.id, utterance.text) == (utterance_id, text)
        assert utterance.audio.dtype == np.int16
        np.testing.assert_array_equal(utterance.audio, audio)
        assert dataset.num_samples[row] == len(audio)
    assert list(dataset.column("speaker")) == [row[3] for row in source]
    assert list(dataset.column("text")) == [row[2] for row in source]
    assert dataset.column_names == list(OWN_COLUMNS)
    assert dataset.seconds == pytest.approx(sum(len(row[1]) for row in source) / 16_000)


def test_a_numeric_column_is_one_array_over_all_parts(prepared: Path) -> None:
    dataset, source = ShardDataset(prepared / "train"), make_rows(13, seed=1)
    peaks = dataset.numpy_column("peak")
    assert peaks.dtype == np.float32
    np.testing.assert_allclose(peaks, [np.abs(row[1].astype(int)).max() / 32_768 for row in source], rtol=1e-6)
    np.testing.assert_array_equal(dataset.numpy_column("num_samples"), dataset.num_samples)
    assert dataset.numpy_column("source_rate_hz").tolist() == [16_000] * 13
    with pytest.raises(UsageError, match="has no column 'loudness'; it has id, audio"):
        dataset.numpy_column("loudness")


@pytest.mark.parametrize("row", [-1, 13, 10**9])
def test_a_row_outside_ends_the_iteration_and_never_wraps_around(prepared: Path, row: int) -> None:
    with pytest.raises(IndexError):
        ShardDataset(prepared / "train")[row]


def test_parts_are_read_by_number_and_not_by_name(tmp_path: Path) -> None:
    rows = make_rows(12, seed=1)
    for number, row in enumerate(rows, 1):
        write_part(tmp_path / "data" / "train" / f"part_{number}", [row])
    assert list(ShardDataset(tmp_path / "data" / "train").column("id")) == [row[0] for row in rows]


def test_audio_is_a_view_of_the_mapped_file(prepared: Path) -> None:
    dataset = ShardDataset(prepared / "train")
    first, again = dataset[11].audio, dataset[11].audio
    assert np.shares_memory(first, again), "two reads made two copies"
    assert not first.flags.writeable
    assert not first.flags.owndata
    allocated = pa.total_allocated_bytes()
    kept = [dataset[row].audio for row in range(len(dataset))]
    assert pa.total_allocated_bytes() == allocated
    if sys.platform.startswith("linux"):
        mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "data.arrow" in line]
        ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in mapped]
        for audio in kept:
            address = audio.__array_interface__["data"][0]
            assert any(start <= address and address + audio.nbytes <= stop for start, stop in ranges)


def test_pickle_carries_the_index_and_no_audio(prepared: Path) -> None:
    dataset = ShardDataset(prepared / "train")
    assert dataset[12].id and dataset.fingerprint, "readers are open, the fingerprint is known"
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 3_000 < sum(dataset.num_samples)
    copy = pickle.loads(pickled)
    assert copy.fingerprint == dataset.fingerprint
    np.testing.assert_array_equal(copy.num_samples, dataset.num_samples)
    for row in range(13):
        assert (copy[row].id, copy[row].text) == (dataset[row].id, dataset[row].text)
        np.testing.assert_array_equal(copy[row].audio, dataset[row].audio)


def test_promise_6_the_index_of_200_000_rows_is_a_few_numpy_arrays(tmp_path: Path) -> None:
    count, per_batch = 200_000, 128
    part = tmp_path / "data" / "train" / "part_1"
    write_part(part, [])
    schema = pa.ipc.open_file(pa.py_buffer((part / "data.arrow").read_bytes())).schema
    names, index = [f"clip {number}" for number in range(per_batch)], IndexHash(schema)
    one_sample = hashlib.sha256(bytes(2)).hexdigest()
    audio = pa.LargeListArray.from_arrays(pa.array(np.arange(per_batch + 1)), pa.array(np.zeros(per_batch, np.int16)))
    with pa.OSFile(str(part / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, count, per_batch):
            rows = min(per_batch, count - start)
            lengths = pa.array(np.arange(start, start + rows, dtype=np.int32))
            columns = {"audio": audio.slice(0, rows), "num_samples": lengths}
            columns["audio_sha256"] = pa.array([one_sample] * rows)
            for field in schema:
                if field.name not in columns:
                    filling = names[:rows] if field.type == pa.string() else np.zeros(rows)
                    columns[field.name] = pa.array(filling, field.type)
            batch = pa.record_batch(columns, schema=schema)
            index.add(batch)
            writer.write_batch(batch)
    edit_facts(part, rows=count, data_bytes=(part / "data.arrow").stat().st_size, index_sha256=index.hexdigest())

    tracemalloc.start()
    dataset = ShardDataset(part.parent)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 4 bytes of a row for its length and for each measure; no more than twice as much while they are put together.
    row_bytes = 4 * sum(field.type in (pa.int32(), pa.float32()) for field in schema)
    assert row_bytes == 48
    assert kept < (row_bytes + 2) * count
    assert peak < 2 * (row_bytes + 2) * count
    lists = [value for value in vars(dataset).values() if isinstance(value, (list, dict))]
    assert all(len(value) <= row_bytes // 4 for value in lists), "one entry per part or column, none per utterance"
    assert dataset.num_samples[-1] == count - 1
    assert len(dataset[count - 1].audio) == 1


def edit_facts(part: Path, **changes: object) -> None:
    """Other facts under a seal that agrees with them; None takes one out."""
    facts = read_sealed(part / "part.json") | changes
    write_sealed(part / "part.json", {name: value for name, value in facts.items() if value is not None})


def truncate(part: Path) -> None:
    data = (part / "data.arrow").read_bytes()
    (part / "data.arrow").write_bytes(data[: len(data) // 2])


def truncate_unnoticed(part: Path) -> None:
    truncate(part)
    edit_facts(part, data_bytes=(part / "data.arrow").stat().st_size)


def overwrite(part: Path, place: int, size: int = 64) -> None:
    data = bytearray((part / "data.arrow").read_bytes())
    data[place : place + size] = b"\xff" * size
    (part / "data.arrow").write_bytes(bytes(data))


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def first_batch(part: Path) -> int:
    """Where the first record batch's metadata lies: behind the file's magic and the schema's message."""
    with (part / "data.arrow").open("rb") as file:
        return 24 + int.from_bytes(file.read(16)[12:], "little")


def without_column(part: Path, name: str) -> None:
    table = pa.ipc.open_file(pa.py_buffer((part / "data.arrow").read_bytes())).read_all().drop_columns([name])
    with pa.OSFile(str(part / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    edit_facts(part, data_bytes=(part / "data.arrow").stat().st_size)


DAMAGES: dict[str, tuple[Mutate, str]] = {
    "file cut short": (truncate, r"data.arrow has \d+ bytes of \d+"),
    "cut short before its size was noted": (truncate_unnoticed, "damaged"),
    "size mismatch": (lambda part: edit_facts(part, data_bytes=7), "bytes of 7"),
    "no data": (lambda part: (part / "data.arrow").unlink(), "damaged"),
    "no facts": (lambda part: (part / "part.json").unlink(), "damaged"),
    "not JSON": (lambda part: (part / "part.json").write_text("{"), "damaged"),
    "JSON of another kind": (lambda part: (part / "part.json").write_text("[1]"), "damaged"),
    "not text": (lambda part: (part / "part.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "an older schema": (
        lambda part: edit_facts(part, schema_version=3),
        "schema 3, this version reads 4.*: prepare the corpus again",
    ),
    "a newer schema": (lambda part: edit_facts(part, schema_version=5), "schema 5, this version reads 4"),
    "a number changed": (
        lambda part: (part / "part.json").write_text(
            (part / "part.json").read_text().replace('"rows": 5', '"rows": 6')
        ),
        "part.json differs from its checksum",
    ),
    "another text": (lambda part: replace_bytes(part / "data.arrow", b"u1_9", b"u1_7"), "ids, texts or lengths differ"),
    "no schema version": (lambda part: edit_facts(part, schema_version=None), "damaged"),
    "no column of lengths": (lambda part: without_column(part, "num_samples"), "num_samples"),
    "bad metadata of a record batch": (lambda part: overwrite(part, first_batch(part)), "damaged"),
    "bad footer": (lambda part: overwrite(part, -200, 100), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_in_one_line_that_names_it(prepared: Path, damage: str) -> None:
    mutate, message = DAMAGES[damage]
    mutate(prepared / "train" / "part_2")
    with pytest.raises(UsageError, match=message) as refused:
        ShardDataset(prepared / "train")
    named = prepared if "er schema" in damage else prepared / "train" / "part_2"
    assert str(named) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_damage_names_the_command_that_mends_it(prepared: Path) -> None:
    truncate(prepared / "train" / "part_2")
    command = f"make it again with python prepare.py --corpus corpus --data_dir {prepared} --verify"
    with pytest.raises(UsageError, match=re.escape(command)):
        ShardDataset(prepared / "train")


def test_whatever_byte_is_damaged_no_other_row_is_read(prepared: Path) -> None:
    """At the start or when the row is read: refused by name, or else every row is as it was; --verify finds all."""
    part = prepared / "dev" / "part_1"
    data = (part / "data.arrow").read_bytes()
    dataset = ShardDataset(part.parent)
    expected = [(one.id, one.audio.tobytes(), one.text) for one in map(dataset.__getitem__, range(5))]
    rng, refused = np.random.default_rng(0), Counter()
    # Most bytes are audio; the places that matter more lie at both ends of the file and of its columns.
    places = [*rng.integers(0, len(data), 100), *range(0, 2_000, 23), *range(len(data) - 4_000, len(data), 37)]
    for place in places:
        with (part / "data.arrow").open("r+b") as file:
            file.seek(place)
            file.write(bytes([data[place] ^ (1 << rng.integers(8))]))
        where = "start"
        try:
            dataset = ShardDataset(part.parent)
            where = "row"
            found = [(one.id, one.audio.tobytes(), one.text) for one in map(dataset.__getitem__, range(5))]
            assert found == expected
            where = "nowhere"
        except UsageError as error:
            assert f"{part} is damaged (" in str(error)
        refused[where] += 1
        assert list(find_damage([part])), place
        with (part / "data.arrow").open("r+b") as file:
            file.seek(place)
            file.write(data[place : place + 1])
    assert list(find_damage([part])) == []
    assert refused["row"] > 50 and refused["start"] > 20, refused


def test_a_part_that_lacks_a_column_or_its_checksum_is_named(prepared: Path) -> None:
    without_column(prepared / "train" / "part_2", "speaker")
    with pytest.raises(UsageError, match=r"part_2 is damaged.*ids, texts or lengths differ"):
        ShardDataset(prepared / "train")
    dataset = ShardDataset(prepared / "dev")
    edit_facts(prepared / "dev" / "part_1", sha256=None)
    with pytest.raises(UsageError, match=r"part_1 is damaged.*sha256"):
        _ = dataset.fingerprint


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_behind_the_lengths_is_named_when_its_row_is_read(prepared: Path, num_workers: int) -> None:
    part = prepared / "train" / "part_2"
    dataset = ShardDataset(prepared / "train")
    # Done to a part that was whole at the start, as by a failing disk.
    start = first_batch(part)
    with (part / "data.arrow").open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 64)
    cut = CutSettings(rank=0, num_processes=1, max_utterances=2)
    loader = evaluation_loader(dataset, np.arange(13), make_collator(), cut, num_workers)
    with pytest.raises(UsageError, match=r"part_2 is damaged.*: make it again with python prepare.py"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_whose_audio_was_damaged_meanwhile_is_named(prepared: Path, num_workers: int) -> None:
    part, dataset = prepared / "train" / "part_2", ShardDataset(prepared / "train")
    place = (part / "data.arrow").read_bytes().index(dataset[9].audio.tobytes()) + 1_001
    with (part / "data.arrow").open("r+b") as file:
        file.seek(place)
        file.write(b"\x55\xaa")
    cut = CutSettings(rank=0, num_processes=1, max_utterances=2)
    others = np.array([row for row in range(13) if row != 9])
    list(evaluation_loader(dataset, others, make_collator(), cut, num_workers))
    with pytest.raises(UsageError, match=r"part_2 is damaged \(row u1_9 of data.arrow: its audio differs.*--verify"):
        list(evaluation_loader(dataset, np.array([8, 9]), make_collator(), cut, num_workers))


def test_an_unknown_column_is_refused_with_the_known_ones(prepared: Path) -> None:
    with pytest.raises(UsageError, match="no column 'accent'; it has id, audio, num_samples, text, speaker"):
        list(ShardDataset(prepared / "train").column("accent"))


def rename_part(old: str, new: str) -> Mutate:
    return lambda split: (split / old).rename(split / new)


def set_parts(count: object) -> Mutate:
    def change(split: Path) -> None:
        facts = read_sealed(split.parent / "prepare.json")
        facts["splits"][split.name]["parts"] = count
        write_sealed(split.parent / "prepare.json", facts)

    return change


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (rename_part("part_1", "kept_1"), "lacks part_1: run prepare.py again"),
        # The last part is missing: only prepare.json knows, and training would run on less without a word.
        (rename_part("part_2", "kept_2"), "lacks part_2: run prepare.py again"),
        (rename_part("part_2", "part_3"), "lacks part_2"),
        (lambda split: (split / "part_x").mkdir(), "holds part_x, which prepare.json does not count"),
        (lambda split: (split / "part_").mkdir(), "holds part_, which"),
        (lambda split: (split / "part_3").mkdir(), "holds part_3, which"),
        (lambda split: (split.parent / "prepare.json").unlink(), "not finished.*run the same prepare.py command"),
        (lambda split: (split.parent / "prepare.json").write_text("{}"), "not finished"),
        (set_parts("two"), "not finished"),
    ],
)
def test_promise_4_a_preparation_that_is_not_whole_is_refused(prepared: Path, mutate: Mutate, message: str) -> None:
    mutate(prepared / "train")
    with pytest.raises(UsageError, match=message) as refused:
        ShardDataset(prepared / "train")
    assert "\n" not in str(refused.value)


def test_splits_without_utterances_are_refused(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UsageError, match=r"no prepared data: run python prepare.py"):
        ShardDataset(tmp_path / "elsewhere" / "train")
    write_part(tmp_path / "other" / "train" / "part_1", make_rows(2, seed=1))
    with pytest.raises(UsageError, match=r"the dev split of .* is empty.*--split_by"):
        ShardDataset(tmp_path / "other" / "dev")
    write_part(tmp_path / "other" / "test" / "part_1", [])
    with pytest.raises(UsageError, match=r"test holds no utterance: .*dropped.csv says why"):
        ShardDataset(tmp_path / "other" / "test")


def test_fingerprint_tells_the_data(prepared: Path, tmp_path: Path) -> None:
    fingerprints = {ShardDataset(prepared / split).fingerprint for split in ("train", "dev", "test")}
    assert len(fingerprints) == 3
    write_part(tmp_path / "same" / "dev" / "part_1", make_rows(5, seed=2))
    same = ShardDataset(tmp_path / "same" / "dev").fingerprint
    assert same == ShardDataset(prepared / "dev").fingerprint, "the place of the data does not matter"


# ---------------------------------------------------------------------------------------------------------------------
# BatchPlan


def test_order_is_a_function_of_seed_and_epoch() -> None:
    plan = plan_of(1_003, 8)
    expected = [plan.epoch_order(epoch) for epoch in range(3)]
    np.random.seed(99)
    np.random.random(5)
    torch.manual_seed(99)
    for epoch in (2, 0, 1, 0):
        np.testing.assert_array_equal(plan_of(1_003, 8).epoch_order(epoch), expected[epoch])
    assert not np.array_equal(expected[0], expected[1])
    assert not np.array_equal(expected[1], expected[2])
    assert not np.array_equal(plan_of(1_003, 8, seed=4).epoch_order(0), expected[0])


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (1_003, 8), (1_024, 8), (700, 1), (5, 3)]
)
def test_each_utterance_once_per_epoch_and_one_short_update_at_its_end(count: int, size: int) -> None:
    plan = plan_of(count, size)
    assert plan.updates_per_epoch == -(-count // size)
    planned = list(plan.updates(0, 3 * plan.updates_per_epoch))
    assert [step for step, _, _ in planned] == list(range(3 * plan.updates_per_epoch))
    for epoch in range(3):
        updates = [positions for _, of_epoch, positions in planned if of_epoch == epoch]
        assert len(updates) == plan.updates_per_epoch
        assert sorted(np.concatenate(updates)) == list(range(count))
        assert {len(positions) for positions in updates[:-1]} <= {size}
        assert len(updates[-1]) == (count - 1) % size + 1


@pytest.mark.parametrize("first", [0, 1, 24, 125, 126, 127, 200, 251, 252, 376, 378])
def test_promise_3_the_position_in_the_data_is_the_step(first: int) -> None:
    """A resume at any step goes on with the updates that an unbroken run would make."""
    plan = plan_of(1_003, 8)
    unbroken = list(plan.updates(0, 378))
    resumed = list(plan_of(1_003, 8).updates(first, 378))
    assert len(resumed) == 378 - first
    for (step, epoch, positions), (expected_step, expected_epoch, expected) in zip(
        resumed, unbroken[first:], strict=True
    ):
        assert (step, epoch) == (expected_step, expected_epoch)
        np.testing.assert_array_equal(positions, expected)


def test_padding_is_small_and_updates_of_all_lengths_are_mixed() -> None:
    """The English seed's set and update: 13,674 clips, 2 micro-batches of 4."""
    lengths = common_voice_lengths(13_674)
    plan = BatchPlan(np.arange(len(lengths)), lengths, 8, seed=42)
    real = padded = 0
    means = []
    for _, _, positions in plan.updates(0, plan.updates_per_epoch):
        means.append(lengths[positions].mean())
        for (chunk,) in cut_update(lengths[positions], 1, 4):
            real += int(lengths[positions][chunk].sum())
            padded += int(lengths[positions][chunk].max()) * len(chunk)
    assert 1 - real / padded < 0.05
    # No course from short to long, within a bucket or over the epoch, and no two epochs with the same partners.
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1
    thirds = [np.mean(third) for third in np.array_split(means, 3)]
    assert max(thirds) / min(thirds) < 1.05
    groups = [{frozenset(of_epoch) for _, _, of_epoch in plan.updates(first, first + 1_709)} for first in (0, 1_710)]
    assert len(groups[0] & groups[1]) < 10


def test_the_short_last_update_is_not_always_the_longest_clips() -> None:
    plan = plan_of(1_003, 8)
    last = {frozenset(plan.epoch_order(epoch)[-3:].tolist()) for epoch in range(20)}
    assert len(last) == 20
    means = [plan.num_samples[list(rows)].mean() for rows in last]
    assert min(means) < plan.num_samples.mean() < max(means)


# ---------------------------------------------------------------------------------------------------------------------
# Cuts


def random_cuts() -> Iterator[tuple[np.ndarray, int, int, float | None]]:
    rng = np.random.default_rng(5)
    for _ in range(400):
        lengths = rng.integers(1_600, 240_000, rng.integers(1, 70)).astype(np.int32)
        limit = None if rng.random() < 0.5 else float(rng.uniform(1.0, 60.0) * SAMPLE_RATE_HZ)
        yield lengths, int(rng.integers(1, 9)), int(rng.integers(1, 20)), limit


def test_cutting_by_seconds_takes_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every utterance is a micro-batch of its own: the bisection once went on to the smallest float."""
    passes, original = [], data._chunks_by_samples
    monkeypatch.setattr(data, "_chunks_by_samples", lambda *given: passes.append(1) or original(*given))
    for seconds in (0.1, 6.0, 12.0, 40.0, 1e6):
        passes.clear()
        cut_update(np.array([11, 9, 8, 8, 7, 6], np.int32) * SAMPLE_RATE_HZ, 2, 8, seconds * SAMPLE_RATE_HZ)
        assert len(passes) < 12


def test_promise_1_every_cut_holds_the_same_update() -> None:
    """Each utterance once, whatever the processes and limits; as many micro-batches on every rank."""
    for lengths, processes, max_utterances, limit in random_cuts():
        cuts = cut_update(lengths, processes, max_utterances, limit)
        chunks = [chunk for micro_step in cuts for chunk in micro_step]
        assert all(len(micro_step) == processes for micro_step in cuts)
        assert sorted(np.concatenate(chunks)) == list(range(len(lengths)))
        for chunk in chunks:
            if limit is None:
                assert len(chunk) <= max_utterances
            else:
                assert len(chunk) <= 1 or len(chunk) * int(lengths[chunk].max()) <= limit
        if any(len(chunk) == 0 for chunk in chunks):
            assert len(lengths) < len(chunks), "an empty cut only where there are fewer utterances than cells"
        if limit is None:
            assert len(cuts) == math.ceil(len(lengths) / (max_utterances * processes))


def test_cuts_are_sorted_so_that_ranks_do_like_work() -> None:
    for lengths, processes, max_utterances, limit in random_cuts():
        cuts = cut_update(lengths, processes, max_utterances, limit)
        order = np.concatenate([chunk for micro_step in cuts for chunk in micro_step])
        assert np.all(np.diff(lengths[order].astype(np.int64)) <= 0)


@pytest.mark.parametrize(
    ("lengths", "processes", "max_utterances", "seconds", "expected"),
    [
        # Five processes share an update of eight: one micro-step, nobody idle.
        ([8, 7, 6, 5, 4, 3, 2, 1], 5, 2, None, [[[0, 1], [2, 3], [4, 5], [6], [7]]]),
        ([1, 2, 3], 5, 8, None, [[[2], [1], [0], [], []]]),
        ([1, 2, 3, 4, 5], 1, 2, None, [[[4, 3]], [[2, 1]], [[0]]]),
        ([1, 2, 3, 4, 5], 2, 2, None, [[[4, 3], [2]], [[1], [0]]]),
        # By seconds: 20 s is over the limit and goes alone; 2 x 5 s and 4 x 2 s fit into 10 s.
        ([2, 20, 5, 2, 5, 2, 2], 1, 1, 10.0, [[[1]], [[2, 4]], [[0, 3, 5, 6]]]),
        # Two ranks: the heaviest of three micro-batches is divided.
        ([2, 20, 5, 2, 5, 2, 2], 2, 1, 10.0, [[[1], [2]], [[4], [0, 3, 5, 6]]]),
        # No remainder for the last rank: five and four, not eight and one.
        ([1] * 9, 2, 1, 8.0, [[[0, 1, 2, 3, 4], [5, 6, 7, 8]]]),
        ([1] * 9, 1, 1, 8.0, [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8]]]),
        ([20, 30], 4, 1, 10.0, [[[1], [0], [], []]]),
        ([], 2, 4, None, []),
        ([], 2, 4, 10.0, []),
    ],
)
def test_literal_cuts(
    lengths: list[int],
    processes: int,
    max_utterances: int,
    seconds: float | None,
    expected: list[list[list[int]]],
) -> None:
    limit = None if seconds is None else seconds * SAMPLE_RATE_HZ
    cuts = cut_update(np.array(lengths, np.int32) * SAMPLE_RATE_HZ, processes, max_utterances, limit)
    assert [[chunk.tolist() for chunk in micro_step] for micro_step in cuts] == expected


@pytest.mark.parametrize("limit", [None, 3.0])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_promise_1_ranks_of_the_loader_share_the_planned_update(
    prepared: Path, processes: int, limit: float | None
) -> None:
    dataset = ShardDataset(prepared / "train")
    rows = np.array([0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12])
    num_labels = np.arange(100, 111)
    plan = BatchPlan(rows, dataset.num_samples[rows], utterances_per_update=4, seed=1)
    loaders = [
        training_loader(
            dataset, plan, num_labels, make_collator(), CutSettings(rank, processes, 2, limit), 1, 7, num_workers=0
        )
        for rank in range(processes)
    ]
    assert all(len(loader) == 6 for loader in loaders)
    ids = list(dataset.column("id"))
    for updates, (step, epoch, positions) in zip(zip(*loaders, strict=True), plan.updates(1, 7), strict=True):
        seen = Counter(name for update in updates for batch in update.micro_batches for name in batch.ids)
        assert seen == Counter(ids[row] for row in rows[positions])
        for update in updates:
            assert (update.step, update.epoch) == (step, epoch)
            assert update.num_labels == num_labels[positions].sum()
            assert update.num_utterances == len(positions)


@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize(("processes", "max_utterances"), [(1, 1), (1, 5), (2, 2), (3, 4), (8, 8)])
def test_each_evaluation_row_is_on_one_rank_once(
    prepared: Path, processes: int, max_utterances: int, limit: float | None
) -> None:
    """Trap 16: gathering over ranks scored 12 of 9 utterances."""
    dataset = ShardDataset(prepared / "train")
    rows = np.array([12, 0, 3, 4, 5, 6, 7, 9, 10])
    batches = [
        list(evaluation_loader(dataset, rows, make_collator(), CutSettings(rank, processes, max_utterances, limit), 0))
        for rank in range(processes)
    ]
    seen = Counter(name for of_rank in batches for batch in of_rank for name in batch.ids)
    assert seen == Counter(dataset[int(row)].id for row in rows)
    counts = [len(of_rank) for of_rank in batches]
    assert max(counts) - min(counts) <= 1
    assert all(batch.time_mask_BT is None for of_rank in batches for batch in of_rank), "no masks while evaluating"


# ---------------------------------------------------------------------------------------------------------------------
# Padding, labels, masks


def real_clips(corpora: Callable[[str], Path]) -> list[Utterance]:
    found = sorted((corpora("digits") / "wav").glob("*.wav"))[::251]
    texts = ["Four, five!", "it's  six", "", "zürich\u2019s “zoo”", "seven", "eight-nine", "ONE TWO", "three"]
    clips = [soundfile.read(path, dtype="int16")[0] for path in found[: len(texts)]]
    return [Utterance(str(index), clip, text) for index, (clip, text) in enumerate(zip(clips, texts, strict=True))]


def synthetic_clips() -> list[Utterance]:
    loud = np.full(700, -32_768, np.int16)
    rows = [(name, audio, text.lower() + "?", "") for name, audio, text, _ in make_rows(6, seed=4)]
    rows += [("silence", np.zeros(900, np.int16), "", ""), ("loud", loud, "it\u2019s", "")]
    return [Utterance(*row[:3]) for row in rows]


def assert_equal_to_transformers(utterances: list[Utterance], do_normalize: bool) -> None:
    collate = make_collator(do_normalize=do_normalize)
    batch = collate(utterances, np.arange(len(utterances)))
    extract = Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True)
    waveforms = [utterance.audio.astype(np.float32) / 32_768 for utterance in utterances]
    theirs = extract(waveforms, sampling_rate=SAMPLE_RATE_HZ, padding=True, return_tensors="pt")
    torch.testing.assert_close(batch.input_values_BS, theirs["input_values"], rtol=1e-6, atol=1e-6)
    assert batch.input_values_BS.dtype == torch.float32
    assert batch.sample_lengths_B.tolist() == theirs["attention_mask"].sum(-1).tolist()
    padding = theirs["attention_mask"] == 0
    assert torch.all(batch.input_values_BS[padding] == 0)

    tokenizer = build_tokenizer(LARGE_960H_VOCABULARY)
    labels = [tokenizer(collate.normalizer(utterance.text))["input_ids"] for utterance in utterances]
    assert batch.label_lengths_B.tolist() == [len(row) for row in labels]
    assert batch.labels_L.tolist() == [index for row in labels for index in row]
    assert batch.labels_L.dtype == batch.label_lengths_B.dtype == torch.int64
    assert batch.texts == [collate.normalizer(utterance.text) for utterance in utterances]
    assert batch.raw_texts == [utterance.text for utterance in utterances]
    assert batch.num_samples == sum(len(utterance.audio) for utterance in utterances)
    assert batch.num_padded_samples == len(utterances) * max(len(utterance.audio) for utterance in utterances)


@pytest.mark.parametrize("do_normalize", [True, False])
def test_equal_to_transformers_on_synthetic_clips(do_normalize: bool) -> None:
    assert_equal_to_transformers(synthetic_clips(), do_normalize)


@pytest.mark.parametrize("do_normalize", [True, False])
def test_equal_to_transformers_on_real_speech(corpora: Callable[[str], Path], do_normalize: bool) -> None:
    assert_equal_to_transformers(real_clips(corpora), do_normalize)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    utterances, collate = synthetic_clips(), make_collator()
    together = collate(utterances, np.arange(len(utterances)))
    for row, utterance in enumerate(utterances):
        alone = collate([utterance], np.array([row])).input_values_BS[0]
        assert torch.equal(together.input_values_BS[row, : len(alone)], alone)


MASKING = {
    "mask_time_prob": 0.3,
    "mask_time_length": 3,
    "mask_time_min_masks": 2,
    "mask_feature_prob": 0.3,
    "mask_feature_length": 4,
}


def test_promise_1_masks_follow_seed_epoch_and_row_and_not_the_cut() -> None:
    """Trap 21: transformers draws them from numpy's global state."""
    utterances = synthetic_clips()[:6]
    rows = np.array([40, 41, 50, 3, 7, 0])
    collate = make_collator(**MASKING)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    together = collate(utterances, rows, epoch=2)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    frames = [
        num_frames(len(utterance.audio), TINY_MODEL["conv_kernel"], TINY_MODEL["conv_stride"])
        for utterance in utterances
    ]
    assert together.time_mask_BT.shape == (6, max(frames))
    assert together.feature_mask_BH.shape == (6, TINY_MODEL["hidden_size"])
    assert together.time_mask_BT.any(1).all()
    np.random.seed(1)
    torch.manual_seed(1)
    for cut in ([0], [5, 1], [4, 2, 3]):
        batch = collate([utterances[index] for index in cut], rows[cut], epoch=2)
        for place, index in enumerate(cut):
            assert torch.equal(
                batch.time_mask_BT[place, : frames[index]], together.time_mask_BT[index, : frames[index]]
            )
            assert torch.equal(batch.feature_mask_BH[place], together.feature_mask_BH[index])
            assert not together.time_mask_BT[index, frames[index] :].any(), "padding is not masked"
    for changed in (collate(utterances, rows, epoch=3), make_collator(seed=8, **MASKING)(utterances, rows, epoch=2)):
        assert not torch.equal(changed.time_mask_BT, together.time_mask_BT)


@pytest.mark.parametrize(
    ("settings", "has_time", "has_features"),
    [
        (MASKING, True, True),
        (MASKING | {"mask_feature_prob": 0.0}, True, False),
        (MASKING | {"mask_time_prob": 0.0}, False, True),
        (MASKING | {"apply_spec_augment": False}, False, False),
        ({}, False, False),
    ],
)
def test_masks_are_there_only_where_the_configuration_asks(
    settings: dict[str, object], has_time: bool, has_features: bool
) -> None:
    batch = make_collator(**settings)(synthetic_clips(), np.arange(8), epoch=0)
    assert (batch.time_mask_BT is not None) == has_time
    assert (batch.feature_mask_BH is not None) == has_features
    evaluated = make_collator(**settings)(synthetic_clips(), np.arange(8))
    assert evaluated.time_mask_BT is None
    assert evaluated.feature_mask_BH is None


def batch_fields(batch: Batch) -> list[object]:
    tensors = (batch.input_values_BS, batch.sample_lengths_B, batch.labels_L, batch.label_lengths_B)
    return [batch.ids, batch.texts, *(tensor.tolist() for tensor in (*tensors, batch.time_mask_BT))]


def test_workers_hold_no_state(prepared: Path) -> None:
    """Trap 28: nothing is drawn from the global generator, and 0, 1 or 2 workers give the same updates."""
    dataset = ShardDataset(prepared / "train")
    plan = BatchPlan(np.arange(13), dataset.num_samples, utterances_per_update=6, seed=1)
    found = []
    for num_workers in (0, 1, 2):
        loader = training_loader(
            dataset, plan, np.ones(13, int), make_collator(**MASKING), CutSettings(0, 1, 3), 2, 6, num_workers
        )
        before = torch.get_rng_state()
        updates = list(loader)
        assert torch.equal(torch.get_rng_state(), before)
        assert [update.step for update in updates] == [2, 3, 4, 5]
        found.append([batch_fields(batch) for update in updates for batch in update.micro_batches])
    assert found[0] == found[1] == found[2]


def test_batch_moves_what_the_model_reads_and_keeps_lengths_at_hand() -> None:
    batch = make_collator(**MASKING)(synthetic_clips(), np.arange(8), epoch=0)
    moved = batch.to(torch.device("meta"))
    for name in ("input_values_BS", "labels_L", "time_mask_BT", "feature_mask_BH"):
        assert getattr(moved, name).device.type == "meta"
    for name in ("sample_lengths_B", "label_lengths_B"):
        assert getattr(moved, name).device.type == "cpu"
    unmasked = make_collator()(synthetic_clips(), np.arange(8)).to(torch.device("meta"))
    assert unmasked.time_mask_BT is None


def test_has_utterances_tells_an_empty_or_absent_split(prepared: Path) -> None:
    write_part(prepared / "test" / "part_2", [])
    assert has_utterances(prepared / "test") and not has_utterances(prepared / "nothing")
    shutil.rmtree(prepared / "dev")
    write_part(prepared / "dev" / "part_1", [])
    assert not has_utterances(prepared / "dev")


@pytest.mark.parametrize("rows", [[], [0], [12], [2, 3, 7, 8, 9], list(range(13))])
def test_a_column_at_some_rows_reads_their_batches_alone(
    rows: list[int], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, read, original = ShardDataset(prepared / "train"), [], data.read_batch
    ids = list(dataset.column("id"))

    def counted(reader: pa.ipc.RecordBatchFileReader, position: int) -> pa.RecordBatch:
        read.append(position)
        return original(reader, position)

    monkeypatch.setattr(data, "read_batch", counted)
    assert list(dataset.column("id", np.array(rows, np.int64))) == [ids[row] for row in rows]
    # Three rows a batch, and a new part at row 8.
    assert len(read) == len({(row >= 8, (row - 8 * (row >= 8)) // 3) for row in rows})


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="this system takes no advice about mapped memory")
def test_a_clip_brings_its_own_pages_into_memory_and_not_its_batch(tmp_path: Path) -> None:
    """Arrow's own mapping asks for all of a batch, here 131 MB for a clip of 0.5."""
    count, seconds = 256, 16
    noise = np.random.default_rng(0).integers(-99, 99, seconds * 16_000).astype(np.int16)
    rows = [(f"u{number}", np.roll(noise, number), "A", "ann") for number in range(count)]
    write_part(tmp_path / "data" / "train" / "part_1", rows, rows_per_batch=count)
    path = tmp_path / "data" / "train" / "part_1" / "data.arrow"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_bytes(path) > 0.1 * path.stat().st_size:
        pytest.skip("this file system does not let go of its pages")
    dataset = ShardDataset(path.parents[1])
    assert resident_bytes(path) < 0.1 * path.stat().st_size
    before = resident_bytes(path)
    assert len(dataset[120].audio) == len(noise)
    # The clip, and around the three places of its ids and texts as much as the system reads ahead.
    assert resident_bytes(path) - before < 0.1 * path.stat().st_size


def resident_bytes(path: Path) -> int:
    """Of a file, in the memory of the system."""
    if shutil.which("fincore") is None:
        pytest.skip("needs the program fincore")
    shown = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES", path], capture_output=True)
    return int(shown.stdout)


def test_reading_imports_no_pandas(prepared: Path) -> None:
    """Arrow does for its numpy conversions: half a second before the first update, and again in every worker."""
    code = (
        "import sys; import numpy as np; from data import ShardDataset; found = ShardDataset(sys.argv[1]); found[0]; "
    )
    code += "list(found.column('id', np.array([0, 2]))); found.numpy_column('rms'); print('pandas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, prepared / "train"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
