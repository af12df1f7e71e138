"""Shard parts on the disk: their columns, and how a part is written whole or not at all.

A part is a folder of the prepared data:

    DATA_DIR/train/part_1/data.arrow   Arrow IPC file, a row per utterance, its int16 audio included
                          part.json    rows, seconds, checksums, schema version, what it was made from, what was dropped

Parts are read memory-mapped (data.py) and checked by integrity.py. Nothing here imports torch.
"""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from atomic import sync_folder
from audio import SAMPLE_RATE_HZ, Measures
from integrity import IndexHash

if TYPE_CHECKING:
    from audio import Clip
    from corpora import SourceRow

MEASURE_COLUMNS = tuple(field.name for field in fields(Measures))
# A record batch is what the writer holds in memory: 16 MB of audio.
MAX_BATCH_ROWS = 128
MAX_BATCH_SAMPLES = 8_000_000


@contextlib.contextmanager
def new_part(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes the part `folder` when the block ends, and is removed when it fails.

    A damaged part of that name stays until the new one is whole.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except BaseException:
        # A full disk gets its room back; what SIGKILL leaves is removed by the next run.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def remove_unfinished_parts(data_dir: Path) -> None:
    """Remove what a killed run left."""
    for leftover in data_dir.glob("*/.part_*.tmp"):
        shutil.rmtree(leftover)


class PartWriter:
    """Writes data.arrow into an open file batch by batch, hashing as it goes."""

    def __init__(self, file: io.BufferedWriter, metadata_columns: list[str]) -> None:
        self._metadata_columns = metadata_columns
        self._sink = _HashingFile(file)
        self._schema = part_schema(metadata_columns)
        self._index = IndexHash(self._schema)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), self._schema)
        self._batch: list[tuple[SourceRow, Clip]] = []
        self._batch_samples = self._rows = self._samples = 0

    def add(self, row: "SourceRow", clip: "Clip") -> None:
        """Take one utterance; a full batch is written."""
        self._batch.append((row, clip))
        self._batch_samples += len(clip.samples)
        if len(self._batch) == MAX_BATCH_ROWS or self._batch_samples >= MAX_BATCH_SAMPLES:
            self._write_batch()

    def finish(self) -> dict:
        """Write what is left and the footer; the facts of the file."""
        self._write_batch()
        self._writer.close()
        return {
            "rows": self._rows,
            "seconds": self._samples / SAMPLE_RATE_HZ,
            "data_bytes": self._sink.num_bytes,
            "sha256": self._sink.sha256.hexdigest(),
            "index_sha256": self._index.hexdigest(),
        }

    def _write_batch(self) -> None:
        if not self._batch:
            return
        rows, clips = zip(*self._batch, strict=True)
        lengths = np.array([len(clip.samples) for clip in clips], np.int64)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        samples = pa.array(np.concatenate([clip.samples for clip in clips]), pa.int16())
        columns = [
            pa.array([row.id for row in rows], pa.string()),
            pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), samples),
            pa.array(lengths, pa.int32()),
            pa.array([row.text for row in rows], pa.string()),
            pa.array([row.speaker for row in rows], pa.string()),
            *(pa.array([getattr(clip.measures, name) for clip in clips], pa.float32()) for name in MEASURE_COLUMNS),
            pa.array([clip.source_rate_hz for clip in clips], pa.int32()),
            pa.array([clip.audio_sha256 for clip in clips], pa.string()),
            *(pa.array([row.metadata.get(name, "") for row in rows], pa.string()) for name in self._metadata_columns),
        ]
        batch = pa.record_batch(columns, schema=self._schema)
        self._index.add(batch)
        self._writer.write_batch(batch)
        self._rows += len(rows)
        self._samples += self._batch_samples
        self._batch, self._batch_samples = [], 0


class _HashingFile:
    """The few methods that Arrow calls on a Python file; hashes and counts what passes."""

    closed = False

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The caller closes the file, after it has reached the disk."""


def part_schema(metadata_columns: list[str]) -> pa.Schema:
    """Columns of data.arrow; the corpus' own ones come last, as text."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("audio", pa.large_list(pa.int16())),
            ("num_samples", pa.int32()),
            ("text", pa.string()),
            ("speaker", pa.string()),
            *((name, pa.float32()) for name in MEASURE_COLUMNS),
            ("source_rate_hz", pa.int32()),
            ("audio_sha256", pa.string()),
            *((name, pa.string()) for name in metadata_columns),
        ]
    )
