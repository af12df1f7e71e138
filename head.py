"""A trained CTC head for another vocabulary: rows of shared letters are kept, new ones begin as the nearest letter's.

A row is the weight and the bias of one output. A copy stays exactly what it was copied from, with no noise added: the
two rows differ in the labels that they are for, and so in their gradients, from the first update on. Hidden size H, V
outputs of the new head, U of the old one.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import nn

from findings import some_of
from text import Vocabulary, composed, visible

# Marks of tone, which change a vowel less than marks of quality do: grave, acute, tilde, macron, hook above, caron.
TONE_MARKS = "\u0300\u0301\u0303\u0304\u0309\u030c"
TOKENS_SHOWN = 12


@dataclass(frozen=True)
class Growth:
    """Where the rows of a new head come from.

    Attributes:
        sources: id of the old row for each new one, -1 for one that is drawn, [V].
        kept: new tokens that the old head has, in this case or the other.
        copied: new tokens with the old token that theirs begins as.
        drawn: new tokens without any.
        dropped: old tokens whose rows nothing keeps.
    """

    sources: np.ndarray
    kept: tuple[str, ...]
    copied: tuple[tuple[str, str], ...]
    drawn: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """The same tokens, in another order or case: the head has been trained for them."""
        return not (self.copied or self.drawn or self.dropped)

    def describe(self) -> str:
        """One line for the screen."""
        parts = [f"{len(self.kept)} rows kept"]
        for count, what, names in (
            (len(self.copied), "copied", [f"{visible(new)} from {visible(old)}" for new, old in self.copied]),
            (len(self.drawn), "drawn", list(map(visible, self.drawn))),
            (len(self.dropped), "of the checkpoint dropped", list(map(visible, self.dropped))),
        ):
            if count:
                parts.append(f"{count} {what} ({some_of(names, TOKENS_SHOWN)})")
        return "head: " + ", ".join(parts)


def plan_growth(old: Vocabulary, new: Vocabulary, nearest: Mapping[str, str]) -> Growth:
    """Which old row each new one begins as.

    Blank, unknown token and word delimiter are matched by what they do, everything else by its letter: the same
    (canonically equivalent) one; else the one of the other case; else what decomposition leaves of it, with as many
    marks as possible; else those that `nearest` names. A combining mark of its own is none of these, and is drawn.
    """
    roles = {new.pad_token: old.pad_token, new.unknown_token: old.unknown_token}
    if new.delimiter_id is not None and old.delimiter_id is not None:
        roles[new.delimiter_token] = old.delimiter_token
    letters = {composed(token): token for token in reversed(old.token_ids) if token not in roles.values()}
    of_new = {composed(token) for token in new.token_ids}

    sources = np.full(len(new), -1)
    kept, copied, drawn = [], [], []
    for token, index in new.token_ids.items():
        if token in roles:
            source, is_kept = roles[token], True
        else:
            source, is_kept = _find(composed(token), letters, of_new, nearest)
        if source is None:
            drawn.append(token)
            continue
        sources[index] = old.token_ids[source]
        if is_kept:
            kept.append(token)
        else:
            copied.append((token, source))
    used = set(sources.tolist())
    dropped = tuple(token for token, index in old.token_ids.items() if index not in used)
    return Growth(sources, tuple(kept), tuple(copied), tuple(drawn), dropped)


@torch.no_grad()
def take_rows(head: nn.Linear, old: nn.Linear, sources: np.ndarray) -> None:
    """Overwrite the rows of a drawn head that have a source; weights [V, H] and [U, H], biases [V] and [U]."""
    from_old = torch.from_numpy(sources)
    has_source = from_old >= 0
    head.weight[has_source] = old.weight[from_old[has_source]]
    head.bias[has_source] = old.bias[from_old[has_source]]


def _find(
    letter: str, letters: Mapping[str, str], of_new: set[str], nearest: Mapping[str, str]
) -> tuple[str | None, bool]:
    """The old token for a new one, and whether it is the same letter."""
    if letter in letters:
        return letters[letter], True
    for spelling in _other_cases(letter):
        if spelling in letters:
            # Where the new head has both cases, the row is kept for its own and copied for the other.
            return letters[spelling], spelling not in of_new
    for candidate in _simpler(letter, nearest):
        for spelling in (candidate, *_other_cases(candidate)):
            if spelling in letters:
                return letters[spelling], False
    return None, False


def _other_cases(letter: str) -> Iterator[str]:
    for spelling in (letter.lower(), letter.upper()):
        # ß becomes SS: two letters, neither of them ß.
        if spelling != letter and len(spelling) == len(letter):
            yield composed(spelling)


def _simpler(letter: str, nearest: Mapping[str, str]) -> Iterator[str]:
    """What is left of a letter without some of its marks, fewest taken first, tones before others; then the table."""
    decomposed = unicodedata.normalize("NFD", letter)
    marks = [character for character in decomposed if unicodedata.category(character) == "Mn"]
    base = "".join(character for character in decomposed if unicodedata.category(character) != "Mn")
    if len(base) != 1:
        return
    for count in range(1, len(marks) + 1):
        taken = combinations(range(len(marks)), count)
        for places in sorted(taken, key=lambda places: sum(marks[place] not in TONE_MARKS for place in places)):
            yield composed(base + "".join(mark for place, mark in enumerate(marks) if place not in places))
    # A letter that composes with its mark may have a line of its own in the table (ї).
    for whole in dict.fromkeys((letter.lower(), base.lower())):
        yield from nearest.get(whole, "")
