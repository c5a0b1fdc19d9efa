from __future__ import annotations

import numpy as np
import pytest

from slim.bench import statistics
from slim.bench.statistics import Interval


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("share", "fewest"), [(0.90, 29), (0.95, 59), (0.99, 299)])
def test_fewest_samples_are_those_whose_maximum_bounds_the_quantile(share: float, fewest: int) -> None:
    assert statistics.fewest_samples(share) == fewest
    # The maximum lies below the quantile only if every sample does.
    assert share**fewest <= 0.05 < share ** (fewest - 1)


def test_an_interval_covers_what_sessions_add_not_only_what_rounds_add() -> None:
    covered, covered_flat = 0, 0
    for seed in range(60):
        random = generator(seed)
        values = random.normal(0, 1, (12, 1)) + random.normal(0, 0.3, (12, 8))
        found = statistics.bootstrap(values, statistics.median, generator=random)
        flat = statistics.bootstrap(values.reshape(1, -1), statistics.median, generator=random)
        covered += found.low <= 0 <= found.high
        covered_flat += flat.low <= 0 <= flat.high
    # 95 % is promised; a percentile bootstrap over 12 sessions keeps a little less. Rounds alone keep far less.
    assert covered >= 0.88 * 60
    assert covered_flat < 0.6 * 60


def test_calls_of_a_round_are_drawn_together() -> None:
    values = np.repeat(np.arange(12.0).reshape(3, 4, 1), 2, axis=2)
    draws = statistics.resample(values, generator=generator(), resamples=50).reshape(50, 12, 2)
    assert (draws[..., 0] == draws[..., 1]).all()
    # And of a drawn session only its own rounds: 4 in a row from one of 0..3, 4..7, 8..11.
    sessions = draws[..., 0].reshape(50, 3, 4) // 4
    assert (sessions == sessions[..., :1]).all()
    assert len(np.unique(draws)) == 12


def test_the_ratio_is_candidate_over_reference_and_a_common_disturbance_cancels() -> None:
    random = generator()
    disturbance = random.uniform(1, 3, (5, 8, 1))
    reference = 2.0 * disturbance * random.uniform(1, 1.2, (5, 8, 3))
    reference[..., 0] = 2.0 * disturbance[..., 0]
    found = statistics.paired_ratio(1.08 * reference, reference, generator=random)
    assert found.value == pytest.approx(1.08)
    assert (found.low, found.high) == pytest.approx((1.08, 1.08))


def test_one_disturbed_call_in_a_round_does_not_count() -> None:
    reference = np.full((4, 8, 3), 2.0)
    candidate = reference.copy()
    candidate[:, :, 1] = 40.0
    assert statistics.paired_ratio(candidate, reference, generator=generator()).value == 1.0


def test_the_same_generator_gives_the_same_interval_and_another_seed_a_different_one() -> None:
    values = generator(7).normal(size=(8, 16))
    first, again, other = (
        statistics.bootstrap(values, lambda drawn: drawn.mean(axis=-1), generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first.low < first.value < first.high


def test_drift_is_the_last_third_against_the_first() -> None:
    noise = generator(3).normal(0, 0.001, (9, 16))
    slowing = noise + np.log(1.0 + 0.1 * (np.arange(9) >= 6))[:, None]
    shift = statistics.drift(slowing, generator=generator())
    assert shift.value == pytest.approx(1.1, abs=0.002)
    assert shift.low > 1.05
    steady = statistics.drift(noise, generator=generator())
    assert steady.low < 1 < steady.high


def test_leaves_needs_the_whole_interval_outside() -> None:
    assert Interval(1.05, 1.021, 1.08).leaves(1.0, 0.02)
    assert Interval(0.95, 0.92, 0.979).leaves(1.0, 0.02)
    assert not Interval(1.05, 1.019, 1.08).leaves(1.0, 0.02)
    assert not Interval(1.0, 0.9, 1.1).leaves(1.0, 0.02)
