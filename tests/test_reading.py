"""Frames that come in pieces: the text and the words of the whole, and where a beam search is cut."""

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from decoding import Decoded
from metrics import greedy_decode
from reading import PIECE_SECONDS, BeamReading, GreedyReading
from text import Vocabulary
from timing import Word

VOCABULARY = Vocabulary({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4, "C": 5})
CHARACTERS = Vocabulary({"<pad>": 0, "<unk>": 1, "你": 2, "好": 3, "吗": 4})
SECONDS_PER_FRAME = 0.02


def speech(seed: int, seconds: float, labels: int, has_delimiter: bool = True) -> np.ndarray:
    """Log-probabilities [T, V] of words with pauses of 0.1 to 1 s between them."""
    rng = np.random.default_rng(seed)
    frames = round(seconds / SECONDS_PER_FRAME)
    best_T = np.zeros(frames, np.int64)
    frame = 5
    while frame < frames - 60:
        for _ in range(rng.integers(1, 7)):
            best_T[frame] = rng.integers(3 if has_delimiter else 2, labels)
            frame += int(rng.integers(2, 7))
        if has_delimiter:
            best_T[frame] = 2
        frame += int(rng.integers(5, 50))
    logits = rng.normal(0, 1, (frames, labels))
    logits[np.arange(frames), best_T] += 9
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def cut(log_probs_TV: np.ndarray, seed: int) -> list[np.ndarray]:
    places = np.sort(np.random.default_rng(seed).integers(0, len(log_probs_TV), 9))
    return np.split(log_probs_TV, places)


class GreedyDecoder:
    """A decoder whose texts are known: the greedy ones."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.lengths: list[int] = []

    def __call__(self, log_probs: Iterable[np.ndarray]) -> list[Decoded]:
        (log_probs_TV,) = log_probs
        self.lengths.append(len(log_probs_TV))
        labels = np.array([label for label, _ in itertools.groupby(log_probs_TV.argmax(1)) if label], np.int64)
        return [Decoded(self.vocabulary.decode_labels(labels), labels, labels)]


def rounded(words: list[Word]) -> list[tuple[str, float, float, float]]:
    return [(word.text, *(round(x, 4) for x in (word.start, word.end, word.confidence))) for word in words]


@pytest.mark.parametrize(("vocabulary", "has_delimiter"), [(VOCABULARY, True), (CHARACTERS, False)])
def test_pieces_give_the_text_of_the_whole(vocabulary: Vocabulary, has_delimiter: bool) -> None:
    log_probs_TV = speech(1, 200, len(vocabulary), has_delimiter)
    (expected,) = greedy_decode(torch.from_numpy(log_probs_TV)[None], torch.tensor([len(log_probs_TV)]), vocabulary)
    assert len(expected) > 300
    decoder = GreedyDecoder(vocabulary)
    greedy = GreedyReading(vocabulary, SECONDS_PER_FRAME)
    beam = BeamReading(vocabulary, SECONDS_PER_FRAME, decoder)
    for piece in cut(log_probs_TV, 2):
        greedy.add(piece)
        beam.add(piece)
    found, by_beam = greedy.finish(), beam.finish()
    assert found[0] == by_beam[0] == expected
    assert rounded(found[1]) == rounded(by_beam[1]), "cut in silence, and aligned to the very same frames"
    assert sum(decoder.lengths) == len(log_probs_TV)
    limit = PIECE_SECONDS / SECONDS_PER_FRAME
    assert all(limit / 2 < length <= limit for length in decoder.lengths[:-1])
    assert decoder.lengths[-1] <= limit


def test_speech_without_a_pause_is_cut_all_the_same() -> None:
    log_probs_TV = np.full((4_000, 6), -9.0, np.float32)
    log_probs_TV[np.arange(4_000), 3 + np.arange(4_000) % 3] = -0.01
    decoder = GreedyDecoder(VOCABULARY)
    beam = BeamReading(VOCABULARY, SECONDS_PER_FRAME, decoder)
    beam.add(log_probs_TV)
    text, _ = beam.finish()
    assert decoder.lengths == [1_500, 1_500, 1_000]
    assert len(text.replace(" ", "")) == 4_000


def test_a_piece_ends_in_the_middle_of_its_longest_silence() -> None:
    """In its second half, frames 750 to 1,500; the silence at 400 lies before it, that at 800 is shorter."""
    log_probs_TV = np.full((1_600, 6), -9.0, np.float32)
    log_probs_TV[np.arange(1_600), 3 + np.arange(1_600) % 3] = -0.01
    for start, end in ((300, 600), (800, 840), (1_000, 1_100)):
        log_probs_TV[start:end, VOCABULARY.blank_id] = 0.0
    decoder = GreedyDecoder(VOCABULARY)
    beam = BeamReading(VOCABULARY, SECONDS_PER_FRAME, decoder)
    beam.add(log_probs_TV)
    beam.finish()
    assert decoder.lengths == [1_050, 550]


def test_no_frames_have_no_text() -> None:
    for reading in (
        GreedyReading(VOCABULARY, SECONDS_PER_FRAME),
        BeamReading(VOCABULARY, SECONDS_PER_FRAME, GreedyDecoder(VOCABULARY)),
    ):
        assert reading.finish() == ("", [])
