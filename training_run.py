"""One run of any training: what it has done so far, what it writes into its run directory, and how it is resumed.

`RunState` is all that a checkpoint keeps besides weights and optimizer: batch order, masks, dropout and the learning
rate are functions of the seed and the step.
"""

import contextlib
import functools
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import averaging
import checkpoint
import preflight
import roundtrip
import runlog
import sampling
from atomic import ASIDE, UNFINISHED, recover_folder, write_atomically
from audio import SAMPLE_RATE_HZ
from averaging import EMA_PREFIX, EMA_UPDATES
from best_model import BestModel, begin_again
from clock import PHASE_COLUMNS, PHASES, Clock, Work, seconds_left
from config import RunSettings, write_config
from data import Update
from errors import Stopped, UsageError
from foundation import Foundation
from hosts import TOKEN_PREFIX, check_same
from memory import MEGABYTE, MemoryLimit, peak_bytes
from meter import METER_SUMS, BadUpdates, Meter
from model import parameter_counts
from processes import describe_processes
from progress import Progress, say
from recovery import Cuts
from sharding import gather_tensors, load_state, state_of
from stopping import StopSignals

SAMPLES_SHOWN = 3
# A second of audio in an evaluation costs about a third of one in training: no backward pass. The field notes' base and
# large models have 0.26 to 0.40.
EVALUATION_COST = 1 / 3
# From this share of the run on, an evaluation comes with what would make it cheaper.
LARGE_EVALUATION = 0.25
# Fewer clips tell little from one evaluation to the next.
MIN_EVALUATION = 50
TRACKER_PROJECT = "wav2vec2-ctc-finetune"
# Of a run's identity: what its checkpoints do not hold, and must find again in the model that it began with.
FROZEN = "the frozen weights of model_name_or_path"
# What a run leaves in its folder.
RUN_FILES = (
    *("config.yaml", "environment.json", "training_log.csv", "training_curve.png", "eval_samples.csv"),
    *("eval_slices.csv", "bad_batches.csv", "train_results.json", "checkpoints", runlog.REPORT_FILE),
    *("model", "model.new", "model.rejected", averaging.AVERAGE_FOLDER, roundtrip.PROBE_FILE, sampling.SAMPLING_FILE),
    *(*preflight.REPORT_FILES, TRACKER_PROJECT, "wandb"),
)


@dataclass
class RunState:
    """What a run has done; saved with every checkpoint as JSON."""

    utterances_per_update: int
    identity: dict[str, object]
    """What a resume must not change; see `Run._identity`."""
    step: int = 0
    finished_step: int = -1
    """The last step that was evaluated and logged as was due; a run that is asked to stop does not wait for that."""
    best_step: int | None = None
    best_metric: float | None = None
    """By --metric_for_best_model, which alone decides."""
    best_weights: str | None = None
    """What model/ holds of `best_step`: see `best_model`."""
    best_eval_wer: float | None = None
    best_eval_limits: list[float] = field(default_factory=list)
    """Of that WER, with 95 % confidence; empty where they cannot be known."""
    best_eval_cer: float | None = None
    best_eval_letters: dict[str, dict] = field(default_factory=dict)
    """Of the same evaluation, as `letters.describe_letters` gives them."""
    best_evaluations: list[list[float]] = field(default_factory=list)
    """Step and metric of the --average_best evaluations whose weights lie in average/, the best first."""
    patience: dict[str, float | None] = field(default_factory=dict)
    """Of `early_stopping.Patience`."""
    stopped_early_at_step: int | None = None
    stopped_early_because: str | None = None
    eval_wer_before: float | None = None
    test_before: dict[str, float] | None = None
    sums: list[float] = field(default_factory=lambda: [0.0] * len(METER_SUMS))
    """Of the whole run, up to the last row of the log, by `Meter.names`."""
    pending_sums: list[float] = field(default_factory=lambda: [0.0] * len(METER_SUMS))
    """Since the last row of the log."""
    pending_seconds: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))
    """Of each phase of `clock.Clock`, since the last row of the log."""
    grad_norm: float | None = None
    """Of the last update."""
    bad_in_a_row: list[int] = field(default_factory=lambda: [0, 0])
    """Updates left out at the end: see `BadUpdates.in_a_row`."""
    resumed_anyway: list[dict[str, object]] = field(default_factory=list)
    """At which step --resume_anyway went on, and what had changed."""
    deaf_loss: float | None = None
    """Of the dev set, once it was scored; see `diagnosis.deaf_loss`."""
    elapsed_seconds: float = 0.0
    log_bytes: int = 0
    sample_bytes: int = 0
    slice_bytes: int = 0
    bad_batch_bytes: int = 0


class TrainingRun(Foundation):
    """A foundation that has passed its checks and has a run directory: what the loop works with.

    Whatever cannot work is refused before anything is written. Comes before a subclass of Foundation that says what is
    trained: `class Run(TrainingRun, Assembly)`.
    """

    log_columns: Collection[str]
    more_sums: tuple[str, ...] = ()
    """What the meter counts besides METER_SUMS."""
    is_scored_before: bool
    """The model can be scored before its training."""

    def __init__(self, config: RunSettings, accelerator: Accelerator) -> None:
        self._started_at = time.monotonic()
        super().__init__(config, accelerator)
        self.folder = Path(config.output_dir)
        identity = self._identity()
        check_same(self.status, identity, "give every host the same data, model and list of what to leave out")
        self.state = RunState(self.utterances_per_update, identity, sums=self._no_sums(), pending_sums=self._no_sums())
        if config.resume_from_checkpoint is not None:
            self._read_checkpoint()
        self.plan_updates(self.state.utterances_per_update)
        self.best = self._best_model()
        self._check()
        if config.resume_from_checkpoint is None:
            self._begin()
        else:
            self._resume()
        self.meter = Meter(accelerator, self.state.pending_sums, self.state.grad_norm, self.more_sums)
        self.clock, self.work_done = Clock(self.state.pending_seconds), Work()
        self.bad_updates = BadUpdates(accelerator, config.max_bad_updates, self.meter, self.state.bad_in_a_row)
        self.stop = StopSignals(config.max_hours, self._started_at)
        self.memory_limit = MemoryLimit(accelerator.device, config.memory_limit_mb)
        checkpointing = "" if config.gradient_checkpointing else "give --gradient_checkpointing, "
        self.cuts = Cuts(
            "update", f"{checkpointing}lower --max_duration_in_seconds, or use a smaller model", self._report_retry
        )
        self.eval_cuts = Cuts("evaluation", "cut the clip, or use a smaller model", self._report_retry)
        if config.report_to:
            accelerator.init_trackers(TRACKER_PROJECT, config={k: str(v) for k, v in asdict(config).items()})

    # Of each kind of training

    def _kind_identity(self) -> dict[str, object]:
        """What else a resume must not change."""
        raise NotImplementedError

    def _describe_model(self) -> list[str]:
        """Lines of the screen at the start."""
        raise NotImplementedError

    def _levers(self) -> str:
        """Settings that differ from their defaults, for the screen."""
        raise NotImplementedError

    def _best_model(self) -> BestModel:
        return BestModel(self)

    def count(self, update: Update, loss_sum: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Count an update that has been done; see `Meter.add`."""
        self.meter.add(update, loss_sum, grad_norm)

    def save_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write `weights` (by Hugging Face's names) and what belongs to them into a new folder."""
        raise NotImplementedError

    # Setting up

    def _check(self) -> None:
        """The preflight on every rank, shown, and heeded unless --preflight warn."""
        self.report = preflight.run_checks(self)
        if self.is_main:
            preflight.print_report(self.report)
        self.report.refuse(is_strict=False, goes_on=self.config.preflight == "warn")

    def _identity(self) -> dict[str, object]:
        """What decides the meaning of a run: its data, its model, the order and size of its steps."""
        config = self.config
        sets = {"train": self.train_set, "evaluation": self.eval_set, "test": self.test_set}
        settings = (
            "seed num_train_epochs max_steps max_grad_norm freeze_feature_encoder max_eval_samples "
            "data_weights sample_by sampling_temperature"
        )
        return {
            "the kind of training": config.command,
            **{f"the {name} data": one.fingerprint for name, one in sets.items() if one is not None},
            "the selection of training utterances": hashlib.sha256(self.selection.rows.tobytes()).hexdigest(),
            "the evaluated utterances": hashlib.sha256(self.eval_rows.tobytes()).hexdigest(),
            **self._kind_identity(),
            "the configuration of the model": _describe_config(self.hf_config),
            **self._frozen_identity(),
            "the shape of the model": {name: list(value.shape) for name, value in self.model.hf.named_parameters()},
            **{name: getattr(config, name) for name in settings.split()},
        }

    def _frozen_identity(self) -> dict[str, str]:
        """Where a checkpoint holds only what is trained: the checksum of what it needs besides."""
        if not self.keeps_trained_alone:
            return {}
        weights = state_of(self.model)
        frozen = {name: weights[name] for name in weights if name not in self.trained_names}
        return {FROZEN: checkpoint.checksum(frozen)}

    def _begin(self) -> None:
        """Say what will happen, then make the run directory."""
        disk = self._check_disk()
        # No rank may look into the folder for another run once the first one has begun to write.
        self.accelerator.wait_for_everyone()
        if self.is_main:
            print("\n".join(self._describe(disk)), flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.folder)
            self._describe_run()
            self._open_tables()

    def _describe_run(self) -> None:
        """The files that say what this run is: settings, machine and data, checks, who trains and how often."""
        self._write_config()
        facts = describe_processes(self.accelerator)
        environment = runlog.describe_environment(Path(__file__).parent, self.train_set.fingerprint, facts)
        self._write("environment.json", json.dumps(environment, indent=1))
        self._write_sampling()
        preflight.write_report(self.folder, self.report, self)

    def _write_sampling(self) -> None:
        path = self.folder / sampling.SAMPLING_FILE
        path.unlink(missing_ok=True)  # of a run that is resumed with other settings
        if self.sampling is not None:
            sampling.write_sampling(path, self.sampling)

    def _write_config(self) -> None:
        """`config.yaml`: the settings of this run, and what the launcher decided."""
        facts = describe_processes(self.accelerator)
        header = "launched with " + ", ".join(f"{name} {value}" for name, value in facts.items())
        settings = replace(
            self.config,
            max_batch_seconds=self.max_batch_seconds,
            resume_from_checkpoint=None,
            resume_anyway=False,
        )
        self._write("config.yaml", write_config(settings, header))

    def _read_checkpoint(self) -> None:
        """The state of the checkpoint to resume from, when it belongs to this very run."""
        self.checkpoint = self._find_checkpoint()
        saved = RunState(**checkpoint.load_state(self.checkpoint)["run"])
        own = self.state.identity
        kind = saved.identity.get("the kind of training", "train.py")  # older ones do not say
        if kind != self.config.command:
            raise UsageError(f"{self.checkpoint} is of a run of {kind}: resume it with that command")
        changed = [name for name in own if own[name] != saved.identity.get(name)]
        if changed:
            self._refuse_or_record(changed, saved)
        self.state = saved

    def _refuse_or_record(self, changed: list[str], saved: RunState) -> None:
        """What a resume must not change has changed: --resume_anyway writes it into the state."""
        own = self.state.identity
        was = [
            f"{name} (was {saved.identity.get(name)}, is {own[name]})" if name in vars(self.config) else name
            for name in changed
        ]
        is_another = not {"the shape of the model", FROZEN}.isdisjoint(changed)
        if not self.config.resume_anyway or is_another:
            anyway = "" if is_another else ", --resume_anyway"
            raise UsageError(
                f"{self.checkpoint} belongs to another run, different in {', '.join(was)}: use the settings of "
                f"{self.folder / 'config.yaml'}{anyway}, or another --output_dir"
            )
        saved.resumed_anyway.append({"step": saved.step, "changed": was})
        saved.identity = own
        begin_again(saved, [name for name in changed if name in vars(self.config)])
        if self.is_main:
            print(f"resuming anyway, although different in {', '.join(was)}", flush=True)

    def _find_checkpoint(self) -> Path:
        """The first rank mends an interrupted swap, checks every byte and says what it skips; the others take it."""

        def find() -> str:
            # Resolved: a link or a path may lead to it, under another name.
            return checkpoint.find_checkpoint(self.folder, self.config.resume_from_checkpoint).resolve().name

        return self.folder / "checkpoints" / self.status.decide_first(self.is_main, find)

    def _resume(self) -> None:
        """Weights, optimizer and scaler of the checkpoint; the log is cut back to its length."""
        # Without results the run was stopped behind its last update, and only the end is still to do.
        has_results = (self.folder / "train_results.json").is_file()
        if self.state.step > self.total_steps or (self.is_over and has_results):
            early = ", stopped early" if self.state.stopped_early_at_step is not None else ""
            raise UsageError(
                f"{self.folder} is finished (step {self.state.step} of {self.total_steps}{early}): use model/, "
                "or train into another --output_dir"
            )
        if self.state.step == self.total_steps and self.state.best_metric is None:
            raise UsageError(
                f"{self.checkpoint} is the end of the run, where nothing is evaluated any more by another "
                "--metric_for_best_model: resume from a checkpoint before it"
            )
        tensors, saved = checkpoint.load_checkpoint(self.checkpoint)
        weights = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        load_state(self.model, state_of(self.model) | weights)
        checkpoint.restore_optimizer(self.model, self.optimizer.optimizer, tensors, saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None and not self.ema.load(tensors) and self.is_main:
            print(f"the moving average begins at step {self.state.step}, whose checkpoint holds none")
        has_changed = saved["run"]["identity"] != self.state.identity
        self.status.by_first(self.is_main, lambda: self._cut_back(has_changed))
        self.best.adopt(has_changed)

    def _cut_back(self, has_changed: bool) -> None:
        """The run directory as it was at the checkpoint, but for model/."""
        disk = self._check_disk()
        if self.config.average_best is not None:
            averaging.check_present(self.folder, self.best.averaged_steps)
        self._open_tables()  # Refused before anything is changed, where another version began them.
        later = [path for path in checkpoint.list_checkpoints(self.folder) if path.name > self.checkpoint.name]
        if self.config.resume_from_checkpoint != "last":
            # Their logs are cut off here: the next `last` must not find one of them. Of `last`, they are damaged.
            for path in later:
                checkpoint.remove_checkpoint(path)
        # The mark of a finished run, which this one is not any more.
        (self.folder / "train_results.json").unlink(missing_ok=True)
        if has_changed:
            self._describe_run()  # --resume_anyway: the next resume is one of the run as it is now.
        recover_folder(self.folder / "model")
        averaging.put_single_back(self.folder)
        averaging.remove_unused(self.folder, self.best.averaged_steps)
        self._truncate_tables()
        note = f"; done again: {', '.join(path.name for path in later)}" if later else ""
        said = f"resumed     from {self.checkpoint} at step {self.state.step} of {self.total_steps}{note}"
        print("\n".join([*self._describe(disk), said]), flush=True)

    def _open_tables(self) -> None:
        """The tables that grow with the run, as attributes."""
        self.log = runlog.TrainingLog(self.folder / "training_log.csv", self.log_columns)

    def _truncate_tables(self) -> None:
        """Back to what they were at the checkpoint."""
        self.log.truncate(self.state.log_bytes)
        if self._bad_batches_path.exists():
            runlog.BadBatchTable(self._bad_batches_path).truncate(self.state.bad_batch_bytes)

    def _note_table_lengths(self) -> None:
        """Into the state, for a checkpoint."""
        path, state = self._bad_batches_path, self.state
        state.log_bytes, state.bad_batch_bytes = self.log.length_bytes, path.stat().st_size if path.exists() else 0

    def _describe(self, disk: str) -> list[str]:
        """The screen at the start, one line per fact."""
        config, processes = self.config, self.accelerator.num_processes
        facts = describe_processes(self.accelerator)
        seconds = self.plan.num_samples.sum(dtype=np.int64) / SAMPLE_RATE_HZ
        drops = ", ".join(f"{reason} {count}" for reason, count in self.selection.drops_by_reason.items()) or "none"
        size = self.state.utterances_per_update
        return [
            f"data        {config.data_named}: {len(self.plan.rows)} training utterances, {seconds / 3600:.2f} h; "
            f"evaluation on {len(self.eval_rows)} of {self.eval_set.folder}",
            f"left out    {drops}",
            *self._describe_sampling(),
            *self._describe_model(),
            f"update      {config.per_device_train_batch_size} per micro-batch x {config.gradient_accumulation_steps} "
            f"accumulated x {processes} processes = {self.utterances_per_update} utterances"
            + (f", {size} as the run began with" if size != self.utterances_per_update else "")
            + f", {self.plan.samples_per_epoch / SAMPLE_RATE_HZ / len(self.plan.rows) * size:.0f} s of audio"
            + (f"; cut at {self.max_batch_seconds:g} s of padded audio" if self.max_batch_seconds else ""),
            f"run         {self.total_steps} updates, {self.plan.updates_per_epoch} per epoch; precision "
            f"{facts['mixed_precision']} on {facts['device']}, {facts['distributed_type']}; seed {config.seed}",
            *([f"levers      {turned_on}"] if (turned_on := self._levers()) else []),
            f"evaluation  {self._describe_evaluations()}",
            f"disk        {disk}",
        ]

    def _describe_weights(self) -> list[str]:
        trained, frozen = parameter_counts(self.model)
        name = self.config.model_name_or_path or f"{self.hf_config.model_type} from random weights"
        return [
            f"model       {name}: {trained:,} parameters trained, {frozen:,} frozen",
            *(f"            {note}" for note in self.loaded.notes),
        ]

    def _describe_sampling(self) -> list[str]:
        lines = [] if self.sampling is None else sampling.describe(self.sampling)
        return [f"{'' if number else 'sampling':<12}{line}" for number, line in enumerate(lines)]

    def _describe_evaluations(self) -> str:
        """How often, on how much, and what share of the run that takes: known before the first night is lost to it."""
        passes, always = self._evaluation_passes()
        cost = EVALUATION_COST * float(self.eval_set.num_samples[self.eval_rows].mean())  # of one dev clip
        evaluated = cost * len(self.eval_rows) * passes + EVALUATION_COST * always
        trained = self._samples_per_update * self.total_steps
        share = evaluated / (evaluated + trained)
        clips = f"{len(self.eval_rows):,} of {len(self.eval_set):,} clips"
        rest = [", and the test set"] if self.test_set is not None else []
        rest += [", and all of dev at the end"] if self._scores_all_of_dev else []
        rest += [", and the mean of the best"] if self.config.average_best is not None else []
        said = f"{clips}, {passes} times{''.join(rest)}: about {share:.0%} of the run"
        if share < LARGE_EVALUATION or self.config.eval_split == "train":
            return said
        if len(self.eval_rows) == len(self.eval_set):
            # A subset brings one pass over all of dev at the end.
            always += float(self.eval_set.num_samples.sum(dtype=np.int64))
        fewer = int((trained / 9 - EVALUATION_COST * always) / (cost * passes))  # a tenth of the run
        if fewer < MIN_EVALUATION:
            return f"{said}; raise --eval_steps, or set --max_eval_samples"
        return f"{said}; --max_eval_samples {fewer} would make it 10%, and the best model is scored on all at the end"

    def _evaluation_passes(self) -> tuple[int, float]:
        """How often the dev rows are scored, and the samples of what else is: the test set, all of dev at the end."""
        before = int(self.is_scored_before)
        always = 0.0
        if self.test_set is not None:
            always += float(self.test_set.num_samples.sum(dtype=np.int64)) * (1 + before)
        if self._scores_all_of_dev:
            always += float(self.eval_set.num_samples.sum(dtype=np.int64))
        evaluations = math.ceil(self.total_steps / self.config.eval_steps) * self._scored_weights + before
        return evaluations, always + self._averages_scored * float(self._eval_samples)

    @property
    def _eval_samples(self) -> int:
        """Samples of the dev rows that are scored while training."""
        return int(self.eval_set.num_samples[self.eval_rows].sum(dtype=np.int64))

    @property
    def _scored_weights(self) -> int:
        """Sets of weights that an evaluation scores: those of the updates, and their moving average."""
        return 1 if self.ema is None else 2

    @property
    def _averages_scored(self) -> int:
        """At the end: the mean of the best."""
        return int(self.config.average_best is not None)

    @property
    def _scores_all_of_dev(self) -> bool:
        """At the end, with the best model, where training looks at a subset."""
        return self.config.eval_split == "dev" and len(self.eval_rows) < len(self.eval_set)

    def _check_disk(self) -> str:
        finding = preflight.check_disk(self.folder, preflight.disk_bytes(self))
        if finding.verdict == "refused":
            raise UsageError(f"{finding.result}: {finding.remedy}")
        return finding.result

    # How long it takes

    def seconds_left(self) -> float | None:
        """Until the end of the run, final scoring included; None before this process' first update."""
        step, total = self.state.step, self.total_steps
        dev, rest, update = self._audio_seconds
        evaluations, saves = (
            math.ceil(total / every) - step // every for every in (self.config.eval_steps, self.config.save_steps)
        )
        left = Work(total - step, evaluations * self._scored_weights * dev + rest, saves)
        return seconds_left(self.work_done, left, self.clock.spent, EVALUATION_COST / update)

    @functools.cached_property
    def _audio_seconds(self) -> tuple[float, float, float]:
        """Of an evaluation, of what is scored once at the end, and of a mean update: summed once, asked each update."""
        rest = [self.test_set] if self.test_set is not None else []
        rest += [self.eval_set] if self._scores_all_of_dev else []
        samples = (
            float(self._eval_samples),
            float(
                sum(one.num_samples.sum(dtype=np.int64) for one in rest) + self._averages_scored * self._eval_samples
            ),
            self._samples_per_update,
        )
        return tuple(number / SAMPLE_RATE_HZ for number in samples)

    @property
    def _samples_per_update(self) -> float:
        """Samples of audio in a mean update."""
        return self.plan.samples_per_epoch / len(self.plan.rows) * self.state.utterances_per_update

    @property
    def sums(self) -> dict[str, float]:
        """Of the whole run, up to the last row of the log."""
        return dict(zip((*METER_SUMS, *self.more_sums), self.state.sums, strict=True))

    def _no_sums(self) -> list[float]:
        return [0.0] * len((*METER_SUMS, *self.more_sums))

    def cost(self) -> dict[str, float]:
        """Of the whole run, resumes included: speed, padding, and the seconds of each phase."""
        sums = self.sums
        logged = runlog.read_log(self.log.path)
        phases = [logged[name].sum() + new for name, new in zip(PHASE_COLUMNS, self.clock.read(), strict=True)]
        elapsed = self._elapsed_seconds()
        return {
            "audio_hours_per_hour": sums["samples"] / SAMPLE_RATE_HZ / elapsed,
            "padding_fraction": 1 - sums["samples"] / max(sums["padded_samples"], 1),
            **dict(zip(PHASE_COLUMNS, map(float, phases), strict=True)),
            "elapsed_seconds": elapsed,
        }

    # What is written while training

    def log_training(self, progress: Progress) -> None:
        """A row for the updates since the last one."""
        self._log_row(self._training_values(), progress)

    @property
    def is_over(self) -> bool:
        """No update is left to do."""
        return self.state.step == self.total_steps or self.state.stopped_early_at_step is not None

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Save a checkpoint when the block is left because all ranks have agreed to stop."""
        try:
            yield
        except Stopped:
            self.save_checkpoint()
            # The launcher ends the first rank in the midst of its save when another one has ended before it.
            self.status.worst(0)
            raise

    def save_checkpoint(self) -> None:
        """What a resume needs; older checkpoints go when the new one is whole."""
        with self.clock.phase("save"):
            self._save_checkpoint()
        self.work_done.saves += 1
        self.meter.start()

    def _save_checkpoint(self) -> None:
        state = self.state
        self.bad_updates.judge(self.write_bad_batches)
        state.pending_sums = list(self.meter.reduce().values())
        state.grad_norm, state.bad_in_a_row = float(self.meter.grad_norm), self.bad_updates.in_a_row
        state.pending_seconds = self.clock.read()
        state.elapsed_seconds = self._elapsed_seconds()
        self._started_at = time.monotonic()
        moments, optimizer = checkpoint.optimizer_tensors(self.model, self.optimizer.optimizer)
        averages = {} if self.ema is None else {f"{EMA_PREFIX}{name}": one for name, one in self.ema.tensors.items()}
        weights = gather_tensors(self.weights_to_keep(), self.is_main)
        moments, averages = gather_tensors(moments, self.is_main), gather_tensors(averages, self.is_main)
        if self.is_main:
            self._note_table_lengths()
            tensors = {f"model/{name}": value for name, value in weights.items()} | averages
            if self.ema is not None:
                tensors[EMA_UPDATES] = self.ema.num_updates
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            facts = {"run": asdict(state), "optimizer": optimizer, "scaler": scaler}
            checkpoint.save_checkpoint(self.folder, state.step, tensors | moments, facts)
            checkpoint.prune_checkpoints(self.folder, self.config.save_total_limit)
            averaging.remove_unused(self.folder, self.best.averaged_steps)

    def write_bad_batches(self, rows: list[dict[str, object]]) -> None:
        """The clips of an update that was left out, of all ranks, into bad_batches.csv."""
        if self.is_main:
            runlog.BadBatchTable(self._bad_batches_path).append(*rows)
            culprits = [str(row["id"]) for row in rows if not math.isfinite(row["loss"])]
            named = f"; loss not finite: {', '.join(culprits[:SAMPLES_SHOWN])}" if culprits else ""
            self._report_loudly(f"update {rows[0]['step'] if rows else '?'} left out, not finite{named}")

    @property
    def _bad_batches_path(self) -> Path:
        return self.folder / "bad_batches.csv"

    def _report_retry(self, message: str) -> None:
        self.meter.count("oom_retries")
        self._report_loudly(message)

    def _report_loudly(self, message: str) -> None:
        """A line on stderr, from whichever rank it happened to."""
        rank = f"[rank {self.accelerator.process_index}] " if self.accelerator.num_processes > 1 else ""
        say(f"{rank}{message}", sys.stderr)

    def write_results(self, results: dict[str, object]) -> None:
        """`train_results.json`, the mark of a finished run."""
        self._write("train_results.json", json.dumps(results, indent=1))

    def training_results(self) -> dict[str, object]:
        """Hugging Face's names for the figures of the whole run."""
        state, sums = self.state, self.sums
        return {
            "epoch": state.step / self.plan.updates_per_epoch,
            "train_loss": sums["loss"] / max(sums["labels"], 1),
            "train_runtime": sums["seconds"],
            "train_samples": len(self.plan.rows),
            "train_hours": float(self.plan.num_samples.sum(dtype=np.int64)) / SAMPLE_RATE_HZ / 3600,
            "train_samples_per_second": sums["utterances"] / max(sums["seconds"], 1e-9),
            "train_steps_per_second": state.step / max(sums["seconds"], 1e-9),
            "metric_for_best_model": self.config.metric_for_best_model,
            "best_step": state.best_step,
            "best_weights": state.best_weights,
            f"best_{self.config.metric_for_best_model}": state.best_metric,
            **({} if state.stopped_early_at_step is None else _describe_stop(state)),
            **({"resumed_anyway": state.resumed_anyway} if state.resumed_anyway else {}),
        }

    def _values_of(self, sums: dict[str, float]) -> dict[str, float]:
        """Columns that a kind of training makes of what the meter counted."""
        return {}

    def _training_values(self) -> dict[str, float]:
        """What the meter counted since the last row, which ends here."""
        self.bad_updates.judge(self.write_bad_batches)
        sums = self.meter.reduce()
        self.meter.clear()
        # Without labels all updates were left out.
        loss = sums["loss"] / sums["labels"] if sums["labels"] else math.nan
        grad_norm = float(self.meter.grad_norm)
        self.state.sums = [total + new for total, new in zip(self.state.sums, sums.values(), strict=True)]
        seconds = max(sums["seconds"], 1e-9)
        self.meter.note = f"loss {loss:.3f}"
        return {
            "train_loss": loss,
            **self._values_of(sums),
            "learning_rate": self.schedule.rate_at(self.state.step - 1),
            "grad_norm": grad_norm,
            "samples_per_second": sums["utterances"] / seconds,
            "audio_seconds_per_second": sums["samples"] / SAMPLE_RATE_HZ / seconds,
            "padding_fraction": 1 - sums["samples"] / max(sums["padded_samples"], 1),
            **{name: self.sums[name] for name in ("scaler_skips", "bad_updates", "oom_retries")},
        }

    def _log_row(self, values: dict[str, float], progress: Progress) -> None:
        row = {
            "step": self.state.step,
            "epoch": self.state.step / self.plan.updates_per_epoch,
            **values,
            **dict(zip(PHASE_COLUMNS, self.clock.read(), strict=True)),
            "peak_memory_mb": max(peak_bytes(self.accelerator.device), self.memory_limit.highest_bytes) / MEGABYTE,
            "elapsed_seconds": self._elapsed_seconds(),
        }
        if self.is_main:
            self.log.append(row)
            progress.print(self.describe_row(row))
        if self.config.report_to:
            self.accelerator.log(values, step=self.state.step)
        self.clock.clear()
        self.meter.start()

    def describe_row(self, row: dict[str, float]) -> str:
        """One line for the screen."""
        parts = [f"step {row['step']}/{self.total_steps}", f"epoch {row['epoch']:.2f}"]
        if "train_loss" in row:
            parts.append(
                f"loss {row['train_loss']:.3f}, grad norm {row['grad_norm']:.2f}, lr {row['learning_rate']:.2e}"
            )
            parts.append(f"{row['samples_per_second']:.1f} utterances/s")
        return ", ".join([*parts, *self._describe_scores(row)])

    def _describe_scores(self, row: dict[str, float]) -> list[str]:
        """Of a row of the log that has an evaluation."""
        raise NotImplementedError

    def _elapsed_seconds(self) -> float:
        return self.state.elapsed_seconds + time.monotonic() - self._started_at

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, text)


def _describe_config(hf_config: object) -> dict[str, object]:
    """What a configuration says about the model (activations, dropouts, masks), not where it came from."""
    fields = json.loads(hf_config.to_json_string(use_diff=False))
    foreign = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    # The sizes and ids of tokens follow from the vocabulary.
    return {
        name: value
        for name, value in fields.items()
        if name not in (*foreign, "vocab_size") and not name.endswith("_token_id")
    }


def _describe_stop(state: RunState) -> dict[str, object]:
    return {name: getattr(state, name) for name in ("stopped_early_at_step", "stopped_early_because")}


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: the checkpoint to resume from, by any name that --resume_from_checkpoint takes, or None."""

    resume_from_checkpoint: str | None = None
    is_finished: bool = False


def choose_beginning(config: RunSettings) -> Beginning:
    """With `auto` decided: `last` where there is a checkpoint, else a fresh start, or nothing to do any more.

    A new run needs a folder of its own, and `auto` may also begin again where a run was killed before its first
    checkpoint.

    Raises:
        UsageError: --output_dir holds a run (with the command that resumes it) or anything else.
    """
    folder, which = Path(config.output_dir), config.resume_from_checkpoint
    if which not in (None, "auto"):
        return Beginning(which)
    if which == "auto":
        if (folder / "train_results.json").is_file():
            return Beginning(is_finished=True)
        if checkpoint.has_checkpoints(folder):
            return Beginning("last")
    if folder.exists():
        _refuse_occupied(folder, config.command, is_auto=which == "auto")
    return Beginning()


def _refuse_occupied(folder: Path, command: str, is_auto: bool) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    names = {name.removesuffix(UNFINISHED).removesuffix(ASIDE) for name in names}  # left by a kill
    names = {name for name in names if not name.startswith(TOKEN_PREFIX)}  # by a kill, too
    # preflight.py may have written its report there.
    if folder.is_dir() and names <= set(RUN_FILES if is_auto else preflight.REPORT_FILES):
        return
    elsewhere = "start over with another --output_dir"
    if not (folder / "config.yaml").is_file() or is_auto:
        foreign = ", ".join(sorted(names - set(RUN_FILES) or names)[:3])
        raise UsageError(f"--output_dir {folder} is not an empty folder, it holds {foreign}: {elsewhere}")
    resume = f"{command} --config {folder / 'config.yaml'} --resume_from_checkpoint"
    if not checkpoint.has_checkpoints(folder):
        raise UsageError(
            f"{folder} holds a run that stopped before its first checkpoint: begin it again with {resume} auto, or "
            f"{elsewhere}"
        )
    state = "a finished run" if (folder / "train_results.json").is_file() else "a run"
    raise UsageError(f"{folder} holds {state}: resume it with {resume} last, or {elsewhere}")


def _remove_leftovers(folder: Path) -> None:
    """Of a run that was killed before its first checkpoint; `choose_beginning` has allowed it."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
