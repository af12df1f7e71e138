"""Clips: decoding, resampling and measuring against known signals and against torchaudio."""

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import audio
from audio import ClipError, ClipPool, ClipRequest, Measures, measure, read_clip, resample
from benchmarks import snr_estimate


def tone(seconds: float, rate: int, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("num_samples", [1, 7, 30_011])
def test_resampling_equals_torchaudio(rate, num_samples):
    signal = (np.random.default_rng(0).standard_normal(num_samples) * 0.1).astype(np.float32)
    reference = torchaudio.transforms.Resample(rate, 16_000, **audio.RESAMPLING)(torch.from_numpy(signal)).numpy()
    ours = resample(signal, rate)
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, atol=1e-6)


def test_resampling_of_a_long_clip_has_no_seams(monkeypatch):
    signal = tone(3.0, 32_000)
    whole = resample(signal, 32_000)
    monkeypatch.setattr(audio, "FRAMES_AT_ONCE", 7)
    np.testing.assert_allclose(resample(signal, 32_000), whole, atol=1e-6)


def test_16_khz_pcm_passes_unchanged(tmp_path):
    samples = np.random.default_rng(1).integers(-32_768, 32_768, 5_000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    clip = read_clip(ClipRequest(str(tmp_path / "a.wav")))
    np.testing.assert_array_equal(clip.samples, samples)
    assert clip.samples.dtype == np.int16


def test_channels_are_averaged_and_overload_is_clipped(tmp_path):
    left, right = np.full(160, 0.5, np.float32), np.full(160, 0.25, np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack((left, right), axis=1), 16_000, subtype="FLOAT")
    assert set(read_clip(ClipRequest(str(tmp_path / "stereo.wav"))).samples) == {round(0.375 * 32_768)}
    soundfile.write(tmp_path / "loud.wav", np.array([1.5, -1.5], np.float32), 16_000, subtype="FLOAT")
    assert read_clip(ClipRequest(str(tmp_path / "loud.wav"))).samples.tolist() == [32_767, -32_768]


@pytest.mark.parametrize(
    ("offset", "duration", "first", "count"),
    [(0.0, None, 0, 16_000), (0.25, None, 4_000, 12_000), (0.25, 0.5, 4_000, 8_000), (0.0, 0.5, 0, 8_000)],
)
def test_segments(tmp_path, offset, duration, first, count):
    samples = np.arange(16_000, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    clip = read_clip(ClipRequest(str(tmp_path / "a.wav"), offset, duration))
    np.testing.assert_array_equal(clip.samples, samples[first : first + count])


@pytest.mark.parametrize(
    ("name", "content", "request_fields", "reason"),
    [
        ("text.wav", b"not audio at all", {}, "undecodable"),
        ("nothing.wav", b"", {}, "undecodable"),
        ("headerless.raw", b"\0" * 100, {}, "undecodable"),
        ("a.wav", np.zeros(0, np.int16), {}, "empty"),
        ("a.wav", np.array([0.1, np.nan], np.float32), {}, "not_finite"),
        ("a.wav", np.array([0.1, np.inf], np.float32), {}, "not_finite"),
        ("a.wav", np.zeros(1_600, np.int16), {"offset_seconds": 0.1}, "bad_segment"),
        ("a.wav", np.zeros(1_600, np.int16), {"duration_seconds": 0.3}, "bad_segment"),
        ("a.wav", np.zeros(1_600, np.int16), {"offset_seconds": 1e308}, "bad_segment"),
        ("a.wav", np.zeros(1_600, np.int16), {"duration_seconds": 1e308}, "bad_segment"),
    ],
)
def test_unusable_clips_have_a_reason(tmp_path, name, content, request_fields, reason):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, content, 16_000, subtype="PCM_16" if content.dtype == np.int16 else "FLOAT")
    with pytest.raises(ClipError) as error:
        read_clip(ClipRequest(str(path), **request_fields))
    assert error.value.reason == reason
    assert "\n" not in error.value.detail


@pytest.mark.parametrize("suffix", [".mp3", ".flac", ".ogg", ".wav", ".aiff", ".au"])
def test_a_file_that_breaks_off_is_not_half_a_clip(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, np.random.default_rng(0).standard_normal(160_000) * 0.1, 16_000)
    whole = path.read_bytes()
    assert len(read_clip(ClipRequest(str(path))).samples) == pytest.approx(160_000, abs=2_500)
    path.write_bytes(whole[: len(whole) // 2])
    try:
        samples = read_clip(ClipRequest(str(path))).samples
    except ClipError as error:
        assert error.reason == "undecodable"
    else:
        # An Ogg stream carries no length: what is there is all that can be known.
        assert suffix == ".ogg" and len(samples)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_a_wav_file_written_through_a_pipe_knows_no_length_and_is_read(tmp_path, size):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(16_000, np.int16), 16_000)
    data = bytearray(path.read_bytes())
    data[40:44] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert len(read_clip(ClipRequest(str(path))).samples) == 16_000


def test_a_segment_of_a_file_that_breaks_off_behind_it_is_read(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(16_000, np.int16), 16_000)
    path.write_bytes(path.read_bytes()[:20_000])
    assert len(read_clip(ClipRequest(str(path), 0.0, 0.5)).samples) == 8_000


def test_too_long_and_odd_rates_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "MAX_CLIP_SECONDS", 0.5)
    soundfile.write(tmp_path / "long.wav", np.zeros(16_000, np.int16), 16_000)
    soundfile.write(tmp_path / "odd.wav", np.zeros(1_000, np.int16), 44_101)
    for name, reason in (("long.wav", "too_long"), ("odd.wav", "undecodable")):
        with pytest.raises(ClipError, match=reason):
            read_clip(ClipRequest(str(tmp_path / name)))


def int16(signal: np.ndarray) -> np.ndarray:
    return np.rint(signal * 32_767).astype(np.int16)


def test_measures_of_known_signals():
    half_silent = int16(np.concatenate((tone(1.0, 16_000, 1_000.0), np.zeros(16_000, np.float32))))
    found = measure(half_silent)
    assert found.peak == pytest.approx(0.5, abs=1e-3)
    assert found.rms == pytest.approx(0.25, abs=1e-3), "0.5 / sqrt(2) over half of the time"
    assert found.dc_offset == pytest.approx(0.0, abs=1e-6)
    assert found.silence_fraction == pytest.approx(0.5)
    assert (found.leading_silence_seconds, found.trailing_silence_seconds) == (0.0, 1.0)
    assert found.bandwidth_hz == pytest.approx(1_000, abs=63)
    assert found.clipping_fraction == 0.0
    assert measure(np.array([100], np.int16)).peak == pytest.approx(100 / 32_768)


@pytest.mark.parametrize("value", [0, 3_277, -32_768])
@pytest.mark.parametrize("num_samples", [1, 319, 1_000, 40_000])
def test_a_constant_clip_is_the_one_without_rms(value, num_samples):
    constant = measure(np.full(num_samples, value, np.int16))
    seconds = max(num_samples // 320, 1) * 0.02
    assert constant == Measures(
        peak=abs(value) / 32_768,
        rms=0.0,
        dc_offset=value / 32_768,
        clipping_fraction=0.0,
        silence_fraction=1.0,
        leading_silence_seconds=pytest.approx(seconds),
        trailing_silence_seconds=0.0,
        bandwidth_hz=0.0,
        highest_frequency_hz=0.0,
        snr_db=pytest.approx(np.nan, nan_ok=True),
    )
    nearly = np.full(num_samples + 1, value, np.int16)
    nearly[-1] += 1
    assert np.float32(measure(nearly).rms) > 0


def test_a_dc_offset_hides_neither_loudness_nor_silence():
    clip = np.concatenate((np.zeros(8_000), tone(1.0, 16_000, amplitude=0.2), np.zeros(4_000)))
    plain, shifted = measure(int16(clip)), measure(int16(clip + 0.1))
    assert shifted.dc_offset == pytest.approx(plain.dc_offset + 0.1, abs=1e-4)
    assert shifted.rms == pytest.approx(plain.rms, rel=1e-3)
    # 50 dB below the tone is 20 steps of 16 bits; the mean is that of the clip, and its silence is not quite zero.
    assert (shifted.leading_silence_seconds, shifted.trailing_silence_seconds) == (0.5, 0.24)
    assert (plain.leading_silence_seconds, plain.trailing_silence_seconds) == (0.5, 0.24)


@pytest.mark.parametrize("rate", [8_000, 16_000])
@pytest.mark.parametrize("frequency", [300.0, 3_000.0])
def test_the_highest_frequency_shows_what_a_clip_was_recorded_at(rate, frequency):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(rate).astype(np.float32) * 0.01 + tone(1.0, rate, frequency)
    at_48_khz = resample_to(noise, rate, 48_000)
    found = measure(int16(resample(at_48_khz, 48_000)))
    assert found.bandwidth_hz < 4_000
    assert found.highest_frequency_hz == pytest.approx(rate / 2, rel=0.08)


def resample_to(signal: np.ndarray, rate: int, target: int) -> np.ndarray:
    return torchaudio.functional.resample(torch.from_numpy(signal), rate, target, lowpass_filter_width=64).numpy()


LOUD = tone(1.0, 16_000, 100.0, 2.0)
CUT_SHARE = 2 * np.arccos(0.5) / np.pi  # of a sine of twice the full scale
CLIPPED = {
    "cut at full scale": (np.clip(LOUD, -1, 1), CUT_SHARE),
    "cut on one side": (np.clip(LOUD, -0.5, 1) * 0.5, CUT_SHARE / 2 + np.arccos(0.25) / np.pi),
    "cut, then made quieter": (np.clip(LOUD, -1, 1) * 0.3, CUT_SHARE),
    "decoded beyond full scale": (LOUD, CUT_SHARE),
    "too quiet to have been cut": (np.clip(LOUD, -1, 1) * 0.05, 0.0),
    "loud and whole": (tone(1.0, 16_000, 1_000.0, 0.999), 0.0),
    "a constant": (np.full(16_000, 0.5, np.float32), 0.0),
    "runs of two": (np.tile(np.array([1.0, 1.0, 0.0], np.float32), 1_000), 0.0),
    "a run of three at each end": (np.array([1, 1, 1, 0, 0.5, 0, 1, 1, 1], np.float32), 6 / 9),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_clipping(name):
    signal, share = CLIPPED[name]
    decoded = signal.astype(np.float32)
    assert measure(int16(np.clip(signal, -1, 1)), decoded).clipping_fraction == pytest.approx(share, abs=0.01)
    assert measure(int16(np.clip(signal, -1, 1))).clipping_fraction == pytest.approx(share, abs=0.01)


def test_clipping_is_seen_before_resampling_rounds_it_off(tmp_path):
    signal = np.clip(tone(1.0, 44_100, 300.0, 2.0), -1, 1) * 0.7
    soundfile.write(tmp_path / "a.wav", signal, 44_100)
    clip = read_clip(ClipRequest(str(tmp_path / "a.wav")))
    assert clip.measures.clipping_fraction == pytest.approx(CUT_SHARE, abs=0.01)
    assert measure(clip.samples).clipping_fraction < 0.05


@pytest.mark.parametrize(("level_db", "is_silence"), [(-49, False), (-51, True)])
def test_silence_is_relative_to_the_loudest_frame(level_db, is_silence):
    quiet = tone(1.0, 16_000, amplitude=0.9 * 10 ** (level_db / 20))
    clip = int16(np.concatenate((tone(1.0, 16_000, amplitude=0.9), quiet)))
    assert (measure(clip).silence_fraction > 0.4) == is_silence


def speech_with_pauses(seconds: float = 5.0) -> np.ndarray:
    """Gamma-distributed amplitudes in words of 0.4 s, 0.1 s between them; power 1 and no offset."""
    words = snr_estimate.gamma_speech(np.random.default_rng(0), round(0.8 * seconds * 16_000))
    words = (words - words.mean()).reshape(-1, 6_400)
    return np.pad(words, ((0, 0), (0, 1_600))).ravel() / np.sqrt(0.8 * np.square(words).mean())


@pytest.mark.parametrize("snr_db", [-5, 0, 5, 10, 20, 30, 40])
def test_snr_of_known_mixtures(snr_db):
    speech = speech_with_pauses()
    noise = np.random.default_rng(1).standard_normal(len(speech)) / 10 ** (snr_db / 20)
    mixed = 0.02 * (speech + noise)
    assert measure(int16(mixed)).snr_db == pytest.approx(snr_db, abs=1)
    assert measure(int16(mixed + 0.1)).snr_db == pytest.approx(measure(int16(mixed)).snr_db, abs=0.1), "offset"
    between_zeros = np.pad(int16(mixed), (32_000, 64_000))
    assert measure(between_zeros).snr_db == pytest.approx(measure(int16(mixed)).snr_db, abs=0.1), "digital silence"


@pytest.mark.parametrize("num_samples", [1, 319, 4 * 320, 5 * 320 - 1])
def test_a_clip_of_less_than_five_frames_has_no_snr(num_samples):
    noise = int16(np.random.default_rng(0).standard_normal(num_samples) * 0.1)
    assert np.isnan(measure(noise).snr_db)
    assert np.isnan(measure(np.concatenate((np.zeros(32_000, np.int16), noise))).snr_db)


def test_snr_is_limited():
    assert measure(int16(tone(1.0, 16_000, 1_000.0))).snr_db == -20, "what never pauses is noise"
    one_step = np.random.default_rng(0).integers(-1, 2, 16_000)
    assert measure(np.concatenate((int16(tone(1.0, 16_000)), one_step.astype(np.int16)))).snr_db == 60


@pytest.mark.parametrize("noise", ["white", "babble"])
@pytest.mark.parametrize(("corpus", "folder", "tolerance_db"), [("yo", "clips", 3.0), ("digits", "wav", 4.0)])
def test_snr_of_real_speech_in_noise(corpora, corpus, folder, tolerance_db, noise):
    clips = snr_estimate.read_clips(corpora(corpus) / folder, 20)
    rng, true_db = np.random.default_rng(0), np.array([0, 5, 10, 15, 20])
    mixtures = [[snr_estimate.mixture(clip, clips, noise, db, rng) for db in true_db] for clip in clips]
    found_db = np.array([[measure(mixed).snr_db for mixed in row] for row in mixtures])
    assert (np.diff(found_db.mean(axis=0)) > 1).all()
    assert np.abs(found_db - true_db).mean() < tolerance_db


@pytest.mark.parametrize("snr_db", [-10, 0, 10, 20, 30])
def test_the_estimate_that_was_turned_down_is_as_published(snr_db):
    rng = np.random.default_rng(0)
    speech = snr_estimate.gamma_speech(rng, 1_000_000)
    noise = rng.standard_normal(len(speech)) * np.sqrt(np.square(speech).mean() / 10 ** (snr_db / 10))
    amplitudes = np.abs(speech + noise)
    simulated = np.log(amplitudes.mean()) - np.log(amplitudes).mean()
    assert snr_estimate.wada_statistic(snr_db) == pytest.approx(simulated, abs=0.004)
    assert snr_estimate.wada_db(snr_estimate.to_int16(speech + noise)) == pytest.approx(snr_db, abs=1)


def test_pool_keeps_order_and_bounds_what_is_under_way(tmp_path):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.full(number + 1, 7, np.int16), 16_000)
    pulled = []

    def items():
        for number in range(200):
            pulled.append(number)
            yield number, None if number % 5 == 4 else ClipRequest(str(tmp_path / f"{number % 4}.wav"))

    ahead, results = 0, []
    with ClipPool(1) as pool:
        for item, result in pool.read(items()):
            ahead = max(ahead, len(pulled) - len(results))
            results.append((item, result))
    assert [item for item, _ in results] == list(range(200))
    assert ahead <= 4 * audio.CLIPS_PER_TASK
    for item, result in results:
        if item % 5 == 4:
            assert result is None
        elif item % 4 == 3:
            assert result.reason == "undecodable"
        else:
            assert len(result.samples) == item % 4 + 1
