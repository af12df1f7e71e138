"""evaluate.py --rank_train: its measures against single clips, its order, its cut, and what it refuses."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_GROUP_NORM_MODEL, TINY_MODEL, make_rows, run_command, train_two_updates, write_part
from rapidfuzz.distance import Levenshtein
from transformers import AutoModelForCTC, AutoProcessor

import evaluate
import ranking
from audio import SAMPLE_RATE_HZ
from benchmarks import planted_errors
from data import ShardDataset
from ranking import suggest_cut
from result_layout import RANKING_COLUMNS

Command = Callable[..., int]
CROWDED, EMPTY = 3, 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two updates on half of 60 clips, one with more labels than frames and one without labels."""
    folder = tmp_path_factory.mktemp("run")
    rows = make_rows(60, seed=1)
    rows[CROWDED] = (*rows[CROWDED][:2], "AB" * 100, "ann")
    rows[EMPTY] = (*rows[EMPTY][:2], "?", "ann")
    write_part(folder / "data" / "train" / "part_1", rows[:25], rows_per_batch=7)
    write_part(folder / "data" / "train" / "part_2", rows[25:])
    write_part(folder / "data" / "dev" / "part_1", make_rows(4, seed=2))
    return train_two_updates(folder, train_fraction=0.5, model_config=TINY_MODEL | {"initializer_range": 0.5})


@pytest.fixture
def command(model: Path, tmp_path: Path) -> Command:
    """Rank the training clips into tmp_path / name, with more flags behind; returns the status."""

    def run(name: str, *flags: object) -> int:
        base = {"model_name_or_path": model, "data_dir": model.parents[1] / "data", "output_dir": tmp_path / name}
        pairs = [part for key, value in base.items() for part in (f"--{key}", value)]
        return run_command(evaluate.main, "evaluate.py", "--rank_train", *pairs, "--dataloader_num_workers", 0, *flags)

    return run


def read(folder: Path) -> tuple[list[dict[str, str]], dict]:
    with (folder / "train_ranking.csv").open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        rows = list(table)
        assert tuple(table.fieldnames) == RANKING_COLUMNS
    return rows, json.loads((folder / "train_ranking.json").read_text())


def test_measures_are_those_of_transformers_on_single_clips(command: Command, model: Path, tmp_path: Path) -> None:
    """Loss by transformers' own CTC, best path by hand, edit distance by rapidfuzz; clip by clip, without padding."""
    assert command("found") == 0
    rows, facts = read(tmp_path / "found")
    assert len(rows) == facts["clips"] == 60
    hf, processor = AutoModelForCTC.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)
    hf.config.ctc_loss_reduction = "sum"
    dataset = ShardDataset(model.parents[1] / "data" / "train")
    clips = {dataset[row].id: dataset[row] for row in range(60)}
    assert {row["id"] for row in rows} == set(clips)
    for row in rows:
        clip = clips[row["id"]]
        audio = clip.audio.astype(np.float32) / 2**15
        inputs = processor(audio, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_values
        with torch.no_grad():
            logits_TV = hf(inputs).logits[0]
        hypothesis = processor.batch_decode(logits_TV.argmax(-1)[None])[0]
        assert row["hypothesis"] == hypothesis
        assert float(row["seconds"]) == pytest.approx(len(audio) / SAMPLE_RATE_HZ, abs=6e-4)
        if row["id"] in ("u1_3", "u1_7"):
            continue
        assert row["reference"] == clip.text.lower()
        labels = processor.tokenizer(row["reference"], return_tensors="pt").input_ids
        with torch.no_grad():
            loss = float(hf(inputs, labels=labels).loss)
        best = float(logits_TV.log_softmax(-1).amax(-1).sum())
        assert float(row["ctc_loss_per_label"]) == pytest.approx(loss / labels.shape[1], rel=1e-4, abs=1e-4)
        assert float(row["score"]) == pytest.approx((loss + best) / labels.shape[1], rel=1e-3, abs=2e-4)
        longest = max(len(hypothesis), len(row["reference"]))
        distance = Levenshtein.distance(hypothesis, row["reference"])
        # jiwer counts one of the cheapest alignments, of which another may have fewer substitutions.
        assert float(row["best_path_agreement"]) == pytest.approx(1 - distance / longest, abs=1e-4)
        # make_rows has no silence at the ends but what its tones begin with.
        assert float(row["labels_per_second"]) >= len(row["reference"]) / float(row["seconds"]) - 0.01


def test_the_order_and_who_comes_first(command: Command, model: Path, tmp_path: Path) -> None:
    assert command("found") == 0
    rows, facts = read(tmp_path / "found")
    assert [int(row["rank"]) for row in rows] == list(range(1, 61))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    crowded = rows[0]
    assert (crowded["id"], crowded["score"], crowded["ctc_loss_per_label"]) == (f"u1_{CROWDED}", "inf", "inf")
    assert crowded["suggested"] == "yes"
    assert (facts["not_alignable"], facts["clips"]) == (1, 60)
    assert math.isfinite(float(next(row for row in rows if row["id"] == f"u1_{EMPTY}")["score"]))
    suggested = [row["suggested"] == "yes" for row in rows]
    assert suggested == sorted(suggested, reverse=True)
    assert sum(suggested) == facts["suggested"]
    with (model.parent / "drop_list.csv").open(newline="") as file:
        left_out = {row["id"] for row in csv.DictReader(file)}
    assert {row["id"] for row in rows if row["heard"] == "no"} == left_out
    assert facts["heard"] == 60 - len(left_out) == 29


def test_promise_2_the_ranking_does_not_depend_on_the_batch(command: Command, tmp_path: Path) -> None:
    assert command("alone", "--per_device_eval_batch_size", 1) == 0
    expected, facts_alone = read(tmp_path / "alone")
    for name, flags in (("four", (4,)), ("all", (64,)), ("seconds", (8, "--max_batch_seconds", 3))):
        assert command(name, "--per_device_eval_batch_size", *flags) == 0
        rows, facts = read(tmp_path / name)
        for row, one in zip(rows, expected, strict=True):
            for column in RANKING_COLUMNS:
                if column in ("score", "ctc_loss_per_label") and row[column] != "inf":
                    assert float(row[column]) == pytest.approx(float(one[column]), abs=2e-4)
                else:
                    assert row[column] == one[column]
        assert facts["suggested"] == facts_alone["suggested"]


def test_memory_that_runs_out_changes_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("whole", "--per_device_eval_batch_size", 16) == 0
    forward = ranking.ModelScorer.forward

    def with_little_memory(self: object, batch: object) -> object:
        if len(batch.ids) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(ranking.ModelScorer, "forward", with_little_memory)
    assert command("cut", "--per_device_eval_batch_size", 16) == 0
    for row, one in zip(read(tmp_path / "cut")[0], read(tmp_path / "whole")[0], strict=True):
        assert (row["id"], row["hypothesis"]) == (one["id"], one["hypothesis"])
        assert float(row["score"]) == pytest.approx(float(one["score"]), abs=2e-4)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models of the two halves of one corpus."""
    folder = tmp_path_factory.mktemp("halves")
    models = []
    for name, settings in (("a", {}), ("b", {"train_rest": True})):
        (folder / name).mkdir()
        for split, count, seed in (("train", 30, 1), ("dev", 4, 2)):
            write_part(folder / name / "data" / split / "part_1", make_rows(count, seed))
        models.append(train_two_updates(folder / name, train_fraction=0.5, seed=7, **settings))
    return models[0], models[1]


def test_each_half_is_judged_by_the_other(halves: tuple[Path, Path], tmp_path: Path) -> None:
    """With --other_half a clip has the score that the model which did not hear it gives it."""
    base = ("--rank_train", "--data_dir", halves[0].parents[1] / "data", "--dataloader_num_workers", 0)

    def rank(name: str, model: Path, *flags: object) -> dict[str, dict[str, str]]:
        arguments = (*base, "--model_name_or_path", model, "--output_dir", tmp_path / name, *flags)
        assert run_command(evaluate.main, "evaluate.py", *arguments) == 0
        return {row["id"]: row for row in read(tmp_path / name)[0]}

    by_a, by_b, by_other = rank("a", halves[0]), rank("b", halves[1]), rank("ab", halves[0], "--other_half", halves[1])
    judges = {name: by_b if row["heard"] == "yes" else by_a for name, row in by_a.items()}
    assert sum(judge is by_a for judge in judges.values()) == 15
    for name, row in by_other.items():
        assert row["heard"] == "no"
        for column in ("best_path_agreement", "hypothesis", "reference"):
            assert row[column] == judges[name][name][column]
        for column in ("score", "ctc_loss_per_label"):  # in other batches
            assert float(row[column]) == pytest.approx(float(judges[name][name][column]), abs=2e-4)
    assert read(tmp_path / "ab")[1]["heard"] == 0


def test_the_other_half_must_be_a_run_on_this_data(
    halves: tuple[Path, Path], command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("found", "--other_half", halves[1]) == 2
    assert "--other_half needs two models of runs on" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


def test_a_model_that_lies_in_no_run_does_not_say_what_it_heard(
    command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "model")
    assert command("found", "--model_name_or_path", copy) == 0
    rows, facts = read(tmp_path / "found")
    assert {row["heard"] for row in rows} == {""}
    assert facts["heard"] is None
    assert "not known" in capsys.readouterr().out


def test_a_model_that_says_nothing_finite_is_refused(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forward = ranking.ModelScorer.forward

    def broken(self: object, batch: object) -> object:
        logits_BTV, frame_lengths_B, loss_B = forward(self, batch)
        return logits_BTV, frame_lengths_B, loss_B * float("nan")

    monkeypatch.setattr(ranking.ModelScorer, "forward", broken)
    assert command("found") == 1
    assert "is not finite: rank with another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max_eval_samples", 5), "--max_eval_samples does not go with --rank_train"),
        (("--compare", "x"), "--compare does not go with --rank_train"),
        (("--unknown", "drop_utterance"), "--unknown does not go with --rank_train"),
        (("--no_rank_train", "--other_half", "x"), "--other_half belongs to --rank_train"),
    ],
)
def test_what_does_not_go_together_is_refused(
    flags: tuple[object, ...], said: str, command: Command, capsys: pytest.CaptureFixture
) -> None:
    assert command("found", *flags) == 2
    assert said in capsys.readouterr().err


def test_a_foreign_folder_is_not_written_into(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "results.json").write_text("{}")
    assert command("found") == 2
    assert "holds results.json" in capsys.readouterr().err


# --- The cut -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_the_cut_knows_its_own_precision_and_recall(share: float) -> None:
    """Right clips around 0, wrong ones around 5: what the cut expects of itself is what it does."""
    rng = np.random.default_rng(0)
    count = 10_000
    is_wrong = rng.random(count) < share
    scores = np.where(is_wrong, rng.normal(5, 1.5, count), rng.normal(0, 1, count))
    cut = suggest_cut(scores, rng.normal(5, 1.5, 1_000))
    above = scores > cut.score
    assert cut.wrong == pytest.approx(is_wrong.sum(), rel=0.15)
    assert cut.precision == pytest.approx(is_wrong[above].mean(), abs=0.08)
    assert cut.recall == pytest.approx(above[is_wrong].mean(), abs=0.03)
    f1 = [
        2 * is_wrong[scores > limit].sum() / (is_wrong.sum() + (scores > limit).sum()) for limit in np.arange(0, 5, 0.1)
    ]
    assert 2 * is_wrong[above].sum() / (is_wrong.sum() + above.sum()) > max(f1) - 0.03


def test_nothing_is_suggested_where_nothing_is_wrong() -> None:
    rng = np.random.default_rng(0)
    cut = suggest_cut(rng.normal(0, 1, 1_000), rng.normal(8, 1, 1_000))
    assert (cut.score, cut.wrong) == (math.inf, 0)


@pytest.mark.parametrize(("scores", "strangers"), [([], [1.0]), ([1.0], []), ([np.inf], [np.inf]), ([0.5], [np.inf])])
def test_without_anything_to_compare_nothing_is_suggested(scores: list[float], strangers: list[float]) -> None:
    assert suggest_cut(np.array(scores), np.array(strangers)).score == math.inf


def test_an_even_half_of_one_text_has_strangers_of_other_texts_only(tmp_path: Path) -> None:
    """Where all texts are equal there is no other one, and nothing is suggested."""
    rows = [(name, audio, "AB", speaker) for name, audio, _, speaker in make_rows(10, 1)]
    write_part(tmp_path / "data" / "train" / "part_1", rows)
    write_part(tmp_path / "data" / "dev" / "part_1", make_rows(4, 2))
    model = train_two_updates(tmp_path, model_config=TINY_GROUP_NORM_MODEL, vocabulary="large_960h")
    flags = ("--model_name_or_path", model, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "found")
    assert run_command(evaluate.main, "e", "--rank_train", *flags, "--dataloader_num_workers", 0) == 0
    facts = read(tmp_path / "found")[1]
    assert (facts["scores_of_strangers"], facts["suggested"], facts["cut"]) == ({}, 0, None)


# --- benchmarks/planted_errors.py ----------------------------------------------------------------------------------


def test_planted_errors_are_as_many_as_asked_each_wrong_and_at_random() -> None:
    texts = {f"u{row}": ["one", "two", "three", "four", "five"][row % 5] for row in range(500)}
    swapped = planted_errors.swap_texts(texts, 0.2, seed=3)
    assert len(swapped) == 100
    assert all(texts[name] != text for name, text in swapped.items())
    assert sorted(swapped.values()) == sorted(texts[name] for name in swapped), "the texts are those of each other"
    pairs = {(texts[name], text) for name, text in swapped.items()}
    assert len(pairs) == 20, "every word is called by every other one"
    assert planted_errors.swap_texts(texts, 0.2, seed=3) == swapped
    assert planted_errors.swap_texts(texts, 0.2, seed=4) != swapped


def test_precision_at_the_true_number_is_that_of_any_order_of_ties() -> None:
    rng = np.random.default_rng(0)
    values, is_wrong = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.3
    orders = [np.lexsort((rng.random(40), -values))[: is_wrong.sum()] for _ in range(4_000)]
    expected = np.mean([is_wrong[order].mean() for order in orders])
    assert planted_errors.precision_at(values, is_wrong) == pytest.approx(expected, abs=0.01)
    assert planted_errors.precision_at(is_wrong.astype(float), is_wrong) == 1
