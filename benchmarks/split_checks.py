"""Time and memory of the audio and overlap checks for Common Voice English of the first version: 136,747 + 58,619 rows.

    python benchmarks/split_checks.py [--train 136747] [--dev 58619]

Clips of a few samples stand for the audio, which the checks never touch; 31 % of the dev sentences are in training.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from audio import Clip, measure
from audio_checks import check_audio
from corpora import SourceRow
from data import ShardDataset
from overlap import find_overlap
from shards import SCHEMA_VERSION, PartWriter

ROWS_PER_PART = 10_000
SHARED_SENTENCES = 0.31
WORDS_PER_SENTENCE = 10
SAMPLING_SECONDS = 0.005


def main() -> None:
    """Print one line per check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=136_747)
    parser.add_argument("--dev", type=int, default=58_619)
    arguments = parser.parse_args()
    counts = {"train": arguments.train, "dev": arguments.dev}
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder), counts)
        sets = {split: ShardDataset(Path(folder) / split) for split in counts}
        print(f"{'check':<16}{'seconds':>9}{'memory, MB':>12}")
        overlap, seconds, peak = measured(lambda: find_overlap(sets))
        print(f"{'find_overlap':<16}{seconds:>9.2f}{peak / 1e6:>12.1f}", flush=True)
        audio, seconds, peak = measured(lambda: check_audio(sets))
        print(f"{'check_audio':<16}{seconds:>9.2f}{peak / 1e6:>12.1f}")
        for finding in (*overlap.findings, *audio):
            print(f"{finding.verdict:<8} {finding.result}")


def write_sets(folder: Path, counts: dict[str, int]) -> None:
    """Prepared splits with sentences of random words and speakers with ids as long as Common Voice's."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + code) for code in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(20_000)]
    known = [sentence(words, rng) for _ in range(counts["train"])]
    for split, count in counts.items():
        for part, start in enumerate(range(0, count, ROWS_PER_PART), 1):
            path = folder / split / f"part_{part}"
            path.mkdir(parents=True)
            with (path / "data.arrow").open("wb") as file:
                writer = PartWriter(file, [])
                for row in range(start, min(start + ROWS_PER_PART, count)):
                    repeated = split == "train" or rng.random() < SHARED_SENTENCES
                    text = known[row % len(known)] if repeated else sentence(words, rng)
                    speaker = hashlib.sha512(f"{split}{row // 3}".encode()).hexdigest()
                    samples = rng.integers(-9_000, 9_000, 4).astype(np.int16)
                    digest = hashlib.sha256(samples.tobytes()).hexdigest()
                    clip = Clip(samples, MEASURES, 48_000, digest)
                    writer.add(SourceRow(f"{split}_{row:08d}.mp3", None, "", text, speaker, {}), clip)
                facts = writer.finish() | {"schema_version": SCHEMA_VERSION}
            (path / "part.json").write_text(json.dumps(facts))
    parts = {split: {"parts": len(list((folder / split).iterdir()))} for split in counts}
    (folder / "prepare.json").write_text(json.dumps({"splits": parts}))


MEASURES = measure((np.random.default_rng(0).standard_normal(16_000) * 1_000).astype(np.int16))


def sentence(words: list[str], rng: np.random.Generator) -> str:
    """Words with a capital, a comma and a full stop."""
    chosen = [words[index] for index in rng.integers(0, len(words), WORDS_PER_SENTENCE)]
    return f"{' '.join(chosen[:4])}, {' '.join(chosen[4:])}.".capitalize()


def measured(check: Callable[[], object]) -> tuple[object, float, int]:
    """Its result, the seconds it took, and by how many bytes anonymous memory grew at most."""
    process, peaks, done = psutil.Process(), [0], threading.Event()
    before = anonymous_bytes(process)

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peaks.append(anonymous_bytes(process) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started_at = time.monotonic()
    result = check()
    seconds = time.monotonic() - started_at
    done.set()
    watcher.join()
    return result, seconds, max(peaks)


def anonymous_bytes(process: psutil.Process) -> int:
    """Resident memory less mapped files, which the system can take back at any time."""
    found = process.memory_info()
    return found.rss - found.shared


if __name__ == "__main__":
    main()
