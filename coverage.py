"""Does the vocabulary know the characters of the transcripts, and if not, which setting would mend it?"""

import itertools
import shlex
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from data import ShardDataset
from findings import Finding
from joined import CORPUS, JoinedDataset
from text import Coverage, TextNormalizer, Vocabulary, visible
from transcripts import VISIBLE_SPACE, coverage_of, cut_around

MAX_UNKNOWN_FRACTION = 0.005
# Settings are tried on this many transcripts, drawn over the whole set.
TEXTS_TRIED = 10_000
CHARACTERS_SHOWN = 8
EXAMPLE_CHARACTERS_SHOWN = 40
UTTERANCES_SHOWN = 3


def check_coverage(
    sets: Mapping[str, ShardDataset],
    coverages: Mapping[str, Coverage],
    normalizer: TextNormalizer,
    vocabulary: Vocabulary,
) -> list[Finding]:
    """One finding per split: refused for training above MAX_UNKNOWN_FRACTION unknown characters, warned for the others.

    Args:
        sets: the splits by name.
        coverages: what `measure_texts` found in each.
        normalizer: the text rules of the run.
        vocabulary: the labels of the run.
    """
    findings = []
    for split, dataset in sets.items():
        coverage = coverages[split]
        facts = {
            "characters": coverage.characters,
            "unknown_fraction": coverage.unknown_fraction,
            "unknown": {
                character: {"count": count, "example": coverage.examples[character]}
                for character, count in commonest(coverage.unknown)
            },
        }
        name = f"coverage {split}"
        if coverage.unknown_fraction <= MAX_UNKNOWN_FRACTION:
            findings.append(Finding(name, _describe(coverage), facts=facts))
        elif split == "train":
            remedy = _remedy(dataset, normalizer, vocabulary, coverage.unknown)
            result = f"{_describe(coverage)}; at least {1 - MAX_UNKNOWN_FRACTION:.1%} is needed"
            findings.append(Finding(name, result, "refused", remedy, facts))
        else:
            remedy = "each of them is an error that no training mends: see --vocabulary, --case, --characters_to_ignore"
            findings.append(Finding(name, _describe(coverage), "warning", remedy, facts))
    return findings


def check_round_trip(
    dataset: ShardDataset, rows: np.ndarray, normalizer: TextNormalizer, vocabulary: Vocabulary
) -> tuple[list[str], Finding]:
    """Lines with raw text, normalised text, ids and decoded ids of the first few rows, and whether they agree.

    An unknown character decodes to the unknown token, which coverage judges.
    """
    lines, broken = [], None
    for row in rows[:UTTERANCES_SHOWN]:
        utterance = dataset[int(row)]
        raw = utterance.text
        normalised = normalizer.for_set(utterance.corpus)(raw)
        ids = vocabulary.encode(normalised)
        decoded = vocabulary.decode_labels(ids)
        if vocabulary.unknown_id not in ids and decoded != normalised:
            broken = broken or f"{normalised!r} became {decoded!r}"
        lines += [
            f"  text       {raw}",
            f"  normalised {normalised}",
            f"  ids        {ids.tolist()}",
            f"  decoded    {decoded}",
        ]
    if broken:
        remedy = "the vocabulary does not give a text back: check --vocabulary, --case and --characters_to_ignore"
        return lines, Finding("round trip", broken, "refused", remedy)
    return lines, Finding("round trip", "text to ids to text gives the same text")


def commonest(unknown: Counter[str]) -> list[tuple[str, int]]:
    """By count, then by code point: `most_common` leaves ties in an order that changes from run to run."""
    return sorted(unknown.items(), key=lambda item: (-item[1], item[0]))


def _describe(coverage: Coverage) -> str:
    """Share and commonest unknown characters, the first of them in its text."""
    named = []
    for character, count in commonest(coverage.unknown)[:CHARACTERS_SHOWN]:
        where = (
            ""
            if named
            else f', as in "{cut_around(coverage.examples[character], character, EXAMPLE_CHARACTERS_SHOWN)}"'
        )
        named.append(f"{visible(character)} {count:,} ({count / coverage.characters:.2%}{where})")
    more = len(coverage.unknown) - CHARACTERS_SHOWN
    rest = f"; unknown: {', '.join(named)}" + (f" and {more} more" if more > 0 else "") if named else ""
    return f"{1 - coverage.unknown_fraction:.2%} of {coverage.characters:,} characters known{rest}"


def _remedy(dataset: ShardDataset, normalizer: TextNormalizer, vocabulary: Vocabulary, unknown: Counter[str]) -> str:
    """The least change of settings that covers the texts, tried on them, not guessed."""
    cases = {f"--case {case}": replace(normalizer, case=case) for case in ("upper", "lower", "keep")}
    candidates = dict(cases)
    # Marks that combine with a letter are part of it: to ignore them would spoil the text.
    marks = "".join(
        sorted(c for c in unknown if not c.isalnum() and not unicodedata.combining(c) and c != VISIBLE_SPACE)
    )
    if marks:
        ignored = normalizer.characters_to_ignore + marks
        # With "=", since a list that begins with a hyphen would pass for a flag.
        adding = f"--characters_to_ignore={shlex.quote(ignored)}"
        candidates[adding] = replace(normalizer, characters_to_ignore=ignored)
        candidates |= {
            f"{case} {adding}": replace(changed, characters_to_ignore=ignored) for case, changed in cases.items()
        }
    why = _describe_cases(normalizer, vocabulary, unknown)
    texts = _draw_texts(dataset)
    for setting, changed in candidates.items():
        normalised = (changed.for_set(corpus)(text) for corpus, text in texts)
        fraction = coverage_of(normalised, vocabulary).unknown_fraction
        if fraction <= MAX_UNKNOWN_FRACTION:
            return f"{why}with {setting} coverage is {1 - fraction:.2%}"
    return (
        f"{why}no such setting mends it: build a vocabulary from the text with --vocabulary train, or lower "
        "--vocabulary_min_count, which leaves rare letters out"
    )


def _draw_texts(dataset: ShardDataset | JoinedDataset) -> list[tuple[str, str]]:
    """TEXTS_TRIED transcripts, the same ones every time, each with the name of its set ("" where there is one)."""
    rows = np.sort(np.random.default_rng(0).permutation(len(dataset))[:TEXTS_TRIED])
    is_joined = isinstance(dataset, JoinedDataset)
    corpora = dataset.column(CORPUS, rows) if is_joined else itertools.repeat("")
    return list(zip(corpora, dataset.column("text", rows), strict=is_joined))


def _describe_cases(normalizer: TextNormalizer, vocabulary: Vocabulary, unknown: Counter[str]) -> str:
    """`text is lower-case, vocabulary upper-case: ` where the letters differ in nothing else."""
    letters = [character for character in unknown if character.lower() != character.upper()]
    other = [character for character in letters if character.swapcase() in vocabulary.characters]
    if not other or len(other) < len(letters) / 2:
        return ""
    text, labels = ("lower", "upper") if other[0].islower() else ("upper", "lower")
    forced = f" (--case {normalizer.case})" if normalizer.case == text else ""
    return f"text is {text}-case{forced}, vocabulary {labels}-case: "
