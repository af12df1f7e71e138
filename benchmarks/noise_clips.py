"""Prepared sets of noise with random texts, where only lengths matter. Needs the tests' fixtures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from conftest import write_part

from audio import SAMPLE_RATE_HZ

# Common Voice's distribution of lengths.
MEAN_SECONDS, DEVIATION, LIMITS_SECONDS = 5.1, 0.35, (1.0, 12.0)
LABELS_PER_SECOND = 14


def common_voice_seconds(count: int) -> np.ndarray:
    """Lengths of so many clips, the same ones every time."""
    return np.clip(MEAN_SECONDS * np.exp(np.random.default_rng(0).normal(0, DEVIATION, count)), *LIMITS_SECONDS)


def write_noise(data_dir: Path, seconds: Mapping[str, Sequence[float]]) -> None:
    """A clip of each length for each split, one part a split."""
    rng = np.random.default_rng(0)
    for split, lengths in seconds.items():
        rows = []
        for number, length in enumerate(lengths):
            samples = rng.normal(0, 1_000, round(length * SAMPLE_RATE_HZ)).astype(np.int16)
            text = "".join(rng.choice(list("ABCDEFGH "), round(length * LABELS_PER_SECOND)))
            rows.append((f"{split}{number}", samples, " ".join(text.split()), f"s{number % 7}"))
        write_part(data_dir / split / "part_1", rows)
