"""Prepared sets of any size that take little room: what prepare.py writes, but for the sound.

A clip is silence of a real length with the number of its row at the end, so that no two are the same; the file has
holes where the silence is. Everything else is as large as in Common Voice: ids, sentences, the release's columns with a
speaker of 128 characters. Every checksum is right, also for `prepare.py --verify`.
"""

import functools
import hashlib
import io
import math
from pathlib import Path

import numpy as np

from audio import SAMPLE_RATE_HZ, Clip, Measures
from corpora import SourceRow
from integrity import SCHEMA_VERSION, write_sealed
from shards import PartWriter

CHUNK_SIZE = 10_000
# Common Voice English: 5.1 s on average, within 1 and 15 s; 13 characters a second.
MEAN_SECONDS, DEVIATION = 5.1, 0.35
MEAN_LOGARITHM = math.log(MEAN_SECONDS) - DEVIATION**2 / 2
SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 15.0
CHARACTERS_PER_SECOND = 13
WORDS, CLIPS_PER_SPEAKER = 20_000, 17
# Lengths come in steps: the checksum of their silence is taken once for each.
STEP_SAMPLES = SAMPLE_RATE_HZ // 100
SIGNATURE_SAMPLES = 4
DISK_BLOCK_BYTES = 4096
AGES, GENDERS = ("", "twenties", "thirties", "fifties"), ("", "female_feminine", "male_masculine")


def write_set(data_dir: Path, sizes: dict[str, int]) -> None:
    """Splits of these sizes, as prepare.py lays them out; those not named are empty."""
    for split, size in sizes.items():
        for number, first in enumerate(range(0, size, CHUNK_SIZE), 1):
            write_part(data_dir / split / f"part_{number}", split, range(first, min(first + CHUNK_SIZE, size)))
    write_mark(data_dir, {split: -(-size // CHUNK_SIZE) for split, size in sizes.items()})


def write_mark(data_dir: Path, parts: dict[str, int]) -> None:
    """`prepare.json` of a finished set with so many parts per split, and an empty dropped.csv."""
    (data_dir / "dropped.csv").write_bytes(b"split,id,reason,detail\n")
    facts = {
        "schema_version": SCHEMA_VERSION,
        "flags": [],
        "dropped_sha256": hashlib.sha256((data_dir / "dropped.csv").read_bytes()).hexdigest(),
        "splits": {split: {"parts": parts.get(split, 0)} for split in ("train", "dev", "test")},
    }
    write_sealed(data_dir / "prepare.json", facts)


def write_part(folder: Path, split: str, rows: range) -> None:
    """One part, the same for the same split and rows."""
    folder.mkdir(parents=True)
    # Sentences and voices of the splits are their own, but for what chance shares.
    rng = np.random.default_rng([("train", "dev", "test").index(split), rows.start])
    with (folder / "data.arrow").open("wb") as file:
        sparse = _SparseFile(file)
        writer = PartWriter(sparse, list(_metadata(0, rng)))
        for row in rows:
            writer.add(*_utterance(split, row, rng))
        facts = writer.finish()
        sparse.finish()
    write_sealed(folder / "part.json", facts | {"schema_version": SCHEMA_VERSION, "dropped": []})


def _utterance(split: str, row: int, rng: np.random.Generator) -> tuple[SourceRow, Clip]:
    seconds = min(max(rng.lognormal(MEAN_LOGARITHM, DEVIATION), SHORTEST_SECONDS), LONGEST_SECONDS)
    samples, digest = _clip(int(seconds * SAMPLE_RATE_HZ) // STEP_SAMPLES * STEP_SAMPLES, split, row)
    loudness, silence, band, snr = rng.random(4)
    measures = Measures(
        peak=0.1 + 0.8 * loudness,
        rms=0.02 + 0.08 * loudness,
        dc_offset=0.0,
        clipping_fraction=0.0,
        silence_fraction=silence / 5,
        leading_silence_seconds=silence / 10,
        trailing_silence_seconds=silence / 10,
        bandwidth_hz=3_000 + 3_000 * band,
        highest_frequency_hz=6_600 + 1_400 * band,
        snr_db=5 + 40 * snr,
    )
    speaker = hashlib.sha512(f"{split} {row // CLIPS_PER_SPEAKER}".encode()).hexdigest()
    source = SourceRow(
        f"common_voice_en_{split}_{row:08d}.mp3", split, "", _sentence(seconds, rng), speaker, _metadata(row, rng)
    )
    return source, Clip(samples, measures, 32_000, digest)


def _metadata(row: int, rng: np.random.Generator) -> dict[str, str]:
    """The release's columns beside path, sentence and speaker."""
    age, gender = rng.integers(len(AGES)), rng.integers(len(GENDERS))
    return {
        "sentence_id": hashlib.sha256(f"{row}".encode()).hexdigest(),
        "sentence_domain": "",
        "up_votes": "2",
        "down_votes": "0",
        "age": AGES[age],
        "gender": GENDERS[gender],
        "accents": "",
        "variant": "",
        "locale": "en",
        "segment": "",
    }


def _sentence(seconds: float, rng: np.random.Generator) -> str:
    """About as many characters as are spoken in the time, as a transcriber writes them."""
    wanted = int(seconds * CHARACTERS_PER_SECOND)
    text = " ".join(_words()[index] for index in rng.integers(WORDS, size=wanted // 5 + 1).tolist())
    return text[:wanted].strip().capitalize() + "."


@functools.cache
def _words() -> list[str]:
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmwfgypbvk"))
    return ["".join(rng.choice(letters, rng.integers(1, 10))) for _ in range(WORDS)]


def _clip(num_samples: int, split: str, row: int) -> tuple[np.ndarray, str]:
    """Silence [S] that ends with what no other row has, and its checksum."""
    signature = hashlib.sha256(f"{split} {row}".encode()).digest()[: 2 * SIGNATURE_SAMPLES]
    samples = np.zeros(num_samples, np.int16)
    samples[-SIGNATURE_SAMPLES:] = np.frombuffer(signature, np.int16)
    digest = _hashed_silence(num_samples - SIGNATURE_SAMPLES).copy()
    digest.update(signature)
    return samples, digest.hexdigest()


@functools.cache
def _hashed_silence(num_samples: int) -> "hashlib._Hash":
    return hashlib.sha256(bytes(2 * num_samples))


class _SparseFile(io.RawIOBase):
    """Leaves a hole for every block of zeros that it is given."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2 * DISK_BLOCK_BYTES:
            return self._file.write(view)
        start = -self._file.tell() % DISK_BLOCK_BYTES  # to the next block of the disk
        whole = (len(view) - start) // DISK_BLOCK_BYTES
        is_used = np.frombuffer(view, np.uint8, whole * DISK_BLOCK_BYTES, start).reshape(whole, -1).any(axis=1)
        self._file.write(view[:start])
        first = self._file.tell()
        for block in np.flatnonzero(is_used).tolist():
            begin = start + block * DISK_BLOCK_BYTES
            self._file.seek(first + block * DISK_BLOCK_BYTES)
            self._file.write(view[begin : begin + DISK_BLOCK_BYTES])
        self._file.seek(first + whole * DISK_BLOCK_BYTES)
        self._file.write(view[start + whole * DISK_BLOCK_BYTES :])
        return len(view)

    def finish(self) -> None:
        """Also where the file ends with a hole, it is as long as what was written."""
        self._file.flush()
        self._file.truncate(self._file.tell())
