"""Which utterances train, and why the others do not; dev and test are always scored whole.

N: utterances of the training split.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atomic import write_table
from audio import SAMPLE_RATE_HZ
from config import PretrainConfig, RunSettings, TrainConfig
from corpora import DROP_COLUMNS
from data import ShardDataset
from findings import Finding
from model import masked_axes, num_frames
from overlap import Overlap
from pruning import find_pruned
from transcripts import TextFacts

# What helps when a rule has left nothing to train on.
REMEDIES = {
    "no_labels": "check the text column and --characters_to_ignore",
    "too_short": "lower --min_duration_in_seconds",
    "too_short_to_mask": "prepare longer pieces, or lower --mask_time_length",
    "too_long": "raise --max_duration_in_seconds",
    "more_labels_than_frames": "check that texts and clips belong together",
    "audio_in_dev": "prepare a corpus whose splits do not share clips",
    "audio_in_test": "prepare a corpus whose splits do not share clips",
    "suspect_rate": "leave out --prune_suspects",
    "not_in_subset": "lower --train_fraction, or leave out --train_rest",
    "prune_list": "list fewer clips in --prune_list, or lower --prune_fraction",
}
# A speaking rate this many robust standard deviations from the corpus' median is suspect: in a normal distribution one
# utterance in 15,000, and the tails of real corpora are mostly wrong transcripts and cut-off clips.
SUSPECT_DEVIATIONS = 4.0
# Standard deviation of a normal distribution over its median absolute deviation.
MAD_TO_DEVIATION = 1.4826
# People differ by a tenth at least; a corpus that repeats a few sentences would else suspect every other one.
MIN_LOG_DEVIATION = 0.1
# Fewer utterances have no range of their own.
MIN_UTTERANCES_FOR_RANGE = 20
# Some real clips are that fast or slow; more than these are a fault of the corpus.
MAX_SUSPECT_FRACTION = 0.005
EXAMPLES = 3
# The finding that refuses when nothing is left.
COUNT_CHECK = "training clips"


@dataclass(frozen=True)
class Selection:
    """The utterances that take part in training.

    Attributes:
        rows: dataset rows, ascending, [N kept].
        num_labels: labels of each, [N kept].
        reasons: for every row of the split 0, or 1 + the index in `details` of the reason that left it out, [N].
        details: each reason's name, with a function from row to the numbers behind it.
        suspects: rows whose speaking rate lies outside the corpus' own range, whether they train or not, bool [N].
        findings: what is to be said about the choice.
    """

    rows: np.ndarray
    num_labels: np.ndarray
    reasons: np.ndarray
    details: Mapping[str, Callable[[int], str]]
    suspects: np.ndarray
    findings: tuple[Finding, ...]

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
        return _count_drops(self.reasons, list(self.details))


def select_training_rows(
    dataset: ShardDataset, config: TrainConfig, texts: TextFacts, overlap: Overlap, hf_config: object
) -> Selection:
    """Apply the duration limits, the CTC limit (frames >= labels + adjacent repeats), the split rules and the subset.

    Args:
        dataset: the training split.
        config: limits and subset.
        texts: of the training split.
        overlap: rows whose very audio is in dev or test.
        hf_config: of the encoder, for its frames and time masks.
    """
    frames = num_frames(dataset.num_samples.astype(np.int64), hf_config.conv_kernel, hf_config.conv_stride)
    usable = (texts.num_labels > 0) & texts.can_align(frames)
    speaking = measure_speaking(dataset, texts.num_labels, usable)
    pruned = find_pruned(dataset, config)
    rules = _rules(dataset, config, texts, overlap, frames, usable, speaking)
    rules |= {} if pruned is None else {"prune_list": (pruned.rows, pruned.detail)}
    subset, reasons, details = _apply(rules, len(dataset), config)
    is_suspect_here = speaking.suspects & (reasons != len(details))
    findings = (
        _count_finding(len(dataset), len(subset), _count_drops(reasons, list(details))),
        _alignment_finding(dataset, reasons, list(details), frames[subset], hf_config),
        _suspect_finding(dataset, is_suspect_here, speaking, config.prune_suspects),
        *([] if pruned is None else [pruned.finding]),
    )
    return Selection(subset, texts.num_labels[subset], reasons, details, speaking.suspects, findings)


def select_untranscribed_rows(
    dataset: ShardDataset, config: PretrainConfig, overlap: Overlap, shortest_samples: int
) -> Selection:
    """Apply the duration limits, the split rules and the subset; texts are not looked at.

    Args:
        dataset: the training split.
        config: limits and subset.
        overlap: rows whose very audio is in dev or test.
        shortest_samples: of a clip in which something is left to predict.
    """
    rules = _duration_rules(dataset, config)
    rules["too_short_to_mask"] = (
        dataset.num_samples < shortest_samples,
        lambda row: f"{dataset.num_samples[row]} samples, {shortest_samples} needed for a mask",
    )
    rules |= {reason: (rows, overlap.details[reason]) for reason, rows in overlap.leaked.items()}
    subset, reasons, details = _apply(rules, len(dataset), config)
    finding = _count_finding(len(dataset), len(subset), _count_drops(reasons, list(details)))
    return Selection(
        subset, np.zeros(len(subset), np.int64), reasons, details, np.zeros(len(dataset), bool), (finding,)
    )


Rules = dict[str, tuple[np.ndarray, Callable[[int], str]]]


def _apply(
    rules: Rules, num_rows: int, config: RunSettings
) -> tuple[np.ndarray, np.ndarray, Mapping[str, Callable[[int], str]]]:
    """Rows that train, ascending, with the `reasons` and `details` of a Selection."""
    reasons = np.zeros(num_rows, np.int8)
    for code, (rows, _) in enumerate(rules.values(), 1):
        reasons[rows & (reasons == 0)] = code
    details = {name: detail for name, (_, detail) in rules.items()}
    details["not_in_subset"] = lambda row: "train_fraction or max_train_samples"
    kept = np.flatnonzero(reasons == 0)
    subset = _draw_subset(kept, config)
    reasons[np.setdiff1d(kept, subset, assume_unique=True)] = len(details)
    return subset, reasons, details


@dataclass(frozen=True)
class Speaking:
    """Labels per second of each utterance, [N], and the corpus' own range of them.

    Attributes:
        rates: labels per second, without the silence at both ends.
        slowest, fastest: limits of the range.
        suspects: who lies outside, bool.
        deviations: of the logarithms from their median, in robust standard deviations; NaN where there is no range.
    """

    rates: np.ndarray
    slowest: float
    fastest: float
    suspects: np.ndarray
    deviations: np.ndarray


def _rules(
    dataset: ShardDataset,
    config: TrainConfig,
    texts: TextFacts,
    overlap: Overlap,
    frames: np.ndarray,
    usable: np.ndarray,
    speaking: Speaking,
) -> Rules:
    """By reason the rows that it leaves out, bool [N], and a row's numbers in words.

    In the order in which they count: a row goes by the first that it falls under.
    """
    num_labels, needed = texts.num_labels, texts.required_frames
    return {
        "no_labels": (num_labels == 0, lambda row: "the text is empty after normalisation"),
        **_duration_rules(dataset, config),
        "more_labels_than_frames": (
            ~usable,
            lambda row: f"{frames[row]} frames, {needed[row]} needed for {num_labels[row]} labels",
        ),
        **{reason: (rows, overlap.details[reason]) for reason, rows in overlap.leaked.items()},
        "suspect_rate": (
            speaking.suspects & config.prune_suspects,
            lambda row: (
                f"{speaking.rates[row]:.1f} labels/s, the corpus has {speaking.slowest:.1f} to {speaking.fastest:.1f}"
            ),
        ),
    }


def _duration_rules(dataset: ShardDataset, config: RunSettings) -> Rules:
    seconds = dataset.num_samples / SAMPLE_RATE_HZ
    shortest, longest = config.min_duration_in_seconds, config.max_duration_in_seconds
    return {
        "too_short": (seconds < shortest, lambda row: f"{seconds[row]:.3f} s of at least {shortest} s"),
        "too_long": (seconds > longest, lambda row: f"{seconds[row]:.3f} s of at most {longest} s"),
    }


def draw_subset(rows: np.ndarray, max_samples: int | None, seed: int) -> np.ndarray:
    """All of `rows`, or a fixed subset of `max_samples` drawn by the seed, ascending."""
    if max_samples is None or max_samples >= len(rows):
        return rows
    return np.sort(rows[np.random.default_rng(seed).permutation(len(rows))[:max_samples]])


def write_drop_list(path: Path, dataset: ShardDataset, selection: Selection) -> None:
    """`split,id,reason,detail` of every training utterance that the run leaves out, line by line."""
    ids = dataset.column("id", np.flatnonzero(selection.reasons))
    drops = ((reason, detail) for _, reason, detail in selection.dropped)
    _write_list(path, dataset, zip(ids, drops, strict=True))


def write_suspects(path: Path, dataset: ShardDataset, selection: Selection) -> None:
    """The same columns for every utterance with a suspect speaking rate, whether it trains or not."""
    detail = selection.details["suspect_rate"]
    rows = np.flatnonzero(selection.suspects)
    ids = dataset.column("id", rows)
    _write_list(path, dataset, ((i, ("suspect_rate", detail(row))) for i, row in zip(ids, rows, strict=True)))


def _write_list(path: Path, dataset: ShardDataset, entries: Iterator[tuple[str, tuple[str, str]]]) -> None:
    rows = ((dataset.folder.name, utterance_id, *why) for utterance_id, why in entries)
    write_table(path, DROP_COLUMNS, rows)


def _count_drops(reasons: np.ndarray, names: list[str]) -> Counter[str]:
    counts = np.bincount(reasons, minlength=len(names) + 1)[1:]
    return Counter({name: int(count) for name, count in zip(names, counts, strict=True) if count})


def measure_speaking(dataset: ShardDataset, num_labels: np.ndarray, usable: np.ndarray) -> Speaking:
    """Labels per second without the silence at both ends, and the corpus' own robust range of them.

    The range is the median of the logarithms, more or less SUSPECT_DEVIATIONS robust standard deviations: rates are
    about log-normal, and wrong transcripts must not widen the range that they are judged by.
    """
    silence = dataset.numpy_column("leading_silence_seconds") + dataset.numpy_column("trailing_silence_seconds")
    spoken = np.maximum(dataset.num_samples / SAMPLE_RATE_HZ - silence, 1 / SAMPLE_RATE_HZ)
    rates = num_labels / spoken
    if np.count_nonzero(usable) < MIN_UTTERANCES_FOR_RANGE:
        return Speaking(rates, 0.0, np.inf, np.zeros(len(rates), bool), np.full(len(rates), np.nan))
    logarithms = np.log(rates[usable])
    median = np.median(logarithms)
    deviation = max(MAD_TO_DEVIATION * np.median(np.abs(logarithms - median)), MIN_LOG_DEVIATION)
    reach = SUSPECT_DEVIATIONS * deviation
    slowest, fastest = float(np.exp(median - reach)), float(np.exp(median + reach))
    deviations = np.full(len(rates), np.nan)
    deviations[usable] = (logarithms - median) / deviation
    return Speaking(rates, slowest, fastest, usable & ((rates < slowest) | (rates > fastest)), deviations)


def _count_finding(total: int, kept: int, drops: Counter[str]) -> Finding:
    """How many train, and what became of the others; refused when nothing is left."""
    said = ", ".join(f"{reason} {count:,}" for reason, count in drops.most_common())
    facts = {"kept": kept, "left_out": dict(drops)}
    if kept:
        result = f"{kept:,} of {total:,} take part" + (f"; left out: {said}" if said else "")
        return Finding(COUNT_CHECK, result, facts=facts)
    remedy = REMEDIES[drops.most_common(1)[0][0]]
    return Finding(COUNT_CHECK, f"no training utterance of {total} is left ({said})", "refused", remedy, facts)


def _alignment_finding(
    dataset: ShardDataset, reasons: np.ndarray, names: list[str], frames: np.ndarray, hf_config: object
) -> Finding:
    rows = np.flatnonzero(reasons == names.index("more_labels_than_frames") + 1)
    unmasked = int(np.count_nonzero(frames < hf_config.mask_time_length)) if masked_axes(hf_config)[0] else 0
    parts = [f"{len(rows)} clips have fewer frames than CTC needs for their labels and are left out"]
    if len(rows):
        parts[0] += f" ({_examples(dataset, rows)})"
    if unmasked:
        parts.append(f"{unmasked} are shorter than a time mask of {hf_config.mask_time_length} frames: unmasked")
    facts = {"left_out": len(rows), "unmasked": unmasked}
    # One in a hundred is what careless cutting leaves; more says that texts and clips do not belong together.
    if len(rows) > 0.01 * len(dataset):
        remedy = "check that texts and clips belong together; drop_list.csv has the frames and labels of each"
        return Finding("alignment", "; ".join(parts), "warning", remedy, facts)
    return Finding("alignment", "; ".join(parts), facts=facts)


def _suspect_finding(dataset: ShardDataset, suspects: np.ndarray, speaking: Speaking, pruned: bool) -> Finding:
    rows, slowest, fastest = np.flatnonzero(suspects), speaking.slowest, speaking.fastest
    if not np.isfinite(fastest):
        return Finding("speaking rate", f"not judged, fewer than {MIN_UTTERANCES_FOR_RANGE} clips")
    result = f"{slowest:.1f} to {fastest:.1f} labels/s is usual here, {len(rows)} clips lie outside"
    facts = {"slowest": slowest, "fastest": fastest, "suspects": len(rows), "pruned": pruned}
    if not len(rows):
        return Finding("speaking rate", result, facts=facts)
    worst = rows[np.argsort(-np.abs(np.log(np.maximum(speaking.rates[rows], 1e-9) / np.sqrt(slowest * fastest))))]
    result += f" ({_examples(dataset, worst)})"
    if pruned:
        return Finding("speaking rate", result + " and are left out", facts=facts)
    remedy = "listen to those in suspects.csv, or leave them out with --prune_suspects"
    verdict = "warning" if len(rows) > MAX_SUSPECT_FRACTION * len(dataset) else "ok"
    return Finding("speaking rate", result, verdict, remedy, facts)


def _examples(dataset: ShardDataset, rows: np.ndarray) -> str:
    return ", ".join(dataset[int(row)].id for row in rows[:EXAMPLES]) + (", ..." if len(rows) > EXAMPLES else "")


def _draw_subset(rows: np.ndarray, config: RunSettings) -> np.ndarray:
    wanted = max(1, round(len(rows) * config.train_fraction)) if len(rows) else 0
    if config.max_train_samples is not None:
        wanted = min(wanted, config.max_train_samples)
    order = np.random.default_rng([config.seed, 1]).permutation(len(rows))
    return np.sort(rows[order[wanted:] if config.train_rest else order[:wanted]])
