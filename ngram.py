"""N-gram models: interpolated modified Kneser-Ney, written in the ARPA format that KenLM reads.

The estimate is the one of KenLM's lmplz without pruning: S. F. Chen and J. Goodman, An Empirical Study of Smoothing
Techniques for Language Modeling (1998), equations 26 and 27, and K. Heafield et al., Scalable Modified Kneser-Ney
Language Model Estimation (ACL 2013). Where the program lmplz is on the PATH it does the work, on disk and in any size.
Elsewhere `estimate` does, in memory (about 100 bytes per word of text and order). No library from pip does: arpabo, the
only one that writes ARPA files, gives next words probabilities that sum to 1.1 to 2.0 instead of 1, and no <unk>.

N: n-grams of one order; a context is known by its place among the n-grams of the order below.
"""

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from errors import RunFailed

BEGIN, END, UNKNOWN = SPECIAL_WORDS = ("<s>", "</s>", "<unk>")
BEGIN_ID, END_ID, UNKNOWN_ID = range(3)
# For counts of which a text is too small (or too regular) to tell: lmplz's --discount_fallback.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
# Of <s>, which is never predicted.
NEVER_LOG10 = -99.0


@dataclass(frozen=True)
class Grams:
    """All n-grams of one order.

    Attributes:
        contexts: place of the first n-1 words among the n-grams of the order below, [N]; zeros for single words.
        suffixes: place of the last n-1 words there, [N]; zeros for single words.
        words: id of the last word, [N].
        counts: occurrences, [N].
        begins: starts with <s>, [N].
    """

    contexts: np.ndarray
    suffixes: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    begins: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A back-off model: probability and back-off weight (log10) of each n-gram of each order."""

    words: list[str]
    grams: list[Grams]
    log10_probabilities: list[np.ndarray]
    log10_backoffs: list[np.ndarray]
    fallback_orders: tuple[int, ...]
    """Orders whose discounts are FALLBACK_DISCOUNTS."""

    def arpa_lines(self) -> Iterator[str]:
        """The ARPA file, line by line."""
        yield "\\data\\\n"
        for order, grams in enumerate(self.grams, 1):
            yield f"ngram {order}={len(grams.words)}\n"
        texts = [""]
        for order, grams in enumerate(self.grams, 1):
            yield f"\n\\{order}-grams:\n"
            places = zip(grams.contexts.tolist(), grams.words.tolist(), strict=True)
            texts = [f"{texts[context]} {self.words[word]}".lstrip() for context, word in places]
            is_highest = order == len(self.grams)
            values = (self.log10_probabilities[order - 1].tolist(), self.log10_backoffs[order - 1].tolist())
            for text, probability, backoff in zip(texts, *values, strict=True):
                yield f"{probability:.7g}\t{text}\n" if is_highest else f"{probability:.7g}\t{text}\t{backoff:.7g}\n"
        yield "\n\\end\\\n"


def estimate(sentences: Iterable[str], order: int) -> Estimate:
    """Modified Kneser-Ney over sentences whose tokens are separated by spaces.

    Args:
        sentences: at least one, none of them empty or with a word of SPECIAL_WORDS.
        order: longest n-gram; shortened to what the longest sentence, with <s> and </s>, can hold.
    """
    words, tokens = _number_words(sentences)
    grams = count_grams(tokens, len(words), order)
    adjusted = _adjusted_counts(grams)
    discounts = [_discounts(counts) for counts in adjusted]
    lower = np.full(1, 1 / (len(words) - 1))  # Uniform over all words and <unk>, not over <s>.
    probabilities, backoffs = [], []
    for level, counts, (of_count, _) in zip(grams, adjusted, discounts, strict=True):
        taken = of_count[np.minimum(counts, 3)]
        totals = np.bincount(level.contexts, counts, minlength=len(lower))
        # Gamma of Chen and Goodman, equation 27: what the discounts leave for the order below.
        gammas = np.divide(np.bincount(level.contexts, taken, minlength=len(lower)), totals, where=totals > 0,
                           out=np.ones_like(totals))  # fmt: skip
        own = (counts - taken) / totals[level.contexts]
        backoffs.append(np.log10(gammas))
        lower = own + gammas[level.contexts] * lower[level.suffixes]
        probabilities.append(np.log10(lower))
    probabilities[0][BEGIN_ID] = NEVER_LOG10
    fallback = tuple(order for order, (_, is_fallback) in enumerate(discounts, 1) if is_fallback)
    return Estimate(words, grams, probabilities, [*backoffs[1:], np.zeros(len(lower))], fallback)


def _number_words(sentences: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """The words by id, and the ids of all sentences in a row, each between <s> and </s>."""
    ids = {word: index for index, word in enumerate(SPECIAL_WORDS)}
    blocks = []
    for sentence in sentences:
        own = [ids.setdefault(word, len(ids)) for word in sentence.split(" ")]
        blocks.append(np.array([BEGIN_ID, *own, END_ID], np.int32))
    return list(ids), np.concatenate(blocks)


def count_grams(tokens: np.ndarray, num_words: int, order: int) -> list[Grams]:
    """The n-grams of 1 .. `order` words inside sentences; fewer orders where no sentence is long enough.

    Args:
        tokens: ids of the sentences in a row.
        num_words: of the vocabulary.
        order: the longest.
    """
    counts = np.bincount(tokens, minlength=num_words)
    nothing = np.zeros(num_words, np.int64)
    words = np.arange(num_words)
    found = [Grams(nothing, nothing, words, counts, words == BEGIN_ID)]
    # The n-gram that starts at each place of the text, and the places where one more word fits.
    places, at_place = np.arange(len(tokens)), tokens.astype(np.int64)
    for length in range(2, order + 1):
        places = places[tokens[places + length - 2] != END_ID]
        if not len(places):
            break
        keys = at_place[places] * num_words + tokens[places + length - 1]
        unique, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        contexts, words = np.divmod(unique, num_words)
        found.append(Grams(contexts, at_place[places[first] + 1], words, counts, found[-1].begins[contexts]))
        at_place[places] = inverse
    return found


def _adjusted_counts(grams: list[Grams]) -> list[np.ndarray]:
    """Kneser-Ney's counts: how many words stand before an n-gram; occurrences where none can, and at the top."""
    adjusted = []
    for level, above in itertools.pairwise(grams):
        extensions = np.bincount(above.suffixes, minlength=len(level.words))
        adjusted.append(np.where(level.begins, level.counts, extensions))
    adjusted.append(grams[-1].counts.copy())
    adjusted[0][[BEGIN_ID, UNKNOWN_ID]] = 0
    return adjusted


def _discounts(counts: np.ndarray) -> tuple[np.ndarray, bool]:
    """What is taken from n-grams of count 0, 1, 2, 3 and more, [4], and whether it is the fallback.

    Chen and Goodman, equation 26.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=5)[:5].astype(float)
    if n[1:4].all():
        y = n[1] / (n[1] + 2 * n[2])
        found = np.array([0.0, *(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))])
        if (found >= 0).all() and (found <= np.arange(4)).all():
            return found, False
    return np.array([0.0, *FALLBACK_DISCOUNTS]), True


def write_model(sentences: Callable[[], Iterable[str]], order: int, folder: Path) -> tuple[str, str]:
    """Estimate a model into `folder`: lm.bin where KenLM's build_binary is on the PATH, else lm.arpa.

    Args:
        sentences: starts a pass over them.
        order: longest n-gram; see `possible_order`.
        folder: must exist.

    Returns:
        The name of the file, and what made it.

    Raises:
        RunFailed: one of KenLM's programs failed.
    """
    arpa = folder / "lm.arpa"
    if lmplz := shutil.which("lmplz"):
        made_by = "lmplz, modified Kneser-Ney, --discount_fallback"
        _run_lmplz(lmplz, sentences(), order, arpa)
    else:
        found = estimate(sentences(), order)
        made_by = "ngram.py, modified Kneser-Ney"
        if found.fallback_orders:
            made_by += f", fallback discounts for order {', '.join(map(str, found.fallback_orders))}"
        with arpa.open("w", encoding="utf-8") as file:
            file.writelines(found.arpa_lines())
    if build_binary := shutil.which("build_binary"):
        _run([build_binary, str(arpa), str(folder / "lm.bin")], "build_binary")
        arpa.unlink()
        return "lm.bin", made_by
    return "lm.arpa", made_by


def possible_order(sentences: Iterable[str], order: int) -> int:
    """`order`, or what the longest sentence, with <s> and </s>, can hold."""
    return min(order, max(sentence.count(" ") for sentence in sentences) + 3)


def _run_lmplz(program: str, sentences: Iterable[str], order: int, arpa: Path) -> None:
    with tempfile.TemporaryFile("w+b", dir=arpa.parent) as text:
        text.writelines(f"{sentence}\n".encode() for sentence in sentences)
        text.seek(0)
        command = [program, "--order", str(order), "--discount_fallback", "-S", "20%"]
        command += ["--arpa", str(arpa), "-T", f"{arpa.parent}/"]
        _run(command, "lmplz", text)


def _run(command: list[str], name: str, stdin: BinaryIO | None = None) -> None:
    done = subprocess.run(command, stdin=stdin, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise RunFailed(f"{name} failed: {said}; take it off the PATH to do without it")
