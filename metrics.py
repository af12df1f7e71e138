"""Greedy CTC decoding, and error rates from counts that are summed first and divided once.

B: utterances, T: frames, V: vocabulary.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields

import torch
from rapidfuzz.distance import Levenshtein

from text import Vocabulary

# Below this difference of the two highest logits another batch size may turn the argmax (promise 2).
NEAR_TIE_LOGITS = 1e-4


def greedy_decode(logits_BTV: torch.Tensor, frame_lengths_B: torch.Tensor, vocabulary: Vocabulary) -> list[str]:
    """The best label of every frame, repeats collapsed, blanks dropped, as text.

    Each row is cut to its own frames first, since padded frames decode to invented letters (trap 13). The texts are
    those of `Wav2Vec2CTCTokenizer.decode` and of `transformers.pipeline`, special tokens and doubled spaces included.

    Args:
        logits_BTV: or the argmax of them, `ids_BT`.
        frame_lengths_B: valid frames of each row.
        vocabulary: of the model's head.
    """
    ids_BT = logits_BTV.argmax(dim=-1) if logits_BTV.dim() == 3 else logits_BTV
    # Before the collapse: ids that the vocabulary lacks are all the same unknown token to the tokenizer.
    ids_BT = vocabulary.known_ids(ids_BT.cpu().numpy())
    kept_BT = _valid_frames(ids_BT.shape[1], frame_lengths_B.cpu()).numpy() & (ids_BT != vocabulary.blank_id)
    kept_BT[:, 1:] &= ids_BT[:, 1:] != ids_BT[:, :-1]
    return [vocabulary.decode_labels(ids_T[kept_T]) for ids_T, kept_T in zip(ids_BT, kept_BT, strict=True)]


@dataclass(frozen=True)
class ErrorCounts:
    """Edit operations that turn references into hypotheses; counts of several utterances add up."""

    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0
    hits: int = 0

    @property
    def errors(self) -> int:
        """Insertions, deletions and substitutions."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def reference_length(self) -> int:
        """Words or characters of the references."""
        return self.hits + self.deletions + self.substitutions

    @property
    def rate(self) -> float:
        """Errors per unit of reference. An empty reference counts as one unit: 0.0 without errors, else the errors."""
        return self.errors / max(self.reference_length, 1)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


def count_word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word errors with the least edits, as jiwer counts them; words are divided by any white space."""
    return _count_edits(_composed(reference).split(), _composed(hypothesis).split())


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Character (code point) errors, as jiwer counts them: spaces count, those at the ends do not."""
    return _count_edits(_composed(reference).strip(), _composed(hypothesis).strip())


def _composed(text: str) -> str:
    # A head may write a letter and its mark one by one: canonically equivalent texts are the same text.
    return unicodedata.normalize("NFC", text)


def _count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    if reference == hypothesis:
        return ErrorCounts(hits=len(reference))
    operations = [operation for operation, _, _ in Levenshtein.editops(reference, hypothesis).as_list()]
    insertions, deletions = operations.count("insert"), operations.count("delete")
    substitutions = len(operations) - insertions - deletions
    return ErrorCounts(insertions, deletions, substitutions, hits=len(reference) - deletions - substitutions)


@dataclass(frozen=True)
class Score:
    """Everything an evaluation sums; scores of batches, ranks and slices add up (trap 15: no mean of rates)."""

    words: ErrorCounts = field(default_factory=ErrorCounts)
    characters: ErrorCounts = field(default_factory=ErrorCounts)
    raw_words: ErrorCounts = field(default_factory=ErrorCounts)
    """Against the text as found, before normalisation."""
    utterances: int = 0
    utterances_with_error: int = 0
    empty_hypotheses: int = 0
    frames: int = 0
    """Valid ones only, like the next two."""
    blank_frames: int = 0
    near_ties: int = 0
    """Frames whose two highest logits differ by less than 1e-4."""
    loss_sum: float = 0.0
    """CTC loss (nats) over all utterances."""
    labels: int = 0

    @property
    def wer(self) -> float:
        """Word error rate, a fraction."""
        return self.words.rate

    @property
    def cer(self) -> float:
        """Character error rate, a fraction."""
        return self.characters.rate

    @property
    def raw_wer(self) -> float:
        """Word error rate against the text as found."""
        return self.raw_words.rate

    @property
    def sentence_error_rate(self) -> float:
        """Share of utterances with at least one word error; 0 for none."""
        return self.utterances_with_error / max(self.utterances, 1)

    @property
    def loss(self) -> float:
        """CTC loss per label, the scale of the training loss; 0 without labels."""
        return self.loss_sum / max(self.labels, 1)

    @property
    def blank_fraction(self) -> float:
        """Share of valid frames whose best label is the blank; 0 without frames."""
        return self.blank_frames / max(self.frames, 1)

    def __add__(self, other: "Score") -> "Score":
        return Score(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Score)))

    def to_vector(self) -> torch.Tensor:
        """All sums as one float64 vector (counts stay exact to 2**53): one all-reduce over ranks adds scores."""
        values: list[float] = []
        for part in astuple(self):
            values.extend(part if isinstance(part, tuple) else [part])
        return torch.tensor(values, dtype=torch.float64)

    @classmethod
    def from_vector(cls, vector: torch.Tensor) -> "Score":
        """The inverse of `to_vector`."""
        values = iter(vector.tolist())
        parts = {}
        for part in fields(cls):
            if part.type is ErrorCounts:
                parts[part.name] = ErrorCounts(*(int(next(values)) for _ in fields(ErrorCounts)))
            else:
                parts[part.name] = part.type(next(values))
        return cls(**parts)


def score_batch(
    logits_BTV: torch.Tensor,
    frame_lengths_B: torch.Tensor,
    vocabulary: Vocabulary,
    references: Sequence[str],
    raw_references: Sequence[str],
    loss_sum: float = 0.0,
    labels: int = 0,
) -> tuple[Score, list[str]]:
    """Decode one batch and count; nothing of the size of the logits is kept.

    Args:
        logits_BTV: of any device and precision.
        frame_lengths_B: valid frames of each row.
        vocabulary: of the model's head.
        references: normalised texts.
        raw_references: the texts as found.
        loss_sum: CTC loss summed over the batch.
        labels: of the batch.

    Returns:
        The score and the B hypotheses.
    """
    hypotheses = greedy_decode(logits_BTV, frame_lengths_B, vocabulary)
    frames, blank_frames, near_ties = _count_frames(logits_BTV, frame_lengths_B, vocabulary.blank_id)
    score = Score(
        utterances=len(hypotheses),
        empty_hypotheses=hypotheses.count(""),
        frames=frames,
        blank_frames=blank_frames,
        near_ties=near_ties,
        loss_sum=loss_sum,
        labels=labels,
    )
    for reference, raw_reference, hypothesis in zip(references, raw_references, hypotheses, strict=True):
        score += score_text(reference, raw_reference, hypothesis)
    return score, hypotheses


def score_text(reference: str, raw_reference: str, hypothesis: str) -> Score:
    """The error counts of one utterance; what needs logits stays 0."""
    words = count_word_errors(reference, hypothesis)
    return Score(
        words=words,
        characters=count_character_errors(reference, hypothesis),
        raw_words=count_word_errors(raw_reference, hypothesis),
        utterances_with_error=int(words.errors > 0),
    )


def score_by(groups: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, ErrorCounts]:
    """Word errors of each group (speaker, seen or unseen), in the order of first appearance."""
    counts: dict[str, ErrorCounts] = {}
    for group, reference, hypothesis in zip(groups, references, hypotheses, strict=True):
        counts[group] = counts.get(group, ErrorCounts()) + count_word_errors(reference, hypothesis)
    return counts


def _valid_frames(num_frames: int, frame_lengths_B: torch.Tensor) -> torch.Tensor:
    return torch.arange(num_frames, device=frame_lengths_B.device) < frame_lengths_B[:, None]


def _count_frames(logits_BTV: torch.Tensor, frame_lengths_B: torch.Tensor, blank_id: int) -> tuple[int, int, int]:
    """Valid frames, those of them whose best label is the blank, and near-ties."""
    valid_BT = _valid_frames(logits_BTV.shape[1], frame_lengths_B.to(logits_BTV.device))
    top_BT2 = logits_BTV.float().topk(2, dim=-1).values
    near_BT = (top_BT2[..., 0] - top_BT2[..., 1]) < NEAR_TIE_LOGITS
    blank_BT = logits_BTV.argmax(dim=-1) == blank_id
    counts = torch.stack([valid_BT.sum(), (valid_BT & blank_BT).sum(), (valid_BT & near_BT).sum()])
    frames, blank_frames, near_ties = counts.tolist()
    return frames, blank_frames, near_ties
