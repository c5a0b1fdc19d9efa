"""Choosing ranks: every rule keeps to the budget, and each is as good as it says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from slim.passes.low_rank.select import (
    Option,
    Options,
    Unreachable,
    cost_of,
    energy,
    front,
    greedy,
    knapsack,
    step_below,
    uniform,
)

Select = Callable[[Sequence[Options], float], list[int]]

LOSSLESS = Option(rank=0, cost=10, loss=0)
# Share kept by rank r is r / 10: at break-even the pair costs what the layer costs.
LARGE = (LOSSLESS, Option(2, 2, 0.5), Option(4, 4, 0.3), Option(8, 8, 0.1))
SMALL = (Option(0, 5, 0), Option(2, 2.5, 0.2), Option(3, 4, 0.05))
SHARES = ((1, 0.2, 0.4, 0.8), (1, 0.5, 0.8))


def by_share(layers: Sequence[Options], budget: float) -> list[int]:
    """The share of an option is its rank over 10, as `random_layers` makes them."""
    return uniform(layers, [[option.rank / 10 or 1.0 for option in layer] for layer in layers], budget)


RULES: dict[str, Select] = {"greedy": greedy, "knapsack": knapsack, "uniform": by_share, "energy": energy}


def random_layers(seed: int, *, layers: int = 8, whole: bool, noise: float = 0.0) -> list[Options]:
    """Layers of three or four options whose loss falls with the rank; `noise` lets a cost fall too."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(layers):
        dense, weight = draw.uniform(10, 60), draw.uniform(0.5, 2)
        options = [Option(0, float(round(dense) if whole else dense), 0.0)]
        for rank in sorted(draw.choice(np.arange(1, 10), size=draw.integers(2, 4), replace=False).tolist()):
            cost = dense * rank / 10 * (1 + noise * draw.standard_normal())
            options.append(Option(rank, float(round(cost) if whole else cost), float(weight * (1 - rank / 10) ** 2)))
        made.append(tuple(options[index] for index in draw.permutation(len(options))))
    return made


def loss_of(layers: Sequence[Options], chosen: Sequence[int]) -> float:
    return math.fsum(layer[index].loss for layer, index in zip(layers, chosen, strict=True))


def dense_cost(layers: Sequence[Options]) -> float:
    return math.fsum(option.cost for layer in layers for option in layer if option.rank == 0)


def least_cost(layers: Sequence[Options]) -> float:
    return math.fsum(min(option.cost for option in layer) for layer in layers)


def brute_force(layers: Sequence[Options], budget: float) -> float:
    """The least loss of any assignment within the budget."""
    cost, loss = np.zeros(1), np.zeros(1)
    for layer in layers:
        cost = (cost[:, None] + [option.cost for option in layer]).ravel()
        loss = (loss[:, None] + [option.loss for option in layer]).ravel()
    return float(loss[cost <= budget].min())


def between(layers: Sequence[Options], share: float) -> float:
    """A budget that lies `share` of the way from the cheapest assignment to the dense one."""
    least = least_cost(layers)
    return least + share * (dense_cost(layers) - least)


# The front


def test_a_front_holds_what_nothing_beats_in_both() -> None:
    beaten, equal = Option(5, 6, 0.4), Option(6, 4, 0.3, "second")
    assert front((*LARGE, beaten, equal)) == (LARGE[1], LARGE[2], LARGE[3], LOSSLESS)


def test_what_costs_no_less_than_the_layer_itself_is_beaten_by_it() -> None:
    assert front((Option(9, 10, 0.0), Option(8, 11, 0.01), LOSSLESS)) == (LOSSLESS,)


# All rules


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_budget_is_never_exceeded(rule: str, seed: int, noise: float) -> None:
    layers = random_layers(seed, whole=False, noise=noise)
    for share in (0.05, 0.3, 0.6, 0.95):
        budget = between(layers, share)
        try:
            chosen = RULES[rule](layers, budget)
        except Unreachable:
            assert rule == "uniform"  # its smallest share need not be the cheapest; the others do reach that
            continue
        assert cost_of(layers, chosen) <= budget * (1 + 1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_no_option_is_taken_that_another_beats(rule: str, noise: float) -> None:
    layers = random_layers(11, layers=20, whole=False, noise=noise)
    chosen = RULES[rule](layers, between(layers, 0.7))
    assert all(layer[index] in front(layer) for layer, index in zip(layers, chosen, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_stays_as_it_is_where_nothing_is_cheaper(rule: str) -> None:
    slower = (Option(3, 12, 0.2), LOSSLESS, Option(5, 10, 0.1))
    assert RULES[rule]([slower, LARGE], 10 + 4)[0] == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_budget_of_the_dense_cost_leaves_everything_as_it_is(rule: str, whole: bool) -> None:
    layers = random_layers(3, whole=whole)
    chosen = RULES[rule](layers, dense_cost(layers))
    assert [layer[index].rank for layer, index in zip(layers, chosen, strict=True)] == [0] * len(layers)


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_of_the_least_cost_is_met(rule: str) -> None:
    layers = random_layers(4, whole=False)
    assert cost_of(layers, RULES[rule](layers, least_cost(layers))) == pytest.approx(least_cost(layers))


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_that_a_sum_of_floats_exceeds_by_its_last_digit_is_met(rule: str) -> None:
    layers = [(Option(0, 0.1, 0), Option(5, 0.05, 1)), (Option(0, 0.2, 0), Option(5, 0.1, 1))]
    assert cost_of(layers, [0, 0]) > 0.3
    assert RULES[rule](layers, 0.3) == [0, 0]
    assert RULES[rule]([LARGE], math.nextafter(8, 0)) == [3]  # such as 0.8 times 10 may come out


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_below_the_cheapest_says_the_smallest_that_can_be_reached(rule: str) -> None:
    with pytest.raises(Unreachable, match=r"^the least that can be reached is 4\.5$") as caught:
        RULES[rule]([LARGE, SMALL], 4.4)  # 2 + 2.5
    assert caught.value.smallest == 4.5


@pytest.mark.parametrize("rule", RULES)
def test_without_layers_nothing_is_chosen(rule: str) -> None:
    assert RULES[rule]([], 1.0) == []


@pytest.mark.parametrize("rule", ["knapsack", "energy", "uniform"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_larger_budget_never_loses_more(rule: str, whole: bool) -> None:
    layers = random_layers(5, whole=whole)
    losses = [loss_of(layers, RULES[rule](layers, between(layers, share))) for share in np.linspace(0, 1, 60)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))


# Knapsack


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_knapsack_of_whole_numbers_is_the_best_there_is(seed: int, noise: float) -> None:
    layers = random_layers(seed, whole=True, noise=noise)
    for share in (0.1, 0.4, 0.8):
        budget = math.floor(between(layers, share))
        assert loss_of(layers, knapsack(layers, budget)) == pytest.approx(brute_force(layers, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bins", [50, 1000])
def test_the_knapsack_of_any_numbers_is_within_a_bin_per_layer(seed: int, bins: int) -> None:
    layers = random_layers(seed, whole=False)
    budget = between(layers, 0.5)
    found = loss_of(layers, knapsack(layers, budget, bins=bins))
    span = dense_cost(layers) - least_cost(layers)
    assert found >= brute_force(layers, budget) - 1e-12
    assert found <= brute_force(layers, budget - len(layers) * span / bins) + 1e-12


@pytest.mark.parametrize("scale", [1e-4, 1e6])
def test_the_unit_of_the_costs_does_not_matter(scale: float) -> None:
    layers = random_layers(6, whole=True)
    scaled = [tuple(Option(option.rank, option.cost * scale, option.loss) for option in layer) for layer in layers]
    budget = math.floor(between(layers, 0.4))
    # Half a unit more: rounding eight costs up to bins, 100 000 to a span of about 250, takes far less than that.
    assert knapsack(scaled, (budget + 0.5) * scale) == knapsack(layers, budget)


def test_counts_in_large_multiples_are_as_exact_as_small_ones() -> None:
    layers = random_layers(7, whole=True)
    large = [tuple(Option(option.rank, option.cost * 9216, option.loss) for option in layer) for layer in layers]
    budget = math.floor(between(layers, 0.4))
    # A span of about 250 multiples: 300 bins hold them, but not the 2 million single ones.
    assert dense_cost(layers) - least_cost(layers) < 300
    assert knapsack(large, budget * 9216 + 9215, bins=300) == knapsack(layers, budget)


def test_counts_that_share_no_divisor_take_no_more_bins_than_there_are() -> None:
    layers = random_layers(8, whole=True)
    # One more for each rank: without a bin of many units this would be a table of 10 ** 14 columns.
    large = [
        tuple(Option(option.rank, option.cost * 1e12 + option.rank, option.loss) for option in layer)
        for layer in layers
    ]
    budget = math.floor(between(layers, 0.4))
    # Half a unit more, as above.
    assert knapsack(large, (budget + 0.5) * 1e12) == knapsack(layers, budget)


# Greedy


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_greedy_is_within_one_upgrade_of_the_best_there_is(seed: int, noise: float) -> None:
    layers = random_layers(seed, whole=False, noise=noise)
    largest = max(front(layer)[0].loss for layer in layers)  # no upgrade removes more than a layer can lose
    for share in (0.1, 0.4, 0.8):
        budget = between(layers, share)
        found = loss_of(layers, greedy(layers, budget))
        assert brute_force(layers, budget) - 1e-12 <= found < brute_force(layers, budget) + largest


def test_where_loss_falls_in_proportion_to_cost_the_best_ratios_are_taken_first() -> None:
    # Each layer: cost 0..4 in steps of 1, each step removing the layer's ratio.
    ratios = (5.0, 1.0, 3.0, 2.0, 4.0)
    layers = [
        (Option(0, 4, 0.0), *(Option(rank, rank - 1, ratio * (5 - rank)) for rank in range(1, 5))) for ratio in ratios
    ]
    # 10 steps: 4 of ratio 5, 4 of ratio 4, 2 of ratio 3; left are 2 of 3, 4 of 2 and 4 of 1.
    left = 2 * 3 + 4 * 2 + 4 * 1
    for rule in (greedy, knapsack):
        chosen = rule(layers, 10)
        assert [layer[index].cost for layer, index in zip(layers, chosen, strict=True)] == [4, 0, 2, 0, 4]
        assert loss_of(layers, chosen) == left


def test_greedy_goes_on_with_smaller_upgrades_after_one_that_does_not_fit() -> None:
    wide = (Option(0, 10, 0.0), Option(1, 1, 0.9))  # 0.1 removed per cost, for 9 more
    narrow = (Option(0, 4, 0.0), Option(1, 1, 0.15))  # 0.05 removed per cost, for 3 more
    assert greedy([wide, narrow], 2 + 8) == [1, 0]


def test_greedy_takes_what_lies_above_the_hull_when_nothing_else_fits() -> None:
    layer = (Option(0, 10, 0.0), Option(1, 1, 0.9), Option(2, 5, 0.8))  # 0.025 removed per cost, against 0.1
    assert greedy([layer], 6) == [2]


# One share, one loss


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (15, [0, 0]),  # c = 1: 10 + 5
        (14.9, [3, 2]),  # c = 0.8: 8 + 4
        (11.9, [2, 1]),  # c = 0.5: the largest up to it are 0.4 and 0.5, 4 + 2.5
        (6.4, [1, 1]),  # c = 0.4 costs 4 + 2.5, for the second has nothing as small; c = 0.2 costs 2 + 2.5
    ],
)
def test_one_share_for_all_is_the_largest_within_the_budget(budget: float, expected: list[int]) -> None:
    assert uniform([LARGE, SMALL], SHARES, budget) == expected


def test_of_two_ways_with_one_share_the_one_that_loses_less_is_taken() -> None:
    layer = (LOSSLESS, Option(5, 5, 0.3, "channel"), Option(5, 5, 0.2, "spatial"))
    assert uniform([layer], [(1, 0.5, 0.5)], 6) == [2]


def test_an_option_with_more_parameters_than_the_layer_is_not_considered() -> None:
    assert uniform([(LOSSLESS, Option(12, 9, 0.1), Option(4, 4, 0.3))], [(1, 1.2, 0.4)], 9.5) == [2]


def test_an_option_of_the_share_that_others_beat_gives_way_to_the_one_that_loses_least() -> None:
    noisy = (LOSSLESS, Option(8, 9, 0.1), Option(5, 12, 0.4))
    even = (LOSSLESS, Option(8, 8, 0.1), Option(5, 5, 0.4))
    # c = 0.8 costs 9 + 8; c = 0.5 would cost 12 + 5, but for 10 the first layer may stay as it is.
    assert uniform([noisy, even], [(1, 0.8, 0.5)] * 2, 15) == [0, 2]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (15, [0, 0]),  # tau = 0
        (14, [0, 2]),  # tau = 0.05: 10 + 4
        (13, [3, 2]),  # tau = 0.1: 8 + 4
        (11, [3, 1]),  # tau = 0.2: 8 + 2.5
        (10, [2, 1]),  # tau = 0.3: 4 + 2.5
        (4.5, [1, 1]),  # tau = 0.5: 2 + 2.5
    ],
)
def test_one_loss_for_all_is_the_least_within_the_budget(budget: float, expected: list[int]) -> None:
    assert energy([LARGE, SMALL], budget) == expected


# What is reported


def test_the_step_below_is_the_smallest_that_one_layer_can_take() -> None:
    assert step_below([LARGE, SMALL], [0, 0]) == 1  # 5 to 4, while 10 goes to 8
    assert step_below([LARGE, SMALL], [0, 1]) == 2  # the second is at its cheapest
    assert step_below([LARGE, SMALL], [1, 1]) == 0
    assert step_below([(*LARGE, Option(3, 9, 0.6))], [0]) == 2  # 10 to 8: nobody would step to what 2 beats
