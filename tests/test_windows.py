"""Windows of long recordings: they cover every frame once, and no word at a joint is lost or doubled."""

from itertools import pairwise

import numpy as np
import pytest

from model import num_frames
from windows import FrameGrid, Joiner, Window, plan_windows

BLANK, LABELS = 0, 12
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
LARGE = FrameGrid.of(STRIDES)


@pytest.mark.parametrize(
    ("kernels", "strides"),
    [((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)), ((10, 8, 4, 4, 4), (5, 4, 4, 2, 2)), ((20, 16), (20, 16))],
)
def test_the_grid_counts_frames_as_the_model_does(kernels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """A stretch that begins a frame later has one frame less."""
    grid = FrameGrid.of(strides)
    assert grid.hop == 320
    for samples in [*range(900, 2500), 15_999, 16_000, 480_123]:
        assert num_frames(samples + grid.hop, kernels, strides) == num_frames(samples, kernels, strides) + 1


@pytest.mark.parametrize("seconds", [30.001, 31.0, 52.0, 60.0, 61.7, 300.0])
def test_windows_are_of_one_length_and_cover_every_frame(seconds: float) -> None:
    samples = round(seconds * 16_000)
    windows = plan_windows(samples, LARGE, 30.0, 8.0)
    assert windows[0].start == 0
    assert windows[-1].stop == samples
    for window in windows:
        assert window.start == window.first_frame * LARGE.hop
        assert 0 <= 480_000 - (window.stop - window.start) < (LARGE.hop if window is windows[-1] else 1)
    for one, following in pairwise(windows):
        assert one.stop - following.start >= 8.0 * 16_000, "as much context as was asked for"
    frames = {window.first_frame + frame for window in windows for frame in range(_frames(window))}
    assert frames == set(range(frames_of(samples)))


def frames_of(samples: int) -> int:
    return num_frames(samples, KERNELS, STRIDES)


def _frames(window: Window) -> int:
    return frames_of(window.stop - window.start)


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 480_000])
def test_a_short_recording_is_one_window(samples: int) -> None:
    assert plan_windows(samples, LARGE, 30.0, 8.0) == [Window(0, samples, 0)]


def join(windows: list[Window], outputs: list[np.ndarray]) -> np.ndarray:
    joiner = Joiner(BLANK, LARGE)
    return np.concatenate([*(joiner.add(*pair) for pair in zip(windows, outputs, strict=True)), joiner.rest()])


@pytest.mark.parametrize(
    ("seconds", "overlap"), [(120.0, 8.0), (30.1, 8.0), (45.1, 15.0)], ids=["many", "two", "begins_before_the_joint"]
)
def test_windows_that_hear_the_same_give_the_whole_bit_for_bit(seconds: float, overlap: float) -> None:
    samples = round(seconds * 16_000)
    whole = log_softmax(np.random.default_rng(1).normal(0, 3, (frames_of(samples), LABELS)))
    whole[1000:1010, BLANK] += 30  # A silence at 20 s, where the third of three windows has begun.
    windows = plan_windows(samples, LARGE, 30.0, overlap)
    outputs = [whole[one.first_frame : one.first_frame + _frames(one)] for one in windows]
    assert np.array_equal(join(windows, outputs), whole)


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    logits_TV = logits_TV - logits_TV.max(1, keepdims=True)
    return (logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))).astype(np.float32)


def speak(seed: int, frames: int) -> list[tuple[int, int]]:
    """(frame, label) of every letter: words of 2 to 8 letters at 10 letters a second, with pauses of 0.1 to 0.6 s."""
    rng = np.random.default_rng(seed)
    spoken, frame = [], 10
    while frame < frames - 60:
        for _ in range(rng.integers(2, 9)):
            spoken.append((frame, int(rng.integers(1, LABELS))))
            frame += int(rng.integers(4, 7))
        frame += int(rng.integers(5, 30))
    return spoken


def hear(spoken: list[tuple[int, int]], window: Window, rng: np.random.Generator) -> np.ndarray:
    """What a model with little context at a window's ends would say: peaks a frame off, nonsense in the last 0.6 s."""
    count = _frames(window)
    logits = rng.normal(0, 1, (count, LABELS))
    logits[:, BLANK] += 8
    for frame, label in spoken:
        place = frame - window.first_frame + int(rng.integers(-1, 2))
        if 0 <= place < count:
            logits[place, label] += 16
    for edge in (slice(0, 30), slice(count - 30, count)):
        logits[edge] = rng.normal(0, 4, logits[edge].shape)
    return log_softmax(logits)


def collapse(log_probs_TV: np.ndarray) -> list[int]:
    ids = log_probs_TV.argmax(1)
    return [int(label) for index, label in enumerate(ids) if label != BLANK and (not index or ids[index - 1] != label)]


def cut_in_the_middle(windows: list[Window], outputs: list[np.ndarray]) -> np.ndarray:
    """As transformers' chunked pipeline does."""
    pieces, first = [], 0
    for (one, output), (following, _) in pairwise(zip(windows, outputs, strict=True)):
        joint = (one.first_frame + len(output) + following.first_frame) // 2
        pieces.append(output[first - one.first_frame : joint - one.first_frame])
        first = joint
    return np.concatenate([*pieces, outputs[-1][first - windows[-1].first_frame :]])


def test_no_letter_at_a_joint_is_lost_or_doubled() -> None:
    """Two hundred recordings with speech at every place of the overlaps; a cut in the middle fails in many of them."""
    samples, failures = 100 * 16_000, [0, 0]
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        spoken = speak(seed, frames_of(samples))
        windows = plan_windows(samples, LARGE, 30.0, 8.0)
        outputs = [hear(spoken, window, rng) for window in windows]
        # The ends of the recording have no neighbour that hears them better.
        inner = slice(8, -8)
        for place, method in enumerate((join, cut_in_the_middle)):
            found = collapse(method(windows, outputs)[40:-40])
            expected = [label for frame, label in spoken]
            failures[place] += not contains(expected, found[inner])
    assert failures[0] == 0
    assert failures[1] > 20, "or the test shows nothing"


def contains(whole: list[int], part: list[int]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


def test_the_joint_lies_in_the_middle_half_of_the_overlap() -> None:
    """Even where the only silence that both hear is at its edge."""
    windows = [Window(0, 480_000, 0), Window(22 * 16_000, 52 * 16_000, 1100)]
    rng = np.random.default_rng(0)
    outputs = [log_softmax(rng.normal(0, 4, (1499, LABELS))) for _ in windows]
    outputs[0][1100:1110, BLANK], outputs[1][:10, BLANK] = 0, 0
    joiner = Joiner(BLANK, LARGE)
    joiner.add(windows[0], outputs[0])
    settled = joiner.add(windows[1], outputs[1])
    assert 1100 + 0.25 * 399 - 1 <= len(settled) <= 1100 + 0.75 * 399 + 1


@pytest.mark.parametrize(
    ("is_heard_otherwise", "expected"),
    [(False, 210), (True, 290)],
    ids=["equal_silences_the_nearer_to_the_middle", "not_where_the_windows_disagree_around_it"],
)
def test_which_silence_is_the_joint(is_heard_otherwise: bool, expected: int) -> None:
    """Of an overlap of 399 frames with silences at 120, 210 and 290."""
    windows = [Window(0, 480_000, 0), Window(22 * 16_000, 52 * 16_000, 1100)]
    whole = np.zeros((1100 + 1499, LABELS))
    whole[np.arange(len(whole)), 1 + np.arange(len(whole)) % (LABELS - 1)] = 20
    for frame in (1100 + 120, 1100 + 210, 1100 + 290):
        whole[frame - 3 : frame + 3] = 0
        whole[frame - 3 : frame + 3, BLANK] = 20
    left, right = whole[:1499], whole[1100:].copy()
    if is_heard_otherwise:
        for frame in (120, 210):
            right[frame - 10 : frame - 5, 1:] = np.roll(right[frame - 10 : frame - 5, 1:], 3, axis=1)
    joiner = Joiner(BLANK, LARGE)
    joiner.add(windows[0], log_softmax(left))
    settled = joiner.add(windows[1], log_softmax(right))
    assert abs(len(settled) - (1100 + expected)) <= 3
