"""prepare.py against `datasets.map` on the same MP3 clips, and against decoding and resampling without any output.

    python benchmarks/prepare.py --corpus ../shared/corpora/yo [--clips 3600] [--num_workers 1 2] [--repetitions 3]

The corpus is a Common Voice release, whose clips are repeated under other names. The other side does what transformers'
run_speech_recognition_ctc.py does: the audio column cast to 16 kHz, `map` with feature extractor and tokenizer, all
other columns removed, then `filter` by length; it needs the packages datasets and torchcodec. Each is a program of its
own, from its start to its end with the imports, and they take turns; the least time of the repetitions counts. Memory
is the peak of the anonymous memory of all processes, the disk what the program leaves.
"""

import argparse
import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ["OMP_NUM_THREADS"] = "1"

SAMPLING_SECONDS = 0.05
CLIPS_PER_TASK = 16
MIN_SECONDS, MAX_SECONDS = 0.1, 20.0
# What the example script is told to take out of the texts.
CHARACTERS_TO_IGNORE = ',?.!-;:"'


@dataclass(frozen=True)
class Run:
    """One program on the whole corpus: seconds, CPU seconds, peak bytes of memory, bytes it left on the disk."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    disk_bytes: int


def main() -> None:
    """Print a table per number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default=str(REPOSITORY.parent / "shared" / "corpora" / "yo"))
    parser.add_argument("--clips", type=int, default=3_600)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    if missing := [name for name in ("datasets", "torchcodec") if importlib.util.find_spec(name) is None]:
        sys.exit(f"{' and '.join(missing)} not installed: pip install -e '.[bench]'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        repeat_corpus(Path(arguments.corpus), folder / "corpus", arguments.clips)
        for num_workers in arguments.num_workers:
            runs: dict[str, list[Run]] = {}
            for _ in range(arguments.repetitions):
                for name, command in programs(folder, num_workers).items():
                    runs.setdefault(name, []).append(measure(command, folder / "out"))
            print_table(runs, arguments.clips, num_workers)


def programs(folder: Path, num_workers: int) -> dict[str, list[str]]:
    """Command lines by name; each writes into folder / out."""
    own = [sys.executable, __file__]
    corpus, out, workers = str(folder / "corpus"), str(folder / "out"), str(num_workers)
    return {
        "prepare.py": [
            *(sys.executable, str(REPOSITORY / "prepare.py"), "--corpus", corpus, "--data_dir", out),
            *("--num_workers", workers),
        ],
        "datasets.map": [*own, "run-map", corpus, workers],
        "decode, resample": [*own, "run-decode", corpus, workers],
    }


def print_table(runs: dict[str, list[Run]], clips: int, num_workers: int) -> None:
    """A line per program, and what prepare.py is to the others."""
    print(f"\n{clips:,} clips, {num_workers} worker{'s' * (num_workers > 1)}")
    print(f"{'':<18}{'clips/s':>9}{'CPU ms/clip':>13}{'peak MB':>9}{'disk MB':>9}")
    best = {
        name: Run(
            min(run.seconds for run in found),
            min(run.cpu_seconds for run in found),
            max(run.peak_bytes for run in found),
            found[0].disk_bytes,
        )
        for name, found in runs.items()
    }
    for name, run in best.items():
        print(
            f"{name:<18}{clips / run.seconds:>9.1f}{1000 * run.cpu_seconds / clips:>13.1f}{run.peak_bytes / 1e6:>9.0f}"
            f"{run.disk_bytes / 1e6:>9.0f}"
        )
    ours, other, pure = best.values()
    print(
        f"prepare.py / datasets.map: {other.seconds / ours.seconds:.2f} x the speed "
        f"({other.cpu_seconds / ours.cpu_seconds:.2f} by CPU time), {ours.peak_bytes / other.peak_bytes:.2f} of the "
        f"memory, {ours.disk_bytes / other.disk_bytes:.2f} of the disk\n"
        f"prepare.py / decode, resample: {pure.seconds / ours.seconds:.2f} of the speed "
        f"({pure.cpu_seconds / ours.cpu_seconds:.2f} by CPU time)",
        flush=True,
    )


def repeat_corpus(source: Path, folder: Path, clips: int) -> None:
    """A release of that many clips, a tenth of them dev."""
    (folder / "clips").mkdir(parents=True)
    with (source / "train.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    # The same rows twice: with a name of a clip, and, for the other side, with its whole path.
    names = [f"{split}{kind}" for split in ("train", "dev") for kind in ("", ".audio")]
    tables = {name: (folder / f"{name}.tsv").open("w", newline="", encoding="utf-8") for name in names}
    columns = {"": list(rows[0]), ".audio": ["audio", *(name for name in rows[0] if name != "path")]}
    writers = {
        name: csv.DictWriter(file, columns[".audio" if name.endswith(".audio") else ""], delimiter="\t")
        for name, file in tables.items()
    }
    for writer in writers.values():
        writer.writeheader()
    for number in range(clips):
        row = rows[number % len(rows)]
        name = f"{number:06d}.mp3"
        shutil.copyfile(source / "clips" / row["path"], folder / "clips" / name)
        split = "dev" if number % 10 == 0 else "train"
        writers[split].writerow(row | {"path": name})
        others = {column: value for column, value in row.items() if column != "path"}
        writers[f"{split}.audio"].writerow(others | {"audio": str(folder / "clips" / name)})
    for file in tables.values():
        file.close()


def measure(command: Sequence[str], out: Path) -> Run:
    """Run a program that writes into `out`, which is removed."""
    from prepare_memory import anonymous_bytes, process_tree

    peak, cpu_seconds, ended = 0, {}, threading.Event()

    def watch(pid: int) -> None:
        nonlocal peak
        while not ended.wait(SAMPLING_SECONDS):
            tree = process_tree(pid)
            peak = max(peak, sum(map(anonymous_bytes, tree)))
            cpu_seconds.update((one, seconds) for one in tree if (seconds := cpu_of(one)))

    environment = os.environ | {"HF_HOME": str(out / "huggingface"), "HF_HUB_OFFLINE": "1"}
    started_at = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        status = process.wait()
        seconds = time.monotonic() - started_at
        ended.set()
        watcher.join()
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)} ended with status {status}:\n{output.read().decode()[-2000:]}")
    disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    return Run(seconds, sum(cpu_seconds.values()), peak, disk)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far; 0 when it is gone. What a fork server starts is waited for by nobody of ours."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------------------------
# The other programs


def map_dataset(corpus: Path, num_workers: int) -> None:
    """What run_speech_recognition_ctc.py does before it trains."""
    import re

    from datasets import Audio, Value, load_dataset
    from transformers import Wav2Vec2FeatureExtractor

    from text import LARGE_960H_VOCABULARY, build_tokenizer

    tables = {split: str(corpus / f"{split}.audio.tsv") for split in ("train", "dev")}
    raw = load_dataset("csv", data_files=tables, delimiter="\t", keep_default_na=False)
    tokenizer, feature_extractor = build_tokenizer(LARGE_960H_VOCABULARY), Wav2Vec2FeatureExtractor()
    ignored = re.compile(f"[{re.escape(CHARACTERS_TO_IGNORE)}]")

    def remove_special_characters(batch: dict) -> dict:
        batch["target_text"] = ignored.sub("", batch["sentence"]).upper() + " "
        return batch

    def prepare_dataset(batch: dict) -> dict:
        sample = batch["audio"]
        inputs = feature_extractor(sample["array"], sampling_rate=sample["sampling_rate"])
        batch["input_values"] = inputs.input_values[0]
        batch["input_length"] = len(batch["input_values"])
        batch["labels"] = tokenizer(batch["target_text"]).input_ids
        return batch

    def is_audio_in_length_range(length: int) -> bool:
        return MIN_SECONDS * 16_000 < length < MAX_SECONDS * 16_000

    raw = raw.map(remove_special_characters, remove_columns=["sentence"])
    raw = raw.cast_column("audio", Value("string")).cast_column(
        "audio", Audio(sampling_rate=feature_extractor.sampling_rate)
    )
    columns = next(iter(raw.values())).column_names
    vectorized = raw.map(prepare_dataset, remove_columns=columns, num_proc=num_workers)
    vectorized = vectorized.filter(is_audio_in_length_range, num_proc=num_workers, input_columns=["input_length"])
    assert len(vectorized["train"])


def decode_all(corpus: Path, num_workers: int) -> None:
    """Decode and resample every clip in processes that start as prepare.py's do, and throw the samples away."""
    from concurrent.futures import ProcessPoolExecutor

    from audio import fork_server, without_main_module
    from benchmarks.prepare import decode_task  # by a name that other processes can import

    paths = [row["path"] for split in ("train", "dev") for row in read_rows(corpus, split)]
    tasks = [paths[start : start + CLIPS_PER_TASK] for start in range(0, len(paths), CLIPS_PER_TASK)]
    context = fork_server("soundfile", "torchaudio.transforms")
    with without_main_module(), ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        assert sum(pool.map(decode_task, tasks)) > 0


def decode_task(paths: list[str]) -> int:
    """Samples of these clips at 16 kHz."""
    import soundfile

    from audio import resample

    return sum(len(resample(*soundfile.read(path, dtype="float32"))) for path in paths)


def read_rows(corpus: Path, split: str) -> Iterator[dict[str, str]]:
    """Rows of the release with the whole path of the clip."""
    with (corpus / f"{split}.tsv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            yield row | {"path": str(corpus / "clips" / row["path"])}


if __name__ == "__main__":
    if sys.argv[1:2] == ["run-map"]:
        map_dataset(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["run-decode"]:
        decode_all(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
