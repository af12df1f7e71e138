"""Long recordings: overlapping windows for the model, and one path of labels from their outputs.

Windows begin on the model's frame grid, so a frame of a window is a frame of the whole recording, and the outputs of
two windows can be joined at any frame of their overlap. They are joined where both hear nothing, far from a word.

S: samples, T: frames, V: vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from audio import SAMPLE_RATE_HZ

# Of an overlap, the part in the middle where windows may be joined: outside it one of the two has little context.
JOINING_SHARE = 0.5
# Both windows must agree on the labels this far around the joint, else a letter near it is lost or doubled.
AGREEMENT_SECONDS = 0.4
# What a frame in disagreement weighs against the blank's probability at the joint, and against a joint off the middle.
DISAGREEMENT_WEIGHT, DISTANCE_WEIGHT = 2.0, 0.05


@dataclass(frozen=True)
class FrameGrid:
    """Where the frames of a convolutional encoder lie: frame t sees what begins at sample `hop` * t."""

    hop: int

    @classmethod
    def of(cls, conv_stride: Sequence[int]) -> "FrameGrid":
        """Of a stack of convolutions without padding."""
        return cls(math.prod(conv_stride))

    @property
    def seconds(self) -> float:
        """From one frame to the next."""
        return self.hop / SAMPLE_RATE_HZ


@dataclass(frozen=True)
class Window:
    """Samples start .. stop of a recording; its first frame is `first_frame` of the whole."""

    start: int
    stop: int
    first_frame: int


def plan_windows(num_samples: int, grid: FrameGrid, window_seconds: float, overlap_seconds: float) -> list[Window]:
    """Windows of one length, evenly spaced, that cover a recording; one window where it is no longer than that.

    They overlap a little more than asked for rather than leave a short one at the end: a model hears little in a stub.
    """
    length = round(window_seconds * SAMPLE_RATE_HZ)
    if num_samples <= length:
        return [Window(0, num_samples, 0)]
    step = max(round((window_seconds - overlap_seconds) * SAMPLE_RATE_HZ) // grid.hop, 1)
    last = -(-(num_samples - length) // grid.hop)
    count = -(-last // step) + 1
    frames = [round(number * last / (count - 1)) for number in range(count)]
    return [Window(frame * grid.hop, min(frame * grid.hop + length, num_samples), frame) for frame in frames]


class Joiner:
    """Takes the outputs of a recording's windows in their order and gives back the frames of the whole.

    Of what it has been given it holds one window.
    """

    def __init__(self, blank_id: int, grid: FrameGrid) -> None:
        self._blank_id = blank_id
        self._reach = max(round(AGREEMENT_SECONDS / grid.seconds), 1)
        self._waiting: np.ndarray | None = None
        self._first_frame = 0

    def add(self, window: Window, log_probs_TV: np.ndarray) -> np.ndarray:
        """The frames that are settled by this window: those of the one before, up to their joint.

        Args:
            window: the next one.
            log_probs_TV: its output, fp32.
        """
        if self._waiting is None:
            self._waiting, self._first_frame = log_probs_TV, window.first_frame
            return log_probs_TV[:0]
        # A window may begin before the last joint.
        start = max(window.first_frame, self._first_frame)
        left_TV, right_TV = self._waiting[start - self._first_frame :], log_probs_TV[start - window.first_frame :]
        joint = self._find_joint(left_TV, right_TV[: len(left_TV)])
        settled = self._waiting[: start - self._first_frame + joint]
        self._waiting, self._first_frame = right_TV[joint:], start + joint
        return settled

    def rest(self) -> np.ndarray:
        """The frames of the last window, once all have been added."""
        assert self._waiting is not None, "no window was added"
        return self._waiting

    def _find_joint(self, left_TV: np.ndarray, right_TV: np.ndarray) -> int:
        """The frame of the overlap from which on the right window counts."""
        frames = len(left_TV)
        first = min(round(frames * (1 - JOINING_SHARE) / 2), frames)
        candidates = np.arange(first, max(frames - first, first) + 1)
        differs_T = left_TV.argmax(1) != right_TV.argmax(1)
        sums = np.concatenate([[0], np.cumsum(differs_T)])
        low, high = np.maximum(candidates - self._reach, 0), np.minimum(candidates + self._reach, frames)
        disagreement = (sums[high] - sums[low]) / np.maximum(high - low, 1)
        blank_T = np.exp(np.minimum(left_TV[:, self._blank_id], right_TV[:, self._blank_id]))
        # On both sides of the joint, so that no label is cut in two.
        edges = np.concatenate([blank_T[:1], blank_T, blank_T[-1:]])
        blank = np.minimum(edges[candidates], edges[candidates + 1])
        distance = np.abs(candidates - frames / 2) / max(frames, 1)
        cost = DISAGREEMENT_WEIGHT * disagreement + (1 - blank) + DISTANCE_WEIGHT * distance
        return int(candidates[cost.argmin()])
