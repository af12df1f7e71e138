"""Checks before step 1: which utterances train, and whether text, vocabulary and disk fit the run.

Every utterance left out of training has its reason in `Selection.dropped`; dev and test are always scored whole.
"""

import csv
import io
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from atomic import free_bytes, nearest_existing, write_atomically
from audio import SAMPLE_RATE_HZ
from config import TrainConfig
from data import ShardDataset
from errors import UsageError
from model import num_frames
from text import Coverage, TextNormalizer, Vocabulary, measure_coverage, required_frames

MAX_UNKNOWN_FRACTION = 0.005
TEXTS_PER_BLOCK = 10_000
UTTERANCES_SHOWN = 3
# What helps when a rule has left nothing to train on.
REMEDIES = {
    "no_labels": "check the text column and --characters_to_ignore",
    "too_short": "lower --min_duration_in_seconds",
    "too_long": "raise --max_duration_in_seconds",
    "more_labels_than_frames": "check that texts and clips belong together",
}
# Stands for a space where the vocabulary has no word delimiter, so that it counts as unknown and can be seen.
VISIBLE_SPACE = "\u2423"


@dataclass(frozen=True)
class Selection:
    """The utterances that take part in training.

    Attributes:
        rows: dataset rows, ascending, [N].
        num_labels: labels of each, [N].
        reasons: for every row of the split 0, or 1 + the index in `details` of the reason that left it out.
        details: each reason's name, with a function from row to the numbers behind it.
    """

    rows: np.ndarray
    num_labels: np.ndarray
    reasons: np.ndarray
    details: Mapping[str, Callable[[int], str]]

    @property
    def dropped(self) -> Iterator[tuple[int, str, str]]:
        """(row, reason, detail) of every row left out, by row; made one by one, since a subset leaves out most."""
        names = list(self.details)
        for row in np.flatnonzero(self.reasons):
            name = names[self.reasons[row] - 1]
            yield int(row), name, self.details[name](row)

    @property
    def drops_by_reason(self) -> Counter[str]:
        """Number of rows left out, by reason."""
        counts = np.bincount(self.reasons, minlength=len(self.details) + 1)[1:]
        return Counter({name: int(count) for name, count in zip(self.details, counts, strict=True) if count})


def select_training_rows(
    dataset: ShardDataset, config: TrainConfig, normalizer: TextNormalizer, vocabulary: Vocabulary, hf_config: object
) -> Selection:
    """Apply the duration limits, the CTC limit (frames >= labels + adjacent repeats) and the subset settings.

    Raises:
        UsageError: when nothing is left.
    """
    num_labels, needed = _count_labels(dataset, normalizer, vocabulary)
    seconds = dataset.num_samples / SAMPLE_RATE_HZ
    frames = num_frames(dataset.num_samples.astype(np.int64), hf_config.conv_kernel, hf_config.conv_stride)
    shortest, longest = config.min_duration_in_seconds, config.max_duration_in_seconds
    broken = (num_labels == 0, seconds < shortest, seconds > longest, frames < np.maximum(needed, 1))
    details = {
        "no_labels": lambda row: "the text is empty after normalisation",
        "too_short": lambda row: f"{seconds[row]:.3f} s of at least {shortest} s",
        "too_long": lambda row: f"{seconds[row]:.3f} s of at most {longest} s",
        "more_labels_than_frames": lambda row: (
            f"{frames[row]} frames, {needed[row]} needed for {num_labels[row]} labels"
        ),
        "not_in_subset": lambda row: "train_fraction or max_train_samples",
    }
    reasons = np.zeros(len(dataset), np.int8)
    for code, rows in enumerate(broken, 1):
        reasons[rows & (reasons == 0)] = code
    kept = np.flatnonzero(reasons == 0)
    subset = _draw_subset(kept, config)
    reasons[np.setdiff1d(kept, subset, assume_unique=True)] = len(details)
    selection = Selection(subset, num_labels[subset], reasons, details)
    if not len(subset):
        drops = selection.drops_by_reason.most_common()
        raise UsageError(
            f"no training utterance of {len(dataset)} is left "
            f"({', '.join(f'{reason} {count}' for reason, count in drops)}): {REMEDIES[drops[0][0]]}"
        )
    return selection


def draw_subset(rows: np.ndarray, max_samples: int | None, seed: int) -> np.ndarray:
    """All of `rows`, or a fixed subset of `max_samples` drawn by the seed, ascending."""
    if max_samples is None or max_samples >= len(rows):
        return rows
    return np.sort(rows[np.random.default_rng(seed).permutation(len(rows))[:max_samples]])


def write_drop_list(path: Path, dataset: ShardDataset, selection: Selection) -> None:
    """`split,id,reason,detail` of every training utterance that the run leaves out, line by line."""

    def write(file: BinaryIO) -> None:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(("split", "id", "reason", "detail"))
        ids = itertools.compress(dataset.column("id"), selection.reasons)
        for utterance_id, (_, reason, detail) in zip(ids, selection.dropped, strict=True):
            table.writerow((dataset.folder.name, utterance_id, reason, detail))
        lines.detach()  # The file stays open for its owner.

    write_atomically(path, write)


def check_coverage(dataset: ShardDataset, normalizer: TextNormalizer, vocabulary: Vocabulary) -> str:
    """Refuse a vocabulary that does not fit the text; returns a line for the screen.

    Raises:
        UsageError: above MAX_UNKNOWN_FRACTION unknown characters, with the setting that would mend it.
    """
    coverage = _measure(dataset, normalizer, vocabulary)
    known = f"{1 - coverage.unknown_fraction:.2%}"
    if coverage.unknown_fraction <= MAX_UNKNOWN_FRACTION:
        named = ", ".join(f"{character!r} {count}" for character, count in _commonest(coverage.unknown)[:8])
        return f"{known} of {coverage.characters} characters known" + (f"; unknown: {named}" if named else "")
    named = " ".join(character for character, _ in _commonest(coverage.unknown)[:12])
    raise UsageError(
        f"the vocabulary knows {known} of the training characters, at least {1 - MAX_UNKNOWN_FRACTION:.1%} is needed; "
        f"unknown: {named}; {_coverage_remedy(dataset, normalizer, vocabulary, coverage.unknown)}"
    )


def _commonest(unknown: Counter[str]) -> list[tuple[str, int]]:
    """By count, then by code point: `most_common` leaves ties in an order that changes from run to run."""
    return sorted(unknown.items(), key=lambda item: (-item[1], item[0]))


def _measure(
    dataset: ShardDataset, normalizer: TextNormalizer, vocabulary: Vocabulary, max_texts: int | None = None
) -> Coverage:
    texts = (normalizer(text) for text in itertools.islice(dataset.column("text"), max_texts))
    if vocabulary.delimiter_id is None:
        texts = (text.replace(" ", VISIBLE_SPACE) for text in texts)
    return measure_coverage(texts, vocabulary)


def _coverage_remedy(
    dataset: ShardDataset, normalizer: TextNormalizer, vocabulary: Vocabulary, unknown: Counter[str]
) -> str:
    """The least change of settings that covers the texts, tried on them, not guessed."""
    cases = {f"--case {case}": replace(normalizer, case=case) for case in ("upper", "lower", "keep")}
    candidates = dict(cases)
    # Marks that combine with a letter are part of it: to ignore them would spoil the text.
    marks = "".join(
        sorted(c for c in unknown if not c.isalnum() and not unicodedata.combining(c) and c != VISIBLE_SPACE)
    )
    if marks:
        ignored = normalizer.characters_to_ignore + marks
        adding = f"{marks} added to --characters_to_ignore"
        candidates[adding] = replace(normalizer, characters_to_ignore=ignored)
        candidates |= {
            f"{case} and {adding}": replace(changed, characters_to_ignore=ignored) for case, changed in cases.items()
        }
    for setting, changed in candidates.items():
        fraction = _measure(dataset, changed, vocabulary, TEXTS_PER_BLOCK).unknown_fraction
        if fraction <= MAX_UNKNOWN_FRACTION:
            return f"with {setting} coverage is {1 - fraction:.2%}"
    return "no such setting mends it: build a vocabulary from the text with --vocabulary train (and a new head)"


def show_utterances(
    dataset: ShardDataset, rows: np.ndarray, normalizer: TextNormalizer, vocabulary: Vocabulary
) -> list[str]:
    """Lines with raw text, normalised text, ids and decoded ids of the first few rows.

    Raises:
        UsageError: when decoding the ids does not give the normalised text back (unknown characters aside).
    """
    lines = []
    for row in rows[:UTTERANCES_SHOWN]:
        raw = dataset[int(row)].text
        normalised = normalizer(raw)
        ids = vocabulary.encode(normalised)
        decoded = vocabulary.decode_labels(ids)
        # An unknown character decodes to the unknown token, which coverage has judged already.
        if vocabulary.unknown_id not in ids and decoded != normalised:
            raise UsageError(
                f"the vocabulary does not give a text back: {normalised!r} became {decoded!r}; "
                "check --vocabulary, --case and --characters_to_ignore"
            )
        lines += [
            f"  text       {raw}",
            f"  normalised {normalised}",
            f"  ids        {ids.tolist()}",
            f"  decoded    {decoded}",
        ]
    return lines


def check_disk(folder: Path, needed_bytes: int) -> str:
    """Refuse a place that cannot be written or cannot hold the run's checkpoints; returns a line for the screen."""
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        state = "cannot be written to" if existing.is_dir() else "is a file"
        raise UsageError(f"{existing} {state}: choose another --output_dir than {folder}")
    free = free_bytes(existing)
    if free < needed_bytes:
        raise UsageError(
            f"{existing} has {free / 1e9:.1f} GB free, the run needs {needed_bytes / 1e9:.1f} GB: "
            "lower --save_total_limit or choose another --output_dir"
        )
    return f"{needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free"


def _count_labels(
    dataset: ShardDataset, normalizer: TextNormalizer, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    num_labels = np.zeros(len(dataset), np.int32)
    needed = np.zeros(len(dataset), np.int32)
    for start, block in _blocks(dataset):
        for row, text in enumerate(normalizer.normalize_many(block), start):
            labels = vocabulary.encode(text)
            num_labels[row], needed[row] = len(labels), required_frames(labels)
    return num_labels, needed


def _blocks(dataset: ShardDataset) -> Iterator[tuple[int, list[str]]]:
    block: list[str] = []
    start = 0
    for text in dataset.column("text"):
        block.append(text)
        if len(block) == TEXTS_PER_BLOCK:
            yield start, block
            start, block = start + len(block), []
    if block:
        yield start, block


def _draw_subset(rows: np.ndarray, config: TrainConfig) -> np.ndarray:
    wanted = max(1, round(len(rows) * config.train_fraction)) if len(rows) else 0
    if config.max_train_samples is not None:
        wanted = min(wanted, config.max_train_samples)
    chosen = np.random.default_rng([config.seed, 1]).permutation(len(rows))[:wanted]
    return np.sort(rows[chosen])
