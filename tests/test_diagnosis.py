"""States of runs that are in trouble, each made by a real small training run; the deaf loss against torch's CTC."""

import contextlib
import io
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_GROUP_NORM_MODEL, TINY_MODEL, forget_processes, make_rows, write_part, write_recipe

import pretrained
import train
from diagnosis import Facts, deaf_loss, diagnose, remark, token_collapse
from errors import exit_status
from runlog import read_log
from schedule import Schedule

WARNINGS = {
    "stuck", "too slow", "too short", "divergence", "unknown tokens", "unnormalised audio", "memorising", "no words",
}  # fmt: skip

# --- The deaf loss -------------------------------------------------------------------------------------------------


def constant_loss(labels: list[np.ndarray], frames: list[int], log_p_V: torch.Tensor, blank_id: int) -> torch.Tensor:
    """F.ctc_loss per label of an output that is the same in every frame."""
    log_probs_TBV = log_p_V.expand(max(frames), len(labels), len(log_p_V))
    flat = torch.from_numpy(np.concatenate(labels))
    lengths = torch.tensor([len(row) for row in labels])
    return F.ctc_loss(log_probs_TBV, flat, torch.tensor(frames), lengths, blank_id, reduction="sum") / len(flat)


def optimised_loss(labels: list[np.ndarray], frames: list[int], size: int, blank_id: int) -> float:
    """The same, minimised over the distribution by gradient descent, from where most frames are blank."""
    logits_V = torch.zeros(size, dtype=torch.float64)
    logits_V[blank_id] = 3.0
    logits_V.requires_grad_()
    optimizer = torch.optim.LBFGS([logits_V], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = constant_loss(labels, frames, logits_V.log_softmax(0), blank_id)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


def draw_labels(count: int, size: int, lengths: tuple[int, int], blank_id: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    others = np.delete(np.arange(size), blank_id)
    probabilities = rng.dirichlet(np.ones(len(others)))
    return [rng.choice(others, rng.integers(*lengths), p=probabilities) for _ in range(count)]


@pytest.mark.parametrize(
    ("size", "lengths", "frames_per_label", "blank_id"),
    [(6, (2, 7), 4, 0), (32, (3, 20), 10, 0), (12, (10, 40), 2, 5), (5, (1, 4), 100, 4), (12, (5, 9), 1, 0)],
)
def test_deaf_loss_is_the_least_ctc_loss_of_a_constant_output(
    size: int, lengths: tuple[int, int], frames_per_label: int, blank_id: int
) -> None:
    labels = draw_labels(12, size, lengths, blank_id, seed=size)
    frames = [len(row) * frames_per_label + int(np.count_nonzero(row[1:] == row[:-1])) for row in labels]
    expected = optimised_loss(labels, frames, size, blank_id)
    found = deaf_loss(labels, np.array(frames), size, blank_id)
    assert found == pytest.approx(expected, rel=0.002)


def test_deaf_loss_equals_the_best_of_a_grid() -> None:
    labels, frames = [np.array([1, 1, 1]), np.array([1]), np.array([], np.int64)], [9, 6, 3]
    shares = np.linspace(0.005, 0.995, 199)
    grid = [constant_loss(labels, frames, torch.tensor([1 - p, p]).log(), 0).item() for p in shares]
    assert deaf_loss(labels, np.array(frames), 2, 0) == pytest.approx(min(grid), rel=0.05)  # six labels in all: coarse


def test_deaf_loss_leaves_out_what_has_no_loss() -> None:
    labels = draw_labels(5, 8, (3, 6), 0, seed=1)
    frames = np.array([50] * 5)
    alone = deaf_loss(labels, frames, 8, 0)
    assert deaf_loss([*labels, np.array([3, 3, 3])], np.append(frames, 4), 8, 0) == alone
    assert deaf_loss([np.array([3, 3])], np.array([2]), 8, 0) == 0.0
    assert deaf_loss([np.array([], np.int64)], np.array([9]), 8, 0) == 0.0


# --- Real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Before the fixture that trains: two threads wait for each other on a busy machine, a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(*arguments: object) -> int:
    """train.py with these arguments, in this process, whose state of Accelerate ends with it: its exit status."""
    before, sys.argv = sys.argv, ["train.py", *map(str, arguments)]
    try:
        return exit_status(train.main)
    finally:
        sys.argv = before
        forget_processes()


Row = tuple[str, np.ndarray, str, str]


def unchanged(row: Row) -> Row:
    return row


class Trainer:
    """Trains tiny models on tones (conftest.make_rows), changed by `change`; keeps the screen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = itertools.count()

    def data(self, change: Callable[[Row], Row] = unchanged, num_train: int = 200) -> Path:
        data_dir = self.folder / f"data_{next(self.runs)}"
        write_part(data_dir / "train" / "part_1", [change(row) for row in make_rows(num_train, seed=1)])
        write_part(data_dir / "dev" / "part_1", [change(row) for row in make_rows(40, seed=2)])
        return data_dir

    def train(self, data_dir: Path, **settings: object) -> Path:
        number = next(self.runs)
        defaults = {"model_config": TINY_MODEL, "logging_steps": 25, "eval_steps": 50, "save_steps": 10_000}
        recipe = write_recipe(self.folder / f"{number}.yaml", data_dir, **(defaults | settings))
        assert command("--config", recipe, "--output_dir", self.folder / str(number)) == 0
        return self.folder / str(number)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def evaluations(run_dir: Path) -> pandas.DataFrame:
    log = read_log(run_dir / "training_log.csv")
    return log[log["eval_wer"].notna()].fillna({"state": ""}).set_index("step")


def level(log: pandas.DataFrame) -> pandas.Series:
    """Dev loss in units of the deaf loss."""
    return log["eval_loss"] / log["eval_deaf_loss"]


@pytest.fixture(scope="module")
def healthy(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """An ordinary run across its turning point: run directory, data, and what was on the screen."""
    screen = io.StringIO()
    trainer = Trainer(tmp_path_factory.mktemp("healthy"))
    data_dir = trainer.data()
    with contextlib.redirect_stdout(screen):
        run_dir = trainer.train(data_dir, eval_steps=25, max_steps=500)
    return run_dir, data_dir, screen.getvalue()


@pytest.mark.slow
def test_a_healthy_run_is_followed_and_not_warned_about(healthy: tuple[Path, Path, str]) -> None:
    run_dir, _, screen = healthy
    log = evaluations(run_dir)
    hopeless = log[log["eval_wer"] >= 0.99]
    states = [state for state, _ in itertools.groupby(hopeless["state"])]
    assert states == ["before the plateau", "plateau", "leaving the plateau"]
    assert set(log["state"][log["eval_wer"] < 0.99]) == {""}
    assert log["eval_cer"].iloc[-1] < 0.3
    assert "WARNING" not in screen
    for state in states:
        assert screen.count(f"\n{state}: normal") == 1
    assert level(log)[hopeless.index[hopeless["state"] == "plateau"]].between(0.9, 1.1).all()


@pytest.mark.slow
def test_token_collapse_is_read_and_said(healthy: tuple[Path, Path, str]) -> None:
    """Spaces, the rarest label here, are learned last: the tones stand glued together for a hundred updates."""
    run_dir, _, screen = healthy
    log = evaluations(run_dir)
    glued = log[(log["eval_cer"] < 0.3) & (log["eval_word_count_ratio"] < 0.7)]
    assert len(glued) >= 2
    assert glued["eval_label_length_ratio"].between(0.7, 1.2).all()
    assert "token collapse: spaces are missing" in screen
    assert (log["eval_insertion_rate"] + log["eval_deletion_rate"] + log["eval_substitution_rate"]).to_numpy() == (
        pytest.approx(log["eval_wer"].to_numpy())
    )


@pytest.mark.slow
def test_too_slow(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    log = evaluations(trainer.train(trainer.data(), learning_rate=1e-6, max_steps=200, num_train_epochs=1))
    assert log["state"].tolist() == ["before the plateau", "too slow", "too slow", "too slow"]
    assert level(log).iloc[-1] > 2
    screen = capsys.readouterr().out
    assert screen.count("WARNING: too slow") == 2  # the first and the second, and not the third
    assert "raise --learning_rate (it is 1e-06)" in screen


@pytest.mark.slow
def test_stuck_at_an_absurd_learning_rate(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = trainer.train(trainer.data(), learning_rate=0.5, lr_scheduler_type="constant", max_steps=200)
    log = evaluations(run_dir)
    hopeless = log[(log["eval_wer"] >= 0.99) & (log.index >= 100)]
    assert set(hopeless["state"]) == {"stuck"}
    assert (log["eval_distinct_hypotheses"] == 1).all()
    assert (log["eval_top_probability_deviation"] < 0.001).all()
    assert "--learning_rate is 0.5, --warmup_steps 0: take 1e-3 or less" in capsys.readouterr().out


@pytest.mark.slow
def test_stuck_without_a_cause_in_the_settings(trainer: Trainer) -> None:
    """Noise without tones: there is nothing to hear, and the loss stays that of a deaf model."""
    rng = np.random.default_rng(0)

    def silence(row: Row) -> Row:
        return row[0], rng.normal(0, 3000, len(row[1])).astype(np.int16), row[2], row[3]

    run_dir = trainer.train(trainer.data(silence, num_train=800), max_steps=900, lr_scheduler_type="constant")
    log = evaluations(run_dir)
    hopeless = log[log["eval_wer"] >= 0.99]
    assert set(hopeless["state"][hopeless.index <= 500]) <= {"before the plateau", "plateau"}
    assert hopeless["state"].iloc[-1] == "stuck"


def test_unknown_tokens(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = trainer.data(lambda row: (row[0], row[1], row[2].translate(str.maketrans("ABCDE", "абвгд")), row[3]))
    log = evaluations(trainer.train(data_dir, vocabulary="large_960h", max_steps=100, preflight="warn"))
    assert log["state"].tolist() == ["unknown tokens"] * 2
    assert (log["eval_unknown_reference_fraction"] > 0.7).all()
    assert "characters that the vocabulary lacks" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "offset"), [(0.001, 0), (0.01, 20_000)])
def test_unnormalised_audio(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scale: float, offset: int
) -> None:
    extractor = pretrained.Wav2Vec2FeatureExtractor
    monkeypatch.setattr(
        pretrained, "Wav2Vec2FeatureExtractor", lambda **settings: extractor(**(settings | {"do_normalize": False}))
    )
    data_dir = trainer.data(lambda row: (row[0], (row[1] * scale + offset).astype(np.int16), row[2], row[3]))
    log = evaluations(trainer.train(data_dir, max_steps=200, preflight="warn"))
    # A normal run of the same length has begun to hear.
    assert log["state"].tolist() == ["unnormalised audio"] * 4
    assert (level(log) > 0.99).all()
    assert (log["eval_unfit_input_fraction"] == 1).all()
    assert "do_normalize" in capsys.readouterr().out
    # A group norm takes level and offset away: the same audio is no trouble there.
    log = evaluations(trainer.train(data_dir, max_steps=50, model_config=TINY_GROUP_NORM_MODEL, preflight="warn"))
    assert (log["eval_unfit_input_fraction"] == 1).all()
    assert log["state"].iloc[-1] in ("before the plateau", "plateau")


@pytest.mark.slow
def test_divergence(healthy: tuple[Path, Path, str], trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that hears goes on at a rate that destroys it."""
    run_dir, data_dir, _ = healthy
    log = evaluations(
        trainer.train(
            data_dir, model_config=None, model_name_or_path=str(run_dir / "model"), vocabulary="model",
            learning_rate=1.0, max_steps=50, eval_steps=25,
        )
    )  # fmt: skip
    assert log["eval_cer"].iloc[0] < 0.3
    # A constant guess may be right about a word or two of one letter.
    assert set(log["state"][1:]) <= {"", "divergence"}
    assert log["state"].iloc[-1] == "divergence"
    assert (level(log)[1:] > 0.9).all()
    assert "and has risen to" in capsys.readouterr().out


def test_updates_that_are_all_left_out_are_a_divergence(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No update counts: the model stays as it was, and a training loss of nothing is no knowledge."""
    forward = train.Run.forward

    def broken(run: train.Run, batch: train.Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_BTV, frame_lengths_B, loss_B = forward(run, batch)
        return logits_BTV, frame_lengths_B, loss_B * (math.nan if run.model.training else 1)

    monkeypatch.setattr(train.Run, "forward", broken)
    log = evaluations(trainer.train(trainer.data(num_train=16), max_steps=8, eval_steps=4, max_bad_updates=99))
    assert log["bad_updates"].tolist() == [4, 8]
    assert log["state"].tolist() == ["divergence"] * 2
    screen = capsys.readouterr().out
    assert "WARNING: divergence: all 4 updates since step 0 were left out" in screen
    assert "bad_batches.csv" in screen


@pytest.mark.slow
def test_words_glued_together_for_ever(
    healthy: tuple[Path, Path, str], trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Hausa symptom at its worst: a model that hears goes on with training texts that have lost their spaces."""
    data_dir = trainer.data(lambda row: (row[0], row[1], row[2].replace(" ", ""), row[3]))
    shutil.rmtree(data_dir / "dev")
    write_part(data_dir / "dev" / "part_1", [row for row in make_rows(60, seed=2) if " " in row[2]])
    run_dir = trainer.train(
        data_dir, model_config=None, model_name_or_path=str(healthy[0] / "model"), vocabulary="model", max_steps=100,
        eval_steps=25,
    )  # fmt: skip
    log = evaluations(run_dir)
    assert log["eval_wer"].iloc[-1] >= 0.99
    assert (log["eval_cer"] < 0.35).all()
    assert log["state"].iloc[-1] == "too short", "not `normal: words come later` at the end of a run"
    screen = capsys.readouterr().out
    assert "WARNING: too short: the run has ended" in screen
    assert "token collapse: spaces are missing" in screen


@pytest.mark.slow
def test_memorising_texts_that_belong_to_other_clips(trainer: Trainer) -> None:
    rows = iter(make_rows(40, seed=9)[1:] * 9)
    data_dir = trainer.data(lambda row: (row[0], row[1], next(rows)[2].replace(" ", ""), row[3]), 16)
    log = evaluations(trainer.train(data_dir, max_steps=400, eval_steps=100))
    hopeless = log[log["eval_wer"] >= 0.99]
    assert hopeless["state"].tolist()[-2:] == ["memorising"] * 2


@pytest.mark.slow
def test_a_resumed_run_says_what_the_run_would_have_said(trainer: Trainer) -> None:
    data_dir = trainer.data()
    settings = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "max_steps": 200, "save_steps": 100}
    run_dir = trainer.train(data_dir, **settings)
    whole = evaluations(run_dir)["state"].tolist()
    shutil.rmtree(run_dir / "checkpoints" / "step_000200")
    (run_dir / "train_results.json").unlink()
    state = json.loads((run_dir / "checkpoints" / "step_000100" / "state.json").read_text())
    assert state["run"]["deaf_loss"] == pytest.approx(evaluations(run_dir)["eval_deaf_loss"].iloc[0])
    assert command("--config", run_dir / "config.yaml", "--resume_from_checkpoint", "last") == 0
    assert evaluations(run_dir)["state"].tolist() == whole


# --- The pure function ---------------------------------------------------------------------------------------------

FACTS = Facts(2.0, Schedule("constant", 1e-3, 100, 3000), hears_level=True)


def facts_with(**changes: float) -> Facts:
    """FACTS, but for these of itself or of its schedule."""
    of_schedule = {name: changes.pop(name) for name in ("peak", "warmup_steps", "total_steps") if name in changes}
    return replace(FACTS, schedule=replace(FACTS.schedule, **of_schedule), **changes)


NAN = math.nan


def rows(*losses: tuple[int, float, float], **last: float) -> list[dict[str, float]]:
    """Rows of a log from (step, training loss, dev loss), the last with more values."""
    history = [
        {"step": step, "train_loss": trained, "eval_loss": loss, "eval_wer": NAN if math.isnan(loss) else 1.0}
        for step, trained, loss in losses
    ]
    history[-1] |= last
    return history


@pytest.mark.parametrize(
    ("history", "facts", "state"),
    [
        (rows((50, 9.0, 8.0)), {}, "before the plateau"),
        (rows((0, NAN, 8.0)), {}, "before the plateau"),
        (rows((100, 9.0, NAN), (200, 8.9, 8.9)), {"total_steps": 300}, "too slow"),
        (rows((100, 9.0, NAN), (200, 5.0, 4.0)), {"total_steps": 300}, "before the plateau"),
        (rows((100, 3.0, NAN), (200, 3.0, 3.0)), {}, "stuck"),
        (rows((50, 2.1, NAN), (100, 2.0, 2.0)), {}, "plateau"),
        (rows((100, 2.1, NAN), (599, 2.0, 2.0)), {}, "plateau"),
        (rows((100, 2.1, NAN), (601, 2.0, 2.0)), {}, "stuck"),
        # The Hausa seed: 880 updates inside a warm-up of 1000 are no long plateau.
        (rows((100, 2.1, NAN), (880, 2.0, 2.0)), {"warmup_steps": 1000}, "plateau"),
        (rows((100, 2.1, NAN), (199, 2.0, 2.0)), {"peak": 0.1, "warmup_steps": 200}, "plateau"),
        (rows((100, 2.1, NAN), (201, 2.0, 2.0)), {"peak": 0.1, "warmup_steps": 200}, "stuck"),
        (rows((100, 2.1, NAN), (300, 1.9, 1.7)), {}, "leaving the plateau"),
        # Not for ever: no better loss for the patience of a plateau, or the end of the run.
        (rows((100, 2.0, 1.0), (599, 1.0, 0.97)), {}, "leaving the plateau"),
        (rows((100, 2.0, 1.0), (601, 1.0, 0.97)), {}, "no words"),
        (rows((100, 2.0, 1.0), (601, 1.0, 0.90)), {}, "leaving the plateau"),
        (rows((100, 2.0, 1.0), (500, 1.0, 1.2), (601, 0.4, 1.4)), {}, "no words"),
        (rows((100, 2.0, 1.0), (601, 1.0, 0.97)), {"warmup_steps": 1000}, "leaving the plateau"),
        (rows((100, 2.0, 1.0), (300, 1.0, 0.5)), {"total_steps": 300}, "too short"),
        (rows((100, 2.1, 2.1), (300, 2.0, 2.0)), {"total_steps": 300}, "too short"),
        (rows((100, 2.0, 1.5), (200, 2.4, 2.1)), {}, "divergence"),
        # Every update since the last row was left out: no training loss, or none that counts.
        (rows((100, 2.0, 2.0), (110, NAN, 2.0), bad_updates=10), {}, "divergence"),
        (rows((100, 2.0, 2.0), (110, 0.0, 2.0), bad_updates=10), {}, "divergence"),
        (rows((100, 2.0, 1.5), (110, NAN, 1.5), bad_updates=10), {}, "divergence"),
        (rows((10, NAN, 2.0), bad_updates=10), {}, "divergence"),
        (rows((0, NAN, 9.0), bad_updates=0), {}, "before the plateau"),
        (rows((100, 2.0, 2.0), (110, 2.0, 2.0), bad_updates=9), {}, "plateau"),
        (rows((100, 2.0, 2.0), (110, 2.0, 2.0), bad_updates=0), {}, "plateau"),
        (rows((100, 2.0, 2.0), (200, 2.9, 2.7)), {}, "divergence"),
        (rows((100, 2.0, 1.5), (200, 0.7, 2.1)), {}, "memorising"),
        (rows((100, 2.0, NAN), (200, 2.0, math.inf)), {}, "divergence"),
        (rows((100, 2.0, 2.0), eval_unknown_reference_fraction=0.9), {}, "unknown tokens"),
        (rows((100, 2.0, 2.0), eval_unfit_input_fraction=0.9), {}, "unnormalised audio"),
        (rows((100, 2.0, 2.0), eval_unfit_input_fraction=0.9), {"hears_level": False}, "plateau"),
        (rows((100, 2.0, 1.5), eval_unfit_input_fraction=0.9), {}, "leaving the plateau"),
        (rows((100, 2.0, 2.0), eval_wer=0.98), {}, None),
        (rows((100, 2.0, 2.0)), {"deaf_loss": 0.0}, None),
    ],
)
def test_states_literal_table(history: list[dict[str, float]], facts: dict[str, object], state: str | None) -> None:
    found = diagnose(history, facts_with(**facts))
    assert (found and found.state) == state
    assert found is None or found.is_warning == (state in WARNINGS)


@pytest.mark.parametrize("loss", [2.0, 1.0])
def test_a_run_that_ends_without_a_word_is_told_so_at_its_end(loss: float) -> None:
    """However often it was told before that all was normal."""
    facts, history, said = facts_with(total_steps=170), [], []
    for step in range(110, 180, 10):
        history.append({"step": step, "train_loss": loss, "eval_loss": loss, "eval_wer": 1.0})
        history[-1]["state"], lines = remark(history, facts)
        said += lines
    assert len(said) == 2
    assert "normal" in said[0]
    assert said[1].startswith("WARNING: too short: the run has ended")


def test_a_stalled_run_is_told_what_its_words_lack() -> None:
    glued = {"eval_cer": 0.15, "eval_word_count_ratio": 0.2, "eval_deletion_rate": 0.8, "eval_substitution_rate": 0.2}
    learned_by_heart = rows((100, 0.3, 1.0), (700, 0.1, 1.0), eval_cer=0.6)
    for history, said in (
        (rows((100, 1.0, 1.0), (700, 1.0, 1.0), eval_insertion_rate=0.0, **glued), "spaces are missing"),
        (rows((100, 1.0, 1.0), (700, 1.0, 1.0), eval_cer=0.6), "eval_samples.csv"),
        (learned_by_heart, "more training data"),
    ):
        found = diagnose(history, FACTS)
        assert found.state == "no words"
        assert said in found.text


def test_warnings_come_back_at_ever_longer_intervals() -> None:
    history, said = [], []
    for step in range(1000, 1000 + 9 * 10, 10):
        history.append(
            {"step": step, "train_loss": 2.0, "eval_loss": 2.0, "eval_wer": 1.0, "eval_unfit_input_fraction": 1}
        )
        history[-1]["state"], lines = remark(history, FACTS)
        said.append(len(lines))
    assert said == [1, 1, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("wer", "cer", "insertions", "deletions", "substitutions", "ratio", "said"),
    [
        (0.6, 0.2, 0.0, 0.2, 0.4, 0.75, "spaces are missing: 0.75 words"),
        (0.3, 0.2, 0.0, 0.25, 0.05, 0.75, "words are lost: deletions are 25.0%"),
        (0.6, 0.5, 0.0, 0.2, 0.4, 0.75, None),  # nothing is right yet
        (0.1, 0.05, 0.0, 0.05, 0.05, 0.95, None),
        (0.05, 0.02, 0.0, 0.05, 0.0, 0.95, None),
        (1.0, 0.15, 0.0, 0.8, 0.2, 0.2, "spaces are missing: 0.20 words"),  # five words to each one
        (1.0, 0.3, 0.0, 0.5, 0.5, 0.5, "spaces are missing: 0.50 words"),
        (0.9, 0.7, 0.0, 0.7, 0.2, 0.3, "words are lost: deletions are 70.0%"),  # with their letters
        (1.0, 0.36, 0.0, 0.5, 0.5, 0.5, None),  # nothing is right yet, and the state says more
        (1.0, math.nan, 0.0, 0.5, 0.5, 0.5, None),
    ],
)
def test_token_collapse_literal_table(
    wer: float, cer: float, insertions: float, deletions: float, substitutions: float, ratio: float, said: str | None
) -> None:
    row = {
        "eval_wer": wer, "eval_cer": cer, "eval_insertion_rate": insertions, "eval_deletion_rate": deletions,
        "eval_substitution_rate": substitutions, "eval_word_count_ratio": ratio,
    }  # fmt: skip
    line = token_collapse(row)
    assert line is None if said is None else said in line
