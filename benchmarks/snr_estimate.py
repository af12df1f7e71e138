"""How near two estimates of the signal-to-noise ratio come to the truth, on real speech with noise added.

    OMP_NUM_THREADS=1 python benchmarks/snr_estimate.py [--corpora ../shared/corpora] [--clips 100]

`percentile` is `snr_db` of audio.py; `WADA` takes the amplitudes for those of Gamma-distributed speech under Gaussian
noise (Kim & Stern, Interspeech 2008). The true SNR is over active speech: the mean power of the 20 ms frames at most
30 dB below the loudest one, against the mean power of the noise; what noise the recordings have of their own is not in
it, and that of the words is about 17 dB below them. Babble is the sum of eight other clips of the corpus. `pauses` are
the sentences between as much silence again; `model` is what WADA assumes, which never pauses. Prints mean and standard
deviation of each estimate, its mean absolute error over 0 to 20 dB, and what it costs.

Dimension letters: S samples, F frames, W samples per frame, Q points of a quadrature.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))

import audio
from audio import INT16_FULL_SCALE, POWER_FRAME_SAMPLES, SAMPLE_RATE_HZ, measure, resample

TRUE_DB = (0, 5, 10, 15, 20, 30)
ERROR_UP_TO_DB = 20
GAMMA_SHAPE = 0.4
WADA_DB = np.arange(-20, 61)
ACTIVE_RELATIVE_POWER = 1e-3  # -30 dB
TALKERS = 8
TIMED_SECONDS = 5
REPETITIONS = 200


def main() -> None:
    """Print the table, the errors and the cost."""
    corpora = os.environ.get("CTC_CORPORA", Path(__file__).parents[2] / "shared" / "corpora")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=corpora)
    parser.add_argument("--clips", type=int, default=100)
    arguments = parser.parse_args()
    sentences = read_clips(arguments.corpora / "yo" / "clips", arguments.clips)
    words = read_clips(arguments.corpora / "digits" / "wav", arguments.clips)
    rng = np.random.default_rng(0)
    print(f"{'speech':<11}{'noise':<8}{'estimate':<12}" + "".join(f"{f'{db} dB':>14}" for db in TRUE_DB) + "   error")
    print_estimates("sentences", sentences, sentences, rng)
    print_estimates("pauses", [np.pad(clip_S, len(clip_S) // 2) for clip_S in sentences], sentences, rng)
    print_estimates("words", words, words, rng)
    print_estimates("model", [gamma_speech(rng, TIMED_SECONDS * SAMPLE_RATE_HZ) for _ in words], words, rng)
    print_cost(to_int16(np.resize(sentences[0], TIMED_SECONDS * SAMPLE_RATE_HZ)))


def print_estimates(speech: str, clips: list[np.ndarray], voices: list[np.ndarray], rng: np.random.Generator) -> None:
    """A line for each noise and estimate; `voices` babble, but for the clip's own."""
    for noise in ("none", "white", "babble"):
        if noise == "none":
            mixtures = [[to_int16(clip_S)] for clip_S in clips]
        else:
            others = [voices[:number] + voices[number + 1 :] for number in range(len(clips))]
            pairs = list(zip(clips, others, strict=True))
            mixtures = [[mixture(clip_S, other, noise, db, rng) for db in TRUE_DB] for clip_S, other in pairs]
        for name, estimate in ESTIMATES.items():
            values = np.array([[estimate(samples_S) for samples_S in row] for row in mixtures])
            cells = zip(np.nanmean(values, axis=0), np.nanstd(values, axis=0), strict=True)
            line = f"{speech:<11}{noise:<8}{name:<12}" + "".join(f"{mean:>7.1f} ± {std:>4.1f}" for mean, std in cells)
            if noise != "none":
                errors = np.abs(values - TRUE_DB)[:, np.array(TRUE_DB) <= ERROR_UP_TO_DB]
                line += f"{np.nanmean(errors):>8.1f}"
            print(line)


def print_cost(samples_S: np.ndarray) -> None:
    """Milliseconds of each estimate for the clip, and of all measurements."""
    power_F = np.ones(len(samples_S) // POWER_FRAME_SAMPLES, np.float32)
    works = (
        lambda: measure(samples_S),
        lambda: audio._snr_db(samples_S, power_F),
        lambda: wada_db(samples_S),
    )
    everything, percentile, wada = map(milliseconds, works)
    print(f"\n{TIMED_SECONDS} s of audio: percentile {percentile:.2f} ms of {everything:.2f} ms for all measurements")
    print(f"{'':<14}WADA {wada:.2f} ms")


def milliseconds(work: Callable[[], object]) -> float:
    """The fastest of many."""
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


# ---------------------------------------------------------------------------------------------------------------------
# Speech and noise


def read_clips(folder: Path, count: int) -> list[np.ndarray]:
    """Some clips of the folder as float32 [S] at 16 kHz without offset, the same ones each time."""
    paths = sorted(folder.iterdir())
    clips = []
    for position in np.random.default_rng(0).permutation(len(paths))[:count]:
        signal_S, rate_hz = soundfile.read(paths[position], dtype="float32")
        clips.append(resample(signal_S - signal_S.mean(), rate_hz))
    return clips


def gamma_speech(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Samples [S] whose amplitudes are distributed as Kim & Stern found those of speech."""
    return 0.02 * rng.gamma(GAMMA_SHAPE, size=num_samples) * rng.choice((-1, 1), num_samples)


def mixture(
    clip_S: np.ndarray, voices: list[np.ndarray], noise: str, snr_db: float, rng: np.random.Generator
) -> np.ndarray:
    """The clip with white noise, or with the babble of some voices, at that SNR over active speech; int16 [S]."""
    if noise == "white":
        noise_S = rng.standard_normal(len(clip_S))
    else:
        chosen = [voices[number] for number in rng.permutation(len(voices))[:TALKERS]]
        chosen = [np.roll(voice_S, rng.integers(len(voice_S))) / active_power(voice_S) ** 0.5 for voice_S in chosen]
        noise_S = sum(np.resize(voice_S, len(clip_S)) for voice_S in chosen)
    wanted_power = active_power(clip_S) / 10 ** (snr_db / 10)
    return to_int16(clip_S + noise_S * (wanted_power / np.square(noise_S).mean()) ** 0.5)


def active_power(signal_S: np.ndarray) -> float:
    """Mean power of the frames that hold speech."""
    frames_FW = signal_S[: len(signal_S) // POWER_FRAME_SAMPLES * POWER_FRAME_SAMPLES].reshape(-1, POWER_FRAME_SAMPLES)
    power_F = np.square(frames_FW).mean(axis=1)
    return power_F[power_F >= power_F.max() * ACTIVE_RELATIVE_POWER].mean()


def to_int16(signal_S: np.ndarray) -> np.ndarray:
    """Made quieter where it would be clipped."""
    scale = min(1.0, 0.99 / np.abs(signal_S).max()) * INT16_FULL_SCALE
    return np.rint(signal_S * scale).astype(np.int16)


# ---------------------------------------------------------------------------------------------------------------------
# WADA


def wada_statistic(snr_db: float) -> float:
    """The logarithm of the mean less the mean of the logarithms: ln E|z| - E ln|z| of Gamma speech plus Gaussian noise.

    From the characteristic function phi of z: E|z| is 2/pi of the integral of (1 - phi(w)) / w^2 over w > 0, E ln|z|
    that of (exp(-w) - phi(w)) / w. For speech of scale 1 it is Re (1 - iw)^-shape.
    """
    step = 0.02
    w_Q = np.exp(np.arange(-18, 40, step))
    noise_power = GAMMA_SHAPE * (GAMMA_SHAPE + 1) / 10 ** (snr_db / 10)
    phi_Q = np.real((1 - 1j * w_Q) ** -GAMMA_SHAPE) * np.exp(-noise_power * np.square(w_Q) / 2)
    mean = 2 / np.pi * ((1 - phi_Q) / w_Q).sum() * step
    return np.log(mean) - (np.exp(-w_Q) - phi_Q).sum() * step


WADA_STATISTICS = np.array([wada_statistic(snr_db) for snr_db in WADA_DB])


def wada_db(samples_S: np.ndarray) -> float:
    """WADA-SNR of int16 [S]; a sample rounded to zero is taken for the geometric mean of what is rounded to it."""
    frames_FW = audio._frames(samples_S, POWER_FRAME_SAMPLES)
    sounding_FW = frames_FW[frames_FW.min(axis=1) != frames_FW.max(axis=1)]  # without digital silence, as in audio.py
    sounding_S = np.append(sounding_FW, samples_S[frames_FW.size :])
    amplitude_S = np.abs(sounding_S - np.float32(samples_S.mean()))
    amplitude_S = np.maximum(amplitude_S, np.float32(0.5 / np.e))
    return float(np.interp(np.log(amplitude_S.mean()) - np.log(amplitude_S).mean(), WADA_STATISTICS, WADA_DB))


ESTIMATES = {"percentile": lambda samples_S: measure(samples_S).snr_db, "WADA": wada_db}


if __name__ == "__main__":
    main()
