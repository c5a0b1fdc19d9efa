"""Gates open change nothing, gates closed are the subnet cut out, and nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slim import costs
from slim.passes.elastic.extract import extract
from slim.passes.elastic.gates import gated
from slim.passes.elastic.space import Subnet
from tests.passes.elastic.families import SIZE, SMALL, drawn, family, images, network, off, space_of

SAME = 1e-5
"""Of the largest output: layers add up in another order once channels are gone."""


@pytest.mark.parametrize("name", SMALL)
def test_with_all_gates_open_the_network_is_bit_for_bit_what_it_was(name: str) -> None:
    model, space = family(name)
    with torch.no_grad():
        expected = model(images())
        with gated(model, space) as choose:
            assert torch.equal(model(images()), expected)
            choose(space.smallest)
            choose(space.largest)
            assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("name", SMALL)
def test_gated_is_extracted_for_the_smallest_and_for_others(name: str) -> None:
    model, space = family(name)
    subnets = drawn(space, 6)
    with torch.no_grad():
        cut_out = [extract(model, space, subnet)(images()) for subnet in subnets]
        with gated(model, space) as choose:
            for subnet, expected in zip(subnets, cut_out, strict=True):
                choose(subnet)
                assert off(model(images()), expected) <= SAME
        assert off(cut_out[0], model(images())) > 0.01  # else nothing was gated


@pytest.mark.parametrize("name", SMALL)
def test_every_step_down_costs_less(name: str) -> None:
    model, space = family(name)
    whole = costs.count(model, SIZE)
    for number, dim in enumerate(space.dims):
        units = [*space.largest.units]
        units[number] = dim.choices[-1]
        found = costs.count(extract(model, space, Subnet(tuple(units), space.largest.on)), SIZE)
        assert found["params"] < whole["params"], dim.group.name
        assert found["macs"] < whole["macs"], dim.group.name
    for number, block in enumerate(space.blocks):
        on = tuple(other != number for other in range(len(space.blocks)))
        found = costs.count(extract(model, space, Subnet(space.largest.units, on)), SIZE)
        assert found["params"] < whole["params"], block.name


def test_no_gate_stays_and_the_state_dict_is_that_of_the_stock_network() -> None:
    model = network("vit")
    _, space = family("vit")
    keys = [*model.state_dict()]
    with gated(model, space) as choose:
        choose(space.smallest)
        assert [*model.state_dict()] == keys
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_units_that_are_closed_get_no_gradient_and_those_that_are_open_do() -> None:
    model = network("convnext")
    _, space = family("convnext")
    smallest = space.smallest
    with gated(model, space) as choose:
        choose(smallest)
        model(images()).square().sum().backward()
    there = {group.name: set(kept) for group, kept in space.kept(smallest)}
    assert there
    for group_name, kept in there.items():
        gradient = model.get_submodule(group_name).weight.grad
        assert isinstance(gradient, torch.Tensor)
        got = {row for row in range(len(gradient)) if gradient[row].abs().sum() > 0}
        assert got == kept
    for name in space.skipped(smallest):
        assert all(value.grad is None for value in model.get_submodule(name).parameters())


def test_a_network_that_cannot_be_gated_faithfully_is_refused_with_the_reason() -> None:
    import timm

    normed = timm.create_model("convnextv2_atto", depths=[1, 2, 1, 1], dims=[16, 24, 32, 40], patch_size=2).eval()
    space = space_of(normed)
    assert not space.dims  # GRN divides every channel by the mean over all
    for name in ("stages.0.blocks.0.mlp.fc1", "stages.3.blocks.0.mlp.fc1"):
        assert "normalised together" in space.left[name]
    assert [block.name for block in space.blocks] == ["stages.1.blocks.0", "stages.1.blocks.1"]


def test_what_closing_a_gate_does_not_cut_is_refused() -> None:
    space = space_of(Counting().eval())
    assert space.left["first"] == "cutting its channels out is not the same as setting them to zero"


class Counting(nn.Module):
    """Tells its classifier how wide it is, which no gate changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        out: torch.Tensor = self.head(self.second(x * x.shape[1]).mean((2, 3)))
        return out

    def get_classifier(self) -> nn.Module:
        return self.head
