"""What one pass over the transcripts of a split finds: labels, frames that CTC needs, characters without a label.

N: utterances of the split.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cache import FactCache
from data import ShardDataset
from joined import JoinedDataset, members
from languages import Language
from metrics import count_letters
from text import Coverage, TextNormalizer, Vocabulary, measure_coverage, required_frames_many

TEXTS_PER_BLOCK = 10_000
# Stands for a space where the vocabulary has no word delimiter, so that it counts as unknown and can be seen.
VISIBLE_SPACE = "\u2423"
# Of the text around an unknown character, kept to show it.
EXAMPLE_CHARACTERS = 80


@dataclass(frozen=True)
class TextFacts:
    """Of one split, under one normalisation and vocabulary.

    Attributes:
        num_labels: labels of each utterance, int32 [N].
        required_frames: frames that CTC needs at least, int32 [N].
        coverage: characters that the vocabulary has no label for.
    """

    num_labels: np.ndarray
    required_frames: np.ndarray
    coverage: Coverage

    def can_align(self, frames: np.ndarray) -> np.ndarray:
        """Whether CTC can align each utterance to so many frames, bool [N]; one frame is the least."""
        return frames >= np.maximum(self.required_frames, 1)


def measure_texts(
    dataset: ShardDataset, normalizer: TextNormalizer, vocabulary: Vocabulary, cache: FactCache
) -> TextFacts:
    """Normalise and encode every transcript once (70,000 a second), or take the facts from `cache`."""
    key = (dataset.fingerprint, *_settings(normalizer), *_settings(vocabulary))
    shapes = {"num_labels": (len(dataset),), "required_frames": (len(dataset),), "coverage": ()}
    arrays = cache.get("texts", key, lambda: _measure(dataset, normalizer, vocabulary), shapes)
    fields = json.loads(str(arrays["coverage"]))
    coverage = Coverage(fields["characters"], Counter(fields["unknown"]), fields["examples"])
    return TextFacts(arrays["num_labels"], arrays["required_frames"], coverage)


def measure_letters(dataset: ShardDataset, normalizer: TextNormalizer, cache: FactCache) -> dict[str, int]:
    """How often each letter and digraph stands in the transcripts of a split, or the same from `cache`."""
    key = (dataset.fingerprint, *_settings(normalizer))

    def count() -> dict[str, np.ndarray]:
        letters = count_letters(normalised_texts(dataset, normalizer), normalizer.digraphs)
        return {"letters": np.asarray(json.dumps(letters))}

    return json.loads(str(cache.get("letters", key, count, {"letters": ()})["letters"]))


def normalised_texts(dataset: ShardDataset | JoinedDataset, normalizer: TextNormalizer) -> Iterator[str]:
    """The transcripts of a split by the rules of the set that each is of."""
    return itertools.chain.from_iterable(texts for _, texts in _normalised_blocks(dataset, normalizer))


def coverage_of(texts: Iterable[str], vocabulary: Vocabulary) -> Coverage:
    """Coverage of normalised transcripts; a space counts too where the vocabulary cannot write one."""
    return measure_coverage(_visible(texts, vocabulary), vocabulary)


def cut_around(text: str, character: str, length: int = EXAMPLE_CHARACTERS) -> str:
    """`length` characters of a text around one of its characters, which may be there in another case.

    Ellipses stand for what is cut off.
    """
    found = next((at for c in (character, character.swapcase()) if (at := text.find(c)) >= 0), 0)
    start = max(0, min(found - length // 2, len(text) - length))
    end = start + length
    return ("\u2026" if start else "") + text[start:end] + ("\u2026" if end < len(text) else "")


def _measure(dataset: ShardDataset, normalizer: TextNormalizer, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    num_labels = np.zeros(len(dataset), np.int32)
    needed = np.zeros(len(dataset), np.int32)
    coverage = Coverage()
    for start, texts in _normalised_blocks(dataset, normalizer):
        labels, counts = vocabulary.encode_many(texts)
        rows = slice(start, start + len(texts))
        num_labels[rows], needed[rows] = counts, required_frames_many(labels, counts)
        coverage.add(_coverage_of_block(texts, labels, counts, vocabulary))
    return {
        "num_labels": num_labels,
        "required_frames": needed,
        "coverage": np.asarray(json.dumps(vars(coverage))),
    }


def _coverage_of_block(
    texts: list[str], labels: np.ndarray, num_labels: np.ndarray, vocabulary: Vocabulary
) -> Coverage:
    """As `measure_coverage`, which looks at those texts only that hold an unknown label."""
    spaces = 0 if vocabulary.delimiter_id is None else int(np.count_nonzero(labels == vocabulary.delimiter_id))
    owners = np.repeat(np.arange(len(texts)), num_labels)
    odd = np.unique(owners[labels == vocabulary.unknown_id])
    found = measure_coverage(_visible((texts[row] for row in odd), vocabulary), vocabulary)
    examples = {character: cut_around(text, character) for character, text in found.examples.items()}
    return dataclasses.replace(found, characters=len(labels) - spaces, examples=examples)


def _visible(texts: Iterable[str], vocabulary: Vocabulary) -> Iterable[str]:
    if vocabulary.delimiter_id is not None:
        return texts
    return (text.replace(" ", VISIBLE_SPACE) for text in texts)


def _settings(rules: TextNormalizer | Vocabulary) -> list[object]:
    """Every field that decides what a text becomes, as JSON values."""
    values = [getattr(rules, field.name) for field in dataclasses.fields(rules)]
    if isinstance(rules, TextNormalizer):
        names = [field.name for field in dataclasses.fields(rules) if field.name not in ("language", "of_sets")]
        languages = [rules.language, *itertools.chain.from_iterable(rules.of_sets)]
        values = [getattr(rules, name) for name in names]
        values += [own.facts() if isinstance(own, Language) else own for own in languages]
    return [sorted(value) if isinstance(value, frozenset) else value for value in values]


def _normalised_blocks(
    dataset: ShardDataset | JoinedDataset, normalizer: TextNormalizer
) -> Iterator[tuple[int, list[str]]]:
    """Rows of one set after the other, so many at a time: the first row, and their texts."""
    names, start = dataset.names if isinstance(dataset, JoinedDataset) else ("",), 0
    for name, one in zip(names, members(dataset), strict=True):
        texts, rules = one.column("text"), normalizer.for_set(name)
        while block := list(itertools.islice(texts, TEXTS_PER_BLOCK)):
            yield start, rules.normalize_many(block)
            start += len(block)
