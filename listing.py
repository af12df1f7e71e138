"""The utterances of an evaluation as a report needs them: all are counted, some are listed.

N: utterances of the evaluation.
"""

import array
import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alignment import Confusions, align_characters, align_words, count_errors
from errors import UsageError
from intervals import Interval, rate_interval
from progress import Progress
from readback import read_table
from result_layout import COUNT_COLUMNS, MAX_GROUPS, TEXT_COLUMNS

WORST_SHOWN = RANDOM_SHOWN = 50
# More are of little use in a page; those with the highest error rates are kept.
MAX_LISTED = 5_000
DURATION_GROUPS = 8
# Voices may be few enough to filter by.
UNGROUPED = frozenset({*TEXT_COLUMNS, *COUNT_COLUMNS}) - {"speaker"}
WORST, RANDOM, OTHER = "worst", "random", ""


@dataclass(frozen=True)
class Listed:
    """One utterance to be shown.

    Attributes:
        id: of the corpus.
        reference: normalised text.
        hypothesis: of the model.
        seconds: of audio; None where the table does not say.
        kind: WORST, RANDOM or OTHER.
        groups: its value in each of the table's `facets`.
    """

    id: str
    reference: str
    hypothesis: str
    seconds: float | None = None
    kind: str = OTHER
    groups: tuple[str, ...] = ()


@dataclass
class UtteranceTable:
    """Everything that one pass over utterances.csv counts.

    Attributes:
        path: of the file.
        word_errors: of each utterance, [N].
        word_lengths: words of each reference, [N].
        seconds: of audio, [N].
        speakers: a number for each speaker, -1 where unknown, [N].
        words: what was taken for what.
        characters: the same of characters.
        facets: columns with few values, and these values, to filter by.
    """

    path: Path
    word_errors: np.ndarray
    word_lengths: np.ndarray
    seconds: np.ndarray
    speakers: np.ndarray
    words: Confusions = field(default_factory=Confusions)
    characters: Confusions = field(default_factory=Confusions)
    facets: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def rates(self) -> np.ndarray:
        """WER of each utterance, [N]; an empty reference counts as one word, as in metrics.py."""
        return self.word_errors / np.maximum(self.word_lengths, 1)

    def choose(self, seed: int) -> list[tuple[int, str]]:
        """(row, kind) of the utterances to list: the worst, as many others at random, and then the next worst.

        The worst have the highest WER; of equal ones that with more errors comes first.
        """
        order = np.lexsort((-self.word_errors, -self.rates))
        worst, rest = order[:WORST_SHOWN], order[WORST_SHOWN:]
        drawn = np.random.default_rng(seed).permutation(len(rest))[:RANDOM_SHOWN]
        others = np.delete(rest, drawn)
        kinds = [(worst, WORST), (np.sort(rest[drawn]), RANDOM), (others, OTHER)]
        return [(int(row), kind) for rows, kind in kinds for row in rows][:MAX_LISTED]

    def read(self, chosen: list[tuple[int, str]]) -> list[Listed]:
        """The chosen utterances with their texts, in the order of `chosen`."""
        kinds = dict(chosen)
        found = {
            row: Listed(
                values["id"], values["reference"], values["hypothesis"], float(values["seconds"]), kinds[row],
                tuple(values[name] for name in self.facets),
            )
            for row, values in enumerate(read_table(self.path))
            if row in kinds
        }  # fmt: skip
        return [found[row] for row, _ in chosen]

    def by_duration(self) -> Iterator[tuple[float, float, int, Interval]]:
        """From and up to how many seconds, utterances between, and their WER, in groups of equal width."""
        edges = duration_edges(float(self.seconds.min()), float(self.seconds.max()))
        codes = np.clip(np.searchsorted(edges, self.seconds, side="right") - 1, 0, len(edges) - 2)
        for code in np.unique(codes):
            inside = codes == code
            wer = rate_interval(self.word_errors[inside], self.word_lengths[inside], self.speakers[inside])
            yield float(edges[code]), float(edges[code + 1]), int(inside.sum()), wer


def duration_edges(shortest: float, longest: float) -> np.ndarray:
    """Edges in round seconds of at most DURATION_GROUPS groups of equal width that hold both durations."""
    for width in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 3600):
        first, last = int(shortest // width), int(longest // width) + 1
        if last - first <= DURATION_GROUPS:
            break
    return np.arange(first, last + 1) * width


def scan(path: Path) -> UtteranceTable:
    """One pass over utterances.csv; texts are counted and not kept.

    Raises:
        UsageError: it is not a table that evaluate.py wrote, or is empty.
    """
    words, characters = Confusions(), Confusions()
    facets: dict[str, set[str]] | None = None
    errors, lengths, seconds, speakers = array.array("q"), array.array("q"), array.array("d"), array.array("q")
    index: dict[str, int] = {"": -1}
    try:
        for row in _watched(path):
            pairs = align_words(row["reference"], row["hypothesis"])
            words.add(pairs)
            characters.add(align_characters(row["reference"], row["hypothesis"]))
            num_errors, num_words = count_errors(pairs)
            errors.append(num_errors)
            lengths.append(num_words)
            seconds.append(float(row["seconds"]))
            speakers.append(index.setdefault(row.get("speaker", ""), len(index) - 1))
            if facets is None:
                facets = {name: set() for name in row if name not in UNGROUPED}
            _collect(row, facets)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise UsageError(f"{path} is not a table that evaluate.py wrote ({error!r}): run evaluate.py again") from error
    if not seconds:
        raise UsageError(f"{path} holds no utterance: run evaluate.py again")
    kept = {name: sorted(values) for name, values in facets.items() if len(values) > 1}
    arrays = (np.array(column) for column in (errors, lengths, seconds, speakers))
    return UtteranceTable(path, *arrays, words, characters, kept)


def _watched(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a table, with a bar: an evaluation of a large corpus takes a minute to count."""
    with path.open("rb") as file:
        total = sum(1 for _ in file) - 1
    with Progress("counting utterances", total, "utterances") as progress:
        for row in read_table(path):
            yield row
            progress.advance()


def _collect(row: dict[str, str], facets: dict[str, set[str]]) -> None:
    """Add a row's values to those of each column; a column with too many goes."""
    for name in list(facets):
        facets[name].add(row[name])
        if len(facets[name]) > MAX_GROUPS:
            del facets[name]
