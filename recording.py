"""Audio files of any length: decoded block by block onto the disk, read back as the stretches that are asked for.

S: samples.
"""

import contextlib
import glob
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

from atomic import reporting_disk_errors
from audio import SAMPLE_RATE_HZ, SEGMENT_TOLERANCE_SECONDS, ClipError, declared_frames, resample_blocks, to_int16

# Of the formats that libsndfile reads, those that hold speech in the field.
AUDIO_SUFFIXES = frozenset({".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"})
STDIN = "-"
STDIN_NAME = "stdin"
# What is lost at most where a compressed file is damaged.
BLOCK_SECONDS = 10
INT16_BYTES = 2
# SF_COUNT_MAX, which libsndfile gives for a stream without a length (sndfile.h).
UNKNOWN_LENGTH = 2**63 - 1


class Recording:
    """One file as 16 kHz mono int16, whose samples lie in a temporary file: an hour of it takes 115 MB of disk.

    A context manager.

    Attributes:
        name: as the user gave it, readable.
        num_samples: at 16 kHz.
        shortfall_seconds: what its header promises and the file does not hold; 0 where it is whole.
    """

    def __init__(self, name: str) -> None:
        """Decode a file, or what stands on stdin for `-`.

        Raises:
            ClipError: missing, undecodable, empty or not_finite.
            RunFailed: no room for the samples in the temporary folder.
        """
        self.name = STDIN_NAME if name == STDIN else readable(name)
        self.num_samples, self.shortfall_seconds = 0, 0.0
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed with the recording
        try:
            self._decode(name)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.num_samples / SAMPLE_RATE_HZ

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples start .. stop, int16 [S]."""
        self._file.seek(start * INT16_BYTES)
        return np.frombuffer(self._file.read((stop - start) * INT16_BYTES), np.int16)

    def _decode(self, name: str) -> None:
        try:
            with contextlib.ExitStack() as stack, soundfile.SoundFile(_open(name, stack)) as file:
                for block_S in resample_blocks(self._mono_blocks(file), file.samplerate):
                    self._store(to_int16(block_S))
        except FileNotFoundError:
            raise ClipError("missing", "no such file") from None
        except (soundfile.SoundFileError, OSError, TypeError, MemoryError) as error:
            # TypeError: soundfile takes names such as x.raw for headerless audio.
            raise ClipError("undecodable", _reason(error)) from None
        if not self.num_samples:
            raise ClipError("empty", "no samples")

    def _mono_blocks(self, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
        """float32 [S] at the file's rate; the length in a header is not to be trusted."""
        count = 0
        while len(block_SC := self._read_block(file, is_first=not count)):
            if not np.isfinite(block_SC).all():
                raise ClipError("not_finite", f"NaN or infinite samples behind {count / file.samplerate:.0f} s")
            count += len(block_SC)
            yield block_SC.mean(axis=1) if block_SC.shape[1] > 1 else np.ascontiguousarray(block_SC[:, 0])
        shortfall = (declared_frames(file) - count) / file.samplerate
        if shortfall > SEGMENT_TOLERANCE_SECONDS and declared_frames(file) < UNKNOWN_LENGTH:
            self.shortfall_seconds = shortfall

    @staticmethod
    def _read_block(file: soundfile.SoundFile, is_first: bool) -> np.ndarray:
        """The next frames, float32 [S, C]; none where a file that has begun well cannot be decoded any further."""
        try:
            return file.read(BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)
        except soundfile.SoundFileError:
            if is_first:
                raise
            return np.zeros((0, file.channels), np.float32)

    def _store(self, samples_S: np.ndarray) -> None:
        with reporting_disk_errors(Path(tempfile.gettempdir()), samples_S.nbytes):
            self._file.write(samples_S.tobytes())
        self.num_samples += len(samples_S)


def find_recordings(arguments: Sequence[str]) -> list[str]:
    """Files, folders (all audio inside, by name) and patterns as a list of files, each once; `-` is stdin.

    A name that is none of these stays: opening it says that it is missing.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN or path.is_file():
            names = [argument]
        elif path.is_dir():
            names = sorted(str(file) for file in path.rglob("*") if _holds_audio(file))
        else:
            names = sorted(glob.glob(argument, recursive=True)) or [argument]  # noqa: PTH207 - patterns may be absolute
        found |= dict.fromkeys(names)
    return list(found)


def _holds_audio(path: Path) -> bool:
    """By its name; a link that leads nowhere is kept, so that it is named."""
    return path.suffix.lower() in AUDIO_SUFFIXES and (path.is_file() or not path.exists())


def header_seconds(name: str) -> float:
    """What a file says of its length, to batch files of like length; 0 where it says nothing, or is no file."""
    if name == STDIN or not Path(name).is_file():  # libsndfile knows "-" too, and reads what it stands for.
        return 0.0
    try:
        info = soundfile.info(os.fsencode(name))
    except (soundfile.SoundFileError, OSError, TypeError):
        return 0.0
    return info.frames / info.samplerate if info.frames < UNKNOWN_LENGTH else 0.0


def readable(name: str) -> str:
    """The name of a file as text: bytes that are not UTF-8, which Python keeps as surrogates, cannot be written out."""
    return os.fsencode(name).decode("utf-8", "replace")


def _open(name: str, stack: contextlib.ExitStack) -> bytes | io.BufferedIOBase:
    """What libsndfile opens: the file, or a copy of what comes through a pipe; most formats are read with jumps."""
    # `open` names the trouble where libsndfile says "System error".
    source = stack.enter_context(_stdin() if name == STDIN else io.FileIO(name))
    if name != STDIN and source.seekable():
        return os.fsencode(name)
    copy = stack.enter_context(tempfile.TemporaryFile("w+b"))  # noqa: SIM115 - closed with the stack
    with reporting_disk_errors(Path(tempfile.gettempdir())):
        shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def _stdin() -> io.FileIO:
    """Without Python's buffer, whose lock a thread that waits for input would hold when Ctrl-C ends the process."""
    if sys.stdin is None:
        raise FileNotFoundError
    return io.FileIO(sys.stdin.fileno(), closefd=False)


def _reason(error: Exception) -> str:
    """Without the name of the file, which is said beside it."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
