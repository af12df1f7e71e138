"""evaluate.py from outside: its tables against jiwer, the same for every batch size, and what it refuses."""

import csv
import json
import os
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jiwer
import numpy as np
import pytest
from conftest import TINY_GROUP_NORM_MODEL, make_rows, train_two_updates, write_part, write_recipe

import evaluate
import memory
import scoring
import train
from errors import exit_status
from results import TextSpool

Command = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two updates that says something else about every clip, and its data: RUN/model beside data."""
    folder = tmp_path_factory.mktemp("run")
    accents = [{"accent": "north" if row % 2 else "south"} for row in range(40)]
    for split, count, seed in (("train", 12, 1), ("dev", 4, 2)):
        write_part(folder / "data" / split / "part_1", make_rows(count, seed))
    write_part(folder / "data" / "test" / "part_1", make_rows(40, 3, ("ann", "cem")), metadata=accents)
    return train_two_updates(folder, characters_to_ignore="E")


@pytest.fixture
def command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run evaluate.py on the model's test split into tmp_path / name, with more flags behind; returns the status."""

    def run(name: str, *flags: object) -> int:
        base = {"model_name_or_path": model, "data_dir": model.parents[1] / "data", "output_dir": tmp_path / name}
        base["dataloader_num_workers"] = 0
        arguments = [str(part) for name, value in base.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, *map(str, flags)])
        return exit_status(evaluate.main)

    return run


@pytest.fixture
def other(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be changed."""
    return shutil.copytree(model, tmp_path / "other")


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "utterances.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_figures_are_those_of_jiwer_over_the_table(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("found") == 0
    rows, results = read_rows(tmp_path / "found"), read_results(tmp_path / "found")
    assert [row["id"] for row in rows] == [f"u3_{row}" for row in range(40)]
    assert not any("E" in row["reference"] for row in rows), "the rules of the model's training"
    references, hypotheses = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
    words = jiwer.process_words(references, hypotheses)
    assert results["wer"] == pytest.approx(words.wer)
    assert results["cer"] == pytest.approx(jiwer.cer(references, hypotheses))
    for name in ("insertions", "deletions", "substitutions", "hits"):
        assert results["words"][name] == sum(int(row[f"word_{name}"]) for row in rows)
    assert results["words"]["insertions"] + results["words"]["deletions"] == words.insertions + words.deletions
    wrong = [jiwer.wer(*pair) > 0 for pair in zip(references, hypotheses, strict=True)]
    assert results["sentence_error_rate"] == np.mean(wrong)
    assert results["wer_low"] < results["wer"] < results["wer_high"]
    assert results["interval"] == {"confidence": 0.95, "unit": "utterances", "units": 40}
    assert sum(letter["occurrences"] for letter in results["letters"].values()) == sum(
        len(reference.replace(" ", "")) for reference in references
    )
    screen = capsys.readouterr().out
    assert f"WER {results['wer']:.2%} [{results['wer_low']:.2%}, {results['wer_high']:.2%}]" in screen
    assert "so it does not cover new voices" in screen
    assert "worst slice: " in screen


def test_slices_are_rates_over_their_rows(command: Command, tmp_path: Path) -> None:
    assert command("found", "--slices", "accent", "speaker_in_train") == 0
    rows, results = read_rows(tmp_path / "found"), read_results(tmp_path / "found")
    slices = {(one["slice"], one["group"]): one for one in results["slices"]}
    assert {name for name, _ in slices} == {"accent", "speaker_in_train"}
    for key, column, value in (
        (("accent", "north"), "accent", "north"),
        (("speaker_in_train", "yes"), "speaker", "ann"),
        (("speaker_in_train", "no"), "speaker", "cem"),
    ):
        inside = [row for row in rows if row[column] == value]
        assert slices[key]["utterances"] == len(inside) == 20
        expected = jiwer.wer([row["reference"] for row in inside], [row["hypothesis"] for row in inside])
        assert slices[key]["wer"] == pytest.approx(expected)


def test_promise_2_tables_do_not_depend_on_the_batch(command: Command, tmp_path: Path) -> None:
    assert command("alone", "--per_device_eval_batch_size", 1) == 0
    alone = (tmp_path / "alone" / "utterances.csv").read_bytes()
    assert len({row["hypothesis"] for row in read_rows(tmp_path / "alone")}) > 30
    for name, flags in (("four", (4,)), ("all", (32,)), ("seconds", (8, "--max_batch_seconds", 3))):
        assert command(name, "--per_device_eval_batch_size", *flags) == 0
        assert (tmp_path / name / "utterances.csv").read_bytes() == alone


@pytest.fixture
def with_unknown(model: Path, tmp_path: Path) -> Path:
    """The test split with letters that the vocabulary lacks: 3 in one text, 1 in another."""
    rows = make_rows(6, 3)
    for row, text in ((1, "AB ÑÑ AÉ"), (4, "ÑAB CD")):
        rows[row] = (*rows[row][:2], text, rows[row][3])
    write_part(tmp_path / "data" / "test" / "part_1", rows)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("policy", "references", "said"),
    [
        ("count", {1: "ab ññ aé", 4: "ñab cd"}, "they count as errors"),
        ("drop_character", {1: "ab a", 4: "ab cd"}, "taken out of the references"),
        ("drop_utterance", {}, "their utterances are not scored"),
    ],
)
def test_letters_outside_the_vocabulary(
    policy: str, references: dict[int, str], said: str, command: Command, with_unknown: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    assert command("found", "--data_dir", with_unknown, "--unknown", policy) == 0
    found = {row["id"]: row["reference"] for row in read_rows(tmp_path / "found")}
    assert {row: found.get(f"u3_{row}") for row in references} == references
    assert len(found) == (4 if policy == "drop_utterance" else 6)
    screen = capsys.readouterr().out
    assert "letters of this split that the vocabulary lacks: 4 ('ñ' 3, 'é' 1)" in screen
    assert said in screen
    drops = tmp_path / "found" / "drop_list.csv"
    if policy == "drop_utterance":
        assert drops.read_text().splitlines() == [
            "split,id,reason,detail", "test,u3_1,unknown_letters,éñ", "test,u3_4,unknown_letters,ñ",
        ]  # fmt: skip
        assert "4 of 6 utterances" in screen
    else:
        assert not drops.exists()


def test_a_subset_is_fixed_and_said(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("first", "second"):
        assert command(name, "--max_eval_samples", 10) == 0
    assert read_rows(tmp_path / "first") == read_rows(tmp_path / "second")
    assert len(read_rows(tmp_path / "first")) == 10
    assert "10 of 40 utterances" in capsys.readouterr().out


def test_comparison_with_results_and_with_a_model(
    command: Command, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Another model: the same one, with letters swapped in its vocabulary."""
    labels = json.loads((other / "vocab.json").read_text())
    labels["a"], labels["b"] = labels["b"], labels["a"]
    (other / "vocab.json").write_text(json.dumps(labels))
    assert command("both", "--compare", other) == 0
    own, theirs = read_results(tmp_path / "both"), read_results(tmp_path / "both" / "compared")
    comparison = json.loads((tmp_path / "both" / "comparison.json").read_text())
    wer, cer = comparison["differences"]
    assert comparison["other_model"] == str(other)
    assert comparison["other"][0]["rate"] == pytest.approx(theirs["wer"])
    assert wer["interval"]["rate"] == pytest.approx(own["wer"] - theirs["wer"])
    assert cer["interval"]["rate"] == pytest.approx(own["cer"] - theirs["cer"])
    assert wer["interval"]["low"] <= wer["interval"]["rate"] <= wer["interval"]["high"]
    pairs = zip(read_rows(tmp_path / "both"), read_rows(tmp_path / "both" / "compared"), strict=True)
    errors = [tuple(sum(int(row[f"word_{part}"]) for part in PARTS) for row in pair) for pair in pairs]
    assert wer["changed"] == sum(first != second for first, second in errors)
    assert "compared on 40 utterances" in capsys.readouterr().out
    assert command("again", "--compare", tmp_path / "both" / "compared") == 0
    assert json.loads((tmp_path / "again" / "comparison.json").read_text())["differences"] == [wer, cer]


PARTS = ("insertions", "deletions", "substitutions")


def test_the_other_model_is_judged_by_the_same_texts(command: Command, other: Path, tmp_path: Path) -> None:
    """A model of the hub has no text rules of its own: it gets those of the one that it is compared with."""
    (other / "text_rules.json").unlink()
    assert command("both", "--compare", other) == 0
    comparison = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert (comparison["utterances"], comparison["left_out"]) == (40, 0)
    assert read_results(tmp_path / "both" / "compared")["text_rules"]["characters_to_ignore"] == "E"
    assert command("both", "--max_eval_samples", 5) == 0
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"results.json", "utterances.csv"}, "nothing stale"


def test_results_are_not_compared_with_what_replaced_them(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("first") == 0
    before = (tmp_path / "first" / "utterances.csv").read_bytes()
    assert command("first", "--compare", tmp_path / "first") == 2
    assert "the new results would replace it; name another --output_dir" in capsys.readouterr().err
    assert (tmp_path / "first" / "utterances.csv").read_bytes() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_evaluation_that_is_stopped_leaves_the_earlier_results(
    number: int, status: int, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    assert command("found") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    score = scoring.score_in_cuts

    def stop(*arguments: object) -> object:
        os.kill(os.getpid(), number)
        return score(*arguments)

    monkeypatch.setattr(scoring, "score_in_cuts", stop)
    assert command("found", "--unknown", "drop_character") == status
    assert {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()} == before
    said = capfd.readouterr().err
    assert f"{number.name}: ending behind this batch, earlier results are kept" in said
    assert "checkpoint" not in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_clip_is_a_failed_run_in_one_line(
    workers: int, command: Command, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Also when a loading process finds it, whose trace comes before the message."""
    data = shutil.copytree(model.parents[1] / "data", tmp_path / "data")
    path = data / "test" / "part_1" / "data.arrow"
    content = bytearray(path.read_bytes())
    place = content.index(make_rows(40, 3, ("ann", "cem"))[20][1].tobytes()[:2000])
    content[place : place + 2000] = bytes(2000)
    path.write_bytes(content)
    assert command("found", "--data_dir", data, "--dataloader_num_workers", workers) == 1
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith("failed: ")
    assert "part_1" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_the_memory_limit_reaches_the_allocator(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing else keeps it."""
    asked = []
    monkeypatch.setattr(memory, "limit_allocator", lambda device, limit: asked.append((device.type, limit)))
    assert command("found", "--memory_limit_mb", 50_000) == 0
    assert asked == [("cpu", 50_000)]


def test_what_training_heard_is_what_the_run_trained_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With a subset of the training clips both commands say the same of known voices and sentences."""
    data_dir = model.parents[1] / "data"
    recipe = write_recipe(
        tmp_path / "recipe.yaml", data_dir, max_steps=1, max_train_samples=1, model_config=TINY_GROUP_NORM_MODEL
    )
    run = tmp_path / "run"
    for main, arguments in (
        (train.main, ["train.py", "--config", recipe, "--output_dir", run]),
        (evaluate.main, ["evaluate.py", "--model_name_or_path", run / "model", "--data_dir", data_dir]),
    ):
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        assert exit_status(main) == 0
    expected = json.loads((run / "train_results.json").read_text())["test_slices"]
    found = read_results(run / "evaluation_test")
    assert found["slices"] == expected
    assert found["known_of_training"] == "run"
    voices = {one["group"]: one["utterances"] for one in expected if one["slice"] == "speaker_in_train"}
    assert voices.get("yes", 0) <= 20, "one training clip, so one voice"
    shutil.copytree(run / "model", tmp_path / "elsewhere" / "model")
    (tmp_path / "elsewhere" / "environment.json").write_text("[]")  # another program's
    capsys.readouterr()
    arguments = ["evaluate.py", "--model_name_or_path", tmp_path / "elsewhere" / "model", "--data_dir", data_dir]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    assert exit_status(evaluate.main) == 0
    assert "what this model was trained on is not known" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(
    command: Command, read_only_disk: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("found", "--output_dir", read_only_disk / "results") == 2
    captured = capsys.readouterr()
    assert f"{read_only_disk} cannot be written to: name a folder for the results" in captured.err
    assert captured.out == ""


def test_comparison_pairs_by_id_and_leaves_out_other_references(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("first") == 0
    path = tmp_path / "first" / "utterances.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1].replace(",", ",zz ", 1)
    path.write_text("\n".join([lines[0], *reversed(lines[1:-2])]) + "\n", encoding="utf-8")
    assert command("second", "--compare", tmp_path / "first") == 0
    screen = capsys.readouterr().out
    assert "compared on 37 utterances; 3 left out" in screen
    assert "the difference may be chance" in screen
    path.write_text("\n".join([lines[0], lines[1]]) + "\n", encoding="utf-8")
    assert command("third", "--compare", tmp_path / "first") == 2
    assert "other references" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--slices", "accents"), "--slices accents: {data}/test has duration, "),
        (("--split", "nights"), "--split is 'nights', one of test, dev, train is needed"),
        (("--data_dir", "{tmp}/none"), "{tmp}/none/test holds no prepared data"),
        (("--model_name_or_path", "./none"), "--model_name_or_path ./none: there is no such folder"),
        (("--compare", "./none"), "--model_name_or_path ./none: there is no such folder"),
        (("--output_dir", "{data}"), "{data} holds dev, preflight_cache, prepare.json: name a folder for the results"),
        (("--max_eval_samples", "0"), "--max_eval_samples is 0, it must be above 0"),
        (("--per_device_eval_batch_size", "0"), "--per_device_eval_batch_size is 0, at least 1 is needed"),
        (("--uknown", "count"), "unknown setting --uknown: the nearest known one is unknown"),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    flags: tuple[str, ...], said: str, command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = {"tmp": tmp_path, "data": model.parents[1] / "data"}
    assert command("found", *(flag.format(**places) for flag in flags)) == 2
    assert said.format(**places) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "found" / "results.json").exists()


def test_a_damaged_folder_is_refused(
    command: Command, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (other / "text_rules.json").write_text('{"case": ')
    assert command("found", "--model_name_or_path", other) == 2
    assert "text_rules.json is damaged" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "utterances.csv").write_text("id,reference\na,b\n")
    assert command("found", "--compare", tmp_path / "old") == 2
    assert "utterances.csv is not a table that evaluate.py wrote" in capsys.readouterr().err


def test_a_model_that_cannot_write_yet_is_refused(
    command: Command, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("lm_head")}
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    assert command("found", "--model_name_or_path", other) == 2
    assert "has no head for its vocabulary, it cannot write yet: fine-tune it" in capsys.readouterr().err


def test_the_folder_beside_the_model_is_the_default(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "run" / "model")
    arguments = ["--model_name_or_path", tmp_path / "run" / "model", "--data_dir", model.parents[1] / "data"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--split", "dev"])
    assert exit_status(evaluate.main) == 0
    assert len(read_rows(tmp_path / "run" / "evaluation_dev")) == 4


def test_texts_of_a_large_set_lie_on_the_disk() -> None:
    tracemalloc.start()
    try:
        with TextSpool() as spool:
            for row in range(20_000):
                spool.add(row, f"reference {row} " * 10, f"hypothesis {row} " * 10)
            held, _ = tracemalloc.get_traced_memory()
            assert held < 20_000 * 20, "two numbers of eight bytes for each"
            assert sum(1 for _ in spool.sorted()) == 20_000
    finally:
        tracemalloc.stop()


def test_texts_come_back_in_the_order_of_the_rows() -> None:
    texts = [(7, 'a "b"', "\n"), (2, "", "ọ́"), (5, "c", "d")]
    with TextSpool() as spool:
        for row in texts:
            spool.add(*row)
        assert list(spool.sorted()) == sorted(texts)
        spool.add(1, "x", "y")
        assert next(spool.sorted()) == (1, "x", "y")
