"""What a run is in whose word error rate stays at 1: the normal plateau, or trouble that has a name.

The measure is the deaf loss: the best CTC loss per label of an output that is the same in every frame, which is all
that a model can learn before it listens. A run falls to it, stays there for a while (the plateau: blanks only, WER 1),
and leaves it downwards as soon as it hears anything, often a hundred updates before the first word is right.

B: utterances, V: vocabulary, L: labels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from schedule import Schedule

Row = Mapping[str, float | str | None]
# States in which a WER of 1 is no trouble: the run is to go on.
NORMAL_STATES = ("before the plateau", "plateau", "leaving the plateau")

# Below this nothing is said: words come right, and the WER itself tells how the run does.
HOPELESS_WER = 0.99
# Utterances that stand for the dev set in the deaf loss: far under a tenth of a second, and 1 % of sampling error.
MAX_DEAF_UTTERANCES = 1_000
# Tiny runs, the demo, digits and Yoruba all sat between 1.00 and 1.09 times the deaf loss on their plateau ...
PLATEAU_LIMIT = 1.1
# ... and where there is nothing to hear, length and edges alone bring it down: to 0.938 with the texts of other clips,
# to 0.946 with noise for audio.
HEARING_LIMIT = 0.9
# Updates at the full learning rate that a plateau may last. Normal ones: the demo 30, eight Yoruba clips 180, the
# Hausa seed under 390 (880 updates, all in its warm-up).
PLATEAU_PATIENCE = 500
# Five times the highest rate of our recipes (the demo's). Above it AdamW moves most weights by half of their own size
# in each update, and no long patience is owed.
HIGH_LEARNING_RATE = 1e-2
# A dev loss that has not fallen by a twentieth for the patience of a plateau does not fall any more.
STALLED_LIMIT = 1.05
# A verdict on the pace, or on a rate that is too high, needs so many: the first steps of Adam are as large as the rate
# allows, whatever they are good for.
MIN_UPDATES = 100
# The pace of the past may double before "too slow" would be wrong.
PACE_MARGIN = 2.0
# A rise that no noise between evaluations explains: flat runs at an absurd rate went up and down by 0.1.
RISE = 1.25
# Words have five letters: with a quarter of them unknown three words in four can never be right.
MAX_UNKNOWN_FRACTION = 0.25
# More than half of what the model is shown is no speech to it.
MAX_UNFIT_FRACTION = 0.5
# Training loss so far below the deaf loss, while the dev loss is not, is knowledge of these very utterances.
MEMORY_LIMIT = 0.75
# Spaces are missing: a fifth of the words has vanished although most characters are there.
COLLAPSED_WORD_RATIO = 0.8
MODERATE_CER = 0.35
# Of hypothesis words that are glued together none is right; of those that stay when short words get lost most are.
MOSTLY_WRONG = 0.5
# Deletions dominate when they are twice the other errors together, and no trifle.
DELETION_DOMINANCE = 2.0
MIN_DELETION_RATE = 0.1


@dataclass(frozen=True)
class Facts:
    """What does not change in a run."""

    deaf_loss: float
    """Of the dev set, nats per label; 0 when it has no labels."""
    schedule: Schedule
    hears_level: bool
    """Whether level and offset of the audio reach the encoder; a group norm over the first convolution removes both."""

    @property
    def learning_rate(self) -> float:
        """The peak."""
        return self.schedule.peak

    @property
    def warmup_steps(self) -> int:
        """Of the schedule."""
        return self.schedule.warmup_steps

    @property
    def total_steps(self) -> int:
        """Of the run."""
        return self.schedule.total_steps


@dataclass(frozen=True)
class Diagnosis:
    """A state by name, whether something must be done, and one or two lines for the user."""

    state: str
    is_warning: bool
    text: str


def deaf_loss(labels: Sequence[np.ndarray], frame_lengths_B: np.ndarray, vocabulary_size: int, blank_id: int) -> float:
    """The least CTC loss per label (nats) of one distribution over the vocabulary, the same in every frame.

    With a constant distribution p all alignments with the same number of frames per label are alike, so the likelihood
    of labels y in T frames is a coefficient of a power series: of z^T in

        prod_i [p(y_i) z / (1 - p(y_i) z)] * (1 / (1 - p(blank) z))^(L + 1) * (p(blank) z)^R

    (each label lasts one frame or more; L + 1 runs of blanks may be empty, R of them, between equal neighbours, not).
    It is taken by the saddle point (Flajolet and Sedgewick, Analytic Combinatorics, theorem VIII.4), within 0.2 % of
    `F.ctc_loss`. The same saddle point gives the expected frames of each label, and with them EM for p.

    Args:
        labels: of each utterance, B arrays.
        frame_lengths_B: frames of each. Utterances with more labels than fit into their frames are left out, as in the
            loss of an evaluation.
        vocabulary_size: V.
        blank_id: of the vocabulary.

    Returns:
        The loss; 0 without labels.
    """
    spare_B, needed_BV, runs_BV = _count_runs(labels, frame_lengths_B, vocabulary_size, blank_id)
    num_labels = np.delete(needed_BV, blank_id, axis=1).sum()
    if not num_labels:
        return 0.0
    frames_V = needed_BV.sum(axis=0)
    frames_V[blank_id] += spare_B.sum() + 1
    is_used_V = frames_V > 0
    frames_V, needed_BV, runs_BV = frames_V[is_used_V], needed_BV[:, is_used_V], runs_BV[:, is_used_V]
    best = math.inf
    for _ in range(100):  # two or three do: the start, every spare frame a blank, is nearly right
        p_V = frames_V / frames_V.sum()
        odds_BV, log_coefficient_B = _saddle_point(p_V, runs_BV, spare_B)
        loss = -float((needed_BV @ np.log(p_V) + log_coefficient_B).sum() / num_labels)
        if loss > best - 1e-6:
            break
        best = loss
        frames_V = (needed_BV + runs_BV * odds_BV).sum(axis=0)
    return min(best, loss)


def _count_runs(
    labels: Sequence[np.ndarray], frame_lengths_B: np.ndarray, vocabulary_size: int, blank_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the utterances that fit into their frames.

    Returns:
        spare_B, frames beyond one per label and per necessary blank, which lengthen some run; needed_BV, frames that
        each label needs; runs_BV, places where its frames may stand.
    """
    lengths_B = np.array([len(row) for row in labels], np.float64)
    repeats_B = np.array([np.count_nonzero(row[1:] == row[:-1]) for row in labels], np.float64)
    spare_B = np.asarray(frame_lengths_B, np.float64) - lengths_B - repeats_B
    counts_BV = np.stack([np.bincount(row, minlength=vocabulary_size) for row in labels]).astype(np.float64)
    needed_BV, runs_BV = counts_BV.copy(), counts_BV.copy()
    needed_BV[:, blank_id], runs_BV[:, blank_id] = repeats_B, lengths_B + 1
    fits_B = spare_B >= 0
    return spare_B[fits_B], needed_BV[fits_B], runs_BV[fits_B]


def _saddle_point(p_V: np.ndarray, runs_BV: np.ndarray, spare_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficient of z^spare in prod_v (1 - p_v z)^-runs_v.

    Returns:
        odds_BV = p_v z / (1 - p_v z) at the saddle point z, the expected spare frames of a run; log_coefficient_B.
    """
    low_B, high_B = np.full(len(spare_B), -50.0), np.full(len(spare_B), -1e-12)
    for _ in range(50):  # log of z times the largest p, by bisection
        middle_B = (low_B + high_B) / 2
        tilted_BV = np.exp(middle_B)[:, None] * (p_V / p_V.max())
        is_above_B = (runs_BV * tilted_BV / (1 - tilted_BV)).sum(axis=1) > spare_B
        low_B, high_B = np.where(is_above_B, low_B, middle_B), np.where(is_above_B, middle_B, high_B)
    odds_BV = tilted_BV / (1 - tilted_BV)
    log_z_B = middle_B - np.log(p_V.max())
    # Cumulants of the number of spare frames, and the expansion's second term.
    spread_BV = runs_BV * odds_BV * (1 + odds_BV)
    second_B, third_B = spread_BV.sum(axis=1), (spread_BV * (1 + 2 * odds_BV)).sum(axis=1)
    fourth_B = (spread_BV * (1 + 6 * odds_BV * (1 + odds_BV))).sum(axis=1)
    correction_B = fourth_B / (8 * second_B**2) - 5 * third_B**2 / (24 * second_B**3)
    log_series_B = (runs_BV * np.log1p(odds_BV)).sum(axis=1)
    log_coefficient_B = log_series_B - spare_B * log_z_B - 0.5 * np.log(2 * np.pi * second_B) + correction_B
    return odds_BV, np.where(spare_B > 0, log_coefficient_B, 0.0)


def diagnose(history: Sequence[Row], facts: Facts) -> Diagnosis | None:
    """Name the state of a run at an evaluation.

    Args:
        history: the rows of the log, the last one that of the evaluation; a missing value is absent, None or NaN.
        facts: of the run.

    Returns:
        None while the WER is below HOPELESS_WER.
    """
    row = history[-1]
    if _value(row, "eval_wer") < HOPELESS_WER or not facts.deaf_loss:
        return None
    loss, step = _value(row, "eval_loss"), int(row["step"])
    where = f"dev loss {loss:.3f}, {facts.deaf_loss:.3f} is the best without listening"
    trouble = _divergence(history, facts) or _unfit_data(row, facts, where)
    if trouble:
        return trouble
    if loss < HEARING_LIMIT * facts.deaf_loss:
        return _leaving(history, facts, where)
    if _value(row, "train_loss") < MEMORY_LIMIT * facts.deaf_loss:
        return Diagnosis(
            "memorising", True,
            f"training loss {_value(row, 'train_loss'):.3f}, {where}: what is learned holds for the training "
            "utterances only. Listen to some clips beside their texts (do they belong together?), or add training data",
        )  # fmt: skip
    if facts.learning_rate > HIGH_LEARNING_RATE and _full_rate_updates(0, step, facts) >= MIN_UPDATES:
        return Diagnosis("stuck", True, f"nothing heard in {step} updates ({where}): {_rate_remedy(facts)}")
    return (_above if loss > PLATEAU_LIMIT * facts.deaf_loss else _on_plateau)(history, facts, where)


def _divergence(history: Sequence[Row], facts: Facts) -> Diagnosis | None:
    """Losses that are no numbers, or that have risen."""
    row = history[-1]
    loss = _value(row, "eval_loss")
    if not math.isfinite(loss):
        return Diagnosis("divergence", True, f"the dev loss is {loss}: {_LOWER} and start from a checkpoint before it")
    before = history[-2] if len(history) > 1 else {"step": 0, "bad_updates": 0}
    updates = int(row["step"]) - int(before["step"])
    if updates and _value(row, "bad_updates") - _value(before, "bad_updates", 0.0) >= updates:
        return Diagnosis(
            "divergence", True,
            f"all {updates} updates since step {int(before['step'])} were left out, for a loss or a gradient that is "
            f"not finite (bad_batches.csv has their clips): {_LOWER}, or launch with --mixed_precision bf16 or no",
        )  # fmt: skip
    if _has_risen(history, facts):
        best = min(_values(history[:-1], "eval_loss"))
        return Diagnosis(
            "divergence", True,
            f"the dev loss was {best:.3f} and has risen to {loss:.3f}, the training loss with it: {_LOWER}",
        )  # fmt: skip
    return None


def _unfit_data(row: Row, facts: Facts, where: str) -> Diagnosis | None:
    """Texts or audio from which no model can learn."""
    unknown = _value(row, "eval_unknown_reference_fraction")
    if unknown >= MAX_UNKNOWN_FRACTION:
        return Diagnosis(
            "unknown tokens", True,
            f"{unknown:.0%} of the dev references' labels are characters that the vocabulary lacks, no such word can "
            "be right: set --case, --characters_to_ignore or --vocabulary so that text and vocabulary agree",
        )  # fmt: skip
    is_deaf = _value(row, "eval_loss") >= HEARING_LIMIT * facts.deaf_loss
    unfit = _value(row, "eval_unfit_input_fraction")
    if is_deaf and facts.hears_level and unfit >= MAX_UNFIT_FRACTION:
        return Diagnosis(
            "unnormalised audio", True,
            f"{unfit:.0%} of the dev waveforms reach the model silent, far too quiet, or with an offset larger than "
            "the signal: set do_normalize true in the model's preprocessor_config.json, or mend the recordings",
        )  # fmt: skip
    return None


def _leaving(history: Sequence[Row], facts: Facts, where: str) -> Diagnosis:
    """Below the loss of a deaf model and without a right word: for how long?"""
    row = history[-1]
    step, best = int(row["step"]), min(_values(history, "eval_loss"))
    stalled = next(int(row["step"]) for row in history if _value(row, "eval_loss") <= STALLED_LIMIT * best)
    if _full_rate_updates(stalled, step, facts) >= PLATEAU_PATIENCE:
        return Diagnosis(
            "no words", True,
            f"the model hears ({where}), but since step {stalled} it learns nothing more and no word is right: "
            f"{_words_remedy(row)}",
        )  # fmt: skip
    if step >= facts.total_steps:
        return Diagnosis("too short", True, f"the run has ended before the first words ({where}): {_words_remedy(row)}")
    return Diagnosis("leaving the plateau", False, f"normal: the model has begun to hear, words come later ({where})")


def _words_remedy(row: Row) -> str:
    if collapse := _collapse(row):
        return f"{collapse}. Look whether the training texts have their spaces, and train longer"
    if _value(row, "train_loss") < MEMORY_LIMIT * _value(row, "eval_loss"):
        return f"the training loss is {_value(row, 'train_loss'):.3f}, more training data is what helps"
    return "see in eval_samples.csv what is wrong with the words, train longer, or start from a larger model"


def _above(history: Sequence[Row], facts: Facts, where: str) -> Diagnosis:
    """Not yet on the plateau."""
    step, now = int(history[-1]["step"]), _value(history[-1], "eval_loss")
    gap = now - PLATEAU_LIMIT * facts.deaf_loss
    earlier = [row for row in history[:-1] if math.isfinite(_value(row, "train_loss")) and row["step"] >= step // 2]
    normal = Diagnosis("before the plateau", False, f"normal: the loss is on its way down ({where})")
    if step < MIN_UPDATES or not earlier or not math.isfinite(_value(history[-1], "train_loss")):
        return normal
    fall = _value(earlier[0], "train_loss") - _value(history[-1], "train_loss")
    pace = fall / max(_full_rate_updates(int(earlier[0]["step"]), step, facts), 1e-9)
    if PACE_MARGIN * pace * _full_rate_updates(step, facts.total_steps, facts) >= gap:
        return normal
    if fall <= 0:
        return Diagnosis(
            "stuck",
            True,
            f"the loss does not fall, nor has it come down to the plateau ({where}): {_rate_remedy(facts)}",
        )
    return Diagnosis(
        "too slow", True,
        f"at this pace the run ends before its loss reaches even the plateau ({where}): raise --learning_rate (it is "
        f"{facts.learning_rate:g}), shorten --warmup_steps ({facts.warmup_steps}), or train longer",
    )  # fmt: skip


def _on_plateau(history: Sequence[Row], facts: Facts, where: str) -> Diagnosis:
    """At the loss of a deaf model: for how long?"""
    step = int(history[-1]["step"])
    reached = min(
        int(row["step"])
        for row in history
        if min(_value(row, "eval_loss", math.inf), _value(row, "train_loss", math.inf))
        <= PLATEAU_LIMIT * facts.deaf_loss
    )
    spent = _full_rate_updates(reached, step, facts)
    if spent >= PLATEAU_PATIENCE:
        return Diagnosis(
            "stuck", True,
            f"since step {reached} the loss is that of a model that does not listen ({where}), longer than a normal "
            f"plateau: {_rate_remedy(facts)}",
        )  # fmt: skip
    if step >= facts.total_steps:
        return Diagnosis("too short", True, f"the run has ended on the plateau ({where}): train longer")
    return Diagnosis(
        "plateau", False,
        f"normal so far: blanks alone until the model begins to hear, within some hundred updates ({where})",
    )  # fmt: skip


def _has_risen(history: Sequence[Row], facts: Facts) -> bool:
    """Whether dev and training loss have both come back up, to the plateau or beyond."""
    best = min(_values(history[:-1], "eval_loss"), default=math.inf)
    trained = min(_values(history[:-1], "train_loss"), default=best)
    loss = _value(history[-1], "eval_loss")
    return loss >= max(RISE * best, HEARING_LIMIT * facts.deaf_loss) and (
        # The dev loss alone rises in a run that learns its training set by heart.
        _value(history[-1], "train_loss", math.inf) >= min(RISE * trained, HEARING_LIMIT * facts.deaf_loss)
    )


_LOWER = "lower --learning_rate, raise --warmup_steps"


def _rate_remedy(facts: Facts) -> str:
    rate = f"--learning_rate is {facts.learning_rate:g}, --warmup_steps {facts.warmup_steps}"
    if facts.learning_rate > HIGH_LEARNING_RATE:
        return f"{rate}: take 1e-3 or less"
    return (
        f"{rate}. Try a third of it and a longer warm-up, or three times as much; and listen to a few clips beside "
        "their texts, which may not belong together"
    )


def token_collapse(row: Row) -> str | None:
    """A line when the evaluation of this row lost words that the WER does not explain, else None."""
    what = _collapse(row)
    if what is None:
        return None
    return f"token collapse: {what}. It may mend itself with training; if it stays, decode with a language model"


def _collapse(row: Row) -> str | None:
    """What happens to the words while most characters are right."""
    words, cer, deletions = (_value(row, f"eval_{name}") for name in ("word_count_ratio", "cer", "deletion_rate"))
    others = _value(row, "eval_insertion_rate") + _value(row, "eval_substitution_rate")
    are_letters_right = cer <= MODERATE_CER
    if _value(row, "eval_wer") >= HOPELESS_WER and not are_letters_right:
        return None  # Nothing is right yet.
    are_glued = are_letters_right and words <= COLLAPSED_WORD_RATIO
    if deletions >= max(MIN_DELETION_RATE, DELETION_DOMINANCE * others) and not (
        are_glued and others >= MOSTLY_WRONG * words
    ):
        return f"words are lost: deletions are {deletions:.1%} of the words, all other errors {others:.1%}"
    if are_glued:
        return f"spaces are missing: {words:.2f} words for each of the references, at a CER of {cer:.1%}"
    return None


def remark(history: Sequence[Row], facts: Facts) -> tuple[str | None, list[str]]:
    """State for the log, and what the screen should say: what is new, and what persists at ever longer intervals.

    Args:
        history: as for `diagnose`; its rows hold the `state` of earlier evaluations.
        facts: of the run.
    """
    evaluations = [row for row in history if math.isfinite(_value(row, "eval_wer"))]
    diagnosis, lines = diagnose(history, facts), []
    if diagnosis is not None:
        before = _run_length(row.get("state") == diagnosis.state for row in reversed(evaluations[:-1]))
        if before == 0 or (diagnosis.is_warning and (before + 1).bit_count() == 1):
            lines.append(f"{'WARNING: ' if diagnosis.is_warning else ''}{diagnosis.state}: {diagnosis.text}")
    # One evaluation is a moment of every run; two in a row are a habit.
    length = _run_length(token_collapse(row) is not None for row in reversed(evaluations))
    if length > 1 and length.bit_count() == 1:
        lines.append(token_collapse(history[-1]))
    return diagnosis and diagnosis.state, lines


def _full_rate_updates(start: int, stop: int, facts: Facts) -> float:
    """Sum of the learning rate over the updates start .. stop - 1, in units of its peak."""
    steps = np.unique(np.linspace(start, max(stop - 1, start), 200).astype(int))
    rates = [facts.schedule.rate_at(int(step)) / facts.schedule.peak for step in steps]
    return float(np.mean(rates)) * (stop - start)


def _value(row: Row, name: str, default: float = math.nan) -> float:
    value = row.get(name)
    return default if value is None or (isinstance(value, float) and math.isnan(value)) else float(value)


def _values(rows: Sequence[Row], name: str) -> list[float]:
    """The finite ones."""
    return [value for row in rows if math.isfinite(value := _value(row, name))]


def _run_length(matches: Iterator[bool]) -> int:
    count = 0
    for match in matches:
        if not match:
            break
        count += 1
    return count
