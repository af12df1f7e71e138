"""The learning rate as a pure function of the step, so that no scheduler state can be lost or counted twice."""

import math


def learning_rate_at(step: int, kind: str, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of the update that follows `step` finished optimizer steps.

    The same values as transformers' get_scheduler for "linear", "cosine" and "constant" with warm-up.

    Args:
        step: optimizer steps done, 0 .. total_steps - 1.
        kind: "linear" and "cosine" fall to zero at total_steps, "constant" stays.
        peak: rate at the end of warm-up.
        warmup_steps: steps of linear rise from zero.
        total_steps: optimizer steps of the run.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    share_done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * max(0.0, 1.0 - share_done)
    assert kind == "cosine", kind
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share_done)))
