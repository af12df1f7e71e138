"""Intervals on simulated corpora whose true rate is known: a 95 % interval covers it in 93 to 97 % of them."""

import math

import numpy as np
import pytest

from intervals import Interval, rate_difference, rate_interval, share_interval, share_of_units, student_quantile

SIMULATIONS = 1_000


def draw_corpus(
    generator: np.random.Generator, speakers: int, clips: int | np.ndarray, rate: float, spread: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors and words of each utterance, and its speaker.

    Speakers differ by a log-normal factor with standard deviation `spread`, utterances of a speaker by an exponential
    one: most are right and a few are all wrong, as in real results.
    """
    speakers_N = np.repeat(np.arange(speakers), clips)
    factor_N = np.exp(generator.normal(-(spread**2) / 2, spread, speakers))[speakers_N]
    lengths_N = generator.integers(1, 16, len(speakers_N))
    rates_N = np.minimum(rate * factor_N * generator.exponential(1.0, len(speakers_N)), 1.0)
    return generator.binomial(lengths_N, rates_N), lengths_N, speakers_N


@pytest.mark.parametrize(
    ("speakers", "clips", "rate", "spread"),
    [
        *((1, 100, 0.1, 0.0), (1, 400, 0.3, 0.0), (1, 200, 0.01, 0.0)),
        *((10, 20, 0.1, 0.5), (10, 4, 0.05, 0.5), (15, 20, 0.2, 0.3), (40, 8, 0.1, 0.4)),
    ],
)
def test_interval_covers_the_true_rate(speakers: int, clips: int, rate: float, spread: float) -> None:
    generator = np.random.default_rng(1)
    errors_N, lengths_N, _ = draw_corpus(np.random.default_rng(2), 20_000, 20, rate, spread)
    truth, covered = errors_N.sum() / lengths_N.sum(), 0
    for _ in range(SIMULATIONS):
        errors_N, lengths_N, speakers_N = draw_corpus(generator, speakers, clips, rate, spread)
        interval = rate_interval(errors_N, lengths_N, speakers_N)
        assert interval.unit == ("speakers" if speakers >= 10 else "utterances")
        covered += interval.low <= truth <= interval.high
    assert 0.93 * SIMULATIONS <= covered <= 0.97 * SIMULATIONS


def test_a_few_voices_with_most_of_the_clips_are_covered_less_well() -> None:
    """As in Common Voice: clips fall with the rank of the speaker. Said in the docstring of rate_interval."""
    generator, covered, clips = np.random.default_rng(1), 0, np.maximum(200 // np.arange(1, 301), 1)
    errors_N, lengths_N, _ = draw_corpus(np.random.default_rng(2), 20_000, 20, 0.1, 0.4)
    truth = errors_N.sum() / lengths_N.sum()
    for _ in range(300):
        errors_N, lengths_N, speakers_N = draw_corpus(generator, 300, clips, 0.1, 0.4)
        interval = rate_interval(errors_N, lengths_N, speakers_N)
        covered += interval.low <= truth <= interval.high
    assert 0.86 * 300 <= covered <= 0.96 * 300


@pytest.mark.parametrize(("wrong", "total"), [(12, 12), (11, 12), (0, 12), (97, 100), (3, 100)])
def test_a_share_near_all_has_the_limits_of_its_rest(wrong: int, total: int) -> None:
    interval = share_of_units(np.arange(total) < wrong)
    assert (interval.low, interval.high) == pytest.approx(share_interval(wrong, total), abs=1e-9)
    assert interval.rate == wrong / total


@pytest.mark.parametrize(("degrees", "quantile"), [(9, 2.2622), (19, 2.0930), (99, 1.9842)])
def test_student_quantile_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-3)


def test_utterances_of_few_voices_give_an_interval_that_is_too_narrow_for_new_ones() -> None:
    """Why speakers are drawn: the same clips, drawn one by one, promise too much."""
    generator, covered = np.random.default_rng(1), {"speakers": 0, "utterances": 0}
    errors_N, lengths_N, _ = draw_corpus(np.random.default_rng(2), 20_000, 20, 0.2, 0.5)
    truth = errors_N.sum() / lengths_N.sum()
    for _ in range(200):
        errors_N, lengths_N, speakers_N = draw_corpus(generator, 20, 50, 0.2, 0.5)
        for speakers in (speakers_N, None):
            interval = rate_interval(errors_N, lengths_N, speakers)
            covered[interval.unit] += interval.low <= truth <= interval.high
    assert covered["speakers"] >= 180
    assert covered["utterances"] < 120


def test_difference_covers_the_true_one_and_is_tighter_than_two_intervals() -> None:
    """Two models that fail on the same utterances: 20 % and 18 % of the words."""
    generator, covered, truth = np.random.default_rng(1), 0, -0.02
    for _ in range(SIMULATIONS):
        lengths_N = generator.integers(1, 16, 200)
        hardness_N = generator.beta(0.5, 2.0, 200)
        first_N = generator.binomial(lengths_N, hardness_N)
        second_N = first_N - generator.binomial(first_N, 0.1)
        difference = rate_difference(first_N, second_N, lengths_N)
        covered += difference.interval.low <= truth <= difference.interval.high
    assert 0.93 * SIMULATIONS <= covered <= 0.97 * SIMULATIONS
    assert difference.changed == np.count_nonzero(first_N != second_N)
    apart = rate_interval(first_N, lengths_N)
    assert difference.interval.high - difference.interval.low < (apart.high - apart.low) / 2


def test_detectable_difference_is_seen_in_four_of_five_sets() -> None:
    generator, seen, detectable = np.random.default_rng(1), 0, []
    gain = 0.05
    for _ in range(SIMULATIONS):
        lengths_N = generator.integers(5, 16, 150)
        first_N = generator.binomial(lengths_N, 0.3)
        second_N = generator.binomial(lengths_N, 0.3 - gain)
        difference = rate_difference(first_N, second_N, lengths_N)
        detectable.append(difference.detectable)
        seen += difference.is_clear
    # The normal curve says which share of true differences of this size is seen.
    ratio = gain / np.mean(detectable)
    expected = 0.5 * (1 + math.erf((2.8016 * ratio - 1.95996) / math.sqrt(2)))
    assert seen / SIMULATIONS == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(
    ("errors", "lengths", "low", "high"),
    [
        # No error in 100 utterances of 5 words: at most 3.6 % of them hold one (Clopper and Pearson), one word of five.
        ([0] * 100, [5] * 100, 0.0, 0.036217 / 5),
        ([1] + [0] * 99, [1] * 100, 0.000253, 0.054459),
        ([1, 1], [1, 1], 0.158114, 1.0),
    ],
)
def test_few_errors(errors: list[int], lengths: list[int], low: float, high: float) -> None:
    interval = rate_interval(np.array(errors), np.array(lengths))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-6)


def test_a_model_that_is_wrong_nearly_everywhere() -> None:
    """All words wrong, and a few insertions: some resamples see no spread at all."""
    lengths_N = np.full(40, 2)
    errors_N = lengths_N + (np.arange(40) < 4)
    interval = rate_interval(errors_N, lengths_N)
    assert 1.0 <= interval.low < interval.rate < interval.high < 1.15
    same = rate_interval(lengths_N, lengths_N)
    assert (same.low, same.rate, same.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("found", "total", "low", "high"),
    # Table of Clopper and Pearson's limits, as in any textbook.
    [(0, 10, 0.0, 0.3085), (1, 10, 0.0025, 0.4450), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0)],
)
def test_share_interval(found: int, total: int, low: float, high: float) -> None:
    assert share_interval(found, total) == pytest.approx((low, high), abs=1e-4)


def test_no_interval_from_one_utterance_or_no_word() -> None:
    for errors, lengths, rate in (([1], [4], 0.25), ([], [], 0.0), ([2, 0], [0, 0], 2.0)):
        interval = rate_interval(np.array(errors), np.array(lengths))
        assert interval.rate == rate
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
    assert str(Interval(0.25, math.nan, math.nan, 1, "utterances")) == "25.00%"


def test_equal_models_and_few_changes() -> None:
    lengths_N = np.full(100, 5)
    same = rate_difference(np.zeros(100), np.zeros(100), lengths_N)
    assert same.interval.rate == same.changed == 0
    assert same.detectable == pytest.approx(6 / 500), "six changed words are the least that a sign test tells"
    assert not same.is_clear
    one_better = np.zeros(100)
    one_better[0] = 1
    assert not rate_difference(one_better, np.zeros(100), lengths_N).is_clear
    seven_better = np.arange(100) < 7
    difference = rate_difference(seven_better, np.zeros(100), lengths_N)
    assert difference.is_clear
    assert difference.interval.rate == pytest.approx(-7 / 500)


def test_unknown_speakers_are_units_of_their_own() -> None:
    errors_N, lengths_N, speakers_N = draw_corpus(np.random.default_rng(0), 12, 5, 0.3, 0.3)
    speakers_N[:5] = -1  # all of speaker 0
    assert rate_interval(errors_N, lengths_N, speakers_N).units == 11 + 5
    speakers_N[:10] = -1
    assert rate_interval(errors_N, lengths_N, speakers_N).unit == "utterances", "too many have none"
    assert rate_interval(errors_N, lengths_N, np.full(60, -1)).unit == "utterances"


def test_same_input_same_interval_whatever_the_order_of_calls() -> None:
    errors_N, lengths_N, speakers_N = draw_corpus(np.random.default_rng(0), 12, 5, 0.3, 0.3)
    first = rate_interval(errors_N, lengths_N, speakers_N)
    np.random.default_rng().random(3)
    assert rate_interval(errors_N, lengths_N, speakers_N) == first
