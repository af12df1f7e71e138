"""Which resampler: speed and filter of prepare.py's (torchaudio's windowed sinc), of torchaudio's default and of soxr.

    python benchmarks/resamplers.py [--rate 32000] [--seconds 10]

Tones at half of full scale pass through each. Ripple: how much a tone below 7 kHz changes, at most. Edge: where a tone
has lost 3 dB. Aliasing: what is left of a tone from 8.5 kHz up to the source's half rate. Milliseconds are of one
thread for a clip of noise, the least of ten. A resampler whose package is not installed is left out.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torchaudio

from audio import RESAMPLING, SAMPLE_RATE_HZ, resample

PASS_BAND_HZ = range(100, 7_001, 100)
EDGE_HZ = range(7_000, 8_000, 20)
STOP_BAND_START_HZ, STOP_BAND_STEP_HZ = 8_500, 250
TONE_SECONDS = 0.5
REPETITIONS = 10

Resampler = Callable[[np.ndarray, int], np.ndarray]


def main() -> None:
    """Print a row per resampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=32_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    noise = np.random.default_rng(0).normal(0, 0.1, int(arguments.rate * arguments.seconds)).astype(np.float32)
    print(f"{arguments.rate} Hz to {SAMPLE_RATE_HZ} Hz, a clip of {arguments.seconds:g} s")
    print(f"{'':<26}{'ms':>8}{'ripple dB':>11}{'edge Hz':>9}{'aliasing dB':>13}")
    for name, resampler in resamplers().items():
        ripple = max(abs(gain_db(resampler, hz, arguments.rate)) for hz in PASS_BAND_HZ)
        edge = next((hz for hz in EDGE_HZ if gain_db(resampler, hz, arguments.rate) < -3), 8_000)
        beyond = range(STOP_BAND_START_HZ, arguments.rate // 2 - 100, STOP_BAND_STEP_HZ)
        aliasing = max((gain_db(resampler, hz, arguments.rate) for hz in beyond), default=-math.inf)
        milliseconds = 1000 * min(seconds_of(resampler, noise, arguments.rate) for _ in range(REPETITIONS))
        print(f"{name:<26}{milliseconds:>8.2f}{ripple:>11.4f}{edge:>9}{aliasing:>13.1f}", flush=True)


def resamplers() -> dict[str, Resampler]:
    """By name."""

    def torchaudios(**settings: object) -> Resampler:
        def apply(signal_S: np.ndarray, rate_hz: int) -> np.ndarray:
            with torch.inference_mode():
                signal = torch.from_numpy(signal_S)
                return torchaudio.functional.resample(signal, rate_hz, SAMPLE_RATE_HZ, **settings).numpy()

        return apply

    found = {
        "prepare.py": resample,
        "torchaudio, same filter": torchaudios(**RESAMPLING),
        "torchaudio, its default": torchaudios(),
    }
    if importlib.util.find_spec("soxr"):
        import soxr

        for quality in ("VHQ", "HQ", "MQ"):
            found[f"soxr {quality}"] = lambda signal_S, rate_hz, quality=quality: soxr.resample(
                signal_S, rate_hz, SAMPLE_RATE_HZ, quality=quality
            )
    return found


def gain_db(resampler: Resampler, tone_hz: float, rate_hz: int) -> float:
    """Power behind the resampler over the power of the tone, away from both ends."""
    times_S = np.arange(int(TONE_SECONDS * rate_hz)) / rate_hz
    out_S = resampler((0.5 * np.sin(2 * math.pi * tone_hz * times_S)).astype(np.float32), rate_hz)
    middle_S = out_S[len(out_S) // 4 : -len(out_S) // 4].astype(np.float64)
    return 10 * math.log10(max(float(np.mean(middle_S**2)), 1e-30) / 0.125)


def seconds_of(resampler: Resampler, signal_S: np.ndarray, rate_hz: int) -> float:
    """Wall time of one clip."""
    started_at = time.perf_counter()
    resampler(signal_S, rate_hz)
    return time.perf_counter() - started_at


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
