"""Where the time goes, against a clock that only a test moves; and forecasts against what a run then takes."""

import itertools

import pytest
from conftest import Seconds

import clock
from clock import PHASES, Clock, Work, describe_cost, seconds_left


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    time = Seconds()
    monkeypatch.setattr(clock.time, "perf_counter", time)
    return time


def test_every_second_counts_once_and_for_the_innermost_phase(time: Seconds) -> None:
    found = Clock([0.0] * 5)
    time.now += 100  # before any phase: the start of the run
    with found.phase("compute"):
        time.now += 3
        with found.phase("communication"):
            time.now += 2
        time.now += 1
    with found.phase("evaluation"):
        time.now += 10
        assert found.read() == [0, 4, 2, 10, 0], "up to now"
        found.clear()
        time.now += 5
        with pytest.raises(ValueError), found.phase("save"):
            time.now += 7
            raise ValueError
    time.now += 50
    assert dict(zip(PHASES, found.read(), strict=True)) == {
        "data": 0, "compute": 0, "communication": 0, "evaluation": 5, "save": 7,
    }  # fmt: skip
    assert found.spent == {"data": 0, "compute": 4, "communication": 2, "evaluation": 15, "save": 7}


def test_waiting_for_items_is_data_and_working_on_them_is_not(time: Seconds) -> None:
    def load() -> object:
        for item in range(3):
            time.now += 2
            yield item
        time.now += 1  # to find out that there are no more

    found = Clock([10.0, 0, 0, 0, 0])
    for item in found.waiting(load()):
        with found.phase("compute"):
            time.now += 10 + item
    assert found.read() == [17, 33, 0, 0, 0], "a resumed run goes on from 10"


@pytest.mark.parametrize("eval_every", [100, 333, 900])
@pytest.mark.parametrize("cost", [0.26, 0.40])
def test_after_five_percent_of_a_run_its_end_is_known_to_a_tenth(eval_every: int, cost: float, time: Seconds) -> None:
    """Before an evaluation was timed its cost is taken for a third of training; the field notes have 0.26 to 0.40."""
    updates, save_every, per_update, audio = 1_000, 500, 2.0, 40.0
    dev_seconds = 4_000.0
    found, done = Clock([0.0] * 5), Work()
    ends = [step for step in range(1, updates + 1) if step % eval_every == 0 or step == updates]

    def forecast(step: int) -> float:
        left = Work(updates - step, dev_seconds * sum(end > step for end in ends), (updates - step) // save_every)
        return seconds_left(done, left, found.spent, (1 / 3) / audio)

    begun, forecasts = time.now, {}
    for step in range(1, updates + 1):
        with found.phase("compute"):
            time.now += per_update
        done.updates += 1
        if step in ends:
            with found.phase("evaluation"):
                time.now += dev_seconds * cost * per_update / audio
            done.eval_seconds += dev_seconds
        if step % save_every == 0:
            with found.phase("save"):
                time.now += 4
            done.saves += 1
        forecasts[step] = time.now + forecast(step)
    for step in itertools.islice(forecasts, updates // 20, None):
        assert forecasts[step] - begun == pytest.approx(time.now - begun, rel=0.1)


def test_nothing_is_said_before_the_first_update() -> None:
    assert seconds_left(Work(), Work(10), dict.fromkeys(PHASES, 0.0), 0.1) is None


def test_cost_in_a_line() -> None:
    cost = {"audio_hours_per_hour": 4.321, "padding_fraction": 0.026, "elapsed_seconds": 200.0}
    cost |= {"data_seconds": 1.0, "compute_seconds": 150.0, "communication_seconds": 0.0, "evaluation_seconds": 30.0}
    assert describe_cost(cost | {"save_seconds": 9.0}) == (
        "4.32 hours of audio per hour, 2.6% padding; of the time: data 0.5%, compute 75.0%, communication 0.0%, "
        "evaluation 15.0%, save 4.5%, start and checks 5.0%"
    )
