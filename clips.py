"""Clips of prepared data as MP3, within a limit of bytes.

S: samples of a clip at 16 kHz.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from audio import SAMPLE_RATE_HZ
from errors import UsageError
from progress import Progress

if TYPE_CHECKING:
    from data import ShardDataset
    from joined import JoinedDataset

# Constant rates of MPEG-2 layer III, which 16 kHz audio is; 32 is hard to tell from the clip, 16 is a telephone.
BITRATES_KBPS = (32, 24, 16)
# libsndfile takes the rate as a place between the highest and the lowest of that layer.
HIGHEST_KBPS, LOWEST_KBPS = 160, 8
# Headers and the frames that the encoder adds at both ends of a clip.
SPARE_SECONDS = 0.3
# Bytes of base64 per byte.
BASE64_GROWTH = 4 / 3


def encode_mp3(samples_S: np.ndarray, kbps: int) -> bytes:
    """Mono 16 kHz int16 audio as an MP3 file of a constant rate."""
    file = io.BytesIO()
    level = (HIGHEST_KBPS - kbps) / (HIGHEST_KBPS - LOWEST_KBPS)
    soundfile.write(
        file, samples_S, SAMPLE_RATE_HZ, format="MP3", bitrate_mode="CONSTANT", compression_level=level
    )  # fmt: skip
    return file.getvalue()


def choose_bitrate(seconds: float, count: int, max_bytes: int) -> int:
    """The best of BITRATES_KBPS at which `count` clips of `seconds` in all fit, as base64; else the lowest.

    Args:
        seconds: of all clips together.
        count: of the clips.
        max_bytes: of all of them.
    """
    for kbps in BITRATES_KBPS:
        if (seconds + count * SPARE_SECONDS) * kbps * 125 * BASE64_GROWTH <= max_bytes:
            return kbps
    return BITRATES_KBPS[-1]


def open_split(folders: Sequence[Path], fingerprint: str | None) -> "ShardDataset | JoinedDataset":
    """The prepared split whose clips were scored.

    Args:
        folders: DATA_DIR/SPLIT, of each set where it is of several.
        fingerprint: of the data that was scored, where that is known.

    Raises:
        UsageError: it is missing or damaged, or holds other data.
    """
    if not any(folder.is_dir() for folder in folders):
        raise UsageError(f"there is no folder {folders[0]}")
    from joined import open_sets  # Imports torch and transformers: eight seconds that a report without clips saves.

    dataset = open_sets([folder.parent for folder in folders], folders[0].name)
    if fingerprint is not None and dataset.fingerprint != fingerprint:
        raise UsageError(f"{dataset.folder} is not the data that was scored (another fingerprint)")
    return dataset


def embed_clips(dataset: "ShardDataset | JoinedDataset", ids: Sequence[str], max_bytes: int) -> dict[str, str]:
    """Clips by id, as base64 of MP3; in the order of `ids`, a clip that does not fit into what is left is skipped.

    Raises:
        UsageError: a clip is damaged.
    """
    rows = _find_rows(dataset, ids)
    seconds = sum(float(dataset.num_samples[row]) for row in rows.values()) / SAMPLE_RATE_HZ
    kbps, left, clips = choose_bitrate(seconds, len(rows), max_bytes), max_bytes, {}
    with Progress("encoding clips", len(rows), "clips") as progress:
        for name in filter(rows.__contains__, ids):
            if dataset.num_samples[rows[name]] / SAMPLE_RATE_HZ * kbps * 125 * BASE64_GROWTH <= left:
                clip = base64.b64encode(encode_mp3(dataset[rows[name]].audio, kbps)).decode()
                if len(clip) <= left:
                    clips[name] = clip
                    left -= len(clip)
            progress.advance()
    return clips


def _find_rows(dataset: "ShardDataset | JoinedDataset", ids: Sequence[str]) -> Mapping[str, int]:
    wanted = set(ids)
    return {name: row for row, name in enumerate(dataset.column("id")) if name in wanted}
