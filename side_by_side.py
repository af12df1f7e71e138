"""The texts of an evaluation: greedy ones, and beside them those of a beam search with a language model.

N: utterances of the evaluation.
"""

import contextlib
import dataclasses
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from rich import box
from rich.table import Table
from rich.text import Text

from audio import SAMPLE_RATE_HZ
from config import EvaluateConfig
from data import Batch
from decoding import BeamSettings, can_spell, choose_settings
from decoding_pool import DecodingPool, Finished, choose_num_workers
from error_classes import ErrorClasses
from language_model import LanguageModel, open_language_model
from metrics import LetterCounts, Score, TextScore, score_text
from model_scorer import ModelScorer
from pretrained import find_checkpoint_folder, weights_checksum
from progress import print_table
from result_layout import COUNT_COLUMNS
from results import TextSpool
from scoring import Evaluation, sum_counts


@dataclass(frozen=True)
class Outcome:
    """One reading of all utterances.

    Attributes:
        evaluation: scores and counts, the same on every rank.
        texts: on the first rank.
        facts: for results.json, beside the figures that every reading has.
    """

    evaluation: Evaluation
    texts: TextSpool
    facts: dict[str, object]


class GreedyTexts:
    """The greedy texts; a context manager."""

    def __init__(self, scorer: ModelScorer) -> None:
        self._scorer, self._texts = scorer, TextSpool()

    def __enter__(self) -> "GreedyTexts":
        self._texts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._texts.__exit__(*error)

    def see(self, batch: Batch, texts: list[TextScore]) -> None:
        """Keep the texts of a batch."""
        for row, reference, text in zip(batch.rows.tolist(), batch.texts, texts, strict=True):
            self._texts.add(row, reference, text.hypothesis)

    def finish(self, evaluation: Evaluation) -> Outcome:
        """Bring the ranks together."""
        self._texts.collect(self._scorer.accelerator, self._scorer.status)
        return Outcome(evaluation, self._texts, {})


@dataclass(frozen=True)
class Item:
    """An utterance on its way through the beam search."""

    row: int
    reference: str
    raw_reference: str
    greedy: str


class BeamTexts:
    """The utterances of an evaluation, decoded with a language model beside the greedy texts; a context manager.

    Args:
        scorer: keeps the log-probabilities of its batches.
        rows: of the evaluation, ascending, [N].
        model: the language model.
        settings: of the beam search.
        num_workers: processes; 0 decodes here.
    """

    def __init__(
        self, scorer: ModelScorer, rows: np.ndarray, model: LanguageModel, settings: BeamSettings, num_workers: int
    ) -> None:
        self._scorer, self._rows, self.num_workers = scorer, rows, num_workers
        self.model, self.settings = model, settings
        self._pool: DecodingPool[Item] = DecodingPool(scorer.vocabulary, model, settings, num_workers)
        self._words = frozenset(word for word in model.words() if can_spell(word, scorer.vocabulary))
        self._counts = np.zeros((len(rows), len(COUNT_COLUMNS)), np.int64)
        self._score, self._classes = Score(), ErrorClasses()
        self._letters = LetterCounts(scorer.normalizer.digraphs)
        self._seconds, self._unlisted_words = 0.0, 0
        self._texts = TextSpool()
        self._stack = contextlib.ExitStack()

    @classmethod
    def of(cls, config: EvaluateConfig, scorer: ModelScorer, rows: np.ndarray) -> "BeamTexts":
        """With the weights of the flags, else with those that `tune` found.

        Raises:
            UsageError: the extra `lm` is not installed, or the language model cannot be used.
        """
        model = open_language_model(Path(config.lm))
        settings = choose_settings(model, config.lm_weight, config.word_score, config.beam_size)
        of_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(scorer, rows, model, settings, choose_num_workers(config.beam_workers, of_this_host))

    def __enter__(self) -> "BeamTexts":
        self._stack.enter_context(self._texts)
        self._stack.enter_context(self._pool)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def see(self, batch: Batch, texts: list[TextScore]) -> None:
        """Hand in a batch that was scored greedily."""
        rows = batch.rows.tolist()
        for row, *own in zip(rows, batch.texts, batch.raw_texts, (text.hypothesis for text in texts), strict=True):
            for finished in self._pool.submit(Item(row, *own), self._scorer.take_log_probs(row)):
                self._count(finished)

    def _count(self, finished: Finished[Item]) -> None:
        item, hypothesis = finished.item, finished.decoded.text
        text = score_text(item.reference, item.raw_reference, hypothesis)
        self._counts[np.searchsorted(self._rows, item.row)] = text.counts
        self._score += text.score + Score(empty_hypotheses=int(not hypothesis))
        self._letters.add(item.reference, hypothesis)
        self._classes.add(item.reference, item.greedy, hypothesis)
        self._unlisted_words += sum(word not in self._words for word in item.reference.split())
        self._seconds += finished.seconds
        self._texts.add(item.row, item.reference, hypothesis)

    def finish(self, greedy: Evaluation) -> Outcome:
        """Wait for the rest and bring the ranks together.

        Args:
            greedy: the evaluation of the same utterances; its frames and losses are those of this one too.

        Raises:
            RunFailed: a process of the beam search died.
        """
        for finished in self._pool.finish():
            self._count(finished)
        accelerator = self._scorer.accelerator
        self._texts.collect(accelerator, self._scorer.status)
        own = (
            self._score,
            self._letters,
            self._classes,
            self._seconds,
            self._scorer.forward_seconds,
            self._unlisted_words,
        )
        scores, letters, classes, seconds, forward_seconds, unlisted = zip(*gather_object([own]), strict=True)
        score = sum(scores, Score())
        decoded = ("words", "characters", "raw_words", "utterances_with_error", "empty_hypotheses")
        score = dataclasses.replace(greedy.score, **{name: getattr(score, name) for name in decoded})
        audio_seconds = float(self._scorer.dataset.num_samples[greedy.rows].sum() / SAMPLE_RATE_HZ)
        facts = {
            "language_model": self._describe_model(),
            "unlisted_words": sum(unlisted),
            "audio_seconds_per_second": {
                "recogniser": audio_seconds / max(sum(forward_seconds), 1e-9),
                "beam_search": audio_seconds / max(sum(seconds), 1e-9),
            },
            "beam_processes": self.num_workers * accelerator.num_processes,
            "error_classes": sum(classes, ErrorClasses()).facts(),
        }
        counts = sum_counts(accelerator, self._counts)
        evaluation = Evaluation(score, greedy.rows, counts, sum(letters, LetterCounts()))
        return Outcome(evaluation, self._texts, facts)

    def _describe_model(self) -> dict[str, object]:
        model, tuned = self.model, self.model.tuning()
        facts = {"folder": str(model.folder), "unit": model.unit, "order": model.order, "sha256": model.sha256}
        facts |= asdict(self.settings)
        chosen = (self.settings.lm_weight, self.settings.word_score)
        if tuned is None or chosen != (tuned["lm_weight"], tuned["word_score"]):
            return facts | {"tuned_on": None, "is_tuned_for_this_model": False}
        own = weights_checksum(find_checkpoint_folder(self._scorer.config.model_name_or_path))
        return facts | {"tuned_on": tuned.get("data"), "is_tuned_for_this_model": tuned.get("model_sha256") == own}


def describe_reading(facts: dict[str, object]) -> list[str]:
    """What was used, and how fast it was."""
    model, speed = facts["language_model"], facts["audio_seconds_per_second"]
    weights = f"weight {model['lm_weight']:g}, score {model['word_score']:g}, beam {model['beam_size']}"
    lines = [f"with the language model {model['folder']} ({model['unit']}s, order {model['order']}; {weights})"]
    if model["tuned_on"] is None:
        lines.append("  these weights were not tuned: decoding.py tune finds them on dev")
    elif not model["is_tuned_for_this_model"]:
        lines.append(f"  the weights were tuned on {model['tuned_on']} for another recogniser: run decoding.py tune")
    if model["unit"] == "word" and facts["unlisted_words"]:
        share = facts["unlisted_words"] / max(facts["error_classes"]["words"], 1)
        lines.append(f"  {share:.1%} of the references' words are not in its list and cannot be written")
    lines.append(
        f"  speed: the recogniser {speed['recogniser']:,.0f} s of audio per second on each device, the beam search "
        f"{speed['beam_search']:,.0f} on each core ({facts['beam_processes'] or 'no'} processes)"
    )
    return lines


def print_error_classes(facts: dict[str, object]) -> None:
    """What the language model mends and what it breaks, by class."""
    table = Table("words with an error", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("greedy", "with LM", "mended", "broken"):
        table.add_column(name, justify="right")
    rows = facts["classes"]
    for name, row in rows.items():
        table.add_row(name, *(Text(f"{count:,}") for count in row.values()))
    totals = (sum(row[column] for row in rows.values()) for column in next(iter(rows.values())))
    table.add_row(f"all, of {facts['words']:,} words", *(Text(f"{total:,}") for total in totals))
    print_table(table)
