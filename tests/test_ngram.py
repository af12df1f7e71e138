"""The n-gram estimate against KenLM's lmplz, and as what it must be: probabilities."""

import itertools
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from arpa import Arpa, read_arpa

import ngram
from errors import RunFailed

SENTENCES = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "the mat is on the log"]
# lmplz 0.3.0 --order 3 --discount_fallback on SENTENCES: log10 probability and back-off weight.
LMPLZ = {
    "<unk>": (-1.174665, 0.0),
    "</s>": (-1.174665, 0.0),
    "the": (-1.1339201, -0.1638568),
    "cat": (-1.1339201, -0.14612803),
    "a": (-1.1339201, -0.14612803),
    "log </s>": (-0.47691727, 0.0),
    "<s> the": (-1.1661048, -0.30103),
    "on the": (-0.3932208, -0.30103),
    "the cat": (-0.96851563, -0.30103),
    "cat sat": (-0.7092265, -0.30103),
    "sat on": (-0.3932208, -0.30103),
    "<s> a": (-0.8549715, -0.30103),
    "the log </s>": (-0.17604028, 0.0),
    "sat on the": (-0.15354836, 0.0),
    "<s> the cat": (-0.656737, 0.0),
    "on the log": (-0.39971238, 0.0),
    "cat and a": (-0.17451246, 0.0),
}


def estimated(sentences: list[str], order: int) -> Arpa:
    return read_arpa("".join(ngram.estimate(sentences, order).arpa_lines()))


def random_sentences(count: int, words: int, seed: int) -> list[str]:
    """Frequent and rare words, as in a text: all counts that discounts are computed from occur."""
    draw = random.Random(seed)
    vocabulary = [f"w{number}" for number in range(words)]
    weights = [1 / (number + 1) for number in range(words)]
    return [" ".join(draw.choices(vocabulary, weights, k=draw.randint(1, 9))) for _ in range(count)]


def test_as_lmplz_estimates() -> None:
    found = estimated(SENTENCES, 3)
    for words, (probability, backoff) in LMPLZ.items():
        assert found.probabilities[tuple(words.split())] == pytest.approx(probability, abs=2e-6), words
        assert found.backoffs.get(tuple(words.split()), 0.0) == pytest.approx(backoff, abs=2e-6), words


@pytest.mark.skipif(shutil.which("lmplz") is None, reason="KenLM's program lmplz is not on the PATH")
@pytest.mark.parametrize("order", [2, 3, 5])
def test_every_ngram_as_lmplz_estimates(order: int, tmp_path: Path) -> None:
    sentences = random_sentences(400, 60, seed=order)
    ngram._run_lmplz(shutil.which("lmplz"), sentences, order, tmp_path / "lm.arpa")
    expected, found = read_arpa((tmp_path / "lm.arpa").read_text()), estimated(sentences, order)
    assert found.probabilities.keys() == expected.probabilities.keys()
    for words, probability in expected.probabilities.items():
        if words != ("<s>",):
            assert found.probabilities[words] == pytest.approx(probability, abs=1e-5)
            assert found.backoffs.get(words, 0.0) == pytest.approx(expected.backoffs.get(words, 0.0), abs=1e-5)


@pytest.mark.parametrize(
    ("sentences", "order"),
    [
        (SENTENCES, 2),
        (SENTENCES, 4),
        (["one"], 3),
        (["a a a a a"], 4),
        (["one", "one", "two three"], 6),
        (random_sentences(300, 40, 0), 4),
    ],
)
def test_next_words_sum_to_one_after_every_context(sentences: list[str], order: int) -> None:
    found = estimated(sentences, order)
    words = [word for (word,) in (gram for gram in found.probabilities if len(gram) == 1) if word != "<s>"]
    assert "<unk>" in words
    contexts = {gram[:-1] for gram in found.probabilities} | {("never", "seen"), ("<s>",)}
    for context in sorted(contexts):
        total = math.fsum(10 ** found.log10(context, word) for word in words)
        assert total == pytest.approx(1, abs=1e-5), context


def test_counts_are_those_of_a_plain_loop() -> None:
    sentences = random_sentences(50, 12, seed=3)
    words, tokens = ngram._number_words(sentences)
    padded = [["<s>", *sentence.split(), "</s>"] for sentence in sentences]
    texts = [""]
    for length, grams in enumerate(ngram.count_grams(tokens, len(words), 4), 1):
        found = {}
        for place, (context, word) in enumerate(zip(grams.contexts, grams.words, strict=True)):
            text = (texts[context] + " " + words[word]).strip()
            found[text] = int(grams.counts[place])
        texts = list(found)
        plain = [" ".join(one[at : at + length]) for one in padded for at in range(len(one) - length + 1)]
        expected = {text: len(list(group)) for text, group in itertools.groupby(sorted(plain))}
        assert {text: count for text, count in found.items() if count} == expected


def test_discounts_fall_back_where_counts_cannot_tell() -> None:
    assert ngram._discounts(np.array([1, 1, 2])) == (pytest.approx([0, 0.5, 1.0, 1.5]), True)
    counts = np.repeat([1, 2, 3, 4], [100, 40, 20, 10])
    found, is_fallback = ngram._discounts(counts)
    y = 100 / 180
    assert not is_fallback
    assert found == pytest.approx([0, 1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.5])


def test_order_is_no_longer_than_the_longest_sentence() -> None:
    assert max(len(gram) for gram in estimated(["one two"], 6).probabilities) == 4
    assert ngram.possible_order(["one two", "three"], 6) == 4


def program(folder: Path, name: str, code: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{code}")
    path.chmod(0o755)


LMPLZ_STAND_IN = """
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--order"] == "3" and "--discount_fallback" in sys.argv
open(sys.argv[sys.argv.index("--arpa") + 1], "w").write(sys.stdin.read())
"""


def test_programs_of_kenlm_on_the_path_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "out").mkdir()
    program(tmp_path / "bin", "lmplz", LMPLZ_STAND_IN)
    program(tmp_path / "bin", "build_binary", "open(sys.argv[2], 'w').write('binary of ' + open(sys.argv[1]).read())")
    name, made_by = ngram.write_model(lambda: ["a b", "c"], 3, tmp_path / "out")
    assert (name, made_by.split(",")[0]) == ("lm.bin", "lmplz")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lm.bin"]
    assert (tmp_path / "out" / "lm.bin").read_text() == "binary of a b\nc\n"
    program(tmp_path / "bin", "lmplz", "sys.exit('no room')")
    with pytest.raises(RunFailed, match="lmplz failed: no room; take it off the PATH to do without it"):
        ngram.write_model(lambda: ["a b", "c"], 3, tmp_path / "out")
