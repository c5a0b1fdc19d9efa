"""What widths cost: exactly what the network costs that is cut to them, and what the target says of its layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from slim import costs
from slim.goal import parse_goal
from slim.measurement import Measurement
from slim.passes.prune.cut import pruned, trusted
from slim.passes.prune.groups import Group, groups_of
from slim.passes.prune.prices import GRID, Prices, Product, Side, Timed, prices
from tests.contract.zoo import SIZE, ZOO, artifact

pytestmark = pytest.mark.usefixtures("one_thread")

SWIN = {
    **{"img_size": 32, "patch_size": 2, "window_size": 4},
    **{"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10},
}
REGNET = {"num_classes": 10, "depth": 4, "w0": 16, "wa": 16.0, "wm": 1.6, "group_size": 8}


class Again(nn.Module):
    """A block that is called twice, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, stride=4)
        self.wide, self.back = nn.Conv2d(12, 20, 3, padding=1), nn.Conv2d(20, 12, 1)
        self.head = nn.Linear(12, 10)

    def block(self, maps: Tensor) -> Tensor:
        widened: Tensor = self.wide(maps)
        return maps + cast(Tensor, self.back(widened.relu()))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.block(self.block(self.stem(images))[:, :, ::2, ::2])
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "swin":
        model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    elif name == "regnety":
        model = timm.create_model("regnety_002", **REGNET)
    else:
        model = Again() if name == "again" else artifact(name).model()
    return model.eval()


@cache
def cuttable(name: str, heads: Any = "whole") -> tuple[nn.Module, list[Group]]:
    """The network and all its groups that can be cut, the residual stream among them."""
    model = network(name)
    found, _ = groups_of(model, SIZE, heads=heads)
    kept, _ = trusted(model, found, SIZE)
    assert kept
    return model, kept


def cut_to(model: nn.Module, groups: Sequence[Group], units: Sequence[int]) -> nn.Module:
    return pruned(model, [(group, range(some)) for group, some in zip(groups, units, strict=True)])


def gone(groups: Sequence[Group], units: Sequence[int]) -> list[int]:
    return [group.units - some for group, some in zip(groups, units, strict=True)]


def priced(metric: str, model: nn.Module, groups: Sequence[Group], meter: Any = None) -> Prices:
    goal = parse_goal("4ms" if metric == "latency" else f"0.5x-{metric}")
    return prices(goal, model, groups, [max(1, group.units // 2) for group in groups], SIZE, meter)


CASES = [(name, "whole") for name in (*ZOO, "swin", "regnety", "again")] + [("vit", "dims"), ("swin", "dims")]


@pytest.mark.parametrize(("name", "heads"), CASES)
def test_what_is_counted_is_what_the_cut_network_costs(name: str, heads: str) -> None:
    model, groups = cuttable(name, heads)
    known = {metric: priced(metric, model, groups) for metric in ("params", "macs", "size")}
    draw = random.Random(0)
    widths = [[draw.randint(1, group.units) for group in groups] for _ in range(3)]
    for units in (*widths, [1] * len(groups), [group.units for group in groups]):
        found = costs.count(cut_to(model, groups, units), SIZE)
        assert {metric: one.cost(gone(groups, units)) for metric, one in known.items()} == {
            **found,
            "size": 4 * found["params"],
        }


@pytest.mark.parametrize("name", ["resnet", "regnety", "swin"])
def test_a_group_is_in_the_parts_that_it_changes_and_in_no_others(name: str) -> None:
    model, groups = cuttable(name)
    for metric in ("params", "macs"):
        known = priced(metric, model, groups)
        whole = known.cost([0] * len(groups))
        for number in range(len(groups)):
            one_less = [int(number == other) for other in range(len(groups))]
            saved = sum(part.cost([0] * len(groups)) - part.cost(one_less) for part in known.of(number))
            assert saved == whole - known.cost(one_less) > 0


def test_what_no_group_changes_is_fixed() -> None:
    model, groups = cuttable("vit")
    inner = [group for group in groups if group.name == "blocks.0.mlp.fc1"]
    known = priced("params", model, inner)
    hidden = 4 * 48
    assert known.fixed == costs.count_params(model) - hidden * (48 + 1 + 48)
    assert known.cost([hidden]) == known.fixed


def test_without_groups_the_network_costs_what_it_costs() -> None:
    model, _ = cuttable("vit")
    assert priced("params", model, []).cost([]) == costs.count_params(model)
    assert priced("macs", model, []).cost([]) == costs.count_macs(model, SIZE)


def test_a_product_by_hand() -> None:
    # 10 rows, of which a unit of group 0 takes 2; 7 columns, of which units of group 0 and 1 take 1 each.
    part = Product((Side(10, {0: 2}), Side(7, {0: 1, 1: 1})), 3.0)
    assert [part.cost(away) for away in ([0, 0], [1, 0], [0, 2], [5, 2])] == [210, 3 * 8 * 6, 3 * 10 * 5, 0]


# Timed


def test_between_timed_widths_lie_straight_lines() -> None:
    # Rows 2, 4, 8 and columns 1, 3; ms by hand.
    values = np.array([[1.0, 2.0], [3.0, 6.0], [4.0, 10.0]])
    part = Timed((Side(8, {0: 1}), Side(3, {1: 1})), ((2, 4, 8), (1, 3)), values)
    assert part.cost([0, 0]) == 10.0
    assert part.cost([6, 2]) == 1.0
    assert part.cost([4, 0]) == 6.0
    assert part.cost([2, 0]) == pytest.approx(8.0)  # 6 rows: between 6 and 10
    assert part.cost([4, 1]) == pytest.approx(4.5)  # 2 columns: between 3 and 6
    assert part.cost([5, 1]) == pytest.approx((1.5 + 4.5) / 2)  # 3 rows, 2 columns: the mean of four


def test_a_side_that_no_group_changes_has_one_width() -> None:
    part = Timed((Side(8, {0: 1}), Side(3, {})), ((4, 8), (3,)), np.array([[1.0], [2.0]]))
    assert part.cost([2]) == pytest.approx(1.5)


class Clock:
    """Says of each layer alone how many multiply-accumulates it makes, as if each took a millisecond."""

    def __init__(self) -> None:
        self.asked: list[tuple[nn.Module, tuple[int, ...]]] = []

    def table(self, modules: Sequence[tuple[nn.Module, tuple[int, ...]]]) -> list[Measurement]:
        self.asked += modules
        return [
            Measurement(metric="layer_ms", value=float(self.macs(layer, shape)), unit="ms") for layer, shape in modules
        ]

    @staticmethod
    def macs(layer: Any, shape: tuple[int, ...]) -> int:
        with torch.no_grad():
            output = layer(torch.zeros(1, *shape))
        return int(layer.weight.numel() * output.numel() // len(layer.weight))


def called_with(model: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """What the layers of a network are, and the shapes of their inputs without the batch; tokens in one dimension."""
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}

    def look(name: str, layer: nn.Module, x: Tensor) -> None:
        linear = isinstance(layer, nn.Linear)
        tokens = (x.numel() // len(x) // x.shape[-1] * len(x),) if linear and x.ndim > 2 else ()
        shape = (*tokens, x.shape[-1]) if linear else tuple(x.shape[1:])
        found.setdefault(name, []).append((str(layer), shape))

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: look(name, module, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        model(torch.zeros(1, *SIZE))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("name", "heads"), CASES)
def test_layers_are_timed_as_they_are_in_the_cut_network(name: str, heads: str) -> None:
    model, groups = cuttable(name, heads)
    clock = Clock()
    fewest = [max(1, group.units // 2) for group in groups]
    known = priced("latency", model, groups, clock)
    asked = {(str(layer), shape) for layer, shape in clock.asked}
    changed = {member.layer for group in groups for member in group.members}
    for units in (fewest, [group.units for group in groups]):
        cut = cut_to(model, groups, units)
        expected = {one: calls for one, calls in called_with(cut).items() if one in changed}
        assert {call for calls in expected.values() for call in calls} <= asked
        # At timed widths the sum over layers is that of the layers of the cut network, each as often as it is called.
        total = sum(Clock.macs(cut.get_submodule(one), shape) for one, calls in expected.items() for _, shape in calls)
        assert known.cost(gone(groups, units)) == pytest.approx(total, rel=1e-12)


def test_a_layer_is_timed_at_a_few_widths_of_its_inputs_times_a_few_of_its_outputs() -> None:
    model, groups = cuttable("vit")
    mlp = [group for group in groups if ".mlp." in group.name]
    assert [group.units for group in mlp] == [192, 192]
    clock = Clock()
    prices(parse_goal("4ms"), model, mlp, [32, 192 - 2], SIZE, clock)  # type: ignore[arg-type] # only table is asked
    shapes = [tuple(layer.weight.shape) for layer, _ in clock.asked]  # type: ignore[arg-type]
    wide = [32, 72, 112, 152, 192]
    assert len(wide) == len(GRID)
    narrow = [190, 191, 192]  # of two units no more widths than there are: .5 and 1.5 of them are rounded
    assert shapes == [
        *((width, 48) for width in wide),
        *((48, width) for width in wide),
        *((width, 48) for width in narrow),
        *((48, width) for width in narrow),
    ]


def test_layers_are_left_as_they_were() -> None:
    model, groups = cuttable("resnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    priced("latency", model, groups, Clock())
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in before.items()
    }
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
