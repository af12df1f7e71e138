"""Patience against a count by hand, and the runs that it must not stop: in the warm-up, and on a normal plateau."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import training, write_recipe
from test_averaging import with_wer

import diagnosis
import runlog
import train
from checkpoint import list_checkpoints, load_state
from early_stopping import Patience
from runlog import read_log
from scoring import Evaluation


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each of the many evaluations."""
    monkeypatch.setattr(runlog, "draw_training_curve", lambda *_: None)


def counts(
    values: Sequence[float],
    threshold: float = 0.0,
    losses: Sequence[float] | None = None,
    hopeless: Sequence[bool] | None = None,
    excused: Sequence[bool] | None = None,
) -> list[int]:
    """The count behind each evaluation."""
    patience, found = Patience(), []
    for place, value in enumerate(values):
        patience.judge(
            10 * (place + 1),
            value,
            threshold,
            losses[place] if losses else 1.0,
            hopeless[place] if hopeless else False,
            excused[place] if excused else False,
        )
        found.append(patience.count)
    return found


@pytest.mark.parametrize(
    ("values", "threshold", "expected"),
    [
        ([0.5, 0.4, 0.3], 0.0, [0, 0, 0]),
        ([0.5, 0.5, 0.5, 0.4], 0.0, [0, 1, 2, 0]),  # as good is no gain
        ([0.5, 0.6, 0.55, 0.5], 0.0, [0, 1, 2, 3]),  # better than the last, not than the best
        ([0.5, 0.46, 0.42, 0.38], 0.1, [0, 1, 2, 0]),  # slow progress adds up
        ([0.5, 0.375, 0.25], 0.125, [0, 1, 0]),  # more than the threshold, not as much
        ([math.nan, math.nan, 0.5, math.inf], 0.0, [1, 2, 0, 1]),
    ],
)
def test_evaluations_without_a_gain_are_counted(values: list[float], threshold: float, expected: list[int]) -> None:
    assert counts(values, threshold) == expected


def test_what_is_excused_is_not_counted_and_a_gain_in_it_is_remembered() -> None:
    assert counts([0.4, 0.5, 0.5, 0.5], excused=[True, True, False, False]) == [0, 0, 1, 2]


def test_a_loss_that_falls_at_wer_1_is_learning_and_at_a_lower_wer_it_is_not_asked() -> None:
    """By 1 % and more; a loss that wavers around a level does not fall."""
    falling, flat = [3.0, 2.9, 2.8, 2.7], [3.0, 2.99, 3.01, 2.98]
    assert counts([1.0] * 4, losses=falling, hopeless=[True] * 4) == [0, 0, 0, 0]
    assert counts([1.0] * 4, losses=flat, hopeless=[True] * 4) == [0, 1, 2, 3]
    assert counts([0.5] * 4, losses=falling) == [0, 1, 2, 3]


def test_states_that_excuse_are_those_that_diagnosis_calls_normal() -> None:
    """A new state that is no warning has to be judged here."""
    source = Path(diagnosis.__file__).read_text()
    states = re.findall(r'Diagnosis\(\s*"([^"]+)",\s*(True|False)', source)
    assert {name for name, is_warning in states if is_warning == "False"} == set(diagnosis.NORMAL_STATES)
    assert set(diagnosis.NORMAL_STATES).isdisjoint(name for name, is_warning in states if is_warning == "True")


# --- In a run ------------------------------------------------------------------------------------------------------


def run_with(
    monkeypatch: pytest.MonkeyPatch, prepared: Path, folder: Path, wers: Sequence[int], *flags: object,
    state: str | None = None,
) -> tuple[dict, list[int]]:  # fmt: skip
    """A run whose dev evaluations have these WERs (percent), in turn; its results, and the steps of its log."""
    original = train.evaluate
    scores = iter(wers)

    def evaluate(run: train.Run, dataset: object, rows: np.ndarray, description: str) -> Evaluation:
        evaluation = original(run, dataset, rows, description)
        return with_wer(evaluation, next(scores)) if description == "evaluating" else evaluation

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(diagnosis, "remark", lambda *_: (state, []))
    recipe = write_recipe(
        folder / "recipe.yaml", prepared, max_steps=len(wers), eval_steps=1, save_steps=2, do_predict=False
    )
    with training() as command:
        assert command("--config", recipe, "--output_dir", folder / "run", *flags) == 0
    results = json.loads((folder / "run" / "train_results.json").read_text())
    return results, read_log(folder / "run" / "training_log.csv")["step"].tolist()


def test_patience_counts_exact_evaluations(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run ends as any other: a checkpoint of its last step, results, a card, and no way to resume it."""
    wers = [80, 60, 70, 60, 65, 50, 40]
    results, steps = run_with(monkeypatch, prepared, tmp_path, wers, "--early_stopping_patience", 3)
    assert steps == [1, 2, 3, 4, 5]
    assert (results["stopped_early_at_step"], results["best_step"]) == (5, 2)
    assert results["stopped_early_because"] == (
        "3 evaluations in a row, the last with eval_wer 0.65, have not come below 0.6, that of step 2"
    )
    run_dir = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_000004", "step_000005"]
    card = (run_dir / "model" / "README.md").read_text()
    assert "the run stopped early at update 5" in card
    assert "updates: 5 of 8 utterances, 2.5 epochs, of 7 that were planned" in card


def test_a_run_that_stopped_early_is_finished(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_with(monkeypatch, prepared, tmp_path, [60, 70, 70, 50], "--early_stopping_patience", 2)
    flags = ("--config", tmp_path / "run" / "config.yaml", "--resume_from_checkpoint")
    with training() as command:
        assert command(*flags, "last") == 2
        assert "is finished (step 3 of 4, stopped early)" in capsys.readouterr().err
        assert command(*flags, "auto") == 0
        assert "finished already" in capsys.readouterr().out
        # Another patience is another run, which one may want: it goes on where this one stopped.
        assert command(*flags, "last", "--early_stopping_patience", 3) == 2
        assert "early_stopping_patience (was 2, is 3)" in capsys.readouterr().err
        monkeypatch.undo()
        assert command(*flags, "last", "--early_stopping_patience", 3, "--resume_anyway") == 0
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert "stopped_early_at_step" not in results, "step 4 was the last"
    assert load_state(list_checkpoints(tmp_path / "run")[-1])["run"]["step"] == 4


@pytest.mark.parametrize(
    ("flags", "state", "stops_at"),
    [
        ((), None, 3),
        (("--warmup_steps", 3), None, 5),  # steps 1 to 3 are in the warm-up
        (("--freeze_encoder_steps", 3), None, 5),  # the output layer alone has learned until then
        ((), "plateau", None),
        ((), "before the plateau", None),
        ((), "leaving the plateau", None),
        ((), "divergence", 3),
    ],
)
def test_no_stop_in_the_warm_up_or_on_a_normal_plateau(
    flags: tuple[object, ...], state: str | None, stops_at: int | None, prepared: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """WER 1.0 throughout; the learning rate is too small for the loss to fall by a hundredth."""
    flags = ("--early_stopping_patience", 2, "--learning_rate", 1e-9, *flags)
    results, _ = run_with(monkeypatch, prepared, tmp_path, [100] * 6, *flags, state=state)
    assert results.get("stopped_early_at_step") == stops_at


def test_patience_survives_a_resume(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed inside the count of four, behind the checkpoint of step 4: the count goes on from there."""
    wers = [60, 50, 70, 70, 70, 70, 70, 70]
    original = train.train_step

    def train_step(run: train.Run, update: train.Update) -> tuple:
        if run.state.step == 5:
            raise RuntimeError("the failure that the test asks for")
        return original(run, update)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the test asks for"):
        patch.setattr(train, "train_step", train_step)
        run_with(patch, prepared, tmp_path, wers, "--early_stopping_patience", 4)
    monkeypatch.setattr(train, "train_step", original)
    flags = ("--early_stopping_patience", 4, "--resume_from_checkpoint", "last")
    results, steps = run_with(monkeypatch, prepared, tmp_path, [70] * 8, *flags)
    assert results["stopped_early_at_step"] == 6
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_killed_behind_its_early_stop_makes_no_further_update(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wers = [60, 70, 70, 50]
    before, _ = run_with(monkeypatch, prepared, tmp_path, wers, "--early_stopping_patience", 2)
    (tmp_path / "run" / "train_results.json").unlink()
    flags = ("--early_stopping_patience", 2, "--resume_from_checkpoint", "last")
    after, steps = run_with(monkeypatch, prepared, tmp_path, wers, *flags)
    assert steps == [1, 2, 3]
    names = ("stopped_early_at_step", "stopped_early_because", "best_step", "train_loss")
    assert [after[name] for name in names] == [before[name] for name in names]
    assert after["stopped_early_at_step"] == 3


def test_a_stop_is_on_the_screen(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_with(monkeypatch, prepared, tmp_path, [60, *[70] * 9], "--early_stopping_patience", 3)
    screen = capsys.readouterr().out
    assert "levers      early_stopping_patience 3\n" in screen
    assert screen.count("stopping early at step 4 of 10: 3 evaluations in a row") == 1
    assert "stopped early, 6 updates before the end" in screen
