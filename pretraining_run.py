"""One run of pre-training: data without texts, the objective of `pretraining.py`, its log, its model/.

Dimension letters: B utterances, G groups of codes, V codes of a group.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import card
import levers
import runlog
from audio_checks import check_audio
from best_model import TRAINED, BestModel, Figures
from checkpoint import check_tensors
from config import PretrainConfig
from data import Batch, Update, Utterance
from errors import RunFailed
from findings import Finding
from foundation import Foundation
from memory import evaluation_mode
from overlap import SHARED_AUDIO, find_overlap
from pretrained import check_pretraining_folder, load_pretraining_model, save_pretraining_model
from pretraining import (
    PretrainingStatistics,
    collapse_reason,
    diversity,
    gumbel_temperature,
    is_sound,
    perplexity,
    pretraining_losses,
)
from pretraining_data import PretrainingBatch, PretrainingCollator, shortest_samples
from processes import main_first
from progress import Progress
from scoring import OTHER_IS_OUT_OF_MEMORY, pass_over
from selection import select_untranscribed_rows
from training_run import TrainingRun


class PretrainingFoundation(Foundation):
    """What pre-training works with, ready for the first step."""

    config: PretrainConfig

    def __init__(self, config: PretrainConfig, accelerator: Accelerator) -> None:
        self._marginal_GV: torch.Tensor | None = None
        self._temperature = config.max_gumbel_temperature
        self._statistics: list[PretrainingStatistics] = []
        super().__init__(config, accelerator)

    def _load_model(self) -> None:
        config = self.config
        self.loaded = load_pretraining_model(config)
        self.hf_config = self.loaded.model.hf.config
        do_normalize = self.loaded.feature_extractor.do_normalize
        self.collate = PretrainingCollator(do_normalize, self.hf_config, config.masks, config.seed)
        self._place_model(self.loaded.model)
        self._make_optimizer()

    def _select(self) -> None:
        with main_first(self.accelerator):
            self.overlap = find_overlap(self.sets, self.cache)
        shortest = shortest_samples(self.config.masks, self.hf_config)
        self.selection = select_untranscribed_rows(self.train_set, self.config, self.overlap, shortest)

    def check_data(self) -> tuple[list[Finding], list[str]]:
        """What the preflight finds in the clips; there are no texts to show."""
        shared = [finding for finding in self.overlap.findings if finding.check == SHARED_AUDIO]
        return [*self.selection.findings, *self.check_sampling(), *check_audio(self.sets), *shared], []

    @property
    def num_labels(self) -> None:
        """The frames to predict are drawn anew in each epoch: the loader counts them."""
        return None

    # Of an update

    def _temperature_at(self, step: int) -> float:
        config = self.config
        return gumbel_temperature(
            step, config.max_gumbel_temperature, config.min_gumbel_temperature, config.gumbel_temperature_decay
        )

    def begin_step(self, update: Update) -> None:
        """Measure the mean use of the codes over the whole update, where no single micro-batch is that."""
        self._temperature = self._temperature_at(update.step)
        self._marginal_GV = None
        if self.accelerator.num_processes > 1 or len(update.micro_batches) > 1:
            self._marginal_GV = self._measure(update)

    def begin_passes(self, update: Update) -> None:
        """Forget the statistics of a try that ran out of memory; its micro-batch is cut now."""
        self._statistics = []
        if self._marginal_GV is None and self.cuts.max_padded_samples is not None:
            self._marginal_GV = self._measure(update)

    def _measure(self, update: Update) -> torch.Tensor:
        """Mean probabilities of the codes over the masked frames of the update, all ranks together, [G, V].

        Raises:
            RunFailed: a single clip does not fit into the memory of one rank.
        """
        self.model.train()
        sums_GV, failure = None, None
        try:
            while sums_GV is None:
                sums_GV = self.cuts.attempt(lambda: self._sum_codes(update))
        except RunFailed as error:
            failure = error
        (has_failed,) = self.status.worst(int(failure is not None))
        if has_failed:
            raise failure or RunFailed(OTHER_IS_OUT_OF_MEMORY)
        return self.accelerator.reduce(sums_GV, reduction="sum") / max(update.num_labels, 1)

    def _sum_codes(self, update: Update) -> torch.Tensor:
        """Of this rank's micro-batches, [G, V]."""
        device, model = self.accelerator.device, self.model
        sums_GV = torch.zeros(model.num_groups, model.num_codes // model.num_groups, device=device)
        for batch in self.cuts.divide(update.micro_batches):
            with self.memory_limit.watch(), self.accelerator.autocast():
                sums_GV += model.code_prob_sum(batch.to(device))
        return sums_GV

    def training_losses(self, batch: PretrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrastive and diversity loss per utterance, loss_B, and what has their gradient, objective_B."""
        loss_B, objective_B, statistics = self._losses(batch, self._marginal_GV)
        self._statistics.append(statistics)
        return loss_B, objective_B

    def _losses(
        self, batch: PretrainingBatch, marginal_GV: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, PretrainingStatistics]:
        with self.accelerator.autocast():
            batch = batch.to(self.accelerator.device)
            return pretraining_losses(self.model, batch, marginal_GV, self._temperature)

    # Probes of memory

    def probe_batch(self, batch: Batch) -> PretrainingBatch:
        """Noise as a training step would get it, masked as it would be."""
        return self._masked(batch, epoch=0)

    def _masked(self, batch: Batch, epoch: int | None) -> PretrainingBatch:
        audio = [np.zeros(length, np.int16) for length in batch.sample_lengths_B.tolist()]
        utterances = [Utterance(name, audio_S, "") for name, audio_S in zip(batch.ids, audio, strict=True)]
        masked = self.collate(utterances, batch.rows, epoch)
        masked.input_values_BS.copy_(batch.input_values_BS)
        return masked

    def _evaluation_pass(self, batch: Batch) -> None:
        with evaluation_mode(self.model):
            self._losses(self._masked(batch, epoch=None))


class PretrainedModel(BestModel):
    """model/: what train.py, and transformers' own class, begin with."""

    def _check_written(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        check_tensors(folder / "model.safetensors", weights)

    def _write_probe(self) -> None:
        """Nothing is decoded: the weights are compared one by one."""

    def _check_opening(self, folder: Path) -> None:
        check_pretraining_folder(folder, self.run.loaded)


class PretrainingRun(TrainingRun, PretrainingFoundation):
    """A run of pretrain.py."""

    log_columns = tuple(runlog.PRETRAINING_COLUMNS)
    more_sums = ("contrastive", "correct", "perplexity", "counted_updates")
    is_scored_before = True

    def _kind_identity(self) -> dict[str, object]:
        names = [name for part in levers.PRETRAINING for name in part.__dataclass_fields__]
        names += ["weight_decay", "max_gumbel_temperature", "min_gumbel_temperature", "gumbel_temperature_decay"]
        return {name: getattr(self.config, name) for name in names}

    def _best_model(self) -> BestModel:
        return PretrainedModel(self)

    def _describe_model(self) -> list[str]:
        masks, model = self.config.masks, self.model
        share = f"mask_time_prob {masks.mask_time_prob:g} in spans of {masks.mask_time_length} frames"
        codes = f"{model.num_codes} codes in {model.num_groups} groups, {self.hf_config.num_negatives} distractors"
        return [f"objective   {share}; {codes}", *self._describe_weights()]

    def _levers(self) -> str:
        return levers.describe(self.config, levers.PRETRAINING)

    @property
    def _scores_all_of_dev(self) -> bool:
        """Never: the dev loss chooses among the run's own weights, and is no result."""
        return False

    # Counting

    def count(self, update: Update, loss_sum: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Count an update, with what its loss was made of."""
        values = torch.zeros(len(self.more_sums), dtype=torch.float64, device=self.accelerator.device)
        for one in self._statistics:
            values[0] += one.contrastive_B.sum()
            values[1] += one.correct_B.sum()
        if self.is_main:
            values[2], values[3] = perplexity(self._used_codes(update)), 1.0
        self.meter.add(update, loss_sum, grad_norm, values)

    def _used_codes(self, update: Update) -> torch.Tensor:
        if self._marginal_GV is not None:
            return self._marginal_GV
        (statistics,) = self._statistics
        return statistics.code_prob_sum_BGV.sum(dim=0) / update.num_labels

    def _values_of(self, sums: dict[str, float]) -> dict[str, float]:
        targets, updates = sums["labels"], sums["counted_updates"]
        if not targets or not updates:  # all were left out
            return {}
        used = sums["perplexity"] / updates
        return {
            "contrastive_loss": sums["contrastive"] / targets,
            "diversity_loss": 1 - used / self.model.num_codes,
            "code_perplexity": used,
            "accuracy": sums["correct"] / targets,
            "gumbel_temperature": self._temperature_at(self.state.step - 1),
        }

    def _log_row(self, values: dict[str, float], progress: Progress) -> None:
        super()._log_row(values, progress)

        def judge() -> str | None:
            history = runlog.read_log(self.log.path).to_dict("records")
            model = self.model
            return collapse_reason(history, model.num_groups, model.num_codes, self.schedule.warmup_steps)

        if reason := self.status.decide_first(self.is_main, judge):
            step = self.state.best_step
            kept = "no model/ was written" if step is None else f"model/ is of step {step}, before that"
            raise RunFailed(f"{reason}; {kept}")

    # Evaluation

    @torch.no_grad()
    def evaluate(self, progress: Progress) -> None:
        """Score the dev rows with masks that are always the same, log the row, and keep model/ if it is the best."""
        self.meter.pause()
        started_at = time.perf_counter()
        with self.clock.phase("evaluation"):
            figures = self._score()
        self.work_done.eval_seconds += self._audio_seconds[0]
        values = self._training_values() if self.state.step else {}
        values |= figures | {"eval_runtime": time.perf_counter() - started_at}
        self._log_row(values, progress)
        may_keep = self.status.decide_first(self.is_main, lambda: self._draw_and_judge(figures, progress))
        if self.state.step and may_keep:
            self.best.take(TRAINED, figures)
        self.meter.start()

    def _draw_and_judge(self, figures: Figures, progress: Progress) -> bool:
        """The plot; and whether this model may be kept: not one whose loss is low because it is losing its codes."""
        log = runlog.read_log(self.log.path)
        runlog.draw_pretraining_curve(log, self.folder / "training_curve.png", self.model.num_codes)
        before = log.loc[log["step"] < self.state.step, "eval_code_perplexity"].max()
        highest = 0.0 if math.isnan(before) else float(before)
        may_keep = is_sound(figures.get("eval_code_perplexity", math.nan), highest, self.model.num_groups)
        if self.state.step and not may_keep:
            progress.print("    not kept as model/: too few codes are in use, which makes the loss low by itself")
        return may_keep

    def _score(self) -> Figures:
        model = self.model
        sums = torch.zeros(3, dtype=torch.float64)
        codes_GV = torch.zeros(model.num_groups, model.num_codes // model.num_groups, dtype=torch.float64)

        def take(batch: PretrainingBatch) -> None:
            for one in self._statistics_in_cuts(batch):
                parts = (one.contrastive_B, one.correct_B, one.masked_B)
                sums.add_(torch.stack([part.double().sum() for part in parts]).cpu())
                codes_GV.add_(one.code_prob_sum_BGV.double().sum(dim=0).cpu())

        pass_over(self, self.eval_set, self.eval_rows, "evaluating", take)
        everything = torch.cat([sums, codes_GV.flatten()]).to(self.accelerator.device)
        reduced = self.accelerator.reduce(everything, reduction="sum").cpu()
        contrastive, correct, masked = reduced[:3].tolist()
        if not masked:
            return {"eval_loss": math.nan, "eval_contrastive_loss": math.nan, "eval_accuracy": math.nan}
        marginal_GV = reduced[3:].reshape(codes_GV.shape) / masked
        unused = float(diversity(marginal_GV))
        return {
            "eval_loss": contrastive / masked + self.hf_config.diversity_loss_weight * unused,
            "eval_contrastive_loss": contrastive / masked,
            "eval_diversity_loss": unused,
            "eval_code_perplexity": float(perplexity(marginal_GV)),
            "eval_accuracy": correct / masked,
        }

    def _statistics_in_cuts(self, batch: PretrainingBatch) -> list[PretrainingStatistics]:
        """Of one batch, in smaller cuts when memory runs out: the sums are the same."""

        def score() -> list[PretrainingStatistics]:
            found = []
            for piece in self.eval_cuts.divide([batch]):
                with self.memory_limit.watch():
                    found.append(self._losses(piece)[2])
            return found

        while (found := self.eval_cuts.attempt(score)) is None:
            pass
        return found

    def _describe_scores(self, row: dict[str, float]) -> list[str]:
        parts = []
        if "accuracy" in row:
            parts.append(f"accuracy {row['accuracy']:.1%}, perplexity {row['code_perplexity']:.0f}")
        if "eval_loss" in row:
            parts.append(
                f"dev loss {row['eval_loss']:.3f}, accuracy {row['eval_accuracy']:.1%}, perplexity "
                f"{row.get('eval_code_perplexity', math.nan):.0f} of {self.model.num_codes}, evaluated in "
                f"{row['eval_runtime']:.1f} s"
            )
        return parts

    # The end

    def save_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Weights, feature extractor and card."""
        save_pretraining_model(self.loaded, folder, weights)
        card.write_pretraining_card(folder, self)

    def training_results(self) -> dict[str, object]:
        """Hugging Face's names for the figures of the whole run."""
        sums = self.sums
        whole = self._values_of(sums)
        return super().training_results() | {
            "train_contrastive_loss": whole.get("contrastive_loss"),
            "train_accuracy": whole.get("accuracy"),
        }
