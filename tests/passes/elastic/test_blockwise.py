"""Costs of subnets, part by part."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor, nn

from slim import costs
from slim.passes.elastic.blocks import Block
from slim.passes.elastic.blockwise import Blockwise, parts_of
from slim.passes.elastic.extract import extract
from slim.passes.elastic.space import Dim, Space, Subnet
from slim.passes.elastic.subnets import drawn
from slim.passes.prune.groups import groups_of

SIZE = (3, 8, 8)


class Bottleneck(nn.Module):
    """Two inner widths, which meet in the second convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, 8, 1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm, self.conv3 = nn.BatchNorm2d(12), nn.Conv2d(12, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.conv3(self.norm(self.conv2(self.conv1(x).relu())).relu()))


class Net(nn.Module):
    """A stem of an inner width of its own, three blocks, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.blocks = nn.Sequential(*(Bottleneck(6) for _ in range(3)))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.blocks(self.mix(self.stem(x).relu())).mean((2, 3))))

    def get_classifier(self) -> nn.Module:
        return self.head


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def space(net: nn.Module) -> Space:
    groups = [group for group in groups_of(net, SIZE)[0] if group.inner]
    dims = tuple(
        Dim(group, (group.units, group.units * 3 // 4, group.units // 2), tuple(range(group.units))) for group in groups
    )
    return Space(dims, tuple(Block(f"blocks.{number}", 0) for number in range(3)), (1,), {})


class Counting:
    """What a subnet costs as a network cut out, and how often that was asked."""

    def __init__(self, net: nn.Module, space: Space) -> None:
        self.net, self.space, self.asked = net, space, list[Subnet]()

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        self.asked.append(subnet)
        counted = costs.count(extract(self.net, self.space, subnet), SIZE)
        return {**counted, "size": 4 * counted["params"] + 100}


def test_parts_are_blocks_and_widths_outside_of_them(space: Space) -> None:
    names = [dim.group.name for dim in space.dims]
    assert names == ["stem", *(f"blocks.{n}.conv{c}" for n in range(3) for c in (1, 2))]
    assert parts_of(space) == ((0,), (1, 2, 7), (3, 4, 8), (5, 6, 9))


def test_widths_that_share_a_layer_are_one_part_without_a_block_around_them(space: Space) -> None:
    without = Space(space.dims, space.blocks[1:], space.fewest, {})
    assert parts_of(without)[:2] == ((0,), (1, 2))


def test_every_cost_is_that_of_the_network_cut_out(net: nn.Module, space: Space) -> None:
    counted, found, rng = Counting(net, space), Blockwise(space, Counting(net, space)), Random(0)
    for subnet in (space.largest, space.smallest, *(drawn(space, rng) for _ in range(40))):
        assert found(subnet) == counted(subnet)


def test_savings_within_a_block_do_not_add_up(net: nn.Module, space: Space) -> None:
    found = Blockwise(space, Counting(net, space))

    def saved(*narrow: int) -> float:
        units = tuple(dim.choices[-1 if n in narrow else 0] for n, dim in enumerate(space.dims))
        return found(space.largest)["macs"] - found(Subnet(units, (True,) * 3))["macs"]

    # Each alone takes away half of conv2, both together three quarters.
    assert saved(1, 2) == saved(1) + saved(2) - 8 * 12 * 9 * 64 / 4
    assert saved(1, 3) == saved(1) + saved(3)


def test_a_network_is_counted_once_for_each_choice_within_a_part(net: nn.Module, space: Space) -> None:
    counting, rng = Counting(net, space), Random(1)
    macs = Blockwise(space, counting).of("macs")
    for _ in range(2):
        rng.seed(1)
        for _ in range(300):
            macs(drawn(space, rng))
    # The largest; two narrower stems; of each block 3 x 3 choices, or none, but for the one of the largest.
    assert len(set(counting.asked)) == len(counting.asked) <= 1 + 2 + 3 * 9


def test_nothing_is_counted_before_it_is_asked_for(net: nn.Module, space: Space) -> None:
    counting = Counting(net, space)
    found = Blockwise(space, counting)
    assert counting.asked == []
    found(space.largest)
    assert counting.asked == [space.largest]
