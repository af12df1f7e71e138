"""When each word and character was spoken, and how sure the model is of it, from a path of CTC labels.

T: frames, V: vocabulary, L: labels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio

from text import Vocabulary


@dataclass(frozen=True)
class Character:
    """A label of the path; `confidence` is the model's probability of it, at the best of its frames."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Word:
    """Characters up to a word delimiter, or a single one where the vocabulary has none (Chinese).

    Attributes:
        text: of the word.
        start: of its first character, seconds.
        end: of its last character, seconds. CTC marks a character where it is sure of it, not where its sound ends.
        confidence: the product of its characters': the probability of all of them, as if they were independent.
        characters: all of them.
    """

    text: str
    start: float
    end: float
    confidence: float
    characters: tuple[Character, ...]


@dataclass(frozen=True)
class LabelPath:
    """A label for every frame of a recording.

    Attributes:
        ids_T: labels, blanks included.
        probabilities_T: of each of them in its frame.
    """

    ids_T: np.ndarray
    probabilities_T: np.ndarray

    @classmethod
    def greedy(cls, log_probs_TV: np.ndarray) -> "LabelPath":
        """The best label of each frame."""
        ids_T = log_probs_TV.argmax(1)
        return cls(ids_T, np.exp(np.take_along_axis(log_probs_TV, ids_T[:, None], 1)[:, 0]))

    @classmethod
    def aligned(cls, log_probs_TV: np.ndarray, labels_L: np.ndarray, blank_id: int) -> "LabelPath":
        """The likeliest path that spells `labels_L`, which must fit into the frames (`text.required_frames`)."""
        if not len(labels_L):
            ids_T = np.full(len(log_probs_TV), blank_id)
        else:
            path_1T, _ = torchaudio.functional.forced_align(
                torch.from_numpy(log_probs_TV)[None], torch.from_numpy(labels_L.astype(np.int64))[None], blank=blank_id
            )
            ids_T = path_1T[0].numpy()
        return cls(ids_T, np.exp(np.take_along_axis(log_probs_TV, ids_T[:, None], 1)[:, 0]))

    @classmethod
    def join(cls, paths: "list[LabelPath]") -> "LabelPath":
        """One behind the other."""
        return cls(
            np.concatenate([np.zeros(0, np.int64), *(path.ids_T for path in paths)]),
            np.concatenate([np.zeros(0, np.float32), *(path.probabilities_T for path in paths)]),
        )


def find_words(path: LabelPath, vocabulary: Vocabulary, seconds_per_frame: float, first_frame: int = 0) -> list[Word]:
    """The words of a path in their order, each with its characters.

    Args:
        path: of a recording, or of a part of it.
        vocabulary: of its labels.
        seconds_per_frame: from one frame to the next.
        first_frame: of the recording, where the path begins.
    """
    words, characters = [], []
    for label, character in _characters(path, vocabulary, seconds_per_frame, first_frame):
        if label != vocabulary.delimiter_id:
            characters.append(character)
        if characters and (label == vocabulary.delimiter_id or vocabulary.delimiter_id is None):
            words.append(_word(characters))
            characters = []
    return [*words, _word(characters)] if characters else words


def _characters(
    path: LabelPath, vocabulary: Vocabulary, seconds_per_frame: float, first_frame: int
) -> Iterator[tuple[int, Character]]:
    """Each run of one label, blanks left out."""
    ids_T = vocabulary.known_ids(path.ids_T)
    starts = np.flatnonzero(np.diff(ids_T, prepend=-1))
    ends = np.append(starts, len(ids_T))[1:]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        label = int(ids_T[start])
        if label != vocabulary.blank_id:
            times = ((first_frame + frame) * seconds_per_frame for frame in (start, end))
            confidence = float(path.probabilities_T[start:end].max())
            yield label, Character(vocabulary.decode_labels([label]), *times, confidence)


def _word(characters: list[Character]) -> Word:
    text = "".join(character.text for character in characters)
    confidence = math.prod(character.confidence for character in characters)
    return Word(text, characters[0].start, characters[-1].end, confidence, tuple(characters))
