"""The whole program in one process: its run directory, its arithmetic, its resume, and what it refuses."""

import contextlib
import csv
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from architectures import LARGE_960H, XLS_R_300M, Architecture, write_published_like_checkpoint
from conftest import (
    AUGMENTATION,
    REPOSITORY,
    TALKATIVE,
    TINY_GROUP_NORM_MODEL,
    TINY_MODEL,
    alone,
    fill,
    make_rows,
    run_command,
    write_part,
    write_recipe,
)
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import get_scheduler, pipeline

import checkpoint
import demo
import errors
import evaluate as evaluate_command
import preflight
import processes
import runlog
import scoring
import train
from best_model import BestModel
from clock import PHASE_COLUMNS, PHASES
from config import TrainConfig
from data import BatchPlan, CutSettings, ShardDataset, training_loader
from errors import UsageError, exit_status
from hosts import TOKEN_PREFIX
from meter import METER_SUMS
from metrics import ErrorCounts, Score, TextScore
from processes import start_processes
from run import Run
from runlog import LOG_COLUMNS, read_log
from training_run import RunState

TRAINING_COLUMNS = (
    "train_loss", "learning_rate", "grad_norm", "samples_per_second", "audio_seconds_per_second", "padding_fraction",
    "scaler_skips", "bad_updates", "oom_retries", "peak_memory_mb", "elapsed_seconds",
)  # fmt: skip
EVALUATION_COLUMNS = (
    "eval_loss", "eval_wer", "eval_cer", "eval_raw_wer", "eval_sentence_error_rate", "eval_near_ties",
    "blank_fraction", "eval_runtime", "eval_insertion_rate", "eval_deletion_rate", "eval_substitution_rate",
    "eval_word_count_ratio", "eval_label_length_ratio", "eval_empty_fraction", "eval_distinct_hypotheses",
    "eval_mean_top_probability", "eval_top_probability_deviation", "eval_unknown_reference_fraction",
    "eval_unknown_hypothesis_fraction", "eval_unfit_input_fraction", "eval_deaf_loss",
)  # fmt: skip
# What a repetition cannot repeat.
MEASURED_COLUMNS = [
    "samples_per_second", "audio_seconds_per_second", "eval_runtime", "peak_memory_mb", "elapsed_seconds",
    *PHASE_COLUMNS,
]  # fmt: skip
MEASURED_RESULTS = {
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "audio_hours_per_hour", "elapsed_seconds",
    *PHASE_COLUMNS,
}  # fmt: skip
MASKS = {"mask_time_prob": 0.4, "mask_time_length": 2, "mask_feature_prob": 0.3, "mask_feature_length": 4}
NO_CLIPPING = 1e9
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def command() -> Callable[..., int]:
    """train.py with these arguments, in this process: its exit status."""
    return functools.partial(run_command, train.main, "train.py")


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run that has not begun: model, data and plan, to call its steps one by one."""
    folders = iter(range(100))

    def make(**settings: object) -> Run:
        config = TrainConfig(
            **{
                "data_dir": str(prepared),
                "output_dir": str(tmp_path / f"run_{next(folders)}"),
                "model_config": TINY_MODEL | TALKATIVE,
                "vocabulary": "train",
                "freeze_feature_encoder": False,
                "max_grad_norm": NO_CLIPPING,
                "dataloader_num_workers": 0,
            }
            | settings
        )
        return Run(config, train.start_processes(config.report_to, config.output_dir))

    return make


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` with a hash of its content, but for facts that can be found again."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "preflight_cache")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def repeatable(run_dir: Path) -> list[dict[str, str]]:
    """The rows of the log, as text, without what a repetition cannot repeat."""
    rows = read_table(run_dir / "training_log.csv")
    return [{name: value for name, value in row.items() if name not in MEASURED_COLUMNS} for row in rows]


def assert_same_run(found: Path, expected: Path) -> None:
    """Two finished runs: rows of the log, evaluation samples, the best model, weights and moments at the end."""
    assert repeatable(found) == repeatable(expected)
    newest = checkpoint.list_checkpoints(expected)[-1].name
    files = [tree(folder) for folder in (found, expected)]
    for name in (
        "eval_samples.csv",
        "eval_slices.csv",
        "model/model.safetensors",
        f"checkpoints/{newest}/tensors.safetensors",
    ):
        assert files[0][name] == files[1][name], name


# --- The run directory ---------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    data_dir: Path
    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run from the shell, as a user starts it: loader workers, trackers, from another working directory."""
    root = tmp_path_factory.mktemp("finished")
    rows = make_rows(13, seed=1)
    write_part(root / "data" / "train" / "part_1", rows[:8])
    write_part(root / "data" / "train" / "part_2", rows[8:])
    write_part(root / "data" / "dev" / "part_1", make_rows(11, seed=2))
    write_part(root / "data" / "test" / "part_1", make_rows(4, seed=3, speakers=("ann", "cem")))
    recipe = write_recipe(
        root / "recipe.yaml", root / "data", max_steps=7, logging_steps=2, eval_steps=3, save_steps=2,
        max_duration_in_seconds=1.0, max_train_samples=9, per_device_train_batch_size=4, max_eval_samples=10,
        dataloader_num_workers=1, report_to=["tensorboard"],
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, REPOSITORY / "train.py", "--config", recipe, "--output_dir", "run"],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Finished(root / "data", root / "run", done.stdout, done.stderr)


def test_run_directory_holds_what_the_contract_names(finished: Finished) -> None:
    folder = finished.folder
    names = {path.name for path in folder.iterdir()} - {"wav2vec2-ctc-finetune"}  # the tracker's
    assert names == {
        "config.yaml", "environment.json", "training_log.csv", "training_curve.png", "eval_samples.csv",
        "train_results.json", "eval_slices.csv", "checkpoints", "drop_list.csv", "suspects.csv", "preflight.json",
        "model",
    }  # fmt: skip
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000006", "step_000007"]
    assert {path.name for path in (folder / "checkpoints" / "step_000007").iterdir()} == {
        "tensors.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    assert {"config.json", "model.safetensors", "vocab.json"} <= {path.name for path in (folder / "model").iterdir()}
    assert imread(folder / "training_curve.png", format="png").shape[2] == 4
    assert list(folder.rglob("events.out.tfevents.*"))


def test_log_has_a_row_for_each_logging_or_evaluation_step(finished: Finished) -> None:
    log = read_log(finished.folder / "training_log.csv")
    assert list(log.columns) == list(LOG_COLUMNS)
    assert log["step"].tolist() == [2, 3, 4, 6, 7]
    assert log["epoch"].tolist() == pytest.approx([2 / 3, 1, 4 / 3, 2, 7 / 3])
    assert log[list(TRAINING_COLUMNS)].notna().all(axis=None)
    for column in EVALUATION_COLUMNS:
        assert log["step"][log[column].notna()].tolist() == [3, 6, 7], column
    assert (log["elapsed_seconds"].diff()[1:] > 0).all()
    assert log["padding_fraction"].between(0, 0.5).all()


def test_every_left_out_utterance_has_a_reason(finished: Finished) -> None:
    train_set = ShardDataset(finished.data_dir / "train")
    rows = read_table(finished.folder / "drop_list.csv")
    long_ids = {name for name, count in zip(train_set.column("id"), train_set.num_samples, strict=True) if count > 16e3}
    assert list(rows[0]) == ["split", "id", "reason", "detail"]
    assert {row["id"] for row in rows if row["reason"] == "too_long"} == long_ids
    assert len({row["id"] for row in rows}) == len(rows) == 13 - 9
    assert {row["reason"] for row in rows} == {"too_long", "not_in_subset"}
    assert f"left out    too_long {len(long_ids)}, not_in_subset {4 - len(long_ids)}" in finished.stdout


def test_samples_are_the_same_utterances_at_every_evaluation(finished: Finished) -> None:
    rows = read_table(finished.folder / "eval_samples.csv")
    by_step = {step: [row for row in rows if row["step"] == step] for step in ("3", "6", "7")}
    assert sum(map(len, by_step.values())) == len(rows) == 3 * 8
    texts = dict(zip(*(ShardDataset(finished.data_dir / "dev").column(name) for name in ("id", "text")), strict=True))
    for samples in by_step.values():
        assert [row["id"] for row in samples] == [row["id"] for row in by_step["3"]]
        assert all(row["reference"] == texts[row["id"]].lower() for row in samples)


def test_results_carry_the_names_of_hugging_face(finished: Finished) -> None:
    results = json.loads((finished.folder / "train_results.json").read_text())
    assert {
        "epoch", "train_loss", "train_runtime", "train_samples", "train_samples_per_second", "train_steps_per_second",
        "best_step", "best_eval_wer", "test_wer", "test_wer_seen_speakers", "test_wer_unseen_speakers",
    } <= results.keys()  # fmt: skip
    log = read_log(finished.folder / "training_log.csv")
    assert results["epoch"] == pytest.approx(7 / 3)
    assert results["train_samples"] == 9
    assert results["best_eval_wer"] == pytest.approx(log["eval_wer"].min())
    assert results["best_step"] == log["step"][log["eval_wer"].idxmin()]
    assert results["train_samples_per_second"] * results["train_runtime"] == pytest.approx(2 * 9 + 4)
    # Rows of unequal size: the mean over the run is not the mean of the rows.
    assert log["train_loss"].min() < results["train_loss"] < log["train_loss"].max()


def test_cost_is_that_of_the_log(finished: Finished) -> None:
    """Every phase but talking to others has taken time, and all of them together no more than there was."""
    results = json.loads((finished.folder / "train_results.json").read_text())
    log = read_log(finished.folder / "training_log.csv")
    phases = {name: results[name] for name in PHASE_COLUMNS}
    for name, seconds in phases.items():
        assert seconds >= log[name].sum() - 1e-3
    assert min(seconds for name, seconds in phases.items() if name != "communication_seconds") > 0
    assert phases["communication_seconds"] < 0.1 * sum(phases.values())
    assert sum(phases.values()) < results["elapsed_seconds"]
    assert phases["evaluation_seconds"] > log["eval_runtime"].sum() * 0.5
    assert 0 < results["padding_fraction"] < 0.6
    assert results["audio_hours_per_hour"] > 0


def test_environment_tells_what_ran(finished: Finished) -> None:
    facts = json.loads((finished.folder / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__.split("+")[0] or facts["packages"]["torch"]
    assert facts["data_fingerprint"] == ShardDataset(finished.data_dir / "train").fingerprint
    assert facts["launcher"]["num_processes"] == 1
    assert facts["launcher"]["mixed_precision"] == "no"
    header = (finished.folder / "config.yaml").read_text().splitlines()[0]
    assert "mixed_precision no" in header
    assert "num_processes 1" in header


def test_screen_says_what_will_happen_and_what_came_out(finished: Finished) -> None:
    assert "4 per micro-batch x 1 accumulated x 1 processes = 4 utterances" in finished.stdout
    assert "7 updates, 3 per epoch; precision no on cpu" in finished.stdout
    assert finished.stdout.count("  decoded    ") == 3
    for column in ("reference", "prediction"):
        assert finished.stdout.count(f"    {column}") == 3 * 3
    assert "use it: python -c" in finished.stdout
    assert "voices never heard" in finished.stdout
    assert "Traceback" not in finished.stderr
    assert "Warning" not in finished.stderr


def test_model_opens_in_a_pipeline_with_our_text(finished: Finished) -> None:
    log = read_log(finished.folder / "training_log.csv")
    best = str(log["step"][log["eval_wer"].idxmin()])
    ours = {
        row["id"]: row["prediction"] for row in read_table(finished.folder / "eval_samples.csv") if row["step"] == best
    }
    recognise = pipeline("automatic-speech-recognition", model=str(finished.folder / "model"))
    dev = ShardDataset(finished.data_dir / "dev")
    utterances = [dev[row] for row in range(len(dev)) if dev[row].id in ours]
    theirs = {one.id: recognise(one.audio.astype(np.float32) / 32_768)["text"] for one in utterances}
    assert theirs == ours
    assert sum(map(len, ours.values())) > 8


def test_config_yaml_repeats_the_run(finished: Finished, tmp_path: Path, command: Callable[..., int]) -> None:
    status = command(
        "--config", finished.folder / "config.yaml", "--output_dir", tmp_path / "again", "--dataloader_num_workers", 0
    )
    assert status == 0
    first, second = (read_log(folder / "training_log.csv") for folder in (finished.folder, tmp_path / "again"))
    assert first["state"].equals(second["state"])
    for column in set(LOG_COLUMNS) - {*MEASURED_COLUMNS, "state"}:
        np.testing.assert_allclose(first[column], second[column], rtol=1e-5, err_msg=column)
    samples = [tree(folder)["eval_samples.csv"] for folder in (finished.folder, tmp_path / "again")]
    assert samples[0] == samples[1]


def test_a_subset_of_dev_while_training_and_all_of_it_at_the_end(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """The whole set's figures are those that evaluate.py finds for the best model."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=4, eval_steps=2, max_eval_samples=3)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^evaluation  3 of 5 clips, 2 times, and the test set, and all of dev at the end: about \d+% of the run",
        said,
        re.M,
    )
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    flags = ["--model_name_or_path", tmp_path / "run" / "model", "--data_dir", prepared, "--split", "dev"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    assert exit_status(evaluate_command.main) == 0
    found = json.loads((tmp_path / "run" / "evaluation_dev" / "results.json").read_text())
    for name in ("wer", "wer_low", "wer_high", "cer", "cer_low", "cer_high"):
        assert results[f"eval_full_{name}"] == found[name]
    log = read_log(tmp_path / "run" / "training_log.csv").dropna(subset=["eval_wer"])
    assert len(log) == 2
    assert (log["eval_wer_low"] <= log["eval_wer"]).all()
    assert (log["eval_wer"] <= log["eval_wer_high"]).all()
    slices = read_table(tmp_path / "run" / "eval_slices.csv")
    assert {row["step"] for row in slices} == {"2", "4"}
    for step in ("2", "4"):
        voices = [row for row in slices if (row["step"], row["slice"]) == (step, "speaker_in_train")]
        assert sum(int(row["utterances"]) for row in voices) == 3


@pytest.mark.slow
@pytest.mark.parametrize("subset", [None, 3])
def test_the_share_of_evaluations_is_that_of_the_samples_that_pass(
    subset: int | None, prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """What is announced before the first step, against all samples that went through the model."""
    passed, original = Counter(), Run.forward

    def forward(run: Run, batch: train.Batch) -> tuple[torch.Tensor, ...]:
        if not batch.ids[0].startswith("probe"):
            passed["trained" if run.model.training else "evaluated"] += batch.num_samples
        return original(run, batch)

    monkeypatch.setattr(Run, "forward", forward)
    monkeypatch.setattr(train, "transcribe_samples", lambda _: [])
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, max_steps=13, eval_steps=2, per_device_train_batch_size=2,
        max_eval_samples=subset,
    )  # fmt: skip
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    found = re.search(
        r"^evaluation  \d of 5 clips, 7 times, .*: about (\d+)% of the run", capsys.readouterr().out, re.M
    )
    evaluated = passed["evaluated"] / 3
    assert int(found[1]) == pytest.approx(100 * evaluated / (evaluated + passed["trained"]), abs=2)


def test_the_subset_that_is_named_makes_a_tenth_of_the_run(make_run: Callable[..., Run]) -> None:
    """By the same cost of a sample, the passes at the beginning and at the end included."""
    run = make_run(eval_steps=1, max_steps=400)
    # Updates of 800 clips, and a dev set that takes half of the run.
    run.state.utterances_per_update = 800
    run.eval_set.num_samples = np.full(4_000, 8_000)
    run.eval_rows = np.arange(4_000)
    found = re.search(r"about 5\d% of the run; --max_eval_samples (\d+) would make it 10%", run._describe_evaluations())
    run.eval_rows = np.arange(int(found[1]))
    assert re.search(r"about (9|10)% of the run$", run._describe_evaluations())


def test_averages_count_among_the_evaluations(make_run: Callable[..., Run]) -> None:
    """Two sets of weights at each, and one pass more at the end."""
    settings = {"eval_steps": 3, "max_steps": 10}
    plain, averaging = make_run(**settings), make_run(**settings, ema_decay=0.9, average_best=2)
    (passes, always), (more, behind) = (run._evaluation_passes() for run in (plain, averaging))
    assert (passes, more) == (4, 8)
    assert behind - always == plain.eval_set.num_samples.sum()
    for run in (plain, averaging):
        run.work_done.updates, run.work_done.eval_seconds = 1, 1.0
        run.clock.spent |= dict.fromkeys(PHASES, 0.0) | {"evaluation": 1.0}
    dev_seconds = float(plain.eval_set.num_samples.sum()) / 16_000
    assert averaging.seconds_left() - plain.seconds_left() == pytest.approx((4 + 1) * dev_seconds)


def test_retention_never_costs_the_best(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wers, seen, tested = iter([90, 40, 60, 40, 80]), {}, []
    original = train.evaluate

    def evaluate(run: Run, dataset: ShardDataset, rows: np.ndarray, description: str) -> scoring.Evaluation:
        evaluation = original(run, dataset, rows, description)
        weights = run.model.hf.state_dict()["lm_head.weight"].clone()
        if description == "test set":
            tested.append(weights)
            return evaluation
        seen[run.state.step] = weights
        score = dataclasses.replace(evaluation.score, words=ErrorCounts(substitutions=next(wers), hits=10))
        return dataclasses.replace(evaluation, score=score)

    monkeypatch.setattr(train, "evaluate", evaluate)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, eval_steps=1, save_steps=1, save_total_limit=1)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert (results["best_step"], results["best_eval_wer"]) == (2, 0.8)
    best = load_file(tmp_path / "run" / "model" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(best, seen[2])
    assert not torch.equal(best, seen[4])  # as good, and later
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000005"]
    assert all(torch.equal(weights, best) for weights in tested)


def test_fine_tuning_starts_with_the_score_of_the_checkpoint(
    finished: Finished, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", finished.data_dir, model_config=None, vocabulary="auto", max_steps=2,
        max_eval_samples=10,
        model_name_or_path=str(finished.folder / "model"),
    )  # fmt: skip
    assert command("--config", recipe, "--output_dir", tmp_path / "tuned") == 0
    log = read_log(tmp_path / "tuned" / "training_log.csv")
    before = json.loads((finished.folder / "train_results.json").read_text())
    after = json.loads((tmp_path / "tuned" / "train_results.json").read_text())
    assert log["step"].tolist() == [0, 1, 2]
    assert log["eval_wer"][0] == after["eval_wer_before"] == pytest.approx(before["best_eval_wer"])
    assert np.isnan(log["train_loss"][0])
    for name in ("test_wer", "test_cer", "test_wer_seen_speakers", "test_wer_unseen_speakers"):
        assert after[f"{name}_before"] == before[name], name
        assert name in after
    screen = capsys.readouterr().out
    assert screen.count("(before training ") == 4
    assert {row["step"] for row in read_table(tmp_path / "tuned" / "eval_samples.csv")} == {"0", "2"}


def test_test_set_is_divided_by_what_training_heard(finished: Finished) -> None:
    """Slices are pooled counts: weighted by words they give the whole."""
    results = json.loads((finished.folder / "train_results.json").read_text())
    test_set = ShardDataset(finished.data_dir / "test")
    words = {"ann": 0, "cem": 0}
    for speaker, text in zip(test_set.column("speaker"), test_set.column("text"), strict=True):
        words[speaker] += len(text.split())
    errors = {
        "ann": results["test_wer_seen_speakers"] * words["ann"],
        "cem": results["test_wer_unseen_speakers"] * words["cem"],
    }
    assert all(count == pytest.approx(round(count)) for count in errors.values())
    assert results["test_wer"] == pytest.approx(sum(errors.values()) / sum(words.values()))


# --- Promise 1: one update, however it is cut ----------------------------------------------------------------------


def one_update(run: Run, step: int, cut: CutSettings) -> tuple[float, torch.Tensor]:
    """CTC loss and gradient of this rank's share of `step`, both before the optimizer changes anything."""
    loader = training_loader(run.train_set, run.plan, run.num_labels, run.collate, cut, step, step + 1, 0)
    (update,) = loader
    weights = {name: value.clone() for name, value in run.model.hf.state_dict().items()}
    loss_sum, _ = train.train_step(run, update)
    gradient = run.gradients.buffer.clone()
    run.model.hf.load_state_dict(weights)
    return float(loss_sum), gradient


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


CUTS = [  # processes, utterances per micro-batch, padded seconds per micro-batch
    (1, 1, None), (1, 2, None), (1, 4, None), (1, 3, None), (1, 8, 2.0), (1, 8, 0.2), (2, 1, None), (2, 4, None),
    (3, 8, 1.5), (5, 1, None), (7, 8, 3.0),
]  # fmt: skip


# Whatever changes what an update minimises or hears, dropouts aside.
LEVERS = AUGMENTATION | {
    "label_smoothing": 0.1,
    "consistency_weight": 0.2,
    "layer_lr_decay": 0.8,
    "head_learning_rate": 2e-3,
}


@pytest.mark.parametrize("settings", [{}, MASKS, MASKS | LEVERS], ids=["plain", "masks", "levers"])
@pytest.mark.parametrize("architecture", [TINY_MODEL, TINY_GROUP_NORM_MODEL], ids=["layer_norm", "group_norm"])
def test_update_is_the_same_however_it_is_cut(
    make_run: Callable[..., Run], architecture: dict[str, object], settings: dict[str, object]
) -> None:
    """Step 0 is a full update of 8, step 1 the short one of 5; with seven processes two of its cuts are empty."""
    run = make_run(model_config=architecture, **settings)
    assert [len(positions) for _, _, positions in run.plan.updates(0, 2)] == [8, 5]
    for step in (0, 1):
        loss, gradient = one_update(run, step, CutSettings(0, 1, 8))
        assert gradient.norm() > 0.1
        for num_processes, size, seconds in CUTS:
            shares = [
                one_update(run, step, CutSettings(rank, num_processes, size, seconds)) for rank in range(num_processes)
            ]
            cut = (step, num_processes, size, seconds)
            assert sum(share[0] for share in shares) == pytest.approx(loss, rel=1e-5), cut
            assert relative_difference(sum(share[1] for share in shares), gradient) < 1e-5, cut


@pytest.mark.parametrize("architecture", [TINY_MODEL, TINY_GROUP_NORM_MODEL], ids=["layer_norm", "group_norm"])
def test_update_is_the_mean_over_its_labels(make_run: Callable[..., Run], architecture: dict[str, object]) -> None:
    """Against transformers' own model, one utterance at a time: the loss is per label (traps 2, 3 and 18)."""
    run = make_run(model_config=architecture)
    reference = type(run.model.hf)(run.model.hf.config)
    reference.load_state_dict(run.model.hf.state_dict())
    for step, _, positions in run.plan.updates(0, 2):
        reference.zero_grad()
        rows = run.plan.rows[positions]
        loss_sum, num_labels = torch.zeros(()), 0
        for row in rows:
            utterance = run.train_set[int(row)]
            labels = torch.tensor(run.vocabulary.encode(run.normalizer(utterance.text))).long()
            values = run.collate([utterance], np.zeros(1, np.int64)).input_values_BS
            log_probs_T1V = F.log_softmax(reference(values).logits, dim=-1).transpose(0, 1)
            frames = torch.tensor([len(log_probs_T1V)])
            loss = F.ctc_loss(log_probs_T1V, labels[None], frames, torch.tensor([len(labels)]), reduction="sum")
            loss_sum, num_labels = loss_sum + loss, num_labels + len(labels)
        (loss_sum / num_labels).backward()
        trained = [name for name, parameter in run.model.hf.named_parameters() if parameter.requires_grad]
        parameters = dict(reference.named_parameters())
        expected = torch.cat([parameters[name].grad.flatten() for name in trained])
        found_loss, found = one_update(run, step, CutSettings(0, 1, 8))
        assert found_loss == pytest.approx(float(loss_sum.detach()), rel=1e-5)
        assert relative_difference(found, expected) < 1e-5


def test_log_is_the_same_for_every_accumulation(prepared: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    # A small rate: AdamW makes a whole step of a gradient that is nothing but rounding (the bias of the keys, always),
    # and at 1e-3 five of them show in the gradient norm on some processors.
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_GROUP_NORM_MODEL | TALKATIVE | MASKS, learning_rate=1e-5
    )
    cuts = {"whole": (8, 1), "by_one": (1, 8)}
    for name, (size, accumulation) in cuts.items():
        flags = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
        assert command("--config", recipe, "--output_dir", tmp_path / name, *flags) == 0
    whole, by_one = (read_log(tmp_path / name / "training_log.csv") for name in cuts)
    assert len(whole) == 5
    for column in ("train_loss", "grad_norm", "learning_rate", "eval_loss"):
        np.testing.assert_allclose(whole[column], by_one[column], rtol=2e-5, err_msg=column)
    first, second = ((tmp_path / name / "eval_samples.csv").read_text() for name in cuts)
    assert first == second


def test_the_output_layer_learns_alone_until_the_encoder_thaws(make_run: Callable[..., Run]) -> None:
    """Two updates leave the encoder as it is, moments and their counters included; the third is its first."""
    run = make_run(freeze_encoder_steps=2, max_steps=4, weight_decay=0.1)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    for update in training_loader(run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, 4, 0):
        train.train_step(run, update)
        run.state.step += 1
        moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
        if update.step < 2:
            assert moved == {"hf.lm_head.weight", "hf.lm_head.bias"}
    assert moved == {name for name, value in run.model.named_parameters() if value.requires_grad}
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            assert run.optimizer.state[parameter]["step"] == (4 if "lm_head" in name else 2), name


def test_two_views_need_masks(make_run: Callable[..., Run]) -> None:
    with pytest.raises(UsageError, match="--consistency_weight compares two differently masked views, and nothing is"):
        make_run(consistency_weight=0.2)


def test_each_layer_learns_at_its_own_rate(make_run: Callable[..., Run]) -> None:
    """The first update of AdamW moves a weight by its rate, whatever the gradient."""
    run = make_run(
        model_config=TINY_MODEL | {"num_hidden_layers": 3}, layer_lr_decay=0.5, learning_rate=8e-4,
        head_learning_rate=4e-3, weight_decay=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    (update,) = training_loader(run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, 1, 0)
    train.train_step(run, update)
    rates = {"lm_head": 4e-3, "layers.2": 4e-4, "layers.1": 2e-4, "layers.0": 1e-4, "feature_extractor": 5e-5}
    rates |= {"feature_projection": 5e-5, "pos_conv_embed": 5e-5, "encoder.layer_norm": 4e-4}
    for part, rate in rates.items():
        steps = [float((v - before[n]).detach().abs().max()) for n, v in run.model.named_parameters() if part in n]
        assert max(steps) == pytest.approx(rate, rel=0.02), part


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rate_is_that_of_transformers(make_run: Callable[..., Run], kind: str) -> None:
    """Counted in optimizer steps whatever the accumulation, the last step included (trap 4)."""
    run = make_run(
        lr_scheduler_type=kind, warmup_steps=2, max_steps=6, learning_rate=1e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1e-3)
    name = kind if kind != "constant" else "constant_with_warmup"
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=6)
    expected, used, logged = [], [], []
    for update in training_loader(run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, 6, 0):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        run.meter.add(update, *train.train_step(run, update))
        run.state.step += 1
        used.append(run.optimizer.param_groups[0]["lr"])
        logged.append(run._training_values()["learning_rate"])
    assert used == pytest.approx(expected, rel=1e-12)
    assert logged == used
    assert used[0] == 0.0
    assert used[2] == 1e-3


# --- Promise 2: one transcript per utterance -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [TINY_MODEL, TINY_GROUP_NORM_MODEL], ids=["layer_norm", "group_norm"])
def test_transcripts_do_not_depend_on_the_batch(
    make_run: Callable[..., Run], architecture: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(model_config=architecture | TALKATIVE)
    found: dict[str, str] = {}
    original = scoring.score_one

    def score_one(run: Run, batch: train.Batch) -> tuple[Score, list[TextScore]]:
        score, texts = original(run, batch)
        for utterance_id, text in zip(batch.ids, texts, strict=True):
            assert utterance_id not in found, "scored twice"
            found[utterance_id] = text.hypothesis
        return score, texts

    monkeypatch.setattr(scoring, "score_one", score_one)
    results, losses = [], []
    for size, seconds in ((1, None), (4, None), (32, None), (32, 2.5)):
        found.clear()
        run.eval_cut = CutSettings(0, 1, size, seconds)
        score = train.evaluate(run, run.train_set, np.arange(13), "").score
        results.append((dict(sorted(found.items())), score.words, score.characters, score.blank_frames, score.frames))
        losses.append(score.loss_sum)
    assert all(result == results[0] for result in results)
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)
    assert len(results[0][0]) == 13
    assert len(set(results[0][0].values())) > 10


def test_evaluation_keeps_nothing_of_what_it_scored(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors alive at the last batch of a large dev set are those at the last batch of a small one."""
    run = make_run(per_device_eval_batch_size=4)
    write_part(tmp_path / "more" / "dev" / "part_1", make_rows(96, seed=4))
    more = ShardDataset(tmp_path / "more" / "dev")
    original, logits, alive, live_bytes = Run.forward, weakref.WeakSet(), [], []

    def forward(run: Run, batch: train.Batch) -> tuple[torch.Tensor, ...]:
        alive.append(len(logits))
        if len(alive) == len(batches):
            gc.collect()
            # By type: asking a lazy module for its class would import it.
            tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
            live_bytes.append(sum(tensor.nbytes for tensor in tensors) - 2 * batch.input_values_BS.nbytes)
        outputs = original(run, batch)
        logits.add(outputs[0])
        return outputs

    monkeypatch.setattr(Run, "forward", forward)
    for count in (8, 96):
        alive.clear()
        rows = np.sort(np.argsort(more.num_samples, kind="stable")[:count])
        batches = range(count // 4)
        train.evaluate(run, more, rows, "")
        assert len(alive) == len(batches)
        assert max(alive) <= 1, "logits of earlier batches are kept"
    small, large = live_bytes
    assert large < small + 100_000, f"{large - small} bytes more for twelve times the utterances"


# --- Resuming ------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The failure that a test asks for."""


@contextlib.contextmanager
def stopped_at(name: str, step: int) -> Iterator[None]:
    """Let the function `name` of train.py fail at `step`; the block must come to that."""
    original = getattr(train, name)

    def fail(run: Run, *arguments: object) -> object:
        if run.state.step == step:
            raise Stopped(name)
        return original(run, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, name, fail)
        yield


def test_resume_is_invisible(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """Stopped before an update, in evaluations and behind the last update; draws of every kind are on."""
    model_config = TINY_MODEL | TALKATIVE | MASKS | {"hidden_dropout": 0.2, "layerdrop": 0.5, "num_hidden_layers": 2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=model_config, max_steps=11, logging_steps=2, eval_steps=4,
        save_steps=3, warmup_steps=2, freeze_encoder_steps=5, lr_scheduler_type="cyclic", **LEVERS,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("--config", recipe, "--output_dir", whole) == 0
    flags = ["--config", recipe, "--output_dir", parts]
    stops = (("train_step", 4, None), ("evaluate", 8, 3), ("evaluate", 11, 6), ("evaluate_test", 11, 9))
    for function, step, resumed_at in stops:
        with stopped_at(function, step):
            command(*flags)
        if resumed_at is not None:
            assert f"step_{resumed_at:06d} at step {resumed_at} of 11" in capsys.readouterr().out
        flags = ["--config", recipe, "--output_dir", parts, "--resume_from_checkpoint", "last"]
    assert not (parts / "train_results.json").exists()
    assert command(*flags) == 0
    assert "at step 11 of 11" in capsys.readouterr().out

    assert_same_run(parts, whole)
    assert [row["step"] for row in repeatable(parts)] == ["2", "4", "6", "8", "10", "11"]
    results = [json.loads((folder / "train_results.json").read_text()) for folder in (whole, parts)]
    for name in results[0].keys() - MEASURED_RESULTS:
        assert results[0][name] == results[1][name], name
    before = tree(parts)
    assert command(*flags) == 2
    assert "is finished (step 11 of 11)" in capsys.readouterr().err
    assert tree(parts) == before


def test_resume_refuses_other_data_and_changes_nothing(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    write_part(tmp_path / "other" / "train" / "part_1", make_rows(13, seed=9))
    write_part(tmp_path / "other" / "dev" / "part_1", make_rows(5, seed=2))
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2)
    with stopped_at("train_step", 3):
        command("--config", recipe, "--output_dir", tmp_path / "run")
    before = tree(tmp_path / "run")
    flags = ("--config", recipe, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "last")
    capsys.readouterr()
    for flag, value, named in (
        ("--data_dir", tmp_path / "other", "the train data"),
        ("--case", "keep", "the vocabulary"),
        ("--seed", 7, "seed (was 42, is 7)"),
        ("--max_steps", 9, "max_steps (was 5, is 9)"),
        ("--learning_rate", 0.1, "learning_rate"),
        ("--train_fraction", 0.5, "the selection"),
        ("--max_eval_samples", 2, "the evaluated utterances"),
    ):
        assert command(*flags, flag, value) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert named in error
        assert tree(tmp_path / "run") == before


def test_a_run_of_another_version_is_refused_and_changes_nothing(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """Its log has other columns; later checkpoints, settings and the mark of its end stay as they are."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=4, save_steps=2)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    log = tmp_path / "run" / "training_log.csv"
    log.write_text(log.read_text().replace("train_loss", "loss_of_old", 1))
    before = tree(tmp_path / "run")
    flags = ("--resume_from_checkpoint", "step_000002", "--resume_anyway", "--weight_decay", 0.2)
    capsys.readouterr()
    assert command("--config", recipe, "--output_dir", tmp_path / "run", *flags) == 2
    assert "training_log.csv has other columns than this version writes" in capsys.readouterr().err
    assert tree(tmp_path / "run") == before


RESUMED_ANYWAY = {
    "seed": (["--seed", "7"], ["seed (was 42, is 7)"]),
    "learning rate plan": (
        ["--learning_rate", "0.002", "--lr_scheduler_type", "cosine"],
        ["learning_rate (was 0.001, is 0.002)", "lr_scheduler_type (was linear, is cosine)"],
    ),
    "data": (["--data_dir", "other"], ["the train data"]),
    "vocabulary": (["--case", "keep"], ["the vocabulary", "case (was lower, is keep)"]),
}


@pytest.mark.parametrize(("flags", "changed"), RESUMED_ANYWAY.values(), ids=RESUMED_ANYWAY.keys())
def test_resume_anyway_goes_on_and_is_recorded(
    flags: list[str], changed: list[str], prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """And from then on the run is the changed one: its config.yaml resumes it without a word."""
    monkeypatch.chdir(tmp_path)
    write_part(tmp_path / "other" / "train" / "part_1", make_rows(13, seed=9))
    write_part(tmp_path / "other" / "dev" / "part_1", make_rows(5, seed=2))
    write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2, max_steps=6)
    begin = ("--config", "recipe.yaml", "--output_dir", "run")
    last = ("--resume_from_checkpoint", "last")
    with stopped_at("train_step", 3):
        command(*begin)
    assert command(*begin, *last, *flags) == 2
    assert f"different in {', '.join(changed)}: use the settings of run/config.yaml, --resume_anyway, or" in (
        capsys.readouterr().err
    )
    with stopped_at("train_step", 5):
        command(*begin, *last, *flags, "--resume_anyway")
    assert f"resuming anyway, although different in {', '.join(changed)}" in capsys.readouterr().out
    assert command("--config", "run/config.yaml", *last) == 0

    record = [{"step": 2, "changed": changed}]
    assert json.loads(Path("run/train_results.json").read_text())["resumed_anyway"] == record
    assert checkpoint.load_state(Path("run/checkpoints/step_000006"))["run"]["resumed_anyway"] == record
    assert [row["step"] for row in read_table(Path("run/training_log.csv"))] == ["1", "2", "3", "4", "5", "6"]


def test_model_of_another_shape_is_refused_anyway(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2)
    flags = ("--config", recipe, "--output_dir", tmp_path / "run")
    with stopped_at("train_step", 3):
        command(*flags)
    before = tree(tmp_path / "run")
    resume = ("--resume_from_checkpoint", "last", "--resume_anyway", "--vocabulary", "large_960h", "--case", "upper")
    assert command(*flags, *resume) == 2
    error = capsys.readouterr().err
    assert "different in the vocabulary, case (was lower, is upper), the shape of the model: use the settings" in error
    assert "--resume_anyway" not in error
    assert tree(tmp_path / "run") == before


def leave_nothing(_: Path) -> None:
    pass


def leave_half_files(run_dir: Path) -> None:
    """What kills before the first checkpoint leave behind: in a row, a file, a save, and between a swap's renames."""
    with (run_dir / "training_log.csv").open("a") as file:
        file.write("2,0.5,3.2")
    for name in ("config.yaml", "training_curve.png", "training_log.csv", "drop_list.csv"):
        _write(run_dir / f"{name}.unfinished", "half")
    _write(run_dir / "checkpoints" / "step_000002.unfinished" / "tensors.safetensors", "half")
    _write(run_dir / "model.new" / "config.json", "{")
    (run_dir / "model").rename(run_dir / "model.aside")


@pytest.mark.slow
@pytest.mark.parametrize("leave", [leave_nothing, leave_half_files])
def test_auto_begins_where_there_is_no_checkpoint(
    leave: Callable[[Path], None], prepared: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, eval_steps=1, save_steps=2, max_steps=3)
    whole, found = tmp_path / "whole", tmp_path / "found"
    assert command("--config", recipe, "--output_dir", whole) == 0
    flags = ("--config", recipe, "--output_dir", found, "--resume_from_checkpoint", "auto")
    if leave is not leave_nothing:
        with stopped_at("train_step", 1):
            command(*flags)
        assert len(read_table(found / "training_log.csv")) == 1
        leave(found)
    assert command(*flags) == 0
    assert_same_run(found, whole)
    assert {path.name for path in found.iterdir()} == {path.name for path in whole.iterdir()}


def test_auto_does_not_throw_damaged_checkpoints_away(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """They, the log and model/ may be worth days, and another version's checkpoints are damaged too for this one."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2, max_steps=6)
    whole, found = tmp_path / "whole", tmp_path / "found"
    assert command("--config", recipe, "--output_dir", whole) == 0
    flags = ("--config", recipe, "--output_dir", found, "--resume_from_checkpoint", "auto")
    with stopped_at("train_step", 5):
        command(*flags)
    for name in ("step_000002", "step_000004"):
        os.truncate(found / "checkpoints" / name / "tensors.safetensors", 100)
    before = tree(found)
    capsys.readouterr()
    assert command(*flags) == 2
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines() if line.startswith("skipping")] == [
        f"skipping the damaged checkpoint {found / 'checkpoints' / name}" for name in ("step_000004", "step_000002")
    ]
    assert f"{found / 'checkpoints'} holds no intact checkpoint; `auto` starts over where there is none" in said.err
    assert tree(found) == before
    shutil.rmtree(found / "checkpoints")
    assert command(*flags) == 0
    assert_same_run(found, whole)


class Poison:
    def __reduce__(self):
        return os.system, ("touch poisoned",)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["checksum differs", "checksum agrees"])
def test_poisoned_checkpoint_is_passed_over_or_refused(
    is_sealed: bool, prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2)
    flags = ("--config", "recipe.yaml", "--output_dir", "run", "--resume_from_checkpoint", "auto")
    with stopped_at("evaluate", 5):
        command(*flags)
    newest = Path("run/checkpoints/step_000004")
    torch.save(Poison(), newest / "tensors.safetensors")
    if is_sealed:
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"] = {name: checkpoint._describe_file(newest / name) for name in manifest["files"]}
        (newest / "manifest.json").write_text(json.dumps(manifest))
    before = tree(Path("run"))
    capsys.readouterr()
    status, said = command(*flags), capsys.readouterr()
    if is_sealed:
        assert status == 2
        assert said.err.startswith(f"error: {newest} is not a checkpoint of this program: ")
        assert tree(Path("run")) == before
    else:
        assert status == 0
        assert f"skipping the damaged checkpoint {newest}: " in said.out
        assert "at step 2 of 5; done again: step_000004" in said.out
    assert not Path("poisoned").exists()


def test_poisoned_best_model_ends_the_run_in_one_line(
    prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """It is read once more, to score the test set."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "recipe.yaml", prepared)
    flags = ("--config", "recipe.yaml", "--output_dir", "run", "--resume_from_checkpoint", "auto")
    with stopped_at("evaluate_test", 5):
        command(*flags)
    torch.save(Poison(), "run/model/model.safetensors")
    assert command(*flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("failed: run/model/model.safetensors cannot be read as weights (")
    assert error.endswith("): put the file of step 5 back, or resume from a checkpoint before it")
    assert not Path("poisoned").exists()


@dataclass(frozen=True)
class StoppedRun:
    """A run that got SIGTERM in an update whose row is due: its settings, and its last checkpoint."""

    folder: Path
    flags: tuple[object, ...]

    @property
    def checkpoint(self) -> Path:
        return checkpoint.list_checkpoints(self.folder)[-1]

    def edit(self, **values: object) -> dict[str, object]:
        """Change fields of the state in the checkpoint, and make its manifest agree; returns what they were."""
        tensors, state = checkpoint.load_checkpoint(self.checkpoint)
        before = {name: state["run"][name] for name in values}
        state["run"] |= values
        checkpoint.save_checkpoint(self.folder, state["run"]["step"], tensors, state)
        return before


STOPPED_AT = 5


@pytest.fixture
def stopped_run(
    finished: Finished, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> StoppedRun:
    """Fine-tuned, so that there are scores from before training; updates 2 and 5, counted from 0, are not finite."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", finished.data_dir, model_config=None, vocabulary="auto", max_steps=10,
        logging_steps=5, eval_steps=4, model_name_or_path=str(finished.folder / "model"),
    )  # fmt: skip
    run = StoppedRun(tmp_path / "run", ("--config", recipe, "--output_dir", tmp_path / "run"))
    break_losses(monkeypatch, lambda step: step in (2, STOPPED_AT))
    original = train.train_step

    def train_step(run: Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        if run.state.step == STOPPED_AT - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, update)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        assert command(*run.flags) == 143
    assert run.checkpoint.name == f"step_{STOPPED_AT:06d}"
    return run


def add(sums: list[float], name: str, count: float) -> list[float]:
    return [value + count * (name == known) for known, value in zip(METER_SUMS, sums, strict=True)]


# Fields of the state that the two tests below this line do not change: a resume refuses another identity.
REFUSED_FIELDS = {"identity"}
# A run that has stopped early makes no update: see test_early_stopping.py.
END_FIELDS = {"stopped_early_at_step", "stopped_early_because"}
POSITION_FIELDS = {"step": 8, "finished_step": 8, "utterances_per_update": 3}


@pytest.mark.parametrize("content", ["[]", '{"best_step": "9"}', '{"best_step": 9}', "{"])
def test_notes_of_the_best_model_that_cannot_be_read_are_passed_over(
    content: str, prepared: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    """Another version's, or damaged: the resumed run goes by its checkpoint alone."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2, eval_steps=2)
    flags = ("--config", recipe, "--output_dir", tmp_path / "run")
    with stopped_at("train_step", 4):
        command(*flags)
    saved = checkpoint.load_state(tmp_path / "run" / "checkpoints" / "step_000004")["run"]
    (tmp_path / "run" / "model" / "best.json").write_text(content)
    assert command(*flags, "--resume_from_checkpoint", "last") == 0
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["best_step"] in (saved["best_step"], 6, 7), "that of the checkpoint, or a later one"
    assert results["best_eval_wer"] <= saved["best_eval_wer"]


def test_every_value_of_the_state_is_restored(stopped_run: StoppedRun, command: Callable[..., int]) -> None:
    """Each is changed in the checkpoint, and shows where it belongs: nothing is found out again, or begins anew."""
    state = checkpoint.load_state(stopped_run.checkpoint)["run"]
    log_path, samples_path = (stopped_run.folder / name for name in ("training_log.csv", "eval_samples.csv"))
    slices_path, bad_path = (stopped_run.folder / name for name in ("eval_slices.csv", "bad_batches.csv"))
    header = log_path.read_bytes().splitlines(keepends=True)[0]
    changed = {
        "best_step": 1, "best_eval_wer": -1.0,  # cannot be beaten
        "best_eval_limits": [-2.0, -0.5], "best_eval_cer": -3.0, "best_metric": -1.0, "best_weights": "average",
        "best_evaluations": [[1, -1.0]], "patience": {"count": 7}, "best_eval_letters": {"a": {"occurrences": 5}},
        "eval_wer_before": 7.0, "test_before": {"test_wer": 8.0},
        "sums": add(state["sums"], "oom_retries", 30), "pending_sums": add(state["pending_sums"], "oom_retries", 4),
        "grad_norm": 123.0, "bad_in_a_row": [1, 0], "deaf_loss": 1.25, "elapsed_seconds": 1e6,
        "pending_seconds": [1e4, 2e4, 3e4, 4e4, 5e4],
        "resumed_anyway": [{"step": 1, "changed": ["seed"]}],
        "log_bytes": len(header),
        "sample_bytes": samples_path.read_bytes().index(b"\n") + 1,
        "slice_bytes": slices_path.read_bytes().index(b"\n") + 1,
        "bad_batch_bytes": bad_path.read_bytes().index(b"\n") + 1,
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(RunState)}
    tested = changed.keys() | POSITION_FIELDS.keys() | REFUSED_FIELDS | END_FIELDS
    assert tested == fields, "another field: change it here as well"
    before = stopped_run.edit(**changed)
    assert {name for name in changed if before[name] == changed[name]} == set()
    flags = (*stopped_run.flags, "--resume_from_checkpoint", "last", "--max_bad_updates", 2)
    assert command(*flags) == 1, "one update was left out before, one after: two in a row"
    stopped_run.edit(bad_in_a_row=[0, 0])
    assert command(*flags) == 0

    results = json.loads((stopped_run.folder / "train_results.json").read_text())
    assert (results["best_step"], results["best_eval_wer"], results["best_weights"]) == (1, -1.0, "average")
    assert results["best_eval_letters"] == changed["best_eval_letters"]
    ended = checkpoint.load_state(stopped_run.checkpoint)["run"]
    assert {name: ended[name] for name in ("best_metric", "best_evaluations", "patience")} == {
        name: changed[name] for name in ("best_metric", "best_evaluations", "patience")
    }
    assert (results["best_eval_wer_low"], results["best_eval_wer_high"]) == (-2.0, -0.5)
    assert (results["eval_wer_before"], results["test_wer_before"]) == (7.0, 8.0)
    assert results["resumed_anyway"] == changed["resumed_anyway"]
    log = read_log(log_path)
    assert log["step"].tolist() == [5, 8, 10], "the rows of steps 0 and 4 were cut off"
    assert log["oom_retries"].tolist() == [34, 34, 34]
    assert log["grad_norm"][0] == 123.0
    assert log["eval_deaf_loss"].tolist()[1:] == [1.25, 1.25]
    assert (log["elapsed_seconds"] > 1e6).all()
    assert log[list(PHASE_COLUMNS)].iloc[0].round(-4).tolist() == changed["pending_seconds"]
    assert log[list(PHASE_COLUMNS)].iloc[1].max() < 1e4
    assert results["save_seconds"] > 5e4
    assert {row["step"] for row in read_table(samples_path)} == {"8", "10"}
    assert {row["step"] for row in read_table(slices_path)} == {"8", "10"}
    assert {row["step"] for row in read_table(bad_path)} == {"6"}


def test_position_of_the_state_is_restored(stopped_run: StoppedRun, command: Callable[..., int]) -> None:
    """Another step, another size of the update: what is trained on is what they say."""
    trained, original = [], train.train_step

    def train_step(run: Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        trained.append((update.step, update.num_utterances))
        return original(run, update)

    tensors, state = checkpoint.load_checkpoint(stopped_run.checkpoint)
    state["run"] |= POSITION_FIELDS
    checkpoint.save_checkpoint(stopped_run.folder, 8, tensors, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        assert command(*stopped_run.flags, "--resume_from_checkpoint", "last") == 0
    assert trained == [(8, 3), (9, 1)], "13 utterances an epoch"
    assert read_log(stopped_run.folder / "training_log.csv")["step"].tolist() == [0, 4, 10], "8 was finished"


@pytest.mark.slow
def test_a_resume_from_an_earlier_checkpoint_can_be_killed_too(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished run: later checkpoints and the mark of its end go, and `last` goes on from what is there."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=9, eval_steps=3, save_steps=3)
    flags = ("--config", recipe, "--save_total_limit", 9, "--output_dir")
    assert command(*flags, tmp_path / "whole") == 0
    assert command(*flags, tmp_path / "run") == 0
    original = train.train_step

    def train_step(run: Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        if update.step == 5:
            raise RuntimeError("the failure that the test asks for")
        return original(run, update)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        with pytest.raises(RuntimeError, match="that the test asks for"):
            command(*flags, tmp_path / "run", "--resume_from_checkpoint", "step_000003")
    assert not (tmp_path / "run" / "train_results.json").exists()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_000003"]
    assert command(*flags, tmp_path / "run", "--resume_from_checkpoint", "auto") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_resume_needs_no_second_disk(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of a third more than the run needs holds it after a kill as well: what it wrote counts as room."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=6, save_steps=2, eval_steps=2)
    run_dir, needed, original = tmp_path / "run", [0], preflight.disk_bytes
    monkeypatch.setattr(preflight, "disk_bytes", lambda run: needed.append(original(run)) or needed[-1])

    def free_bytes(_: Path) -> int:
        used = sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
        return int(1.33 * needed[-1]) - used

    monkeypatch.setattr(preflight, "free_bytes", free_bytes)
    assert command("--config", recipe, "--output_dir", run_dir) == 0
    assert free_bytes(run_dir) < needed[-1], "or the test shows nothing"
    flags = ("--output_dir", run_dir, "--resume_from_checkpoint", "step_000004")
    assert command("--config", recipe, *flags) == 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"seed": 7}], ids=["same", "anyway"])
def test_model_of_a_step_behind_the_checkpoint(
    settings: dict[str, int], prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is the best so far under its own figures, or, after --resume_anyway, of another run and replaced."""
    wers = iter([70, 10, 50, 50, 50, 50])
    original = train.evaluate

    def evaluate(run: Run, dataset: ShardDataset, rows: np.ndarray, description: str) -> scoring.Evaluation:
        evaluation = original(run, dataset, rows, description)
        if description != "evaluating":
            return evaluation
        score = dataclasses.replace(evaluation.score, words=ErrorCounts(substitutions=next(wers), hits=10))
        return dataclasses.replace(evaluation, score=score)

    monkeypatch.setattr(train, "evaluate", evaluate)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=8, eval_steps=2, save_steps=2)
    flags = ["--config", recipe, "--save_total_limit", 9, "--output_dir", tmp_path / "run"]
    assert command(*flags) == 0
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["best_step"] == 4
    best = load_file(tmp_path / "run" / "model" / "model.safetensors")["lm_head.weight"]
    wers = iter([20, 30, 40])
    flags += ["--resume_from_checkpoint", "step_000002", *(f for k, v in settings.items() for f in (f"--{k}", v))]
    assert command(*flags, *(["--resume_anyway"] if settings else [])) == 0
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")["lm_head.weight"]
    assert (results["best_step"], torch.equal(found, best)) == (4, not settings)
    assert results["best_eval_wer"] == (20 / 30 if settings else 10 / 20)


def test_a_checkpoint_by_a_link_or_a_path(prepared: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=4, save_steps=2)
    folder = tmp_path / "run"
    flags = ("--config", recipe, "--output_dir", folder, "--resume_from_checkpoint")
    assert command(*flags[:-1]) == 0
    (folder / "latest").symlink_to(folder / "checkpoints" / "step_000002")
    for which in (folder / "latest", folder / "checkpoints" / ".." / "checkpoints" / "step_000002"):
        assert command(*flags, which) == 0
        assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step_000002", "step_000004"]


def test_finished_is_no_checkpoint(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    assert command("--config", recipe, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "finished") == 2
    assert "--resume_from_checkpoint finished: not a checkpoint" in capsys.readouterr().err


def test_a_token_that_a_kill_has_left_is_no_foreign_file(
    prepared: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{TOKEN_PREFIX}0123").touch()
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0


def test_another_dropout_is_another_run(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=4, save_steps=2)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    write_recipe(
        recipe, prepared, max_steps=4, save_steps=2, model_config=TINY_MODEL | TALKATIVE | {"hidden_dropout": 0.5}
    )
    flags = ("--output_dir", tmp_path / "run", "--resume_from_checkpoint", "step_000002")
    assert command("--config", recipe, *flags) == 2
    assert "different in the configuration of the model" in capsys.readouterr().err


def test_a_screen_that_is_gone_costs_no_checkpoint(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`2>&1 | tee log` dies of the same Ctrl-C."""
    original = train.train_step

    class Gone:
        def __getattr__(self, name: str) -> object:
            raise BrokenPipeError

        def fileno(self) -> int:
            raise BrokenPipeError

    def train_step(run: Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        if update.step == 2:
            for name in ("stdout", "stderr", "__stderr__"):
                patch.setattr(sys, name, Gone())
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, update)

    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        patch.setattr(sys, "argv", ["train.py", "--config", str(recipe), "--output_dir", str(tmp_path / "run")])
        with pytest.raises(errors.Stopped):
            train.main()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_000003"]


def test_nothing_is_drawn_from_the_state_of_a_generator(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, dropout and layerdrop are functions of seed and step, so that no checkpoint needs a random state."""
    model_config = TINY_MODEL | TALKATIVE | MASKS | {"hidden_dropout": 0.2, "layerdrop": 0.5, "num_hidden_layers": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, model_config=model_config, eval_steps=3)
    whole, scrambled = tmp_path / "whole", tmp_path / "scrambled"
    assert command("--config", recipe, "--output_dir", whole) == 0
    original = train.train_step

    def train_step(run: Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1000 + update.step)
        return original(run, update)

    monkeypatch.setattr(train, "train_step", train_step)
    assert command("--config", recipe, "--output_dir", scrambled) == 0
    assert_same_run(scrambled, whole)


# --- Full disk -----------------------------------------------------------------------------------------------------

# What meets the full disk, from which call on, and the file that the message names.
FULL_AT = {
    "log": (runlog.TrainingLog, "append", 5, "training_log.csv"),
    "samples": (runlog.SampleTable, "append", 2, "eval_samples.csv"),
    "plot": (runlog, "draw_training_curve", 2, "training_curve.png"),
    "checkpoint": (checkpoint, "save_checkpoint", 2, "checkpoints"),
    "best model": (BestModel, "_write", 1, "model"),
    "results": (Run, "write_results", 1, "train_results.json"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a recipe whose WER improves more than once, and a run of it that had room enough."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_part(root / "data" / "train" / "part_1", make_rows(13, seed=1))
    write_part(root / "data" / "dev" / "part_1", make_rows(5, seed=2))
    write_recipe(root / "recipe.yaml", root / "data", max_steps=12, eval_steps=3, save_steps=2, learning_rate=1e-2)
    start = [sys.executable, REPOSITORY / "train.py", "--config", root / "recipe.yaml", "--output_dir", root / "run"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process; sums on two are others
    subprocess.run(start, check=True, capture_output=True, timeout=300, env=one_thread)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL_AT)
def test_full_disk_is_one_line_and_a_resume_is_invisible(
    what: str, undisturbed: Path, small_disk: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    owner, name, call, named = FULL_AT[what]
    run_dir, original, calls = small_disk / "run", getattr(owner, name), []

    def write_to_a_full_disk(*arguments: object) -> object:
        calls.append(name)
        if len(calls) >= call:
            fill(small_disk)
        if name == "append" and len(calls) >= call:
            # Longer than what is left of the file's last page.
            arguments = (*arguments, dict.fromkeys(arguments[-1], "x" * 5_000))
        return original(*arguments)

    flags = ["--config", undisturbed / "recipe.yaml", "--output_dir", run_dir, "--resume_from_checkpoint", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, write_to_a_full_disk)
        assert command(*flags) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("training: ")]
    message = rf"failed: disk full at {run_dir}/{named}\S*: [\d.]+ \w+ needed, [\d.]+ \w+ free; make room and resume"
    assert len(said) == 1 and re.fullmatch(message, said[0]), said
    assert all(checkpoint.find_damage(folder) is None for folder in checkpoint.list_checkpoints(run_dir))
    assert len(read_log(run_dir / "training_log.csv")) >= 2
    if (run_dir / "model").exists():
        load_file(run_dir / "model" / "model.safetensors")
    assert not [path for path in run_dir.rglob("*") if path.name.endswith((".unfinished", ".new", ".aside"))]
    (small_disk / "filler").unlink()
    assert command(*flags) == 0

    assert_same_run(run_dir, undisturbed / "run")


def test_read_only_output_is_named(
    prepared: Path, tmp_path: Path, read_only_disk: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    assert command("--config", recipe, "--output_dir", read_only_disk / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: preflight refuses: disk: {read_only_disk} cannot be written to: choose another --output_dir"
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_clip_ends_the_run_in_one_line(num_workers: int, prepared: Path, tmp_path: Path) -> None:
    """From a loading process too, which does not hear Python's SIGTERM; and a resume goes on with the mended part."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, dataloader_num_workers=num_workers)
    data = prepared / "train" / "part_2" / "data.arrow"
    whole, audio = data.read_bytes(), ShardDataset(prepared / "train")[9].audio.tobytes()
    place = whole.index(audio) + 501
    data.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    start = [sys.executable, REPOSITORY / "train.py", "--config", recipe, "--output_dir", tmp_path / "run"]
    start += ["--resume_from_checkpoint", "auto"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    remedy = f"make it again with python prepare.py --corpus corpus --data_dir {prepared} --verify"
    what = f"{data.parent} is damaged (row u1_9 of data.arrow: its audio differs from its checksum)"
    assert done.stderr == f"failed: {what}: {remedy}\n"
    data.write_bytes(whole)
    assert subprocess.run(start, capture_output=True, timeout=120).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_promise_3_ten_kills_are_invisible(num_processes: int) -> None:
    """At random moments and at failpoints; the benchmark compares with the run that was never killed."""
    command = [sys.executable, REPOSITORY / "benchmarks" / "kill_resume.py", "--kills", "10"]
    command += ["--processes", str(num_processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(re.search(r"(\d+) kills survived", done.stdout)[1])
    assert kills >= 10
    assert "compared in each run: " in done.stdout


# --- Precision and the launcher ------------------------------------------------------------------------------------


@pytest.fixture
def cpu_scaler(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Runs that are made from here on have fp16's loss scaler, on the CPU (trap 30)."""

    def install(init_scale: float) -> None:
        def start(*arguments: object, **settings: object) -> train.Accelerator:
            accelerator = start_processes(*arguments, **settings)
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
            return accelerator

        monkeypatch.setattr(train, "start_processes", start)

    return install


def test_overflow_of_the_loss_scaler_is_counted_and_steps_nothing(
    prepared: Path, tmp_path: Path, command: Callable[..., int], cpu_scaler: Callable[[float], None]
) -> None:
    """Autocast in fp16, and a first scale that is far too large; the moving average does not follow such an update."""
    skipped_steps = []
    original = train.train_step

    def train_step(run: Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        before = [parameter.detach().clone() for parameter in run.gradients.parameters]
        averages = [average.clone() for average in run.ema.tensors.values()]
        scale = run.accelerator.scaler.get_scale()
        loss_sum, grad_norm = original(run, update)
        is_unchanged = all(map(torch.equal, before, run.gradients.parameters))
        assert is_unchanged == all(map(torch.equal, averages, run.ema.tensors.values()))
        assert is_unchanged == (run.accelerator.scaler.get_scale() < scale)
        assert is_unchanged == (not torch.isfinite(grad_norm))
        skipped_steps.extend([run.state.step + 1] * is_unchanged)
        return loss_sum, grad_norm

    cpu_scaler(2.0**20)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, model_config=TINY_MODEL, max_steps=16, save_steps=2)
    flags = ("--config", recipe, "--output_dir", tmp_path / "run", "--ema_decay", 0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        with stopped_at("train_step", 5):
            command(*flags)
        assert command(*flags, "--resume_from_checkpoint", "last") == 0
    assert skipped_steps
    log = read_log(tmp_path / "run" / "training_log.csv")
    expected = [len({skipped for skipped in skipped_steps if skipped <= step}) for step in log["step"]]
    assert log["step"].tolist() == list(range(1, 17))
    assert log["scaler_skips"].tolist() == expected
    assert expected[-1] < 16
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_000016" / "tensors.safetensors")
    assert saved["ema.num_updates"] == 16 - expected[-1]
    assert np.isfinite(log["train_loss"]).all()
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]


def test_resume_with_a_loss_scaler_is_invisible(
    prepared: Path, tmp_path: Path, command: Callable[..., int], cpu_scaler: Callable[[float], None]
) -> None:
    """A scaler that began anew at its first scale would skip updates once more."""
    cpu_scaler(2.0**20)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, model_config=TINY_MODEL, max_steps=16, save_steps=14)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("--config", recipe, "--output_dir", whole) == 0
    with stopped_at("train_step", 15):
        command("--config", recipe, "--output_dir", parts)
    state = checkpoint.load_state(parts / "checkpoints" / "step_000014")
    assert state["scaler"]["scale"] < 2.0**20
    assert state["scaler"]["_growth_tracker"] > 0, "updates since the last skip, until the scale is raised"
    assert command("--config", recipe, "--output_dir", parts, "--resume_from_checkpoint", "last") == 0
    assert_same_run(parts, whole)
    scalers = [checkpoint.load_state(run / "checkpoints" / "step_000016")["scaler"] for run in (parts, whole)]
    assert scalers[0] == scalers[1]


def test_loss_scaler_changes_no_gradient(
    make_run: Callable[..., Run], cpu_scaler: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is clipped, logged and stepped on is the gradient without the scale."""
    found = []
    for is_scaled in (False, True):
        if is_scaled:
            cpu_scaler(1024.0)
        run = make_run(max_grad_norm=0.5)
        monkeypatch.setattr(run.accelerator, "autocast", contextlib.nullcontext)
        (update,) = training_loader(run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, 1, 0)
        _, grad_norm = train.train_step(run, update)
        found.append((float(grad_norm), run.gradients.buffer, run.model.hf.lm_head.weight.detach()))
    (plain_norm, plain, plain_weight), (norm, scaled, weight) = found
    assert norm == pytest.approx(plain_norm, rel=1e-5)
    assert float(scaled.norm()) == pytest.approx(0.5, rel=1e-5)
    assert relative_difference(scaled, plain) < 1e-5
    torch.testing.assert_close(weight, plain_weight)


# --- Refused, in one line, before anything is written --------------------------------------------------------------


@dataclass(frozen=True)
class BadInput:
    flags: list[str]
    named: tuple[str, ...]
    """What the message must hold."""
    settings: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda root: None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _whisper(root: Path) -> None:
    _write(root / "whisper" / "config.json", json.dumps({"model_type": "whisper"}))


def _empty_split(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        shutil.rmtree(root / "data" / name)
        write_part(root / "data" / name / "part_1", [])

    return change


BAD_INPUTS = {
    "missing data_dir": BadInput(["--data_dir", "nowhere"], ("nowhere/train", "prepare.py")),
    "no dev split": BadInput([], ("data/dev", "prepare.py"), prepare=lambda root: shutil.rmtree(root / "data" / "dev")),
    "empty train split": BadInput([], ("data/train", "no utterance"), prepare=_empty_split("train")),
    "empty dev split": BadInput([], ("data/dev",), prepare=_empty_split("dev")),
    "nothing left": BadInput(["--max_duration_in_seconds", "0.2"], ("of 13 is left", "too_long 13")),
    "lower case forced": BadInput(["--vocabulary", "large_960h", "--case", "lower"], ("0.", "--case upper")),
    "checkpoint is a file": BadInput(
        ["--model_name_or_path", "recipe.yaml"], ("is a file", "config.json"), {"model_config": None}
    ),
    "checkpoint without config.json": BadInput(
        ["--model_name_or_path", "data"], ("not a checkpoint", "config.json"), {"model_config": None}
    ),
    "checkpoint of another family": BadInput(
        ["--model_name_or_path", "whisper"], ("whisper", "wav2vec2"), {"model_config": None}, prepare=_whisper
    ),
    "hub out of reach": BadInput(
        ["--model_name_or_path", "nobody/no-such-model"], ("hf download nobody/no-such-model",), {"model_config": None}
    ),
    "no model": BadInput([], ("--model_name_or_path",), {"model_config": None}),
    "unknown flag": BadInput(["--learning_rat", "1"], ("--learning_rat", "nearest", "learning_rate")),
    "unknown key": BadInput([], ("recipe.yaml", "evalsteps", "eval_steps"), {"evalsteps": 3}),
    "all errors at once": BadInput(
        ["--eval_steps", "0", "--max_steps", "0"], ("--eval_steps is 0", "--max_steps is 0")
    ),
    "wrong type": BadInput(["--eval_steps", "often"], ("--eval_steps", "'often'", "whole number")),
    "no checkpoint to resume": BadInput(["--resume_from_checkpoint", "last"], ("run/checkpoints", "--output_dir")),
    "fp16 without a GPU": BadInput([], ("fp16", "GPU", "bf16"), environment={"ACCELERATE_MIXED_PRECISION": "fp16"}),
}


@pytest.mark.parametrize("case", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused only without a GPU")
def test_bad_input_is_refused_in_one_line(
    case: BadInput, prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    write_recipe(tmp_path / "recipe.yaml", Path("data"), **case.settings)
    case.prepare(tmp_path)
    before = tree(tmp_path)
    assert command("--config", "recipe.yaml", "--output_dir", "run", *case.flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for words in case.named:
        assert words in error
    assert tree(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_see_each_other_are_refused(
    prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """Trap 9: the launcher started two, and each believes that it is alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "Accelerator", lambda **_: alone())
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 2
    assert "started 2 processes, and this one sees 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_output_folder_of_another_run_is_left_alone(
    finished: Finished, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    unfinished, begun, foreign = tmp_path / "unfinished", tmp_path / "begun", tmp_path / "foreign"
    shutil.copytree(finished.folder, unfinished)
    (unfinished / "train_results.json").unlink()
    _write(begun / "config.yaml", "")
    _write(foreign / "notes.txt", "mine")
    recipe = write_recipe(tmp_path / "recipe.yaml", finished.data_dir)
    resume = "resume it with train.py --config {folder}/config.yaml --resume_from_checkpoint last"
    for folder, said in (
        (finished.folder, f"holds a finished run: {resume}"),
        (unfinished, f"holds a run: {resume}"),
        (begun, "holds a run that stopped before its first checkpoint"),
        (foreign, "is not an empty folder"),
    ):
        before = tree(folder)
        assert command("--config", recipe, "--output_dir", folder) == 2
        error = capsys.readouterr().err
        assert said.format(folder=folder) in error
        assert error.startswith("error: ") and "another --output_dir" in error
        assert tree(folder) == before


def test_command_that_the_refusal_names_resumes_the_run(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2)
    flags = ("--config", recipe, "--output_dir", tmp_path / "run")
    with stopped_at("train_step", 3):
        command(*flags)
    assert command(*flags) == 2
    printed = re.search(r"resume it with train.py (.*), or", capsys.readouterr().err)[1]
    assert command(*printed.split()) == 0
    screen = capsys.readouterr().out
    assert "resumed     from" in screen
    assert "update      8 per micro-batch" in screen


def test_training_ends_the_processes_on_every_path(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 8."""
    ended = []
    monkeypatch.setattr(train.Accelerator, "end_training", lambda accelerator: ended.append(accelerator))
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=1)
    assert command("--config", recipe, "--output_dir", tmp_path / "done") == 0
    assert command("--config", recipe, "--output_dir", tmp_path / "done") == 2
    with stopped_at("train_step", 0):
        command("--config", recipe, "--output_dir", tmp_path / "broken")
    assert len(ended) == 3


def break_losses(monkeypatch: pytest.MonkeyPatch, is_broken: Callable[[int], bool]) -> None:
    original = Run.forward

    def forward(run: Run, batch: train.Batch) -> tuple[torch.Tensor, ...]:
        logits_BTV, frame_lengths_B, loss_B = original(run, batch)
        breaks = run.model.training and is_broken(run.state.step)
        return logits_BTV, frame_lengths_B, loss_B * (float("nan") if breaks else 1.0)

    monkeypatch.setattr(Run, "forward", forward)


def test_update_with_a_gradient_that_is_not_finite_is_left_out_and_counted(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 12: no weight and no moment becomes NaN, and the loss of the other updates stays readable."""
    break_losses(monkeypatch, lambda step: step == 2)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, logging_steps=2, save_steps=1, save_total_limit=9)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    weights = [
        load_file(tmp_path / "run" / "checkpoints" / f"step_{step:06d}" / "tensors.safetensors") for step in (2, 3, 5)
    ]
    assert all(tensor.isfinite().all() for tensors in weights for tensor in tensors.values())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    log = read_log(tmp_path / "run" / "training_log.csv")
    assert log["bad_updates"].tolist() == [0, 1, 1]
    assert np.isfinite(log["train_loss"]).all()


def test_run_whose_updates_are_all_left_out_fails(
    prepared: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    break_losses(monkeypatch, lambda step: step >= 3)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2, max_steps=30, logging_steps=2, eval_steps=6)
    assert command("--config", recipe, "--output_dir", tmp_path / "run", "--max_bad_updates", 4) == 1
    *named, error = capsys.readouterr().err.splitlines()
    assert error.startswith("failed: the last 4 updates, up to step 7, had a loss or gradient that is not finite")
    log = read_log(tmp_path / "run" / "training_log.csv")
    assert log["bad_updates"].tolist() == [0, 1, 3]
    assert np.isfinite(log["train_loss"]).tolist() == [True, True, False], "no loss is no loss of 0"
    assert [line.split(",")[0] for line in named] == [f"update {step} left out" for step in (4, 5, 6, 7)]
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == "step_000006"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "tensors.safetensors").values())


def test_clips_of_a_left_out_update_are_listed_with_their_figures(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update 2 of 8 + 5 utterances an epoch: all of its clips, and the loss of each."""
    break_losses(monkeypatch, lambda step: step == 2)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4,
                          gradient_accumulation_steps=2)  # fmt: skip
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    rows = read_table(tmp_path / "run" / "bad_batches.csv")
    train_set = ShardDataset(prepared / "train")
    plan = BatchPlan(np.arange(13), train_set.num_samples, 8, TrainConfig().seed)
    ((_, _, positions),) = plan.updates(2, 3)
    expected = {train_set[int(row)].id: len(train_set[int(row)].audio) / 16_000 for row in positions}
    assert {row["id"]: float(row["seconds"]) for row in rows} == pytest.approx(expected)
    assert {row["step"] for row in rows} == {"3"}, "as in training_log.csv"
    assert {row["loss"] for row in rows} == {"nan"}
    assert all(int(row["labels"]) > 0 for row in rows)


def test_resume_cuts_the_list_of_bad_batches_back(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, lambda step: step in (1, 3))
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save_steps=2)
    assert command("--config", recipe, "--output_dir", tmp_path / "whole") == 0
    with stopped_at("evaluate_and_log", 5):
        command("--config", recipe, "--output_dir", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_000004")
    resume = ("--resume_from_checkpoint", "last")
    assert command("--config", recipe, "--output_dir", tmp_path / "resumed", *resume) == 0
    whole, resumed = ((tmp_path / name / "bad_batches.csv").read_text() for name in ("whole", "resumed"))
    assert whole == resumed
    assert whole.count("\n") == 1 + 5 + 5


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB"), "--gradient_checkpointing"),
        (UsageError("Caught UsageError in worker\nTrace\nerrors.UsageError: part_1 is damaged"), "part_1 is damaged"),
    ],
    ids=["memory", "shard"],
)
def test_failure_inside_the_run_is_one_line(
    prepared: Path, tmp_path: Path, command: Callable[..., int], error: Exception, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "train_step", fail)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert len([line for line in printed.splitlines() if line.startswith("failed: ")]) == 1


def test_evaluation_loss_does_not_count_labels_that_have_no_alignment(make_run: Callable[..., Run]) -> None:
    """Two of three rows fit their frames: the loss per label is that of the two."""
    run = make_run()
    batch = run.collate([run.train_set[row] for row in range(3)], np.arange(3))
    with torch.no_grad():
        run.model.eval()
        whole, _ = scoring.score_one(run, batch)
        kept, _ = scoring.score_one(run, run.collate([run.train_set[row] for row in (0, 2)], np.array([0, 2])))
        text = "AB" * 100
        utterance = dataclasses.replace(run.train_set[1], text=text)
        mixed, _ = scoring.score_one(run, run.collate([run.train_set[0], utterance, run.train_set[2]], np.arange(3)))
    assert mixed.labels == kept.labels < whole.labels
    assert mixed.loss == pytest.approx(kept.loss, rel=1e-5)
    assert mixed.utterances == 3


# --- The demo ------------------------------------------------------------------------------------------------------


def test_demo_in_small_runs_from_nothing(
    tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Corpus, shards, a few updates, results: configs/demo.yaml with less of everything."""
    small = demo.DemoCorpus(num_train_clips=24, num_dev_clips=6, num_test_strings=4)
    make = demo.make_demo_corpus
    monkeypatch.setattr("prepare.make_demo_corpus", lambda folder: make(folder, small))
    monkeypatch.setattr("prepare._num_workers", lambda *_: 1)
    monkeypatch.setattr(train, "DEMO_CONFIG", tmp_path / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    few = {"max_steps": 2, "logging_steps": 1, "dataloader_num_workers": 0}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(recipe | few))
    assert command() == 0
    screen = capsys.readouterr().out
    assert "unseen strings, unseen voice" in screen
    assert "use it: python -c" in screen
    results = json.loads((tmp_path / "runs" / "demo" / "train_results.json").read_text())
    assert results["train_samples"] == 24
    assert {"test_wer", "test_wer_seen_speakers", "test_wer_unseen_speakers"} <= results.keys()

    before = tree(tmp_path / "runs"), tree(tmp_path / "data")
    assert command() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: runs/demo holds a finished run")
    assert "--resume_from_checkpoint" in error
    assert (tree(tmp_path / "runs"), tree(tmp_path / "data")) == before


@pytest.mark.slow
def test_demo_learns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`accelerate launch train.py` in a fresh checkout; the time is printed, since it is the machine's."""
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "1", "train.py"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "runs" / "demo" / "train_results.json").read_text())
    log = read_log(tmp_path / "runs" / "demo" / "training_log.csv")
    with capsys.disabled():
        print(f"\ndemo: test WER {results['test_wer']:.2%}, {log['elapsed_seconds'].iloc[-1]:.0f} s of training")
        print(done.stdout[-1200:])
    assert "WARNING" not in done.stdout
    # The line that shows how to use the model, as it was printed.
    line = re.search(r"use it: (python -c .*)", done.stdout)[1]
    said = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert set(said.stdout.split()) <= {word.upper() for word in demo.DIGIT_WORDS}, said.stderr[-2000:]
    assert said.stdout.split()
    assert results["test_wer_seen_speakers"] <= 0.05
    before = tree(tmp_path / "runs"), tree(tmp_path / "data")
    again = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode != 0
    assert "error: runs/demo holds a finished run" in again.stderr
    assert (tree(tmp_path / "runs"), tree(tmp_path / "data")) == before
    # Its first evaluation comes after the plateau that every run from random weights goes through, and is no trouble.
    flags = [
        "--config",
        "configs/demo.yaml",
        "--output_dir",
        "runs/plateau",
        "--eval_steps",
        "20",
        "--max_steps",
        "140",
    ]
    seen = subprocess.run([*launch, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert seen.returncode == 0, seen.stderr[-2000:]
    assert "WARNING" not in seen.stdout
    log = read_log(tmp_path / "runs" / "plateau" / "training_log.csv")
    states = [state for state, _ in itertools.groupby(log["state"][log["eval_wer"] >= 0.99])]
    assert states == ["before the plateau", "plateau", "leaving the plateau"]


# --- The real recipes, at full size --------------------------------------------------------------------------------


@pytest.mark.xdist_group("large")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "architecture", "file_format"),  # each in both formats: test_pretrained.py
    [("english_large", LARGE_960H, "bin"), ("hausa_xlsr", XLS_R_300M, "safetensors")],
    ids=["english", "hausa"],
)
def test_recipe_takes_the_published_architecture(
    recipe: str, architecture: Architecture, file_format: str, tmp_path: Path
) -> None:
    """Three updates of 315 million parameters, from a checkpoint with the files and keys of the published one."""
    write_published_like_checkpoint(tmp_path / "checkpoint", architecture, file_format)
    rows = [row for row in make_rows(80, seed=5) if len(row[1]) >= 16_000][:17]
    write_part(tmp_path / "data" / "train" / "part_1", rows[:16])
    write_part(tmp_path / "data" / "dev" / "part_1", rows[16:])
    try:
        done = subprocess.run(
            [
                sys.executable, REPOSITORY / "train.py", "--config", REPOSITORY / "configs" / f"{recipe}.yaml",
                "--model_name_or_path", "checkpoint", "--data_dir", "data", "--output_dir", "run",
                "--train_fraction", "1", "--max_steps", "3", "--logging_steps", "1", "--save_total_limit", "1",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        _check_three_updates(tmp_path / "run", tmp_path / "checkpoint", recipe, done.stdout)
    finally:
        for folder in ("checkpoint", "run"):  # ten gigabytes
            shutil.rmtree(tmp_path / folder, ignore_errors=True)


def _check_three_updates(run_dir: Path, checkpoint: Path, recipe: str, screen: str) -> None:
    log = read_log(run_dir / "training_log.csv").query("step > 0")
    rates = {"english_large": [2e-5, 2e-5 * 2 / 3, 2e-5 / 3], "hausa_xlsr": [0, 5e-8, 1e-7]}[recipe]
    assert log["step"].tolist() == [1, 2, 3]
    assert log["learning_rate"].tolist() == pytest.approx(rates)
    assert log[["train_loss", "grad_norm"]].notna().all(axis=None)
    assert (log["grad_norm"] > 0).all()
    trained = load_file(run_dir / "model" / "model.safetensors")
    sizes = {name: value.numel() for name, value in trained.items()}
    assert sum(sizes.values()) > 315e6
    frozen = sum(count for name, count in sizes.items() if ".feature_extractor." in name)
    assert f"{frozen:,} frozen" in screen
    if (checkpoint / "model.safetensors").is_file():
        start = load_file(checkpoint / "model.safetensors")
    else:
        start = torch.load(checkpoint / "pytorch_model.bin", weights_only=True, mmap=True)
    convolution = "wav2vec2.feature_extractor.conv_layers.3.conv.weight"
    projection = "wav2vec2.encoder.layers.7.attention.q_proj.weight"
    assert torch.equal(trained[convolution], start[convolution])
    assert not torch.equal(trained[projection], start[projection])
    if recipe == "english_large":
        assert "vocabulary: 32 tokens of the checkpoint's tokenizer" in screen
        assert "head: new" not in screen
        assert read_log(run_dir / "training_log.csv")["step"].tolist() == [0, 1, 2, 3]
    else:
        assert "built from the training text" in screen
        assert "head: new" in screen
        assert "of the checkpoint not used (project_hid, project_q, quantizer)" in screen
