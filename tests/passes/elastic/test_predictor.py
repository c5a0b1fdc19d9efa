"""Accuracy of subnets that were not evaluated."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest

from slim.passes.elastic.predictor import FEWEST, Predictor, measure_singles, rank_correlation, ridge, singles
from slim.passes.elastic.space import Space, Subnet
from slim.passes.elastic.subnets import drawn
from tests.passes.elastic import toys_of_search as toys


@pytest.fixture
def space() -> Space:
    return toys.space(5)


def scores(space: Space, interaction: float) -> Callable[[Subnet], float]:
    return lambda subnet: toys.accuracy(space, subnet, interaction)


def some(space: Space, count: int, seed: int) -> list[Subnet]:
    """Random ones with more than one change."""
    rng, alone = Random(seed), set(singles(space))
    found: dict[Subnet, None] = {}
    while len(found) < count:
        one = drawn(space, rng)
        if one not in alone:
            found[one] = None
    return [*found]


def predictor(space: Space, interaction: float) -> Predictor:
    return Predictor.of(space, measure_singles(space, scores(space, interaction)))


def test_singles_are_the_largest_and_every_single_change(space: Space) -> None:
    found = singles(space)
    assert found[0] == space.largest
    assert len(set(found)) == len(found) == 1 + 6 * 3 + 5
    for one in found[1:]:
        narrower = sum(count < full for count, full in zip(one.units, space.largest.units, strict=True))
        assert narrower + one.on.count(False) == 1


def test_a_block_that_has_to_stay_is_not_left_out_alone() -> None:
    assert all(all(one.on) for one in singles(toys.space(2, fewest=2)))


def test_a_sum_of_single_changes_is_predicted_exactly(space: Space) -> None:
    # No interaction: a subnet loses what its changes lose, and a block that is left out its whole width.
    given = some(space, 50, seed=0)
    assert predictor(space, 0.0).predict(given) == pytest.approx([toys.accuracy(space, one, 0.0) for one in given])


def test_the_table_says_what_each_change_costs_alone(space: Space) -> None:
    table = predictor(space, 0.0).table
    assert table["stem"] == {"6": pytest.approx(2 / 16), "4": pytest.approx(2 / 4), "2": pytest.approx(18 / 16)}
    assert set(table) == {"stem", *(f"blocks.{n}.fc1" for n in range(5)), *(f"blocks.{n}" for n in range(5))}
    assert table["blocks.0"] == pytest.approx(5.0)


def test_a_single_change_that_another_process_is_at_is_asked_for_again_later(space: Space) -> None:
    asked: list[Subnet] = []
    busy = {one: 3 for one in singles(space)[2:4]}

    def accuracy(subnet: Subnet) -> float | None:
        asked.append(subnet)
        busy[subnet] = busy.get(subnet, 0) - 1
        return toys.accuracy(space, subnet, 1.0) if busy[subnet] < 0 else None

    found = measure_singles(space, accuracy)
    first, second = singles(space)[2:4]
    assert asked == [*singles(space), *[first, second] * 3]
    assert [*found.items()] == [(one, toys.accuracy(space, one, 1.0)) for one in singles(space)]


def test_evaluations_correct_what_the_sum_misses(space: Space) -> None:
    # Changes side by side cost up to 40 points that none of them costs alone.
    truth, plain = scores(space, 10.0), predictor(space, 10.0)
    fitted = plain.refit({one: truth(one) for one in some(space, 60, seed=0)})
    unseen = some(space, 150, seed=1)[60:]
    found = np.array([truth(one) for one in unseen])
    missed = [float(np.abs(one.predict(unseen) - found).mean()) for one in (plain, fitted)]
    assert fitted.ridge is not None
    assert missed[1] < 0.5 * missed[0]


def test_no_correction_is_made_of_noise(space: Space) -> None:
    noise = Random(0)
    evaluated = {one: toys.accuracy(space, one, 0.0) + noise.gauss(0, 1) for one in some(space, 60, seed=0)}
    fitted = predictor(space, 0.0).refit(evaluated)
    unseen = some(space, 50, seed=7)
    exact = np.array([toys.accuracy(space, one, 0.0) for one in unseen])
    # Used or not, it must not do harm: noise of 1 point in 60 rows moves predictions by a fraction of it.
    assert float(np.abs(fitted.predict(unseen) - exact).mean()) < 0.5


def test_few_evaluations_correct_nothing(space: Space) -> None:
    few = {one: 0.0 for one in some(space, FEWEST - 1, seed=0)}
    fitted = predictor(space, 1.0).refit(few)
    assert fitted.ridge is None
    assert fitted.tau is None


def test_single_changes_are_no_evidence(space: Space) -> None:
    evaluated = {one: toys.accuracy(space, one, 1.0) for one in singles(space)}
    assert len(evaluated) > FEWEST
    assert predictor(space, 1.0).refit(evaluated).tau is None


def test_tau_is_of_predictions_made_without_the_subnet(space: Space) -> None:
    # Accuracies drawn at random cannot be predicted; a correction judged on its own rows would seem to.
    rng = Random(0)
    evaluated = {one: rng.uniform(0, 90) for one in some(space, 40, seed=0)}
    tau = predictor(space, 0.0).refit(evaluated).tau
    # Of 40 pairs without any relation the standard deviation of tau is 0.11.
    assert tau is not None
    assert abs(tau) < 0.33
    honest = predictor(space, 0.0).refit({one: toys.accuracy(space, one, 0.0) for one in some(space, 40, seed=0)})
    assert honest.tau == pytest.approx(1.0)


def test_a_refit_starts_from_the_sum_again(space: Space) -> None:
    truth, plain = scores(space, 10.0), predictor(space, 10.0)
    rows = [{one: truth(one) for one in some(space, count, seed=0)} for count in (20, 60)]
    unseen = some(space, 10, seed=5)
    assert plain.refit(rows[0]).refit(rows[1]).predict(unseen) == pytest.approx(plain.refit(rows[1]).predict(unseen))


def test_leaving_one_out_is_what_it_says() -> None:
    rng = np.random.default_rng(0)
    columns, aim = np.column_stack([rng.normal(size=(12, 4)), np.ones(12)]), rng.normal(size=12)
    _, missed = ridge(columns, aim, 3.0)
    for row in range(12):
        others = np.arange(12) != row
        weights, _ = ridge(columns[others], aim[others], 3.0)
        assert missed[row] == pytest.approx(aim[row] - columns[row] @ weights)


def test_there_is_no_rank_correlation_of_what_is_all_the_same() -> None:
    ones, rising = np.ones(5), np.arange(5.0)
    assert rank_correlation(ones, rising) is None
    assert rank_correlation(rising, ones) is None
    assert rank_correlation(rising, rising**2) == pytest.approx(1.0)
