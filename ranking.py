"""How much each training clip looks wrong to a model: the scores behind evaluate.py --rank_train.

The score of a clip is what its transcript costs more than the labels that the model itself would choose,

    (CTC loss of the reference + sum over frames of the largest log-probability) / labels of the reference,

in nats per label. A noisy clip is expensive whatever its text says, and the second term takes that out. It is the
logarithm of a likelihood ratio, between the reference and the best path: about 0 where the model agrees.

What a wrong transcript would score is measured, not assumed: STRANGERS clips are scored with the transcript of another
clip of about their length as well. With R(c) the share of these above c, and p(c) the share of the corpus above it,
half of the wrong clips lie above the strangers' median m, where few right ones do: the share of wrong ones is about
w = p(m) / R(m) (Storey's estimate of the null share, turned round: https://doi.org/10.1111/1467-9868.00346). The
suggested cut is the c for which the expected F1, 2 w R(c) / (w + p(c)), is largest. Right clips that reach m, which a
weak model leaves there, count as wrong: w and the expected precision are the most that can be.

Measured on digits with a tenth of the transcripts exchanged (benchmarks/planted_errors.py): of as many clips as are
wrong, halves that judge each other find 72 % by this score, 69 % by the CTC loss per label, 46 % by the best path's
agreement, and by the speech rate fewer than by chance. A model that was trained on all of them for 400 updates finds
81: it has heard more, and has not yet learned the wrong ones by heart. One that has finds few, and which of the two a
model is cannot be seen from outside.

B utterances of a batch, T frames, V vocabulary, N clips of the training split.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from atomic import write_table
from audio import SAMPLE_RATE_HZ
from config import EvaluateConfig
from data import Batch, ShardDataset
from errors import RunFailed
from metrics import TextScore
from model import ctc_loss_sum, num_frames, sum_over_valid_frames
from model_scorer import ModelScorer
from result_layout import COUNT_COLUMNS, RANKING_COLUMNS
from results import TextSpool
from scoring import evaluate, sum_counts
from selection import Speaking, measure_speaking
from text import required_frames

# Clips that are scored with a transcript of another: a share is then known to 1.6 % at worst.
STRANGERS = 1_000
# A model whose best cut finds fewer wrong transcripts than this share lets right and wrong ones overlap.
CLEAR_RECALL = 0.8
# The table's digits: the order is that of what it shows, so that the last bits of a sum cannot change it.
DIGITS = 4
CHARACTER_COLUMNS = [COUNT_COLUMNS.index(f"character_{part}") for part in ("insertions", "deletions", "substitutions")]
CHARACTER_HITS = COUNT_COLUMNS.index("character_hits")
LOSS, BEST_PATH, STRANGER = range(3)


@dataclass(frozen=True)
class ClipMeasures:
    """What a model makes of the clips, [N] each; NaN where it did not score a clip.

    Attributes:
        loss_per_label: CTC loss of the reference, nats; infinite where CTC cannot align it.
        agreement: of the greedy hypothesis with the reference: 1 - character errors / longer of the two; 1 where both
            are empty.
        scores: see the top of this file.
        stranger_scores: the same with another clip's transcript, for STRANGERS of them.
    """

    loss_per_label: np.ndarray
    agreement: np.ndarray
    scores: np.ndarray
    stranger_scores: np.ndarray

    def filled_by(self, other: "ClipMeasures") -> "ClipMeasures":
        """With the other's values where this has none."""
        pairs = ((name, value, vars(other)[name]) for name, value in vars(self).items())
        return ClipMeasures(**{name: np.where(np.isnan(value), instead, value) for name, value, instead in pairs})


@dataclass(frozen=True)
class Cut:
    """Which scores are suggested for pruning, and what is expected of that.

    Attributes:
        score: clips above it are suggested; infinite where no clip seems wrong.
        wrong: how many transcripts are wrong in all, at most.
        precision: expected at the cut, at most; NaN where nothing is suggested.
        recall: expected at the cut; NaN where nothing is suggested.
    """

    score: float
    wrong: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Ranking:
    """The clips of a training split, most suspect first.

    Attributes:
        order: dataset rows, [N].
        measures: of each row.
        speaking: of each row.
        heard: whether a row trained the model that scored it, bool [N]; None where that is not known.
        cut: of the scores.
    """

    order: np.ndarray
    measures: ClipMeasures
    speaking: Speaking
    heard: np.ndarray | None
    cut: Cut

    @property
    def suggested(self) -> np.ndarray:
        """Rows above the cut, bool [N]; those that CTC cannot align are never trained on, and always above."""
        return self.measures.scores > min(self.cut.score, np.finfo(float).max)


class RankingScorer(ModelScorer):
    """A model over the training split that notes of each clip what `ClipMeasures` are made of: three numbers."""

    def __init__(self, config: EvaluateConfig, accelerator: Accelerator) -> None:
        super().__init__(replace(config, split="train"), accelerator)
        hf_config = self.model.hf.config
        frames = num_frames(self.dataset.num_samples.astype(np.int64), hf_config.conv_kernel, hf_config.conv_stride)
        self.can_align = self.texts.can_align(frames)
        usable = self.can_align & (self.texts.num_labels > 0)
        self.speaking = measure_speaking(self.dataset, self.texts.num_labels, usable)
        self.strangers = self._draw_strangers(np.flatnonzero(usable))
        self.losses = np.zeros((len(self.dataset), 3))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ModelScorer's; a batch that comes again in smaller cuts is noted again."""
        logits_BTV, frame_lengths_B, loss_B = super().forward(batch)
        best_B = best_path_loss(logits_BTV, frame_lengths_B)
        self.losses[batch.rows, LOSS], self.losses[batch.rows, BEST_PATH] = loss_B.cpu(), best_B.cpu()
        if places := [place for place, row in enumerate(batch.rows.tolist()) if row in self.strangers]:
            rows = batch.rows[places]
            self.losses[rows, STRANGER] = self._stranger_losses(rows, logits_BTV[places], frame_lengths_B[places])
        return logits_BTV, frame_lengths_B, loss_B

    def measure(self, rows: np.ndarray, spool: TextSpool) -> ClipMeasures:
        """Score `rows`, ascending, on all processes; ids, references and hypotheses go to `spool`.

        Raises:
            RunFailed: the model's outputs are not finite.
        """

        def see(batch: Batch, texts: list[TextScore]) -> None:
            for row, utterance_id, reference, text in zip(
                batch.rows.tolist(), batch.ids, batch.texts, texts, strict=True
            ):
                spool.add(row, utterance_id, reference, text.hypothesis)

        evaluation = evaluate(self, self.dataset, rows, "ranking train", see)
        losses = sum_counts(self.accelerator, self.losses)
        if not np.isfinite(losses[rows, :STRANGER]).all():
            row = int(rows[np.flatnonzero(~np.isfinite(losses[rows, :STRANGER]).all(1))[0]])
            raise RunFailed(f"the model's output for {self.dataset[row].id} is not finite: rank with another model")
        counts = np.zeros((len(self.dataset), len(COUNT_COLUMNS)), np.int64)
        counts[rows] = evaluation.counts
        of_rows = np.zeros(len(self.dataset), bool)
        of_rows[rows] = True
        return self._measures(of_rows, losses, counts)

    def _measures(self, of_rows: np.ndarray, losses: np.ndarray, counts: np.ndarray) -> ClipMeasures:
        labels = np.maximum(self.texts.num_labels, 1)
        stranger_labels, is_stranger = np.ones(len(labels)), np.zeros(len(labels), bool)
        for row, labels_L in self.strangers.items():
            stranger_labels[row], is_stranger[row] = len(labels_L), True
        loss = np.where(self.can_align, losses[:, LOSS], np.inf)
        excess = (loss - losses[:, BEST_PATH]) / labels
        stranger = (losses[:, STRANGER] - losses[:, BEST_PATH]) / stranger_labels
        values = (loss / labels, _agreement(counts), excess, np.where(is_stranger, stranger, np.nan))
        return ClipMeasures(*(np.where(of_rows, np.round(value, DIGITS), np.nan) for value in values))

    def _draw_strangers(self, usable: np.ndarray) -> dict[int, np.ndarray]:
        """For a fixed sample of rows the labels of another one of nearly the same length and of another text."""
        rng = np.random.default_rng([self.config.seed, 2])
        sample = np.sort(rng.permutation(usable)[:STRANGERS])
        texts = dict(zip(sample.tolist(), map(self.normalizer, self.dataset.column("text", sample)), strict=True))
        by_length = sample[np.argsort(self.dataset.num_samples[sample], kind="stable")].tolist()
        found = {}
        for place, row in enumerate(by_length):
            others = (texts[one] for one in [*by_length[place + 1 :], *by_length[:place]])
            if (text := next((one for one in others if one != texts[row]), None)) is not None:
                found[row] = self.vocabulary.encode(text)
        return found

    def _stranger_losses(self, rows: np.ndarray, logits_BTV: torch.Tensor, frame_lengths_B: torch.Tensor) -> np.ndarray:
        labels = [self.strangers[row] for row in rows.tolist()]
        lengths = torch.tensor([len(one) for one in labels])
        flat = torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(logits_BTV.device)
        loss_B = (
            ctc_loss_sum(logits_BTV, frame_lengths_B, flat, lengths, self.vocabulary.blank_id).double().cpu().numpy()
        )
        needed = np.array([required_frames(one) for one in labels])
        return np.where(frame_lengths_B.cpu().numpy() >= needed, loss_B, np.inf)


def best_path_loss(logits_BTV: torch.Tensor, frame_lengths_B: torch.Tensor) -> torch.Tensor:
    """-log of the probability of the best path of each row, best_B in nats, fp32."""
    with torch.autocast(logits_BTV.device.type, enabled=False):
        best_BT = logits_BTV.float().log_softmax(dim=-1).amax(dim=-1)
    return -sum_over_valid_frames(best_BT, frame_lengths_B)


def rank(measures: ClipMeasures, speaking: Speaking, heard: np.ndarray | None) -> Ranking:
    """Put the clips in order; equal scores stay in the order of the corpus."""
    order = np.argsort(-measures.scores, kind="stable")
    strangers = measures.stranger_scores[~np.isnan(measures.stranger_scores)]
    return Ranking(order, measures, speaking, heard, suggest_cut(measures.scores, strangers))


def suggest_cut(scores: np.ndarray, stranger_scores: np.ndarray) -> Cut:
    """Where the expected F1 is largest; see the top of this file.

    Args:
        scores: of the corpus, [N]; infinite ones, which never train, are not counted.
        stranger_scores: of clips with a wrong transcript; infinite where that cannot be aligned at all.
    """
    scores = np.sort(scores[np.isfinite(scores)])
    strangers = np.sort(stranger_scores[np.isfinite(stranger_scores)])
    nothing = Cut(math.inf, 0.0, math.nan, math.nan)
    if not len(strangers) or not len(scores):
        return nothing

    def share_above(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
        return 1 - np.searchsorted(values, limits, side="right") / len(values)

    median = np.median(strangers)[None]
    wrong = float(min(1.0, share_above(scores, median)[0] / max(share_above(strangers, median)[0], 1e-9)))
    if wrong * len(scores) < 1:
        return nothing
    recall, above = share_above(strangers, scores), share_above(scores, scores)
    best = int(np.argmax(2 * wrong * recall / (wrong + above)))
    precision = min(1.0, wrong * recall[best] / max(above[best], 1e-9))
    return Cut(float(scores[best]), wrong * len(scores), float(precision), float(recall[best]))


def write_ranking(path: Path, dataset: ShardDataset, ranking: Ranking, spool: TextSpool) -> None:
    """A row per clip, most suspect first; the columns are RANKING_COLUMNS."""
    write_table(path, RANKING_COLUMNS, _table(dataset, ranking, spool))


def _table(dataset: ShardDataset, ranking: Ranking, spool: TextSpool) -> Iterator[tuple[object, ...]]:
    measures, speaking, suggested = ranking.measures, ranking.speaking, ranking.suggested
    for place, (row, utterance_id, reference, hypothesis) in enumerate(spool.in_order(ranking.order), 1):
        deviation = speaking.deviations[row]
        yield (
            place,
            utterance_id,
            f"{measures.scores[row]:.{DIGITS}f}",
            _yes_or_no(suggested[row]),
            "" if ranking.heard is None else _yes_or_no(ranking.heard[row]),
            f"{measures.loss_per_label[row]:.{DIGITS}f}",
            f"{measures.agreement[row]:.{DIGITS}f}",
            f"{speaking.rates[row]:.2f}",
            "" if np.isnan(deviation) else f"{deviation:.2f}",
            f"{dataset.num_samples[row] / SAMPLE_RATE_HZ:.3f}",
            reference,
            hypothesis,
        )


def ranking_facts(ranking: Ranking) -> dict[str, object]:
    """The figures of train_ranking.json."""
    scores = ranking.measures.scores
    finite, strangers = scores[np.isfinite(scores)], ranking.measures.stranger_scores
    strangers = strangers[np.isfinite(strangers)]

    def quantiles(values: np.ndarray) -> dict[str, float]:
        shares = (0.05, 0.25, 0.5, 0.75, 0.95)
        return {f"{share:g}": float(np.quantile(values, share)) for share in shares} if len(values) else {}

    suggested = ranking.suggested
    return {
        "clips": len(scores),
        "not_alignable": int(np.count_nonzero(np.isinf(scores))),
        "heard": None if ranking.heard is None else int(ranking.heard.sum()),
        "suggested": int(suggested.sum()),
        "cut": None if math.isinf(ranking.cut.score) else ranking.cut.score,
        "expected_wrong": ranking.cut.wrong,
        "expected_precision": None if math.isnan(ranking.cut.precision) else ranking.cut.precision,
        "expected_recall": None if math.isnan(ranking.cut.recall) else ranking.cut.recall,
        "scores": quantiles(finite),
        "scores_of_strangers": quantiles(strangers),
    }


def describe_ranking(facts: dict[str, object], table: Path) -> list[str]:
    """The screen of a ranking: how the scores lie, how many are suggested, and what to do with them."""

    def spread(name: str) -> str:
        return "  ".join(f"{float(share):.0%} {value:.2f}" for share, value in facts[name].items()) or "none"

    lines = [
        "score: nats per label by which the transcript is less likely than what the model hears",
        f"  these transcripts            {spread('scores')}",
        f"  transcripts of other clips   {spread('scores_of_strangers')}",
    ]
    if facts["not_alignable"]:
        lines.append(
            f"  {facts['not_alignable']:,} clips have more labels than frames: they rank first and never train"
        )
    if facts["cut"] is None:
        lines.append(f"of {facts['clips']:,} clips none seems to have the transcript of another")
    else:
        lines.append(
            f"of {facts['clips']:,} clips at most {facts['expected_wrong']:,.0f} seem to be wrong; suggested for "
            f"pruning are {facts['suggested']:,} with a score above {facts['cut']:.2f} (expected precision at most "
            f"{facts['expected_precision']:.2f}, recall {facts['expected_recall']:.2f})"
        )
        if facts["expected_recall"] < CLEAR_RECALL:
            lines.append(
                "  this model does not tell right transcripts from wrong ones well, so that more seem to be wrong than "
                "are: rank with a better one"
            )
        lines.append(f"listen to the first of them, then: train.py --prune_list {table} [--prune_fraction 0.05]")
    if facts["heard"]:
        lines.append(
            f"{facts['heard']:,} clips trained the model that judges them, which hides wrong transcripts that it has "
            "learnt by heart: train two halves (--train_fraction 0.5, and the same with --train_rest), and rank with "
            "--other_half"
        )
    elif facts["heard"] is None:
        lines.append("whether the model has heard these clips is not known: those it was trained on look too good")
    return lines


def _agreement(counts: np.ndarray) -> np.ndarray:
    """1 - character errors / characters of the longer text, [N], from COUNT_COLUMNS."""
    insertions, deletions, substitutions = counts[:, CHARACTER_COLUMNS].T
    kept = substitutions + counts[:, CHARACTER_HITS]
    longer = kept + np.maximum(insertions, deletions)
    return 1 - (insertions + deletions + substitutions) / np.maximum(longer, 1)


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
