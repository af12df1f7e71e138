"""Waveform augmentation against direct computations: what is drawn is what is heard."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import AUGMENTATION, TINY_MODEL, make_rows, write_part
from transformers import Wav2Vec2Config

import augment
from audio import SAMPLE_RATE_HZ
from augment import (
    Augmenter,
    add_noise,
    change_speed,
    cut_gaps,
    limit_band,
    move_volume,
    pink_noise,
    reverberate,
    simulate_response,
    speed_length,
    white_noise,
)
from data import ShardDataset
from errors import UsageError
from levers import Augmentation
from model import num_frames

HF_CONFIG = Wav2Vec2Config(**{name: value for name, value in TINY_MODEL.items() if name != "model_type"})


def tone(hz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ).astype(np.float32)


def power_db(signal_S: np.ndarray) -> float:
    return 10 * np.log10(np.mean(signal_S.astype(np.float64) ** 2))


def loudest_hz(signal_S: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(signal_S * np.hanning(len(signal_S))))
    return float(np.argmax(spectrum)) * SAMPLE_RATE_HZ / len(signal_S)


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    write_part(tmp_path / "data" / "train" / "part_1", make_rows(12, seed=1))
    return ShardDataset(tmp_path / "data" / "train")


@pytest.fixture
def make(dataset: ShardDataset) -> Callable[..., Augmenter]:
    """An augmenter with these settings, whose utterances need no more than a frame."""

    def build(required_frames: Sequence[int] | None = None, seed: int = 3, **settings: object) -> Augmenter:
        required = np.ones(len(dataset), np.int32) if required_frames is None else np.asarray(required_frames)
        return Augmenter.of(Augmentation(**settings), seed, dataset, np.arange(len(dataset)), required, HF_CONFIG)

    return build


# --- Each change -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.8, 0.9, 0.95, 1.0, 1.1, 1.25, 2.0])
@pytest.mark.parametrize("num_samples", [1, 399, 16_000, 16_001, 53_777])
def test_speed_gives_the_length_that_was_planned(factor: float, num_samples: int) -> None:
    signal_S = white_noise(num_samples, np.random.default_rng(1))
    assert len(change_speed(signal_S, factor)) == speed_length(np.array([num_samples]), factor)[0]


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_speed_moves_the_pitch_and_keeps_the_level(factor: float) -> None:
    changed_S = change_speed(tone(440.0), factor)
    assert loudest_hz(changed_S) == pytest.approx(440 * factor, abs=1.5)
    assert power_db(changed_S[2000:-2000]) == pytest.approx(power_db(tone(440.0)), abs=0.05)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 7.5, 30.0])
@pytest.mark.parametrize("kind", ["white", "pink", "speech"])
def test_measured_snr_is_the_drawn_one(snr_db: float, kind: str) -> None:
    rng = np.random.default_rng(2)
    signal_S = tone(300.0) * np.linspace(0, 1, SAMPLE_RATE_HZ, dtype=np.float32)
    noises = {"white": white_noise, "pink": pink_noise, "speech": lambda count, _: tone(1234.0)[:count]}
    mixed_S = add_noise(signal_S, noises[kind](len(signal_S), rng), snr_db)
    assert power_db(signal_S) - power_db(mixed_S - signal_S) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("source", ["white", "pink", "babble", "folder"])
def test_an_augmenter_mixes_at_the_snr_that_it_draws(
    make: Callable[..., Augmenter], dataset: ShardDataset, tmp_path: Path, source: str
) -> None:
    """From the settings to the waveform: every draw lies in the range, and both ends are reached."""
    if source == "folder":
        (tmp_path / "noises").mkdir()
        soundfile.write(tmp_path / "noises" / "long.wav", white_noise(99_000, np.random.default_rng(1)) * 0.1, 44_100)
        soundfile.write(tmp_path / "noises" / "short.flac", tone(50.0, 0.1) * 0.5, 8_000)
        source = str(tmp_path / "noises")
    augmenter = make(augment_noise=[source], augment_noise_probability=1.0, augment_noise_snr_db=[3.0, 9.0])
    measured = []
    for epoch in range(12):
        for row in range(len(dataset)):
            signal_S = dataset[row].audio.astype(np.float32) / 32_768
            measured.append(power_db(signal_S) - power_db(augmenter(signal_S, row, epoch, 0) - signal_S))
    assert 2.99 < min(measured) < 3.3 and 8.7 < max(measured) < 9.01
    assert np.mean(measured) == pytest.approx(6.0, abs=4 * 6 / np.sqrt(12 * len(measured)))


def test_silence_stays_silent() -> None:
    silence_S = np.zeros(100, np.float32)
    assert add_noise(silence_S, white_noise(100, np.random.default_rng(1)), 5.0) is silence_S
    signal_S = tone(100.0)
    assert add_noise(signal_S, np.zeros_like(signal_S), 5.0) is signal_S


def test_pink_noise_falls_by_three_decibels_an_octave() -> None:
    spectrum = np.abs(np.fft.rfft(pink_noise(2**18, np.random.default_rng(4)))) ** 2
    hz = np.fft.rfftfreq(2**18, 1 / SAMPLE_RATE_HZ)
    octaves = [spectrum[(hz >= low) & (hz < 2 * low)].mean() for low in (125, 250, 500, 1000, 2000)]
    assert np.diff(10 * np.log10(octaves)) == pytest.approx([-3.01] * 4, abs=0.3)


def test_reverberation_is_a_convolution_that_keeps_the_direct_sound_in_place() -> None:
    rng = np.random.default_rng(5)
    signal_S = white_noise(3_000, rng)
    response = simulate_response(0.2, 3.0, rng)
    delayed = np.concatenate([np.zeros(50, np.float32), response])
    expected = np.convolve(signal_S.astype(np.float64), response)[:3_000]
    for one in (response, 5 * response, delayed):
        assert reverberate(signal_S, one) == pytest.approx(expected, abs=1e-4)
    assert reverberate(signal_S, np.zeros(10, np.float32)) is signal_S


@pytest.mark.parametrize(("seconds", "direct_db"), [(0.1, -3.0), (0.6, 9.0), (1.5, 0.0)])
def test_a_simulated_room_decays_by_60_db_in_its_time(seconds: float, direct_db: float) -> None:
    """Schroeder's backward integral of the echoes' energy falls along a line of that slope."""
    response = simulate_response(seconds, direct_db, np.random.default_rng(6)).astype(np.float64)
    assert 10 * np.log10(response[0] ** 2 / np.sum(response[1:] ** 2)) == pytest.approx(direct_db, abs=1e-3)
    left_db = 10 * np.log10(np.cumsum(response[:0:-1] ** 2)[::-1])
    times = np.arange(1, len(response)) / SAMPLE_RATE_HZ
    early = times < seconds / 3
    slope = np.polyfit(times[early], left_db[early], 1)[0]
    assert slope == pytest.approx(-60 / seconds, rel=0.1)


def test_a_limited_band_ends_where_it_was_drawn() -> None:
    for hz, passes in ((500, True), (2_900, True), (3_400, False), (7_000, False)):
        change_db = power_db(limit_band(tone(hz), 3_000.0)[1000:-1000]) - power_db(tone(hz))
        assert (abs(change_db) < 0.1) if passes else (change_db < -40), hz


def test_volume_moves_linearly_in_decibels() -> None:
    moved_S = move_volume(np.ones(1_001, np.float32), -6.0, 4.0)
    assert 20 * np.log10(moved_S[[0, 500, 1000]]) == pytest.approx([-6.0, -1.0, 4.0], abs=1e-4)


def test_gaps_are_silent_and_nothing_else_changes() -> None:
    signal_S = np.ones(100, np.float32)
    cut_S = cut_gaps(signal_S, [(10, 20), (95, 130)])
    assert np.flatnonzero(cut_S == 0).tolist() == [*range(10, 20), *range(95, 100)]
    assert signal_S.all(), "the clip itself is as it was"


@pytest.mark.parametrize("seconds", [0.05, 0.4])
def test_gaps_have_at_most_the_length_that_is_set(make: Callable[..., Augmenter], seconds: float) -> None:
    augmenter = make(augment_gap_seconds=seconds, augment_gap_probability=1.0)
    lengths = [
        int(np.sum(augmenter(np.ones(16_000, np.float32), row, epoch, 0) == 0))
        for row in range(5)
        for epoch in range(20)
    ]
    assert 0 < max(lengths) <= seconds * SAMPLE_RATE_HZ + 1
    assert max(lengths) > 0.8 * seconds * SAMPLE_RATE_HZ


# --- Draws -----------------------------------------------------------------------------------------------------------


def heard(augmenter: Augmenter, row: int, epoch: int = 0, copy: int = 0) -> np.ndarray:
    return augmenter(augmenter.dataset[row].audio.astype(np.float32) / 32_768, row, epoch, copy)


def test_draws_are_functions_of_seed_epoch_utterance_and_copy(make: Callable[..., Augmenter]) -> None:
    augmenter, again = make(**AUGMENTATION), make(**AUGMENTATION)
    backwards = {row: heard(again, row) for row in reversed(range(12))}
    for row in range(12):
        assert np.array_equal(heard(augmenter, row), backwards[row]), "whoever asks, in whatever order"
    first = heard(augmenter, 3)
    for other in (heard(augmenter, 3, epoch=1), heard(augmenter, 3, copy=1), heard(make(seed=4, **AUGMENTATION), 3)):
        assert len(other) != len(first) or not np.array_equal(other, first)


@pytest.mark.parametrize("name", ["augment_speed", "augment_noise", "augment_volume_db"])
def test_a_change_draws_the_same_whatever_else_is_on(make: Callable[..., Augmenter], name: str) -> None:
    """So that an ablation differs in one thing alone."""
    alone, among = make(**{name: AUGMENTATION[name]}), make(**AUGMENTATION)
    stream = {"augment_speed": augment.SPEED, "augment_noise": augment.NOISE, "augment_volume_db": augment.VOLUME}[name]
    for row in range(5):
        draws = [one._generator(row, 2, 0, stream).random(3).tolist() for one in (alone, among)]
        assert draws[0] == draws[1]
    assert alone.speeds(np.arange(5), 2, np.zeros(5, int)).tolist() == (
        among.speeds(np.arange(5), 2, np.zeros(5, int)).tolist() if name == "augment_speed" else [1.0] * 5
    )


def test_lengths_are_known_before_a_clip_is_read(make: Callable[..., Augmenter]) -> None:
    augmenter = make(**AUGMENTATION)
    for epoch in range(4):
        lengths = augmenter.lengths(np.arange(12), epoch, np.zeros(12, int))
        assert lengths.tolist() == [len(heard(augmenter, row, epoch)) for row in range(12)]
        assert set(lengths.tolist()) <= set(augmenter.possible_lengths(augmenter.dataset.num_samples).tolist())


def test_a_clip_is_never_said_too_fast_for_its_labels(make: Callable[..., Augmenter], dataset: ShardDataset) -> None:
    """Where CTC needs every frame that there is, no factor above 1 is taken, and slower ones still are."""
    frames = num_frames(dataset.num_samples.astype(np.int64), HF_CONFIG.conv_kernel, HF_CONFIG.conv_stride)
    tight, loose = (make(required, augment_speed=[0.8, 1.5]) for required in (frames, np.ones(12, int)))
    seen = set()
    for epoch in range(30):
        rows, copies = np.arange(12), np.zeros(12, int)
        kept, drawn = tight.speeds(rows, epoch, copies), loose.speeds(rows, epoch, copies)
        assert np.array_equal(kept, np.where(drawn > 1, 1.0, drawn))
        left = num_frames(tight.lengths(rows, epoch, copies), HF_CONFIG.conv_kernel, HF_CONFIG.conv_stride)
        assert (left >= frames).all()
        seen |= set(drawn.tolist())
    assert seen == {0.8, 1.5}


def test_babble_is_made_of_other_training_clips_alone(make: Callable[..., Augmenter], dataset: ShardDataset) -> None:
    augmenter = Augmenter.of(
        Augmentation(augment_noise=["babble"]), 1, dataset, np.array([4, 7]), np.ones(12, int), HF_CONFIG
    )
    read, original = set(), ShardDataset.__getitem__

    class Listening(ShardDataset):
        def __getitem__(self, row: int) -> object:
            read.add(row)
            return original(self, row)

    dataset.__class__ = Listening
    for epoch in range(20):
        augmenter(tone(200.0), 0, epoch, 0)
    assert read == {4, 7}
    read.clear()
    for epoch in range(20):
        augmenter(tone(200.0), 4, epoch, 0)
    assert read == {7}, "nobody babbles under their own voice"


# --- What cannot work ------------------------------------------------------------------------------------------------


def test_nothing_asked_for_is_no_augmenter(make: Callable[..., Augmenter]) -> None:
    assert make() is None


@pytest.mark.parametrize("flag", ["augment_noise", "augment_reverb"])
def test_folders_without_recordings_are_refused(make: Callable[..., Augmenter], tmp_path: Path, flag: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.wav").write_bytes(b"no audio")
    for folder, said in (("missing", "nor a folder"), ("empty", "holds no recording"), ("bad", "x.wav cannot be read")):
        with pytest.raises(UsageError, match=said):
            make(**{flag: [str(tmp_path / folder)]})


def test_a_recording_that_vanishes_is_named(make: Callable[..., Augmenter], tmp_path: Path) -> None:
    (tmp_path / "noises").mkdir()
    soundfile.write(tmp_path / "noises" / "hum.wav", tone(50.0), SAMPLE_RATE_HZ)
    augmenter = make(augment_noise=[str(tmp_path / "noises")], augment_noise_probability=1.0)
    (tmp_path / "noises" / "hum.wav").unlink()
    with pytest.raises(UsageError, match=r"hum\.wav, which augmentation draws from"):
        heard(augmenter, 0)


def test_other_recordings_make_another_fingerprint(make: Callable[..., Augmenter], tmp_path: Path) -> None:
    """So that a resume with another folder of noises is refused."""
    (tmp_path / "noises").mkdir()
    soundfile.write(tmp_path / "noises" / "hum.wav", tone(50.0), SAMPLE_RATE_HZ)
    settings = {"augment_noise": ["white", str(tmp_path / "noises")]}
    first = make(**settings).fingerprint
    assert make(**settings).fingerprint == first
    soundfile.write(tmp_path / "noises" / "hiss.wav", tone(5_000.0), SAMPLE_RATE_HZ)
    assert make(**settings).fingerprint != first


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"augment_speed": [0.3]}, "--augment_speed 0.3: factors lie in 0.5 .. 2.0"),
        ({"augment_speed": [0.955]}, "steps of 0.01"),
        (
            {"augment_noise": ["white"], "augment_noise_snr_db": [9.0, 3.0]},
            "--augment_noise_snr_db is 9 3, two rising numbers",
        ),
        ({"augment_band_hz": [2_000.0]}, "--augment_band_hz is 2000, two rising numbers within 500 .. 8000"),
        ({"augment_reverb": ["simulated"], "augment_reverb_seconds": [0.1, 9.0]}, "--augment_reverb_seconds is 0.1 9"),
        (
            {"augment_gap_seconds": 0.1, "augment_gap_probability": 0.0},
            "--augment_gap_probability is 0, it must lie in (0, 1]",
        ),
        ({"augment_noise": ["white"], "augment_noise_snr_db": []}, "--augment_noise_snr_db is , two rising numbers"),
        ({"augment_noise_snr_db": [1.0, 2.0]}, "--augment_noise_snr_db does nothing without --augment_noise"),
        ({"augment_gap_probability": 0.2}, "--augment_gap_probability does nothing without --augment_gap_seconds"),
        ({"augment_volume_db": -1.0}, "--augment_volume_db is -1, it cannot be negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], said: str) -> None:
    (error,) = Augmentation(**settings).augmentation_errors()
    assert said in error
