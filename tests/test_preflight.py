"""The command, its screen and files, and what train.py does with the same checks."""

import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, make_rows, run_command, write_part, write_recipe

import preflight
import scoring
import train
from data import BatchPlan, CutSettings, cut_update
from errors import UsageError
from findings import Finding, worst_verdict
from preflight import Report, check_disk, check_precision, check_ranks
from runlog import read_log

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def check() -> Callable[..., int]:
    """preflight.py with these arguments, in this process: its exit status."""
    return functools.partial(run_command, preflight.main, "preflight.py")


@pytest.fixture
def run() -> Callable[..., int]:
    """train.py likewise."""
    return functools.partial(run_command, train.main, "train.py")


def read_report(folder: Path) -> tuple[dict, dict[str, dict]]:
    """preflight.json, and its findings by check."""
    report = json.loads((folder / "preflight.json").read_text())
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert len(findings) == len(report["findings"]), "two findings share a name"
    return report, findings


# --- The command ---------------------------------------------------------------------------------------------------


def test_ready_is_status_0_a_screen_and_three_files(
    prepared: Path, tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_duration_in_seconds=0.8)
    assert check("--config", recipe) == 0
    screen = capsys.readouterr().out
    for words in ("check", "result", "verdict", "remedy", "coverage train", "memory training", "ranks", "decoded"):
        assert words in screen
    assert screen.splitlines()[-1].startswith("ready")
    folder = prepared / "preflight"
    assert sorted(path.name for path in folder.iterdir()) == ["drop_list.csv", "preflight.json", "suspects.csv"]
    report, findings = read_report(folder)
    with (folder / "drop_list.csv").open(newline="") as file:
        drops = list(csv.DictReader(file))
    assert {row["reason"] for row in drops} == {"too_long"}
    assert report["left_out"] == {"too_long": len(drops)}
    assert report["verdict"] == worst_verdict(Finding(**finding) for finding in report["findings"])
    assert findings["coverage train"]["facts"]["unknown_fraction"] == 0
    assert findings["memory training"]["facts"]["peak_bytes"] > 1e8


def test_the_report_may_lie_where_the_run_will(
    prepared: Path, tmp_path: Path, check: Callable[..., int], run: Callable[..., int]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=1)
    assert check("--config", recipe, "--output_dir", tmp_path / "run") == 0
    drops = (tmp_path / "run" / "drop_list.csv").read_text()
    assert run("--config", recipe, "--output_dir", tmp_path / "run") == 0
    assert (tmp_path / "run" / "drop_list.csv").read_text() == drops
    assert {"preflight.json", "model"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_promise_5_lower_case_text_is_refused_and_the_remedy_named(
    prepared: Path, tmp_path: Path, check: Callable[..., int], run: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """The English seed's night of WER 1.0; the default trains."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, vocabulary="large_960h", max_steps=1)
    for command, folder in ((check, "report"), (run, "refused")):
        assert command("--config", recipe, "--case", "lower", "--output_dir", tmp_path / folder) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: preflight refuses: coverage train: ")
        assert error.count("\n") == 1
        assert (
            "text is lower-case (--case lower), vocabulary upper-case: with --case upper coverage is 100.00%" in error
        )
    assert read_report(tmp_path / "report")[0]["verdict"] == "refused"
    assert not (tmp_path / "refused").exists(), "a run that is refused writes nothing"
    assert run("--config", recipe, "--output_dir", tmp_path / "trained") == 0


def test_warn_goes_on_in_spite_of_a_refusal(prepared: Path, tmp_path: Path, run: Callable[..., int]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, vocabulary="large_960h", max_steps=1)
    flags = ("--case", "lower", "--preflight", "warn", "--output_dir", tmp_path / "run")
    assert run("--config", recipe, *flags) == 0
    assert read_report(tmp_path / "run")[0]["verdict"] == "refused"
    assert len(read_log(tmp_path / "run" / "training_log.csv")) == 1


def test_strict_refuses_on_warnings(
    prepared: Path, tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """Here a test set in another alphabet."""
    shutil.rmtree(prepared / "test")
    rows = [(name, audio, "один", speaker) for name, audio, _, speaker in make_rows(4, seed=3)]
    write_part(prepared / "test" / "part_1", rows)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    assert check("--config", recipe) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready, with warnings"
    assert check("--config", recipe, "--strict") == 2
    error = capsys.readouterr().err
    assert "coverage test: 0.00% of 16 characters known" in error
    assert error.count("\n") == 1


def test_warn_says_what_train_py_would_do(
    prepared: Path, tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, vocabulary="large_960h")
    flags = ("--config", recipe, "--case", "lower", "--preflight", "warn")
    assert check(*flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "refused, and train.py goes on all the same: --preflight warn"
    assert check(*flags, "--strict") == 2
    assert capsys.readouterr().err.startswith("error: preflight refuses: coverage train: ")


@pytest.mark.parametrize("is_warned", [False, True])
def test_promise_4_when_nothing_is_left_the_reasons_are_shown_and_listed(
    prepared: Path, tmp_path: Path, check: Callable[..., int], run: Callable[..., int], capsys: pytest.CaptureFixture,
    is_warned: bool,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    flags = ("--config", recipe, "--min_duration_in_seconds", 19.9, *(["--preflight", "warn"] if is_warned else []))
    refusal = "training clips: no training utterance of 13 is left (too_short 13): lower --min_duration_in_seconds"
    assert check(*flags) == 2
    screen = capsys.readouterr()
    assert screen.err == f"error: preflight refuses: {refusal}\n"
    for name in ("coverage train", "training clips", "audio length", "shared audio", "disk"):
        assert re.search(f"^ ?{name} ", screen.out, re.MULTILINE), name
    report, findings = read_report(prepared / "preflight")
    assert report["left_out"] == findings["training clips"]["facts"]["left_out"] == {"too_short": 13}
    with (prepared / "preflight" / "drop_list.csv").open(newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["too_short"] * 13
    assert run(*flags, "--output_dir", tmp_path / "run") == 2
    screen = capsys.readouterr()
    assert screen.err == f"error: preflight refuses: {refusal}\n"
    assert re.search("^ ?training clips ", screen.out, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_identical_audio_is_left_out_by_both_commands(
    prepared: Path, tmp_path: Path, check: Callable[..., int], run: Callable[..., int]
) -> None:
    shutil.rmtree(prepared / "dev")
    write_part(prepared / "dev" / "part_1", [*make_rows(3, seed=2), ("copy", *make_rows(13, seed=1)[11][1:])])
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=1)
    assert check("--config", recipe) == 0
    assert run("--config", recipe, "--output_dir", tmp_path / "run") == 0
    for folder in (prepared / "preflight", tmp_path / "run"):
        assert (folder / "drop_list.csv").read_text().splitlines()[1:] == [
            "train,u1_11,audio_in_dev,the same samples as dev utterance copy"
        ]
        assert read_report(folder)[0]["left_out"] == {"audio_in_dev": 1}
    assert json.loads((tmp_path / "run" / "train_results.json").read_text())["train_samples"] == 12


# --- Where the report goes -----------------------------------------------------------------------------------------


def test_the_report_of_a_run_stays(
    prepared: Path, tmp_path: Path, check: Callable[..., int], run: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """Its drop list is what that run left out, whatever other settings would."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=1)
    run_dir = tmp_path / "run"
    assert run("--config", recipe, "--output_dir", run_dir) == 0
    before = {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    (run_dir / "train_results.json").unlink()  # It may be running as well.
    del before[run_dir / "train_results.json"]
    capsys.readouterr()
    assert check("--config", run_dir / "config.yaml", "--max_duration_in_seconds", 0.8) == 0
    assert {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before
    assert f"{run_dir} holds a run, whose own report stays: written to {prepared / 'preflight'}: " in (
        capsys.readouterr().out
    )
    assert read_report(prepared / "preflight")[0]["left_out"]["too_long"] > 0


@pytest.mark.parametrize("kind", ["read-only", "file"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_checks(
    prepared: Path, tmp_path: Path, check: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture, kind: str,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    if kind == "file":
        (prepared / "preflight").touch()
        said = f"{prepared / 'preflight'} is a file"
    else:
        monkeypatch.setattr(os, "access", lambda folder, mode: (folder, mode) != (prepared, os.W_OK))
        said = f"{prepared} cannot be written to"
    with monkeypatch.context() as patch:
        patch.setattr("assembly.Assembly", lambda *_: pytest.fail("the checks began"))
        assert check("--config", recipe) == 2
    assert capsys.readouterr().err == f"error: {said}: name a folder for the report with --output_dir\n"
    assert check("--config", recipe, "--output_dir", tmp_path / "report") == 0
    assert (tmp_path / "report" / "preflight.json").is_file()


def test_a_report_that_cannot_be_written_after_all_is_shown(
    prepared: Path, tmp_path: Path, check: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    mkdir = Path.mkdir

    def refuse(path: Path, **settings: object) -> None:
        if path.name == "preflight":
            raise OSError(30, "Read-only file system", str(path))
        mkdir(path, **settings)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert check("--config", recipe) == 2
    screen = capsys.readouterr()
    assert "memory training" in screen.out
    assert screen.err.splitlines()[-1].startswith("error: the report above is not written: [Errno 30] Read-only")
    assert screen.err.splitlines()[-1].endswith("name another folder with --output_dir")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], ("--data_dir is missing", "--model_name_or_path")),
        (["--data_dir", "nowhere"], ("--model_name_or_path",)),
        (["--data_dir", "nowhere", "--model_name_or_path", "x/y"], ("nowhere/train", "prepare.py")),
        (["--stric", "--data_dir", "x"], ("--stric", "nearest", "strict")),
    ],
)
def test_wrong_use_is_one_line(
    flags: list[str], named: tuple[str, ...], tmp_path: Path, check: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert check(*flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(words in error for words in named)
    assert list(tmp_path.iterdir()) == []


# --- Memory --------------------------------------------------------------------------------------------------------


# Wide enough for its memory to show beside the libraries'.
WIDE_MODEL = TINY_MODEL | {"conv_dim": [256, 256]}


def write_long_clips(data_dir: Path) -> None:
    """Training clips of 2 s each, so that a batch weighs something."""
    shutil.rmtree(data_dir / "train")
    rng = np.random.default_rng(0)
    rows = [(f"long{i}", rng.integers(-9_000, 9_000, 32_000).astype(np.int16), "ABC DE", "ann") for i in range(16)]
    write_part(data_dir / "train" / "part_1", rows)


def limit_mb(check: Callable[..., int], recipe: Path, data_dir: Path, share: float) -> float:
    """A limit that leaves batches this share of what the heaviest needs; measured after all modules are loaded."""
    assert check("--config", recipe) == 0
    facts = read_report(data_dir / "preflight")[1]["memory training"]["facts"]
    return (facts["base_bytes"] + (facts["peak_bytes"] - facts["base_bytes"]) * share) / 1e6


def test_promise_5_a_batch_that_does_not_fit_is_refused_with_one_that_does(
    prepared: Path, tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """The remedy is measured: with it the same limit suffices."""
    write_long_clips(prepared)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=WIDE_MODEL, per_device_train_batch_size=16, vocabulary="train"
    )
    assert check("--config", recipe) == 0
    peak = read_report(prepared / "preflight")[1]["memory training"]["facts"]["peak_bytes"] / 1e6
    assert check("--config", recipe, "--per_device_train_batch_size", 1) == 0
    least = read_report(prepared / "preflight")[1]["memory training"]["facts"]["peak_bytes"] / 1e6
    limit = (peak + least) / 2
    capsys.readouterr()
    assert check("--config", recipe, "--memory_limit_mb", limit) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "memory training: does not fit: heaviest batch 16 x 2.0 s" in error
    seconds = float(error.partition("with --max_batch_seconds ")[2].partition(" ")[0])
    assert 2 <= seconds < 32
    assert check("--config", recipe, "--memory_limit_mb", limit, "--max_batch_seconds", seconds) == 0
    assert check("--config", recipe, "--memory_limit_mb", least / 2) == 2
    assert "one clip of 2.0 s is too much: --gradient_checkpointing, a lower" in capsys.readouterr().err


def test_auto_finds_a_budget_that_fits_and_changes_no_update(
    prepared: Path, tmp_path: Path, run: Callable[..., int], check: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    write_long_clips(prepared)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=WIDE_MODEL, per_device_train_batch_size=16, max_steps=2,
        learning_rate=1e-5,
    )  # fmt: skip
    assert run("--config", recipe, "--output_dir", tmp_path / "plain") == 0
    limit = limit_mb(check, recipe, prepared, share=0.7)
    flags = ("--max_batch_seconds", "auto", "--memory_limit_mb", limit)
    assert run("--config", recipe, "--output_dir", tmp_path / "auto", *flags) == 0
    report, findings = read_report(tmp_path / "auto")
    seconds = report["max_batch_seconds"]
    assert 2 <= seconds < 32
    assert f"--max_batch_seconds {seconds:g} does the same" in findings["batch seconds"]["result"]
    assert findings["memory training"]["verdict"] == "ok", "a margin is left"
    assert findings["ranks"]["facts"]["micro_batches_per_update"] > 1
    assert f"max_batch_seconds: {seconds}" in (tmp_path / "auto" / "config.yaml").read_text()
    plain, auto = (read_log(tmp_path / name / "training_log.csv") for name in ("plain", "auto"))
    for column in ("train_loss", "grad_norm", "eval_loss"):
        np.testing.assert_allclose(plain[column], auto[column], rtol=2e-5)


@pytest.mark.slow
def test_memory_that_really_runs_out_in_an_update_changes_nothing(
    prepared: Path, tmp_path: Path, run: Callable[..., int], check: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """A limit that the preflight refuses, gone on with: each update is done in cuts that fit."""
    write_long_clips(prepared)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=WIDE_MODEL, per_device_train_batch_size=16, max_steps=2,
        learning_rate=1e-5,
    )  # fmt: skip
    assert run("--config", recipe, "--output_dir", tmp_path / "plain") == 0
    limit = limit_mb(check, recipe, prepared, share=0.3)
    capsys.readouterr()
    flags = ("--preflight", "warn", "--memory_limit_mb", limit)
    assert run("--config", recipe, "--output_dir", tmp_path / "short", *flags) == 0
    error = capsys.readouterr().err
    assert "out of memory in an update, with 16 clips of up to 2.0 s (long" in error
    assert f"MB in use, --memory_limit_mb {limit:g}): done again, from now on in cuts of at most 16.0 s" in error
    plain, short = (read_log(tmp_path / name / "training_log.csv") for name in ("plain", "short"))
    # How often depends on the heap; that no update begins with the first cut again does not.
    assert short["oom_retries"].iloc[-1] == error.count("done again") <= 4
    assert error.count("at most 16.0 s") == 1, "the smaller cut is kept"
    for column in ("train_loss", "grad_norm", "eval_loss"):
        np.testing.assert_allclose(plain[column], short[column], rtol=2e-5)


def test_memory_that_runs_out_in_an_evaluation_changes_no_score(
    prepared: Path, tmp_path: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """The English seed's second wall, in the first evaluation."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=2, eval_steps=1)
    assert run("--config", recipe, "--output_dir", tmp_path / "plain") == 0
    original = scoring.score_one

    def score_one(of_run: train.Run, batch: train.Batch) -> tuple:
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.99 GiB")
        return original(of_run, batch)

    monkeypatch.setattr(scoring, "score_one", score_one)
    capsys.readouterr()
    assert run("--config", recipe, "--output_dir", tmp_path / "cut") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory in an evaluation" in line]
    plain, cut = (read_log(tmp_path / name / "training_log.csv") for name in ("plain", "cut"))
    for column in ("eval_wer", "eval_cer", "blank_fraction"):
        assert plain[column].tolist() == cut[column].tolist()
    np.testing.assert_allclose(plain["eval_loss"], cut["eval_loss"], rtol=1e-5)
    assert len(said) == cut["oom_retries"].iloc[-1] > 0
    assert (tmp_path / "plain" / "eval_samples.csv").read_text() == (tmp_path / "cut" / "eval_samples.csv").read_text()


# --- Ranks, disk, verdicts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "seconds"), [(1, None), (2, None), (3, 4.0)])
def test_seconds_of_each_rank_are_those_of_the_plan(num_processes: int, seconds: float | None) -> None:
    rng = np.random.default_rng(0)
    lengths = (rng.uniform(0.5, 3.0, 100) * 16_000).astype(np.int32)
    plan, cut = BatchPlan(np.arange(100), lengths, 12, seed=1), CutSettings(0, num_processes, 2, seconds)
    as_they_are = SimpleNamespace(lengths=lambda rows, num_samples, epoch, copies: num_samples)
    finding = check_ranks(SimpleNamespace(plan=plan, cut=cut, collate=as_they_are))
    expected, micro_steps = np.zeros(num_processes), []
    for _, _, positions in plan.updates(0, plan.updates_per_epoch):
        cuts = cut_update(lengths[positions], num_processes, 2, cut.max_batch_samples)
        micro_steps.append(len(cuts))
        for of_rank in cuts:
            assert len(of_rank) == num_processes
            expected += [lengths[positions[rows]].sum() for rows in of_rank]
    assert finding.facts["seconds_per_rank"] == pytest.approx(expected / 16_000)
    assert finding.facts["micro_batches_per_update"] == pytest.approx(np.mean(micro_steps))
    assert sum(finding.facts["seconds_per_rank"]) == pytest.approx(lengths.sum() / 16_000)
    assert f"{' / '.join(f'{seconds:.1f}' for seconds in expected / 16_000)} s of audio" in finding.result
    assert f"{plan.updates_per_epoch} updates" in finding.result


@pytest.mark.parametrize(
    ("device", "precision", "has_instructions", "remedy"),
    [
        ("cpu", "bf16", False, "launch with --mixed_precision no"),
        ("cuda", "bf16", False, "launch with --mixed_precision fp16"),
        ("cpu", "bf16", True, None),
        ("cuda", "bf16", True, None),
        ("cpu", "no", False, None),
    ],
)
def test_emulated_bf16_is_a_warning(
    device: str, precision: str, has_instructions: bool, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    found = [(one.verdict, one.remedy) for one in check_precision(precision, torch.device(device))]
    assert found == ([("warning", remedy)] if remedy else [])


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=5_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    wanted = tmp_path / "runs" / "new"
    assert check_disk(wanted, 5_000_000_000).result == "5.00 GB needed, 5.0 GB free"
    finding = check_disk(wanted, 6_100_000_000)
    assert (finding.verdict, finding.remedy[:26]) == ("refused", "lower --save_total_limit o")
    assert "6.10 GB needed, 5.0 GB free" in finding.result
    assert set(asked) == {tmp_path}, "the folder is not made to look at its disk"
    assert not wanted.exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    wanted = tmp_path / "file" / "runs" / "new"
    finding = check_disk(wanted, 0)
    assert (finding.verdict, finding.result) == ("refused", f"{tmp_path / 'file'} is a file")
    assert finding.remedy == f"choose another --output_dir than {wanted}"
    # Root writes into folders of mode 0555 (trap 36), so the answer is put into the system's mouth.
    monkeypatch.setattr(os, "access", lambda folder, mode: (folder, mode) != (tmp_path, os.W_OK))
    finding = check_disk(tmp_path / "runs" / "new", 0)
    assert (finding.verdict, finding.result) == ("refused", f"{tmp_path} cannot be written to")


def test_a_full_disk_is_refused_by_both_commands_alike(
    prepared: Path, tmp_path: Path, check: Callable[..., int], run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=1)
    assert check("--config", recipe) == 0
    assert "GB needed where the run will lie" in read_report(prepared / "preflight")[1]["disk"]["result"]
    flags = ("--config", recipe, "--output_dir", tmp_path / "run")
    assert run(*flags) == 0
    facts = read_report(tmp_path / "run")[1]["disk"]["facts"]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*/tensors.safetensors")
    model = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    # Three checkpoints, one of them being written, and two models, likewise.
    assert facts["needed_bytes"] == pytest.approx(3 * saved.stat().st_size + 2 * model, rel=0.1)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=facts["needed_bytes"] - 1))
    errors = []
    for command in (check, run):
        capsys.readouterr()
        assert command(*flags) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]
    assert errors[0].startswith("error: preflight refuses: disk: ")
    assert "GB free: lower --save_total_limit or choose another --output_dir" in errors[0]


def test_a_relative_folder_is_looked_up_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_disk(Path("runs/new"), 0).result.startswith("0.00 GB needed, ")


FINE = Finding("a", "fine")
ODD = Finding("b", "odd", "warning", "look at it")
BAD = Finding("c", "bad", "refused", "mend it")
NOTHING = Finding("training clips", "none", "refused", "lower it")


@pytest.mark.parametrize(
    ("findings", "is_strict", "message"),
    [
        ([FINE], True, None),
        ([FINE, ODD], False, None),
        ([FINE, ODD], True, "preflight refuses: b: odd: look at it"),
        ([ODD, BAD], False, "preflight refuses: c: bad: mend it"),
        ([ODD, BAD], True, "preflight refuses: b: odd: look at it; c: bad: mend it"),
        ([ODD, BAD, NOTHING], False, "preflight refuses: c: bad: mend it; training clips: none: lower it"),
    ],
)
def test_what_a_report_refuses(findings: list[Finding], is_strict: bool, message: str | None) -> None:
    report = Report(tuple(findings), (), None)
    if message is None:
        report.refuse(is_strict)
    else:
        with pytest.raises(UsageError) as refused:
            report.refuse(is_strict)
        assert str(refused.value) == message


def test_what_warn_cannot_go_on_from() -> None:
    Report((ODD, BAD), (), None).refuse(is_strict=False, goes_on=True)
    with pytest.raises(UsageError, match=r"^preflight refuses: training clips: none: lower it$"):
        Report((ODD, BAD, NOTHING), (), None).refuse(is_strict=False, goes_on=True)


def test_a_verdict_needs_a_remedy() -> None:
    with pytest.raises(AssertionError, match="without a remedy"):
        Finding("a", "bad", "refused")


def test_user_settings_of_the_allocator_stay() -> None:
    script = "import allocator, os; print(sorted(k for k in os.environ if 'ALLOC_CONF' in k), allocator.describe())"
    plain = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    for own, expected in (
        ({}, "['PYTORCH_ALLOC_CONF'] PYTORCH_ALLOC_CONF=expandable_segments:True"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            "['PYTORCH_CUDA_ALLOC_CONF'] PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=plain | own, check=True,
            cwd=Path(preflight.__file__).parent,
        )  # fmt: skip
        assert done.stdout.strip() == expected


# What a process sees that imports a command, at the moment when torch is first asked for.
WATCH_FOR_TORCH = """
import importlib.abc, os, runpy, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("torch with", os.environ.get("PYTORCH_ALLOC_CONF"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
runpy.run_path(sys.argv[1], run_name="imported")
"""


@pytest.mark.parametrize("command", ["train.py", "preflight.py"])
def test_the_allocator_is_set_before_torch_is_imported(command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", WATCH_FOR_TORCH, command], capture_output=True, text=True, env=environment, check=True,
        cwd=Path(preflight.__file__).parent,
    )  # fmt: skip
    assert done.stdout == "torch with expandable_segments:True\n"
