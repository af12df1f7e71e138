"""model/: which weights of a run are the best so far, how they are written, and what they become at the end.

An evaluation by --metric_for_best_model decides. With --ema_decay it scores two sets of weights, the trained ones and
their moving average, and the better one stands for it; with --average_best the mean of the best evaluations is scored
at the end, and takes the place of the best one where it is better.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import averaging
import roundtrip
from atomic import replace_folder, reporting_disk_errors
from diagnosis import HOPELESS_WER
from early_stopping import Patience
from errors import RunFailed
from levers import METRICS
from model import num_frames
from scoring import Evaluation, evaluation_values, rates
from sharding import gather_tensors, load_weights, weights_of, whole

if TYPE_CHECKING:
    from training_run import RunState, TrainingRun

LIMITS = ("eval_wer_low", "eval_wer_high")
# Of the state: what model/ is, kept beside it for a resume from a checkpoint before it.
BEST_FIELDS = (
    *("best_step", "best_metric", "best_weights"),
    *("best_eval_wer", "best_eval_limits", "best_eval_cer", "best_eval_letters"),
)
BEST_FILE = "best.json"
# What weights are: those of the updates, their moving average, the mean of the best evaluations.
TRAINED, EMA, AVERAGE = "trained", "ema", "average"
# Of the clips of eval_samples.csv, the shortest, for the check of a saved model.
PROBE_CLIPS = 3

Figures = Mapping[str, float]


def is_better(value: float, than: float | None) -> bool:
    """Lower is better; anything is better than nothing, and a number better than none."""
    return than is None or value < than or (math.isfinite(value) and not math.isfinite(than))


def figures_of(run: "TrainingRun", evaluation: Evaluation) -> dict[str, float]:
    """Of an evaluation of the run's dev rows, under the names of the log."""
    return rates(evaluation, run.eval_breakdown.speakers, "eval_") | evaluation_values(evaluation.score)


def begin_again(state: "RunState", changed: Collection[str]) -> None:
    """--resume_anyway with other settings: what has ended the run may not end it any more.

    Figures of another metric cannot be compared with those to come, so the next evaluation is the best.
    """
    if {"metric_for_best_model", "early_stopping_patience", "early_stopping_threshold"} & set(changed):
        state.stopped_early_at_step = state.stopped_early_because = None
    if "metric_for_best_model" in changed:
        state.patience, state.best_evaluations = {}, []
        for name in BEST_FIELDS:
            setattr(state, name, _empty(name))


def _empty(name: str) -> object:
    """What one of BEST_FIELDS is before there is a best."""
    return {"best_eval_limits": [], "best_eval_letters": {}}.get(name)


class BestModel:
    """What a run knows and does about its best weights. The figures are in the run's state, so that it can resume."""

    def __init__(self, run: "TrainingRun") -> None:
        self.run = run
        self.average_figures: dict[str, float] = {}
        """Of the average, under the names of an evaluation, once it has become model/."""
        # Of the model that was opened in a clean process, by this one: its step and weights.
        self._opened: tuple[int | None, str | None] | None = None

    # At an evaluation

    def choose(self, figures: Mapping[str, Figures]) -> str:
        """The better one of the weights that an evaluation has scored, by name; of equal ones the first."""
        metric = self.run.config.metric_for_best_model
        return min(figures, key=lambda name: (not math.isfinite(figures[name][metric]), figures[name][metric]))

    def take(self, weights_name: str, figures: Figures, letters: Mapping[str, dict] | None = None) -> None:
        """The better weights of an evaluation: into model/ when they are the best so far, and among the best K.

        Args:
            weights_name: what they are.
            figures: of the evaluation.
            letters: how each letter fared in it, where there are letters.
        """
        run, state = self.run, self.run.state
        value, keep = figures[run.config.metric_for_best_model], run.config.average_best
        is_best = is_better(value, state.best_metric)
        ranked = state.best_evaluations
        if keep is not None and math.isfinite(value):
            ranked = averaging.rank_evaluation(ranked, state.step, value, keep)
        is_ranked = state.step in (step for step, _ in ranked)
        if is_best or is_ranked:
            with run.clock.phase("save"), self.in_place(weights_name):
                weights = self.gather_weights()
                if is_ranked:
                    self._write_ranked(weights, [int(step) for step, _ in ranked])
                if is_best:
                    self._note(weights_name, figures, letters or {})
                    self.write(weights)
        state.best_evaluations = ranked

    def _write_ranked(self, weights: dict[str, torch.Tensor], steps: list[int]) -> None:
        run = self.run

        def write() -> None:
            averaging.write_weights(run.folder, run.state.step, weights)
            averaging.remove_unused(run.folder, steps)

        run.status.by_first(run.is_main, write)

    def _note(self, weights_name: str, figures: Figures, letters: Mapping[str, dict]) -> None:
        state = self.run.state
        state.best_step, state.best_weights = state.step, weights_name
        state.best_metric = figures[self.run.config.metric_for_best_model]
        state.best_eval_wer, state.best_eval_cer = figures.get("eval_wer"), figures.get("eval_cer")
        state.best_eval_letters = dict(letters)
        state.best_eval_limits = [figures[name] for name in LIMITS if name in figures]

    def judge_patience(self, figures: Figures, is_normal: bool) -> str | None:
        """Count an evaluation without a gain; why the run ends when there were enough of them, else None.

        Args:
            figures: of the better weights.
            is_normal: what the first process knows of a WER at 1.0; see diagnosis.py.
        """
        run, config, state = self.run, self.run.config, self.run.state
        if config.early_stopping_patience is None:
            return None
        is_hopeless = figures["eval_wer"] >= HOPELESS_WER
        (said_normal,) = run.status.worst(int(is_normal))
        is_beginning = state.step <= max(run.schedule.warmup_steps, config.freeze_encoder_steps)
        is_excused = is_beginning or (is_hopeless and bool(said_normal))
        patience, metric = Patience(**state.patience), config.metric_for_best_model
        threshold, value = config.early_stopping_threshold, figures[metric]
        patience.judge(state.step, value, threshold, figures["eval_loss"], is_hopeless, is_excused)
        state.patience = asdict(patience)
        if patience.count < config.early_stopping_patience or state.step == run.total_steps:
            return None
        state.stopped_early_at_step = state.step
        state.stopped_early_because = patience.describe(metric, value, threshold)
        return state.stopped_early_because

    # At a resume

    def adopt(self, has_changed: bool) -> None:
        """model/ may be of a step behind the checkpoint: then it is the best so far, unless --resume_anyway changed.

        The updates up to it are done again; on a CPU they give the same weights, on a GPU nearly.
        """
        run = self.run
        try:
            best = json.loads((run.folder / "model" / BEST_FILE).read_text(encoding="utf-8"))
            is_ahead = best["best_step"] > run.state.step
            best = {name: best[name] for name in BEST_FIELDS}
        except (OSError, ValueError, KeyError, TypeError):
            return
        if not is_ahead:
            return
        for name in best:
            setattr(run.state, name, _empty(name) if has_changed else best[name])
        if has_changed and run.is_main:
            print(f"model/ is of step {best['best_step']} under the old settings; the next evaluation replaces it")

    # At the end

    def load(self) -> None:
        """Put the weights of model/ in place, on every rank.

        Raises:
            RunFailed: the file is not there any more, or is another one.
        """
        run = self.run
        run.accelerator.wait_for_everyone()
        path = run.folder / "model" / "model.safetensors"
        try:
            load_weights(run.model, load_file(path))
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"{path} cannot be read as weights ({error}): put the file of step {run.state.best_step} back, or "
                "resume from a checkpoint before it"
            ) from error

    @property
    def averaged_steps(self) -> list[int]:
        """Of the evaluations whose mean is tried at the end, in their order."""
        return sorted(int(step) for step, _ in self.run.state.best_evaluations)

    def load_average(self) -> None:
        """Put the mean of the best evaluations' weights in place, on every rank.

        Raises:
            RunFailed: a file of them is gone.
        """
        self.run.accelerator.wait_for_everyone()
        load_weights(self.run.model, averaging.mean_of(self.run.folder, self.averaged_steps))

    def keep_better(self, evaluation: Evaluation) -> dict[str, object]:
        """The average, in place and scored, becomes model/ if it is better than the best; else that is put back.

        Returns:
            For train_results.json: the figures of the average, which evaluations it is of, and what was kept.
        """
        run, metric = self.run, self.run.config.metric_for_best_model
        figures = figures_of(run, evaluation)
        results: dict[str, object] = {
            f"average_{name}": value for name, value in figures.items() if name in (*METRICS, *LIMITS, metric)
        }
        is_kept = figures[metric] < run.state.best_metric
        if is_kept:
            self.average_figures = figures
            run.state.best_weights = AVERAGE
            self._opened = None
            self.write(self.gather_weights())
        else:
            self.load()
        if run.is_main:
            steps = ", ".join(map(str, self.averaged_steps))
            print(
                f"average of steps {steps}: {metric} {figures[metric]:.4g}, against {run.state.best_metric:.4g} of "
                f"step {run.state.best_step} alone: {'it becomes model/' if is_kept else 'model/ stays as it is'}",
                flush=True,
            )
        if is_kept:
            results |= run.describe_sets(run.eval_breakdown.score(evaluation.counts))
        return results | {"average_of_steps": self.averaged_steps, "kept": "average" if is_kept else "best"}

    def figures_of_model(self, results: Mapping[str, object]) -> dict[str, object]:
        """Results whose dev figures are those of model/, also where an average has taken the place of the best."""
        if not self.average_figures:
            return dict(results)
        names = ("eval_wer", *LIMITS, "eval_cer")
        others = {name: value for name, value in results.items() if name.removeprefix("best_") not in names}
        return others | {f"best_{name}": self.average_figures[name] for name in names if name in self.average_figures}

    def check(self) -> None:
        """Open model/, whose weights are in place, in a clean process, where it has not been yet.

        Raises:
            RunFailed: it is not what was saved.
        """
        run = self.run
        if self._opened != self._identity:
            with whole(run.model):
                run.status.by_first(run.is_main, self._open)

    # How model/ is written

    def in_place(self, weights_name: str) -> AbstractContextManager[None]:
        """The model has these weights while the block runs."""
        return self.run.ema.in_place() if weights_name == EMA else contextlib.nullcontext()

    def gather_weights(self) -> dict[str, torch.Tensor]:
        """Of the model by Hugging Face's names; on the first rank only, and asked for by all."""
        return gather_tensors(weights_of(self.run.model), self.run.is_main)

    def write(self, weights: dict[str, torch.Tensor]) -> None:
        """`model/`, by the first rank; the weights are those in place.

        Raises:
            RunFailed: what was written is not what was trained: it stays in model.rejected.
        """
        run = self.run
        with whole(run.model):
            run.status.by_first(run.is_main, lambda: self._write(weights))
        if self._opened is None:  # on every rank: they must agree on what is still to be done
            self._opened = self._identity

    @property
    def _identity(self) -> tuple[int | None, str | None]:
        return self.run.state.best_step, self.run.state.best_weights

    def _write(self, weights: dict[str, torch.Tensor]) -> None:
        run, is_first = self.run, self._opened is None
        temporary = run.folder / "model.new"
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
        num_bytes = sum(value.nbytes for value in weights.values())
        with reporting_disk_errors(run.folder / "model", num_bytes):
            try:
                self._fill(temporary, weights)
                if is_first:
                    self._write_probe()
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # The next checkpoint may need the room.
                raise
        try:
            self._check_written(temporary, weights)
            if is_first:
                self._check_opening(temporary)
        except RunFailed as error:
            rejected = run.folder / "model.rejected"
            shutil.rmtree(rejected, ignore_errors=True)
            temporary.rename(rejected)
            raise RunFailed(f"{error}; it is kept as {rejected}, and model/ is as it was") from error
        if run.state.best_weights == AVERAGE:
            averaging.put_average(run.folder)
        replace_folder(temporary, run.folder / "model")

    def _check_written(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        roundtrip.check_written(folder, weights)

    def _fill(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        run = self.run
        run.save_model(folder, weights)
        best = json.dumps({name: getattr(run.state, name) for name in BEST_FIELDS}, indent=1)
        (folder / BEST_FILE).write_text(best, encoding="utf-8")

    def _open(self) -> None:
        self._write_probe()
        self._check_opening(self.run.folder / "model")

    def _write_probe(self) -> None:
        """What the model in memory makes of a few short clips."""
        run = self.run
        heard = num_frames(run.eval_set.num_samples, run.hf_config.conv_kernel, run.hf_config.conv_stride) > 0
        rows = sorted(run.sample_rows[heard[run.sample_rows]], key=lambda row: run.eval_set.num_samples[row])
        clips = [run.eval_set[int(row)] for row in rows[:PROBE_CLIPS]]
        roundtrip.write_probe(run.folder / roundtrip.PROBE_FILE, run.loaded, run.collate, clips)

    def _check_opening(self, folder: Path) -> None:
        probe = self.run.folder / roundtrip.PROBE_FILE
        roundtrip.check_opening(folder, probe)
        probe.unlink()
