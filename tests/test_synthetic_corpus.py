"""The sets of the benchmarks are legal prepared sets that take next to no room."""

from pathlib import Path

import numpy as np

from audio import SAMPLE_RATE_HZ
from benchmarks import synthetic_corpus
from data import ShardDataset
from integrity import verify


def test_every_checksum_holds_and_silence_is_a_hole(tmp_path: Path) -> None:
    synthetic_corpus.write_set(tmp_path, {"train": 250, "dev": 20})
    verify(tmp_path)
    train = ShardDataset(tmp_path / "train")
    facts = (tmp_path / "train" / "part_1" / "data.arrow").stat()
    assert facts.st_size > 2 * train.num_samples.sum()
    assert 512 * facts.st_blocks < 0.1 * facts.st_size
    assert 4.5 < train.seconds / len(train) < 5.7
    assert train.num_samples.min() >= synthetic_corpus.SHORTEST_SECONDS * SAMPLE_RATE_HZ - synthetic_corpus.STEP_SAMPLES
    clips = {train[row].audio.tobytes()[-8:] for row in range(len(train))}
    assert len(clips) == len(train)
    assert not np.any(train[7].audio[: -synthetic_corpus.SIGNATURE_SAMPLES])
