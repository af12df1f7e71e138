"""From the frames of a recording, as they come, to its text and words: greedily, or by beam search.

T: frames, V: vocabulary.
"""

from typing import Protocol

import numpy as np
import torch

from decoding import BeamDecoder
from metrics import greedy_decode
from text import Vocabulary
from timing import LabelPath, Word, find_words

# Frames that a beam search is given at a time; the cut lies in the longest silence of the second half.
PIECE_SECONDS = 30.0


class Reading(Protocol):
    """Frames in, text and words out."""

    def add(self, log_probs_TV: np.ndarray) -> None:
        """The next frames of the recording, fp32."""

    def finish(self) -> tuple[str, list[Word]]:
        """What all of them say."""


class GreedyReading:
    """The best label of each frame; of a frame no more than that and its probability is kept."""

    def __init__(self, vocabulary: Vocabulary, seconds_per_frame: float) -> None:
        self._vocabulary, self._seconds_per_frame = vocabulary, seconds_per_frame
        self._paths: list[LabelPath] = []

    def add(self, log_probs_TV: np.ndarray) -> None:
        """See Reading."""
        self._paths.append(LabelPath.greedy(log_probs_TV))

    def finish(self) -> tuple[str, list[Word]]:
        """See Reading."""
        path = LabelPath.join(self._paths)
        ids_1T = torch.from_numpy(path.ids_T)[None]
        (text,) = greedy_decode(ids_1T, torch.tensor([len(path.ids_T)]), self._vocabulary)
        return text, find_words(path, self._vocabulary, self._seconds_per_frame)


class BeamReading:
    """Beam search over pieces between silences, whose labels are then aligned with the frames.

    The language model begins anew with each piece, as if it were a sentence; words keep the probability that the
    recogniser gives them.
    """

    def __init__(self, vocabulary: Vocabulary, seconds_per_frame: float, decoder: BeamDecoder) -> None:
        self._vocabulary, self._seconds_per_frame, self._decoder = vocabulary, seconds_per_frame, decoder
        self._piece_frames = round(PIECE_SECONDS / seconds_per_frame)
        self._waiting: np.ndarray | None = None
        self._first_frame = 0
        self._texts: list[str] = []
        self._words: list[Word] = []

    def add(self, log_probs_TV: np.ndarray) -> None:
        """See Reading."""
        self._waiting = log_probs_TV if self._waiting is None else np.concatenate([self._waiting, log_probs_TV])
        while len(self._waiting) > self._piece_frames:
            place = self._find_silence()
            self._decode(self._waiting[:place])
            self._waiting = self._waiting[place:]

    def finish(self) -> tuple[str, list[Word]]:
        """See Reading."""
        if self._waiting is not None:
            self._decode(self._waiting)
            self._waiting = None
        joiner = "" if self._vocabulary.delimiter_id is None else self._vocabulary.delimiter_text
        return joiner.join(filter(None, self._texts)), self._words

    def _find_silence(self) -> int:
        """The middle of the longest run of blanks and word delimiters in the second half of a piece."""
        half = self._piece_frames // 2
        ids_T = self._waiting[half : self._piece_frames].argmax(1)
        is_silent_T = (ids_T == self._vocabulary.blank_id) | (ids_T == self._vocabulary.delimiter_id)
        edges = np.flatnonzero(np.diff(is_silent_T.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        if not len(edges):
            return self._piece_frames
        start, end = edges[(edges[:, 1] - edges[:, 0]).argmax()].tolist()
        return half + (start + end + 1) // 2

    def _decode(self, log_probs_TV: np.ndarray) -> None:
        (decoded,) = self._decoder([log_probs_TV])
        path = LabelPath.aligned(log_probs_TV, decoded.labels, self._vocabulary.blank_id)
        self._texts.append(decoded.text)
        self._words += find_words(path, self._vocabulary, self._seconds_per_frame, self._first_frame)
        self._first_frame += len(log_probs_TV)
