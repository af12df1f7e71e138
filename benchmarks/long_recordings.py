"""Long recordings: does reading them in windows change the text, and how much memory does half an hour take?

    python benchmarks/long_recordings.py --model_name_or_path runs/demo/model --data_dir data/demo
    python benchmarks/long_recordings.py --memory

Agreement: clips of a prepared split one behind the other, with pauses of 0.1 to 0.6 s, as recordings of --seconds.
Each, of one voice, is read whole, and in windows of several lengths with several margins; beside it
`transformers.pipeline` with the same lengths, which cuts every overlap in the middle. A word agrees if an alignment of
the two texts leaves it unchanged.
Memory: transcribe.py on noise of 1 and of 30 minutes, with random weights of the base and the large size: its peak of
resident memory, libraries included, less the weights. The goal is less than 2 GB.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import numpy as np
import psutil
import soundfile
import torch
from architectures import LARGE_960H, write_published_like_checkpoint
from transformers import pipeline
from transformers.utils import logging

from audio import INT16_STEP, SAMPLE_RATE_HZ
from config import DEFAULT_CHARACTERS_TO_IGNORE, TranscribeConfig
from data import ShardDataset
from metrics import ErrorCounts, count_word_errors
from recognition import Recogniser
from recording import Recording
from text import TextNormalizer

WINDOWS = ((30.0, 4.0), (30.0, 2.0), (20.0, 4.0), (15.0, 3.0), (10.0, 2.0))
PAUSE_SECONDS = (0.1, 0.6)
SAMPLING_SECONDS = 0.02
MINUTES = (1, 30)
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--data_dir")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--recordings", type=int, default=10)
    parser.add_argument("--characters_to_ignore", default=DEFAULT_CHARACTERS_TO_IGNORE)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory()
    else:
        print_agreement(arguments)


# --- Agreement -----------------------------------------------------------------------------------------------------


def print_agreement(arguments: argparse.Namespace) -> None:
    """Words that are the same as in the text of the whole, and WER against the references."""
    logging.set_verbosity_error()
    dataset = ShardDataset(Path(arguments.data_dir) / arguments.split)
    with tempfile.TemporaryDirectory() as folder:
        made = make_recordings(Path(folder), dataset, arguments.seconds, arguments.recordings)
        name = arguments.model_name_or_path
        longest = max(soundfile.info(path).duration for path, _ in made)
        whole = read_all(name, made, longest, longest / 4)
        vocabulary = Recogniser(TranscribeConfig(model_name_or_path=name)).vocabulary
        normalise = TextNormalizer.for_vocabulary(vocabulary, arguments.characters_to_ignore, "auto")
        references = [normalise(reference) for _, reference in made]
        print(f"{len(made)} recordings of {arguments.seconds:g} s, {sum(len(one.split()) for one in references)} words")
        print(f"{'':>10}{'window, s':>11}{'margin, s':>11}{'words as in the whole':>23}{'WER':>9}")
        print_row("ours", "whole", "", whole, whole, references)
        for chunk, stride in WINDOWS:
            print_row("ours", f"{chunk:g}", f"{stride:g}", read_all(name, made, chunk, stride), whole, references)
        recognise = pipeline("automatic-speech-recognition", model=name, device="cpu")
        for chunk, stride in WINDOWS:
            texts = [theirs(recognise, path, chunk, stride) for path, _ in made]
            print_row("pipeline", f"{chunk:g}", f"{stride:g}", texts, whole, references)


def make_recordings(folder: Path, dataset: ShardDataset, seconds: float, count: int) -> list[tuple[Path, str]]:
    """Files with what is said in them, one voice each; clips are drawn anew for each."""
    rng = np.random.default_rng(0)
    speakers = np.array(list(dataset.column("speaker")))
    made = []
    for number in range(count):
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
    print(f"{tool:>10}{chunk:>11}{stride:>11}{1 - same.rate:>23.2%}{errors.rate:>9.2%}", flush=True)


# --- Memory --------------------------------------------------------------------------------------------------------


def print_memory() -> None:
    """Peak of transcribe.py for each size of the model and each length of the recording."""
    print(f"{'model':>8}{'minutes':>9}{'weights, MB':>13}{'peak less weights, MB':>23}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, fields in (("base", BASE), ("large", {})):
            architecture = replace(LARGE_960H, config=LARGE_960H.config | fields)
            write_published_like_checkpoint(folder / size, architecture, "safetensors", "weight_g")
            weights = (folder / size / "model.safetensors").stat().st_size
            for minutes in MINUTES:
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
