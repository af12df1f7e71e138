"""What kind of error each word is: spaces missing or put in, words lost or put in, marks, letters.

References and hypotheses are aligned word by word with the least cost, in characters: a pair of words costs its letter
edits; k reference words written as one, or one written as k, cost the letter edits between them without spaces, and
one for each space; a word that is lost or put in costs its length and one. Of equal costs pairs come first. The edits
are those of Levenshtein over code points of NFC text.

N: words of a reference, M: of a hypothesis.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from rapidfuzz.distance import Levenshtein

from text import composed

# Words of so many letters are short.
SHORT_WORD_LETTERS = 3
# So many words run into one, or one falls apart into so many, are still seen as that.
MAX_JOINED = 4
# Every class, with what it means; a reference word has one, or none where it is right.
CLASSES = {
    "space missing": "words written as one, their letters right",
    "space inserted": "a word written as several, its letters right",
    "space and letters": "spaces missing or put in, and letters wrong",
    "marks": "the word but for tone marks or other combining marks",
    "letters": "another word in its place",
    "short word lost": f"nothing in its place, {SHORT_WORD_LETTERS} letters or fewer",
    "long word lost": "nothing in its place, more letters",
    "word inserted": "a word where the reference has none",
}
INSERTED = "word inserted"


@dataclass
class ErrorClasses:
    """Words of the references by the class of their error under two hypotheses, and what became of them.

    `word inserted` counts words of the hypotheses, place by place; all else counts words of the references.

    Attributes:
        words: of the references.
        first: errors of the first hypotheses.
        second: errors of the second.
        mended: of the first class, right under the second hypothesis.
        broken: right under the first, of this class under the second.
    """

    words: int = 0
    first: Counter[str] = field(default_factory=Counter)
    second: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def add(self, reference: str, first: str, second: str) -> None:
        """Count one utterance."""
        before, inserted_before = classify(reference, first)
        after, inserted_after = classify(reference, second)
        self.words += len(before)
        self.first += Counter(filter(None, before)) + Counter({INSERTED: inserted_before.total()})
        self.second += Counter(filter(None, after)) + Counter({INSERTED: inserted_after.total()})
        self.mended += Counter(old for old, new in zip(before, after, strict=True) if old and not new)
        self.broken += Counter(new for old, new in zip(before, after, strict=True) if new and not old)
        self.mended += Counter({INSERTED: (inserted_before - inserted_after).total()})
        self.broken += Counter({INSERTED: (inserted_after - inserted_before).total()})

    def __add__(self, other: "ErrorClasses") -> "ErrorClasses":
        return ErrorClasses(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def facts(self) -> dict[str, object]:
        """For a JSON file: every class, in its order."""
        columns = {"greedy": self.first, "with_lm": self.second, "mended": self.mended, "broken": self.broken}
        rows = {name: {column: counts[name] for column, counts in columns.items()} for name in CLASSES}
        return {"words": self.words, "classes": rows, "meaning": CLASSES}


def classify(reference: str, hypothesis: str) -> tuple[list[str | None], Counter[int]]:
    """The class of each reference word, None where it is right, [N]; and words put in before reference word n."""
    reference_words, hypothesis_words = (composed(text).split() for text in (reference, hypothesis))
    classes: list[str | None] = []
    inserted: Counter[int] = Counter()
    for own, heard in align(reference_words, hypothesis_words):
        if not own:
            inserted[len(classes)] += len(heard)
        classes += [_class_of(own, heard)] * len(own)
    return classes, inserted


def _class_of(own: list[str], heard: list[str]) -> str | None:
    if own == heard:
        return None
    if not heard:
        return "short word lost" if _letters(own[0]) <= SHORT_WORD_LETTERS else "long word lost"
    if len(own) == len(heard):
        return "marks" if without_marks(own[0]) == without_marks(heard[0]) else "letters"
    if "".join(own) != "".join(heard):
        return "space and letters"
    return "space missing" if len(own) > len(heard) else "space inserted"


def without_marks(word: str) -> str:
    """A word less its combining marks (tone marks, dots below)."""
    return "".join(letter for letter in unicodedata.normalize("NFD", word) if not unicodedata.combining(letter))


def _letters(word: str) -> int:
    return len(without_marks(word))


def align(reference: list[str], hypothesis: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Pairs of words in order: one and one, several and one, one and several, one and none, none and one.

    Words that a plain word alignment finds right stay; between them the cost of this module decides.
    """
    own: list[str] = []
    heard: list[str] = []
    for block in Levenshtein.opcodes(reference, hypothesis):
        these = reference[block.src_start : block.src_end]
        if block.tag == "equal":
            yield from _align_block(own, heard)
            yield from (([word], [word]) for word in these)
            own, heard = [], []
        else:
            own, heard = own + these, heard + hypothesis[block.dest_start : block.dest_end]
    yield from _align_block(own, heard)


def _align_block(own: list[str], heard: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    steps = [(1, 1), (1, 0), (0, 1)]
    steps += [step for size in range(2, MAX_JOINED + 1) for step in ((size, 1), (1, size))]

    @cache
    def cheapest(n: int, m: int) -> tuple[int, int]:
        """The least cost of the first n and m words, and the step that ends it."""
        if n == m == 0:
            return 0, -1
        possible = ((k, step) for k, step in enumerate(steps) if step[0] <= n and step[1] <= m)
        return min((cheapest(n - a, m - b)[0] + _cost(own[n - a : n], heard[m - b : m]), k) for k, (a, b) in possible)

    pairs, n, m = [], len(own), len(heard)
    for total in range(n + m):  # From the front, so that no call is deeper than one word.
        for left in range(max(0, total - m), min(n, total) + 1):
            cheapest(left, total - left)
    while n or m:
        a, b = steps[cheapest(n, m)[1]]
        pairs.append((own[n - a : n], heard[m - b : m]))
        n, m = n - a, m - b
    return reversed(pairs)


def _cost(own: list[str], heard: list[str]) -> int:
    if not own or not heard:
        return len("".join(own + heard)) + 1
    return Levenshtein.distance("".join(own), "".join(heard)) + abs(len(own) - len(heard))
