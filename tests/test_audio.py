"""Clips: decoding, resampling and measuring against known signals and against torchaudio."""

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import audio
from audio import ClipError, ClipPool, ClipRequest, measure, read_clip, resample


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


@pytest.mark.parametrize("suffix", [".mp3", ".flac", ".ogg"])
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
    peak, silence, bandwidth = measure(half_silent)
    assert peak == pytest.approx(0.5, abs=1e-3)
    assert silence == pytest.approx(0.5)
    assert bandwidth == pytest.approx(1_000, abs=63)
    assert measure(np.zeros(1_000, np.int16)) == (0.0, 1.0, 0.0)
    assert measure(np.full(1_000, 3_277, np.int16))[1:] == (0.0, 0.0)  # a constant has no bandwidth
    assert measure(np.array([100], np.int16))[0] == pytest.approx(100 / 32_768)


@pytest.mark.parametrize(("level_db", "is_silence"), [(-49, False), (-51, True)])
def test_silence_is_relative_to_the_loudest_frame(level_db, is_silence):
    quiet = tone(1.0, 16_000, amplitude=0.9 * 10 ** (level_db / 20))
    clip = int16(np.concatenate((tone(1.0, 16_000, amplitude=0.9), quiet)))
    assert (measure(clip)[1] > 0.4) == is_silence


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
