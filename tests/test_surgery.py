"""Surgery: batch norms are merged into convolutions only where the network computes the same afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim import surgery
from tests.contract.zoo import SIZE, ZOO, artifact

pytestmark = pytest.mark.usefixtures("one_thread")


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def images() -> Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def with_statistics(network: str) -> nn.Module:
    """The zoo's network after it has seen images, so that no norm is the identity."""
    model = artifact(network).model().train()
    with torch.no_grad():
        model(images() * 2 + 1)
    return model.eval()


@pytest.mark.parametrize("network", ZOO)
def test_every_norm_of_a_convolution_is_merged_and_nothing_else_changes(network: str) -> None:
    model = with_statistics(network)
    before, expected = norms(model), model(images())
    assert surgery.fold_batch_norms(model, images()) == before
    assert (before > 0) == (network in ("resnet", "mobilenet"))
    assert norms(model) == 0
    # Merged weights are rounded once more than the two were: 1e-7 of a value, for each of at most 50 layers.
    assert (model(images()) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Shared(nn.Module):
    """One convolution, two readers of what it gives: its norm, and a shortcut past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.weight, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        joined: Tensor = (self.norm(features) + features).mean((2, 3))
        return joined


class Twice(nn.Module):
    """One convolution called twice, with a norm for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.b(self.first(self.a(self.first(images)))).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [Shared, Twice])
def test_what_would_change_the_network_is_left_alone(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert surgery.fold_batch_norms(model, images()) == 0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Cutting tensors


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 6),
            "conv": nn.Conv2d(4, 6, 3),
            "grouped": nn.Conv2d(4, 6, 1, groups=2),
            "batch": nn.BatchNorm2d(6),
            "unfollowed": nn.BatchNorm1d(6, track_running_stats=False),
            "layer": nn.LayerNorm(6),
            "group": nn.GroupNorm(1, 6),
        }
    )


def test_keep_leaves_the_named_places_of_each_dimension_in_order() -> None:
    model = layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgery.keep(model, {"linear.weight": {0: [1, 4, 5], 1: [0, 3]}, "linear.bias": {0: [1, 4, 5]}})
    expected = before | {
        "linear.weight": before["linear.weight"][[1, 4, 5]][:, [0, 3]],
        "linear.bias": before["linear.bias"][[1, 4, 5]],
    }
    after = model.state_dict()
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], value) for name, value in expected.items())


def test_modules_say_the_sizes_of_what_is_kept() -> None:
    model, three = layers(), [0, 2, 5]
    stays = {
        name: {0: three} for name, value in model.state_dict().items() if value.ndim and not name.startswith("grouped")
    }
    stays["linear.weight"] = stays["conv.weight"] = {0: three, 1: [1]}
    # The second of two groups: outputs 3 to 5.
    stays["grouped.weight"] = stays["grouped.bias"] = {0: [3, 4, 5]}
    grouped: Any = model["grouped"]
    grouped.groups = 1
    surgery.keep(model, stays)
    said = {
        name: tuple(getattr(model[name], size) for size in sizes)
        for name, sizes in {
            "linear": ("out_features", "in_features"),
            "conv": ("out_channels", "in_channels"),
            "grouped": ("out_channels", "in_channels"),
            "batch": ("num_features",),
            "unfollowed": ("num_features",),
            "layer": ("normalized_shape",),
            "group": ("num_channels",),
        }.items()
    }
    # A group of the convolution reads two of its four inputs.
    assert said == {
        "linear": (3, 1),
        "conv": (3, 1),
        "grouped": (3, 2),
        "batch": (3,),
        "unfollowed": (3,),
        "layer": ((3,),),
        "group": (3,),
    }
    maps = torch.randn(2, 3, 5, 5)
    for name in ("batch", "group"):
        assert model[name](maps).shape == maps.shape
    assert model["grouped"](torch.randn(2, 2, 5, 5)).shape == maps.shape


def test_parameters_stay_parameters_and_buffers_buffers() -> None:
    model = layers()
    model["batch"].get_parameter("weight").requires_grad_(False)
    surgery.keep(model, {f"batch.{name}": {0: [3]} for name in ("weight", "bias", "running_mean", "running_var")})
    flags = {name: value.requires_grad for name, value in model["batch"].named_parameters()}
    assert flags == {"weight": False, "bias": True}
    assert {name for name, _ in model["batch"].named_buffers()} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert all(value.is_leaf for value in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no other device")
def test_networks_are_on_the_cpu_again_after_an_error() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)

    def fails() -> None:
        with surgery.on_device(torch.device("cuda"), one):
            assert (one.weight.device.type, two.weight.device.type) == ("cuda", "cpu")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert one.weight.device.type == "cpu"
