"""transcribe.py from outside: the texts of transformers' pipeline and of evaluate.py, whatever the batches."""

import csv
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import soundfile
import torch
from conftest import TALKATIVE, TINY_GROUP_NORM_MODEL, TINY_MODEL, make_rows, mounted, write_part
from transformers import pipeline

import data
import decoding
import evaluate
import recognition
import transcribe
from config import TrainConfig
from errors import exit_status
from pretrained import load_model, save_model
from recording import Recording

Command = Callable[..., int]
ROWS = make_rows(12, 3)


def write_model(folder: Path, fields: dict[str, object]) -> Path:
    """A model with random weights that says something else in every frame."""
    settings = TrainConfig(model_config=fields | TALKATIVE, vocabulary="large_960h", seed=5)
    save_model(load_model(settings, lambda: []), folder)
    return folder


@pytest.fixture(scope="module", params=[TINY_GROUP_NORM_MODEL, TINY_MODEL], ids=["group_norm", "layer_norm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", request.param)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Twelve WAV files of 0.4 to 1.1 s, 16 kHz, int16."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, samples, *_ in ROWS:
        soundfile.write(folder / f"{name}.wav", samples, 16_000)
    return folder


@pytest.fixture
def command(model: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run transcribe.py on the model; returns the status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["transcribe.py", "--model_name_or_path", *map(str, (model, *arguments))])
        return exit_status(transcribe.main)

    return run


def read_json(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_texts_are_those_of_the_pipeline_and_of_evaluate(
    model: Path, command: Command, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    assert command(clips, "--format", "json") == 0
    ours = {Path(one["file"]).stem: one["text"] for one in read_json(capsys.readouterr().out)}
    assert len(ours) == 12
    assert len(set(ours.values())) == 12
    recognise = pipeline("automatic-speech-recognition", model=str(model), device="cpu")
    theirs = {name: recognise(samples.astype(np.float32) / 32_768)["text"] for name, samples, *_ in ROWS}
    assert ours == theirs
    write_part(tmp_path / "data" / "test" / "part_1", ROWS)
    flags = ["--model_name_or_path", model, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "found"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--dataloader_num_workers", "0"])
    assert exit_status(evaluate.main) == 0
    with (tmp_path / "found" / "utterances.csv").open(newline="", encoding="utf-8") as file:
        assert {row["id"]: row["hypothesis"] for row in csv.DictReader(file)} == ours


def test_promise_2_texts_do_not_depend_on_the_batch(
    command: Command, clips: Path, capsys: pytest.CaptureFixture
) -> None:
    found = []
    for flags in (
        ("--per_device_eval_batch_size", 1),
        (),
        ("--per_device_eval_batch_size", 5),
        ("--max_batch_seconds", 2),
    ):
        assert command(clips, "--format", "json", *flags) == 0
        found.append([one["text"] for one in read_json(capsys.readouterr().out)])
    assert found[1:] == found[:1] * 3


def long_recording(path: Path, seconds: float) -> Path:
    """The clips over and over."""
    rng = np.random.default_rng(0)
    pieces, length = [], 0
    while length < seconds * 16_000:
        pieces.append(ROWS[int(rng.integers(12))][1])
        length += len(pieces[-1])
    soundfile.write(path, np.concatenate(pieces)[: round(seconds * 16_000)], 16_000)
    return path


def test_a_long_recording_passes_in_windows_of_the_asked_length(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch is longer, whatever the recording; and every word has its place in it."""
    longest = []
    forward = recognition.Recogniser.log_probs

    def log_probs(self: recognition.Recogniser, audio: list[np.ndarray]) -> list[np.ndarray]:
        longest.append((len(audio), max(map(len, audio))))
        return forward(self, audio)

    monkeypatch.setattr(recognition.Recogniser, "log_probs", log_probs)
    path = long_recording(tmp_path / "long.wav", 61.3)
    flags = ("--chunk_length_s", 8, "--stride_length_s", 1, "--max_batch_seconds", 24)
    assert command(path, "--format", "json", *flags) == 0
    assert max(samples for _, samples in longest) == 8 * 16_000
    assert max(rows for rows, _ in longest) == 3
    (found,) = read_json(capsys.readouterr().out)
    assert found["seconds"] == 61.3
    words = found["words"]
    assert " ".join(word["text"] for word in words).split() == found["text"].split()
    starts = [word["start"] for word in words]
    assert starts == sorted(starts)
    assert words[-1]["end"] > 60


def test_windows_give_the_frames_of_the_whole_where_context_is_short(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that hears 8 frames to each side and no further: windows change no text at all."""
    path = long_recording(tmp_path / "long.wav", 40)

    def texts(chunk: float, stride: float) -> str:
        settings = {"model_name_or_path": str(model), "chunk_length_s": chunk, "stride_length_s": stride}
        recogniser = recognition.Recogniser(recognition.TranscribeConfig(**settings))
        receptive_field = recogniser.model.receptive_field
        # Attention and instance statistics are what hears further: here they hear nothing.
        kernel = torch.nn.functional.normalize(torch.randn(32, 320, generator=torch.Generator().manual_seed(0)))

        def local(input_values_BS: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            frames_BT = (lengths_B - receptive_field) // recogniser.grid.hop + 1
            logits_BVT = torch.nn.functional.conv1d(input_values_BS[:, None], kernel[:, None], stride=320)
            return 9 * logits_BVT.transpose(1, 2), frames_BT

        monkeypatch.setattr(recogniser, "model", local)
        monkeypatch.setattr(data, "standardise", lambda audio: audio.astype(np.float32) / 9_000)
        ((_, (transcript, _)),) = recogniser.read([("x", Recording(str(path)))], lambda _: None)
        return transcript.text

    whole = texts(60, 10)
    assert len(whole) > 300
    for chunk, stride in ((30, 4), (8, 1), (4, 0.5)):
        assert texts(chunk, stride) == whole


def test_a_language_model_gives_the_texts_of_evaluate(
    model: Path, command: Command, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """And times that lie in the clip; words are those of the list."""
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="the extra lm is not installed (flashlight-text)")
    for split, rows in (("train", make_rows(12, 1)), ("dev", make_rows(4, 2)), ("test", ROWS)):
        write_part(tmp_path / "data" / split / "part_1", rows)
    (tmp_path / "text.txt").write_text("\n".join(row[2] for row in make_rows(200, 7)))
    flags = [
        "--text",
        tmp_path / "text.txt",
        "--data_dir",
        tmp_path / "data",
        "--out",
        tmp_path / "lm",
        "--case",
        "upper",
    ]
    monkeypatch.setattr(sys, "argv", ["decoding.py", "build-lm", *map(str, flags)])
    assert exit_status(decoding.main) == 0
    flags = ["--lm", tmp_path / "lm", "--lm_weight", 1, "--word_score", 2]
    capsys.readouterr()
    assert command(clips, "--format", "json", *flags) == 0
    ours = {Path(one["file"]).stem: one for one in read_json(capsys.readouterr().out)}
    flags += ["--model_name_or_path", model, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "found"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--beam_workers", "0"])
    assert exit_status(evaluate.main) == 0
    with (tmp_path / "found" / "lm" / "utterances.csv").open(newline="", encoding="utf-8") as file:
        assert {row["id"]: row["hypothesis"] for row in csv.DictReader(file)} == {k: v["text"] for k, v in ours.items()}
    listed = {word for row in make_rows(200, 7) for word in row[2].split()}
    for one in ours.values():
        assert [word["text"] for word in one["words"]] == one["text"].split()
        assert {word["text"] for word in one["words"]} <= listed
        assert all(0 <= word["start"] < word["end"] <= one["seconds"] for word in one["words"])
    assert any(one["text"] for one in ours.values())


def test_bad_files_are_named_and_the_others_transcribed(
    command: Command, clips: Path, capsys: pytest.CaptureFixture
) -> None:
    (clips / "broken.wav").write_bytes(b"RIFF nothing")
    assert command(clips / "u3_0.wav", clips / "broken.wav", clips / "none.wav", clips / "u3_1.wav") == 1
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [str(clips / f"u3_{row}.wav") for row in (0, 1)]
    assert re.search(r"^skipped \S*broken.wav: undecodable \(", said.err, re.M)
    assert re.search(r"^skipped \S*none.wav: missing \(no such file\)", said.err, re.M)
    assert said.err.splitlines()[-1].startswith("failed: 2 of 4 files without a whole transcript: ")
    assert "Traceback" not in said.err


def test_thousands_of_short_files_do_not_use_up_the_open_files(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for row in range(400):
        soundfile.write(tmp_path / f"{row:03d}.wav", ROWS[row % len(ROWS)][1][:800], 16_000)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # As few as macOS allows, beside those that the tests have open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 200, limits[1]))
    try:
        assert command(tmp_path) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [str(tmp_path / f"{row:03d}.wav") for row in range(400)]


@pytest.mark.parametrize(
    ("name", "shown"), [(b"caf\xe9.wav", "caf\ufffd.wav"), ("a\nb\tc [x] ' é.wav".encode(), "a b c [x] ' é.wav")]
)
def test_odd_names_are_shown_in_one_line(
    name: bytes, shown: str, command: Command, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "odd").mkdir()
    path = os.path.join(os.fsencode(tmp_path / "odd"), name)  # noqa: PTH118 - no text
    shutil.copy(clips / "u3_4.wav", path)
    assert command(clips / "u3_4.wav") == 0
    text = capsys.readouterr().out
    shutil.copy(clips / "u3_4.wav", tmp_path / "odd" / "z.wav")
    assert command(tmp_path / "odd") == 0
    lines = capsys.readouterr().out.encode().decode().splitlines(keepends=True)
    assert lines == [f"{tmp_path / 'odd' / shown}\t{text}", f"{tmp_path / 'odd' / 'z.wav'}\t{text}"]
    assert command(tmp_path / "odd", "--format", "all", "--output_dir", tmp_path / "out") == 0
    assert [len(list((tmp_path / "out").glob(f"*.{kind}"))) for kind in ("txt", "json", "ctm")] == [2, 2, 2]


def test_every_format_in_a_folder(command: Command, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (clips / "sub").mkdir()
    shutil.copy(clips / "u3_0.wav", clips / "sub" / "u3_0.wav")
    soundfile.write(clips / "u3_1.flac", ROWS[2][1], 16_000)
    assert command(clips, "--format", "all", "--output_dir", tmp_path / "out") == 0
    assert capsys.readouterr().out == ""
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    kinds = ("txt", "json", "srt", "vtt", "ctm")
    stems = ["sub/u3_0", "u3_1.flac", "u3_1.wav", *(f"u3_{row}" for row in range(12) if row != 1)]
    assert found == {f"{stem}.{kind}" for stem in stems for kind in kinds}
    text = (tmp_path / "out" / "u3_0.txt").read_text()
    assert text == (tmp_path / "out" / "sub" / "u3_0.txt").read_text()
    assert json.loads((tmp_path / "out" / "u3_0.json").read_text())["text"] == text.removesuffix("\n")


def test_stdin(command: Command, clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert command(clips / "u3_4.wav") == 0
    expected = capsys.readouterr().out
    with (clips / "u3_4.wav").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert command("-") == 0
    assert capsys.readouterr().out == expected


def test_ctrl_c_does_not_wait_for_the_end_of_stdin(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    reader, writer = os.pipe()

    def interrupt(_: Future) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupt)
    with os.fdopen(reader) as stdin, os.fdopen(writer, "wb"):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert command("-") == 130, "and it has returned while the pipe was open"
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_gone_ends_the_work(
    command: Command, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(transcribe, "GROUP_FILES", 3)
    read = recognition.Recogniser.read
    groups = []
    monkeypatch.setattr(recognition.Recogniser, "read", lambda *given: groups.append(given[1]) or read(*given))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") as stdout:
        os.dup2(writer, stdout.fileno())
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command(clips) == 1
        assert len(groups) == 1
        assert command(clips, "--output_dir", tmp_path / "out") == 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # What is left in the buffer goes nowhere.
    assert "stdout is closed" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 12


def test_a_full_disk_behind_stdout_is_one_line(
    command: Command, clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with open(os.open("/dev/full", os.O_WRONLY), "w") as stdout:  # noqa: PTH123 - a descriptor to be turned elsewhere
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command(clips / "u3_0.wav") == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    assert capsys.readouterr().err.splitlines()[-1] == "failed: stdout cannot be written: No space left on device"


def test_progress_counts_the_seconds_of_the_shortest_files(
    command: Command, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    class Watched(transcribe.Progress):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            bars.append(self)

    monkeypatch.setattr(transcribe, "Progress", Watched)
    soundfile.write(tmp_path / "short.wav", ROWS[0][1][:4_000], 16_000)
    assert command(tmp_path / "short.wav", clips / "u3_0.wav") == 0
    (bar,) = bars
    assert bar.done == pytest.approx(0.25 + len(ROWS[0][1]) / 16_000)
    with (clips / "u3_4.wav").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert command("-") == 0
    assert bars[1].total == round(bars[1].done) > 0, "known once it has been read"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--audio is missing: name files, folders, or - for stdin"),
        (("{clips}", "--format", "srt"), "12 files as srt need --output_dir, a file for each"),
        (("{clips}/u3_0.wav", "--format", "all"), "1 files as txt, json, srt, vtt, ctm need --output_dir"),
        (("{clips}/empty",), "{clips}/empty: no audio file in it"),
        (("{clips}/u3_0.wav", "--format", "doc"), "--format is 'doc', one of txt, json, srt, vtt, ctm, all is needed"),
        (("{clips}/u3_0.wav", "--chunk_length_s", "8"), "--chunk_length_s is 8, it must lie between four times"),
        (
            ("{clips}/u3_0.wav", "--beam_size", "8"),
            "--beam_size belongs to a language model: name its folder with --lm",
        ),
        (("{clips}/u3_0.wav", "--lm", "{clips}/none"), "none"),
        (("{clips}/u3_0.wav", "--beams", "8"), "unknown setting --beams: the nearest known one is"),
        (("{clips}/u3_0.wav", "{tmp}/other/u3_0.wav", "--output_dir", "{tmp}/out"), "2 of the files are called u3_0"),
        (("{clips}/u3_0.wav", "--output_dir", "{clips}/u3_1.wav"), "u3_1.wav is a file: name a folder"),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    arguments: tuple[str, ...], said: str, command: Command, clips: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    places = {"clips": clips, "tmp": tmp_path}
    for name in (clips / "empty", tmp_path / "other"):
        name.mkdir()
    shutil.copy(clips / "u3_0.wav", tmp_path / "other")
    assert command(*(one.format(**places) for one in arguments)) == 2
    assert said.format(**places) in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_without_room_is_one_line(
    command: Command, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with mounted(tmp_path / "disk", "size=4k") as disk:
        assert command(clips, "--output_dir", disk) == 1
    assert "disk full at " in capsys.readouterr().err.splitlines()[-1]
