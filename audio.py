"""Clips: from an audio file to 16 kHz mono int16, measured while in hand, in a pool of processes.

Dimension letters: S samples, C channels, F frames, W samples per frame, P output samples per step, K kernel taps.
"""

import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import soundfile

from errors import RunFailed

SAMPLE_RATE_HZ = 16_000
INT16_FULL_SCALE = 32_768
# Of 20 ms: a recording is cut in the middle of so many that are quiet; the closure of a stop has five at most.
QUIET_FRAMES = 11
# Longer clips are beyond every encoder's memory, and would be beyond ours while they are resampled.
MAX_CLIP_SECONDS = 1_800.0
# A segment may end this much after its file: manifests round offsets and durations.
SEGMENT_TOLERANCE_SECONDS = 0.1
# The "kaiser best" setting of torchaudio's resampling tutorial: as sharp as librosa's default.
RESAMPLING = {
    "resampling_method": "sinc_interp_kaiser",
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "beta": 14.769656459379492,
}
# Kernel of a rate with a small common divisor (44,101 Hz: 2.8 GB); sane rates need under 0.5 million values.
MAX_RESAMPLING_KERNEL = 20_000_000
POWER_FRAME_SAMPLES = SAMPLE_RATE_HZ * 20 // 1000
SILENCE_RELATIVE_POWER = 1e-5  # -50 dB
NOISE_QUANTILE = 0.1
SNR_MIN_FRAMES = 5
SNR_RANGE = (1e-2, 1e6)  # -20 to 60 dB
SPECTRUM_FRAME_SAMPLES = 512
BANDWIDTH_ENERGY_SHARE = 0.99
# Less than this share of the energy is noise of a resampler or of 16 bits: 8 kHz speech ends at 3.9 kHz by it in the
# quietest of 2,000 clips, wide-band speech (Common Voice MP3) above 6.6 kHz in the most muffled of 150.
NOISE_ENERGY_SHARE = 1e-5  # -50 dB
# Three successive samples at the extreme: what an overloaded converter leaves, and a single loud peak rarely.
CLIPPED_RUN_SAMPLES = 3
# Below it a flat top is 16-bit rounding, or a wave too quiet to have been cut.
CLIPPED_MIN_PEAK = 0.1
INT16_STEP = 1 / INT16_FULL_SCALE
ROUNDING_POWER = INT16_STEP**2 / 12
FRAMES_AT_ONCE = 4096
MIN_SAMPLES_PER_STEP = 64
READ_BLOCK_SECONDS = 60
# What a manifest may name beyond it (1e308 s) is no number of samples.
MAX_SAMPLES = 2**62
# libsndfile's log about the sound of a WAV, AIFF or AU file that is shorter than its header says.
SHORTENED = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
# Programs that write into a pipe cannot know the size: ffmpeg says 2**32 - 1, sox about 2**31.
STREAMED_BYTES = 2**31 - 2**16
CLIPS_PER_TASK = 16
# Limits what a task of long clips holds; MP3 grows about tenfold when it is decoded.
SOURCE_BYTES_PER_TASK = 4_000_000
SEGMENT_BYTES_PER_SECOND = SAMPLE_RATE_HZ * 2 // 10

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


class ClipError(ValueError):
    """A clip that cannot be used: `reason` is a key of `corpora.DROP_REASONS`, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """Where a clip lies: a file, or a segment of one.

    A bound with a reach is moved to the quietest place within so many seconds of it; the neighbour finds the same.
    """

    path: str
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    source_bytes: int = 0
    start_reach_seconds: float = 0.0
    end_reach_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Measures:
    """What is stored about a clip's sound, a column each; full scale is 1.

    All but `peak`, `dc_offset` and `clipping_fraction` are of the signal less its mean. A clip whose samples are all
    equal (zero or not) is the one with `rms` 0; its silence is the whole clip and its frequencies are 0.

    peak: largest |sample|.
    rms: root mean square.
    dc_offset: mean.
    clipping_fraction: share of samples, as decoded and mixed to mono but not yet resampled, in runs of three or more
        within one 16-bit step of the clip's own largest or smallest value, where that is at least 0.1. Catches audio
        cut at full scale, and audio that was cut and then made quieter; not what was cut and then resampled, coded
        (MP3 ripples where the tops were flat, and only what it throws over full scale counts) or filtered.
    silence_fraction: share of 20 ms frames with a power over 50 dB below that of the loudest frame.
    leading_silence_seconds: such frames before the first louder one; the whole clip if there is none.
    trailing_silence_seconds: such frames behind the last louder one; 0 if there is none.
    bandwidth_hz: the frequency below which 99 % of the energy lies.
    highest_frequency_hz: the frequency above which less than a 100,000th of the energy lies: where a recording at a
        lower rate, or a codec, ends.
    snr_db: estimated power of speech over noise, -20 to 60. The noise is the 10th percentile of the powers of 20 ms
        frames, the speech their mean less it; frames of one repeated value (digital silence) count for neither; NaN
        where fewer than five are left. Mean absolute error with white noise / babble at 0 to 20 dB under active speech
        (benchmarks/snr_estimate.py): 1.7 / 2.3 dB in sentences, 2.7 / 3.0 in single words. WADA-SNR (Kim & Stern 2008):
        1.5 / 1.2 and 4.4 / 4.6, but 33 +- 8 at 30 dB (this: 27 +- 1), and 60 if half of the clip is pause (25 +- 1).
        Reads 5 dB too high in babble at 0 dB, 4 too low in white noise if half of the clip is pause. What never pauses
        is noise to it, and so is the softest speech where all pauses are digital silence.
    """

    peak: float
    rms: float
    dc_offset: float
    clipping_fraction: float
    silence_fraction: float
    leading_silence_seconds: float
    trailing_silence_seconds: float
    bandwidth_hz: float
    highest_frequency_hz: float
    snr_db: float


@dataclass(frozen=True, slots=True)
class Clip:
    """A decoded clip: int16 samples [S], 16 kHz mono, and what was measured while it was in hand."""

    samples: np.ndarray
    measures: Measures
    source_rate_hz: int
    audio_sha256: str


def read_clip(request: ClipRequest) -> Clip:
    """Decode, mix to mono, resample and measure one clip.

    Raises:
        ClipError: undecodable, empty, not_finite, bad_segment or too_long.
    """
    with _LastFile() as last:
        return _read_clip(request, last)


class _LastFile(contextlib.AbstractContextManager):
    """Keeps a file open for its next segment: the first place in an MP3 of hours takes longer to find than to read."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._file: soundfile.SoundFile | None = None

    def open(self, path: str) -> soundfile.SoundFile:
        """The file at `path`, wherever it was left."""
        if path != self._path:
            self.close()
            self._file, self._path = soundfile.SoundFile(path), path
        return self._file

    def close(self) -> None:
        """What is open, if any."""
        if self._file is not None:
            self._file.close()
        self._file = self._path = None

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_clip(request: ClipRequest, last: _LastFile) -> Clip:
    try:
        file = last.open(request.path)
        rate = file.samplerate
        signal_S = _read_piece(file, request)
    except (soundfile.SoundFileError, OSError, TypeError, MemoryError) as error:
        # TypeError: soundfile takes names such as x.raw for headerless audio.
        raise ClipError("undecodable", " ".join(str(error).split()) or type(error).__name__) from None
    if not len(signal_S):
        raise ClipError("empty", "no samples")
    # A finite sum of squares tells it in a tenth of the time; loud nonsense may overflow one.
    if not math.isfinite(float(np.dot(signal_S, signal_S))) and not np.isfinite(signal_S).all():
        raise ClipError("not_finite", "NaN or infinite samples")
    samples_S = to_int16(resample(signal_S, rate))
    digest = hashlib.sha256(samples_S.astype("<i2", copy=False).tobytes()).hexdigest()
    return Clip(samples_S, measure(samples_S, signal_S), rate, digest)


def resample(signal_S: np.ndarray, rate_hz: int) -> np.ndarray:
    """float32 [S] at `rate_hz` to float32 at 16 kHz.

    Raises:
        ClipError: undecodable, for a rate that shares no useful divisor with 16,000.
    """
    return np.concatenate([np.zeros(0, np.float32), *resample_blocks([signal_S], rate_hz)])


def resample_blocks(blocks: Iterable[np.ndarray], rate_hz: int) -> Iterator[np.ndarray]:
    """A signal that comes in blocks, float32 [S] each, at 16 kHz: what `resample` makes of the whole, piece by piece.

    Raises:
        ClipError: as `resample`.
    """
    if rate_hz == SAMPLE_RATE_HZ:
        yield from blocks
        return
    kernel_P1K, width, source_step = _resampling_kernel(rate_hz)
    reach = kernel_P1K.shape[2]
    waiting_S, given, made = np.zeros(width, np.float32), 0, 0
    for block_S in blocks:
        given += len(block_S)
        waiting_S = np.concatenate([waiting_S, block_S])
        while len(waiting_S) >= (FRAMES_AT_ONCE - 1) * source_step + reach:
            yield _filter(waiting_S[: (FRAMES_AT_ONCE - 1) * source_step + reach], kernel_P1K, source_step)
            made += FRAMES_AT_ONCE * len(kernel_P1K)
            waiting_S = waiting_S[FRAMES_AT_ONCE * source_step :]
    left = -(-given * SAMPLE_RATE_HZ // rate_hz) - made
    if left > 0:
        # As far as the last sample that is wanted looks.
        steps = -(-left // len(kernel_P1K))
        missing = (steps - 1) * source_step + reach - len(waiting_S)
        yield from _last_pieces(np.pad(waiting_S, (0, max(missing, 0))), kernel_P1K, source_step, left)


def _last_pieces(
    waiting_S: np.ndarray, kernel_P1K: "torch.Tensor", source_step: int, left: int
) -> Iterator[np.ndarray]:
    while left > 0:
        steps = min(FRAMES_AT_ONCE, -(-left // len(kernel_P1K)))
        piece_S = _filter(waiting_S[: (steps - 1) * source_step + kernel_P1K.shape[2]], kernel_P1K, source_step)
        yield piece_S[:left]
        left -= len(piece_S)
        waiting_S = waiting_S[steps * source_step :]


def _filter(signal_S: np.ndarray, kernel_P1K: "torch.Tensor", source_step: int) -> np.ndarray:
    import torch

    with torch.inference_mode():
        blocks_PF = torch.nn.functional.conv1d(torch.from_numpy(signal_S)[None], kernel_P1K, stride=source_step)
    return blocks_PF.T.reshape(-1).numpy()


def measure(samples_S: np.ndarray, decoded_S: np.ndarray | None = None) -> Measures:
    """Measure int16 [S] at 16 kHz, S > 0.

    Args:
        samples_S: the clip.
        decoded_S: float32 [S'], full scale 1, before resampling, which rounds off what was clipped; None: the clip.
    """
    lowest, highest = int(samples_S.min()), int(samples_S.max())
    mean = float(samples_S.mean(dtype=np.float64)) / INT16_FULL_SCALE
    signal_S = samples_S.astype(np.float32)
    clipping_fraction = _clipping_fraction(signal_S / INT16_FULL_SCALE if decoded_S is None else decoded_S)
    signal_S *= np.float32(INT16_STEP)
    signal_S -= np.float32(mean)
    frames_FW = _frames(signal_S, POWER_FRAME_SAMPLES)
    power_F = np.einsum("fw,fw->f", frames_FW, frames_FW) / POWER_FRAME_SAMPLES
    num_silent, leading, trailing = _silent_frames(power_F)
    bandwidth_hz, highest_frequency_hz = _frequencies_hz(signal_S)
    return Measures(
        peak=max(highest, -lowest) / INT16_FULL_SCALE,
        rms=0.0 if lowest == highest else math.sqrt(float(np.dot(signal_S, signal_S)) / len(signal_S)),
        dc_offset=mean,
        clipping_fraction=clipping_fraction,
        silence_fraction=num_silent / len(power_F),
        leading_silence_seconds=leading * POWER_FRAME_SAMPLES / SAMPLE_RATE_HZ,
        trailing_silence_seconds=trailing * POWER_FRAME_SAMPLES / SAMPLE_RATE_HZ,
        bandwidth_hz=bandwidth_hz,
        highest_frequency_hz=highest_frequency_hz,
        snr_db=_snr_db(samples_S, power_F),
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ClipPool:
    """Processes that decode clips; results come back in order and few of them are under way at a time.

    A context manager. Processes start with the first clip, or with `warm_up`.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._executor: ProcessPoolExecutor | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ClipPool":
        return self

    def warm_up(self) -> None:
        """Start the processes now: their imports take 3 s that can pass beside other work."""
        if self._executor is not None:
            return
        self._stack.enter_context(without_main_module())
        with without_interrupts():
            self._executor = ProcessPoolExecutor(
                self.num_workers,
                mp_context=fork_server("soundfile", "torchaudio.transforms"),
                initializer=_initialize_worker,
            )
            for _ in range(self.num_workers):
                self._executor.submit(_import_resampling)

    def read(self, items: Iterable[tuple[Item, ClipRequest | None]]) -> Iterator[tuple[Item, Clip | ClipError | None]]:
        """Decode the request of each item; an item without a request passes through in its place.

        Raises:
            RunFailed: a process died (memory, or a file that crashes the decoder).
        """
        under_way: deque = deque()
        for task in _tasks(items):
            self.warm_up()
            requests = [request for _, request in task if request is not None]
            under_way.append((task, self._executor.submit(_read_clips, requests) if requests else None))
            if len(under_way) > 2 * self.num_workers:
                yield from _collect(*under_way.popleft())
        while under_way:
            yield from _collect(*under_way.popleft())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._stack.close()


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Start child processes that do not import the command again.

    multiprocessing runs the main script's imports in every child; for train.py those take 8 s and 500 MB.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the block is over; processes started inside never see it, not even while they import.

    For the main thread.
    """
    resource_tracker.ensure_running()  # it would let signals through again when it starts
    held_back = []
    handler = signal.signal(signal.SIGINT, lambda *_: held_back.append(True))
    # Handlers end with exec, a mask is inherited; and other threads of this process do not have the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held_back:
            signal.raise_signal(signal.SIGINT)


def fork_server(*modules: str) -> multiprocessing.context.BaseContext:
    """How child processes start; those of the first pool of a process import `modules` once for all."""
    # Never fork: the caller may hold threads (torch, pyarrow). A fork server is as safe and imports torch only once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def end_with_parent_process() -> None:
    """A worker must not outlive its parent, however that dies."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _initialize_worker() -> None:
    end_with_parent_process()
    # The MP3 decoder writes several lines about every damaged file; what matters comes back as an error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _exit_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _import_resampling() -> None:
    import torch
    import torchaudio.transforms  # noqa: F401

    torch.set_num_threads(1)


@functools.lru_cache(maxsize=8)
def _resampling_kernel(rate_hz: int) -> tuple["torch.Tensor", int, int]:
    """The kernel [P, 1, K] of torchaudio for P output samples at once, its reach, and the source samples of one step.

    torchaudio computes as many output samples per step as the reduced rate has (1 for 32 kHz); the same taps shifted
    to 64 or more of them make the convolution a matrix product: the same samples, 2 ms instead of 24 for a 10 s clip.
    """
    _import_resampling()
    import torch
    import torchaudio.transforms

    divisor = math.gcd(rate_hz, SAMPLE_RATE_HZ)
    source_step, target_step = rate_hz // divisor, SAMPLE_RATE_HZ // divisor
    if source_step * target_step > MAX_RESAMPLING_KERNEL:
        raise ClipError("undecodable", f"a sample rate of {rate_hz} Hz; convert it to a usual rate first")
    resampler = torchaudio.transforms.Resample(rate_hz, SAMPLE_RATE_HZ, **RESAMPLING)
    taps_P1K = resampler.kernel
    repeats = -(-MIN_SAMPLES_PER_STEP // target_step)
    kernel_P1K = torch.zeros(repeats * target_step, 1, taps_P1K.shape[2] + (repeats - 1) * source_step)
    for repeat in range(repeats):
        shift = repeat * source_step
        rows = slice(repeat * target_step, (repeat + 1) * target_step)
        kernel_P1K[rows, :, shift : shift + taps_P1K.shape[2]] = taps_P1K
    return kernel_P1K, resampler.width, repeats * source_step


def _read_clips(requests: list[ClipRequest]) -> list[Clip | tuple[str, str]]:
    results = []
    with _LastFile() as last:
        for request in requests:
            try:
                results.append(_read_clip(request, last))
            except ClipError as error:
                last.close()
                results.append((error.reason, error.detail))
    return results


def _tasks(items: Iterable[tuple[Item, ClipRequest | None]]) -> Iterator[list[tuple[Item, ClipRequest | None]]]:
    task, source_bytes = [], 0
    for item, request in items:
        task.append((item, request))
        source_bytes += _weight(request) if request else 0
        if len(task) == CLIPS_PER_TASK or source_bytes >= SOURCE_BYTES_PER_TASK:
            yield task
            task, source_bytes = [], 0
    if task:
        yield task


def _weight(request: ClipRequest) -> float:
    """Bytes of the file that the clip takes, for SOURCE_BYTES_PER_TASK."""
    if request.duration_seconds is None:
        return request.source_bytes
    return min(request.source_bytes, request.duration_seconds * SEGMENT_BYTES_PER_SECOND)


def _collect(task: list, future) -> Iterator[tuple]:
    try:
        results = iter(future.result() if future else ())
    except BrokenProcessPool:
        paths = [request.path for _, request in task if request is not None]
        raise RunFailed(
            f"a decoding process died near {paths[0]} .. {paths[-1]}: out of memory, or a file that crashes the "
            "decoder; finished parts are kept, run the same command again, with a smaller --num_workers"
        ) from None
    for item, request in task:
        result = next(results) if request is not None else None
        yield item, ClipError(*result) if isinstance(result, tuple) else result


def _read_piece(file: soundfile.SoundFile, request: ClipRequest) -> np.ndarray:
    """Samples of the segment as float32 [S], with bounds that have a reach where it is quiet."""
    before, after = request.start_reach_seconds, request.end_reach_seconds
    if not before and not after:
        return _read_mono(file, request)
    duration = None if request.duration_seconds is None else request.duration_seconds + before + after
    wider = replace(request, offset_seconds=request.offset_seconds - before, duration_seconds=duration)
    signal_S = _read_mono(file, wider)
    at_start, at_end = (round(2 * reach * file.samplerate) for reach in (before, after))
    first = _quietest(signal_S[:at_start], file.samplerate) if before else 0
    behind_end = len(signal_S) - at_end
    return signal_S[first : behind_end + _quietest(signal_S[behind_end:], file.samplerate) if after else None]


def _quietest(signal_S: np.ndarray, rate_hz: int) -> int:
    """The sample in whose neighbourhood of QUIET_FRAMES there is the least power; of several the most central one."""
    width = max(rate_hz * 20 // 1000, 1)
    frames_FW = _frames(signal_S, width)
    power_F = np.einsum("fw,fw->f", frames_FW, frames_FW)
    count = min(QUIET_FRAMES, len(power_F))
    sums = np.lib.stride_tricks.sliding_window_view(power_F, count).sum(axis=1)
    quiet = np.flatnonzero(sums == sums.min())
    chosen = quiet[np.argmin(np.abs(quiet - (len(sums) - 1) / 2))]
    return min(int(chosen) * width + count * width // 2, len(signal_S))


def _read_mono(file: soundfile.SoundFile, request: ClipRequest) -> np.ndarray:
    """Samples of the segment as float32 [S]. Read in blocks: the length in a header is not to be trusted."""
    rate = file.samplerate
    first = round(min(request.offset_seconds * rate, MAX_SAMPLES))
    wanted = math.inf if request.duration_seconds is None else round(min(request.duration_seconds * rate, MAX_SAMPLES))
    if first or file.tell():
        if first and first >= file.frames:
            raise ClipError("bad_segment", f"starts at {request.offset_seconds} s of {file.frames / rate:.2f} s")
        file.seek(first)
    blocks, count, longest = [], 0, MAX_CLIP_SECONDS * rate
    while count < wanted:
        block_SC = file.read(int(min(READ_BLOCK_SECONDS * rate, wanted - count)), dtype="float32", always_2d=True)
        if not len(block_SC):
            break
        blocks.append(block_SC.mean(axis=1) if block_SC.shape[1] > 1 else block_SC[:, 0])
        count += len(block_SC)
        if count > longest:
            raise ClipError("too_long", f"over {MAX_CLIP_SECONDS:.0f} s; cut it, or give offset and duration")
    if wanted - count > SEGMENT_TOLERANCE_SECONDS * rate and wanted != math.inf:
        found = f"{request.offset_seconds:g} s + {request.duration_seconds:g} s ends after the file"
        raise ClipError("bad_segment", f"{found}, at {(first + count) / rate:.2f} s")
    frames = declared_frames(file)
    if wanted == math.inf and count and SEGMENT_TOLERANCE_SECONDS * rate < frames - first - count < longest:
        # Half a clip under a whole transcript would teach (and score) deletions.
        raise ClipError("undecodable", f"breaks off at {count / rate:.2f} s of {(frames - first) / rate:.2f} s")
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def declared_frames(file: soundfile.SoundFile) -> int:
    """Frames that the header promises: of a PCM file that breaks off libsndfile keeps the figure in its log alone."""
    shortened = SHORTENED.search(file.extra_info)
    if shortened is None:
        return file.frames
    declared, found = map(int, shortened.groups())
    return file.frames if declared >= STREAMED_BYTES or not found else round(file.frames * declared / found)


def to_int16(signal_S: np.ndarray) -> np.ndarray:
    """float32 [S], full scale 1, to the nearest int16 [S]; what lies beyond full scale is cut off."""
    scaled = signal_S * np.float32(INT16_FULL_SCALE)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -INT16_FULL_SCALE, INT16_FULL_SCALE - 1, out=scaled)
    return scaled.astype(np.int16)


def _frames(signal_S: np.ndarray, width: int) -> np.ndarray:
    """Whole frames [F, W]; a signal under one frame is filled with zeros to one."""
    if len(signal_S) < width:
        signal_S = np.pad(signal_S, (0, width - len(signal_S)))
    return signal_S[: len(signal_S) // width * width].reshape(-1, width)


def _clipping_fraction(signal_S: np.ndarray) -> float:
    """See `Measures`; what a decoder throws over full scale counts as full scale."""
    highest, lowest = float(signal_S.max()), -float(signal_S.min())
    if highest == -lowest:
        return 0.0  # constant: flat, but nothing was cut
    highest, lowest = (min(extreme, 1 - INT16_STEP) for extreme in (highest, lowest))
    clipped = 0
    if highest >= CLIPPED_MIN_PEAK:
        clipped += _count_in_runs(signal_S >= np.float32(highest - INT16_STEP))
    if lowest >= CLIPPED_MIN_PEAK:
        clipped += _count_in_runs(signal_S <= -np.float32(lowest - INT16_STEP))
    return clipped / len(signal_S)


def _count_in_runs(at_limit_S: np.ndarray) -> int:
    """Samples that are true in runs of CLIPPED_RUN_SAMPLES or more."""
    places = np.flatnonzero(at_limit_S)
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    lengths = np.diff(np.concatenate(([0], breaks, [len(places)])))
    return int(lengths[lengths >= CLIPPED_RUN_SAMPLES].sum())


def _silent_frames(power_F: np.ndarray) -> tuple[int, int, int]:
    """Frames over 50 dB below the loudest: all, those before the first louder one, those behind the last."""
    loud_F = np.flatnonzero((power_F >= power_F.max() * SILENCE_RELATIVE_POWER) & (power_F > 0))
    if not len(loud_F):
        return len(power_F), len(power_F), 0
    return len(power_F) - len(loud_F), int(loud_F[0]), len(power_F) - 1 - int(loud_F[-1])


def _snr_db(samples_S: np.ndarray, power_F: np.ndarray) -> float:
    """See `Measures`; `power_F` is that of the int16 samples' frames."""
    frames_FW = _frames(samples_S, POWER_FRAME_SAMPLES)
    power_F = np.sort(power_F[frames_FW.min(axis=1) != frames_FW.max(axis=1)])
    if len(power_F) < SNR_MIN_FRAMES:
        return math.nan
    noise = max(float(power_F[int(NOISE_QUANTILE * len(power_F))]), ROUNDING_POWER)
    return 10 * math.log10(np.clip(float(power_F.mean()) / noise - 1, *SNR_RANGE))


def _frequencies_hz(signal_S: np.ndarray) -> tuple[float, float]:
    """Below which 99 % and all but a 100,000th of the energy lie; zeros if there is none."""
    import torch

    frames_FW = _frames(signal_S, SPECTRUM_FRAME_SAMPLES)
    window_W = np.hanning(SPECTRUM_FRAME_SAMPLES).astype(np.float32)
    squares = np.zeros(SPECTRUM_FRAME_SAMPLES + 2)
    for start in range(0, len(frames_FW), FRAMES_AT_ONCE):
        # numpy's own transform takes ten times as long; abs() would take a root for each bin.
        spectrum = torch.fft.rfft(torch.from_numpy(frames_FW[start : start + FRAMES_AT_ONCE] * window_W))
        parts = torch.view_as_real(spectrum).flatten(1).numpy()
        squares += np.einsum("fk,fk->k", parts, parts)
    cumulative = np.cumsum(squares.reshape(-1, 2).sum(axis=1))
    if cumulative[-1] == 0.0:
        return 0.0, 0.0
    shares = np.array((BANDWIDTH_ENERGY_SHARE, 1 - NOISE_ENERGY_SHARE))
    bandwidth, highest = np.searchsorted(cumulative, shares * cumulative[-1]) * SAMPLE_RATE_HZ / SPECTRUM_FRAME_SAMPLES
    return float(bandwidth), float(highest)
