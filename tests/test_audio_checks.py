"""Checks of the audio: what is found, named, warned of and refused, from stored columns alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_part

import audio_checks
from audio_checks import check_audio
from data import ShardDataset
from findings import Finding

Row = tuple[str, np.ndarray, str, str]


def wave(amplitude: float = 0.3, seconds: float = 0.5, frequency: float = 6_000.0) -> np.ndarray:
    """Speech stands for itself as two tones: 300 Hz and one that shows the band."""
    time = np.arange(int(16_000 * seconds)) / 16_000
    signal = amplitude * (np.sin(2 * np.pi * 300 * time) + 0.3 * np.sin(2 * np.pi * frequency * time)) / 1.3
    return np.rint(np.clip(signal, -1, 1) * 32_767).astype(np.int16)


GOOD = wave()
SILENT = np.zeros(8_000, np.int16)
CONSTANT = np.full(8_000, 5_000, np.int16)
DITHER = np.tile(np.array([1, -1], np.int16), 4_000)
QUIET = wave(0.001)
CLIPPED = wave(2.0)
OFFSET = GOOD + np.int16(1_000)
NARROW = wave(frequency=3_000.0)
EDGES = np.concatenate((np.zeros(3_200, np.int16), GOOD, np.zeros(3_200, np.int16)))


def rows(*clips: tuple[str, np.ndarray, int]) -> list[Row]:
    return [(f"{name}{number}", samples, "x", "") for name, samples, count in clips for number in range(count)]


def judge(folder: Path, **splits: list[Row]) -> list[Finding]:
    for split, content in splits.items():
        write_part(folder / split / "part_1", content)
    return check_audio({split: ShardDataset(folder / split) for split in splits})


# name: what the train split holds beside good clips, how many good ones, the finding's beginning, verdict, count
CASES = {
    "a silent clip": ([("silent", SILENT, 1)], 3, "silent or constant", "warning", 1),
    "a constant clip": ([("constant", CONSTANT, 1)], 3, "silent or constant", "warning", 1),
    "dither alone": ([("dither", DITHER, 1)], 3, "silent or constant", "warning", 1),
    "half of the clips silent": ([("silent", SILENT, 2)], 2, "silent or constant", "warning", 2),
    "most clips silent": ([("silent", SILENT, 2), ("constant", CONSTANT, 1)], 2, "silent or constant", "refused", 3),
    "one silent clip in 1,000": ([("silent", SILENT, 1)], 999, "silent or constant", "ok", 1),
    "a quiet clip in ten": ([("quiet", QUIET, 1)], 9, "very quiet", "ok", 1),
    "two quiet clips in ten": ([("quiet", QUIET, 2)], 8, "very quiet", "warning", 2),
    "silent is not quiet": ([("silent", SILENT, 2)], 8, "very quiet", "ok", 0),
    "a clipped clip in ten": ([("clipped", CLIPPED, 1)], 9, "clipped", "ok", 1),
    "two clipped clips in ten": ([("clipped", CLIPPED, 2)], 8, "clipped", "warning", 2),
    "a constant is not clipped": ([("constant", CONSTANT, 2)], 8, "clipped", "ok", 0),
    "an offset in ten": ([("offset", OFFSET, 1)], 9, "DC offset", "ok", 1),
    "two offsets in ten": ([("offset", OFFSET, 2)], 8, "DC offset", "warning", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_clips_are_counted_named_and_judged(tmp_path: Path, case: str) -> None:
    bad, num_good, topic, verdict, count = CASES[case]
    found = judge(tmp_path, train=rows(*bad, ("good", GOOD, num_good)))
    (finding,) = [finding for finding in found if finding.result.startswith(topic)]
    assert finding.verdict == verdict
    assert finding.facts["train"]["count"] == count
    if count:
        total = count + num_good if topic != "very quiet" else 10
        assert f"train {count:,} of {total:,} (" in finding.result and f"): {bad[0][0]}0" in finding.result
        assert "good" not in finding.result
    else:
        assert finding.result.endswith(": none")
    assert bool(finding.remedy) == (verdict != "ok")


def test_nothing_is_said_against_good_clips(tmp_path: Path) -> None:
    found = judge(tmp_path, train=make_rows(13, seed=1), dev=make_rows(5, seed=2), test=make_rows(4, seed=3))
    assert [finding.verdict for finding in found] == ["ok"] * 7
    assert [finding.check for finding in found] == [
        "audio silence", "audio level", "audio clipping", "audio offset", "audio band", "audio edges", "audio length",
    ]  # fmt: skip
    assert [finding.result.split(":")[1] for finding in found[:4]] == [" none"] * 4
    json.dumps([finding.facts for finding in found])


def test_silent_clips_of_dev_count_but_never_refuse(tmp_path: Path) -> None:
    silence = judge(tmp_path, train=rows(("good", GOOD, 5)), dev=rows(("silent", SILENT, 3)))[0]
    assert silence.verdict == "warning"
    assert silence.result == "silent or constant: dev 3 of 3 (100 %): silent0, silent1, silent2"


def test_the_worst_clips_are_named_first_and_not_too_many(tmp_path: Path) -> None:
    content = rows(
        *((f"gain{gain}_", wave(gain, frequency=300), 1) for gain in (1.5, 1.2, 3.0, 2.0)), ("good", GOOD, 1)
    )
    clipped = judge(tmp_path, train=content)[2]
    assert clipped.result.endswith("train 4 of 5 (80 %): gain3.0_0, gain2.0_0, gain1.5_0, ...")


def band(found: list[Finding]) -> Finding:
    return next(finding for finding in found if finding.result.startswith("sound in the median clip"))


def test_8_khz_speech_at_a_higher_rate_is_said_and_not_refused(tmp_path: Path) -> None:
    finding = band(judge(tmp_path, train=rows(("n", NARROW, 3)), dev=rows(("n", NARROW, 1))))
    assert finding.verdict == "ok"
    assert "train up to 3.0 kHz in files of 16 kHz (100 % of the clips are 8 kHz speech" in finding.result
    assert "telephone-band speech (below 4 kHz)" in finding.result
    facts = finding.facts["train"]
    assert (facts["declared_rate_hz"], facts["narrow_band_share"]) == (16_000, 1.0)
    assert facts["highest_hz"] == pytest.approx(3_000, abs=63)


def test_a_test_split_of_another_band_is_warned_of(tmp_path: Path) -> None:
    wide, narrow = rows(("w", GOOD, 3)), rows(("n", NARROW, 3), ("silent", SILENT, 9))
    finding = band(judge(tmp_path, train=wide, dev=wide, test=narrow))
    assert finding.verdict == "warning"
    assert finding.remedy.startswith("test and training differ in band")
    assert "telephone" not in finding.result


def test_silence_around_speech(tmp_path: Path) -> None:
    found = judge(tmp_path, train=rows(("edges", EDGES, 2), ("silent", SILENT, 1)), dev=rows(("good", GOOD, 1)))[-2]
    # 0.4 of 0.9 s, twice; the silent clip counts elsewhere.
    assert found.facts["train"]["seconds"] == pytest.approx(0.8)
    assert found.facts["train"]["share"] == pytest.approx(0.8 / 2.3, abs=1e-3)
    assert found.verdict == "warning" and "most in edges0, edges1" in found.remedy
    assert "train 35 %, dev 0 % of the audio" in found.result


def test_the_longest_clips_are_named(tmp_path: Path) -> None:
    content = [(f"c{seconds}", wave(seconds=seconds), "x", "") for seconds in (0.5, 2.0, 1.0, 0.2)]
    longest = judge(tmp_path, train=content, test=content[:1])[-1]
    assert longest.result == "longest clips: train c2.0 2.0 s, c1.0 1.0 s, c0.5 0.5 s; test c0.5 0.5 s"


def test_no_audio_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_checks.ShardDataset, "__getitem__", lambda *_: pytest.fail("a row was read"))
    write_part(tmp_path / "train" / "part_1", rows(("good", GOOD, 2), ("silent", SILENT, 2)))
    check_audio({"train": ShardDataset(tmp_path / "train")}, max_examples=0)
