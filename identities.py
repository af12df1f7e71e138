"""Who says what in a split, as numbers that can be compared and kept: sentences, speakers and clips.

A value's number is the same in every process (64 bits: 1.5 million values collide once in 16 million runs), and 0 where
there is none. N: utterances of the split.
"""

import hashlib
import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cache import Arrays, FactCache
from corpora import sentence_keys
from data import ShardDataset
from joined import JoinedDataset, members

TEXTS_PER_BLOCK = 10_000
NONE = 0
# Of the splits that are open: a folder that cannot be written keeps nothing, and everyone asks.
_known: "weakref.WeakKeyDictionary[ShardDataset | JoinedDataset, Identities]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Identities:
    """Of a split; uint64 [N] each.

    Attributes:
        sentences: letters, marks and numbers of the text; NONE where it has none.
        speakers: NONE where the corpus does not say.
        clips: the samples themselves.
    """

    sentences: np.ndarray
    speakers: np.ndarray
    clips: np.ndarray


def identities(dataset: ShardDataset | JoinedDataset) -> Identities:
    """Of every utterance; found once, and kept with the open split and beside the data."""
    if dataset not in _known:
        names = ("sentences", "speakers", "clips")
        found = [_find_or_recall(one, names) for one in members(dataset)]
        _known[dataset] = Identities(*(np.concatenate([arrays[name] for arrays in found]) for name in names))
    return _known[dataset]


def _find_or_recall(dataset: ShardDataset, names: tuple[str, ...]) -> Arrays:
    cache, shapes = FactCache(dataset.folder.parent), dict.fromkeys(names, (len(dataset),))
    return cache.get("identities", dataset.fingerprint, lambda: _find(dataset), shapes)


def distinct(values: np.ndarray) -> np.ndarray:
    """Each of `values` once, ascending. np.unique takes 50 times as long where most of them differ (1.5 million)."""
    ordered = np.sort(values)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))] if len(ordered) else ordered


def is_among(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Which of `values` are among `members` (distinct and ascending), bool of the same shape."""
    if not len(members):
        return np.zeros(values.shape, bool)
    return members[np.minimum(np.searchsorted(members, values), len(members) - 1)] == values


def _find(dataset: ShardDataset) -> dict[str, np.ndarray]:
    texts, sentences = dataset.column("text"), []
    while block := list(itertools.islice(texts, TEXTS_PER_BLOCK)):
        sentences.append(_numbers(sentence_keys(block)))
    return {
        "sentences": np.concatenate(sentences),
        "speakers": _numbers(dataset.column("speaker")),
        "clips": np.frombuffer(b"".join(bytes.fromhex(one[:16]) for one in dataset.column("audio_sha256")), np.uint64),
    }


def _numbers(values: Iterable[str]) -> np.ndarray:
    digests = (_digest(value) if value else bytes(8) for value in values)
    return np.frombuffer(b"".join(digests), np.uint64)


def _digest(value: str) -> bytes:
    return hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=8).digest()
