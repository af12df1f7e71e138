"""Waveform augmentation: an utterance is said faster, in a room, in noise, over a narrow line, louder, with gaps.

S samples of an utterance, N utterances. Signals are float32 [S] at 16 kHz, full scale 1. Every draw is a function of
(seed, epoch, utterance, how often it came before in the epoch) and of the change itself, so that neither workers,
processes and resumes nor another change alter it.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
import torchaudio.functional

from audio import INT16_STEP, MAX_RESAMPLING_KERNEL, SAMPLE_RATE_HZ, resample
from errors import UsageError
from levers import GENERATED_NOISES, SIMULATED_ROOM, Augmentation
from model import num_frames
from recording import AUDIO_SUFFIXES

if TYPE_CHECKING:
    from data import ShardDataset

# Each change draws from a stream of its own, as masks do; see data.FIRST_VIEW.
SPEED, ROOM, NOISE, BAND, VOLUME, GAPS = range(1, 7)
BABBLE_VOICES = (3, 7)
# The direct sound of a simulated room is louder than its echoes together by -3 to 9 dB: a metre or two away.
DIRECT_TO_REVERBERANT_DB = (-3.0, 9.0)
# Longer responses are cut: after two seconds nothing is left of a room where people record speech.
MAX_RESPONSE_SECONDS = 2.0
# Energy falls by 60 dB in the reverberation time: amplitudes by exp(-6.9 t / T).
DECAY_OF_60_DB = 3 * np.log(10)
# Width of the slope at the edge of a limited band, as a share of its frequency.
BAND_SLOPE = 0.1
SECONDS_PER_GAP = 2.0


def speed_length(num_samples: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Samples of utterances that are said `factor` times as fast, [N]: what `change_speed` returns."""
    rates = np.rint(np.asarray(factor) * SAMPLE_RATE_HZ).astype(np.int64)
    return -(-np.asarray(num_samples, np.int64) * SAMPLE_RATE_HZ // rates)


def change_speed(signal_S: np.ndarray, factor: float) -> np.ndarray:
    """Faster or slower, and higher or lower with it, as a tape (https://www.isca-archive.org/interspeech_2015/ko15_interspeech.html).

    The signal is taken to have been recorded at `factor` times its rate.
    """
    return resample(signal_S, round(factor * SAMPLE_RATE_HZ))


def white_noise(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Equal power at all frequencies."""
    return rng.standard_normal(num_samples, np.float32)


def pink_noise(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Power that falls with the frequency, 3 dB an octave: most noises of rooms and machines are nearer to it."""
    spectrum = torch.fft.rfft(torch.from_numpy(white_noise(_fast_length(num_samples), rng)))
    spectrum[1:] /= torch.arange(1, len(spectrum)).sqrt()
    spectrum[0] = 0.0
    return torch.fft.irfft(spectrum)[:num_samples].numpy()


def add_noise(signal_S: np.ndarray, noise_S: np.ndarray, snr_db: float) -> np.ndarray:
    """The sum of both, the noise scaled so that the powers over all S have this ratio; a silent one adds nothing."""
    if not np.any(signal_S) or not np.any(noise_S):
        return signal_S
    pair = torch.from_numpy(signal_S)[None], torch.from_numpy(noise_S)[None]
    return torchaudio.functional.add_noise(*pair, torch.tensor([snr_db]))[0].numpy()


def simulate_response(seconds: float, direct_to_reverberant_db: float, rng: np.random.Generator) -> np.ndarray:
    """Impulse response of a room: the direct sound, and noise that decays by 60 dB in `seconds`.

    Polack's model of late reverberation (doctoral thesis, Universite du Maine, 1988), of which early echoes are not a
    part.
    """
    length = min(round(seconds * SAMPLE_RATE_HZ), round(MAX_RESPONSE_SECONDS * SAMPLE_RATE_HZ))
    decay = np.exp(-DECAY_OF_60_DB / seconds * np.arange(length, dtype=np.float32) / SAMPLE_RATE_HZ)
    response = white_noise(length, rng) * decay.astype(np.float32)
    response[0] = 0.0
    power = max(float(np.dot(response, response)), 1e-12)
    response *= np.float32(10 ** (-direct_to_reverberant_db / 20) / np.sqrt(power))
    response[0] = 1.0
    return response


def reverberate(signal_S: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The signal in the room of this response, [S]: the loudest sound of the response stays where it was in time."""
    direct = int(np.argmax(np.abs(response)))
    if not response[direct]:  # a recording that begins with seconds of silence
        return signal_S
    # torchaudio's fftconvolve transforms just so many samples, which is six times as slow for most lengths.
    length = _fast_length(len(signal_S) + len(response) - 1)
    pair = (torch.from_numpy(one) for one in (signal_S, response / np.abs(response[direct])))
    product = math.prod(torch.fft.rfft(one, length) for one in pair)
    return torch.fft.irfft(product, length)[direct : direct + len(signal_S)].numpy()


def limit_band(signal_S: np.ndarray, highest_hz: float) -> np.ndarray:
    """Without what lies above `highest_hz`: a raised cosine from there to BAND_SLOPE beyond, no shift in time."""
    length = _fast_length(len(signal_S))
    spectrum = torch.fft.rfft(torch.from_numpy(signal_S), length)
    hz = torch.fft.rfftfreq(length, 1 / SAMPLE_RATE_HZ)
    above = ((hz - highest_hz) / (BAND_SLOPE * highest_hz)).clamp(0, 1)
    return torch.fft.irfft(spectrum * (0.5 + 0.5 * torch.cos(torch.pi * above)))[: len(signal_S)].numpy()


def move_volume(signal_S: np.ndarray, start_db: float, end_db: float) -> np.ndarray:
    """The level goes from one gain to the other, linearly in dB."""
    return signal_S * (10 ** (np.linspace(start_db, end_db, len(signal_S), dtype=np.float32) / 20)).astype(np.float32)


def cut_gaps(signal_S: np.ndarray, gaps: Sequence[tuple[int, int]]) -> np.ndarray:
    """Silence from each start to its stop, samples."""
    signal_S = signal_S.copy()
    for start, stop in gaps:
        signal_S[start:stop] = 0.0
    return signal_S


@dataclass(frozen=True)
class Sounds:
    """Generated kinds by name, and recordings by path, of which one is drawn."""

    sources: tuple[str | tuple[Path, ...], ...]
    """Each as likely as the others; of a folder each file."""

    @classmethod
    def find(cls, named: Sequence[str], generated: Sequence[str], flag: str) -> "Sounds":
        """By names of generated kinds and of folders.

        Raises:
            UsageError: neither, or a folder without a readable recording.
        """
        return cls(tuple(name if name in generated else _find_recordings(name, generated, flag) for name in named))

    def draw(self, rng: np.random.Generator) -> str | Path:
        """A kind or a recording."""
        source = self.sources[rng.integers(len(self.sources))]
        return source if isinstance(source, str) else source[rng.integers(len(source))]

    @property
    def fingerprint(self) -> str:
        """Of all files' places and sizes: what a resume compares."""
        said = [
            source if isinstance(source, str) else [(path.name, path.stat().st_size) for path in source]
            for source in self.sources
        ]
        return hashlib.sha256(repr(said).encode()).hexdigest()


@dataclass(frozen=True)
class Augmenter:
    """What the settings ask for, for each training utterance.

    Attributes:
        settings: which changes, how often, how strong.
        seed: of the run.
        dataset: the training split, whose utterances babble.
        rows: those of them that train, [N].
        required_frames: that CTC needs for each row of the dataset.
        hf_config: of the encoder, for its frames.
        noises, rooms: what is drawn from.
    """

    settings: Augmentation
    seed: int
    dataset: "ShardDataset"
    rows: np.ndarray
    required_frames: np.ndarray
    hf_config: object
    noises: Sounds
    rooms: Sounds

    @classmethod
    def of(
        cls,
        settings: Augmentation,
        seed: int,
        dataset: "ShardDataset",
        rows: np.ndarray,
        required_frames: np.ndarray,
        hf_config: object,
    ) -> "Augmenter | None":
        """None where nothing is asked for.

        Raises:
            UsageError: a folder of noises or rooms that has none.
        """
        if not settings.augments:
            return None
        noises = Sounds.find(settings.augment_noise, GENERATED_NOISES, "augment_noise")
        rooms = Sounds.find(settings.augment_reverb, (SIMULATED_ROOM,), "augment_reverb")
        return cls(settings, seed, dataset, rows, required_frames, hf_config, noises, rooms)

    @property
    def fingerprint(self) -> str:
        """Of the recordings that are drawn from."""
        return self.noises.fingerprint + self.rooms.fingerprint

    def possible_lengths(self, num_samples: np.ndarray) -> np.ndarray:
        """What utterances of these lengths can become, all of them at each factor, one behind the other."""
        factors = dict.fromkeys([1.0, *self.settings.augment_speed])
        return np.concatenate([speed_length(num_samples, factor) for factor in factors])

    def speeds(self, rows: np.ndarray, epoch: int, copies: np.ndarray) -> np.ndarray:
        """The factor of each utterance, [N]; 1 where fewer frames would be left than CTC needs."""
        factors = self.settings.augment_speed
        if not factors:
            return np.ones(len(rows))
        drawn = np.array(
            [
                factors[self._generator(row, epoch, copy, SPEED).integers(len(factors))]
                for row, copy in zip(rows, copies, strict=True)
            ]
        )
        samples = speed_length(self.dataset.num_samples[rows], drawn)
        frames = num_frames(samples, self.hf_config.conv_kernel, self.hf_config.conv_stride)
        return np.where(frames >= self.required_frames[rows], drawn, 1.0)

    def lengths(self, rows: np.ndarray, epoch: int, copies: np.ndarray) -> np.ndarray:
        """Samples that the utterances of an update will have, [N]: known before any is read, for the cuts."""
        return speed_length(self.dataset.num_samples[rows], self.speeds(rows, epoch, copies))

    def __call__(self, signal_S: np.ndarray, row: int, epoch: int, copy: int) -> np.ndarray:
        """The utterance of this row as the epoch hears it."""
        settings = self.settings
        factor = float(self.speeds(np.array([row]), epoch, np.array([copy]))[0])
        if factor != 1.0:
            signal_S = change_speed(signal_S, factor)
        for stream, is_on, share, change in (
            (ROOM, settings.augment_reverb, settings.augment_reverb_probability, self._reverberate),
            (NOISE, settings.augment_noise, settings.augment_noise_probability, self._add_noise),
            (BAND, settings.augment_band_hz, settings.augment_band_probability, self._limit_band),
            (VOLUME, settings.augment_volume_db, 1.0, self._move_volume),
            (GAPS, settings.augment_gap_seconds, settings.augment_gap_probability, self._cut_gaps),
        ):
            if is_on:
                rng = self._generator(row, epoch, copy, stream)
                if rng.random() < share:
                    signal_S = change(signal_S, row, rng)
        return signal_S

    def _generator(self, row: int, epoch: int, copy: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, int(row), int(copy), stream])

    def _reverberate(self, signal_S: np.ndarray, _: int, rng: np.random.Generator) -> np.ndarray:
        room = self.rooms.draw(rng)
        if isinstance(room, Path):
            return reverberate(signal_S, _read_part(room, round(MAX_RESPONSE_SECONDS * SAMPLE_RATE_HZ)))
        seconds = rng.uniform(*self.settings.augment_reverb_seconds)
        return reverberate(signal_S, simulate_response(seconds, rng.uniform(*DIRECT_TO_REVERBERANT_DB), rng))

    def _add_noise(self, signal_S: np.ndarray, row: int, rng: np.random.Generator) -> np.ndarray:
        snr_db = rng.uniform(*self.settings.augment_noise_snr_db)
        source = self.noises.draw(rng)
        if isinstance(source, Path):
            noise_S = _read_part(source, len(signal_S), rng)
        elif source == "babble":
            noise_S = self._babble(len(signal_S), row, rng)
        else:
            noise_S = (white_noise if source == "white" else pink_noise)(len(signal_S), rng)
        return add_noise(signal_S, noise_S, snr_db)

    def _babble(self, num_samples: int, row: int, rng: np.random.Generator) -> np.ndarray:
        """Other utterances of the training set at once, each at the same power, repeated where too short."""
        noise_S = np.zeros(num_samples, np.float32)
        # One more than are wanted, for the utterance itself may be among them.
        count = int(rng.integers(BABBLE_VOICES[0], BABBLE_VOICES[1] + 1))
        drawn = self.rows[rng.integers(len(self.rows), size=count + 1)]
        for other in drawn[drawn != row][:count]:
            voice_S = self.dataset[int(other)].audio.astype(np.float32) * np.float32(INT16_STEP)
            voice_S = _fill(voice_S, num_samples, rng)
            noise_S += voice_S / max(float(np.sqrt(np.dot(voice_S, voice_S))), 1e-6)
        return noise_S

    def _limit_band(self, signal_S: np.ndarray, _: int, rng: np.random.Generator) -> np.ndarray:
        return limit_band(signal_S, rng.uniform(*self.settings.augment_band_hz))

    def _move_volume(self, signal_S: np.ndarray, _: int, rng: np.random.Generator) -> np.ndarray:
        reach = self.settings.augment_volume_db
        return move_volume(signal_S, rng.uniform(-reach, reach), rng.uniform(-reach, reach))

    def _cut_gaps(self, signal_S: np.ndarray, _: int, rng: np.random.Generator) -> np.ndarray:
        gaps, longest = [], self.settings.augment_gap_seconds * SAMPLE_RATE_HZ
        for _ in range(-(-len(signal_S) // round(SECONDS_PER_GAP * SAMPLE_RATE_HZ))):
            start = int(rng.integers(len(signal_S)))
            gaps.append((start, start + round(rng.uniform(0, longest))))
        return cut_gaps(signal_S, gaps)


def _find_recordings(name: str, generated: Sequence[str], flag: str) -> tuple[Path, ...]:
    """All recordings below a folder, each of which can be opened."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--{flag} {name}: neither {', '.join(generated)} nor a folder of recordings")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise UsageError(f"--{flag} {name}: the folder holds no recording ({', '.join(sorted(AUDIO_SUFFIXES))})")
    for path in found:
        try:
            info = soundfile.info(os.fsencode(path))
        except (soundfile.SoundFileError, OSError) as error:
            raise UsageError(f"--{flag} {name}: {path.name} cannot be read ({error}); take it out") from error
        divisor = np.gcd(info.samplerate, SAMPLE_RATE_HZ)
        if info.frames < 1 or info.samplerate * SAMPLE_RATE_HZ // divisor**2 > MAX_RESAMPLING_KERNEL:
            raise UsageError(
                f"--{flag} {name}: {path.name} has {info.frames} samples at {info.samplerate} Hz; convert it to a "
                "usual rate, or take it out"
            )
    return tuple(found)


def _read_part(path: Path, num_samples: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """A recording, mono at 16 kHz: its beginning, or with `rng` a stretch of so many samples, repeated if short."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            wanted = -(-num_samples * file.samplerate // SAMPLE_RATE_HZ)
            if rng is not None and file.frames > wanted:
                file.seek(int(rng.integers(file.frames - wanted)))
            read_SC = file.read(wanted, dtype="float32", always_2d=True)
            part_S = resample(np.ascontiguousarray(read_SC.mean(axis=1)), file.samplerate)
    except (soundfile.SoundFileError, OSError) as error:
        raise UsageError(f"{path}, which augmentation draws from, cannot be read any more: {error}") from error
    return part_S[:num_samples] if rng is None else _fill(part_S, num_samples, rng)


def _fill(signal_S: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """A stretch of this length from a drawn place on, from the beginning again where the signal ends."""
    if not len(signal_S):
        return np.zeros(num_samples, np.float32)
    start = int(rng.integers(max(1, len(signal_S) - num_samples + 1)))
    return np.resize(signal_S[start:], num_samples)


def _fast_length(num_samples: int) -> int:
    """A length of Fourier transforms that is fast: the next power of two."""
    return 1 << max(num_samples - 1, 1).bit_length()
