"""Which split a row belongs to, where the corpus does not say or is not asked.

Rows are grouped (by speaker, by sentence, or each utterance alone), groups are put in the order of a hash of (seed,
group), and test, then dev, take groups from its start until their share is reached as nearly as whole groups allow.
The outcome is a pure function of the set of groups, the fractions and the seed: two thresholds.
"""

import difflib
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from config import PrepareConfig
from corpora import SPLITS, Corpus, SourceRow, sentence_key
from errors import UsageError

# Asked when only --test_speakers says how to split.
SPLIT_REMEDY = (
    "--split_by speaker|sentence|utterance (with --split_fractions), or --test_speakers NAME, or a column `split`"
)

# Of the recordings of a corpus without text.
DEV_FRACTION = 0.02
# Times as much as was asked for is held out as whole recordings.
MAX_DEV_EXCESS = 2
# Splits of rows that may train: the corpus says so, or nothing.
TRAINING = ("train", None)


@dataclass(frozen=True)
class SplitPlan:
    """`split_of(row)` for every row of the corpus, and what has to be said about it."""

    split_of: Callable[[SourceRow], str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Thresholds:
    """Groups whose hash is below `test` are test, below `dev` dev, others train."""

    key: Callable[[SourceRow], str]
    seed: int
    test: int
    dev: int

    def split_of(self, row: SourceRow) -> str:
        value = stable_hash(self.key(row), self.seed)
        return "test" if value < self.test else "dev" if value < self.dev else "train"


def plan_splits(corpus: Corpus, config: PrepareConfig) -> SplitPlan:
    """Decide the split of every row: the corpus's own, or as --split_by and --test_speakers say.

    Raises:
        UsageError: nothing says how to split, an unknown test speaker, too few speakers or rows.
    """
    if config.test_speakers:
        return _plan_test_speakers(corpus, config)
    if config.split_by is not None:
        return _plan_split_by(corpus, config)
    if config.untranscribed:
        return _plan_untranscribed(corpus, config)
    without = sum(row.split is None for row in corpus.read())
    if without:
        raise UsageError(f"--corpus {config.corpus}: nothing says which rows are for training: give {SPLIT_REMEDY}")
    return SplitPlan(lambda row: row.split)


def stable_hash(text: str, seed: int = 0) -> int:
    """64 bits that are the same in every process and version."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _plan_split_by(corpus: Corpus, config: PrepareConfig) -> SplitPlan:
    fractions = _three(config.split_fractions)
    own = Counter(row.split for row in corpus.read())
    keep_test = fractions[2] == 0 and own["test"] > 0
    notes = []
    if keep_test:
        notes.append(f"the corpus's own {own['test']:,} test rows stay test; its other rows are divided")
    elif set(own) - {None}:
        notes.append("--split_by overrides the corpus's own splits: all of its rows are divided again")

    def included(row: SourceRow) -> bool:
        return not (keep_test and row.split == "test")

    divide, said = _divide(corpus, included, config.split_by, fractions, config)
    return SplitPlan(lambda row: divide(row) if included(row) else "test", (*notes, *said))


def _plan_untranscribed(corpus: Corpus, config: PrepareConfig) -> SplitPlan:
    """The corpus's own dev and test; all else trains, but for a share of whole recordings where there is no dev."""
    fraction = DEV_FRACTION if config.dev_fraction is None else config.dev_fraction
    own: Counter[str | None] = Counter()
    some_recordings: set[str] = set()  # of those that train: one is too few to hold one out, and so is one piece
    for row in corpus.read():
        own[row.split] += 1
        if row.split in TRAINING and len(some_recordings) < 2:
            some_recordings.add(row.audio_path)
    kept = [f"{split} ({own[split]:,} rows)" for split in ("dev", "test") if own[split]]
    notes = [f"the corpus's own {' and '.join(kept)} stay out of training"] if kept else []
    total = sum(own[split] for split in TRAINING)
    if total < 2 or own["dev"] or fraction == 0:
        return SplitPlan(lambda row: row.split or "train", tuple(notes))
    for by in ("recording", "utterance")[len(some_recordings) < 2 :]:
        divide, said = _divide(
            corpus, lambda row: row.split in TRAINING, by, (1 - fraction, fraction, 0.0), config
        )  # fmt: skip
        # Of few recordings even one may be most of the speech; then pieces of all of them are held out.
        held_out = sum(row.split in TRAINING and divide(row) == "dev" for row in corpus.read())
        if held_out <= max(MAX_DEV_EXCESS * fraction * total, 1):
            break
    return SplitPlan(lambda row: divide(row) if row.split in TRAINING else row.split, (*notes, *said))


def _plan_test_speakers(corpus: Corpus, config: PrepareConfig) -> SplitPlan:
    chosen = set(config.test_speakers)
    speakers = Counter(row.speaker for row in corpus.read())
    for name in config.test_speakers:
        if name not in speakers:
            near = difflib.get_close_matches(name, list(speakers), n=3, cutoff=0.0)
            raise UsageError(f"--test_speakers {name}: no such speaker among {len(speakers)}; near: {', '.join(near)}")
    train_share, dev_share, _ = _three(config.split_fractions)
    dev_share /= train_share + dev_share
    by = config.split_by or "utterance"
    notes = [f"test is the speakers {', '.join(sorted(chosen))}; dev is taken from the other speakers by {by}"]
    divide, said = _divide(corpus, lambda row: row.speaker not in chosen, by, (1 - dev_share, dev_share, 0.0), config)
    return SplitPlan(lambda row: "test" if row.speaker in chosen else divide(row), (*notes, *said))


def _divide(
    corpus: Corpus,
    included: Callable[[SourceRow], bool],
    by: str,
    fractions: tuple[float, float, float],
    config: PrepareConfig,
) -> tuple[Callable[[SourceRow], str], list[str]]:
    """A division of the included rows into train, dev and test, and what to say about it."""
    key = {
        "speaker": lambda row: row.speaker,
        "sentence": _sentence,
        "utterance": lambda row: row.id,
        "recording": lambda row: row.audio_path,
    }[by]
    hashes = array("Q")
    for row in corpus.read():
        if by == "speaker" and not row.speaker and included(row) and row.problem is None:
            raise UsageError(f"--split_by speaker: row {row.id} has no speaker: use --split_by sentence or utterance")
        if included(row):
            hashes.append(stable_hash(key(row), config.seed))
    groups, counts = np.unique(np.asarray(hashes, np.uint64), return_counts=True)
    wanted = sum(fraction > 0 for fraction in fractions)
    if by == "speaker" and len(groups) == 2 and wanted == 3:
        return _divide_two_speakers(corpus, included, fractions, config)
    if len(groups) < wanted:
        remedy = "use --split_by sentence or utterance" if by == "speaker" else "give fewer --split_fractions"
        raise UsageError(f"--split_by {by}: the corpus has {len(groups)} for {wanted} splits: {remedy}")
    thresholds = _thresholds(groups, counts, fractions, key, config.seed)
    return thresholds.split_of, [_describe(by, fractions, groups, counts, thresholds)]


def _divide_two_speakers(
    corpus: Corpus,
    included: Callable[[SourceRow], bool],
    fractions: tuple[float, float, float],
    config: PrepareConfig,
) -> tuple[Callable[[SourceRow], str], list[str]]:
    speakers = {row.speaker for row in corpus.read() if included(row) and row.problem is None}
    tested = min(speakers, key=lambda name: stable_hash(name, config.seed))
    train_share = fractions[0] / (fractions[0] + fractions[1])
    divide, notes = _divide(
        corpus,
        lambda row: included(row) and row.speaker != tested,
        "utterance",
        (train_share, 1 - train_share, 0.0),
        config,
    )
    said = f"two speakers are too few for three splits: {tested} is test, dev is taken from the other by utterance"
    return lambda row: "test" if row.speaker == tested else divide(row), [said, *notes]


def _thresholds(
    groups: np.ndarray,
    counts: np.ndarray,
    fractions: tuple[float, float, float],
    key: Callable[[SourceRow], str],
    seed: int,
) -> _Thresholds:
    """Cut the groups (sorted by hash) where the shares of test and dev are met most nearly, one group at least."""
    cumulative = np.concatenate(([0], np.cumsum(counts)))
    kept_for_train = int(fractions[0] > 0)
    kept_for_dev = int(fractions[1] > 0)
    test_end = _nearest_cut(cumulative, 0, fractions[2], len(groups) - kept_for_train - kept_for_dev)
    dev_end = _nearest_cut(cumulative, test_end, fractions[1], len(groups) - kept_for_train)
    test_cut, dev_cut = (int(groups[end]) if end < len(groups) else 2**64 for end in (test_end, dev_end))
    return _Thresholds(key, seed, test_cut if test_end else 0, dev_cut if dev_end else 0)


def _nearest_cut(cumulative: np.ndarray, start: int, fraction: float, last: int) -> int:
    if fraction == 0:
        return start
    taken = cumulative[start + 1 : last + 1] - cumulative[start]
    return start + 1 + int(np.argmin(np.abs(taken - fraction * cumulative[-1])))


def _describe(
    by: str, fractions: tuple[float, float, float], groups: np.ndarray, counts: np.ndarray, thresholds: _Thresholds
) -> str:
    is_test = groups < thresholds.test if thresholds.test < 2**64 else np.ones(len(groups), bool)
    is_held_out = groups < thresholds.dev if thresholds.dev < 2**64 else np.ones(len(groups), bool)
    parts = (~is_held_out & ~is_test, is_held_out & ~is_test, is_test)
    total = counts.sum()
    shares = ", ".join(
        f"{split} {counts[part].sum() / total:.1%} (asked {fraction:.0%})"
        for split, part, fraction in zip(SPLITS, parts, fractions, strict=True)
        if fraction
    )
    return f"divided by {by} ({len(groups):,} in all): {shares}"


def _sentence(row: SourceRow) -> str:
    return sentence_key(row.text or "")


def _three(fractions: list[float]) -> tuple[float, float, float]:
    train, dev, *test = fractions
    return train, dev, test[0] if test else 0.0
