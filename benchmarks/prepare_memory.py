"""Memory of prepare.py against the size of the corpus: 5,000 and 20,000 clips of half a second.

    python benchmarks/prepare_memory.py [--clips 5000 20000] [--num_workers 2]

Anonymous memory (RssAnon of /proc/PID/status; mapped files do not count) of the whole process tree, sampled every
20 ms. The goal is a peak for the larger corpus within 10 % of the smaller one's.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile

RATE_HZ = 22_050
SECONDS = 0.5
SAMPLING_SECONDS = 0.02
PREPARE = Path(__file__).parents[1] / "prepare.py"


def main() -> None:
    """Print one line per corpus size and the ratio of the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[5_000, 20_000])
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--chunk_size", type=int, default=10_000)
    arguments = parser.parse_args()
    print(f"{'clips':>8}{'peak RssAnon, MB':>18}{'processes':>11}{'seconds':>9}{'clips/s':>9}")
    peaks = []
    for num_clips in arguments.clips:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder) / "corpus", num_clips)
            peak, processes, seconds = run_prepare(Path(folder), arguments.num_workers, arguments.chunk_size)
        peaks.append(peak)
        print(
            f"{num_clips:>8,}{peak / 1e6:>18.1f}{processes:>11}{seconds:>9.1f}{num_clips / seconds:>9.0f}", flush=True
        )
    print(f"largest / smallest peak: {max(peaks) / min(peaks):.3f} (goal: at most 1.1)")


def write_corpus(folder: Path, num_clips: int) -> None:
    """Noise of different length and loudness, 22,050 Hz, so that every clip is resampled."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["path,text,speaker,split"]
    for clip in range(num_clips):
        samples = rng.standard_normal(int(RATE_HZ * SECONDS * rng.uniform(0.9, 1.1))) * rng.uniform(0.01, 0.1)
        soundfile.write(folder / f"{clip:06d}.wav", samples, RATE_HZ)
        lines.append(f"{clip:06d}.wav,text number {clip},s{clip % 50},{'dev' if clip % 20 == 0 else 'train'}")
    (folder / "manifest.csv").write_text("\n".join(lines))


def run_prepare(folder: Path, num_workers: int, chunk_size: int) -> tuple[int, int, float]:
    """Peak anonymous bytes of the process tree, its largest number of processes, and the seconds it took."""
    command = [sys.executable, PREPARE, "--corpus", folder / "corpus", "--data_dir", folder / "out"]
    command += ["--num_workers", str(num_workers), "--chunk_size", str(chunk_size)]
    started_at = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = processes = 0
    while process.poll() is None:
        sizes = [anonymous_bytes(pid) for pid in process_tree(process.pid)]
        peak, processes = max(peak, sum(sizes)), max(processes, len(sizes))
        time.sleep(SAMPLING_SECONDS)
    if process.returncode != 0:
        sys.exit(f"prepare.py ended with status {process.returncode}")
    return peak, processes, time.monotonic() - started_at


def process_tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


if __name__ == "__main__":
    main()
