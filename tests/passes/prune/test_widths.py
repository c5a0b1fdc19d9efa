"""How wide each group is to be under one budget: on toys whose every choice can be tried, and on the zoo."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from slim.goal import parse_goal
from slim.passes.prune.criteria import Ranked
from slim.passes.prune.cut import trusted
from slim.passes.prune.groups import Group, Kind, groups_of
from slim.passes.prune.prices import Part, Prices, Product, Side, Timed, prices
from slim.passes.prune.widths import (
    Share,
    Units,
    Widths,
    allowed,
    by_density,
    isomorphic,
    local,
    nearest,
)
from slim.passes.reach import Unreachable
from tests.contract.zoo import SIZE, artifact

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = range(5)


def group(units: int, unit: int = 1, kind: Kind = "channels", name: str = "one") -> Group:
    return Group(name, kind, units, unit, (), inner=True)


def scored(*scores: float, name: str = "one") -> Ranked:
    return Ranked(group(len(scores), name=name), torch.tensor(scores, dtype=torch.double))


def drawn(units: int, seed: int) -> Ranked:
    generator = torch.Generator().manual_seed(seed)
    return Ranked(group(units), torch.rand(units, dtype=torch.double, generator=generator) ** 3)


def alone(*each: float, units: Sequence[int]) -> Prices:
    """Groups whose units cost the same, however wide the others are."""
    return Prices(tuple(Product((Side(n, {g: 1}),), e) for g, (e, n) in enumerate(zip(each, units, strict=True))), 7.0)


def chain(units: Sequence[int], inputs: int = 3, outputs: int = 10) -> Prices:
    """Layers one behind another: each costs its inputs times its outputs."""
    sides = [Side(inputs, {}), *(Side(some, {number: 1}) for number, some in enumerate(units)), Side(outputs, {})]
    return Prices(tuple(Product(pair, 1.0) for pair in itertools.pairwise(sides)), 0.0)


# What is allowed


@pytest.mark.parametrize(
    ("given", "align", "floor", "expected"),
    [
        (group(40), 8, 8, (8, 16, 24, 32, 40)),
        (group(40), 8, 24, (24, 32, 40)),
        (group(40), 8, 20, (24, 32, 40)),
        (group(44), 8, 8, (8, 16, 24, 32, 40, 44)),  # all is allowed, multiple or not
        (group(12), 8, 8, (8, 12)),
        (group(8), 8, 8, (8,)),
        (group(6), 8, 8, (6,)),
        (group(6), 1, 1, (1, 2, 3, 4, 5, 6)),
        (group(40), 16, 8, (16, 32, 40)),
        # Convolutions with 5 groups of 16, and of 3: in channels 16, 32, ... and 24.
        (group(5, unit=16), 8, 8, (1, 2, 3, 4, 5)),
        (group(5, unit=16), 8, 20, (2, 3, 4, 5)),
        (group(10, unit=3), 8, 8, (8, 10)),
        # Heads as a whole, and the width of one head out of 12.
        (group(3, unit=64, kind="heads"), 128, 128, (1, 2, 3)),
        (group(3, unit=10, kind="heads"), 8, 8, (1, 2, 3)),
        (group(64, unit=12, kind="dims"), 8, 16, (16, 24, 32, 40, 48, 56, 64)),
        (group(1, unit=64, kind="heads"), 1, 1, (1,)),
    ],
)
def test_multiples_from_the_floor_up_are_allowed_and_all(
    given: Group, align: int, floor: int, expected: tuple[int, ...]
) -> None:
    assert allowed(given, align, floor) == expected


def test_the_nearest_is_not_the_one_below() -> None:
    assert nearest((8, 16, 24, 32, 40), 0.75 * 40) == 32
    assert nearest((8, 12), 0.5 * 12) == 8
    assert nearest((8, 12), 0.9 * 12) == 12
    assert nearest((8, 16), 12) == 16  # of two equally near the larger
    assert nearest((8, 16), 1) == 8
    assert nearest((8, 16), 99) == 16


# Budgets


def rules(ranked: Sequence[Ranked], options: Sequence[Units]) -> dict[str, Share | None]:
    classes = [f"class {number % 2}" for number in range(len(ranked))]
    draw = random.Random(0)
    return {
        "global": None,
        "local": local(ranked, options),
        "isomorphic": isomorphic(ranked, options, classes),
        "density": by_density(ranked, options, [-2 * draw.random() for _ in ranked]),
    }


def toy(seed: int, rule: str) -> Widths:
    """Five layers in a row, with four groups of various widths between."""
    draw = random.Random(seed)
    ranked = [drawn(draw.choice([24, 32, 40, 52]), seed * 10 + number) for number in range(4)]
    options = [allowed(one.group, draw.choice([1, 4, 8]), draw.choice([1, 8])) for one in ranked]
    known = chain([one.group.units for one in ranked])
    return Widths(ranked, options, known, rules(ranked, options)[rule])


RULES = ["global", "local", "isomorphic", "density"]


def budgets(given: Widths) -> list[float]:
    least = given.cost(given.cheapest)
    return [least + share * (given.dense - least) for share in (0, 0.01, 0.1, 0.33, 0.5, 0.77, 0.99, 1, 1.5)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_rule_keeps_to_the_budget_and_to_what_is_allowed(seed: int, rule: str) -> None:
    given = toy(seed, rule)
    for budget in budgets(given):
        chosen = given.within(budget)
        assert given.cost(chosen) <= budget
        assert all(units in options for units, options in zip(chosen, given.options, strict=True))
    assert given.within(given.dense) == given.whole
    assert given.within(given.cost(given.cheapest)) == given.cheapest


@pytest.mark.parametrize("rule", RULES)
def test_below_the_cheapest_nothing_is_found(rule: str) -> None:
    given = toy(0, rule)
    least = given.cost(given.cheapest)
    with pytest.raises(Unreachable, match=f"the least that can be reached is {least:g}") as caught:
        given.within(least - 1e-6)
    assert caught.value.smallest == least


def wider(given: Widths, chosen: Units) -> list[Units]:
    """The choice with one group a step wider."""
    return [
        (*chosen[:number], options[options.index(units) + 1], *chosen[number + 1 :])
        for number, (units, options) in enumerate(zip(chosen, given.options, strict=True))
        if units != options[-1]
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_step_by_step_what_is_left_of_the_budget_widens_no_group(seed: int) -> None:
    given = toy(seed, "global")
    for budget in budgets(given):
        assert all(given.cost(more) > budget for more in wider(given, given.within(budget)))


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("seed", SEEDS)
def test_by_shares_all_lie_between_two_neighbouring_shares_and_no_further_group_fits(seed: int, rule: str) -> None:
    given = toy(seed, rule)
    steps = range(2**17 + 1)

    def at(step: int) -> Units:
        assert given.by_share is not None
        return given.by_share(step / 2**17)

    for budget in budgets(given)[:-2]:
        chosen = given.within(budget)
        over = bisect_right(steps, budget, key=lambda step: given.cost(at(step)))
        below, above = at(over - 1), at(over)
        assert all(low <= units <= high for low, units, high in zip(below, chosen, above, strict=True))
        for number, high in enumerate(above):
            if chosen[number] != high:
                assert given.cost((*chosen[:number], high, *chosen[number + 1 :])) > budget


def lost(given: Widths, chosen: Units) -> float:
    return sum(losses[units] for losses, units in zip(given.losses, chosen, strict=True))


def best(given: Widths, budget: float) -> float:
    """Least loss of all choices within the budget."""
    return min(lost(given, one) for one in itertools.product(*given.options) if given.cost(one) <= budget)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_where_costs_add_up_the_loss_is_the_least_that_is_possible_one_step_below(count: int, seed: int) -> None:
    draw = random.Random(100 + seed)
    ranked = [drawn(draw.choice([8, 12, 16]), 1000 * seed + number) for number in range(count)]
    options = [tuple(one.group.units * quarter // 4 for quarter in (1, 2, 3, 4)) for one in ranked]
    each = [draw.uniform(0.5, 5) for _ in ranked]
    given = Widths(ranked, options, alone(*each, units=[one.group.units for one in ranked]))
    # Losses are convex, so each state on the way is the best of its cost; the last step is at most this wide.
    step = max(one * some[0] for one, some in zip(each, options, strict=True))
    least, found = given.cost(given.cheapest), []
    for number in range(41):
        budget = least + (given.dense - least) * number / 40
        found.append((budget, lost(given, given.within(budget))))
        assert best(given, budget) <= found[-1][1] + 1e-12
        if budget - step >= least:
            assert found[-1][1] <= best(given, budget - step) + 1e-12
    for (small, more), (large, less) in itertools.combinations(found, 2):
        if large - small >= step:
            assert less <= more + 1e-12


def test_what_loses_nothing_goes_first() -> None:
    ranked = [scored(*[0.0] * 6, *[1.0] * 6), scored(*[1.0] * 12)]
    given = Widths(ranked, [tuple(range(1, 13))] * 2, alone(1, 1, units=[12, 12]))
    assert given.within(given.dense - 6) == (6, 12)


def test_no_more_than_needed_goes_of_what_loses_nothing() -> None:
    given = Widths([scored(*[0.0] * 12)], [tuple(range(1, 13))], alone(1, units=[12]))
    assert [given.within(given.dense - away) for away in range(12)] == [(12 - away,) for away in range(12)]


def test_a_group_that_saves_more_loses_more() -> None:
    ranked = [scored(*[1.0] * 8), scored(*[1.0] * 8)]
    given = Widths(ranked, [tuple(range(1, 9))] * 2, alone(1, 10, units=[8, 8]))
    cheap, dear = given.within(given.dense - 40)
    assert dear < cheap


def test_prices_are_those_at_the_widths_reached() -> None:
    # Group 0 halves what group 1's units cost: behind it they save less than those of group 2, before it more.
    ranked = [scored(0.0, 0.0, 1.0), scored(*[1.0] * 4), scored(*[1.0] * 4)]
    parts: tuple[Part, ...] = (Product((Side(3, {0: 1}), Side(4, {1: 1})), 1.0), Product((Side(4, {2: 1}),), 2.0))
    given = Widths(ranked, [(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4)], Prices(parts, 0.0))
    assert given.within(given.dense - 10) == (1, 4, 3)


def stairs(levels: Sequence[float]) -> Prices:
    """A layer of as many units as there are levels after the first, timed at every width."""
    units = len(levels) - 1
    return Prices((Timed((Side(units, {0: 1}),), (tuple(range(units + 1)),), np.array(levels)),), 0.0)


def test_a_step_that_saves_nothing_by_itself_is_looked_over() -> None:
    # In steps of three units: from 9 to 8 nothing is saved, nor from 8 to 7.
    given = Widths([scored(*[1.0] * 9)], [tuple(range(1, 10))], stairs([0, 1, 1, 1, 2, 2, 2, 3, 3, 3]))
    assert given.dense == 3
    assert given.within(2.5) == (6,)
    assert given.within(2.0) == (6,)
    assert given.within(1.0) == (3,)


def test_groups_that_save_together_alone_go_down_step_by_step_not_all_the_way() -> None:
    # 3 ms wherever one of two sides is above 2 units, 1 ms below: no single group saves anything.
    values = np.array([[0.0, 1, 1, 3, 3], [1, 1, 1, 3, 3], [1, 1, 1, 3, 3], [3, 3, 3, 3, 3], [3, 3, 3, 3, 3]])
    together = Timed((Side(4, {0: 1}), Side(4, {1: 1})), (tuple(range(5)), tuple(range(5))), values)
    given = Widths([scored(*[1.0] * 4)] * 2, [(1, 2, 3, 4)] * 2, Prices((together,), 0.0))
    assert given.within(2.0) == (2, 2)


def test_a_wider_layer_that_is_as_fast_is_taken() -> None:
    given = Widths([scored(*[1.0] * 4)], [(1, 2, 3, 4)], stairs([0, 1, 1.5, 0.9, 3]))
    assert given.within(1.0) == (3,)


def test_the_smallest_step_down_is_that_of_the_group_that_saves_least() -> None:
    given = Widths([drawn(8, 0), drawn(8, 1)], [(2, 4, 8), (1, 8)], alone(1, 10, units=[8, 8]))
    assert given.step_below((8, 8)) == 4
    assert given.step_below((4, 8)) == 2
    assert given.step_below((2, 8)) == 70
    assert given.step_below((2, 1)) == 0


# Rules


def test_local_keeps_one_share_of_every_group() -> None:
    ranked = [drawn(some, seed) for seed, some in enumerate([10, 20, 40])]
    keep = local(ranked, [tuple(range(1, one.group.units + 1)) for one in ranked])
    assert keep(0.5) == (5, 10, 20)
    assert keep(0) == (1, 1, 1)
    assert keep(1) == (10, 20, 40)
    assert local(ranked, [(8, 10), (8, 16, 20), (8, 16, 24, 32, 40)])(0.5) == (8, 8, 24)


def test_isomorphic_ranks_classes_as_one_and_keeps_one_share_of_each() -> None:
    # Over their mean: 0.2, 0.4, 1.2, 2.2 and 0.1, 0.1, 1.9, 1.9, of one class; the third is of another.
    ranked = [scored(1, 2, 6, 11), scored(10, 10, 190, 190), scored(1, 2, 3, 4)]
    every = [(0, 1, 2, 3, 4)] * 3
    keep = isomorphic(ranked, every, ["a", "a", "b"])
    assert keep(0.0) == (0, 0, 0)
    assert keep(1.0) == (4, 4, 4)
    assert keep(0.5) == (2, 2, 2)
    assert keep(3 / 8) == (1, 2, 2)  # 2.2, 1.9, 1.9; of four units 1.5 round to 2
    assert keep(6 / 8) == (4, 2, 3)
    # Scale plays no part; being in one class does.
    assert isomorphic([scored(3, 6, 18, 33), *ranked[1:]], every, ["a", "a", "b"])(3 / 8) == (1, 2, 2)
    assert isomorphic(ranked, every, ["a", "b", "c"])(3 / 4) == (3, 3, 3)


def test_of_equal_scores_every_group_of_a_class_keeps_its_share() -> None:
    ranked = [scored(*[1.0] * 4), scored(*[0.0] * 8), scored(*[2.0] * 8)]
    keep = isomorphic(ranked, [tuple(range(9))[: one.group.units + 1] for one in ranked], ["a", "b", "a"])
    assert [keep(quarter / 4) for quarter in range(5)] == [(0, 0, 0), (1, 2, 2), (2, 4, 4), (3, 6, 6), (4, 8, 8)]


def test_densities_give_proportions_until_a_group_is_whole() -> None:
    ranked = [drawn(1000, seed) for seed in range(3)]
    logs = [0.0, math.log(0.5), math.log(0.1)]
    keep = by_density(ranked, [tuple(range(1, 1001))] * 3, logs)
    assert keep(0) == (1, 1, 1)
    assert keep(1) == (1000, 1000, 1000)
    within = 0
    for number in range(1, 100):
        found = keep(number / 100)
        shares = [units / 1000 for units in found]
        expected = [min(1.0, max(1e-3, shares[2] * ratio)) for ratio in (10, 5, 1)]
        # Each is rounded by half a unit, and the ratio to the third by as much of its own.
        if found[2] >= 20:
            assert shares == pytest.approx(expected, rel=0.5 / found[2] + 0.5 / 1000 * 10 + 1e-9)
            within += 1
    assert within > 10


def test_no_groups_cost_what_is_fixed() -> None:
    given = Widths([], [], Prices((), 12.0))
    assert (given.dense, given.cheapest, given.within(12.0), given.step_below(())) == (12.0, (), (), 0)
    with pytest.raises(Unreachable):
        given.within(11.0)


Rule = Callable[[Sequence[Ranked], Sequence[Units]], Share | None]


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("rule", RULES)
def test_networks_keep_to_budgets_of_their_operations(name: str, rule: str) -> None:
    model = artifact(name).model()
    groups, _ = trusted(model, groups_of(model, SIZE)[0], SIZE)
    ranked = [Ranked(one, drawn(one.units, seed).scores) for seed, one in enumerate(groups)]
    options = [allowed(one, 2, 2) for one in groups]
    known = prices(parse_goal("0.5x-macs"), model, groups, [some[0] for some in options], SIZE)
    given = Widths(ranked, options, known, rules(ranked, options)[rule])
    for share in (0.3, 0.5, 0.8):
        chosen = given.within(share * given.dense)
        assert given.cost(chosen) <= share * given.dense
        assert given.cost(chosen) > (share - 0.1) * given.dense
        if rule == "global":
            assert all(given.cost(more) > share * given.dense for more in wider(given, chosen))
