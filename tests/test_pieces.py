"""pieces.py: long recordings in pieces, planned by length and cut where it is quiet."""

import itertools
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio
from audio import ClipRequest, _quietest, _read_piece, read_clip
from corpora import AudioLocator, SourceRow
from pieces import cut_row


def row(duration: float | None = None, offset: float = 0.0) -> SourceRow:
    return SourceRow("a/b.wav", None, "a/b.wav", "", "ann", {"mic": "x"}, offset, duration)


def speech_with_pauses(seconds: float, rate: int) -> np.ndarray:
    """Bursts of noise of 0.7 s with pauses of 0.3 s, at the end of each second, whose noise is 40 dB lower."""
    rng = np.random.default_rng(0)
    is_loud = np.arange(round(seconds * rate)) % rate < 0.7 * rate
    return (rng.normal(size=len(is_loud)) * np.where(is_loud, 0.1, 0.001)).astype(np.float32)


def requests(path: Path, seconds: float, longest: float) -> list[ClipRequest]:
    locator = AudioLocator(path.parent, None)
    found = SourceRow(path.name, None, path.name, "", "", {})
    return [locator.locate(piece)[0] for piece in cut_row(found, seconds, longest)]


@pytest.mark.parametrize("longest", [1.0, 10.0, 20.0, 33.3])
def test_pieces_follow_each_other_and_keep_the_limit_wherever_they_are_cut(longest):
    for seconds in [longest * 1.0001, longest * 1.4, 59.98, 60.0, 123.456, 7200.0, 86_399.99]:
        if seconds <= longest:
            continue
        pieces = list(cut_row(row(seconds, 2.0), seconds, longest))
        assert pieces[0].offset_seconds == 2.0
        for one, following in itertools.pairwise(pieces):
            assert one.offset_seconds + one.duration_seconds == pytest.approx(following.offset_seconds, abs=1e-9)
            assert one.end_reach_seconds == following.start_reach_seconds > 0
        assert pieces[-1].offset_seconds + pieces[-1].duration_seconds == pytest.approx(2.0 + seconds)
        assert pieces[0].start_reach_seconds == pieces[-1].end_reach_seconds == 0
        for piece in pieces:
            reach = piece.start_reach_seconds + piece.end_reach_seconds
            assert piece.duration_seconds + reach <= longest + 1e-9, "both bounds moved apart"
            assert piece.duration_seconds - reach >= 0.1 * longest, "both bounds moved together"
        assert len(pieces) <= math.ceil(seconds / (0.7 * longest))


def test_pieces_keep_what_is_known_of_the_recording():
    pieces = list(cut_row(row(), 50.0, 20.0))
    assert [piece.id for piece in pieces] == ["a/b.wav#0001", "a/b.wav#0002", "a/b.wav#0003", "a/b.wav#0004"]
    assert {(piece.audio_path, piece.speaker, piece.metadata["mic"]) for piece in pieces} == {("a/b.wav", "ann", "x")}
    assert pieces[-1].duration_seconds is None, "to the end of the file, whatever its header says"


@pytest.mark.parametrize("seconds", [math.nan, 0.0, 3.0, 20.0, math.inf])
def test_what_is_short_or_of_unknown_length_stays_whole(seconds):
    assert list(cut_row(row(), seconds, 20.0)) == [row()]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100])
def test_pieces_hold_every_sample_once_and_are_cut_in_pauses(tmp_path, rate, suffix):
    seconds, path = 61.37, tmp_path / f"long.{suffix}"
    soundfile.write(path, speech_with_pauses(seconds, rate), rate, subtype="PCM_16")
    whole, _ = soundfile.read(path, dtype="float32")
    parts = []
    for request in requests(path, seconds, 10.0):
        with soundfile.SoundFile(request.path) as file:
            parts.append(_read_piece(file, request))
    assert len(parts) == 9
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert max(map(len, parts)) <= 10.0 * rate
    for cut in np.cumsum([len(part) for part in parts])[:-1]:
        assert 0.7 < cut / rate % 1 < 1.0, f"{cut / rate} s is in a word"


def test_pieces_of_an_mp3_join_within_a_few_milliseconds(tmp_path):
    """A decoder that begins in the middle of an MP3 need not give the same samples as one that came from the start."""
    seconds, path = 61.37, tmp_path / "long.mp3"
    soundfile.write(path, speech_with_pauses(seconds, 16_000), 16_000, format="MP3")
    whole = read_clip(ClipRequest(str(path)))
    found = [read_clip(request) for request in requests(path, seconds, 10.0)]
    assert sum(len(clip.samples) for clip in found) == pytest.approx(len(whole.samples), abs=16 * 20)
    for clip in found:
        assert len(clip.samples) <= 160_000


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        (np.zeros(16_000), 8_000),  # nothing but silence: the middle
        (np.r_[np.ones(12_000), np.zeros(4_000)], 14_000),  # the middle of the only pause
        (np.r_[np.zeros(4_000), np.ones(12_000)], 2_000),
        (np.ones(16_000), 8_000),
        (np.ones(100), 50),  # less than one frame
    ],
)
def test_quietest_place(signal, expected):
    assert abs(_quietest(signal.astype(np.float32), 16_000) - expected) <= 320


def test_memory_does_not_grow_with_the_recording(tmp_path):
    """Two hours, of which the first and the last pieces are read: a piece's worth, not the 460 MB of the whole."""
    path, seconds = tmp_path / "long.wav", 7_200
    soundfile.write(path, np.zeros(16_000, np.int16), 16_000, subtype="PCM_16")
    header = bytearray(path.read_bytes()[:44])
    header[4:8], header[40:44] = (
        (36 + 32_000 * seconds).to_bytes(4, "little"),
        (32_000 * seconds).to_bytes(4, "little"),
    )
    with path.open("wb") as file:
        file.write(header)
        file.truncate(44 + 32_000 * seconds)  # a sparse file
    found = requests(path, soundfile.info(path).duration, 20.0)
    assert len(found) == pytest.approx(seconds / 15, rel=0.02)
    tracemalloc.start()
    clips = [len(read_clip(request).samples) for request in (*found[:3], *found[-3:])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(200_000 < count <= 320_000 for count in clips)
    assert peak < 30e6


def test_pieces_of_a_file_are_read_one_behind_the_other_in_one_opening(tmp_path, monkeypatch):
    """Also back to the beginning, and past a segment that cannot be: the clips are those that each alone would be."""
    path = tmp_path / "long.flac"
    soundfile.write(path, speech_with_pauses(61.37, 16_000), 16_000)
    found = requests(path, 61.37, 10.0)
    found = [*found, found[0], ClipRequest(str(path), 900.0, 1.0), found[3], ClipRequest(str(path)), found[-1]]
    alone = [None if request.offset_seconds == 900.0 else read_clip(request).audio_sha256 for request in found]
    opened, open_file = [], soundfile.SoundFile
    monkeypatch.setattr(soundfile, "SoundFile", lambda name: opened.append(name) or open_file(name))
    together = audio._read_clips(found)
    assert [clip[0] if isinstance(clip, tuple) else clip.audio_sha256 for clip in together] == [
        one or "bad_segment" for one in alone
    ]
    assert len(opened) == 2, "once, and again behind the error"
    tasks = list(
        audio._tasks((None, request) for request in [ClipRequest("a", 10.0 * n, 10.0, 10**9) for n in range(40)])
    )
    assert [len(task) for task in tasks] == [16, 16, 8]
    long = [ClipRequest("a", 1_800.0 * n, 1_800.0, 10**9) for n in range(3)]
    assert [len(task) for task in audio._tasks((None, request) for request in long)] == [1, 1, 1]
