"""Shards: what is written, dropped, resumed and refused."""

import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import fill, training, write_recipe

import corpora
import integrity
import prepare as prepare_module
import progress
import shards
import splits
from audio import ClipRequest, read_clip
from config import PrepareConfig, parse_arguments
from corpora import DROP_REASONS, OWN_COLUMNS, sentence_key
from data import ShardDataset
from errors import RunFailed, UsageError
from lock import only_process_in
from prepare import prepare

REPOSITORY = Path(__file__).parents[1]
CORPORA = Path(os.environ.get("CTC_CORPORA", REPOSITORY.parent / "shared" / "corpora"))
RATES = (8_000, 16_000, 22_050)


def write_corpus(folder: Path, splits: dict[str, int], extra_rows: tuple[str, ...] = ()) -> Path:
    """A manifest corpus of short tones with splits; clip i of a split has (i + 1) x 10 ms."""
    folder.mkdir(parents=True)
    lines = ["path,text,speaker,split,note"]
    for split, count in splits.items():
        for clip in range(count):
            rate = RATES[clip % 3]
            samples = 0.3 * np.sin(np.arange((clip + 1) * rate // 100) / 10)
            soundfile.write(folder / f"{split}{clip}.wav", samples, rate)
            lines.append(f"{split}{clip}.wav,text {clip},s{clip % 2},{split},n{clip}")
    (folder / "manifest.csv").write_text("\n".join([*lines, *extra_rows]) + "\n")
    return folder


def run(corpus: Path | str, out: Path, **settings: object) -> None:
    prepare(
        PrepareConfig(corpus=str(corpus), data_dir=str(out), num_workers=settings.pop("num_workers", 1), **settings)
    )


def table(out: Path, split: str, part: int = 1) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(out / split / f"part_{part}" / "data.arrow"))).read_all()


def files(out: Path) -> dict[str, str]:
    """Every file of the set with the checksum of its content."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def checksums(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*/part_*/*"))
    }


def dropped(out: Path) -> list[tuple[str, str, str]]:
    with (out / "dropped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["detail"] for row in rows)
    return [(row["split"], row["id"], row["reason"]) for row in rows]


def test_parts_hold_the_corpus_in_order(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 7, "dev": 2, "test": 1})
    out = tmp_path / "out"
    run(corpus, out, chunk_size=3)
    parts = sorted(str(path.relative_to(out)) for path in out.glob("*/*"))
    assert parts == ["dev/part_1", "test/part_1", "train/part_1", "train/part_2", "train/part_3"]
    rows = [row for part in (1, 2, 3) for row in table(out, "train", part).to_pylist()]
    assert [row["id"] for row in rows] == [f"train{clip}.wav" for clip in range(7)]
    for clip, row in enumerate(rows):
        expected = read_clip(ClipRequest(str(corpus / row["id"])))
        np.testing.assert_array_equal(row["audio"], expected.samples)
        assert row["num_samples"] == len(expected.samples)
        assert row["audio_sha256"] == hashlib.sha256(expected.samples.tobytes()).hexdigest()
        assert (row["text"], row["speaker"], row["note"]) == (f"text {clip}", f"s{clip % 2}", f"n{clip}")
        assert row["source_rate_hz"] == RATES[clip % 3]
        assert row["peak"] == pytest.approx(0.3, abs=0.05)  # resampling overshoots at the ends
    facts = json.loads((out / "train/part_3/part.json").read_text())
    data = out / "train/part_3/data.arrow"
    assert facts["rows"] == facts["source_rows"] == 1
    assert facts["data_bytes"] == data.stat().st_size
    assert facts["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert facts["seconds"] == pytest.approx(0.07, abs=1e-3)
    assert json.loads((out / "prepare.json").read_text())["splits"]["train"]["parts"] == 3
    assert dropped(out) == []


def test_schema_and_zero_copy(tmp_path):
    out = tmp_path / "out"
    run(write_corpus(tmp_path / "corpus", {"train": 3}), out)
    with pa.memory_map(str(out / "train/part_1/data.arrow")) as source:
        before = pa.total_allocated_bytes()
        batch = pa.ipc.open_file(source).get_batch(0)
        assert tuple(batch.schema.names) == (*OWN_COLUMNS, "path", "note")
        assert batch.schema.field("audio").type == pa.large_list(pa.int16())
        offsets = batch.column("audio").offsets
        samples = batch.column("audio").values[offsets[1].as_py() : offsets[2].as_py()].to_numpy(zero_copy_only=True)
        assert samples.dtype == np.int16 and len(samples) == 320
        assert pa.total_allocated_bytes() == before
        del batch, offsets, samples


def test_record_batches_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BATCH_ROWS", 4)
    monkeypatch.setattr(shards, "MAX_BATCH_SAMPLES", 1_200)
    run(write_corpus(tmp_path / "corpus", {"train": 9}), tmp_path / "out")
    with pa.memory_map(str(tmp_path / "out/train/part_1/data.arrow")) as source:
        reader = pa.ipc.open_file(source)
        counts = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
    # Clips of 160, 320, ... samples: a batch ends with its fourth row or when it holds 1,200 samples.
    assert counts == [4, 2, 2, 1]


def test_every_bad_row_is_dropped_with_its_reason(tmp_path):
    corpus = write_corpus(
        tmp_path / "corpus",
        {"train": 12, "dev": 2, "test": 12},
        (
            "gone.wav,text,s0,train,",
            "../secret.wav,text,s0,test,",
            "broken.wav,text,s0,train,",
            "empty.wav,text,s0,test,",
            "nan.wav,text,s0,train,",
            "train1.wav,,s0,train,",
            "test1.wav, ,s0,test,",
            "train0.wav,again,s0,train,",
            "train0.wav,not again in this split,s0,dev,",
            "train0.wav,too,many,columns,here,train",
        ),
    )
    (corpus / "broken.wav").write_bytes(b"RIFF????WAVE")
    soundfile.write(corpus / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(corpus / "nan.wav", np.array([np.nan, 0.0]), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "secret.wav", np.zeros(100), 16_000)
    out = tmp_path / "out"
    run(corpus, out, chunk_size=5)
    expected = [
        ("train", "gone.wav", "missing"),
        ("train", "broken.wav", "undecodable"),
        ("train", "nan.wav", "not_finite"),
        ("train", "train1.wav", "no_text"),
        ("train", "train0.wav", "duplicate_id"),
        ("train", "manifest.csv:37", "bad_row"),
        ("test", "../secret.wav", "outside_corpus"),
        ("test", "empty.wav", "empty"),
        ("test", "test1.wav", "no_text"),
    ]
    assert dropped(out) == expected
    assert {reason for _, _, reason in expected} <= set(DROP_REASONS)
    facts = json.loads((out / "prepare.json").read_text())["splits"]
    assert {split: found["rows"] for split, found in facts.items()} == {"train": 12, "dev": 3, "test": 12}


def test_an_explicit_empty_transcript_is_scored_but_not_trained_on(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    soundfile.write(corpus / "a.wav", np.zeros(1_000), 16_000)
    records = [("1", "train", "x"), ("2", "train", "y"), ("3", "train", ""), ("4", "dev", ""), ("5", "test", None)]
    lines = [json.dumps({"id": i, "path": "a.wav", "split": split, "text": text}) for i, split, text in records]
    (corpus / "m.jsonl").write_text("\n".join(lines))
    run(corpus, tmp_path / "out")
    assert dropped(tmp_path / "out") == [("train", "3", "no_text"), ("test", "5", "no_text")]
    assert table(tmp_path / "out", "dev").column("text").to_pylist() == [""]


def test_segments_of_a_recording_become_clips(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    recording = np.arange(16_000, dtype=np.int16)
    soundfile.write(corpus / "long.wav", recording, 16_000)
    lines = [{"audio_filepath": "long.wav", "offset": 0.25 * i, "duration": 0.25, "text": f"{i}"} for i in range(4)]
    (corpus / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(corpus, tmp_path / "out", split_by="utterance", split_fractions=[0.75, 0.25])
    rows = [row for split in ("train", "dev") for row in table(tmp_path / "out", split).to_pylist()]
    assert len(rows) == 4
    for row in rows:
        np.testing.assert_array_equal(row["audio"], np.split(recording, 4)[int(row["text"])])


def test_workers_do_not_change_a_byte(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 60, "dev": 20, "test": 1}, ("gone.wav,x,s0,dev,",))
    for workers in (1, 2):
        run(corpus, tmp_path / f"out{workers}", chunk_size=25, num_workers=workers)
    assert checksums(tmp_path / "out1") == checksums(tmp_path / "out2")
    assert len(checksums(tmp_path / "out1")) == 2 * (3 + 1 + 1)


KILLED_AT = """
import os, signal, sys, prepare, shards
seen, add = 0, shards.PartWriter.add
def kill_at(self, row, clip):
    global seen
    seen += 1
    if seen > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, row, clip)
shards.PartWriter.add = kill_at
prepare.prepare(prepare.PrepareConfig(corpus=sys.argv[1], data_dir=sys.argv[2], chunk_size=4, num_workers=1))
"""


def test_killed_and_started_again(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", {"train": 10, "dev": 3})
    run(corpus, tmp_path / "whole", chunk_size=4)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_AT, str(corpus), str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([*command, "6"], capture_output=True, text=True, env=environment)
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in sorted(out.glob("*/*"))] == [".part_2.tmp", "part_1"]
    finished = (out / "train/part_1/data.arrow").stat()
    run(corpus, out, chunk_size=4)
    assert checksums(out) == checksums(tmp_path / "whole")
    kept = (out / "train/part_1/data.arrow").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)
    assert not list(out.glob("**/.*"))
    capsys.readouterr()
    run(corpus, out, chunk_size=4)
    assert "every part is there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "deleted",
    [
        ["train/part_1"],
        ["train/part_2"],
        ["train/part_3"],
        ["train/part_1", "train/part_2"],
        ["train/part_1", "train/part_3", "dev/part_1"],
    ],
)
def test_parts_that_were_deleted_are_made_again_and_the_others_kept(tmp_path, deleted):
    corpus = write_corpus(tmp_path / "corpus", {"train": 30, "dev": 12})
    out = tmp_path / "out"
    run(corpus, out, chunk_size=10)
    before, kept = checksums(out), snapshot(out)
    for name in deleted:
        shutil.rmtree(out / name)
        kept = {path: facts for path, facts in kept.items() if f"/{name}/" not in path}
    run(corpus, out, chunk_size=10)
    assert checksums(out) == before
    found = snapshot(out)
    assert {path: found[path] for path in kept if "/part_" in path} == {
        path: facts for path, facts in kept.items() if "/part_" in path
    }


def test_a_change_behind_a_deleted_part_is_still_refused(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus", {"train": 9}), tmp_path / "out"
    run(corpus, out, chunk_size=3)
    shutil.rmtree(out / "train/part_1")
    manifest = corpus / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("text 7", "changed"))
    with pytest.raises(UsageError, match="part_3 was made from other rows or files"):
        run(corpus, out, chunk_size=3)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (None, {"chunk_size": 3}, r"chunk_size 2 \(now 3\)"),
        (None, {"split_by": "utterance"}, "split_by None"),
        ("text", {}, "was made from other rows or files"),
        ("audio", {}, "was made from other rows or files"),
        ("fewer rows", {}, "holds 3 parts, this corpus .* make 2"),
    ],
)
def test_other_settings_or_another_corpus_are_refused_and_nothing_is_touched(tmp_path, change, settings, message):
    corpus, out = write_corpus(tmp_path / "corpus", {"train": 5, "dev": 2}), tmp_path / "out"
    run(corpus, out, chunk_size=2)
    manifest = corpus / "manifest.csv"
    if change == "text":
        manifest.write_text(manifest.read_text().replace("text 3", "changed"))
    elif change == "audio":
        soundfile.write(corpus / "dev1.wav", np.zeros(50), 8_000)
    elif change == "fewer rows":
        manifest.write_text("".join(line + "\n" for line in manifest.read_text().split("\n") if "train4" not in line))
    before = snapshot(out)
    with pytest.raises(UsageError, match=message):
        run(corpus, out, **({"chunk_size": 2} | settings))
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("break_corpus", "message"),
    [
        (lambda corpus: [path.unlink() for path in corpus.glob("*.wav")], "20 of the first 20 .*missing.*--audio_root"),
        (lambda corpus: [path.write_bytes(b"x") for path in corpus.glob("*.wav")], "undecodable.*ffmpeg"),
        (lambda corpus: (corpus / "manifest.csv").write_text("path,text,split\n"), "train split is empty"),
        (
            lambda corpus: (corpus / "manifest.csv").write_text("path,text,split\ntrain1.wav,x,test\n"),
            "train split is empty",
        ),
    ],
)
def test_a_hopeless_corpus_stops_before_anything_is_written(tmp_path, break_corpus, message):
    corpus = write_corpus(tmp_path / "corpus", {"train": 15, "dev": 5})
    break_corpus(corpus)
    with pytest.raises(UsageError, match=message):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_of_the_first_clips_may_be_bad(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 10})
    for clip in range(5):
        (corpus / f"train{clip}.wav").unlink()
    run(corpus, tmp_path / "out")
    assert Counter(reason for _, _, reason in dropped(tmp_path / "out")) == {"missing": 5}


def test_links_and_absolute_paths_need_audio_root(tmp_path):
    corpus = write_corpus(tmp_path / "elsewhere", {"train": 4})
    (tmp_path / "corpus").mkdir()
    manifest = (corpus / "manifest.csv").read_text().replace("train0", f"{corpus}/train0")
    (tmp_path / "corpus" / "manifest.csv").write_text(manifest)
    (tmp_path / "corpus" / "train1.wav").symlink_to(corpus / "train1.wav")
    with pytest.raises(UsageError, match="4 of the first 4"):
        run(tmp_path / "corpus", tmp_path / "out")
    run(tmp_path / "corpus", tmp_path / "out", audio_root=str(corpus))
    assert table(tmp_path / "out", "train").num_rows == 4


def test_too_small_a_disk_is_said_before_the_start(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", {"train": 4})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UsageError, match=r"needs about .* kB .*1 bytes are free: free some"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_finished_parts(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", {"train": 6})
    write, calls = shards._HashingFile.write, []

    def full_disk(self, data):
        calls.append(len(data))
        if sum(calls) > 10_000:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(shards._HashingFile, "write", full_disk)
    with pytest.raises(RunFailed, match=r"disk full at .*/part_\d: \d.* needed, .* free; finished parts are kept"):
        run(corpus, tmp_path / "out", chunk_size=2)
    names = sorted(path.name for path in (tmp_path / "out/train").iterdir())
    assert names and names == [f"part_{number + 1}" for number in range(len(names))] and len(names) < 3
    monkeypatch.undo()
    run(corpus, tmp_path / "out", chunk_size=2)
    assert len(list((tmp_path / "out/train").iterdir())) == 3


def test_a_real_disk_that_fills_up(tmp_path, small_disk):
    """The first clips are short, so the estimate is too low, and the disk fills up in the midst of a part."""
    corpus, out = tmp_path / "corpus", small_disk / "data"
    corpus.mkdir()
    soundfile.write(corpus / "short.wav", np.full(100, 0.1), 16_000)
    soundfile.write(corpus / "long.wav", np.full(500_000, 0.1), 16_000)
    names = ["short"] * prepare_module.PROBED_CLIPS + ["long"] * 16
    rows = [f"{number},{name}.wav,text,train" for number, name in enumerate(names)]
    (corpus / "manifest.csv").write_text("\n".join(["id,path,text,split", *rows]))
    filler = fill(small_disk, 8_000_000)
    message = rf"disk full at {out}/train/part_3: 17\.6 MB needed, [78]\.\d MB free; finished parts are kept"
    for _ in range(2):  # at the second start there is still no room, and the estimate knows nothing new
        with pytest.raises(RunFailed, match=message):
            run(corpus, out, chunk_size=100)
        assert sorted(path.name for path in (out / "train").iterdir()) == ["part_1", "part_2"]
    kept = checksums(out)
    filler.unlink()
    run(corpus, out, chunk_size=100)
    assert {path: checksums(out)[path] for path in kept} == kept
    integrity.verify(out)


@pytest.mark.parametrize(("function", "file"), [("_write_dropped", "dropped.csv"), ("sealed", "prepare.json")])
def test_a_full_disk_at_the_end(tmp_path, small_disk, monkeypatch, function, file):
    corpus, out = write_corpus(tmp_path / "corpus", {"train": 4}, ("gone.wav,x,s0,train,",)), small_disk / "data"
    original = getattr(prepare_module, function)
    monkeypatch.setattr(prepare_module, function, lambda *arguments: (fill(small_disk), original(*arguments))[1])
    message = rf"disk full at {out}/{re.escape(file)}: [\d.]+ \w+ needed, 0 bytes free"
    with pytest.raises(RunFailed, match=message):
        run(corpus, out)
    assert sorted(path.name for path in out.iterdir() if path.name != "train") in ([], ["dropped.csv"])
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    run(corpus, out)
    integrity.verify(out)


def test_a_read_only_place_is_named(tmp_path, read_only_disk):
    corpus = write_corpus(tmp_path / "corpus", {"train": 4})
    done = command("--corpus", corpus, "--data_dir", read_only_disk / "data")
    assert (done.returncode, done.stdout) == (2, "")
    reason = "cannot be written: Read-only file system: name another folder"
    assert done.stderr == f"error: --data_dir {read_only_disk / 'data'} {reason}\n"


def test_folders_of_others_are_left_alone(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 4})
    before = snapshot(corpus)
    with pytest.raises(UsageError, match="holds other files"):
        run(corpus, corpus)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        run(corpus, tmp_path / "file")
    assert snapshot(corpus) == before


def test_two_at_a_time_are_refused(tmp_path):
    """By the command, in one line; also before the first has written anything, and nothing is touched."""
    corpus, out = write_corpus(tmp_path / "corpus", {"train": 4}), tmp_path / "out"
    with only_process_in(out, is_waiting=False):
        before = snapshot(out)
        done = command("--corpus", corpus, "--data_dir", out)
        assert (done.returncode, done.stdout) == (2, "")
        holder = f"another prepare.py (process {os.getpid()} on {socket.gethostname()}) is writing to {out}"
        assert done.stderr == f"error: {holder}: wait for it, or name another folder\n"
        assert snapshot(out) == before
    run(corpus, out)
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_hosts_that_share_the_demo_make_it_once(tmp_path, monkeypatch):
    """What train.py does on each host: the first prepares, the second waits and finds every part."""
    out = tmp_path / "out"
    made = []
    monkeypatch.setattr(prepare_module, "make_demo_corpus", lambda folder: made.append(folder))
    write_corpus(out / "demo_corpus", {"train": 6, "dev": 2})
    program = "import prepare; prepare.make_demo_corpus = lambda folder: None; prepare.prepare(%s, is_waiting=True)"
    config = f"prepare.PrepareConfig(corpus='demo', data_dir={str(out)!r}, num_workers=1)"
    start = [sys.executable, "-c", program % config]
    with only_process_in(out, is_waiting=False):
        others = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(2)]
        for process in others:
            assert process.stdout.readline().startswith("waiting for another prepare.py")
    said = [process.communicate()[0] for process in others]
    assert [process.returncode for process in others] == [0, 0]
    assert sorted("every part is there already" in text for text in said) == [False, True]
    integrity.verify(out)


# --- killed at every step of the way

# Forks a process for each place in which it is killed, and one that goes on; clips are decoded without a pool, whose
# end the next test sees.
KILLED_IN_PLACES = """
import json, os, shutil, signal, sys
from pathlib import Path
import pandas, prepare, shards  # pyarrow would import pandas in every process
from audio import read_clip

os.fsync = lambda file: None  # what a kill leaves is in the kernel's hands already

class NoPool:
    def __init__(self, num_workers): pass
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def read(self, items):
        for item, request in items:
            yield item, request and read_clip(request)

def kill_at(owner, name, call):
    original, calls = getattr(owner, name), []
    def killed(*arguments, **named):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)
    setattr(owner, name, killed)

def run(out, place=None):
    pid = os.fork()
    if not pid:
        if place:
            kill_at(*place)
        sys.stdout = open(os.devnull, "w")
        prepare.prepare(prepare.PrepareConfig(corpus=sys.argv[1], data_dir=out, chunk_size=4, num_workers=1))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

prepare.ClipPool = NoPool
places = {
    "before anything": (prepare, "_open", 1),
    "before the first part": (prepare, "remove_unfinished_parts", 1),
    "folder of a part made": (shards.PartWriter, "__init__", 2),
    "inside a part": (shards.PartWriter, "add", 7),
    "footer": (shards.PartWriter, "finish", 2),
    "part.json": (prepare, "write_sealed", 2),
    "rename": (Path, "rename", 2),
    "behind a rename": (shards, "sync_folder", 2),
    "last part": (Path, "rename", 4),
    "dropped.csv": (prepare, "_write_dropped", 1),
    "dropped.csv written, not renamed": (Path, "replace", 1),
    "prepare.json": (prepare, "sealed", 1),
    "prepare.json written, not renamed": (Path, "replace", 2),
    "lock given back": (os, "close", 1000),
}
statuses = {}
for number, (name, place) in enumerate(places.items()):
    out = f"{sys.argv[2]}/{number}"
    statuses[name] = run(out, place), run(out)
    # Once more where a part is damaged: the new one stands in for the old one by way of two calls.
    if name in ("inside a part", "rename", "behind a rename"):
        data = Path(out, "train/part_2/data.arrow")
        data.write_bytes(data.read_bytes()[:-1])
        place = (shards.shutil, "rmtree", 1) if name == "rename" else (*place[:2], 1)
        statuses[name + " of a damaged part"] = run(out, place), run(out)
print(json.dumps(statuses))
"""


@pytest.mark.slow
def test_killed_at_every_step_and_started_again(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = ["path,text,split"]
    for clip in range(13):
        soundfile.write(corpus / f"{clip}.wav", np.full(100 + clip, 0.1), 16_000)
        lines.append(f"{clip}.wav,text {clip},{'dev' if clip > 9 else 'train'}")
    (corpus / "m.csv").write_text("\n".join([*lines, "0.wav,again,train"]))
    run(corpus, tmp_path / "whole", chunk_size=4)
    start = [sys.executable, "-c", KILLED_IN_PLACES, str(corpus), str(tmp_path)]
    done = subprocess.run(start, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    assert statuses.pop("lock given back") == [0, 0], "fewer than a thousand files: not reached"
    assert set(map(tuple, statuses.values())) == {(-9, 0)}, statuses
    assert len(statuses) == 16
    expected = files(tmp_path / "whole")
    assert len(expected) == 2 * 4 + 2
    for number in range(14):
        assert files(tmp_path / str(number)) == expected, list(statuses)[number]


@pytest.mark.slow
def test_killed_at_random_with_one_and_four_workers(tmp_path):
    """Ten kills in small; `python benchmarks/kill_prepare.py` makes a hundred."""
    start = [sys.executable, REPOSITORY / "benchmarks" / "kill_prepare.py", "--kills", "10"]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills survived: 10; " in done.stdout
    assert done.stdout.endswith("sets that differ: 0; processes left behind: 0\n")


# --- damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def flip_audio(out: Path, part: str, row: int) -> str:
    """Damage the middle of a row's audio; the row's id."""
    split, number = part.split("/part_")
    found = table(out, split, int(number)).to_pylist()[row]
    path = out / part / "data.arrow"
    flip(path, path.read_bytes().index(np.array(found["audio"], np.int16).tobytes()) + len(found["audio"]))
    return found["id"]


def command(*arguments: object) -> subprocess.CompletedProcess:
    start = [sys.executable, REPOSITORY / "prepare.py", *arguments]
    return subprocess.run(list(map(str, start)), capture_output=True, text=True)


@pytest.fixture
def three_parts(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 30, "dev": 9}, ("gone.wav,text,s0,dev,",))
    run(corpus, tmp_path / "out", chunk_size=10)
    return corpus, tmp_path / "out"


def test_verify_reads_everything_and_names_what_is_damaged(three_parts):
    corpus, out = three_parts
    whole = command("--data_dir", out, "--verify")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout == f"{out}: 39 rows in 4 parts, every byte as it was written\n"
    ids = [flip_audio(out, "train/part_2", 3), flip_audio(out, "train/part_2", 7), flip_audio(out, "dev/part_1", 0)]
    facts = out / "train/part_3/part.json"
    facts.write_text(facts.read_text().replace('"source_rows": 10', '"source_rows": 11'))
    flip(out / "dropped.csv", 5)
    before = snapshot(out)
    damaged = command("--data_dir", out, "--verify")
    assert damaged.returncode == 1
    remedy = f"python prepare.py --corpus {corpus} --chunk_size 10 --data_dir {out} --verify"
    assert damaged.stderr == f"failed: {out} is damaged: make it whole again with {remedy}\n"
    assert damaged.stdout.splitlines() == [
        f"damaged: {out}/dropped.csv: differs from its checksum",
        f"damaged: {out}/train/part_2: row {ids[0]} of data.arrow: its audio differs from its checksum",
        f"damaged: {out}/train/part_2: row {ids[1]} of data.arrow: its audio differs from its checksum",
        f"damaged: {out}/train/part_3: part.json differs from its checksum",
        f"damaged: {out}/dev/part_1: row {ids[2]} of data.arrow: its audio differs from its checksum",
    ]
    assert snapshot(out) == before, "reading changes nothing"


def test_the_command_that_damage_names_makes_the_damaged_parts_alone(three_parts, capsys):
    corpus, out = three_parts
    whole, kept = files(out), snapshot(out)
    row = flip_audio(out, "train/part_2", 3)
    with pytest.raises(UsageError, match=f"train/part_2 is damaged .row {row} of data.arrow") as error:
        list(map(ShardDataset(out / "train").__getitem__, range(30)))
    flags = str(error.value).partition("make it again with python prepare.py ")[2].split()
    capsys.readouterr()
    run(corpus, out, chunk_size=10)
    assert "every part is there already" in capsys.readouterr().out, "audio is not read without --verify"
    prepare(parse_arguments(PrepareConfig, [*flags, "--num_workers", "1"], ""))
    assert f"damaged, will be made again: {out}/train/part_2: row {row} of data.arrow" in capsys.readouterr().out
    assert files(out) == whole
    untouched = [path for path in kept if "/part_" in path and "/train/part_2/" not in path]
    assert {path: snapshot(out)[path] for path in untouched} == {path: kept[path] for path in untouched}
    integrity.verify(out)


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "train/part_2/data.arrow").write_bytes(b""),
        lambda out: (out / "train/part_2/data.arrow").unlink(),
        lambda out: (out / "train/part_2/part.json").write_text("{"),
        lambda out: flip(out / "train/part_2/part.json", 40),
        lambda out: flip(
            out / "train/part_2/data.arrow", (out / "train/part_2/data.arrow").read_bytes().index(b"text 12")
        ),
        lambda out: (out / "prepare.json").write_text("{"),
        lambda out: flip(out / "prepare.json", 60),
        lambda out: (out / "dropped.csv").unlink(),
    ],
)
def test_damage_that_shows_without_reading_audio_is_mended_by_the_same_command(three_parts, damage):
    corpus, out = three_parts
    whole = files(out)
    damage(out)
    assert files(out) != whole
    with pytest.raises(RunFailed, match=r"is damaged: make it whole again with python prepare\.py --corpus"):
        integrity.verify(out)
    run(corpus, out, chunk_size=10)
    assert files(out) == whole


def test_verify_needs_a_prepared_folder_of_this_version(tmp_path, three_parts):
    _, out = three_parts
    with pytest.raises(UsageError, match="elsewhere holds no prepared data"):
        integrity.verify(tmp_path / "elsewhere")
    shutil.rmtree(out / "dev/part_1")
    with pytest.raises(RunFailed, match="is damaged"):
        integrity.verify(out)
    facts = json.loads((out / "prepare.json").read_text()) | {"schema_version": 3}
    (out / "prepare.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"another version \(prepare.json has schema 3, this version reads 4\)"):
        integrity.verify(out)


def test_a_repeated_id_is_found_across_parts_and_after_a_resume(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 4}, ("train0.wav,again,s0,train,",))
    out = tmp_path / "out"
    run(corpus, out, chunk_size=2)
    assert dropped(out) == [("train", "train0.wav", "duplicate_id")]
    before = checksums(out)
    shutil.rmtree(out / "train/part_3")
    run(corpus, out, chunk_size=2)
    assert checksums(out) == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--corpus", "absent", "--data_dir", "out"], 2, "error: --corpus absent does not exist"),
        (["--corpus", "corpus", "--data_dir", "out", "--chunk_sise", "3"], 2, "chunk_size"),
        (["--data_dir", "out"], 2, "--corpus is missing"),
    ],
)
def test_command_says_one_line_and_a_status(tmp_path, arguments, status, message):
    command = [sys.executable, str(REPOSITORY / "prepare.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_command_prints_a_summary(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 4}, ("gone.wav,x,s0,train,",))
    command = [sys.executable, str(REPOSITORY / "prepare.py"), "--corpus", str(corpus), "--data_dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: the dev split is empty" in done.stdout
    assert "0-1 s" in done.stdout and "#" in done.stdout
    assert "1 rows left out" in done.stdout and "missing (no such file)" in done.stdout


def test_the_main_process_and_the_caller_stay_light(tmp_path):
    """Importing prepare.py loads no torch, and the workers never import the command that started them."""
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys\n"
        "print('imported', __name__, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    from prepare import PrepareConfig, prepare\n"
        "    prepare(PrepareConfig(corpus=sys.argv[1], data_dir=sys.argv[2], num_workers=1))\n"
        "    print('torch' in sys.modules)\n"
    )
    corpus = write_corpus(tmp_path / "corpus", {"train": 4})
    done = subprocess.run(
        [sys.executable, str(script), str(corpus), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("imported") == 1
    assert done.stdout.rstrip().endswith("False")


CV_HEADER = "client_id\tpath\tsentence\n"


def write_validated_corpus(folder: Path) -> Path:
    """Common Voice: 12 validated rows, every third with a sentence of dev or a speaker of test."""
    (folder / "clips").mkdir(parents=True)
    tables: dict[str, list[str]] = {"validated": [], "dev": [], "test": []}
    for table, count in (("validated", 12), ("dev", 3), ("test", 3)):
        for clip in range(count):
            soundfile.write(folder / "clips" / f"{table}{clip}.wav", np.full(100 + clip, 0.1), 16_000)
            speaker = f"test{clip}" if table == "validated" and clip % 6 == 0 else f"{table}{clip}"
            sentence = f"Dev, {clip % 2}!" if table == "validated" and clip % 6 == 3 else f"{table} {clip}"
            tables[table].append(f"{speaker}\t{table}{clip}.wav\t{sentence}\n")
    for table, rows in tables.items():
        (folder / f"{table}.tsv").write_text(CV_HEADER + "".join(rows))
    return folder


def test_rows_are_judged_once_however_often_they_are_read(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(corpora, "sentence_key", lambda text: calls.append(text) or sentence_key(text))
    monkeypatch.setattr(splits, "sentence_key", lambda text: calls.append(text) or sentence_key(text))
    validated, out = write_validated_corpus(tmp_path / "cv"), tmp_path / "out"
    run(validated, out, train_split="validated", chunk_size=5)
    assert len(calls) == 3 + 3 + 12, "dev, test and validated in the first pass"
    assert Counter(reason for _, _, reason in dropped(out)) == {"held_out_sentence": 2, "held_out_speaker": 1}
    before = checksums(out)
    shutil.rmtree(out / "train/part_1")
    run(validated, out, train_split="validated", chunk_size=5)
    assert checksums(out) == before
    calls.clear()
    run(write_corpus(tmp_path / "corpus", {"train": 20}), tmp_path / "divided", split_by="sentence", chunk_size=5)
    assert len(calls) == 2 * 20, "once to divide, once to scan"


def test_a_corpus_that_changes_meanwhile_stops_the_run(tmp_path, monkeypatch):
    corpus, out = write_corpus(tmp_path / "corpus", {"train": 6, "dev": 2}), tmp_path / "out"
    scan = prepare_module._scan

    def edit_after_scan(*arguments):
        found = scan(*arguments)
        with (corpus / "manifest.csv").open("a") as file:
            file.write("train0.wav,more,s0,train,\n")
        return found

    monkeypatch.setattr(prepare_module, "_scan", edit_after_scan)
    with pytest.raises(RunFailed, match="changed while they were read: run the same command again"):
        run(corpus, out)
    monkeypatch.undo()
    run(corpus, out)


def test_reading_and_checking_show_how_far_they_are(tmp_path, monkeypatch, capsys):
    corpus, out = write_corpus(tmp_path / "corpus", {"train": 6, "dev": 2}), tmp_path / "out"
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    monkeypatch.setattr(prepare_module, "ROWS_PER_ADVANCE", 4)
    run(corpus, out, chunk_size=2)
    said = capsys.readouterr().err
    assert "reading rows, pass 1: 4/9 (44%)" in said, "lines of the file, its header included"
    assert "reading rows, pass 2: 8/8 (100%)" in said and " rows/s" in said
    assert "checking" not in said
    for name in ("train/part_1", "train/part_3"):
        shutil.rmtree(out / name)
    run(corpus, out, chunk_size=2)
    said = capsys.readouterr().err
    assert "checking finished parts: 6/6 (100%)" in said, "two parts of train and one of dev"
    assert "passing over train/part_2: 2/2 (100%)" in said


@pytest.mark.parametrize(
    ("text", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"a\r\nb\r\n", 2), (b"x\n" * 600_001, 600_001)]
)
def test_lines_are_counted_over_all_files_and_missing_ones_left_to_the_reader(tmp_path, text, lines):
    files = [tmp_path / name for name in ("a.csv", "b.csv", "gone.csv")]
    for path in files[:2]:
        path.write_bytes(text)
    corpus = corpora.Corpus("manifest", tmp_path, lambda: iter(()), files=lambda: files)
    assert corpus.count_lines() == 2 * lines
    before = corpus.state()
    assert corpus.state() == before
    files[2].write_bytes(b"")
    assert corpus.state() != before


def test_every_layout_names_its_files(tmp_path):
    chapter = tmp_path / "libri/train-clean/1/2"
    chapter.mkdir(parents=True)
    (chapter / "1-2.trans.txt").write_text("1-2-0 A\n1-2-1 B\n")
    assert corpora.open_corpus(tmp_path / "libri").count_lines() == 2
    validated = corpora.open_corpus(write_validated_corpus(tmp_path / "cv"), "validated")
    assert sorted(path.name for path in validated.files()) == ["dev.tsv", "test.tsv", "validated.tsv"]
    assert corpora.open_corpus(write_corpus(tmp_path / "table", {"train": 4})).count_lines() == 5


# --- real corpora


def test_real_yoruba_mp3(tmp_path):
    if not (CORPORA / "yo").is_dir():
        pytest.skip(f"no real corpus at {CORPORA / 'yo'}")
    corpus = tmp_path / "yo"
    (corpus / "clips").mkdir(parents=True)
    for split, count in (("train", 6), ("dev", 2), ("test", 2)):
        lines = (CORPORA / "yo" / f"{split}.tsv").read_text().splitlines(keepends=True)[: count + 1]
        (corpus / f"{split}.tsv").write_text("".join(lines))
        for line in lines[1:]:
            name = line.split("\t")[1]
            shutil.copy(CORPORA / "yo" / "clips" / name, corpus / "clips" / name)
    run(corpus, tmp_path / "out", num_workers=2)
    rows = table(tmp_path / "out", "train").to_pylist()
    assert len(rows) == 6 and dropped(tmp_path / "out") == []
    assert rows[0]["text"] == "itumo eyi nipe ki a to bẹrẹ si ra ounjẹ latokere a nri ounjẹ ilẹ wa jẹ"
    assert {row["source_rate_hz"] for row in rows} == {32_000}
    for row in rows:
        seconds = soundfile.info(corpus / "clips" / row["path"]).duration
        assert row["num_samples"] / 16_000 == pytest.approx(seconds, abs=1e-3)
        assert 0.05 < row["peak"] <= 1.0 and 300 < row["bandwidth_hz"] < 8_000 and 15 < row["snr_db"] < 60


def test_real_digits(tmp_path):
    if not (CORPORA / "digits").is_dir():
        pytest.skip(f"no real corpus at {CORPORA / 'digits'}")
    lines = (CORPORA / "digits" / "manifest.csv").read_text().splitlines()
    (tmp_path / "manifest.csv").write_text("\n".join([lines[0], *lines[1::20]]))
    settings = {"test_speakers": ["theo"], "audio_root": str(CORPORA / "digits")}
    run(tmp_path / "manifest.csv", tmp_path / "out", **settings)
    assert set(table(tmp_path / "out", "test").column("speaker").to_pylist()) == {"theo"}
    assert "theo" not in table(tmp_path / "out", "train").column("speaker").to_pylist()
    facts = json.loads((tmp_path / "out/prepare.json").read_text())["splits"]
    assert sum(split["rows"] for split in facts.values()) == 100


# ---------------------------------------------------------------------------------------------------------------------
# Speech without text


def write_recordings(folder: Path, seconds: dict[str, float]) -> Path:
    """Noise with pauses at 8 kHz, one file for each path."""
    rng = np.random.default_rng(0)
    for name, duration in seconds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        samples = rng.normal(0, 0.05, round(duration * 8_000))
        soundfile.write(folder / name, samples * (np.arange(len(samples)) % 8_000 < 6_000), 8_000)
    return folder


def all_rows(out: Path) -> dict[str, list[dict]]:
    found = {}
    for split in ("train", "dev", "test"):
        parts = len(list((out / split).glob("part_*")))
        found[split] = [row for part in range(1, parts + 1) for row in table(out, split, part).to_pylist()]
    return found


RECORDINGS = {"ann/a.wav": 25.3, "ann/b.wav": 1.5, "ben/c.wav": 3.0, "ben/deep/d.flac": 41.0, "e.wav": 2.0}


def test_untranscribed_folder_is_prepared_whole(tmp_path, capsys):
    corpus = write_recordings(tmp_path / "radio", RECORDINGS)
    (corpus / "broken.wav").write_bytes(b"RIFF, but no more")
    out = tmp_path / "out"
    run(corpus, out, untranscribed=True, segment_seconds=10.0, dev_fraction=0.25, chunk_size=4)
    rows = all_rows(out)
    assert all(row["text"] == "" for split in rows.values() for row in split)
    seconds: Counter[str] = Counter()
    for row in itertools.chain(*rows.values()):
        assert row["num_samples"] <= 160_000
        seconds[row["id"].partition("#")[0]] += row["num_samples"] / 16_000
        assert row["speaker"] == ("ann" if "ann" in row["id"] else "ben" if "ben" in row["id"] else "")
    assert seconds == pytest.approx(RECORDINGS, abs=1e-3), "every second of every recording, once"
    assert dropped(out) == [("train", "broken.wav", "undecodable")]
    recordings = [{row["id"].partition("#")[0] for row in rows[split]} for split in ("train", "dev")]
    assert not recordings[0] & recordings[1] and recordings[1], "no recording is in both"
    assert not rows["test"]
    said = capsys.readouterr().out
    assert "recordings of over 10 s become pieces" in said
    assert "divided by recording (6 in all)" in said
    assert "nothing to test on" not in said
    assert json.loads((out / "prepare.json").read_text())["settings"]["untranscribed"] is True


def test_untranscribed_preparation_goes_on_and_its_command_repeats_it(tmp_path):
    corpus = write_recordings(tmp_path / "radio", RECORDINGS)
    out = tmp_path / "out"
    settings = {"untranscribed": True, "segment_seconds": 10.0, "chunk_size": 3}
    run(corpus, out, **settings)
    before = files(out)
    shutil.rmtree(out / "train" / "part_2")
    (out / "prepare.json").unlink()
    run(corpus, out, num_workers=2, **settings)
    assert files(out) == before
    with pytest.raises(UsageError, match=r"prepared with other settings: segment_seconds 10.0 \(now 20.0\)"):
        run(corpus, out, **settings | {"segment_seconds": None})
    flags = json.loads((out / "prepare.json").read_text())["flags"]
    config = parse_arguments(PrepareConfig, [*flags, "--data_dir", str(out)], "")
    assert (config.untranscribed, config.segment_seconds, config.chunk_size) == (True, 10.0, 3)


def test_untranscribed_preparation_killed_and_started_again(tmp_path):
    """SIGKILL in the third part, in the midst of a recording's pieces."""
    corpus = write_recordings(tmp_path / "radio", RECORDINGS)
    settings = {"untranscribed": True, "segment_seconds": 5.0}
    run(corpus, tmp_path / "whole", chunk_size=4, **settings)
    script = KILLED_AT.replace("num_workers=1", "num_workers=1, untranscribed=True, segment_seconds=5.0")
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path / "out"), "10"]
    killed = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in sorted((tmp_path / "out").glob("train/*"))] == [".part_3.tmp", "part_1", "part_2"]
    run(corpus, tmp_path / "out", chunk_size=4, **settings)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_one_long_recording_is_divided_by_its_pieces(tmp_path):
    corpus = write_recordings(tmp_path / "radio", {"day.wav": 95.0})
    run(corpus, tmp_path / "out", untranscribed=True, segment_seconds=5.0)
    rows = all_rows(tmp_path / "out")
    assert len(rows["dev"]) == 1 and len(rows["train"]) > 18
    run(corpus, tmp_path / "all", untranscribed=True, segment_seconds=5.0, dev_fraction=0.0)
    rows = all_rows(tmp_path / "all")
    assert not rows["dev"]
    assert [row["id"] for row in rows["train"]] == [f"day.wav#{number + 1:04d}" for number in range(len(rows["train"]))]


def test_a_recording_that_is_most_of_a_corpus_is_not_held_out_whole(tmp_path, capsys):
    seconds = {"short.wav": 2.0, "long.wav": 200.0, "longer.wav": 240.0}
    corpus = write_recordings(tmp_path / "radio", seconds)
    for seed in range(4):  # one of which would hold out each of them
        out = tmp_path / f"out{seed}"
        run(corpus, out, untranscribed=True, segment_seconds=5.0, dev_fraction=0.02, seed=seed)
        rows = all_rows(out)
        assert 1 <= len(rows["dev"]) <= 0.04 * len(rows["train"])
    said = capsys.readouterr().out
    assert "divided by recording" in said and "divided by utterance" in said


def test_own_dev_and_test_of_a_corpus_stay_out_of_untranscribed_training(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", {"train": 7, "dev": 2, "test": 1})
    run(corpus, tmp_path / "out", untranscribed=True)
    rows = all_rows(tmp_path / "out")
    assert {split: len(of_split) for split, of_split in rows.items()} == {"train": 7, "dev": 2, "test": 1}
    assert all(row["text"] == "" for split in rows.values() for row in split)
    assert "the corpus's own dev (2 rows) and test (1 rows) stay out of training" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"prepared with other settings: .*untranscribed True \(now None\)"):
        run(corpus, tmp_path / "out")


def test_segments_of_a_manifest_are_cut_too(tmp_path):
    corpus = write_recordings(tmp_path / "corpus", {"a.wav": 40.0})
    (corpus / "manifest.csv").write_text("path,offset,duration\na.wav,2,30\na.wav,33,5\n")
    run(corpus, tmp_path / "out", untranscribed=True, dev_fraction=0.0)
    rows = all_rows(tmp_path / "out")["train"]
    assert [row["id"] for row in rows] == ["a.wav#2#0001", "a.wav#2#0002", "a.wav#33"]
    assert sum(row["num_samples"] for row in rows) == 35 * 16_000


def test_validated_without_text_still_leaves_out_the_sentences_of_dev_and_test(tmp_path):
    corpus = write_validated_corpus(tmp_path / "corpus")
    run(corpus, tmp_path / "with", train_split="validated")
    run(corpus, tmp_path / "without", train_split="validated", untranscribed=True)
    with_text, without = (all_rows(tmp_path / name) for name in ("with", "without"))
    for split in with_text:
        assert [row["id"] for row in without[split]] == [row["id"] for row in with_text[split]]
    assert dropped(tmp_path / "without") == dropped(tmp_path / "with")


def test_untranscribed_data_is_refused_where_texts_are_needed(tmp_path):
    corpus = write_recordings(tmp_path / "radio", {"a.wav": 2.0, "b.wav": 2.0})
    run(corpus, tmp_path / "data", untranscribed=True)
    with pytest.raises(UsageError, match="was prepared with --untranscribed and has no texts: pre-train on it"):
        integrity.require_texts([tmp_path / "data"])
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "data")
    with training() as train:
        assert train("--config", recipe, "--output_dir", tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_seconds": 5.0}, "--segment_seconds belongs to --untranscribed"),
        ({"dev_fraction": 0.1}, "--dev_fraction belongs to --untranscribed"),
        ({"untranscribed": True, "segment_seconds": 0.5}, "--segment_seconds is 0.5, it must lie in 1 .. 120"),
        ({"untranscribed": True, "dev_fraction": 1.0}, "--dev_fraction is 1.0"),
        ({"untranscribed": True, "text_column_name": "t"}, "--text_column_name does not go with --untranscribed"),
        ({"untranscribed": True, "split_by": "sentence"}, "--split_by sentence does not go"),
        ({"untranscribed": True, "split_by": "speaker", "dev_fraction": 0.1}, "--dev_fraction does not go"),
    ],
)
def test_settings_of_untranscribed_preparation(settings, message):
    (error,) = PrepareConfig(corpus="a", data_dir="b", **settings).errors()
    assert message in error
