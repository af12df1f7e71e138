"""Bad input in one table: what a user gets for every file, path, text and table that goes wrong in the field.

Outcomes: "trained" (prepared, and training takes it), "left out: REASON" (prepared, training does not take it),
"dropped: REASON" (a line of dropped.csv), "scored" (a dev row that is kept); a whole corpus may be refused in one line.
Many rows share a corpus, since starting the decoding processes takes longer than all of the clips.
"""

import csv
import io
import json
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from transformers import Wav2Vec2Config

from cache import FactCache
from config import PrepareConfig, TrainConfig
from corpora import DROP_REASONS
from data import ShardDataset
from errors import exit_status
from overlap import find_overlap
from prepare import prepare
from selection import Selection, select_training_rows
from text import LARGE_960H_VOCABULARY, TextNormalizer, Vocabulary
from transcripts import measure_texts

# Frames of 20 ms, 320 samples each.
ENCODER = Wav2Vec2Config(
    conv_dim=[32, 32], conv_kernel=[20, 16], conv_stride=[20, 16], mask_time_prob=0.05, mask_time_length=10
)
VOCABULARY = Vocabulary(LARGE_960H_VOCABULARY)
NORMALIZER = TextNormalizer(',?.!-;:"', "upper")
RATE = 16_000
TEXT = "hello world"
TONE = (0.4 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
NUM_GOOD = 80  # more than half of the first clips must be usable

Files = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A row of a corpus: how its files are made, what differs from a good row, what comes of it."""

    outcome: str
    row: dict | bytes = field(default_factory=dict)
    files: Files = lambda folder: None
    settings: dict = field(default_factory=dict)
    """Settings of train.py that differ."""
    expected: Callable[["Prepared", int], bool] = lambda prepared, row: True
    """Looks at a row that was prepared."""
    detail: str = ""
    """Part of what dropped.csv or the drop list says."""


@dataclass
class Prepared:
    """A corpus after prepare.py."""

    out: Path

    @cached_property
    def dropped(self) -> dict[str, tuple[str, str]]:
        with (self.out / "dropped.csv").open(newline="", encoding="utf-8") as file:
            return {row["id"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}

    @cached_property
    def train(self) -> ShardDataset:
        return ShardDataset(self.out / "train")

    @cached_property
    def rows(self) -> list[dict]:
        parts = sorted((self.out / "train").iterdir())
        tables = [pa.ipc.open_file(pa.memory_map(str(part / "data.arrow"))).read_all() for part in parts]
        return pa.concat_tables(tables).drop_columns(["audio"]).to_pylist()

    @cached_property
    def dev_ids(self) -> list[str]:
        return list(ShardDataset(self.out / "dev").column("id"))

    def select(self, settings: dict) -> Selection:
        texts = measure_texts(self.train, NORMALIZER, VOCABULARY, FactCache(self.train.folder.parent))
        return select_training_rows(
            self.train, TrainConfig(**settings), texts, find_overlap({"train": self.train}), ENCODER
        )

    def outcome(self, row_id: str, settings: dict) -> tuple[str, str, int | None]:
        """Outcome, detail, and the row where it was prepared."""
        if row_id in self.dropped:
            reason, detail = self.dropped[row_id]
            return f"dropped: {reason}", detail, None
        if row_id in self.dev_ids:
            return "scored", "", None
        row = next(number for number, found in enumerate(self.rows) if found["id"] == row_id)
        for dropped_row, reason, detail in self.select(settings).dropped:
            if dropped_row == row:
                return f"left out: {reason}", detail, row
        return "trained", "", row


def check(prepared: Prepared, row_id: str, case: Case) -> None:
    outcome, detail, row = prepared.outcome(row_id, case.settings)
    assert outcome == case.outcome, detail
    assert case.detail in detail and "\n" not in detail
    assert outcome in ("trained", "scored") or detail
    if outcome.startswith("dropped"):
        assert outcome.removeprefix("dropped: ") in DROP_REASONS
    if row is not None:
        assert case.expected(prepared, row), prepared.rows[row]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def sound(name: str, samples: np.ndarray = TONE, rate: int = RATE, **options: str) -> Files:
    """Write samples under a name whose suffix may lie about the format."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held = io.BytesIO()
        soundfile.write(held, samples, rate, **({"format": "WAV"} | options))
        path.write_bytes(held.getvalue())

    return write


def content(name: str, data: bytes) -> Files:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, keep: float, **options: str) -> Files:
    """The first part of a file of ten seconds."""

    def write(folder: Path) -> None:
        noise = np.random.default_rng(0).standard_normal(10 * RATE) * 0.1
        sound(name, noise, **options)(folder)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * keep)])

    return write


def patched(name: str, place: int, value: int) -> Files:
    """A WAV file with another 32-bit number in its header."""

    def write(folder: Path) -> None:
        sound(name)(folder)
        data = bytearray((folder / name).read_bytes())
        data[place : place + 4] = struct.pack("<I", value)
        (folder / name).write_bytes(data)

    return write


def long_file(name: str, seconds: int) -> Files:
    """8 bits at 16 kHz: half an hour is 29 MB and needs no resampling."""
    return sound(name, np.tile(TONE, seconds), subtype="PCM_U8")


def link(name: str, target: str) -> Files:
    return lambda folder: (folder / name).symlink_to(target)


def is_tone(tolerance: float = 2 / 32_768, scale: float = 1.0) -> Callable[[Prepared, int], bool]:
    """The samples are those of TONE."""
    return lambda prepared, row: (
        len(prepared.train[row].audio) == RATE
        and bool(np.abs(prepared.train[row].audio / 32_768 - scale * TONE).max() <= tolerance)
    )


def lasts(seconds: float) -> Callable[[Prepared, int], bool]:
    return lambda prepared, row: math.isclose(len(prepared.train[row].audio) / RATE, seconds, abs_tol=0.15)


def has(**values: object) -> Callable[[Prepared, int], bool]:
    """Columns have these values (numbers nearly)."""
    return lambda prepared, row: all(prepared.rows[row][name] == value for name, value in values.items())


def learns(text: str) -> Callable[[Prepared, int], bool]:
    """What the model is taught, <unk> as the vocabulary writes it."""
    return lambda prepared, row: (
        VOCABULARY.decode_labels(VOCABULARY.encode(NORMALIZER(prepared.train[row].text))) == text
    )


def file_case(outcome: str, name: str, files: Files | None = None, **options: object) -> Case:
    return Case(outcome, {"path": name}, files or sound(name), **options)


def text_case(outcome: str, text: str | None, **options: object) -> Case:
    return Case(outcome, {"text": text}, **options)


EIGHT_CHANNELS = np.stack([TONE * share for share in (1, 0, 1, 0, 1, 0, 1, 0)], axis=1)
NOT_FINITE = TONE.copy()
NOT_FINITE[100] = np.nan
INFINITE = TONE.copy()
INFINITE[100] = -np.inf
LOUD = np.clip(TONE * 8, -1, 1)

MANIFEST: dict[str, Case] = {
    # --- audio files that cannot be used
    "truncated MP3": file_case(
        "dropped: undecodable", "cut.mp3", cut("cut.mp3", 0.5, format="MP3"), detail="breaks off"
    ),
    "truncated FLAC": file_case("dropped: undecodable", "cut.flac", cut("cut.flac", 0.5, format="FLAC")),
    "truncated WAV": file_case("dropped: undecodable", "cut.wav", cut("cut.wav", 0.5), detail="breaks off"),
    "WAV header alone": file_case("dropped: empty", "header.wav", cut("header.wav", 44 / 320_044)),
    "text named .mp3": file_case("dropped: undecodable", "text.mp3", content("text.mp3", b"not a sound\n" * 99)),
    "HTML error page named .wav": file_case("dropped: undecodable", "404.wav", content("404.wav", b"<html>404</html>")),
    "zero bytes": file_case("dropped: undecodable", "zero.wav", content("zero.wav", b"")),
    "random bytes named .flac": file_case(
        "dropped: undecodable", "r.flac", content("r.flac", np.random.default_rng(0).bytes(5_000))
    ),
    "headerless .raw": file_case("dropped: undecodable", "h.raw", content("h.raw", b"\0\1" * 5_000)),
    "no samples": file_case("dropped: empty", "none.wav", sound("none.wav", TONE[:0])),
    "NaN samples": file_case("dropped: not_finite", "nan.wav", sound("nan.wav", NOT_FINITE, subtype="FLOAT")),
    "infinite samples": file_case("dropped: not_finite", "inf.wav", sound("inf.wav", INFINITE, subtype="DOUBLE")),
    "sample rate 0": file_case("dropped: undecodable", "rate0.wav", patched("rate0.wav", 24, 0)),
    "sample rate of 4 GHz": file_case("dropped: undecodable", "rate4.wav", patched("rate4.wav", 24, 2**32 - 1)),
    "odd rate": file_case("dropped: undecodable", "odd.wav", sound("odd.wav", TONE, 44_101), detail="44101 Hz"),
    "31 minutes": file_case("dropped: too_long", "31min.wav", long_file("31min.wav", 31 * 60), detail="1800 s"),
    # --- audio files that look odd and are read
    "24 bit": file_case("trained", "24.wav", sound("24.wav", subtype="PCM_24"), expected=is_tone()),
    "64-bit float": file_case("trained", "64.wav", sound("64.wav", subtype="DOUBLE"), expected=is_tone()),
    "8 bit": file_case("trained", "8.wav", sound("8.wav", subtype="PCM_U8"), expected=is_tone(1 / 64)),
    "mu-law": file_case("trained", "mu.wav", sound("mu.wav", subtype="ULAW"), expected=is_tone(0.02)),
    "float beyond full scale": file_case(
        "trained", "over.wav", sound("over.wav", TONE * 8, subtype="FLOAT"), expected=has(peak=1.0)
    ),
    "8 channels": file_case("trained", "8ch.wav", sound("8ch.wav", EIGHT_CHANNELS), expected=is_tone(scale=0.5)),
    "192 kHz": file_case(
        "trained",
        "192.wav",
        sound("192.wav", np.repeat(TONE, 12), 192_000),
        expected=lambda prepared, row: lasts(1.0)(prepared, row) and has(source_rate_hz=192_000)(prepared, row),
    ),
    "WAV named .mp3": file_case("trained", "really_wav.mp3", expected=is_tone()),
    "FLAC named .wav": file_case(
        "trained", "flac.wav", sound("flac.wav", format="FLAC", subtype="PCM_16"), expected=is_tone()
    ),
    "MP3 named .wav": file_case("trained", "mp3.wav", sound("mp3.wav", format="MP3"), expected=lasts(1.0)),
    "no suffix": file_case("trained", "clip", expected=is_tone()),
    "upper-case suffix": file_case("trained", "UPPER.WAV", expected=is_tone()),
    "spaces and quotes in the name": file_case("trained", "a 'b' \"c\" .wav", expected=is_tone()),
    "Unicode in the name": file_case("trained", "\u1ecdr\u1ecd/\u65e5\u672c\u8a9e \U0001f600.wav", expected=is_tone()),
    "line feed in the name": file_case("trained", "two\nlines.wav", expected=is_tone()),
    "name that looks like a flag": file_case("trained", "--corpus.wav", expected=is_tone()),
    # --- clips of odd lengths and sounds
    "0.01 s": file_case("left out: too_short", "10ms.wav", sound("10ms.wav", TONE[:160]), detail="0.010 s of at least"),
    "one sample": file_case("left out: too_short", "1.wav", sound("1.wav", TONE[1:2])),
    "shorter than one frame": file_case(
        "left out: more_labels_than_frames",
        "short.wav",
        sound("short.wav", TONE[:319]),
        settings={"min_duration_in_seconds": 0.0},
        detail="0 frames",
    ),
    "30 minutes": file_case(
        "left out: too_long", "30min.wav", long_file("30min.wav", 30 * 60), detail="1800.000 s of at most"
    ),
    "silent": file_case("trained", "silent.wav", sound("silent.wav", TONE * 0), expected=has(rms=0.0, peak=0.0)),
    "constant": file_case("trained", "dc.wav", sound("dc.wav", TONE * 0 + 0.5), expected=has(rms=0.0, dc_offset=0.5)),
    "clipped": file_case(
        "trained",
        "clipped.wav",
        sound("clipped.wav", LOUD),
        expected=lambda prepared, row: prepared.rows[row]["clipping_fraction"] > 0.5,
    ),
    "DC offset": file_case(
        "trained",
        "offset.wav",
        sound("offset.wav", TONE + 0.2),
        expected=lambda prepared, row: math.isclose(prepared.rows[row]["dc_offset"], 0.2, abs_tol=1e-3),
    ),
    # --- paths
    "missing file": Case("dropped: missing", {"path": "gone.wav"}, detail="No such file"),
    "no path": Case("dropped: missing", {"path": ""}),
    "null path": Case("dropped: missing", {"path": None}),
    "absolute path outside": Case("dropped: outside_corpus", {"path": "/etc/hostname"}),
    "path with ..": Case("dropped: outside_corpus", {"path": "../secret.wav"}, lambda f: sound("secret.wav")(f.parent)),
    "path with .. that stays inside": Case("trained", {"path": "sub/../sub/in.wav"}, sound("sub/in.wav")),
    "link out of the corpus": Case("dropped: outside_corpus", {"path": "out.wav"}, link("out.wav", "../secret.wav")),
    "folder that is a link out": Case("dropped: outside_corpus", {"path": "up/secret.wav"}, link("up", "..")),
    "link inside the corpus": Case("trained", {"path": "in.wav"}, link("in.wav", "good.wav"), expected=is_tone()),
    "broken link": Case("dropped: missing", {"path": "broken.wav"}, link("broken.wav", "nowhere.wav")),
    "link to itself": Case("dropped: missing", {"path": "loop.wav"}, link("loop.wav", "loop.wav")),
    "directory": Case("dropped: undecodable", {"path": "dir.wav"}, lambda f: (f / "dir.wav").mkdir()),
    "the corpus itself": Case("dropped: undecodable", {"path": "."}),
    "FIFO": Case("dropped: undecodable", {"path": "pipe.wav"}, lambda f: os.mkfifo(f / "pipe.wav"), detail="regular"),
    "device": Case("dropped: outside_corpus", {"path": "/dev/zero"}),
    "URL": Case("dropped: missing", {"path": "https://example.org/a.wav"}),
    "Windows path": Case("dropped: missing", {"path": "sub\\in.wav"}),
    "name of 5,000 characters": Case("dropped: missing", {"path": "a" * 5_000 + ".wav"}),
    # --- segments
    "negative offset": Case("dropped: bad_row", {"offset": -1, "duration": 0.5}, detail="offset is '-1'"),
    "negative duration": Case("dropped: bad_row", {"duration": -0.5}),
    "no duration at all": Case("dropped: bad_row", {"duration": 0}),
    "duration in words": Case("dropped: bad_row", {"duration": "one second"}),
    "NaN offset": Case("dropped: bad_row", {"offset": math.nan}),
    "offset behind the end": Case("dropped: bad_segment", {"offset": 5.0}, detail="starts at 5.0 s of 1.00 s"),
    "duration behind the end": Case("dropped: bad_segment", {"offset": 0.5, "duration": 2.0}),
    "offset beyond all numbers of samples": Case("dropped: bad_segment", {"offset": 1e308}),
    "duration beyond all numbers of samples": Case("dropped: bad_segment", {"duration": 1e308}),
    "segment as it should be": Case("trained", {"offset": 0.25, "duration": 0.5}, expected=lasts(0.5)),
    # --- texts
    "empty text": text_case("dropped: no_text", ""),
    "text of spaces": text_case("dropped: no_text", " \t\u3000 "),
    "null text": text_case("dropped: no_text", None),
    "empty text in dev": Case("scored", {"text": "", "split": "dev"}),
    "bad clip in dev": Case("dropped: undecodable", {"path": "zero.wav", "split": "dev"}),
    "too long for training in dev": Case("scored", {"path": "30min.wav", "split": "dev"}),
    "punctuation only": text_case("left out: no_labels", "?!..."),
    "zero-width characters only": text_case("left out: no_labels", "\u200b\ufeff"),
    "emoji": text_case("trained", "hi \U0001f600", expected=learns("HI <unk>")),
    "right-to-left marks": text_case("trained", "\u200fhi\u202e yo\u202c", expected=learns("HI YO")),
    "zero-width characters": text_case("trained", "h\u200bi\ufeff", expected=learns("HI")),
    "mixed scripts": text_case("trained", "hi \u043c\u0438", expected=learns("HI <unk><unk>")),
    "composed letters": text_case("trained", "caf\u00e9", expected=learns("CAF<unk>")),
    "combining letters": text_case("trained", "cafe\u0301", expected=learns("CAF<unk>")),
    "curly apostrophe": text_case("trained", "it\u2019s", expected=learns("IT'S")),
    "tab and line feed in the text": text_case("trained", "hi\tyo\nyo", expected=learns("HI YO YO")),
    "line separator in the text": text_case("trained", "hi\u2028yo", expected=learns("HI YO")),
    "a number for a text": text_case("trained", 7, expected=has(text="7")),
    "labels longer than frames": text_case(
        "left out: more_labels_than_frames", "a" * 30, detail="50 frames, 59 needed for 30 labels"
    ),
    "a million characters": text_case("left out: more_labels_than_frames", "word " * 200_000),
    # --- rows
    "line feed in the id": Case("trained", {"id": "two\nlines"}),
    "line feed in a dropped id": Case("dropped: missing", {"id": "two\nmore", "path": "gone.wav"}),
    "id used twice": Case("dropped: duplicate_id", {"id": "good 0"}),
    "broken JSON": Case("dropped: bad_row", b'{"id": "x", "path": ', detail="not valid JSON"),
    "JSON of another kind": Case("dropped: bad_row", b'["good.wav", "hello"]', detail="no JSON object"),
    "half of a surrogate pair": Case("dropped: bad_row", b'{"path": "good.wav", "text": "\\ud800", "split": "train"}'),
    "a whole surrogate pair": text_case("trained", "\U0001f600 hi", expected=learns("<unk> HI")),
    "NUL in the text": Case(
        "dropped: bad_row", b'{"path": "good.wav", "text": "hi\\u0000yo", "split": "train"}', detail="NUL"
    ),
    "NUL in the path": Case(
        "dropped: bad_row", b'{"path": "good.wav\\u0000.mp3", "text": "hi", "split": "train"}', detail="NUL"
    ),
    "NUL in a key": Case(
        "dropped: bad_row", b'{"path": "good.wav", "text": "hi", "split": "train", "a\\u0000": "b"}', detail="NUL"
    ),
    "nesting without end": Case("dropped: bad_row", b'{"text": ' + b"[" * 100_000, detail="not valid JSON"),
    "extra keys": Case("trained", {"note": {"deep": [1, None]}}, expected=has(note='{"deep": [1, null]}')),
    "key named like a column of ours": Case("trained", {"rms": "loud"}, expected=has(corpus_rms="loud")),
}


def write_manifest(folder: Path, cases: dict[str, Case]) -> dict[str, str]:
    """The corpus with every case and good rows before them; the id under which each case is found."""
    folder.mkdir()
    sound("good.wav")(folder)
    good = {"path": "good.wav", "text": TEXT, "split": "train"}
    lines = [json.dumps(good | {"id": f"good {number}"}).encode() for number in range(NUM_GOOD)]
    ids = {}
    for name, case in cases.items():
        case.files(folder)
        if isinstance(case.row, bytes):
            lines.append(case.row)
            ids[name] = f"manifest.jsonl:{len(lines)}"
        else:
            row = good | {"id": name} | case.row
            lines.append(json.dumps(row).encode())
            ids[name] = row["id"]
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return ids


def prepared_from(corpus: Path, out: Path) -> Prepared:
    prepare(PrepareConfig(corpus=str(corpus), data_dir=str(out), num_workers=2))
    return Prepared(out)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, dict[str, str]]:
    folder = tmp_path_factory.mktemp("manifest")
    ids = write_manifest(folder / "corpus", MANIFEST)
    return prepared_from(folder / "corpus", folder / "out"), ids


@pytest.mark.parametrize("name", MANIFEST)
def test_row_of_a_manifest(manifest: tuple[Prepared, dict[str, str]], name: str) -> None:
    prepared, ids = manifest
    check(prepared, ids[name], MANIFEST[name])


def test_no_row_of_the_manifest_is_lost_in_silence(manifest: tuple[Prepared, dict[str, str]]) -> None:
    prepared, _ = manifest
    with (prepared.out / "dropped.csv").open(newline="", encoding="utf-8") as file:
        num_dropped = len(list(csv.DictReader(file)))
    assert len(prepared.rows) + len(prepared.dev_ids) + num_dropped == NUM_GOOD + len(MANIFEST)


# ---------------------------------------------------------------------------------------------------------------------
# Tables: a Common Voice release (TSV, never quoted) and a CSV (quoted as usual)

GOOD_LINE = b"ann\tgood.wav\thello world\t\n"
RELEASE: dict[str, tuple[bytes, str, Case]] = {
    # name: line, id, case
    "stray quotes": (b'ann\tq.wav\t"hi "yo\t\n', "q.wav", Case("trained", expected=has(text='"hi "yo'))),
    "one tab too many": (b"ann\tt.wav\thi\tyo\t\n", "train.tsv:{line}", Case("dropped: bad_row", detail="5 columns")),
    "one column too few": (b"ann\tf.wav\n", "train.tsv:{line}", Case("dropped: bad_row", detail="2 columns")),
    "NUL": (b"ann\tn.wav\thi\0yo\t\n", "train.tsv:{line}", Case("dropped: bad_row", detail="NUL")),
    "Windows line end": (b"ann\tw.wav\thi\t\r\n", "w.wav", Case("trained", expected=has(text="hi", age=""))),
    "lone carriage return": (b"ann\tr.wav\thi\ryo\t\n", "r.wav", Case("trained", expected=learns("HI YO"))),
    "empty text": (b"ann\te.wav\t \t\n", "e.wav", Case("dropped: no_text")),
    "repeated row": (b"ann\tw.wav\thi\t\n" * 2, "w.wav", Case("trained")),
    "no speaker": (b"\ts.wav\thi\t\n", "s.wav", Case("trained", expected=has(speaker=""))),
    "form feed": (b"ann\tff.wav\thi\x0cyo\t\n", "ff.wav", Case("trained", expected=learns("HI YO"))),
    "no line end at the end": (b"ann\tz.wav\thi\t", "z.wav", Case("trained", expected=has(text="hi"))),
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, dict[str, str]]:
    """A release whose train.tsv begins with a byte order mark and holds blank lines."""
    folder = tmp_path_factory.mktemp("release") / "corpus"
    lines, ids, number = [b"\xef\xbb\xbfclient_id\tpath\tsentence\tage\n", b"\n", GOOD_LINE * 1], {}, 3
    for name, (line, row_id, _) in RELEASE.items():
        lines.append(line)
        number += 1
        ids[name] = row_id.format(line=number)
        number += line.count(b"\n") - 1
    for name in ("good", "q", "t", "f", "n", "w", "r", "e", "s", "ff", "z"):
        sound(f"clips/{name}.wav")(folder)
    (folder / "train.tsv").write_bytes(b"".join(lines))
    (folder / "dev.tsv").write_bytes(b"client_id\tpath\tsentence\tage\n" + GOOD_LINE)
    return prepared_from(folder, folder.parent / "out"), ids


@pytest.mark.parametrize("name", RELEASE)
def test_row_of_a_release(release: tuple[Prepared, dict[str, str]], name: str) -> None:
    prepared, ids = release
    case = RELEASE[name][2]
    if name in ("repeated row", "Windows line end"):
        # The first row with the id stays, each later one is dropped and named.
        assert prepared.dropped["w.wav"][0] == "duplicate_id"
        assert [row["id"] for row in prepared.rows].count("w.wav") == 1
    else:
        check(prepared, ids[name], case)


CSV_LINES = (
    b"path,text,split\n",
    b"good.wav,hello,train\n",
    b'"a,b.wav","hi, ""you""",train\n',
    b'"two\nlines.wav","hi\nyo",train\n',
    b"many.wav,hi,yo,train\n",
    b"good.wav,hello,dev\n",
)


def test_rows_of_a_csv(tmp_path: Path) -> None:
    for name in ("good.wav", "a,b.wav", "two\nlines.wav"):
        sound(name)(tmp_path / "corpus")
    (tmp_path / "corpus" / "m.csv").write_bytes(b"".join(CSV_LINES))
    prepared = prepared_from(tmp_path / "corpus", tmp_path / "out")
    check(prepared, "a,b.wav", Case("trained", expected=has(text='hi, "you"')))
    check(prepared, "two\nlines.wav", Case("trained", expected=learns("HI YO")))
    check(prepared, "m.csv:7", Case("dropped: bad_row", detail="4 columns, the header has 3"))


# ---------------------------------------------------------------------------------------------------------------------
# Corpora that are refused before anything is written

ROW = b"good.wav,hello,train\n"
REFUSED: dict[str, tuple[dict[str, bytes], str, str]] = {
    # name: files, what --corpus names below the folder, message
    "no such corpus": ({}, "absent", "absent does not exist: name a corpus folder"),
    "empty corpus": ({}, "", "holds no train.tsv .* no manifest .* name the folder that does"),
    "only audio": ({"a.wav": b"x"}, "", "holds no train.tsv"),
    "an archive": ({"cv.tar.gz": b"x"}, "cv.tar.gz", "is an archive: unpack it with `tar -xf"),
    "an audio file": ({"a.wav": b"x"}, "a.wav", "is not a manifest: .csv, .tsv, .jsonl"),
    "empty manifest": ({"m.csv": b""}, "m.csv", "is empty: a header line"),
    "header-only TSV": ({"m.tsv": b"path\ttext\tsplit\n"}, "", "the train split is empty"),
    "missing header": ({"m.csv": ROW * 3}, "m.csv", "has no column named path.*; it has good.wav, hello, train"),
    "missing text column": ({"m.csv": b"path,split\ngood.wav,train\n"}, "", "has no column named text.*--text_column"),
    "missing audio column": ({"m.csv": b"text,split\nhello,train\n"}, "", "has no column named path.*--audio_column"),
    "duplicate column": ({"m.csv": b"path,text,text\na,b,c\n"}, "", "has two columns named 'text': rename one"),
    "Latin-1": ({"m.csv": b"path,text,split\na.wav,caf\xe9,train\n"}, "", "not UTF-8: byte 0xe9 in line 2: convert"),
    "UTF-16": ({"m.csv": "path,text\n".encode("utf-16")}, "", "not UTF-8: byte 0xff in line 1.*iconv"),
    "surrogate in UTF-8": ({"m.csv": b"path,text\na.wav,\xed\xa0\x80\n"}, "", "not UTF-8: byte 0xed in line 2"),
    "quote that never ends": ({"m.csv": b'path,text,split\na.wav,"hi,train\n'}, "", "not valid CSV.*mend the quoting"),
    "unknown split": ({"m.csv": b"path,text,split\na.wav,hi,trian\n"}, "", "line 2: the split is 'trian', known are"),
    "no split at all": (
        {"m.csv": b"path,text\na.wav,hi\n"},
        "",
        "nothing says which rows are for training.*--split_by",
    ),
    "JSON list": ({"m.json": b'[{"path": "a.wav", "text": "hi"}]'}, "", "holds no JSON object: one per line"),
    "two manifests": ({"a.csv": ROW, "b.csv": ROW}, "", r"holds 2 manifests \(a.csv, b.csv\): name one"),
    "all clips missing": (
        {"m.csv": b"path,text,split\n" + b"".join(b"%d.wav,hi,train\n" % n for n in range(9))},
        "",
        "9 of the first 9 clips cannot be used, mostly missing .*--audio_root",
    ),
    "old Mac line ends": ({"m.csv": b"path,text,split\rgood.wav,hello,train\r"}, "", "m.csv"),
    "line feed in a column name": ({"m.csv": b'"pa\nth",text\na.wav,hi\n'}, "", "has no column named path"),
    "NUL in a column name": ({"m.csv": b"path,text,split,no\0te\na.wav,hi,train,x\n"}, "", "NUL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_corpus_is_refused_in_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, named, message = REFUSED[name]
    (tmp_path / "corpus").mkdir()
    for file_name, data in files.items():
        (tmp_path / "corpus" / file_name).write_bytes(data)
    refuse(tmp_path / "corpus" / named, tmp_path / "out", message, capsys)


def refuse(corpus: Path, out: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert exit_status(lambda: prepared_from(corpus, out)) == 2
    # Before it may stand how far the rows were read; a message of two lines would end without its beginning.
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: .*{message}", last), last
    assert not out.exists()


SPECIAL: dict[str, Callable[[Path], object]] = {"FIFO": os.mkfifo, "device": lambda path: path.symlink_to("/dev/null")}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["m.csv", "train.tsv"])
def test_a_table_that_is_no_file_is_refused_and_never_waited_for(
    tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    SPECIAL[kind](tmp_path / "corpus" / name)
    refuse(tmp_path / "corpus" / name, tmp_path / "out", "is neither a file nor a folder", capsys)
    refuse(tmp_path / "corpus", tmp_path / "out", "holds no train.tsv", capsys)


def test_there_are_as_many_cases_as_promised() -> None:
    assert sum(map(len, (MANIFEST, RELEASE, REFUSED))) >= 40
