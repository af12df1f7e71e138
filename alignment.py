"""Reference and hypothesis side by side, and what is taken for what.

A word is what white space divides, a character is a code point, and the edits are the fewest, as metrics.py counts
them. Only what is shown in colour goes by whole letters, with their marks.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rapidfuzz.distance import Levenshtein

from text import composed

# One unit of the reference and what stands for it: None for a unit that is lost, or for one that is inserted.
Pair = tuple[str | None, str | None]

# They join letters or choose how one is drawn, and are no letters themselves.
JOINERS = frozenset("\u200c\u200d")


def align_words(reference: str, hypothesis: str) -> list[Pair]:
    """The words of two texts, paired with the fewest edits."""
    return list(_pairs(composed(reference).split(), composed(hypothesis).split()))


def align_characters(reference: str, hypothesis: str) -> list[Pair]:
    """The characters (code points) of two texts, spaces inside them included, paired with the fewest edits."""
    return list(_pairs(composed(reference).strip(), composed(hypothesis).strip()))


def highlight(reference: str, hypothesis: str) -> tuple[list[str], list[str]]:
    """Where two words differ, by letters with their marks.

    Returns:
        For each word its pieces, which are equal and different in turn, an equal one first; it may be empty.
    """
    pairs = list(_pairs(letters(reference), letters(hypothesis)))
    return _pieces(pairs, 0), _pieces(pairs, 1)


def letters(text: str) -> list[str]:
    """Letters with the marks that belong to them (ọ́ is two code points and one letter, also when composed)."""
    found: list[str] = []
    for character in composed(text):
        is_mark = unicodedata.category(character).startswith("M") or character in JOINERS
        if found and (is_mark or found[-1][-1] == "\u200d"):
            found[-1] += character
        else:
            found.append(character)
    return found


def count_errors(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Errors, and the length of the reference."""
    return sum(expected != found for expected, found in pairs), sum(expected is not None for expected, _ in pairs)


@dataclass
class Confusions:
    """What was taken for what, summed over utterances.

    Attributes:
        occurrences: of each unit in the references.
        substitutions: of (reference, hypothesis).
        deletions: of a unit of the reference.
        insertions: of a unit of the hypothesis.
    """

    occurrences: Counter[str] = field(default_factory=Counter)
    substitutions: Counter[tuple[str, str]] = field(default_factory=Counter)
    deletions: Counter[str] = field(default_factory=Counter)
    insertions: Counter[str] = field(default_factory=Counter)

    def add(self, pairs: Sequence[Pair]) -> None:
        """Count the pairs of one utterance."""
        for expected, found in pairs:
            if expected is not None:
                self.occurrences[expected] += 1
            if expected == found:
                continue
            if expected is None:
                self.insertions[found] += 1
            elif found is None:
                self.deletions[expected] += 1
            else:
                self.substitutions[expected, found] += 1

    @property
    def reference_length(self) -> int:
        """Units of all references."""
        return self.occurrences.total()


def _pairs(reference: Sequence[str], hypothesis: Sequence[str]) -> Iterator[Pair]:
    if reference == hypothesis:
        yield from zip(reference, hypothesis, strict=True)
        return
    for step in Levenshtein.opcodes(reference, hypothesis):
        expected = reference[step.src_start : step.src_end]
        found = hypothesis[step.dest_start : step.dest_end]
        if step.tag == "delete":
            yield from ((unit, None) for unit in expected)
        elif step.tag == "insert":
            yield from ((None, unit) for unit in found)
        else:
            yield from zip(expected, found, strict=True)


def _pieces(pairs: Sequence[Pair], side: int) -> list[str]:
    pieces, is_different = [""], False
    for pair in pairs:
        if pair[side] is None:
            continue
        if (pair[0] != pair[1]) != is_different:
            is_different = not is_different
            pieces.append("")
        pieces[-1] += pair[side]
    return pieces
