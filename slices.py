"""Whom a model fails: error rates by group, of any column of the corpus and of what is known of a clip.

N: utterances of an evaluation.
"""

import array
import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from audio import SAMPLE_RATE_HZ
from data import ShardDataset
from errors import UsageError
from identities import NONE, distinct, identities, is_among
from intervals import CONFIDENCE, Interval, rate_interval
from result_layout import MAX_GROUPS, MIN_UTTERANCES
from shards import part_schema

DURATION_EDGES_SECONDS = (2, 4, 7, 12)
SNR_EDGES_DB = (10, 20, 30)
UNKNOWN = "not given"
OTHERS = "others"
# Written into every shard whatever the corpus; all other columns are the corpus' own.
OWN_COLUMNS = frozenset(part_schema([]).names) - {"speaker"}


@dataclass(frozen=True)
class Grouping:
    """One way to divide an evaluation.

    Attributes:
        name: of the column, or of what is known of a clip.
        groups: their names, in the order to show them in.
        codes: index of each utterance's group, [N].
    """

    name: str
    groups: tuple[str, ...]
    codes: np.ndarray


@dataclass(frozen=True)
class Slice:
    """One group's result.

    Attributes:
        name: of the grouping.
        group: of this one.
        utterances: in it.
        wer: with its interval.
        cer: of the same utterances.
    """

    name: str
    group: str
    utterances: int
    wer: Interval
    cer: float

    @property
    def is_small(self) -> bool:
        """Fewer than MIN_UTTERANCES: shown, and never called the worst."""
        return self.utterances < MIN_UTTERANCES


@dataclass(frozen=True)
class Trained:
    """The speakers and sentences that a model has been trained on, as `identities` counts them, each once."""

    speakers: np.ndarray
    sentences: np.ndarray

    @classmethod
    def of(cls, dataset: ShardDataset, is_trained: np.ndarray | None = None) -> "Trained":
        """Those of a training split, or of the rows of it that `is_trained` marks, bool [N]."""
        kept, who = slice(None) if is_trained is None else is_trained, identities(dataset)
        speakers, sentences = distinct(who.speakers[kept]), distinct(who.sentences[kept])
        return cls(speakers[speakers != NONE], sentences[sentences != NONE])


def find_groupings(
    dataset: ShardDataset, rows: np.ndarray, num_labels: np.ndarray, trained: Trained | None, names: Sequence[str] = ()
) -> list[Grouping]:
    """The groupings in `names`, or without any all that divide this set and have at most MAX_GROUPS groups.

    Args:
        dataset: the split that is scored.
        rows: of it that are, ascending, [N].
        num_labels: labels of each row's text, [N].
        trained: what the model has been trained on, where that is known.
        names: columns of the corpus, `duration`, `speech_rate`, `snr`, `sentence_in_train`, `speaker_in_train`.

    Raises:
        UsageError: a name that this set does not have.
    """
    makers = _makers(dataset, rows, num_labels, trained, None if names else MAX_GROUPS)
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise UsageError(f"--slices {unknown[0]}: {dataset.folder} has {', '.join(makers)}")
    if names:
        return [_merge_rare(makers[name]()) for name in names]
    return [grouping for make in makers.values() if _divides(grouping := make())]


def _divides(grouping: Grouping | None) -> bool:
    """Whether a grouping says something; that all voices are new does."""
    if grouping is None or grouping.groups == (UNKNOWN,):
        return False
    return len(grouping.groups) > 1 or grouping.name.endswith("_in_train")


def _makers(
    dataset: ShardDataset, rows: np.ndarray, num_labels: np.ndarray, trained: Trained | None, limit: int | None
) -> dict[str, Callable[[], Grouping | None]]:
    """By name what makes a grouping, or None for one of more than `limit` groups; only what is asked for is read."""
    seconds = dataset.num_samples[rows] / SAMPLE_RATE_HZ
    makers = {
        "duration": lambda: _by_edges("duration", seconds, DURATION_EDGES_SECONDS, "s"),
        "speech_rate": lambda: _by_quartiles("speech_rate", num_labels / np.maximum(seconds, 1e-3), "labels/s"),
    }
    columns = dataset.column_names
    if "snr_db" in columns:
        makers["snr"] = lambda: _by_edges("snr", dataset.numpy_column("snr_db")[rows], SNR_EDGES_DB, "dB")
    if trained is not None:
        makers["sentence_in_train"] = lambda: _by_membership(
            "sentence_in_train", identities(dataset).sentences[rows], trained.sentences
        )
    if trained is not None and len(trained.speakers):
        makers["speaker_in_train"] = lambda: _by_membership(
            "speaker_in_train", identities(dataset).speakers[rows], trained.speakers
        )
    for column in columns:
        if column not in OWN_COLUMNS:
            # What is known of the clip keeps its name when the corpus has a column of the same one.
            name = corpus_name(column, makers)
            makers[name] = lambda name=name, column=column: group_by_value(name, dataset.column(column, rows), limit)
    return makers


def corpus_name(column: str, taken: Container[str]) -> str:
    """The name under which a column of the corpus is shown."""
    return f"corpus_{column}" if column in taken else column


def group_by_value(name: str, values: Iterable[str], limit: int | None = None) -> Grouping | None:
    """A group per value, the most frequent first, what is not given last; None for more than `limit`, read no further.

    Columns of names and ids have a value per row, which need not all be held to know that they do not divide a set.
    """
    index: dict[str, int] = {}
    codes = array.array("i")
    for value in values:
        codes.append(index.setdefault(value.strip(), len(index)))
        if limit is not None and len(index) > limit:
            return None
    codes = np.asarray(codes)
    counts = np.bincount(codes, minlength=len(index))
    order = sorted(index, key=lambda value: (value == "", -counts[index[value]], value))
    place = np.zeros(len(index), np.int32)
    place[[index[value] for value in order]] = np.arange(len(order))
    return Grouping(name, tuple(value or UNKNOWN for value in order), place[codes])


def _by_membership(name: str, values: np.ndarray, members: np.ndarray) -> Grouping:
    """Two groups: also in the training data, or not; where there is nothing to compare, neither."""
    said = np.where(values == NONE, "", np.where(is_among(values, members), "yes", "no"))
    return group_by_value(name, said.tolist())


def _by_edges(name: str, values: np.ndarray, edges: Sequence[float], unit: str) -> Grouping:
    """Groups between `edges`, in their order; those without an utterance are left out."""
    names = [
        f"under {edges[0]:g} {unit}",
        *(f"{low:g} to {high:g} {unit}" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]:g} {unit} and more",
        UNKNOWN,
    ]
    codes = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="right"))
    present, codes = np.unique(codes, return_inverse=True)
    return Grouping(name, tuple(names[code] for code in present), codes.astype(np.int32))


def _by_quartiles(name: str, values: np.ndarray, unit: str) -> Grouping:
    edges = np.unique(np.quantile(values, (0.25, 0.5, 0.75)).round(1)) if len(values) else np.zeros(1)
    return _by_edges(name, values, edges.tolist(), unit)


def _merge_rare(grouping: Grouping) -> Grouping:
    """A column that was asked for by name and has many values: the largest groups, and one for all others."""
    if len(grouping.groups) <= MAX_GROUPS:
        return grouping
    largest = np.bincount(grouping.codes).argsort(kind="stable")[::-1][: MAX_GROUPS - 1]
    place = np.full(len(grouping.groups), MAX_GROUPS - 1, np.int32)
    place[np.sort(largest)] = np.arange(MAX_GROUPS - 1)
    names = [grouping.groups[code] for code in np.sort(largest)]
    return Grouping(grouping.name, (*names, OTHERS), place[grouping.codes])


@dataclass(frozen=True)
class Breakdown:
    """How an evaluation of N utterances is divided.

    Attributes:
        groupings: the ways to divide it.
        speakers: a number for the speaker of each utterance, -1 where the corpus does not say, [N].
    """

    groupings: list[Grouping]
    speakers: np.ndarray

    @classmethod
    def of(
        cls,
        dataset: ShardDataset,
        rows: np.ndarray,
        num_labels: np.ndarray,
        trained: Trained | None,
        names: Sequence[str] = (),
    ) -> "Breakdown":
        """Of `rows` of a split; see `find_groupings`."""
        index: dict[str, int] = {"": -1}
        speakers = (index.setdefault(value, len(index) - 1) for value in dataset.column("speaker", rows))
        codes = np.fromiter(speakers, np.int32)
        return cls(find_groupings(dataset, rows, num_labels, trained, names), codes)

    def score(self, counts: np.ndarray) -> list[Slice]:
        """WER and CER of every group, from COUNT_COLUMNS of each utterance, [N, 8]."""
        slices = []
        for grouping in self.groupings:
            for code, group in enumerate(grouping.groups):
                inside = np.flatnonzero(grouping.codes == code)
                words, characters = errors_and_lengths(counts[inside])
                wer = rate_interval(*words, self.speakers[inside])
                cer = float(characters[0].sum() / max(characters[1].sum(), 1))
                slices.append(Slice(grouping.name, group, len(inside), wer, cer))
        return slices


def draw_stratified(
    dataset: ShardDataset, rows: np.ndarray, trained: Trained | None, wanted: int, seed: int
) -> np.ndarray:
    """`wanted` of `rows`, ascending, in which known voices and sentences, lengths and speakers have their shares.

    Every k-th of the rows in an order that keeps like by like (systematic sampling): each stratum gets its share, up
    to one utterance.
    """
    generator = np.random.default_rng(seed)
    strata = [generator.permutation(len(rows)), group_by_value("speaker", dataset.column("speaker", rows)).codes]
    deciles = np.quantile(dataset.num_samples[rows], np.arange(0.1, 1.0, 0.1))
    strata.append(np.searchsorted(deciles, dataset.num_samples[rows]))
    if trained is not None:
        who = identities(dataset)
        strata.append(_by_membership("sentence", who.sentences[rows], trained.sentences).codes)
        strata.append(_by_membership("speaker", who.speakers[rows], trained.speakers).codes)
    order = np.lexsort(strata)  # The last one is the first to sort by.
    places = (np.arange(wanted) + generator.random()) * len(rows) / wanted
    return np.sort(rows[order[places.astype(np.int64)]])


def error_intervals(counts: np.ndarray, speakers: np.ndarray) -> tuple[Interval, Interval]:
    """WER and CER with their intervals from the counts of N utterances, [N, 8], and their speakers' codes, [N]."""
    words, characters = errors_and_lengths(counts)
    return rate_interval(*words, speakers), rate_interval(*characters, speakers)


def errors_and_lengths(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of the words and of the characters: errors and lengths of the references, [N] each."""
    for part in np.split(counts, 2, axis=1):
        yield part[:, :3].sum(1), part[:, 1:].sum(1)


def describe_slice(one: Slice) -> dict[str, object]:
    """A row for a table or a JSON file; limits that cannot be known are None."""
    limits = {"wer_low": one.wer.low, "wer_high": one.wer.high}
    return {
        "slice": one.name,
        "group": one.group,
        "utterances": one.utterances,
        "wer": one.wer.rate,
        **{name: None if math.isnan(value) else value for name, value in limits.items()},
        "cer": one.cer,
        "unit": one.wer.unit,
        "is_small": one.is_small,
    }


def worst_slice(slices: Iterable[Slice], wer: float) -> tuple[Slice, bool] | None:
    """The kind of utterance with the highest WER, and whether chance does not explain that it is above the whole's.

    The worst of many is high by chance alone: the interval is widened as Bonferroni's correction for their number asks.
    Slices that are small or of no one kind are not looked at.
    """
    eligible = [one for one in slices if not one.is_small and one.group not in (UNKNOWN, OTHERS)]
    if not eligible:
        return None
    worst, normal = max(eligible, key=lambda one: one.wer.rate), NormalDist()
    tail = (1 - CONFIDENCE) / 2
    wider = normal.inv_cdf(tail / len(eligible)) / normal.inv_cdf(tail)
    return worst, worst.wer.rate - wider * (worst.wer.rate - worst.wer.low) > wer
