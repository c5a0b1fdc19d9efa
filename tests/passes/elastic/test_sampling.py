"""Which subnets a step takes: from space, seed and step alone, allowed ones, and as often as they should."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from slim.passes.elastic.blocks import Block
from slim.passes.elastic.sampling import at_random, ends, ladder, rungs_of, sandwich
from slim.passes.elastic.space import Dim, Space, Subnet
from slim.passes.prune.groups import Group


def dim(name: str, *choices: int) -> Dim:
    return Dim(Group(name, "channels", choices[0], 1, (), True), choices, tuple(range(choices[0])))


# A stage of four blocks of which two may go, one of two of which both may, and a width outside of both.
DIMS = (
    dim("stem", 16, 12, 8),
    *(dim(f"a.{i}.fc", 32, 24, 16) for i in range(4)),
    *(dim(f"b.{i}.fc", 64, 32) for i in range(2)),
)
BLOCKS = (*(Block(f"a.{i}", 0) for i in range(4)), *(Block(f"b.{i}", 1) for i in range(2)))
SPACE = Space(DIMS, BLOCKS, (2, 0), {})


def test_draws_depend_on_seed_and_step_alone() -> None:
    draws = {(seed, step): tuple(sandwich(SPACE, seed, step, 4)) for seed in range(3) for step in range(20)}
    rungs = {(seed, step): tuple(ladder(SPACE, seed, step)) for seed in range(3) for step in range(20)}
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[index]
    torch.manual_seed(7)
    for seed, step in reversed(draws):
        assert tuple(sandwich(SPACE, seed, step, 4)) == draws[seed, step]
        assert tuple(ladder(SPACE, seed, step)) == rungs[seed, step]
    torch.set_rng_state(before[2])
    sandwich(SPACE, 1, 1, 4), ladder(SPACE, 1, 1)
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[index]
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])
    # 3^5 * 2^2 widths and some hundred depths: that two of 60 pairs agree would be a coincidence.
    assert len(set(draws.values())) == len(draws)
    for one, other in ((0, 1), (1, 2)):
        assert [rungs[one, step] for step in range(20)] != [rungs[other, step] for step in range(20)]


def test_a_sandwich_is_the_smallest_and_random_ones_beside_the_largest() -> None:
    assert sandwich(SPACE, 0, 5, 2) == ends(SPACE, 0, 5) == [SPACE.canonical(SPACE.smallest)]
    first, *others = sandwich(SPACE, 0, 5, 4)
    assert first == SPACE.canonical(SPACE.smallest)
    assert len(others) == 2


@pytest.fixture(scope="module")
def drawn() -> list[Subnet]:
    generator = torch.Generator().manual_seed(0)
    return [at_random(SPACE, generator) for _ in range(2000)]


def test_random_subnets_are_allowed_and_written_in_one_way(drawn: list[Subnet]) -> None:
    assert all(SPACE.allows(subnet) and SPACE.canonical(subnet) == subnet for subnet in drawn)


def test_random_widths_are_uniform_over_the_choices(drawn: list[Subnet]) -> None:
    seen = Counter(subnet.units[0] for subnet in drawn)
    assert seen.keys() == {16, 12, 8}
    # Four standard deviations of a share of 1/3 in 2000 draws: 4 * sqrt(2/9 / 2000) = 0.042.
    assert all(abs(count / 2000 - 1 / 3) < 0.042 for count in seen.values())
    inner = Counter(subnet.units[1] for subnet in drawn if subnet.on[0])
    assert inner.keys() == {32, 24, 16}


def test_random_depths_leave_out_one_block_of_a_stage_on_average_and_any_number_at_times(drawn: list[Subnet]) -> None:
    for places in (range(4), range(4, 6)):
        gone = [sum(not subnet.on[place] for place in places) for subnet in drawn]
        assert set(gone) == {0, 1, 2}
        # Binomial of 2 at 1/2: mean 1, standard deviation sqrt(1/2); four of the mean's are 0.063.
        assert np.mean(gone) == pytest.approx(1, abs=0.063)
    each = [np.mean([not subnet.on[place] for subnet in drawn]) for place in range(4)]
    assert each == pytest.approx([1 / 4] * 4, abs=0.04)  # four of sqrt(3/16 / 2000)


@pytest.mark.parametrize(("count", "fewest"), [(1, 0), (2, 1), (12, 8), (5, 5), (3, 0)])
def test_the_mean_left_out_is_at_most_one_and_the_fewest_stay(count: int, fewest: int) -> None:
    space = Space((), tuple(Block(f"b.{i}", 0) for i in range(count)), (fewest,), {})
    generator = torch.Generator().manual_seed(1)
    stay = [sum(at_random(space, generator).on) for _ in range(1000)]
    assert min(stay) == fewest
    # The mean is min(m / 2, 1) of m that may go, its variance below 1: four standard deviations of 1000 draws are 0.13.
    assert count - np.mean(stay) == pytest.approx(min((count - fewest) / 2, 1), abs=0.13)


def test_rungs_have_one_place_for_all_widths_and_blocks_evenly_from_first_to_last() -> None:
    space = Space(DIMS[:1], tuple(Block(f"a.{i}", 0) for i in range(24)), (12,), {})
    rungs = rungs_of(space)
    assert len(rungs) == 3 * 13 - 1
    for subnet in rungs:
        stay = [place for place, on in enumerate(subnet.on) if on]
        assert (stay[0], stay[-1]) == (0, 23)
        assert stay == sorted(set(stay))
        assert stay == np.linspace(0, 23, len(stay)).astype(int).tolist()
    # POA, arXiv:2408.01031: 24 blocks to 12.
    assert [place for place, on in enumerate(next(iter(rungs)).on) if on] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23]
    wide = [subnet for subnet in rungs_of(SPACE) if all(subnet.on)]
    assert [subnet.units for subnet in wide] == [(8, 16, 16, 16, 16, 32, 32), (12, 24, 24, 24, 24, 64, 64)]


def test_small_rungs_come_nine_times_as_often_and_the_largest_is_none() -> None:
    rungs = rungs_of(SPACE)
    assert all(SPACE.allows(subnet) for subnet in rungs)
    assert SPACE.largest not in rungs
    assert rungs[SPACE.canonical(SPACE.smallest)] == 9
    # 3, 2, 1 over three widths times 3, 2, 1 over three depths; all widths and depths but the largest's.
    assert list(rungs.values()) == [9, 6, 3, 6, 4, 2, 3, 2]


def test_each_rung_comes_as_often_as_it_should_before_any_comes_again() -> None:
    rungs = rungs_of(SPACE)
    length = sum(rungs.values())
    cycles = [[ladder(SPACE, 3, cycle * length + place)[0] for place in range(length)] for cycle in range(2)]
    assert all(Counter(cycle) == Counter(rungs) for cycle in cycles)
    assert cycles[0] != cycles[1]


def test_a_family_without_depth_or_without_width_has_a_ladder() -> None:
    widths = rungs_of(Space(DIMS, (), (), {}))
    assert list(widths.values()) == [3, 2]
    depths = rungs_of(Space((), BLOCKS, (2, 0), {}))
    assert [sum(subnet.on) for subnet in depths] == [2, 4]
    every = Space(DIMS[-2:], tuple(Block(f"b.{i}", 0) for i in range(2)), (0,), {})
    # Without any block no width is left: one network, not one for each width.
    assert sum(not any(subnet.on) for subnet in rungs_of(every)) == 1


def test_the_largest_seed_a_recipe_can_hold_works() -> None:
    assert SPACE.allows(sandwich(SPACE, 2**62, 10**6, 3)[1])
