"""What is found elastic in each family, and what a space makes of its networks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from slim.errors import PassError
from slim.passes.elastic.blocks import blocks_of
from slim.passes.elastic.discover import discover
from slim.passes.elastic.space import Space, Subnet
from tests.passes.elastic.families import ALL, SIZE, SMALL, drawn, family, network, space_of

HIDDEN = {
    # Inner widths of blocks, and how many blocks may be left out.
    "resnet": (["layer1.0.conv1", "layer4.0.conv1"], 3),
    "seresnet": (["layer1.0.conv1", "layer1.0.conv2", "layer4.0.conv2"], 2),
    "mobilenetv2": (["blocks.1.0.conv_pw", "blocks.5.2.conv_pw"], 10),
    "mobilenetv3": (["blocks.1.0.conv_pw", "blocks.4.1.conv_pw"], 7),
    "efficientnet": (["blocks.1.0.conv_pw", "blocks.5.3.conv_pw"], 9),
    "regnet": (["s1.b1.conv1.conv", "s4.b7.conv1.conv"], 9),
    "convnext": (["stages.0.blocks.0.mlp.fc1", "stages.2.blocks.1.mlp.fc1"], 6),
    "vit": (["blocks.0.mlp.fc1", "blocks.0.attn.qkv:heads", "blocks.3.attn.qkv:heads"], 4),
    "swin": (["layers.0.blocks.0.mlp.fc1", "layers.3.blocks.0.attn.qkv:heads"], 6),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_its_widths_and_blocks(name: str) -> None:
    _, space = family(name)
    names = {dim.group.name for dim in space.dims}
    wanted, blocks = HIDDEN[name]
    assert names >= set(wanted), sorted(space.left.items())
    assert len(space.blocks) + sum("depth" in why for why in space.left.values()) == blocks
    assert not names & space.left.keys()


@pytest.mark.parametrize("name", SMALL)
def test_choices_begin_with_all_and_are_what_kernels_like(name: str) -> None:
    _, space = family(name)
    for dim in space.dims:
        assert dim.choices[0] == dim.group.units
        assert [*dim.choices] == sorted(set(dim.choices), reverse=True)
        assert len(dim.choices) > 1
        if dim.group.kind == "channels":
            assert all(count * dim.group.unit % 8 == 0 for count in dim.choices[1:])


def test_smaller_choices_lie_within_larger_ones() -> None:
    _, space = family("vit")
    for dim in space.dims:
        assert sorted(dim.order) == [*range(dim.group.units)]
    number = next(n for n, dim in enumerate(space.dims) if len(dim.choices) > 2)
    dim, kept = space.dims[number], []
    for count in dim.choices[1:]:
        units = [*space.largest.units]
        units[number] = count
        ((_, some),) = space.kept(Subnet(tuple(units), space.largest.on))
        kept.append(set(some))
    assert kept[1] < kept[0]


def test_widths_in_a_block_that_is_not_there_do_not_tell_networks_apart() -> None:
    _, space = family("vit")
    block = space.within(0)
    assert block is not None
    on = tuple(number != block for number in range(len(space.blocks)))
    narrow = Subnet((space.dims[0].choices[-1], *space.largest.units[1:]), on)
    assert space.canonical(narrow) == space.canonical(Subnet(space.largest.units, on))
    assert space.canonical(narrow) != space.canonical(space.largest)


@pytest.mark.parametrize("name", SMALL)
def test_the_smallest_and_those_drawn_are_of_the_space(name: str) -> None:
    _, space = family(name)
    for subnet in (space.largest, *drawn(space, 5)):
        assert space.allows(subnet)
    less = Subnet(space.largest.units, (False,) * len(space.blocks))
    assert space.allows(less) == (sum(space.fewest) == 0)
    wrong = (space.dims[0].group.units + 1, *space.largest.units[1:])
    assert not space.allows(Subnet(wrong, space.largest.on))


def test_blocks_stay_evenly_from_the_first_to_the_last() -> None:
    _, space = family("vit")
    twelve = replace(space, blocks=tuple(replace(space.blocks[0], name=str(i)) for i in range(12)), fewest=(6,))
    # floor(linspace(0, 11, 6))
    assert [i for i, on in enumerate(twelve.ladder([6])) if on] == [0, 2, 4, 6, 8, 11]
    assert [i for i, on in enumerate(twelve.ladder([1])) if on] == [0]
    assert not any(twelve.ladder([0]))
    assert all(twelve.ladder([12]))


def test_depth_counts_blocks_that_cannot_be_left_out() -> None:
    model = network("resnet")
    found, half, _ = blocks_of(model, SIZE, 0.5)
    assert [block.name for block in found] == ["layer1.1", "layer2.1", "layer3.1"]
    assert half == [0, 0, 0]  # of two blocks each one stays, and the first stays anyway
    blocks, fewest, left = blocks_of(model, SIZE, 1.0)
    assert not blocks
    assert not fewest
    assert left["layer2.1"] == "depth 1 keeps all blocks of its stage"
    assert left["layer2.0"] == "its output has another shape than its input"


def test_a_fresh_network_has_its_blocks_though_their_branches_are_silent_yet() -> None:
    import timm

    fresh = timm.create_model("resnet18", zero_init_last=True).eval()
    assert [block.name for block in blocks_of(fresh, SIZE, 0.5)[0]] == [
        *("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
    ]


def test_layers_without_a_way_past_them_are_no_blocks() -> None:
    plain = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(3)])
    assert blocks_of(plain.eval(), SIZE, 0.5)[0] == []


def test_the_search_for_blocks_leaves_values_as_they_are() -> None:
    model = network("convnext")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks_of(model, SIZE, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_in_skip_stays_whole() -> None:
    space = space_of(network("convnext"), replace(ALL, skip=("stages.2.*",)))
    assert space.left["stages.2.blocks.1.mlp.fc1"] == "in skip"
    assert space.left["stages.2.blocks.0"] == "in skip"
    assert not any(block.name.startswith("stages.2.") for block in space.blocks)


def test_a_width_that_saves_next_to_nothing_is_no_choice() -> None:
    _, space = family("seresnet")
    reasons = [why for name, why in space.left.items() if ".se." in name]
    assert reasons
    assert all("of the operations" in why or "no narrower" in why for why in reasons)


def test_a_space_comes_back_from_its_plan() -> None:
    model, space = family("swin")
    plan = json.loads(json.dumps(space.as_plan()))
    groups = discover(model, SIZE, ALL).groups
    again = Space.from_plan(plan, groups)
    assert again.as_plan() == plan
    assert again.smallest == space.smallest
    assert [dim.order for dim in again.dims] == [dim.order for dim in space.dims]


def test_a_plan_of_another_network_is_refused() -> None:
    _, space = family("vit")
    with pytest.raises(PassError, match="was 48 wide when it was made elastic and is none now"):
        Space.from_plan(space.as_plan(), [])
