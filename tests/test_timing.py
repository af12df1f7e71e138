"""Times and confidences of words against paths written by hand, and alignments against every path there is."""

import itertools

import numpy as np
import pytest

from metrics import greedy_decode
from text import Vocabulary
from timing import LabelPath, find_words

VOCABULARY = Vocabulary({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4, "C": 5})


def path_of(spelling: str, vocabulary: Vocabulary = VOCABULARY) -> LabelPath:
    """A frame for each character; `_` is the blank. The n-th frame has probability 1 - n / 100."""
    ids = [0 if one == "_" else vocabulary.token_ids[one] for one in spelling]
    return LabelPath(np.array(ids, np.int64), (1 - np.arange(len(ids)) / 100).astype(np.float32))


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("____", []),
        ("", []),
        ("AB", [("AB", 0.0, 0.04, 0.99)]),
        ("_AA_A__B|_CC", [("AAB", 0.02, 0.16, 0.8839), ("C", 0.2, 0.24, 0.9)]),
        ("|_A||_|B_|", [("A", 0.04, 0.06, 0.98), ("B", 0.14, 0.16, 0.93)]),
        ("A|||", [("A", 0.0, 0.02, 1.0)]),
    ],
)
def test_words_of_a_path(spelling: str, words: list[tuple[str, float, float, float]]) -> None:
    found = find_words(path_of(spelling), VOCABULARY, 0.02)
    assert [
        (word.text, *(round(value, 4) for value in (word.start, word.end, word.confidence))) for word in found
    ] == words
    for word in found:
        assert word.text == "".join(character.text for character in word.characters)
        assert word.confidence == pytest.approx(np.prod([character.confidence for character in word.characters]))
        assert (word.start, word.end) == (word.characters[0].start, word.characters[-1].end)


def test_without_a_delimiter_every_character_is_a_word() -> None:
    vocabulary = Vocabulary({"<pad>": 0, "<unk>": 1, "你": 2, "好": 3})
    found = find_words(path_of("_你_好好", vocabulary), vocabulary, 0.02)
    assert [(word.text, word.start) for word in found] == [("你", 0.02), ("好", 0.06)]


def random_log_probs(frames: int, seed: int, labels: int = 6) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 2, (frames, labels))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_words_are_those_of_the_greedy_text(seed: int) -> None:
    import torch

    log_probs = random_log_probs(80, seed)
    (text,) = greedy_decode(torch.from_numpy(log_probs)[None], torch.tensor([80]), VOCABULARY)
    words = find_words(LabelPath.greedy(log_probs), VOCABULARY, 0.02)
    assert [word.text for word in words] == text.split()
    assert all(0 < word.confidence <= 1 and word.start < word.end <= 1.6 for word in words)


def collapsed(ids: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(ids) if label != 0]


@pytest.mark.parametrize("labels", [[], [3], [3, 4], [3, 3], [4, 4, 3]])
def test_alignment_is_the_likeliest_of_all_paths(labels: list[int]) -> None:
    log_probs = random_log_probs(6, len(labels), labels=5)
    paths = [ids for ids in itertools.product(range(5), repeat=6) if collapsed(ids) == labels]
    best = max(paths, key=lambda ids: sum(log_probs[frame, label] for frame, label in enumerate(ids)))
    found = LabelPath.aligned(log_probs, np.array(labels), 0)
    assert tuple(found.ids_T.tolist()) == best
    np.testing.assert_allclose(
        found.probabilities_T, [np.exp(log_probs[t, label]) for t, label in enumerate(best)], rtol=1e-6
    )


def test_alignment_of_the_greedy_labels_is_the_greedy_path() -> None:
    log_probs = random_log_probs(60, 5)
    greedy = LabelPath.greedy(log_probs)
    aligned = LabelPath.aligned(log_probs, np.array(collapsed(tuple(greedy.ids_T.tolist()))), 0)
    assert np.array_equal(aligned.ids_T, greedy.ids_T)


def test_paths_are_joined() -> None:
    whole = path_of("AB_|C")
    parts = [LabelPath(whole.ids_T[s], whole.probabilities_T[s]) for s in (slice(0, 2), slice(2, 2), slice(2, 5))]
    assert np.array_equal(LabelPath.join(parts).ids_T, whole.ids_T)
    assert len(LabelPath.join([]).ids_T) == 0
