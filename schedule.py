"""The learning rate as a pure function of the step, so that no scheduler state can be lost or counted twice."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from levers import Course

# wav2vec 2.0's fine-tuning holds its rate for 40 % of the run (https://arxiv.org/abs/2006.11477, section 4.3), and
# fairseq's recipes for it end at 5 % of the peak.
HOLD_RATIO, MIN_RATIO, NUM_CYCLES = 0.4, 0.05, 3


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate over a run.

    "linear", "cosine", "constant" and "cosine_with_restarts" have the values of transformers' get_scheduler, "cyclic"
    those of torch's CyclicLR ("triangular", https://arxiv.org/abs/1506.01186), "tri_stage" those of fairseq's
    scheduler of this name.

    Attributes:
        kind: "linear" and "cosine" fall to zero at total_steps, "cosine_with_restarts" does so num_cycles times;
            "constant" stays; "cyclic" rises from and falls to min_ratio of the peak num_cycles times; "tri_stage"
            holds the peak for hold_ratio of the run and falls exponentially to min_ratio of it.
        peak: rate at the end of warm-up.
        warmup_steps: steps of linear rise from zero.
        total_steps: optimizer steps of the run.
        num_cycles, hold_ratio, min_ratio: of the kinds that have them.
    """

    kind: str
    peak: float
    warmup_steps: int
    total_steps: int
    num_cycles: int = NUM_CYCLES
    hold_ratio: float = HOLD_RATIO
    min_ratio: float = MIN_RATIO

    @classmethod
    def of(cls, rates: "Course", total_steps: int) -> "Schedule":
        """By the settings of a run of so many optimizer steps."""
        warmup_steps = rates.warmup_steps or math.ceil(rates.warmup_ratio * total_steps)
        return cls(
            rates.lr_scheduler_type,
            rates.learning_rate,
            warmup_steps,
            total_steps,
            rates.lr_num_cycles or NUM_CYCLES,
            HOLD_RATIO if rates.lr_hold_ratio is None else rates.lr_hold_ratio,
            MIN_RATIO if rates.lr_min_ratio is None else rates.lr_min_ratio,
        )

    def rate_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished optimizer steps, 0 .. total_steps - 1."""
        # The triangles begin where the warm-up of a cyclic schedule ends: at the lowest rate.
        start = self.min_ratio if self.kind == "cyclic" else 1.0
        if step < self.warmup_steps:
            return self.peak * start * step / self.warmup_steps
        share_done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * self._share_of_peak(step, share_done)

    def _share_of_peak(self, step: int, share_done: float) -> float:
        """Behind the warm-up, of which `share_done` is over."""
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            return max(0.0, 1.0 - share_done)
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share_done)))
        if self.kind == "cosine_with_restarts":
            within = self.num_cycles * share_done % 1.0
            return 0.0 if share_done >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * within))
        if self.kind == "cyclic":
            within = self.num_cycles * share_done % 1.0
            return self.min_ratio + (1.0 - self.min_ratio) * (1.0 - abs(2.0 * within - 1.0))
        assert self.kind == "tri_stage", self.kind
        hold_steps = self.hold_ratio * self.total_steps
        decay_steps = max(1.0, self.total_steps - self.warmup_steps - hold_steps)
        share_decayed = min(1.0, max(0.0, step - self.warmup_steps - hold_steps) / decay_steps)
        return self.min_ratio**share_decayed
