"""Checksums of the prepared data: what they cover, and what to do about damage.

Every byte is under one: a row's audio under its own (`audio_sha256`), all other columns of a part under `index_sha256`,
the whole of data.arrow under `sha256`, part.json and prepare.json under a seal, dropped.csv under prepare.json's.
Training checks sizes, seals and indices when it starts and a row's audio when it is read; `prepare.py --verify` checks
all. Nothing here imports torch.
"""

import contextlib
import hashlib
import itertools
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from atomic import sync_open_file
from corpora import SPLITS
from errors import RunFailed, UsageError
from progress import Progress

SCHEMA_VERSION = 4
SEAL = "seal"
# The setting of prepare.json that marks a set without texts.
UNTRANSCRIBED = "untranscribed"
MEGABYTE = 10**6


class Damage(ValueError):
    """What is wrong with a file of the prepared data; the remedy depends on who found it."""


class OtherSchema(Damage):
    """Nothing is wrong with the file, but another version of this program wrote it."""


@contextlib.contextmanager
def refusing_other_schema(data_dir: Path) -> Iterator[None]:
    """Data of another version is not damaged, but cannot be used either."""
    try:
        yield
    except OtherSchema as schema:
        raise UsageError(
            f"{data_dir} was prepared by another version ({schema}): prepare the corpus again, into another "
            f"--data_dir, or delete {data_dir} first"
        ) from schema


def write_sealed(path: Path, facts: dict) -> None:
    """Write facts as JSON with a checksum over themselves, and wait until they are on the disk."""
    with path.open("wb") as file:
        file.write(sealed(facts).encode())
        sync_open_file(file)


def sealed(facts: dict) -> str:
    """Facts as JSON with a checksum over themselves."""
    return json.dumps(facts | {SEAL: _seal(facts)}, indent=1, ensure_ascii=False)


def read_sealed(path: Path) -> dict:
    """Facts that `sealed` made.

    Raises:
        Damage: the file is missing or not what was written, or another version wrote it.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version, seal = facts["schema_version"], facts.pop(SEAL, None)
    except OSError as error:
        raise Damage(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{path.name} is not what was written: {error}") from error
    if version != SCHEMA_VERSION:
        raise OtherSchema(f"{path.name} has schema {version}, this version reads {SCHEMA_VERSION}")
    if seal != _seal(facts):
        raise Damage(f"{path.name} differs from its checksum")
    return facts


def _seal(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class IndexHash:
    """SHA-256 of all columns but the audio, which has a checksum in each row; of the values, not of their layout.

    Args:
        schema: of the record batches.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._sha256 = hashlib.sha256()
        self._columns = [
            (field.name, f"{field.name} {field.type} ", 0 if field.type == pa.string() else field.type.bit_width // 8)
            for field in schema
            if field.name != "audio"
        ]

    def add(self, batch: pa.RecordBatch) -> None:
        """The next record batch; it may hold the audio or not.

        Raises:
            Damage: a value is missing.
        """
        rows, pieces, columns, audio = len(batch), [], batch.columns, batch.schema.get_field_index("audio")
        if audio >= 0:
            del columns[audio]
        for (name, head, item_bytes), column in zip(self._columns, columns, strict=True):
            if column.null_count:
                raise Damage(f"data.arrow: values of {name} are missing")
            pieces.append(f"{head}{rows}".encode())
            buffers = column.buffers()
            if item_bytes:
                pieces.append(memoryview(buffers[1])[: rows * item_bytes])
            else:
                ends = memoryview(buffers[1]).cast("i")[: rows + 1]
                pieces += [ends, memoryview(buffers[2] or b"")[: ends[rows]]]
        self._sha256.update(b"".join(pieces))

    def hexdigest(self) -> str:
        """Of all batches so far."""
        return self._sha256.hexdigest()


def numbers_of(column: pa.Array) -> np.ndarray:
    """A numeric column without gaps, a view of its batch: what `to_numpy` gives, which imports pandas first (1 s)."""
    return np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype(), len(column))


def checked_numbers(folder: Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """Rows of each record batch and all numeric columns, once every column but the audio agrees with part.json.

    Raises:
        Damage: one does not, or the size of the file.
    """
    facts, batch_rows = read_sealed(folder / "part.json"), []
    _check_size(folder, facts)
    with damage_of_arrow(), open_index(folder / "data.arrow") as reader:
        index = IndexHash(reader.schema)
        types = {field.name: field.type for field in reader.schema if field.type in (pa.int32(), pa.float32())}
        if "num_samples" not in types:
            raise Damage("data.arrow has no column num_samples")
        numbers = {name: np.empty(facts["rows"], kind.to_pandas_dtype()) for name, kind in types.items()}
        start = 0
        for position in range(reader.num_record_batches):
            batch = read_batch(reader, position)
            index.add(batch)
            batch_rows.append(len(batch))
            for name, values in numbers.items():
                values[start : start + len(batch)] = numbers_of(batch.column(name))
            start += len(batch)
    if index.hexdigest() != facts["index_sha256"]:
        raise Damage("data.arrow: ids, texts or lengths differ from their checksum")
    return batch_rows, numbers


def find_damage(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Read every byte of these parts, with a bar; each part and what is wrong with it, damaged rows one by one."""
    files = (path for folder in folders for path in folder.glob("data.arrow"))
    with Progress("verifying", sum(-(-path.stat().st_size // MEGABYTE) for path in files), "MB") as progress:
        for folder in folders:
            for what in _damage_of_part(folder, progress.advance):
                yield folder, what


def _damage_of_part(folder: Path, advance: Callable[[], None]) -> Iterator[str]:
    try:
        facts, is_named = read_sealed(folder / "part.json"), False
        _check_size(folder, facts)
        # Read and not mapped: where the disk itself fails, a mapped page ends the process by SIGBUS.
        with damage_of_arrow():
            digest = hash_file(folder / "data.arrow", advance)
        for row in _damaged_rows(folder):
            is_named = True
            yield row
        checked_numbers(folder)
        if digest != facts["sha256"] and not is_named:
            yield "data.arrow differs from its checksum"
    except Damage as damage:
        yield str(damage)


def verify(data_dir: Path) -> None:
    """Read every byte of a prepared set and name what is damaged.

    Raises:
        UsageError: there is no prepared set.
        RunFailed: something is damaged; the message is the command that makes it again.
    """
    folders = [folder for split in SPLITS for folder in part_folders(data_dir, split)]
    if not folders and not (data_dir / "prepare.json").exists():
        raise UsageError(f"--data_dir {data_dir} holds no prepared data: name the folder that prepare.py wrote")
    with contextlib.suppress(Damage), refusing_other_schema(data_dir):
        read_sealed(data_dir / "prepare.json")
    is_damaged = False
    for place, what in itertools.chain(_damage_of_set(data_dir, folders), find_damage(folders)):
        is_damaged = True
        print(f"damaged: {place}: {what}", flush=True)
    if is_damaged:
        raise RunFailed(f"{data_dir} is damaged: make it whole again with {remake_command(data_dir)}")
    rows = sum(read_sealed(folder / "part.json")["rows"] for folder in folders)
    print(f"{data_dir}: {rows:,} rows in {len(folders)} parts, every byte as it was written", flush=True)


def require_texts(data_dirs: Iterable[Path]) -> None:
    """Refuse prepared data that has no texts.

    Raises:
        UsageError: it was prepared with --untranscribed.
    """
    for data_dir in data_dirs:
        try:
            settings = read_sealed(data_dir / "prepare.json").get("settings", {})
        except Damage:
            continue  # for whoever opens it to say
        if settings.get(UNTRANSCRIBED):
            raise UsageError(
                f"{data_dir} was prepared with --untranscribed and has no texts: pre-train on it with pretrain.py, or "
                "prepare a corpus with transcripts"
            )


def part_folders(data_dir: Path, split: str) -> list[Path]:
    """Finished parts of a split in their order."""
    folders = (folder for folder in (data_dir / split).glob("part_*") if folder.name.removeprefix("part_").isdigit())
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("part_")))


def _damage_of_set(data_dir: Path, folders: list[Path]) -> Iterator[tuple[Path, str]]:
    """What is wrong beside the parts: prepare.json, dropped.csv, a part that is gone."""
    try:
        facts = read_sealed(data_dir / "prepare.json")
        if hash_file(data_dir / "dropped.csv") != facts["dropped_sha256"]:
            yield data_dir / "dropped.csv", "differs from its checksum"
        for split in SPLITS:
            for number in range(1, facts["splits"][split]["parts"] + 1):
                if data_dir / split / f"part_{number}" not in folders:
                    yield data_dir / split / f"part_{number}", "missing"
    except Damage as damage:
        yield data_dir / "prepare.json", str(damage)
    except OSError as error:
        yield data_dir / "dropped.csv", f"cannot be read: {error.strerror}"


def remake_command(data_dir: Path) -> str:
    """The command that makes the damaged parts again, as far as prepare.json tells it."""
    try:
        flags = read_sealed(data_dir / "prepare.json")["flags"]
    except Damage:
        flags = ["--corpus", "..."]
    return shlex.join(["python", "prepare.py", *flags, "--data_dir", str(data_dir), "--verify"])


def check_audio(samples: np.ndarray, audio_sha256: str) -> bool:
    """Whether int16 samples [S] are those that were stored."""
    return hashlib.sha256(samples).hexdigest() == audio_sha256


@contextlib.contextmanager
def open_index(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """A data.arrow without its audio, or with `columns` alone.

    Read and not mapped: Arrow asks the system for the whole of a mapped batch, which is 16 MB of audio for 50 kB.
    """
    with pa.OSFile(str(path)) as source:
        names = pa.ipc.open_file(source).schema.names
        wanted = [
            position for position, name in enumerate(names) if (name != "audio" if not columns else name in columns)
        ]
        yield pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False))


def read_batch(reader: pa.ipc.RecordBatchFileReader, position: int) -> pa.RecordBatch:
    """A record batch whose offsets lead nowhere outside it: Arrow itself would follow damaged ones and crash."""
    batch = reader.get_batch(position)
    batch.validate(full=True)  # 5 µs for 128 rows; does not touch the audio
    return batch


@contextlib.contextmanager
def damage_of_arrow() -> Iterator[None]:
    """Whatever a damaged data.arrow makes the readers raise becomes `Damage`."""
    try:
        yield
    except (Damage, UsageError):
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException) as error:
        raise Damage(f"data.arrow cannot be read: {error}") from error


def _check_size(folder: Path, facts: dict) -> None:
    with damage_of_arrow():
        size = (folder / "data.arrow").stat().st_size
    if size != facts["data_bytes"]:
        raise Damage(f"data.arrow has {size} bytes of {facts['data_bytes']}")


def hash_file(path: Path, advance: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file; `advance` is called at every megabyte."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MEGABYTE):
            digest.update(block)
            advance()
    return digest.hexdigest()


def _damaged_rows(folder: Path) -> Iterator[str]:
    with damage_of_arrow(), pa.memory_map(str(folder / "data.arrow")) as source:
        reader = pa.ipc.open_file(source)
        for batch in (read_batch(reader, position) for position in range(reader.num_record_batches)):
            for row in range(len(batch)):
                if not check_audio(audio_of(batch, row), batch.column("audio_sha256")[row].as_py()):
                    yield f"row {batch.column('id')[row].as_py()} of data.arrow: its audio differs from its checksum"


def audio_of(batch: pa.RecordBatch, row: int) -> np.ndarray:
    """The int16 samples [S] of a row, a view of the mapped file."""
    audio = batch.column("audio")
    return numbers_of(audio.values)[audio.offsets[row].as_py() : audio.offsets[row + 1].as_py()]
