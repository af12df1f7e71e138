"""Letters of an evaluation as tables and lines: how many of each were found, what was written in their place, which
are too rare to learn.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from findings import some_of
from text import visible

if TYPE_CHECKING:  # It needs torch, which a report does without.
    from metrics import LetterCounts

# A recall from fewer occurrences is a matter of chance, and fewer in the training text are hardly learned.
MIN_OCCURRENCES = 20
LETTERS_SHOWN = 6
RARE_LETTERS_SHOWN = 30

Letters = Mapping[str, Mapping[str, Any]]


def describe_letters(letters: "LetterCounts", in_training: Mapping[str, int] | None = None) -> dict[str, dict]:
    """For a JSON file: each letter and digraph of the references, the most frequent first.

    Args:
        letters: counts of an evaluation.
        in_training: how often each letter stands in the training text; None where that is not known.

    Returns:
        `occurrences` and `recall`, how often it was `written` at all, what was `taken_for` it most often ("" for
        nothing, None where it was always found) and how many `times`, and `in_training`.
    """
    worst: dict[str, tuple[str, int]] = {}
    for (letter, found), count in sorted(letters.mistaken.items(), key=lambda item: (-item[1], item[0])):
        worst.setdefault(letter, (found, count))
    described = {}
    for letter, count in sorted(letters.occurrences.items(), key=lambda item: (-item[1], item[0])):
        taken_for, times = worst.get(letter, (None, 0))
        described[letter] = {
            "occurrences": count,
            "recall": letters.recall(letter),
            "written": letters.written[letter],
            "taken_for": taken_for,
            "times": times,
        }
        if in_training is not None:
            described[letter]["in_training"] = in_training.get(letter, 0)
    return described


def find_rare(in_training: Mapping[str, int]) -> dict[str, int]:
    """Letters of the training text that are too rare to learn, the rarest first."""
    rare = [(count, letter) for letter, count in in_training.items() if count < MIN_OCCURRENCES]
    return {letter: count for count, letter in sorted(rare)}


def letter_lines(letters: Letters, rare_in_training: Mapping[str, int], file: str) -> list[str]:
    """The letters that are found least and what stands for them, those too rare to tell or to learn, and digraphs.

    Args:
        letters: as `describe_letters` gives them.
        rare_in_training: as `find_rare` gives them.
        file: that holds them all.
    """
    singles = {letter: one for letter, one in letters.items() if len(letter) == 1}
    digraphs = {letter: one for letter, one in letters.items() if len(letter) > 1}
    common = [letter for letter, one in singles.items() if one["occurrences"] >= MIN_OCCURRENCES]
    rare = [letter for letter in singles if letter not in common]
    worst = sorted(common, key=lambda letter: singles[letter]["recall"])[:LETTERS_SHOWN]
    unwritten = [letter for letter, one in letters.items() if not one["written"]]
    lines = []
    if worst:
        lines.append(f"letters found least: {_some(worst, singles, _describe)}")
    if digraphs:
        lines.append(f"digraphs: {_some(digraphs, digraphs, _describe)}")
    if rare:
        lines.append(f"rare letters (fewer than {MIN_OCCURRENCES}): {_some(rare, singles, _describe_rare, file)}")
    if rare_in_training:
        named = _some(
            list(rare_in_training), {}, lambda letter, _: f"{visible(letter)} {rare_in_training[letter]}", file
        )
        lines.append(f"seen fewer than {MIN_OCCURRENCES} times in the training text: {named}")
    if unwritten:
        named = _some(unwritten, letters, lambda letter, one: f"{visible(letter)} (of {one['occurrences']:,})", file)
        lines.append(f"never written: {named}")
    return lines


def _describe(letter: str, one: Mapping[str, Any]) -> str:
    said = f"{visible(letter)} {one['recall']:.1%} of {one['occurrences']:,}"
    if one["taken_for"] is None:
        return said
    return f"{said} ({one['times']:,} {name_found(one['taken_for'])})"


def _describe_rare(letter: str, one: Mapping[str, Any]) -> str:
    return f"{visible(letter)} {one['recall']:.0%} of {one['occurrences']}"


def name_found(found: str) -> str:
    """What stands in a letter's place, in words."""
    if not found:
        return "lost"
    return "as a space" if found == " " else f"as {visible(found)}"


def _some(names: list[str] | Mapping[str, Any], facts: Letters, describe: Any, file: str = "") -> str:
    described = [describe(name, facts.get(name, {})) for name in names]
    return some_of(described, RARE_LETTERS_SHOWN, f" in {file}")
