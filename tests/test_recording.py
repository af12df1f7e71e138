"""Recordings of any length: the samples of prepare.py, in flat memory, and what is wrong with a file."""

import os
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import recording
from audio import ClipError, ClipRequest, read_clip
from recording import Recording, find_recordings, header_seconds


def noise(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), channels))


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [("a.wav", 16_000, 1), ("a.wav", 8_000, 2), ("a.flac", 44_100, 1), ("a.mp3", 32_000, 1), ("a.ogg", 48_000, 2)],
)
def test_samples_are_those_of_a_prepared_clip(
    name: str, rate: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks, ten seconds or one; an MP3 decoder rounds the last bit of a float otherwise in others."""
    path = tmp_path / name
    soundfile.write(path, noise(7.3, rate, channels), rate)
    expected = read_clip(ClipRequest(path)).samples
    for block, tolerance in ((10, 0), (1, int(name.endswith("mp3")))):
        monkeypatch.setattr(recording, "BLOCK_SECONDS", block)
        with Recording(str(path)) as found:
            assert found.num_samples == len(expected)
            assert found.shortfall_seconds == 0
            np.testing.assert_allclose(found.read(0, found.num_samples), expected, rtol=0, atol=tolerance)
            assert np.array_equal(found.read(1_000, 1_500), expected[1_000:1_500])
    assert header_seconds(str(path)) == pytest.approx(7.3, abs=0.1)


def test_an_hour_takes_no_more_memory_than_a_few_minutes(tmp_path: Path) -> None:
    peaks = []
    for minutes in (4, 60):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 16_000, 1) as file:
            for _ in range(minutes):
                file.write(noise(60, 16_000))
        tracemalloc.start()
        with Recording(str(path)) as found:
            assert found.seconds == 60 * minutes
            assert len(found.read(0, 480_000)) == 480_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        path.unlink()
    assert peaks[1] < 1.1 * peaks[0] < 30e6


def test_stdin_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.flac", noise(1, 16_000), 16_000)
    with (tmp_path / "a.flac").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with Recording("-") as found, Recording(str(tmp_path / "a.flac")) as expected:
            assert found.name == "stdin"
            assert np.array_equal(found.read(0, 16_000), expected.read(0, 16_000))


def test_a_pipe_is_read_as_a_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, 16_000), 16_000)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "a.wav").read_bytes()))
    writer.start()
    assert header_seconds(str(tmp_path / "pipe")) == 0, "asking for the length would take its beginning away"
    with Recording(str(tmp_path / "pipe")) as found, Recording(str(tmp_path / "a.wav")) as expected:
        writer.join()
        assert np.array_equal(found.read(0, 16_000), expected.read(0, 16_000))


def test_asking_for_the_length_of_stdin_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").touch()
    own, (reader, writer) = os.dup(0), os.pipe()
    os.write(writer, b"RIFF and more")
    os.dup2(reader, 0)
    try:
        assert header_seconds("-") == 0
        assert os.read(0, 100) == b"RIFF and more"
    finally:
        os.dup2(own, 0)
        for descriptor in (own, reader, writer):
            os.close(descriptor)


def test_a_closed_stdin_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ClipError, match="no such file"):
        Recording("-")


@pytest.mark.parametrize(
    ("name", "content", "reason", "detail"),
    [
        ("none.wav", None, "missing", "no such file"),
        ("text.wav", b"no audio at all", "undecodable", "Format not recognised."),
        ("empty.wav", b"", "undecodable", "Format not recognised."),
        ("headerless.raw", b"no audio at all", "undecodable", "samplerate must be specified"),
        ("nothing.wav", np.zeros((0, 1)), "empty", "no samples"),
        ("nan.wav", np.array([[0.1], [np.nan]]), "not_finite", "NaN or infinite samples behind 0 s"),
        ("folder", "folder", "undecodable", "Is a directory"),
    ],
)
def test_what_cannot_be_read_has_a_reason(
    name: str, content: bytes | np.ndarray | str | None, reason: str, detail: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        soundfile.write(path, content, 16_000, subtype="FLOAT")
    elif content == "folder":
        path.mkdir()
    with pytest.raises(ClipError) as caught:
        Recording(str(path))
    assert (caught.value.reason, caught.value.detail) == (reason, detail)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(50, 16_000), 16_000)
    os.truncate(path, path.stat().st_size // 2)
    with Recording(str(path)) as found:
        assert 15 < found.seconds <= 26
        assert found.shortfall_seconds == pytest.approx(50 - found.seconds, abs=0.05)


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.wav", "a.MP3", "notes.txt", "sub/c.flac", "sub/deep/d.ogg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert find_recordings(["sub"]) == ["sub/c.flac", "sub/deep/d.ogg"]
    assert find_recordings(["."]) == ["a.MP3", "b.wav", "sub/c.flac", "sub/deep/d.ogg"]
    assert find_recordings(["*.wav", "b.wav", "notes.txt", "-"]) == ["b.wav", "notes.txt", "-"]
    assert find_recordings([f"{tmp_path}/sub/**/*.ogg"]) == [f"{tmp_path}/sub/deep/d.ogg"]
    assert find_recordings(["none.wav", "none/*.wav"]) == ["none.wav", "none/*.wav"]
    Path("sub/folder.wav").mkdir()
    os.mkfifo("sub/pipe.wav")
    Path("sub/lost.wav").symlink_to("nowhere.wav")
    assert find_recordings(["sub"]) == ["sub/c.flac", "sub/deep/d.ogg", "sub/lost.wav"]
    Path("a[1].wav").touch()
    assert find_recordings(["a[1].wav"]) == ["a[1].wav"], "a file of that very name"
