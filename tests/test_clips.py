"""MP3 that sounds like the clip, and never more of it than the limit allows."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import make_rows, write_part

from audio import SAMPLE_RATE_HZ
from clips import BITRATES_KBPS, choose_bitrate, embed_clips, encode_mp3, open_split
from data import ShardDataset
from errors import UsageError

# The encoder begins with up to this much silence, and fills the last frame.
MAX_DELAY = 1_500


def likeness(mp3: bytes, clip: np.ndarray) -> float:
    """The correlation of a clip with what a player makes of an MP3 file of it, at the best delay."""
    heard, rate = soundfile.read(io.BytesIO(mp3))
    assert rate == SAMPLE_RATE_HZ
    assert len(clip) <= len(heard) <= len(clip) + 2 * MAX_DELAY
    heard = np.pad(heard, (0, len(clip)))
    return max(np.corrcoef(heard[delay : delay + len(clip)], clip)[0, 1] for delay in range(MAX_DELAY))


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    """Twelve clips of 0.4 to 1.2 s."""
    write_part(tmp_path / "data" / "test" / "part_1", make_rows(12, 3))
    return ShardDataset(tmp_path / "data" / "test")


@pytest.mark.parametrize("kbps", BITRATES_KBPS)
def test_what_is_encoded_is_the_clip(kbps: int) -> None:
    clip = make_rows(1, 5)[0][1]
    file = encode_mp3(clip, kbps)
    assert likeness(file, clip) > 0.98
    seconds = len(clip) / SAMPLE_RATE_HZ
    assert len(file) <= kbps * 125 * (seconds + 0.3)


@pytest.mark.parametrize(
    ("seconds", "count", "max_bytes", "kbps"),
    [
        (1000, 100, 6_000_000, 32),  # a hundred clips of ten seconds
        (1400, 100, 6_000_000, 24),
        (2000, 100, 6_000_000, 16),
        (9000, 100, 6_000_000, 16),  # not all of them will fit
        (0, 0, 0, 32),
    ],
)
def test_bitrate(seconds: float, count: int, max_bytes: int, kbps: int) -> None:
    assert choose_bitrate(seconds, count, max_bytes) == kbps


def test_clips_come_by_id_and_unknown_ids_are_passed_over(dataset: ShardDataset) -> None:
    clips = embed_clips(dataset, ["u3_7", "elsewhere", "u3_0"], 1_000_000)
    assert list(clips) == ["u3_7", "u3_0"]
    for name, row in (("u3_7", 7), ("u3_0", 0)):
        assert likeness(base64.b64decode(clips[name]), dataset[row].audio) > 0.98


@pytest.mark.parametrize("max_bytes", [0, 3_000, 10_000, 20_000])
def test_the_limit_is_kept_and_the_first_come_first(dataset: ShardDataset, max_bytes: int) -> None:
    ids = [f"u3_{row}" for row in range(12)]
    clips = embed_clips(dataset, ids, max_bytes)
    assert sum(map(len, clips.values())) <= max_bytes
    assert len(clips) < 12
    if max_bytes >= 10_000:
        assert next(iter(clips)) == "u3_0"


def test_data_that_is_not_what_was_scored_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    assert len(open_split([dataset.folder], dataset.fingerprint)) == 12
    assert len(open_split([dataset.folder], None)) == 12
    with pytest.raises(UsageError, match="is not the data that was scored"):
        open_split([dataset.folder], "0" * 64)
    with pytest.raises(UsageError, match="there is no folder"):
        open_split([tmp_path / "moved" / "test"], None)
