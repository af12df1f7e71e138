"""What the checksums of prepared data cost: when a run starts, when a row is read, and when all is verified.

    OMP_NUM_THREADS=1 python benchmarks/checksums.py [--index_rows 100000] [--rows 400]

The index is that of `--index_rows` rows of next to no audio; rows are `--rows` clips of 5 s, read in random order from
the page cache. Each figure is the best of five.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import integrity
from audio import SAMPLE_RATE_HZ, Clip, measure
from corpora import SourceRow
from shards import PartWriter

SECONDS = 5
TEXT = "as many characters as people say in five seconds, more or less seventy"
REPETITIONS = 5


def main() -> None:
    """Print a line per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index_rows", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index, clips = Path(folder) / "index", Path(folder) / "clips"
        write_set(index, arguments.index_rows, num_samples=1)
        write_set(clips, arguments.rows, num_samples=SECONDS * SAMPLE_RATE_HZ)

        checked, unchecked = with_and_without("index", lambda: data.ShardDataset(index / "train"))
        print(f"start, {arguments.index_rows:,} rows: {checked:.2f} s, without the checksum {unchecked:.2f} s")

        dataset, order = data.ShardDataset(clips / "train"), np.random.default_rng(0).permutation(arguments.rows)
        checked, unchecked = with_and_without("audio", lambda: [dataset[int(row)] for row in order])
        per_row = [1000 * seconds / arguments.rows for seconds in (checked, unchecked)]
        print(f"a row of {SECONDS} s: {per_row[0]:.3f} ms, without the checksum {per_row[1]:.3f} ms")

        parts = [clips / "train" / "part_1"]
        seconds = best(lambda: list(integrity.find_damage(parts)))
        megabytes = (parts[0] / "data.arrow").stat().st_size / integrity.MEGABYTE
        print(f"--verify: {megabytes / seconds:.0f} MB/s, {SECONDS * arguments.rows / 3600 / seconds:.1f} h of audio/s")


def with_and_without(check: str, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of `work`, and of the same where the check of the `audio` or of the `index` says yes unseen."""
    checked = best(work)
    owner, name = (data, "check_audio") if check == "audio" else (integrity.IndexHash, "add")
    original = getattr(owner, name)
    # Without its hash the index cannot agree, so that check is left to fail in silence.
    setattr(owner, name, lambda *_: True)
    try:
        return checked, best(lambda: ignoring_damage(work))
    finally:
        setattr(owner, name, original)


def ignoring_damage(work: Callable[[], object]) -> None:
    """The work, whatever it finds."""
    try:
        work()
    except data.UsageError as error:
        assert "differ from their checksum" in str(error), error


def best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of five times."""
    times = []
    for _ in range(REPETITIONS):
        started_at = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_at)
    return min(times)


def write_set(data_dir: Path, rows: int, num_samples: int) -> None:
    """A prepared set of one part, all rows with the same noise."""
    samples = np.random.default_rng(0).normal(0, 3_000, num_samples).astype(np.int16)
    clip = Clip(samples, measure(samples), SAMPLE_RATE_HZ, hashlib.sha256(samples).hexdigest())
    folder = data_dir / "train" / "part_1"
    folder.mkdir(parents=True)
    with (folder / "data.arrow").open("wb") as file:
        writer = PartWriter(file, [])
        for row in range(rows):
            writer.add(SourceRow(f"common_voice_en_{row:08d}.mp3", None, "", TEXT, f"speaker {row % 50}", {}), clip)
        facts = writer.finish()
    version = {"schema_version": integrity.SCHEMA_VERSION}
    integrity.write_sealed(folder / "part.json", facts | version)
    splits = {"train": {"parts": 1}, "dev": {"parts": 0}, "test": {"parts": 0}}
    integrity.write_sealed(data_dir / "prepare.json", version | {"flags": [], "splits": splits})


if __name__ == "__main__":
    main()
