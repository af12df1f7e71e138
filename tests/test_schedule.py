"""The learning rate against transformers' schedulers."""

import math

import pytest
import torch
from transformers import get_scheduler

from levers import Rates
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


@pytest.mark.parametrize("num_cycles", [1, 2, 3])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 39])
def test_restarts_are_those_of_transformers(num_cycles: int, warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(
        "cosine_with_restarts", optimizer, warmup_steps, TOTAL_STEPS,
        scheduler_specific_kwargs={"num_cycles": num_cycles},
    )  # fmt: skip
    ours = Schedule("cosine_with_restarts", 3e-4, warmup_steps, TOTAL_STEPS, num_cycles=num_cycles)
    for step in range(TOTAL_STEPS):
        assert ours.rate_at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-18), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("num_cycles", [1, 2, 4])
@pytest.mark.parametrize("min_ratio", [0.05, 0.5])
def test_triangles_are_those_of_torch(num_cycles: int, min_ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    half = TOTAL_STEPS / num_cycles / 2
    theirs = torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=3e-4 * min_ratio, max_lr=3e-4, step_size_up=half, cycle_momentum=False
    )
    ours = Schedule("cyclic", 3e-4, 0, TOTAL_STEPS, num_cycles=num_cycles, min_ratio=min_ratio)
    for step in range(TOTAL_STEPS):
        assert ours.rate_at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        theirs.step()


def test_a_warm_up_leads_to_the_foot_of_the_first_triangle() -> None:
    schedule = Schedule("cyclic", 1.0, 10, 110, num_cycles=2, min_ratio=0.1)
    assert [schedule.rate_at(step) for step in (0, 5, 10, 35, 60, 85)] == pytest.approx([0, 0.05, 0.1, 1, 0.1, 1])


def fairseq_tri_stage(step: int, peak: float, warmup: int, hold: int, decay: int, final_scale: float) -> float:
    """fairseq/optim/lr_scheduler/tri_stage_lr_scheduler.py, with a warm-up from zero."""
    if step < warmup:
        return peak / warmup * step
    if step < warmup + hold:
        return peak
    if step <= warmup + hold + decay:
        return peak * math.exp(math.log(final_scale) / decay * (step - warmup - hold))
    return peak * final_scale


def test_three_stages_are_those_of_fairseq() -> None:
    schedule = Schedule("tri_stage", 5e-5, 100, 1_000, hold_ratio=0.4, min_ratio=0.05)
    for step in range(1_000):
        expected = fairseq_tri_stage(step, 5e-5, 100, 400, 500, 0.05)
        assert schedule.rate_at(step) == pytest.approx(expected, rel=1e-9, abs=1e-18), step


def test_settings_become_a_schedule() -> None:
    rates = Rates(learning_rate=1e-3, warmup_ratio=0.1, lr_scheduler_type="tri_stage", lr_min_ratio=0.2)
    assert Schedule.of(rates, 95) == Schedule("tri_stage", 1e-3, 10, 95, hold_ratio=0.4, min_ratio=0.2)
    assert Schedule.of(Rates(warmup_steps=7), 95) == Schedule("linear", 3e-4, 7, 95)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "--warmup_ratio 0.1 and --warmup_steps 5: give one of them"),
        ({"warmup_ratio": 1.0}, "--warmup_ratio is 1.0, it must lie in [0, 1)"),
        ({"lr_num_cycles": 2}, "--lr_num_cycles belongs to --lr_scheduler_type cosine_with_restarts and cyclic"),
        ({"lr_scheduler_type": "cyclic", "lr_num_cycles": 0}, "--lr_num_cycles is 0, at least 1"),
        ({"lr_hold_ratio": 0.1}, "--lr_hold_ratio belongs to --lr_scheduler_type tri_stage, not to linear"),
        ({"lr_scheduler_type": "tri_stage", "lr_min_ratio": 0.0}, "--lr_min_ratio is 0, it must lie in [1e-06, 1)"),
        ({"layer_lr_decay": 0.0}, "--layer_lr_decay is 0.0, it must lie in (0, 1]"),
        ({"head_learning_rate": 0.0}, "--head_learning_rate is 0.0, it must be above 0"),
        ({"freeze_encoder_steps": -1}, "--freeze_encoder_steps is -1, it cannot be negative"),
    ],
)
def test_rates_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    (error,) = Rates(**settings).rate_errors()
    assert said in error


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
