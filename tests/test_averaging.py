"""The two means of weights against what they are by definition, and what a run makes of them."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TALKATIVE, TINY_MODEL, training, write_recipe
from safetensors.torch import load_file

import averaging
import best_model
import checkpoint
import preflight
import roundtrip
import runlog
import train
from averaging import MovingAverage, mean_of, rank_evaluation, remove_unused, weights_file, write_weights
from best_model import is_better
from clock import PHASE_COLUMNS
from errors import RunFailed, UsageError
from metrics import ErrorCounts
from runlog import read_log
from scoring import Evaluation
from training_run import RUN_FILES

MASKS = {"mask_time_prob": 0.4, "mask_time_length": 2, "mask_feature_prob": 0.3, "mask_feature_length": 4}


def with_wer(evaluation: Evaluation, percent: int) -> Evaluation:
    """The same evaluation with another WER."""
    words = ErrorCounts(substitutions=percent, hits=100 - percent)
    return dataclasses.replace(evaluation, score=dataclasses.replace(evaluation.score, words=words))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each of the many evaluations."""
    monkeypatch.setattr(runlog, "draw_training_curve", lambda *_: None)


@pytest.fixture
def command() -> Iterator[Callable[..., int]]:
    with training() as run:
        yield run


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.frozen = torch.nn.Parameter(torch.tensor([5.0]), requires_grad=False)


# --- The moving average --------------------------------------------------------------------------------------------


def test_moving_average_is_its_formula() -> None:
    """In float64 from the recorded weights; an update that was left out changes neither average nor its warm-up."""
    model, rng = Linear(), np.random.default_rng(1)
    average = MovingAverage(model, decay=0.5)
    expected, seen = np.array([1.0, 2.0]), 0
    for step in range(40):
        has_stepped = step % 7 != 3
        weights = rng.normal(size=2).astype(np.float32)
        model.trained.data = torch.from_numpy(weights)
        average.update(torch.tensor(has_stepped))
        if has_stepped:
            decay = min(0.5, (1 + seen) / (10 + seen))
            expected, seen = decay * expected + (1 - decay) * weights, seen + 1
        np.testing.assert_allclose(average.tensors["trained"], expected, rtol=1e-5, atol=1e-6)
    assert average.num_updates == seen == 34
    assert set(average.tensors) == {"trained"}, "what is frozen is its own average"


def test_averaged_weights_in_place_and_back_bit_for_bit() -> None:
    model = Linear()
    average = MovingAverage(model, 0.9)
    model.trained.data = torch.tensor([0.1, 1e-30])
    average.update(torch.tensor(True))
    own, averaged = model.trained.detach().clone(), average.tensors["trained"].clone()
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(model.trained, averaged)
        raise KeyError  # as an evaluation that is asked to stop
    assert torch.equal(model.trained, own)
    assert torch.equal(average.tensors["trained"], averaged)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_moving_average_of_a_run_is_that_of_its_weights(
    decay: float, prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed from the weights behind each update, of which the third was left out for a NaN."""
    recorded, original, forward = [], train.train_step, train.Run.forward

    def train_step(run: train.Run, update: train.Update) -> tuple:
        if not recorded:
            recorded.append(weights_in(run))
        result = original(run, update)
        recorded.append(weights_in(run))
        return result

    def weights_in(run: train.Run) -> dict[str, np.ndarray]:
        return {name: value.detach().double().numpy().copy() for name, value in run.model.named_parameters()}

    def spoiled(run: train.Run, batch: train.Batch) -> tuple:
        outputs = forward(run, batch)
        is_due = run.model.training and run.state.step == 2
        return (*outputs[:2], outputs[2] * float("nan")) if is_due else outputs

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train.Run, "forward", spoiled)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=6, do_predict=False, learning_rate=1e-2)
    assert command("--config", recipe, "--output_dir", tmp_path / "run", "--ema_decay", decay) == 0
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_000006" / "tensors.safetensors")
    assert saved["ema.num_updates"] == 5
    for name, first in recorded[0].items():
        expected, seen = first, 0
        for step, weights in enumerate(recorded[1:]):
            if step == 2:
                np.testing.assert_array_equal(weights[name], recorded[step][name])
                continue
            now = min(decay, (1 + seen) / (10 + seen))
            expected, seen = now * expected + (1 - now) * weights[name], seen + 1
        np.testing.assert_allclose(saved[f"ema/{name}"], expected, rtol=1e-5, atol=1e-6, err_msg=name)


# --- The mean of the best ------------------------------------------------------------------------------------------


def test_the_best_evaluations_and_their_order() -> None:
    ranked: list[list[float]] = []
    for step, value in enumerate((0.5, 0.4, 0.4, 0.6, 0.3), 1):
        ranked = rank_evaluation(ranked, step, value, keep=3)
    assert ranked == [[5, 0.3], [2, 0.4], [3, 0.4]], "of equal ones the earlier is the better"


@pytest.mark.parametrize("count", [2, 3, 7])
def test_mean_is_that_of_numpy_and_equal_weights_stay_equal(count: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(count)
    same = torch.from_numpy(rng.normal(size=100).astype(np.float32))
    files = [{"a": torch.from_numpy(rng.normal(size=(3, 4)).astype(np.float32)), "b": same} for _ in range(count)]
    for step, tensors in enumerate(files):
        write_weights(tmp_path, step, tensors)
    mean = mean_of(tmp_path, range(count))
    expected = np.mean([tensors["a"].numpy().astype(np.float64) for tensors in files], axis=0)
    np.testing.assert_array_equal(mean["a"].numpy(), expected.astype(np.float32))
    assert mean["a"].dtype == torch.float32
    assert torch.equal(mean["b"], same)


def test_what_a_checkpoint_counts_on_is_kept(tmp_path: Path) -> None:
    """Weights that a later evaluation has pushed out stay while a resume may need them, and no longer."""
    for step in (1, 2, 3, 4):
        write_weights(tmp_path, step, {"a": torch.zeros(1)})
    state = {"run": {"best_evaluations": [[1, 0.4], [2, 0.5]]}}
    saved = checkpoint.save_checkpoint(tmp_path, 2, {"a": torch.zeros(1)}, state)
    remove_unused(tmp_path, [1, 4])
    assert {path.name for path in weights_file(tmp_path, 1).parent.iterdir()} == {
        f"step_00000{step}.safetensors" for step in (1, 2, 4)
    }
    checkpoint.remove_checkpoint(saved)
    remove_unused(tmp_path, [1, 4])
    assert not weights_file(tmp_path, 2).exists()


def test_weights_that_are_gone_or_damaged_are_named(tmp_path: Path) -> None:
    write_weights(tmp_path, 1, {"a": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"step_000002\.safetensors, which --average_best counts on, is gone"):
        averaging.check_present(tmp_path, [1, 2])
    weights_file(tmp_path, 2).write_bytes(b"half")
    with pytest.raises(RunFailed, match="cannot be averaged"):
        mean_of(tmp_path, [1, 2])


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(averaging, "save_file", fail)
    with pytest.raises(RunFailed, match=r"disk full at .*step_000001"):
        write_weights(tmp_path, 1, {"a": torch.zeros(1)})
    assert list(weights_file(tmp_path, 1).parent.iterdir()) == []


def test_lower_is_better_and_a_number_better_than_none() -> None:
    assert is_better(0.5, None)
    assert is_better(0.5, 0.6)
    assert not is_better(0.5, 0.5)
    assert is_better(0.5, math.nan)
    assert not is_better(math.nan, 0.5)


# --- In a run ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scored:
    """What a run with invented WERs left behind."""

    folder: Path
    results: dict
    seen: dict[tuple[str, int], dict[str, torch.Tensor]]
    """The weights of each evaluation, by its description and step."""
    tested: list[dict[str, torch.Tensor]]


@pytest.fixture
def score_as(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Scored]:
    """A run whose evaluations have these WERs (percent), by their description, in turn."""

    def run(wers: dict[str, list[int]], *flags: object, name: str = "run", **settings: object) -> Scored:
        original, scores = train.evaluate, {description: iter(values) for description, values in wers.items()}
        seen, tested = {}, []

        def evaluate(run: train.Run, dataset: object, rows: np.ndarray, description: str) -> Evaluation:
            evaluation = original(run, dataset, rows, description)
            weights = {key: value.clone() for key, value in run.model.hf.state_dict().items()}
            if description not in scores:
                tested.append(weights)
                return evaluation
            seen[description, run.state.step] = weights
            return with_wer(evaluation, next(scores[description]))

        steps = max(map(len, wers.values()))
        base = {"max_steps": steps, "eval_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
        recipe = write_recipe(tmp_path / "recipe.yaml", prepared, **base | settings)
        with monkeypatch.context() as patch:
            patch.setattr(train, "evaluate", evaluate)
            assert command("--config", recipe, "--output_dir", tmp_path / name, *flags) == 0
        results = json.loads((tmp_path / name / "train_results.json").read_text())
        return Scored(tmp_path / name, results, seen, tested)

    return run


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


WERS = [70, 40, 60, 50, 90, 45]  # the best three: steps 2, 6 and 4
AVERAGE, BOTH = "average of the best", ("evaluating", "evaluating the moving average")


@pytest.mark.parametrize(("wer", "kept"), [(39, "average"), (40, "best"), (41, "best")])
def test_average_is_kept_for_the_final_model_only_if_dev_improves(
    wer: int, kept: str, score_as: Callable[..., Scored], capsys: pytest.CaptureFixture
) -> None:
    """It is the mean of the weights that were scored best; both figures are written; the test set hears the winner."""
    run = score_as({"evaluating": WERS, AVERAGE: [wer]}, "--average_best", 3)
    mean = {
        name: torch.stack([run.seen["evaluating", step][name] for step in (2, 4, 6)]).double().mean(dim=0).float()
        for name in run.seen["evaluating", 1]
    }
    for name, value in run.seen[AVERAGE, 6].items():
        torch.testing.assert_close(value, mean[name], rtol=1e-6, atol=1e-8)
    results = run.results
    assert (results["kept"], results["average_of_steps"]) == (kept, [2, 4, 6])
    assert (results["best_step"], results["best_eval_wer"], results["average_eval_wer"]) == (2, 0.4, wer / 100)
    final = load_file(run.folder / "model" / "model.safetensors")
    winner = run.seen[AVERAGE, 6] if kept == "average" else run.seen["evaluating", 2]
    assert equal(final, winner)
    assert equal(run.tested[-1], winner)
    assert not equal(run.seen[AVERAGE, 6], run.seen["evaluating", 2])
    files = {path.name for path in (run.folder / "average").iterdir() if path.is_file()}
    assert {f"step_00000{step}.safetensors" for step in (2, 4, 6)} <= files
    screen, card = capsys.readouterr().out, (run.folder / "model" / "README.md").read_text()
    becomes = "it becomes model/" if kept == "average" else "model/ stays as it is"
    assert f"average of steps 2, 4, 6: eval_wer {wer / 100:.4g}, against 0.4 of step 2 alone: {becomes}" in screen
    assert ("the mean of those at updates 2, 4, 6 of 6" in card) == (kept == "average")
    assert f"| dev WER | {min(wer, 40):.2f} %" in card
    if kept == "average":
        assert equal(load_file(run.folder / "average" / "best_single" / "model.safetensors"), run.seen["evaluating", 2])


def test_the_moving_average_is_model_where_it_is_the_better_one(score_as: Callable[..., Scored]) -> None:
    """Scored at the same evaluations, in columns of its own; the same weights count for the mean of the best."""
    averaged = [75, 55, 30, 65, 80, 60]
    run = score_as(
        dict(zip(BOTH, (WERS, averaged), strict=True)) | {AVERAGE: [90]}, "--ema_decay", 0.9, "--average_best", 2
    )
    assert (run.results["best_step"], run.results["best_weights"], run.results["best_eval_wer"]) == (3, "ema", 0.3)
    final = load_file(run.folder / "model" / "model.safetensors")
    assert equal(final, run.seen[BOTH[1], 3])
    assert not equal(final, run.seen[BOTH[0], 3])
    log = read_log(run.folder / "training_log.csv")
    assert log["eval_wer"].tolist() == [wer / 100 for wer in WERS]
    assert log["ema_eval_wer"].tolist() == [wer / 100 for wer in averaged]
    assert log[["ema_eval_loss", "ema_eval_cer"]].notna().all(axis=None)
    assert run.results["average_of_steps"] == [2, 3]
    assert equal(load_file(weights_file(run.folder, 3)), final)
    assert equal(load_file(weights_file(run.folder, 2)), run.seen[BOTH[0], 2])
    assert (
        "an exponential moving average (decay 0.9) of those up to update 3"
        in (run.folder / "model" / "README.md").read_text()
    )


def test_scoring_the_moving_average_changes_no_update(score_as: Callable[..., Scored]) -> None:
    plain = score_as({"evaluating": WERS}, name="plain")
    with_average = score_as(dict(zip(BOTH, (WERS, WERS), strict=True)), "--ema_decay", 0.9, name="ema")
    for step in range(1, 7):
        assert equal(with_average.seen[BOTH[0], step], plain.seen[BOTH[0], step])


@pytest.mark.parametrize("metric", ["eval_loss", "eval_cer", "eval_raw_wer", "eval_sentence_error_rate"])
def test_the_metric_that_is_named_decides(
    metric: str, prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its values fall until step 3 and rise again, while the WER is best at step 1."""
    original, values = best_model.figures_of, iter([0.5, 0.4, 0.3, 0.6])
    invented = lambda run, one: original(run, one) | {  # noqa: E731
        "eval_wer": run.state.step / 10, metric: next(values)
    }  # fmt: skip
    monkeypatch.setattr("run.figures_of", invented)
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=4, eval_steps=1, do_predict=False)
    flags = ("--metric_for_best_model", metric, "--early_stopping_patience", 1)
    assert command("--config", recipe, "--output_dir", tmp_path / "run", *flags) == 0
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert (results["best_step"], results[f"best_{metric}"], results["best_eval_wer"]) == (3, 0.3, 0.3)
    assert results["metric_for_best_model"] == metric
    assert json.loads((tmp_path / "run" / "model" / "best.json").read_text())["best_metric"] == 0.3


def test_an_average_is_opened_in_a_clean_process_before_it_becomes_model(
    score_as: Callable[..., Scored], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The clean process opens it as well, though it has opened the model of an evaluation before."""
    opened, names, original = [], [], roundtrip.check_in_clean_process

    def check(folder: Path, probe: Path) -> list[roundtrip.Failure]:
        opened.append(load_file(folder / "model.safetensors"))
        names.append(folder.name)
        return original(folder, probe)

    monkeypatch.setattr(roundtrip, "check_in_clean_process", check)
    run = score_as({"evaluating": WERS, AVERAGE: [1]}, "--average_best", 2)
    assert equal(opened[-1], run.seen[AVERAGE, 6])
    assert names == ["model.new", "model.new"], "the first model of the run, and the one that it ends with"


# --- Resuming ------------------------------------------------------------------------------------------------------


SELECTION = (
    "--ema_decay", 0.8, "--average_best", 2, "--early_stopping_patience", 3, "--metric_for_best_model", "eval_loss",
)  # fmt: skip


def repeatable(folder: Path) -> list[dict[str, object]]:
    log = read_log(folder / "training_log.csv")
    measured = ["samples_per_second", "audio_seconds_per_second", "eval_runtime", "peak_memory_mb", "elapsed_seconds"]
    return json.loads(log.drop(columns=[*measured, *PHASE_COLUMNS]).to_json(orient="records", double_precision=15))


def contents(folder: Path) -> dict[str, str]:
    names = ("model/model.safetensors", "model/best.json", "eval_samples.csv", "eval_slices.csv")
    files = [folder / name for name in names] + sorted((folder / "average").glob("step_*"))
    files.append(checkpoint.list_checkpoints(folder)[-1] / "tensors.safetensors")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same_end(found: Path, expected: Path) -> None:
    assert repeatable(found) == repeatable(expected)
    assert contents(found) == contents(expected)
    results = [json.loads((folder / "train_results.json").read_text()) for folder in (found, expected)]
    for name in ("kept", "average_of_steps", "average_eval_loss", "best_step", "best_weights", "best_eval_loss"):
        assert results[0][name] == results[1][name], name
    assert results[0].get("stopped_early_at_step") == results[1].get("stopped_early_at_step")


def test_promise_3_resume_with_averages_and_patience_is_invisible(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before an update, in both evaluations, and while the mean of the best is scored."""
    model_config = TINY_MODEL | TALKATIVE | MASKS | {"hidden_dropout": 0.2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=model_config, max_steps=9, logging_steps=2, eval_steps=2,
        save_steps=3, learning_rate=5e-3,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("--config", recipe, "--output_dir", whole, *SELECTION) == 0
    originals = {"train_step": train.train_step, "evaluate": train.evaluate}
    flags = ["--config", recipe, "--output_dir", parts, *SELECTION]
    stops = (("train_step", 4, None), ("evaluate", 6, BOTH[1]), ("evaluate", 8, BOTH[0]), ("evaluate", 9, AVERAGE))
    for name, step, description in stops:

        def fail(run: train.Run, *arguments: object, at=(name, step, description)) -> object:
            if run.state.step == at[1] and (at[2] is None or arguments[-1] == at[2]):
                raise RuntimeError("the failure that the test asks for")
            return originals[at[0]](run, *arguments)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the test asks for"):
            patch.setattr(train, name, fail)
            command(*flags)
        flags = ["--config", recipe, "--output_dir", parts, *SELECTION, "--resume_from_checkpoint", "last"]
    assert command(*flags) == 0
    assert "stopped_early_at_step" not in json.loads((whole / "train_results.json").read_text())
    assert_same_end(parts, whole)


@pytest.mark.parametrize("where", ["taking its place", "behind it"])
def test_a_resume_behind_an_average_that_was_kept_decides_again(
    where: str, score_as: Callable[..., Scored], command: Callable[..., int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed between the two renames, or when the run was finished: the best single model is back, and the end same."""
    wers = {"evaluating": WERS, AVERAGE: [30]}
    whole = score_as(wers, "--average_best", 2)
    shutil.copytree(whole.folder, tmp_path / "again")
    if where == "taking its place":
        shutil.rmtree(tmp_path / "again" / "model")
    flags = ("--average_best", 2, "--resume_from_checkpoint", "step_000004")
    again = score_as({"evaluating": WERS[4:], AVERAGE: [41]}, *flags, name="again", max_steps=6)
    assert again.results["kept"] == "best"
    final = load_file(again.folder / "model" / "model.safetensors")
    assert equal(final, whole.seen["evaluating", 2]), "no evaluation of the resumed run wrote it"
    assert again.results["average_of_steps"] == whole.results["average_of_steps"] == [2, 6]


def test_weights_that_a_resume_needs_and_that_are_gone_are_refused(
    score_as: Callable[..., Scored], command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    run = score_as({"evaluating": WERS, AVERAGE: [90]}, "--average_best", 2)
    weights_file(run.folder, 2).unlink()
    flags = ("--config", run.folder / "config.yaml", "--resume_from_checkpoint", "step_000004")
    assert command(*flags) == 2
    assert "step_000002.safetensors, which --average_best counts on, is gone" in capsys.readouterr().err


# --- Room on the disk ----------------------------------------------------------------------------------------------


def test_the_disk_check_counts_averages(
    prepared: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run that gets better and better holds at any time stays below what was asked for at the start."""
    needed, largest, original, write = [], [0], preflight.disk_bytes, averaging.write_weights
    monkeypatch.setattr(preflight, "disk_bytes", lambda run: needed.append(original(run)) or needed[-1])

    def write_weights_and_look(run_dir: Path, *arguments: object) -> None:
        write(run_dir, *arguments)
        largest[0] = max(largest[0], sum(path.stat().st_size for path in run_dir.rglob("*.safetensors")))

    monkeypatch.setattr(averaging, "write_weights", write_weights_and_look)
    values = iter(range(100, 0, -1))
    figures = best_model.figures_of
    monkeypatch.setattr("run.figures_of", lambda run, one: figures(run, one) | {"eval_wer": next(values) / 100})
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=9, eval_steps=1, save_steps=3, do_predict=False)
    assert command("--config", recipe, "--output_dir", tmp_path / "plain") == 0
    plain = needed[-1]
    assert command("--config", recipe, "--output_dir", tmp_path / "run", "--average_best", 3, "--ema_decay", 0.9) == 0
    model = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert plain < needed[-1]
    assert 0.5 * needed[-1] < largest[0] < needed[-1] + model / 10  # headers of the files


def test_files_of_a_run_are_its_own() -> None:
    """A run that was killed before its first checkpoint begins again over what it left."""
    assert averaging.AVERAGE_FOLDER in RUN_FILES
