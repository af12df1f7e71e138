"""evaluate.py --lm: both readings of the same utterances, in files of the same kind, whatever the batch."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jiwer
import pytest
from conftest import make_rows, run_command, train_two_updates, write_part

import decoding
import evaluate
from error_classes import ErrorClasses
from pretrained import weights_checksum

Command = Callable[..., int]
WORDS = ("--lm_weight", 1, "--word_score", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/model that writes letters at random, beside its data and a language model of words and one of characters."""
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="the extra lm is not installed (flashlight-text)")
    folder = tmp_path_factory.mktemp("run")
    for split, count, seed in (("train", 12, 1), ("dev", 4, 2), ("test", 30, 3)):
        write_part(folder / "data" / split / "part_1", make_rows(count, seed))
    train_two_updates(folder)
    (folder / "text.txt").write_text("\n".join(row[2] for row in make_rows(200, 7)))
    for unit in ("word", "character"):
        assert run_command(
            decoding.main, "decoding.py", "build-lm", "--text", folder / "text.txt", "--data_dir", folder / "data",
            "--out", folder / unit, "--unit", unit, "--model_name_or_path", folder / "run" / "model",
        ) == 0  # fmt: skip
    return folder / "run" / "model"


@pytest.fixture
def command(model: Path, tmp_path: Path) -> Command:
    """Run evaluate.py --lm on the test split into tmp_path / name, decoding in this process; returns the status."""

    def evaluated(name: str, unit: str, *flags: object) -> int:
        base = ["--model_name_or_path", model, "--data_dir", model.parents[1] / "data", "--output_dir", tmp_path / name]
        base += ["--lm", model.parents[1] / unit, "--dataloader_num_workers", 0, "--beam_workers", 0]
        return run_command(evaluate.main, "evaluate.py", *base, *flags)

    return evaluated


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "utterances.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("unit", ["word", "character"])
def test_both_readings_side_by_side(
    unit: str, command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("found", unit, *WORDS) == 0
    screen = capsys.readouterr().out
    folder = tmp_path / "found"
    greedy, with_lm = read_rows(folder), read_rows(folder / "lm")
    assert [row["id"] for row in greedy] == [row["id"] for row in with_lm] == [f"u3_{row}" for row in range(30)]
    references = [row["reference"] for row in greedy]
    assert references == [row["reference"] for row in with_lm]
    classes = ErrorClasses()
    for place, rows in ((folder, greedy), (folder / "lm", with_lm)):
        results, hypotheses = read_json(place / "results.json"), [row["hypothesis"] for row in rows]
        assert results["wer"] == pytest.approx(jiwer.wer(references, hypotheses))
        assert results["cer"] == pytest.approx(jiwer.cer(references, hypotheses))
        assert results["empty_hypotheses"] == hypotheses.count("")
        assert f"WER {results['wer']:.2%} [{results['wer_low']:.2%}, {results['wer_high']:.2%}]" in screen
    for one, other in zip(greedy, with_lm, strict=True):
        classes.add(one["reference"], one["hypothesis"], other["hypothesis"])
    comparison = read_json(folder / "lm" / "comparison.json")
    assert comparison["error_classes"] == classes.facts()
    assert comparison["utterances"] == 30
    difference = comparison["differences"][0]["interval"]["rate"]
    assert difference == pytest.approx(results["wer"] - read_json(folder / "results.json")["wer"])
    assert sum(one["hypothesis"] != other["hypothesis"] for one, other in zip(greedy, with_lm, strict=True)) > 20
    assert f"all, of {classes.words} words" in screen
    assert results["audio_seconds_per_second"].keys() == {"recogniser", "beam_search"}
    assert "language_model" not in read_json(folder / "results.json")
    listed = {line.split("\t")[0] for line in (model.parents[1] / unit / "words.tsv").read_text().splitlines()}
    if unit == "word":
        assert {word for row in with_lm for word in row["hypothesis"].split()} <= listed
        unlisted = sum(word not in listed for text in references for word in text.split())
        assert results["unlisted_words"] == unlisted > 0
        assert f"{unlisted / classes.words:.1%} of the references' words are not in its list" in screen


def test_greedy_texts_are_those_without_a_language_model(command: Command, model: Path, tmp_path: Path) -> None:
    assert command("with", "character", *WORDS) == 0
    base = ["--model_name_or_path", model, "--data_dir", model.parents[1] / "data", "--output_dir", tmp_path / "alone"]
    assert run_command(evaluate.main, "evaluate.py", *base, "--dataloader_num_workers", 0) == 0
    assert (tmp_path / "with" / "utterances.csv").read_bytes() == (tmp_path / "alone" / "utterances.csv").read_bytes()
    assert command("with", "character", "--beam_size", 1, "--lm_weight", 0, "--word_score", 0) == 0
    pairs = zip(read_rows(tmp_path / "with" / "lm"), read_rows(tmp_path / "with"), strict=True)
    texts = [(one["hypothesis"], other["hypothesis"]) for one, other in pairs if "<unk>" not in other["hypothesis"]]
    assert len(texts) > 3
    assert all(beam_1 == greedy for beam_1, greedy in texts)


def test_texts_do_not_depend_on_batch_or_processes(command: Command, tmp_path: Path) -> None:
    assert command("alone", "word", *WORDS, "--per_device_eval_batch_size", 1) == 0
    assert command("all", "word", *WORDS, "--per_device_eval_batch_size", 32, "--beam_workers", 2) == 0
    for name in ("utterances.csv", "lm/utterances.csv", "lm/comparison.json"):
        content = (tmp_path / "alone" / name).read_bytes().replace(b"alone", b"all")
        assert content == (tmp_path / "all" / name).read_bytes()


def test_a_batch_that_runs_out_of_memory_is_decoded_once(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("whole", "word", *WORDS) == 0
    passes, forward = [], evaluate.ModelScorer.forward

    def failing(scorer: evaluate.ModelScorer, batch: object) -> object:
        found = forward(scorer, batch)
        passes.append(len(batch.texts))
        if len(batch.texts) > 2:
            raise MemoryError
        return found

    monkeypatch.setattr(evaluate.ModelScorer, "forward", failing)
    assert command("cut", "word", *WORDS) == 0
    assert max(passes) > 2 >= min(passes)
    assert (tmp_path / "cut" / "lm" / "utterances.csv").read_bytes() == (
        tmp_path / "whole" / "lm" / "utterances.csv"
    ).read_bytes()


def test_weights_and_whose_they_are(
    command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(model.parents[1] / "word", model.parents[1] / "tuned", dirs_exist_ok=True)
    path = model.parents[1] / "tuned" / "tuning.json"
    tuned = {"lm_weight": 0.5, "word_score": 1.5, "beam_size": 9, "data": "data/dev"}
    for checksum, flags, said in (
        (weights_checksum(model), (), "weight 0.5, score 1.5, beam 9)"),
        ("of another model", (), "tuned on data/dev for another recogniser: run decoding.py tune"),
        (weights_checksum(model), ("--word_score", 0), "these weights were not tuned"),
    ):
        path.write_text(json.dumps(tuned | {"model_sha256": checksum}))
        assert command("found", "tuned", *flags) == 0
        screen = capsys.readouterr().out
        assert said in screen
        assert ("tuned on" in screen or "not tuned" in screen) == (said != "weight 0.5, score 1.5, beam 9)")
    used = read_json(tmp_path / "found" / "lm" / "results.json")["language_model"]
    assert (used["lm_weight"], used["word_score"], used["beam_size"]) == (0.5, 0.0, 9)


def test_results_without_a_language_model_leave_none_behind(command: Command, model: Path, tmp_path: Path) -> None:
    assert command("found", "word") == 0
    assert (tmp_path / "found" / "lm").is_dir()
    base = ["--model_name_or_path", model, "--data_dir", model.parents[1] / "data", "--output_dir", tmp_path / "found"]
    assert run_command(evaluate.main, "evaluate.py", *base, "--dataloader_num_workers", 0) == 0
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"results.json", "utterances.csv"}


@pytest.mark.parametrize(
    ("unit", "flags", "said"),
    [
        ("none", (), "none holds no language model (lm.json): make one with decoding.py build-lm"),
        ("word", ("--beam_size", 0), "--beam_size is 0, at least 1 is needed"),
        ("word", ("--beam_workers", -2), "--beam_workers is -2"),
        ("word", ("--lm_weight", -1), "--lm_weight is -1.0, it cannot be negative"),
        (
            "word",
            ("--lm", "null", "--beam_size", 5),
            "--beam_size belongs to a language model: name its folder with --lm",
        ),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    unit: str, flags: tuple[object, ...], said: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("found", unit, *flags) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "found" / "results.json").exists()
