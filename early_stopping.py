"""When a run has stopped getting better: --early_stopping_patience.

Evaluations in a row without a gain are counted, and the run ends when there are as many as the patience. A gain is a
fall of the metric by more than the threshold below its value at the last gain, so that slow progress adds up (as in
Keras' EarlyStopping, `min_delta`). What is not counted, since it says nothing yet:

- an evaluation inside the warm-up, which ends with update `warmup_steps`, or before the encoder thaws
  (`freeze_encoder_steps`);
- one whose WER is still at 1.0 (`diagnosis.HOPELESS_WER`) while diagnosis.py calls that normal: on its way down to the
  plateau, on the plateau for no longer than plateaus last, or leaving it;
- one whose WER is still at 1.0 while the dev loss goes on falling: words come last.

So a run that is stuck, diverges or knows its training set by heart at WER 1.0 is stopped, and one that learns is not.
Each of these sets the count back to 0: patience is owed in full from the end of the plateau on.
"""

import math
from dataclasses import dataclass

# The dev loss of a run that learns falls by more from one evaluation to the next; noise at a flat loss by less.
LOSS_GAIN = 0.01


@dataclass
class Patience:
    """How long a run has gone without a gain; saved with every checkpoint.

    Attributes:
        count: evaluations in a row without one.
        reference: the metric at the last gain.
        reference_step: when that was.
        lowest_loss: of the dev set, at its last fall by LOSS_GAIN.
    """

    count: int = 0
    reference: float | None = None
    reference_step: int | None = None
    lowest_loss: float | None = None

    def judge(
        self, step: int, value: float, threshold: float, loss: float, is_hopeless: bool, is_excused: bool
    ) -> None:
        """Take one evaluation.

        Args:
            step: optimizer steps done.
            value: of the metric, lower is better; one that is not finite is no gain.
            threshold: what a gain exceeds.
            loss: of the dev set.
            is_hopeless: no word is right yet.
            is_excused: inside the warm-up, or at WER 1.0 in a state that is normal.
        """
        has_gained = _falls_below(value, self.reference, threshold)
        loss_falls = _falls_below(loss, self.lowest_loss, LOSS_GAIN * (self.lowest_loss or 0.0))
        if has_gained:
            self.reference, self.reference_step = value, step
        if loss_falls:
            self.lowest_loss = loss
        is_learning = has_gained or is_excused or (is_hopeless and loss_falls)
        self.count = 0 if is_learning else self.count + 1

    def describe(self, metric: str, value: float, threshold: float) -> str:
        """Why the run stops, in one line."""
        if self.reference is None:
            return f"{metric} was no number in {self.count} evaluations in a row"
        by = f" by more than {threshold:g}" if threshold else ""
        return (
            f"{self.count} evaluations in a row, the last with {metric} {value:.4g}, have not come{by} below "
            f"{self.reference:.4g}, that of step {self.reference_step}"
        )


def _falls_below(value: float, reference: float | None, margin: float) -> bool:
    return math.isfinite(value) and (reference is None or value < reference - margin)
