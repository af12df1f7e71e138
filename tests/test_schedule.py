"""The learning rate against transformers' schedulers."""

import pytest
import torch
from transformers import get_scheduler

from schedule import Schedule

TOTAL_STEPS = 40


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 39, 40, 55])
def test_equal_to_transformers_at_every_step(kind: str, warmup_steps: int) -> None:
    """A warm-up as long as the run or longer is included: the peak is then never reached."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=TOTAL_STEPS)
    for step in range(TOTAL_STEPS):
        ours = Schedule(kind, 3e-4, warmup_steps, TOTAL_STEPS).rate_at(step)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-18), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("step", "kind", "warmup_steps", "rate"),
    [
        # The Hausa seed: linear warm-up to 5e-5 at step 1000, then linear decay.
        (0, "linear", 1_000, 0.0),
        (500, "linear", 1_000, 2.5e-5),
        (1_000, "linear", 1_000, 5e-5),
        (2_500, "linear", 1_000, 2.5e-5),
        (4_000, "linear", 1_000, 0.0),
        (2_500, "cosine", 1_000, 2.5e-5),
        (4_000, "cosine", 1_000, 0.0),
        (3_999, "constant", 1_000, 5e-5),
        (0, "linear", 0, 5e-5),
    ],
)
def test_literal_rates(step: int, kind: str, warmup_steps: int, rate: float) -> None:
    assert Schedule(kind, 5e-5, warmup_steps, 4_000).rate_at(step) == pytest.approx(rate, abs=1e-18)


def test_the_step_alone_decides() -> None:
    """Nothing is kept between calls: a resume, or a rank that asks twice, gets the same rate (trap 4)."""
    schedule = Schedule("cosine", 1.0, 3, 20)
    forwards = [schedule.rate_at(step) for step in range(20)]
    backwards = [schedule.rate_at(step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
