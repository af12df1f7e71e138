"""Several prepared sets as one: the same split of each, one behind the other.

`open_sets` gives what the rest of the program reads, whether --data_dir names one folder or several. A set is known by
the name of its folder, which is the column `corpus` of every row and the beginning of its id. N: rows of all sets.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from audio import SAMPLE_RATE_HZ
from data import ShardDataset, Utterance, has_utterances
from errors import UsageError

# The column that says which set a row is of; a column of that name in a set itself is hidden behind it.
CORPUS = "corpus"


class JoinedDataset(Dataset):
    """One split of several sets; a `ShardDataset` in all that is asked of one.

    A speaker's name means the same voice in all sets. A column that one set lacks is empty there.

    Attributes:
        names: of the sets, each once.
        members: the split of each.
        folder: for messages; its name is that of the split.
        num_samples: lengths of all rows, [N].
    """

    def __init__(self, names: Sequence[str], members: Sequence[ShardDataset]) -> None:
        self.names, self.members = tuple(names), tuple(members)
        self.folder = Path(" + ".join(str(one.folder.parent) for one in members)) / members[0].folder.name
        self.num_samples = np.concatenate([one.num_samples for one in members])
        self._starts = np.cumsum([0, *map(len, members)])  # and the end of the last one

    def __len__(self) -> int:
        return len(self.num_samples)

    def __getitem__(self, row: int) -> Utterance:
        if not 0 <= row < len(self):
            raise IndexError(row)
        place = int(self.sets_of(np.asarray(row)))
        found = self.members[place][row - int(self._starts[place])]
        return Utterance(self._id(place, found.id), found.audio, found.text, self.names[place])

    def sets_of(self, rows: np.ndarray) -> np.ndarray:
        """Which of `names` each of these rows is of, of the same shape."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    @property
    def seconds(self) -> float:
        """Audio of the split in seconds."""
        return float(self.num_samples.sum(dtype=np.int64)) / SAMPLE_RATE_HZ

    @property
    def column_names(self) -> list[str]:
        """Names of the columns of any set, and `corpus`."""
        names = dict.fromkeys(name for one in self.members for name in one.column_names)
        return [*names, *([] if CORPUS in names else [CORPUS])]

    @cached_property
    def fingerprint(self) -> str:
        """One hash over those of the sets, in their order; their names are no part of it."""
        return sha256("".join(one.fingerprint for one in self.members).encode()).hexdigest()

    def column(self, name: str, rows: np.ndarray | None = None) -> Iterator[str]:
        """The values of one column in row order, or of `rows` (ascending) alone; "" where a set has no such column.

        Raises:
            UsageError: when no set has it.
        """
        self._require_column(name)
        rows = np.arange(len(self)) if rows is None else rows
        bounds = np.searchsorted(rows, self._starts)
        for place, one in enumerate(self.members):
            wanted = rows[bounds[place] : bounds[place + 1]] - self._starts[place]
            if name == CORPUS:
                yield from (self.names[place] for _ in wanted)
            elif name == "id":
                yield from (self._id(place, found) for found in one.column(name, wanted))
            elif name in one.column_names:
                yield from one.column(name, wanted)
            else:
                yield from ("" for _ in wanted)

    def numpy_column(self, name: str) -> np.ndarray:
        """The values of a numeric column in row order, [N].

        Raises:
            UsageError: when the corpora have no such column.
        """
        return np.concatenate([one.numpy_column(name) for one in self.members])

    def _id(self, place: int, of_set: str) -> str:
        # Two corpora may well have a 0001.wav each; lists by id must not mean both.
        return f"{self.names[place]}/{of_set}"

    def _require_column(self, name: str) -> None:
        if name not in self.column_names:
            raise UsageError(f"{self.folder} has no column {name!r}; it has {', '.join(self.column_names)}")


def open_sets(data_dirs: Sequence[Path], split: str) -> ShardDataset | JoinedDataset:
    """A split of one prepared set, or of those of several that have it.

    Raises:
        UsageError: none has it, or one is damaged; every set needs rows to train on.
    """
    if len(data_dirs) == 1:
        return ShardDataset(data_dirs[0] / split)
    named = list(zip(name_sets(data_dirs), data_dirs, strict=True))
    if split != "train":
        named = [(name, folder) for name, folder in named if has_utterances(folder / split)] or named[:1]
    names, folders = zip(*named, strict=True)
    return JoinedDataset(names, [ShardDataset(folder / split) for folder in folders])


def members(dataset: ShardDataset | JoinedDataset) -> Sequence[ShardDataset]:
    """The sets that a dataset is made of: itself where it is one."""
    return dataset.members if isinstance(dataset, JoinedDataset) else (dataset,)


def name_sets(data_dirs: Sequence[Path]) -> list[str]:
    """The last part of each folder's path, or as many of the last parts as tell them apart."""
    parts = [folder.resolve().parts for folder in data_dirs]
    # The settings have been checked: no two are the same folder.
    names_by_count = (["/".join(of_one[-count:]) for of_one in parts] for count in range(1, max(map(len, parts)) + 1))
    return next(names for names in names_by_count if len(set(names)) == len(names))
