"""Long recordings: does reading them in windows change the text, and how much memory does half an hour take?

    python benchmarks/long_recordings.py --model_name_or_path runs/demo/model --data_dir data/demo --train_updates 150
    python benchmarks/long_recordings.py --model_name_or_path runs/yoruba/model --data_dir data/yo
    python benchmarks/long_recordings.py --memory

Agreement: clips of a prepared split one behind the other, with pauses of 0.1 to 0.6 s, as recordings of --seconds.
Each, of one voice, is read whole, and in windows of several lengths with several margins; beside it
`transformers.pipeline` with the same lengths, which cuts every overlap in the middle. A word agrees if an alignment of
the two texts leaves it unchanged. A model of short, trimmed clips (the demo's) hears letters in every pause; with
--train_updates it is first trained that much further on recordings of 3 to 12 s, made the same way of training clips.
Memory: transcribe.py on noise of 1 and of 30 minutes, with random weights of the base and the large size: its peak of
resident memory, libraries included, less the weights. The goal is less than 2 GB.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import numpy as np
import psutil
import soundfile
import torch
from architectures import BASE, LARGE_960H, write_published_like_checkpoint
from transformers import pipeline
from transformers.utils import logging

from audio import INT16_STEP, SAMPLE_RATE_HZ
from config import DEFAULT_CHARACTERS_TO_IGNORE, TranscribeConfig
from data import ShardDataset
from metrics import ErrorCounts, count_character_errors, count_word_errors
from recognition import Recogniser
from recording import Recording
from text import TextNormalizer

WINDOWS = ((30.0, 4.0), (30.0, 2.0), (20.0, 4.0), (15.0, 3.0), (10.0, 2.0))
PAUSE_SECONDS = (0.1, 0.6)
TRAINING_RECORDINGS, TRAINING_SECONDS = 400, (3.0, 12.0)
SAMPLING_SECONDS = 0.02


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--data_dir")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--recordings", type=int, default=10)
    parser.add_argument("--characters_to_ignore", default=DEFAULT_CHARACTERS_TO_IGNORE)
    parser.add_argument("--train_updates", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--minutes", type=int, nargs="+", default=[1, 30], help="with --memory")
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.minutes)
    else:
        print_agreement(arguments)


# --- Agreement -----------------------------------------------------------------------------------------------------


def print_agreement(arguments: argparse.Namespace) -> None:
    """Words that are the same as in the text of the whole, and WER against the references."""
    logging.set_verbosity_error()
    dataset = ShardDataset(Path(arguments.data_dir) / arguments.split)
    with tempfile.TemporaryDirectory() as folder:
        made = make_recordings(Path(folder), dataset, [arguments.seconds] * arguments.recordings)
        name = arguments.model_name_or_path
        if arguments.train_updates:
            name = train_further(Path(folder), name, Path(arguments.data_dir), arguments.train_updates)
        longest = max(soundfile.info(path).duration for path, _ in made)
        whole = read_all(name, made, longest, longest / 4)
        vocabulary = Recogniser(TranscribeConfig(model_name_or_path=name)).vocabulary
        normalise = TextNormalizer.for_vocabulary(vocabulary, arguments.characters_to_ignore, "auto")
        references = [normalise(reference) for _, reference in made]
        print(f"{len(made)} recordings of {arguments.seconds:g} s, {sum(len(one.split()) for one in references)} words")
        print(f"{'':>10}{'window, s':>11}{'margin, s':>11}{'words as in the whole':>23}{'characters':>13}{'WER':>9}")
        print_row("ours", "whole", "", whole, whole, references)
        for chunk, stride in WINDOWS:
            print_row("ours", f"{chunk:g}", f"{stride:g}", read_all(name, made, chunk, stride), whole, references)
        recognise = pipeline("automatic-speech-recognition", model=name, device="cpu")
        for chunk, stride in WINDOWS:
            texts = [theirs(recognise, path, chunk, stride) for path, _ in made]
            print_row("pipeline", f"{chunk:g}", f"{stride:g}", texts, whole, references)


def make_recordings(folder: Path, dataset: ShardDataset, lengths: Sequence[float]) -> list[tuple[Path, str]]:
    """Files of these lengths (seconds) with what is said in them, one voice each; clips are drawn anew for each."""
    rng = np.random.default_rng(0)
    speakers = np.array(list(dataset.column("speaker")))
    made = []
    for number, seconds in enumerate(lengths):
        rows = np.flatnonzero(speakers == speakers[rng.integers(len(speakers))])
        pieces, texts, length = [], [], 0
        while length < seconds * SAMPLE_RATE_HZ:
            utterance = dataset[int(rng.choice(rows))]
            pause = np.zeros(round(rng.uniform(*PAUSE_SECONDS) * SAMPLE_RATE_HZ), np.int16)
            pieces += [utterance.audio, pause]
            texts.append(utterance.text)
            length += len(utterance.audio) + len(pause)
        soundfile.write(folder / f"{number}.wav", np.concatenate(pieces), SAMPLE_RATE_HZ)
        made.append((folder / f"{number}.wav", " ".join(texts)))
    return made


def train_further(folder: Path, model: str, data_dir: Path, updates: int) -> str:
    """Fine-tune on recordings of training and dev clips; returns the folder of the model."""
    rng, lines = np.random.default_rng(1), ["path,text,split"]
    for split, count in (("train", TRAINING_RECORDINGS), ("dev", 20)):
        (folder / split).mkdir()
        lengths = rng.uniform(*TRAINING_SECONDS, count).tolist()
        for path, text in make_recordings(folder / split, ShardDataset(data_dir / split), lengths):
            lines.append(f"{path},{text},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")
    run(["prepare.py", "--corpus", folder / "manifest.csv", "--data_dir", folder / "data"])
    flags = {"max_steps": updates, "eval_steps": updates, "warmup_steps": updates // 5, "learning_rate": 1e-3}
    flags |= {"data_dir": folder / "data", "output_dir": folder / "run", "model_name_or_path": model}
    flags |= {"per_device_train_batch_size": 8, "freeze_feature_encoder": False}
    run(["train.py", *(part for name, value in flags.items() for part in (f"--{name}", value))])
    return str(folder / "run" / "model")


def run(command: Sequence[object]) -> None:
    """One of our programs; what it says goes to stderr."""
    subprocess.run([sys.executable, REPOSITORY / command[0], *map(str, command[1:])], check=True, stdout=sys.stderr)


def read_all(name: str, made: list[tuple[Path, str]], chunk: float, stride: float) -> list[str]:
    """Our texts with these windows."""
    recogniser = Recogniser(TranscribeConfig(model_name_or_path=name, chunk_length_s=chunk, stride_length_s=stride))
    opened = [(str(path), Recording(str(path))) for path, _ in made]
    return [found[0].text for _, found in recogniser.read(opened, lambda _: None)]


def theirs(recognise: object, path: Path, chunk: float, stride: float) -> str:
    """The text of transformers' pipeline with these windows."""
    samples, rate = soundfile.read(path, dtype="int16")
    inputs = {"raw": samples.astype(np.float32) * np.float32(INT16_STEP), "sampling_rate": rate}
    with torch.inference_mode():
        return recognise(inputs, chunk_length_s=chunk, stride_length_s=stride)["text"]


def print_row(tool: str, chunk: str, stride: str, texts: list[str], whole: list[str], references: list[str]) -> None:
    """One line of the table."""
    same = sum((count_word_errors(*pair) for pair in zip(whole, texts, strict=True)), ErrorCounts())
    errors = sum((count_word_errors(*pair) for pair in zip(references, texts, strict=True)), ErrorCounts())
    letters = sum((count_character_errors(*pair) for pair in zip(whole, texts, strict=True)), ErrorCounts())
    print(
        f"{tool:>10}{chunk:>11}{stride:>11}{1 - same.rate:>23.2%}{1 - letters.rate:>13.2%}{errors.rate:>9.2%}",
        flush=True,
    )


# --- Memory --------------------------------------------------------------------------------------------------------


def print_memory(lengths: Sequence[int]) -> None:
    """Peak of transcribe.py for each size of the model and each length of the recording."""
    print(f"{'model':>8}{'minutes':>9}{'weights, MB':>13}{'peak less weights, MB':>23}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, fields in (("base", BASE), ("large", {})):
            architecture = replace(LARGE_960H, config=LARGE_960H.config | fields)
            write_published_like_checkpoint(folder / size, architecture, "safetensors", "weight_g")
            weights = (folder / size / "model.safetensors").stat().st_size
            for minutes in lengths:
                write_noise(folder / "noise.wav", 60 * minutes)
                peak, seconds = measure(folder / size, folder / "noise.wav")
                print(
                    f"{size:>8}{minutes:>9}{weights / 1e6:>13.0f}{(peak - weights) / 1e6:>23.0f}{seconds:>9.0f}",
                    flush=True,
                )


def write_noise(path: Path, seconds: int) -> None:
    """A minute of noise, over and over."""
    minute = (np.random.default_rng(0).normal(0, 0.05, 60 * SAMPLE_RATE_HZ) / INT16_STEP).astype(np.int16)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE_HZ, 1) as file:
        for _ in range(seconds // 60):
            file.write(minute)


def measure(model: Path, audio: Path) -> tuple[int, float]:
    """Peak resident bytes of transcribe.py and the seconds it took."""
    command = [sys.executable, REPOSITORY / "transcribe.py", "--model_name_or_path", model, "--format", "json", audio]
    started_at, peak = time.monotonic(), 0
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        time.sleep(SAMPLING_SECONDS)
    if process.returncode != 0:
        sys.exit(f"transcribe.py ended with status {process.returncode}")
    return peak, time.monotonic() - started_at


if __name__ == "__main__":
    main()
