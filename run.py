"""One run of fine-tuning: how a recogniser is logged, scored by groups, diagnosed and described."""

import csv
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

import card
import diagnosis
import levers
import runlog
from assembly import Assembly
from best_model import EMA, TRAINED, figures_of
from data import ShardDataset
from joined import CORPUS
from letters import describe_letters
from levers import METRICS
from model import num_frames
from pretrained import save_model
from progress import Progress
from scoring import Evaluation, describe_limits
from selection import draw_subset
from slices import Breakdown, Slice, describe_slice
from text import write_rules
from training_run import TrainingRun

SAMPLES_SHOWN = 3


class Run(TrainingRun, Assembly):
    """A run of train.py."""

    log_columns = tuple(runlog.LOG_COLUMNS)

    @property
    def is_scored_before(self) -> bool:
        """Its head was trained for this very vocabulary."""
        return self.head_fits

    # Setting up

    def _kind_identity(self) -> dict[str, object]:
        augmenter = self.collate.augmenter
        return {
            "the vocabulary": dict(self.vocabulary.token_ids),
            "case": self.normalizer.case,
            "characters_to_ignore": self.normalizer.characters_to_ignore,
            "target_lang": self.config.target_lang,
            "language": [own.facts() for own in self.normalizer.languages],
            **({} if augmenter is None else {"the noises and rooms": augmenter.fingerprint}),
            **{name: getattr(self.config, name) for name in levers.IDENTITY},
        }

    def _open_tables(self) -> None:
        super()._open_tables()
        self.samples = runlog.SampleTable(self.folder / "eval_samples.csv")
        self.slices = runlog.SliceTable(self.folder / "eval_slices.csv")

    def _truncate_tables(self) -> None:
        super()._truncate_tables()
        self.samples.truncate(self.state.sample_bytes)
        self.slices.truncate(self.state.slice_bytes)

    def _note_table_lengths(self) -> None:
        super()._note_table_lengths()
        self.state.sample_bytes, self.state.slice_bytes = self.samples.length_bytes, self.slices.length_bytes

    def _describe_model(self) -> list[str]:
        text = f"text        case {self.normalizer.case}, vocabulary of {len(self.vocabulary)}"
        text += f", rules of {', '.join(self.config.languages)}" if self.config.languages else ""
        return [text, *self._describe_weights()]

    def _levers(self) -> str:
        return levers.describe(self.config)

    # How evaluations are divided

    @functools.cached_property
    def eval_breakdown(self) -> Breakdown:
        """Of the dev rows that are scored while training."""
        return self.breakdown(self.eval_set, self.eval_rows)

    @functools.cached_property
    def test_breakdown(self) -> Breakdown:
        """Of the test split."""
        return self.breakdown(self.test_set, np.arange(len(self.test_set)))

    def breakdown(self, dataset: ShardDataset, rows: np.ndarray) -> Breakdown:
        """Of `rows` of a split."""
        # Of what trains, all is known.
        trained = None if dataset is self.train_set else self.trained
        return Breakdown.of(dataset, rows, self.texts[dataset.folder.name].num_labels[rows], trained)

    def describe_sets(self, slices: list[Slice]) -> dict[str, list[dict[str, object]]]:
        """Of an evaluation each of several sets, for train_results.json."""
        if len(self.config.data_dirs) == 1:
            return {}
        names = ("group", "utterances", "wer", "wer_low", "wer_high", "cer")
        described = [describe_slice(one) for one in slices if one.name == CORPUS]
        return {"best_eval_sets": [{name: one.get(name) for name in names} for one in described]}

    def eval_of_sets(self) -> dict[str, list[dict[str, object]]]:
        """The same as eval_slices.csv has it at the best step."""
        if len(self.config.data_dirs) == 1:
            return {}
        with self.slices.path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["slice"] == CORPUS]
        rates = ("wer", "wer_low", "wer_high", "cer")
        sets = [
            {"group": row["group"], "utterances": int(row["utterances"])}
            | {name: float(row[name]) if row[name] else None for name in rates}
            for row in rows
            if int(row["step"]) == self.state.best_step
        ]
        return {"best_eval_sets": sets}

    # What is written while training

    def log_evaluation(
        self,
        evaluations: Mapping[str, Evaluation],
        started_at: float,
        samples: list[dict[str, object]],
        progress: Progress,
    ) -> None:
        """A row with the scores, the slices, the samples, the plot; and model/, when it is the best so far.

        Args:
            evaluations: of the dev rows, by what the weights are; the trained ones stand in the log's own columns.
            started_at: reading of time.perf_counter() before them.
            samples: rows for eval_samples.csv.
            progress: to print through.

        The slices are of the better weights, which may become model/.
        """
        figures = {name: figures_of(self, one) for name, one in evaluations.items()}
        chosen = self.best.choose(figures)
        slices = self.eval_breakdown.score(evaluations[chosen].counts) if self.is_main else []
        values = self._training_values() if self.state.step else {}
        values |= figures[TRAINED]
        if EMA in figures:
            values |= {f"ema_{name}": figures[EMA][name] for name in METRICS}
        values["eval_runtime"] = time.perf_counter() - started_at
        remarks = self._diagnose(values) if self.is_main else []
        is_normal = values.get("state") in diagnosis.NORMAL_STATES
        self._log_row(values, progress)
        if self.is_main:
            self.slices.append(*({"step": self.state.step} | describe_slice(one) for one in slices))
            self.samples.append(*samples)
            for sample in samples[:SAMPLES_SHOWN]:
                progress.print(f"    reference  {sample['reference']}\n    prediction {sample['prediction']}")
            for line in remarks:
                progress.print(line)
            runlog.draw_training_curve(runlog.read_log(self.log.path), self.folder / "training_curve.png")
        if self.state.step == 0:
            self.state.eval_wer_before = figures[TRAINED]["eval_wer"]
            return
        self.best.take(chosen, figures[chosen], describe_letters(evaluations[chosen].letters))
        because = self.best.judge_patience(figures[chosen], is_normal)
        if because and self.is_main:
            progress.print(f"stopping early at step {self.state.step} of {self.total_steps}: {because}")

    def _dev_texts(self, rows: np.ndarray) -> Iterator[str]:
        for row in rows:
            utterance = self.eval_set[int(row)]
            yield self.normalizer.for_set(utterance.corpus)(utterance.text)

    def _diagnose(self, values: dict[str, object]) -> list[str]:
        """Put the state of the run into the row of an evaluation; returns what is to be said."""
        config = self.config
        if self.state.deaf_loss is None:
            rows = draw_subset(self.eval_rows, diagnosis.MAX_DEAF_UTTERANCES, config.seed)
            self.state.deaf_loss = diagnosis.deaf_loss(
                [self.vocabulary.encode(text) for text in self._dev_texts(rows)],
                num_frames(self.eval_set.num_samples[rows], self.hf_config.conv_kernel, self.hf_config.conv_stride),
                len(self.vocabulary),
                self.vocabulary.blank_id,
            )
        facts = diagnosis.Facts(
            self.state.deaf_loss,
            self.schedule,
            hears_level=getattr(self.hf_config, "feat_extract_norm", "layer") != "group",
        )
        history = runlog.read_log(self.log.path).to_dict("records")
        values["eval_deaf_loss"] = self.state.deaf_loss
        values["state"], lines = diagnosis.remark([*history, {"step": self.state.step, **values}], facts)
        return lines

    def _describe_scores(self, row: dict[str, float]) -> list[str]:
        if "eval_wer" not in row:
            return []
        limits = describe_limits(row, "eval_wer", digits=1)
        parts = [f"dev loss {row['eval_loss']:.3f}, WER {row['eval_wer']:.2%}{limits}, CER {row['eval_cer']:.2%}"]
        if "ema_eval_wer" in row:
            parts.append(f"with averaged weights loss {row['ema_eval_loss']:.3f}, WER {row['ema_eval_wer']:.2%}")
        return [*parts, f"evaluated in {row['eval_runtime']:.1f} s"]

    def training_results(self) -> dict[str, object]:
        """Hugging Face's names for the figures of the whole run."""
        state = self.state
        return super().training_results() | {
            "best_eval_wer": state.best_eval_wer,
            **dict(zip(("best_eval_wer_low", "best_eval_wer_high"), state.best_eval_limits, strict=False)),
            "best_eval_cer": state.best_eval_cer,
            "eval_wer_before": state.eval_wer_before,
        }

    def save_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Weights, processor, text rules and card."""
        save_model(self.loaded, folder, weights)
        write_rules(folder, self.normalizer)
        card.write_card(folder, self, self.best.figures_of_model(self.training_results()))
