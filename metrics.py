"""Greedy CTC decoding, and error rates from counts that are summed first and divided once.

B: utterances, S: samples, T: frames, V: vocabulary, L: labels.
"""

import functools
import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from text import Vocabulary, composed

# Below this difference of the two highest logits another batch size may turn the argmax (promise 2).
NEAR_TIE_LOGITS = 1e-4
# Distinct hypotheses are counted up to here: a collapsed model has a handful, and a score stays 8 kB whatever it saw.
MAX_DISTINCT_HYPOTHESES = 1_000
# Six bytes: a float64 holds the hash exactly, and a thousand texts collide once in half a billion evaluations.
HASH_BYTES = 6
# A waveform that reaches the model with another standard deviation than this is no speech at a level that a model can
# have learned: normalised audio has 1, and speech recorded at full scale 0.02 to 0.3.
INPUT_DEVIATION = (0.01, 10.0)


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
    return [vocabulary.decode_labels(labels_L) for labels_L in _collapse(ids_BT, frame_lengths_B, vocabulary)]


def _collapse(ids_BT: torch.Tensor, frame_lengths_B: torch.Tensor, vocabulary: Vocabulary) -> list[np.ndarray]:
    """Labels of each row: its own frames, repeats collapsed, blanks dropped."""
    # Before the collapse: ids that the vocabulary lacks are all the same unknown token to the tokenizer.
    ids_BT = vocabulary.known_ids(ids_BT.cpu().numpy())
    kept_BT = _valid_frames(ids_BT.shape[1], frame_lengths_B.cpu()).numpy() & (ids_BT != vocabulary.blank_id)
    kept_BT[:, 1:] &= ids_BT[:, 1:] != ids_BT[:, :-1]
    return [ids_T[kept_T] for ids_T, kept_T in zip(ids_BT, kept_BT, strict=True)]


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
    def hypothesis_length(self) -> int:
        """Words or characters of the hypotheses."""
        return self.hits + self.insertions + self.substitutions

    @property
    def length_ratio(self) -> float:
        """Length of the hypotheses per unit of reference, an empty reference counting as one unit."""
        return self.hypothesis_length / max(self.reference_length, 1)

    @property
    def rate(self) -> float:
        """Errors per unit of reference. An empty reference counts as one unit: 0.0 without errors, else the errors."""
        return self.errors / max(self.reference_length, 1)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


def count_word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word errors with the least edits, as jiwer counts them; words are divided by any white space."""
    return _count_edits(composed(reference).split(), composed(hypothesis).split())


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Character (code point) errors, as jiwer counts them: spaces count, those at the ends do not."""
    return _count_edits(composed(reference).strip(), composed(hypothesis).strip())


def _count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    if reference == hypothesis:
        return ErrorCounts(hits=len(reference))
    operations = [operation for operation, _, _ in Levenshtein.editops(reference, hypothesis).as_list()]
    insertions, deletions = operations.count("insert"), operations.count("delete")
    substitutions = len(operations) - insertions - deletions
    return ErrorCounts(insertions, deletions, substitutions, hits=len(reference) - deletions - substitutions)


@dataclass(frozen=True)
class DistinctTexts:
    """How many different texts there were: exact up to MAX_DISTINCT_HYPOTHESES, and that number for all beyond it.

    Holds the smallest hashes, so that a sum does not depend on the order of its parts.
    """

    hashes: frozenset[int] = frozenset()

    @classmethod
    def of(cls, texts: Iterable[str]) -> "DistinctTexts":
        """Of these texts. Python's own hash has another salt in each process."""
        digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES) for text in texts)
        return cls._smallest(frozenset(int.from_bytes(digest.digest(), "big") for digest in digests))

    @classmethod
    def _smallest(cls, hashes: frozenset[int]) -> "DistinctTexts":
        if len(hashes) > MAX_DISTINCT_HYPOTHESES:
            hashes = frozenset(heapq.nsmallest(MAX_DISTINCT_HYPOTHESES, hashes))
        return cls(hashes)

    def __len__(self) -> int:
        return len(self.hashes)

    def __add__(self, other: "DistinctTexts") -> "DistinctTexts":
        if self.hashes >= other.hashes:
            return self
        return self._smallest(self.hashes | other.hashes)


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
    """Of the utterances that have a loss."""
    top_probability_sum: float = 0.0
    """Of the best label, over the valid frames."""
    top_probability_square_sum: float = 0.0
    hypothesis_labels: int = 0
    unknown_hypothesis_labels: int = 0
    reference_labels: int = 0
    """Of all utterances."""
    unknown_reference_labels: int = 0
    unfit_inputs: int = 0
    """Waveforms that no model can have learned from; see `score_inputs`."""
    distinct_hypotheses: DistinctTexts = field(default_factory=DistinctTexts)

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

    @property
    def mean_top_probability(self) -> float:
        """Of the best label, over valid frames; 0 without frames."""
        return self.top_probability_sum / max(self.frames, 1)

    @property
    def top_probability_deviation(self) -> float:
        """Standard deviation of the best label's probability over valid frames; 0 without frames."""
        mean_square = self.top_probability_square_sum / max(self.frames, 1)
        return max(mean_square - self.mean_top_probability**2, 0.0) ** 0.5

    @property
    def empty_fraction(self) -> float:
        """Share of empty hypotheses; 0 for no utterance."""
        return self.empty_hypotheses / max(self.utterances, 1)

    @property
    def label_length_ratio(self) -> float:
        """Labels of the hypotheses per label of the references, which count as one label at least."""
        return self.hypothesis_labels / max(self.reference_labels, 1)

    @property
    def unknown_reference_fraction(self) -> float:
        """Share of the references' labels that stand for a character the vocabulary lacks; 0 without labels."""
        return self.unknown_reference_labels / max(self.reference_labels, 1)

    @property
    def unknown_hypothesis_fraction(self) -> float:
        """Share of the hypotheses' labels that are the unknown token; 0 without labels."""
        return self.unknown_hypothesis_labels / max(self.hypothesis_labels, 1)

    @property
    def unfit_input_fraction(self) -> float:
        """Share of waveforms out of all sane limits as the model gets them; 0 for no utterance."""
        return self.unfit_inputs / max(self.utterances, 1)

    def __add__(self, other: "Score") -> "Score":
        return Score(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Score)))

    def to_vector(self) -> torch.Tensor:
        """Everything as one float64 vector of fixed length (counts stay exact to 2**53), for one gather over ranks."""
        values: list[float] = []
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, ErrorCounts):
                values.extend(astuple(value))
            elif isinstance(value, DistinctTexts):
                hashes = sorted(value.hashes)
                values.extend(hashes + [-1] * (MAX_DISTINCT_HYPOTHESES - len(hashes)))
            else:
                values.append(value)
        return torch.tensor(values, dtype=torch.float64)

    @classmethod
    def from_vector(cls, vector: torch.Tensor) -> "Score":
        """The inverse of `to_vector`."""
        values = iter(vector.tolist())
        parts = {}
        for part in fields(cls):
            if part.type is ErrorCounts:
                parts[part.name] = ErrorCounts(*(int(next(values)) for _ in fields(ErrorCounts)))
            elif part.type is DistinctTexts:
                hashes = [int(next(values)) for _ in range(MAX_DISTINCT_HYPOTHESES)]
                parts[part.name] = DistinctTexts(frozenset(value for value in hashes if value >= 0))
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
) -> tuple[Score, list["TextScore"]]:
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
        The score and the B texts.
    """
    frames, ids_BT = _score_frames(logits_BTV, frame_lengths_B, vocabulary.blank_id)
    rows = _collapse(ids_BT, frame_lengths_B, vocabulary)
    hypotheses = [vocabulary.decode_labels(labels_L) for labels_L in rows]
    found, expected = np.concatenate(rows), np.concatenate([vocabulary.encode(text) for text in references])
    score = frames + Score(
        utterances=len(hypotheses),
        empty_hypotheses=hypotheses.count(""),
        loss_sum=loss_sum,
        labels=labels,
        hypothesis_labels=len(found),
        unknown_hypothesis_labels=int(np.count_nonzero(found == vocabulary.unknown_id)),
        reference_labels=len(expected),
        unknown_reference_labels=int(np.count_nonzero(expected == vocabulary.unknown_id)),
        distinct_hypotheses=DistinctTexts.of(hypotheses),
    )
    texts = [score_text(*of_one) for of_one in zip(references, raw_references, hypotheses, strict=True)]
    return sum((text.score for text in texts), score), texts


def score_inputs(input_values_BS: torch.Tensor, sample_lengths_B: torch.Tensor) -> Score:
    """Count the waveforms that are out of all sane limits as the model gets them; what needs logits stays 0.

    Such a one has a standard deviation outside of INPUT_DEVIATION (silence, audio that was never scaled), or an offset
    larger than it. On the CPU, where the collator left the waveforms.
    """
    unfit = 0
    for padded_S, length in zip(input_values_BS, sample_lengths_B.tolist(), strict=True):
        samples_S = padded_S[:length]
        # Not torch.std_mean, which takes thirty times as long.
        mean, mean_square = float(samples_S.sum()) / max(length, 1), float(samples_S.dot(samples_S)) / max(length, 1)
        deviation = max(mean_square - mean**2, 0.0) ** 0.5
        unfit += not (INPUT_DEVIATION[0] <= deviation <= INPUT_DEVIATION[1] and abs(mean) <= deviation)
    return Score(unfit_inputs=unfit)


@dataclass(frozen=True)
class TextScore:
    """One utterance: what was decoded, and its errors."""

    hypothesis: str
    words: ErrorCounts
    characters: ErrorCounts
    raw_words: ErrorCounts

    @property
    def score(self) -> Score:
        """As a part of the sum; what needs logits is 0."""
        return Score(
            words=self.words,
            characters=self.characters,
            raw_words=self.raw_words,
            utterances_with_error=int(self.words.errors > 0),
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """The values of COUNT_COLUMNS."""
        return *astuple(self.words), *astuple(self.characters)


def score_text(reference: str, raw_reference: str, hypothesis: str) -> TextScore:
    """Count the errors of one utterance against the normalised text and the text as found."""
    return TextScore(
        hypothesis,
        words=count_word_errors(reference, hypothesis),
        characters=count_character_errors(reference, hypothesis),
        raw_words=count_word_errors(raw_reference, hypothesis),
    )


@dataclass
class LetterCounts:
    """How often each letter (code point) of the references stands at its place in the hypotheses, and what else does.

    A digraph counts beside its characters, in lower case, and is found where all of it is, with nothing in between.

    Attributes:
        digraphs: letters of several characters to count too, in lower case.
        occurrences: of each letter in the references.
        hits: of those, found at their place.
        mistaken: of (letter, what is in its place), "" for nothing.
        written: of each letter in the hypotheses.
    """

    digraphs: tuple[str, ...] = ()
    occurrences: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    mistaken: Counter[tuple[str, str]] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)

    def add(self, reference: str, hypothesis: str) -> None:
        """Count one utterance, aligned with the least edits; spaces are no letters."""
        reference, hypothesis = composed(reference).strip(), composed(hypothesis).strip()
        letters = Counter(reference)
        edits = [] if reference == hypothesis else Levenshtein.editops(reference, hypothesis).as_list()
        wrong = [
            (reference[place], hypothesis[heard] if edit == "replace" else "")
            for edit, place, heard in edits
            if edit != "insert"
        ]
        self.occurrences += letters
        self.hits += letters
        self.hits -= Counter(letter for letter, _ in wrong)
        self.mistaken.update(pair for pair in wrong if pair[0] != " ")
        self.written.update(hypothesis)
        for counts in (self.occurrences, self.hits, self.written):
            del counts[" "]
        if self.digraphs:
            self._add_digraphs(reference, hypothesis, edits)

    def _add_digraphs(self, reference: str, hypothesis: str, edits: list[tuple[str, int, int]]) -> None:
        find = digraph_pattern(self.digraphs).finditer
        self.written.update(match[0].lower() for match in find(hypothesis))
        places = list(find(reference))
        if not places:
            return
        in_place, before = list(reference), [""] * (len(reference) + 1)
        for edit, place, heard in edits:
            if edit == "insert":
                before[place] += hypothesis[heard]
            else:
                in_place[place] = hypothesis[heard] if edit == "replace" else ""
        for match in places:
            first, *others = range(*match.span())
            found = in_place[first] + "".join(before[place] + in_place[place] for place in others)
            digraph = match[0].lower()
            self.occurrences[digraph] += 1
            if found == match[0]:
                self.hits[digraph] += 1
            else:
                self.mistaken[digraph, found] += 1

    def recall(self, letter: str) -> float:
        """Share of its occurrences that were found."""
        return self.hits[letter] / self.occurrences[letter]

    def __add__(self, other: "LetterCounts") -> "LetterCounts":
        return LetterCounts(
            self.digraphs or other.digraphs,
            self.occurrences + other.occurrences,
            self.hits + other.hits,
            self.mistaken + other.mistaken,
            self.written + other.written,
        )


@functools.cache
def digraph_pattern(digraphs: tuple[str, ...]) -> re.Pattern[str]:
    """Finds digraphs in either case, the longest one where several begin at a place."""
    longest_first = sorted(map(re.escape, digraphs), key=len, reverse=True)
    return re.compile("|".join(longest_first), re.IGNORECASE)


def count_letters(texts: Iterable[str], digraphs: tuple[str, ...] = ()) -> Counter[str]:
    """How often each letter and digraph stands in normalised texts; spaces are no letters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
        if digraphs:
            counts.update(match[0].lower() for match in digraph_pattern(digraphs).finditer(text))
    del counts[" "]
    return counts


def _valid_frames(num_frames: int, frame_lengths_B: torch.Tensor) -> torch.Tensor:
    return torch.arange(num_frames, device=frame_lengths_B.device) < frame_lengths_B[:, None]


def _score_frames(logits_BTV: torch.Tensor, frame_lengths_B: torch.Tensor, blank_id: int) -> tuple[Score, torch.Tensor]:
    """Counts and sums over the valid frames, and the best label of every frame, ids_BT."""
    valid_BT = _valid_frames(logits_BTV.shape[1], frame_lengths_B.to(logits_BTV.device))
    logits_BTV = logits_BTV.float()
    top_BT2 = logits_BTV.topk(2, dim=-1).values
    near_BT = (top_BT2[..., 0] - top_BT2[..., 1]) < NEAR_TIE_LOGITS
    ids_BT = logits_BTV.argmax(dim=-1)
    probability_BT = (top_BT2[..., 0] - logits_BTV.logsumexp(dim=-1)).exp().double().where(valid_BT, 0.0)
    sums = torch.stack(
        [
            valid_BT.sum(),
            (valid_BT & (ids_BT == blank_id)).sum(),
            (valid_BT & near_BT).sum(),
            probability_BT.sum(),
            probability_BT.square().sum(),
        ]
    )
    frames, blank_frames, near_ties, probabilities, squares = sums.tolist()  # one wait for the device
    score = Score(
        frames=int(frames),
        blank_frames=int(blank_frames),
        near_ties=int(near_ties),
        top_probability_sum=probabilities,
        top_probability_square_sum=squares,
    )
    return score, ids_BT
