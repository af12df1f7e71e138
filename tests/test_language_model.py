"""decoding.py build-lm and tune: what goes into a language model, what is kept out, and what is found on dev."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from arpa import read_arpa
from conftest import make_rows, train_two_updates, write_part

import decoding
import tuning
from errors import UsageError, exit_status
from language_model import open_language_model
from text import LARGE_960H_VOCABULARY
from tuning import Search

Command = Callable[..., int]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared set with given sentences."""
    texts = {"train": ["One TWO", "three"], "dev": ["held out, in dev", "also dev"], "test": ["In test!"]}
    for split, sentences in texts.items():
        rows = [(*row[:2], text, "") for row, text in zip(make_rows(len(sentences), 1), sentences, strict=True)]
        write_part(tmp_path / "data" / split / "part_1", rows)
    return tmp_path / "data"


@pytest.fixture
def build(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run decoding.py build-lm into tmp_path / lm; the status. Estimated here, whatever programs the machine has."""
    monkeypatch.setattr("ngram.shutil.which", lambda _: None)

    def run(*flags: object) -> int:
        base = ["--data_dir", data, "--out", tmp_path / "lm"]
        monkeypatch.setattr(sys, "argv", ["decoding.py", "build-lm", *map(str, [*base, *flags])])
        return exit_status(decoding.main)

    return run


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "lm.json").read_text(encoding="utf-8"))


def test_texts_by_the_rules_without_the_sentences_of_dev_and_test(
    build: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = write(tmp_path / "more.tsv", "path\tsentence\na.mp3\tA new Sentence.\nb.mp3\tIN TEST\nc.mp3\t\n")
    plain = write(tmp_path / "plain.txt", "Held out in dev\nALSO: DEV?\na second-hand word\n\n\nA new sentence\n...\n")
    assert build("--text", table, plain, "--order", "3") == 0
    facts = facts_of(tmp_path / "lm")
    assert (facts["sentences"], facts["removed"], facts["empty"]) == (3, {"dev": 2, "test": 1}, 4)
    assert (facts["words"], facts["distinct_words"], facts["unit"], facts["order"]) == (9, 5, "word", 3)
    words = dict(line.split("\t") for line in (tmp_path / "lm" / "words.tsv").read_text().splitlines())
    assert words == {"a": "3", "new": "2", "sentence": "2", "secondhand": "1", "word": "1"}
    arpa = read_arpa((tmp_path / "lm" / "lm.arpa").read_text())
    assert {gram[0] for gram in arpa.probabilities if len(gram) == 1} == {*words, "<s>", "</s>", "<unk>"}
    screen = capsys.readouterr().out
    assert "3 sentences, 9 words, 5 distinct" in screen
    assert "removed because dev holds them: 2, because test does: 1; empty rows: 4" in screen
    assert not (tmp_path / "lm.unfinished").exists()


def test_a_recognisers_own_rules(build: Command, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write(model / "vocab.json", json.dumps(LARGE_960H_VOCABULARY))
    write(model / "config.json", json.dumps({"model_type": "wav2vec2", "vocab_size": 32, "pad_token_id": 0}))
    write(model / "text_rules.json", json.dumps({"characters_to_ignore": "!", "case": "upper"}))
    assert build("--text", write(tmp_path / "a.txt", "it’s loud! is it?\n"), "--model_name_or_path", model) == 0
    assert open_language_model(tmp_path / "lm").words() == {"IT'S": 1, "LOUD": 1, "IS": 1, "IT?": 1}
    assert facts_of(tmp_path / "lm")["text_rules"]["case"] == "upper"


@pytest.mark.parametrize(
    ("name", "content", "flags", "said"),
    [
        ("a.txt", "", (), r"a.txt holds no sentence \(0 empty rows\)"),
        ("a.txt", "...\n  \n", (), r"a.txt holds no sentence \(2 empty rows\)"),
        ("a.txt", "in test\nalso dev\n", (), "all 2 sentences are in dev or test of"),
        ("a.tsv", "path\twords\nx\ty\n", (), "a.tsv has no column named text, sentence"),
        ("a.csv", "", (), "a.csv is empty"),
        ("a.txt", "good\n", ("--order", "7"), "--order is 7, KenLM takes 2 to 6"),
        ("a.txt", "good\n", ("--data_dir", ""), "--data_dir is missing"),
        ("a.txt", "good\n", ("--data_dir", "nowhere", "--add_training_words"), "nowhere/train holds no prepared data"),
        ("a.txt", "good\n", ("--unit", "letter"), "--unit is 'letter', one of word, character is needed"),
        ("a.txt", "good\n", ("--model_name_or_path", "./nowhere"), "there is no such folder"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_nothing(
    name: str, content: str, flags: tuple[str, ...], said: str, build: Command, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    text = write(tmp_path / name, content)
    assert build("--text", text, *flags) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert re.search(said, stderr), stderr
    assert not (tmp_path / "lm").exists()
    assert not (tmp_path / "lm.unfinished").exists()


def test_missing_files_and_bytes_that_are_no_text_are_refused(
    build: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert build("--text", tmp_path / "absent.txt") == 2
    assert "absent.txt cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("Ñu\n".encode("latin-1"))
    assert build("--text", tmp_path / "latin.txt") == 2
    assert "latin.txt is not UTF-8" in capsys.readouterr().err


def test_words_of_the_training_split_can_be_added(build: Command, tmp_path: Path) -> None:
    assert build("--text", write(tmp_path / "a.txt", "two more\n"), "--add_training_words") == 0
    assert open_language_model(tmp_path / "lm").words() == {"two": 1, "more": 1, "one": 0, "three": 0}
    assert facts_of(tmp_path / "lm")["added_training_words"] == 2
    arpa = read_arpa((tmp_path / "lm" / "lm.arpa").read_text())
    assert ("one",) not in arpa.probabilities


def test_characters_and_words_that_mean_something_else_in_an_arpa_file(build: Command, tmp_path: Path) -> None:
    assert build("--text", write(tmp_path / "a.txt", "ab <unk> |c\n</s>\n"), "--unit", "character") == 0
    arpa = read_arpa((tmp_path / "lm" / "lm.arpa").read_text())
    unigrams = {gram[0] for gram in arpa.probabilities if len(gram) == 1}
    assert unigrams == {"a", "b", "c", "|", "<space>", "<s>", "</s>", "<unk>"}
    assert ("<s>", "a", "b", "<space>", "|", "c") in arpa.probabilities
    assert facts_of(tmp_path / "lm")["order"] == 6


def test_an_older_model_is_replaced_and_something_else_is_not(
    build: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = write(tmp_path / "a.txt", "good words\n")
    assert build("--text", text) == 0
    write(tmp_path / "lm" / "tuning.json", "{}")
    assert build("--text", text) == 0
    assert sorted(path.name for path in (tmp_path / "lm").iterdir()) == ["lm.arpa", "lm.json", "words.tsv"]
    write(tmp_path / "lm" / "thesis.doc", "")
    assert build("--text", text) == 2
    assert "holds thesis.doc: name a folder of its own" in capsys.readouterr().err
    assert (tmp_path / "lm" / "lm.json").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "lm.json").unlink(), "holds no language model"),
        (lambda folder: write(folder / "lm.json", "{}"), r"is damaged \(KeyError"),
        (lambda folder: write(folder / "lm.arpa", "\\data\\"), "lm.arpa differs from its checksum"),
        (lambda folder: (folder / "lm.arpa").unlink(), "is damaged .*No such file"),
        (
            lambda folder: write(folder / "lm.json", json.dumps(facts_of(folder) | {"file": "../../secret"})),
            "differs from its checksum",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], object], said: str, build: Command, tmp_path: Path) -> None:
    assert build("--text", write(tmp_path / "a.txt", "good words\n")) == 0
    damage(tmp_path / "lm")
    with pytest.raises(UsageError, match=said):
        open_language_model(tmp_path / "lm")


def test_no_command_and_a_wrong_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["build"]):
        monkeypatch.setattr(sys, "argv", ["decoding.py", *arguments])
        assert exit_status(decoding.main) == 2
        assert "say build-lm or tune" in capsys.readouterr().err


@pytest.mark.parametrize("optimum", [(0.6, 0.0), (2.7, 1.3), (5.1, -3.9), (0.0, 0.0)])
def test_search_finds_the_bottom_of_a_bowl(optimum: tuple[float, float]) -> None:
    asked = []

    def errors(point: tuple[float, float]) -> tuple[int, int]:
        asked.append(point)
        return round(1000 * ((point[0] - optimum[0]) ** 2 + 0.2 * (point[1] - optimum[1]) ** 2)), 0

    best = Search(errors).run()
    assert abs(best[0] - optimum[0]) <= 0.2
    assert abs(best[1] - optimum[1]) <= 0.3
    assert len(asked) == len(set(asked)) <= 70
    assert all(0 <= weight <= tuning.MAX_WEIGHT for weight, _ in asked)


def test_search_prefers_fewer_words_then_fewer_characters() -> None:
    table = {(1.0, 0.0): (5, 9), (2.0, 0.0): (5, 8), (3.0, 0.0): (4, 20)}
    assert Search(lambda point: table.get(point, (6, 0))).run() == (3.0, 0.0)
    del table[(3.0, 0.0)]
    assert Search(lambda point: table.get(point, (6, 0))).run() == (2.0, 0.0)


def test_log_probabilities_come_back_from_the_disk() -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(frames, 7)).astype(np.float32) for frames in (3, 0, 11)]
    with tuning.LogProbSpool() as spool:
        for number, array in enumerate(arrays):
            spool.add(array, f"text {number}")
        assert spool.references == ["text 0", "text 1", "text 2"]
        for _ in range(2):
            for found, expected in zip(spool, arrays, strict=True):
                np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/model after two updates, beside its data."""
    folder = tmp_path_factory.mktemp("run")
    for split, count, seed in (("train", 12, 1), ("dev", 10, 2), ("test", 10, 3)):
        write_part(folder / "data" / split / "part_1", make_rows(count, seed))
    return train_two_updates(folder)


def test_tune_writes_what_it_found(
    recogniser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="the extra lm is not installed (flashlight-text)")
    monkeypatch.setattr(tuning, "COARSE_SCORES", (0.0,))
    monkeypatch.setattr(tuning, "HALVINGS", 0)
    data = recogniser.parents[1] / "data"
    text = write(tmp_path / "a.txt", "\n".join(row[2] for row in make_rows(30, 9)))
    common = ["--model_name_or_path", str(recogniser), "--data_dir", str(data)]
    monkeypatch.setattr(
        sys, "argv", ["decoding.py", "build-lm", "--text", str(text), "--out", str(tmp_path / "lm"), *common]
    )
    assert exit_status(decoding.main) == 0
    tune = ["decoding.py", "tune", "--lm", str(tmp_path / "lm"), *common, "--beam_workers", "0"]
    monkeypatch.setattr(sys, "argv", [*tune, "--max_eval_samples", "7"])
    assert exit_status(decoding.main) == 0
    found = json.loads((tmp_path / "lm" / "tuning.json").read_text())
    best = min((one["word_errors"], one["character_errors"]) for one in found["tried"])
    chosen = [one for one in found["tried"] if one["lm_weight"] == found["lm_weight"]]
    assert best in [(one["word_errors"], one["character_errors"]) for one in chosen]
    assert (found["utterances"], found["beam_size"], found["data"]) == (7, 50, f"{data}/dev")
    assert found["lm_sha256"] == open_language_model(tmp_path / "lm").sha256
    assert len(found["model_sha256"]) == 64
    screen = capsys.readouterr().out
    assert f"greedy      WER {found['greedy']['wer']:.2%}" in screen
    assert f"with the LM WER {found['with_lm']['wer']:.2%}" in screen
