"""Kill prepare.py at random moments, start it again until it is done, and compare with a set that was never disturbed.

    python benchmarks/kill_prepare.py [--kills 100] [--num_workers 1 4]

SIGKILL at a moment drawn uniformly from the wall time of an undisturbed run; started again and killed again until a run
ends by itself; then a new folder, until there were as many kills as asked for, shared evenly by the numbers of workers.
The corpus is the spoken digits of CTC_CORPORA (every second clip) where they are, else as many made-up clips; some rows
cannot be used. Every file of each finished set is compared byte for byte, and no process may outlive a kill.
"""

import argparse
import csv
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import soundfile

REPOSITORY = Path(__file__).parents[1]
CORPORA = Path(os.environ.get("CTC_CORPORA", REPOSITORY.parent / "shared" / "corpora"))
CHUNK_SIZE = 25
CLIPS = 1_000
RATE_HZ = 22_050
# For the workers of a killed process to notice that it is gone.
SECONDS_TO_END = 20


def main() -> None:
    """Print one line per number of workers, and fail if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, total, expected = np.random.default_rng(arguments.seed), Counter(), None
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus")
        for number, num_workers in enumerate(arguments.num_workers, 1):
            kills = arguments.kills * number // len(arguments.num_workers) - total["kills"]
            out = Path(folder) / f"{num_workers}_workers"
            started_at = time.monotonic()
            finish(start(corpus, out, num_workers))
            seconds = time.monotonic() - started_at
            moments = iter(lambda limit=seconds: rng.uniform(0, limit), None)
            expected = expected or contents(out)  # one set for every number of workers
            total["differing"] += contents(out) != expected
            phases = Counter()
            while phases.total() < kills:
                out = Path(folder) / f"{num_workers}_workers_{total['sets']}"
                total["orphans"] += kill_until_done(corpus, out, num_workers, kills, phases, moments)
                total["sets"] += 1
                total["differing"] += contents(out) != expected
            total["kills"] += phases.total()
            places = ", ".join(f"{count} {name}" for name, count in phases.most_common())
            print(f"{num_workers} workers, {seconds:.1f} s undisturbed: {phases.total()} kills ({places})", flush=True)
    print(
        f"kills survived: {total['kills']}; sets finished and compared: {total['sets']}, {len(expected)} files each "
        "(data.arrow, part.json, dropped.csv, prepare.json); "
        f"sets that differ: {total['differing']}; processes left behind: {total['orphans']}"
    )
    sys.exit(1 if total["differing"] or total["orphans"] else 0)


def kill_until_done(
    corpus: Path, out: Path, num_workers: int, kills: int, phases: Counter, moments: Iterator[float]
) -> int:
    """Make one set, killed again and again until a run ends by itself or `phases` counts `kills`; the orphans."""
    orphans = 0
    while phases.total() < kills:
        process = start(corpus, out, num_workers)
        if is_done_after(process, next(moments)):
            return orphans
        orphans += kill(process)
        phases[phase(out)] += 1
    finish(start(corpus, out, num_workers))
    return orphans


def write_corpus(folder: Path) -> Path:
    """A manifest of short clips, some of which are missing, broken, without text or there twice."""
    folder.mkdir()
    rows = digits() if (CORPORA / "digits").is_dir() else made_up(folder)
    (folder / "broken.wav").write_bytes(b"RIFF????WAVE")
    rows[3::50] = [("gone.wav", "text", row[2]) for row in rows[3::50]]
    rows[7::50] = [(str(folder / "broken.wav"), "text", row[2]) for row in rows[7::50]]
    rows[11::50] = [(row[0], "", row[2]) for row in rows[11::50]]
    rows[13::50] = [rows[0]] * len(rows[13::50])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "split"), *rows])
    return folder


def digits() -> list[tuple[str, str, str]]:
    """Path, text and split of real clips."""
    with (CORPORA / "digits" / "manifest.csv").open(newline="") as file:
        found = list(csv.DictReader(file))[::2]
    paths = [str((CORPORA / "digits" / row["path"]).resolve()) for row in found]
    return [(path, row["text"], split_of(index)) for index, (path, row) in enumerate(zip(paths, found, strict=True))]


def made_up(folder: Path) -> list[tuple[str, str, str]]:
    """Noise of half a second, at a rate that makes resampling necessary."""
    rng = np.random.default_rng(0)
    for clip in range(CLIPS):
        samples = rng.normal(0, 0.1, int(rng.uniform(0.3, 0.7) * RATE_HZ))
        soundfile.write(folder / f"{clip}.wav", samples, RATE_HZ)
    return [(str(folder / f"{clip}.wav"), f"text {clip}", split_of(clip)) for clip in range(CLIPS)]


def split_of(index: int) -> str:
    """Eight rows of ten train."""
    return {0: "dev", 1: "test"}.get(index % 10, "train")


def start(corpus: Path, out: Path, num_workers: int) -> subprocess.Popen:
    """prepare.py as a user starts it."""
    root = CORPORA / "digits" if (CORPORA / "digits").is_dir() else corpus
    command = [sys.executable, REPOSITORY / "prepare.py", "--corpus", corpus, "--data_dir", out]
    command += ["--num_workers", num_workers, "--chunk_size", CHUNK_SIZE, "--audio_root", root]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def is_done_after(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ends by itself in this time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    finish(process)
    return True


def finish(process: subprocess.Popen) -> None:
    """Wait for a run that must succeed."""
    _, said = process.communicate()
    if process.returncode != 0:
        sys.exit(f"prepare.py ended with status {process.returncode}: {said}")


def kill(process: subprocess.Popen) -> int:
    """SIGKILL; the number of its workers that do not follow it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return len(psutil.wait_procs(children, timeout=SECONDS_TO_END)[1])


def phase(out: Path) -> str:
    """How far a killed run had come."""
    if (out / "prepare.json").exists():
        return "behind the last file"
    if (out / "dropped.csv").exists() or list(out.glob("*.unfinished")):
        return "while finishing"
    if list(out.glob("*/.part_*.tmp")):
        return "inside a part"
    return "between parts" if list(out.glob("*/part_*")) else "before the first part"


def contents(out: Path) -> dict[str, str]:
    """Every file of a set with its checksum."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
