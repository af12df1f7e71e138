"""An evaluation: every utterance once on one rank, decoded greedily and counted; no logits are kept.

B: utterances of a batch, V: vocabulary, T: frames, N: utterances of the evaluation.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from audio import SAMPLE_RATE_HZ
from data import Batch, Collator, CutSettings, PaddedBatch, ShardDataset, evaluation_loader
from errors import RunFailed
from intervals import Interval
from memory import MemoryLimit
from metrics import LetterCounts, Score, TextScore, score_batch, score_inputs
from processes import RankStatus
from progress import Progress
from recovery import Cuts
from result_layout import COUNT_COLUMNS
from slices import error_intervals
from stopping import StopSignals
from text import TextNormalizer, Vocabulary, required_frames

OTHER_IS_OUT_OF_MEMORY = "another process of the run is out of memory; its own message says where"


class Scorer(Protocol):
    """What an evaluation needs: a training run has it, and evaluate.py."""

    accelerator: Accelerator
    model: torch.nn.Module
    vocabulary: Vocabulary
    normalizer: TextNormalizer
    collate: Collator
    eval_cut: CutSettings
    eval_cuts: Cuts
    memory_limit: MemoryLimit
    status: RankStatus
    stop: StopSignals
    num_workers: int

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logits_BTV, frame_lengths_B and the CTC loss per utterance, loss_B."""


@dataclass(frozen=True)
class Evaluation:
    """The sum over all utterances, and the errors of each, the same on every rank.

    Attributes:
        score: the sum.
        rows: of the dataset, ascending, [N].
        counts: the columns of COUNT_COLUMNS for each row, int64 [N, 8].
        letters: of all rows.
    """

    score: Score
    rows: np.ndarray
    counts: np.ndarray
    letters: LetterCounts


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    dataset: ShardDataset,
    rows: np.ndarray,
    description: str,
    see: Callable[[Batch, list[TextScore]], None] = lambda *_: None,
) -> Evaluation:
    """Score `rows` of `dataset`, each once on one rank; the scores of the ranks are added.

    Args:
        scorer: the model and all that belongs to it.
        dataset: where the rows are.
        rows: ascending.
        description: for the progress bar.
        see: called with each batch of this rank and its texts.

    Raises:
        RunFailed: a single utterance does not fit into the memory of one rank.
        Stopped: a rank was asked to.
    """
    score, counts = Score(), np.zeros((len(rows), len(COUNT_COLUMNS)), np.int64)
    letters = LetterCounts(scorer.normalizer.digraphs)

    def take(batch: Batch) -> None:
        nonlocal score
        of_batch, texts = score_in_cuts(scorer, batch)
        score += of_batch
        counts[np.searchsorted(rows, batch.rows)] = [text.counts for text in texts]
        for reference, text in zip(batch.texts, texts, strict=True):
            letters.add(reference, text.hypothesis)
        see(batch, texts)

    pass_over(scorer, dataset, rows, description, take)
    return Evaluation(
        _sum_scores(scorer.accelerator, score),
        rows,
        sum_counts(scorer.accelerator, counts),
        sum(gather_object([letters]), LetterCounts()),
    )


def pass_over(
    scorer: Scorer, dataset: ShardDataset, rows: np.ndarray, description: str, take: Callable[[PaddedBatch], None]
) -> None:
    """Give each of `rows` to `take` once on one rank, in batches, with the model in evaluation mode.

    Raises:
        RunFailed: `take` did, here or on another rank.
        Stopped: a rank was asked to.
    """
    scorer.model.eval()
    loader = evaluation_loader(dataset, rows, scorer.collate, scorer.eval_cut, scorer.num_workers)
    with (
        _full_precision(scorer.accelerator),
        Progress(description, len(loader), "batches", scorer.accelerator.is_main_process) as progress,
    ):
        failure = None
        for batch in loader:
            if scorer.stop.requested:
                break
            try:
                take(batch)
            except RunFailed as error:
                failure = error
                break
            progress.advance(audio_seconds=batch.num_samples / SAMPLE_RATE_HZ)
    status, scorer.stop.agreed = scorer.status.worst(int(failure is not None), scorer.stop.requested)
    if status:
        raise failure or RunFailed(OTHER_IS_OUT_OF_MEMORY)
    scorer.stop.check()


@contextlib.contextmanager
def _full_precision(accelerator: Accelerator) -> Iterator[None]:
    """Without a launcher's precision convolutions are in fp32, not in TF32, torch's default on GPUs: promise 2."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = was and accelerator.mixed_precision != "no"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = was


def evaluation_values(score: Score) -> dict[str, float]:
    """A score under the names of the log."""
    return {
        "eval_loss": score.loss,
        "eval_wer": score.wer,
        "eval_cer": score.cer,
        "eval_raw_wer": score.raw_wer,
        "eval_sentence_error_rate": score.sentence_error_rate,
        "blank_fraction": score.blank_fraction,
        "eval_near_ties": score.near_ties,
        "eval_insertion_rate": score.words.insertions / max(score.words.reference_length, 1),
        "eval_deletion_rate": score.words.deletions / max(score.words.reference_length, 1),
        "eval_substitution_rate": score.words.substitutions / max(score.words.reference_length, 1),
        "eval_word_count_ratio": score.words.length_ratio,
        "eval_label_length_ratio": score.label_length_ratio,
        "eval_empty_fraction": score.empty_fraction,
        "eval_distinct_hypotheses": len(score.distinct_hypotheses),
        "eval_mean_top_probability": score.mean_top_probability,
        "eval_top_probability_deviation": score.top_probability_deviation,
        "eval_unknown_reference_fraction": score.unknown_reference_fraction,
        "eval_unknown_hypothesis_fraction": score.unknown_hypothesis_fraction,
        "eval_unfit_input_fraction": score.unfit_input_fraction,
    }


def rates(evaluation: Evaluation, speakers: np.ndarray, prefix: str = "") -> dict[str, float]:
    """WER and CER with their limits (95 %), under the names `PREFIXwer`, `PREFIXwer_low` and so on."""
    wer, cer = error_intervals(evaluation.counts, speakers)
    return named_limits(f"{prefix}wer", wer) | named_limits(f"{prefix}cer", cer)


def named_limits(name: str, interval: Interval) -> dict[str, float]:
    """A rate and its limits by name; without them where they cannot be known."""
    if math.isnan(interval.low):
        return {name: interval.rate}
    return {name: interval.rate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def limits_of(values: Mapping[str, float], name: str) -> tuple[float, float] | None:
    """Of a rate among values that `named_limits` named; None where they are not known."""
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    return None if low is None or high is None else (low, high)


def describe_limits(values: Mapping[str, float], name: str, digits: int = 2) -> str:
    """` [low, high]` in percent, to stand behind the rate; nothing where they are not known."""
    limits = limits_of(values, name)
    return "" if limits is None else f" [{limits[0]:.{digits}%}, {limits[1]:.{digits}%}]"


def _sum_scores(accelerator: Accelerator, score: Score) -> Score:
    vectors = accelerator.gather(score.to_vector().to(accelerator.device)[None])
    return sum(map(Score.from_vector, vectors.cpu()), Score())


def sum_counts(accelerator: Accelerator, counts: np.ndarray) -> np.ndarray:
    """Counts of all ranks, [N, 8]; each row is filled on one of them and zero on the others."""
    if accelerator.num_processes == 1:
        return counts
    return accelerator.reduce(torch.from_numpy(counts).to(accelerator.device), reduction="sum").cpu().numpy()


def score_in_cuts(scorer: Scorer, batch: Batch) -> tuple[Score, list[TextScore]]:
    """Score and texts of one batch, in smaller cuts when memory runs out: the scores are the same."""
    while (results := scorer.eval_cuts.attempt(lambda: _score_pieces(scorer, batch))) is None:
        pass
    return sum((score for score, _ in results), Score()), [text for _, texts in results for text in texts]


def _score_pieces(scorer: Scorer, batch: Batch) -> list[tuple[Score, list[TextScore]]]:
    return [score_one(scorer, piece) for piece in scorer.eval_cuts.divide([batch])]


def score_one(scorer: Scorer, batch: Batch) -> tuple[Score, list[TextScore]]:
    """Decode and count one batch as it is."""
    with scorer.memory_limit.watch():
        logits_BTV, frame_lengths_B, loss_B = scorer.forward(batch)
    # A row with more labels than frames has no CTC loss; its words are counted, its labels do not thin the loss out.
    labels = batch.labels_L.split(batch.label_lengths_B.tolist())
    has_loss = [
        frames >= required_frames(row.numpy()) for frames, row in zip(frame_lengths_B.tolist(), labels, strict=True)
    ]
    score, texts = score_batch(
        logits_BTV, frame_lengths_B, scorer.vocabulary, batch.texts, batch.raw_texts,
        loss_sum=float(loss_B.sum()), labels=int(batch.label_lengths_B[torch.tensor(has_loss)].sum()),
    )  # fmt: skip
    return score + score_inputs(batch.input_values_BS, batch.sample_lengths_B), texts
