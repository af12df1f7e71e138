"""How often an epoch hears each kind of clip: groups of a column, and several prepared sets by weight.

An epoch keeps its length. Each set gets its share of it by --data_weights, and within a set (or all of them) each group
a share in proportion to n^(1/T), n being its clips and T the --sampling_temperature: 1 is the natural share, and
`balanced`, the limit of T, the same for all. This is the sampling of multilingual models, which write it with the
exponent alpha = 1/T: Arivazhagan et al. 2019 (arXiv:1907.05019) with T = 5, XLM-R (Conneau et al. 2020,
arXiv:1911.02116) with alpha = 0.3, and for speech XLS-R (Babu et al. 2021, arXiv:2111.09296).

Nothing is left to chance but which clips: the counts are whole numbers, the same in every epoch, and the clips of a
group take turns. N: training clips, G: groups.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atomic import write_table
from audio import SAMPLE_RATE_HZ
from config import TrainConfig
from data import ShardDataset
from errors import UsageError
from findings import Finding
from joined import CORPUS, JoinedDataset
from slices import OWN_COLUMNS, group_by_value

BALANCED = "balanced"
SAMPLING_FILE = "sampling.csv"
COLUMNS = (
    *("corpus", "column", "group", "clips", "hours", "share", "drawn_per_epoch", "hours_per_epoch", "drawn_share"),
    "times_per_clip",
)
GROUPS_SHOWN = 12
# A judgement: clips that come more often than this in every epoch are soon known by heart.
MAX_TIMES_PER_CLIP = 10


@dataclass(frozen=True)
class Group:
    """Clips that are drawn alike.

    Attributes:
        corpus: the set that they are of, "" where all sets are drawn from alike.
        name: value of the column.
        num_clips: how many there are.
        hours: of their audio.
        draws: how many an epoch hears, repetitions included.
    """

    corpus: str
    name: str
    num_clips: int
    hours: float
    draws: int

    @property
    def times_per_clip(self) -> float:
        """How often an epoch hears each of them; some once more than others."""
        return self.draws / self.num_clips

    @property
    def label(self) -> str:
        """Set and value."""
        return f"{self.corpus}, {self.name}" if self.corpus else self.name


@dataclass(frozen=True)
class Sampling:
    """What each epoch hears; a pure function of seed and epoch.

    Attributes:
        column: that divides the clips into groups.
        groups: G of them.
        codes: group of each clip, [N].
        turns: place of each clip among those of its group, [N]; the ones that come once more in an epoch follow each
            other in it, and the next epoch goes on behind them.
    """

    column: str
    groups: tuple[Group, ...]
    codes: np.ndarray
    turns: np.ndarray

    def draw(self, epoch: int) -> np.ndarray:
        """The clips of an epoch, ascending, int [N]: each floor(k / n) or ceil(k / n) times for k draws of n clips."""
        sizes, draws = self._sizes, self._draws
        once_more = draws % sizes
        first = epoch * once_more % sizes
        is_extra = (self.turns - first[self.codes]) % sizes[self.codes] < once_more[self.codes]
        return np.repeat(np.arange(len(self.codes)), (draws // sizes)[self.codes] + is_extra)

    def samples_per_epoch(self, num_samples: np.ndarray) -> float:
        """Samples of audio that an epoch hears, on average over epochs, of clips with these lengths, [N]."""
        return float((num_samples * (self._draws / self._sizes)[self.codes]).sum())

    def num_unheard(self, num_epochs: int) -> int:
        """Clips that so many epochs never hear: those of a group take turns, so it is a matter of counting."""
        return int(np.maximum(self._sizes - num_epochs * self._draws, 0).sum())

    @property
    def _sizes(self) -> np.ndarray:
        return np.array([group.num_clips for group in self.groups])

    @property
    def _draws(self) -> np.ndarray:
        return np.array([group.draws for group in self.groups])


def check_column(dataset: ShardDataset | JoinedDataset, name: str | None) -> None:
    """Whether the data can be divided by a column.

    Raises:
        UsageError: it has no such column, or it is a measure, an id or the text.
    """
    known = [column for column in dataset.column_names if column not in OWN_COLUMNS]
    if name is None or name in known:
        return
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    several = "; corpus needs several folders in --data_dir" if name == CORPUS else ""
    raise UsageError(f"--sample_by {name}: {hint}{dataset.folder} has {', '.join(known)}{several}")


def plan_sampling(dataset: ShardDataset | JoinedDataset, rows: np.ndarray, config: TrainConfig) -> Sampling | None:
    """How the training rows are drawn, or None where the settings ask for nothing.

    Args:
        dataset: the training split.
        rows: that take part, ascending, [N].
        config: column, temperature, weights and seed.

    Raises:
        UsageError: no row of a set takes part that has a weight.
    """
    if (config.sample_by is None and config.data_weights is None) or not len(rows):
        return None
    column = config.sample_by or CORPUS
    grouping = group_by_value(column, dataset.column(column, rows))
    outer = np.zeros(len(rows), np.int64) if config.data_weights is None else dataset.sets_of(rows)
    pairs, codes = np.unique(outer * len(grouping.groups) + grouping.codes, return_inverse=True)
    sizes = np.bincount(codes)
    of_set = pairs // len(grouping.groups)
    draws = _draws_of_groups(sizes, of_set, _draws_of_sets(dataset, outer, config.data_weights), _exponent(config))
    hours = np.bincount(codes, dataset.num_samples[rows] / SAMPLE_RATE_HZ / 3600)
    groups = tuple(
        Group(
            dataset.names[of_set[code]] if config.data_weights and column != CORPUS else "",
            grouping.groups[pair % len(grouping.groups)],
            int(sizes[code]),
            float(hours[code]),
            int(draws[code]),
        )
        for code, pair in enumerate(pairs)
    )
    return Sampling(column, groups, codes.astype(np.int32), _take_turns(codes, sizes, config.seed))


def share_out(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` in whole numbers in proportion to `weights`, by the largest remainder (Hamilton's method)."""
    exact = total * (weights / weights.sum())
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def describe(sampling: Sampling) -> list[str]:
    """What an epoch hears, for the screen: a line per group, the first ones of many."""
    total = len(sampling.codes)
    lines = [f"by {sampling.column}, {len(sampling.groups):,} groups; an epoch draws {total:,} clips"]
    for group in sampling.groups[:GROUPS_SHOWN]:
        lines.append(
            f"{group.label}: {group.num_clips:,} clips, {group.hours:.2f} h, {group.num_clips / total:.1%}; drawn "
            f"{group.draws:,}, {group.draws / total:.1%}, each {group.times_per_clip:.2f} times"
        )
    more = len(sampling.groups) - GROUPS_SHOWN
    return lines + ([f"and {more:,} more groups: {SAMPLING_FILE}"] if more > 0 else [])


def check_sampling(sampling: Sampling | None, num_epochs: int) -> list[Finding]:
    """How many clips the run never hears; a warning where some are repeated until they are known by heart."""
    if sampling is None:
        return []
    most = max(sampling.groups, key=lambda group: group.times_per_clip)
    unheard = [group for group in sampling.groups if not group.draws]
    result = (
        f"by {sampling.column}, {len(sampling.groups):,} groups; most often the {most.num_clips:,} clips of "
        f"{most.label}, {most.times_per_clip:.2f} times an epoch"
    )
    clips = sampling.num_unheard(num_epochs)
    result += f"; {clips:,} clips are never heard in the {num_epochs} epochs of the run" if clips else ""
    facts = {
        "groups": len(sampling.groups), "most_times_per_clip": most.times_per_clip, "unheard": len(unheard),
        "unheard_clips": clips,
    }  # fmt: skip
    if unheard:
        result += f"; never {', '.join(group.label for group in unheard[:3])}"
        return [Finding("sampling", result, "warning", "raise its --data_weights, or leave the set out", facts)]
    if most.times_per_clip > MAX_TIMES_PER_CLIP:
        remedy = "lower --sampling_temperature or the weight, or record more of it"
        return [Finding("sampling", result, "warning", remedy, facts)]
    return [Finding("sampling", result, facts=facts)]


def write_sampling(path: Path, sampling: Sampling) -> None:
    """`sampling.csv`: a row per group. The draws are those of every epoch, the hours their mean over epochs."""
    write_table(path, COLUMNS, _table(sampling))


def _table(sampling: Sampling) -> Iterator[tuple[object, ...]]:
    num_clips = len(sampling.codes)
    for group in sampling.groups:
        yield (
            group.corpus,
            sampling.column,
            group.name,
            group.num_clips,
            f"{group.hours:.4f}",
            f"{group.num_clips / num_clips:.6f}",
            group.draws,
            f"{group.hours * group.times_per_clip:.4f}",
            f"{group.draws / num_clips:.6f}",
            f"{group.times_per_clip:.4f}",
        )


def _exponent(config: TrainConfig) -> float:
    """1/T; of `balanced` 0."""
    return 0.0 if config.sampling_temperature == BALANCED else 1 / config.sampling_temperature


def _draws_of_sets(dataset: ShardDataset | JoinedDataset, sets: np.ndarray, weights: list[float] | None) -> np.ndarray:
    """How many clips an epoch takes of each set; of all together without weights."""
    if weights is None:
        return np.array([len(sets)])
    empty = np.flatnonzero(np.bincount(sets, minlength=len(weights)) == 0)
    if len(empty):
        raise UsageError(
            f"--data_weights: no clip of {dataset.names[empty[0]]} takes part in training (preflight.py says why): "
            "leave the set out"
        )
    return share_out(len(sets), np.array(weights))


def _draws_of_groups(sizes: np.ndarray, of_set: np.ndarray, draws_of_sets: np.ndarray, exponent: float) -> np.ndarray:
    draws = np.zeros(len(sizes), np.int64)
    for number, of_one in enumerate(draws_of_sets):
        inside = of_set == number
        # To the power of 1 a size stays what it is: natural shares are exact.
        draws[inside] = share_out(int(of_one), sizes[inside] ** float(exponent))
    return draws


def _take_turns(codes: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """A random place for each clip within its group, [N]."""
    # A stream of its own, apart from those of the epochs.
    chance = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, 1))).permutation(len(codes))
    order = np.lexsort((chance, codes))
    turns = np.empty(len(codes), np.int64)
    turns[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return turns
