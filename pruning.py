"""The clips that a file names for --prune_list.

N: utterances of the training split.
"""

import csv
import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio import SAMPLE_RATE_HZ
from config import TrainConfig
from corpora import ID_COLUMNS
from data import ShardDataset
from errors import UsageError
from findings import Finding
from joined import JoinedDataset

# A ranking rounds seconds to a thousandth.
SECONDS_TOLERANCE = 0.0011
EXAMPLES = 3
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Pruned:
    """What --prune_list leaves out.

    Attributes:
        rows: bool [N].
        detail: from a row to the file and what it says about the clip.
        finding: for the screen.
    """

    rows: np.ndarray
    detail: Callable[[int], str]
    finding: Finding


@dataclass(frozen=True)
class _Listed:
    """The lines of a file that are to be left out: numbers of their ids, what each line says about itself.

    Attributes:
        keys: `_key` of the ids, uint64.
        ranks: of a ranking; else 0.
        scores: of a ranking; else NaN.
        seconds: of a ranking; else NaN.
        total: lines of the file.
    """

    keys: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    seconds: np.ndarray
    total: int


def find_pruned(dataset: ShardDataset, config: TrainConfig) -> Pruned | None:
    """The rows that `config.prune_list` names; None without one. Ids alone count, so preparing again does no harm.

    Raises:
        UsageError: a file that cannot be read, that names none of these clips, or that is a ranking of other audio
            under the same ids.
    """
    if config.prune_list is None:
        return None
    path = Path(config.prune_list)
    listed = _read(path, config.prune_fraction)
    if not len(listed.keys):  # A ranking that suggests nothing, or a share of it below half a clip.
        return Pruned(np.zeros(len(dataset), bool), lambda row: path.name, _finding(path, 0, 0, listed.total))
    order = np.argsort(listed.keys, kind="stable")
    rows, line = _match(listed.keys, order, dataset.column("id"), len(dataset))
    if not rows.any() and isinstance(dataset, JoinedDataset):
        # A ranking of one of the sets has its ids without its name.
        own_ids = itertools.chain.from_iterable(one.column("id") for one in dataset.members)
        rows, line = _match(listed.keys, order, own_ids, len(dataset))
        if len(np.unique(dataset.sets_of(np.flatnonzero(rows)))) > 1:
            raise UsageError(
                f"--prune_list {path}: its ids are those of clips in several sets: write them as SET/id, as in "
                "drop_list.csv"
            )
    if not rows.any():
        raise UsageError(
            f"--prune_list {path}: none of its {len(order):,} ids is in {dataset.folder}; they must be written as "
            "in its column `id`, which drop_list.csv shows"
        )
    _check_seconds(path, dataset, rows, listed.seconds[line])

    def detail(row: int) -> str:
        rank = int(listed.ranks[line[row]])
        return (
            f"{path.name}, rank {rank} of {listed.total}, score {listed.scores[line[row]]:.4g}" if rank else path.name
        )

    return Pruned(rows, detail, _finding(path, int(rows.sum()), len(np.unique(listed.keys)), listed.total))


def _match(keys: np.ndarray, order: np.ndarray, ids: Iterable[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `ids` are listed, bool [N], and the place in the list of each, [N]."""
    own = np.fromiter(map(_key, ids), np.uint64, count)
    line = order[np.minimum(np.searchsorted(keys[order], own), len(order) - 1)]
    return keys[line] == own, line


def _check_seconds(path: Path, dataset: ShardDataset, rows: np.ndarray, listed_seconds: np.ndarray) -> None:
    """The same ids under another corpus would leave out the wrong clips without a word."""
    own_seconds = dataset.num_samples / SAMPLE_RATE_HZ
    differing = np.flatnonzero(rows & (np.abs(listed_seconds - own_seconds) > SECONDS_TOLERANCE))
    if len(differing):
        row = int(differing[0])
        raise UsageError(
            f"--prune_list {path} is about other data: {dataset[row].id} has {listed_seconds[row]:.3f} s there and "
            f"{own_seconds[row]:.3f} s in {dataset.folder} ({len(differing):,} clips differ): rank this data"
        )


def _finding(path: Path, found: int, listed: int, total: int) -> Finding:
    facts = {"file": path.name, "lines": total, "listed": listed, "left_out": found, "missing": listed - found}
    result = f"{path.name} lists {listed:,} clips, {found:,} are here"
    if found == listed:
        return Finding("prune list", result, facts=facts)
    remedy = "the others are not in the training split: check that the list belongs to this data"
    return Finding("prune list", result, "warning", remedy, facts)


def _read(path: Path, fraction: float | None) -> _Listed:
    """Those lines that are meant; numbers alone are kept."""
    columns = keys, ranks, scores, seconds = array("Q"), array("q"), array("d"), array("d")
    total, is_ranking = 0, False
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in _lines(path, file):
                total += 1
                is_ranking = "rank" in line
                if is_ranking and fraction is None and line["suggested"] != "yes":
                    continue
                if not line["id"]:
                    raise ValueError("it has no id")
                keys.append(_key(line["id"]))
                ranks.append(int(line.get("rank", 0)))
                scores.append(float(line["score"]) if is_ranking else math.nan)
                seconds.append(float(line["seconds"]) if is_ranking else math.nan)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prune_list {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"--prune_list {path}, line {total + 1} is damaged ({error}): write it again") from error
    if not total:
        raise UsageError(f"--prune_list {path} names no clip: leave the flag out")
    if fraction is not None and not is_ranking:
        raise UsageError(f"--prune_fraction needs a ranking (evaluate.py --rank_train), {path} has no column `rank`")
    last = total if fraction is None else round(fraction * total)
    wanted = np.asarray(ranks) <= last
    return _Listed(*(np.asarray(values)[wanted] for values in columns), total)


def _lines(path: Path, file: Iterator[str]) -> Iterator[dict[str, str]]:
    """Of a table by column, or of a text with an id per line."""
    if path.suffix.lower() not in DELIMITERS:
        yield from ({"id": line.strip()} for line in file if line.strip())
        return
    table = csv.DictReader(file, delimiter=DELIMITERS[path.suffix.lower()])
    names = [name for name in ID_COLUMNS if name in (table.fieldnames or ())]
    if not names:
        raise UsageError(f"--prune_list {path} has no column `id`; it has {', '.join(table.fieldnames or ('none',))}")
    if "rank" in table.fieldnames and "suggested" not in table.fieldnames:
        # Someone's own table, of which all lines count.
        yield from ({"id": line[names[0]]} for line in table)
        return
    yield from ({**line, "id": line[names[0]]} for line in table)


def _key(utterance_id: str) -> int:
    """64 bits: a million listed ids meet one of ten million others by chance once in two million runs."""
    digest = hashlib.blake2b(utterance_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
