"""Folding: what a cut channel put out on average is in the biases behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim.passes.prune.cut import pruned
from slim.passes.prune.fold import fold_means
from slim.passes.prune.groups import Group, groups_of

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (3, 8, 8)
GONE = [1, 2, 5, 6]
STAY = [0, 3, 4, 7]
EXACT = 1e-5
"""Of the largest output: fp32 rounds each of a few layers by 1e-7."""


def noise(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, *SMALL, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Eight channels with a norm and an activation, read by what is given."""

    def __init__(self, act: nn.Module, *behind: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act
        self.behind = nn.Sequential(*behind)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.behind(self.act(self.norm(self.stem(x))))
        return out


def net(*behind: nn.Module, act: nn.Module | None = None) -> nn.Module:
    """In eval mode; the norm has no scale for the channels that will go, and a bias for all."""
    model = Net(act or nn.SiLU(), *behind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean, module.running_var = torch.rand(2, module.num_features, generator=generator) + 0.5
        model.norm.weight[GONE] = 0.0
        model.norm.bias.add_(1.0)
    return model.eval()


def stem_of(model: nn.Module) -> Group:
    return next(group for group in groups_of(model, SMALL)[0] if group.name == "stem")


def cut(model: nn.Module) -> nn.Module:
    return pruned(model, [(stem_of(model), STAY)])


def fold(model: nn.Module, gone: dict[str, list[int]], *batches: Tensor, **options: Any) -> tuple[nn.Module, list[str]]:
    """A folded copy, and the layers with neither bias nor norm."""
    folded = copy.deepcopy(model)
    left = fold_means(folded, gone, batches or [noise()], noise(9, 2), **options)
    return folded, left


def off(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def behind(case: str) -> Sequence[nn.Module]:
    readers: dict[str, Callable[[], Sequence[nn.Module]]] = {
        "a convolution with a bias": lambda: [nn.Conv2d(8, 6, 3)],
        "a convolution with a norm": lambda: [nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()],
        "a convolution with both": lambda: [nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)],
        "strides and gaps": lambda: [nn.Conv2d(8, 6, 2, stride=2, dilation=2)],
    }
    return readers[case]()


CASES = ("a convolution with a bias", "a convolution with a norm", "a convolution with both", "strides and gaps")


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Sigmoid])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("constants_only", [True, False])
def test_channels_without_a_scale_are_cut_exactly(case: str, act: type[nn.Module], constants_only: bool) -> None:
    model = net(*behind(case), act=act())
    folded, left = fold(model, {"behind.0": GONE}, constants_only=constants_only)
    images = noise(5)
    assert not left
    assert off(cut(folded)(images), model(images)) <= EXACT
    assert off(cut(model)(images), model(images)) > 0.01, "the test would show nothing"


class Tokens(nn.Module):
    """Maps (B, C, H, W) as tokens (B, N, C), or their mean (B, C)."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return tokens.mean(1) if self.mean else tokens


@pytest.mark.parametrize("mean", [True, False], ids=["of images", "of tokens"])
def test_linear_layers_with_a_bias_take_the_constants_too(mean: bool) -> None:
    model = net(Tokens(mean), nn.Linear(8, 5))
    folded, left = fold(model, {"behind.1": GONE})
    assert not left
    assert off(cut(folded)(noise(5)), model(noise(5))) <= EXACT


def test_behind_padding_the_interior_is_exact_and_the_border_is_not() -> None:
    model = net(nn.Conv2d(8, 6, 3, padding=1))
    folded, _ = fold(model, {"behind.0": GONE})
    found, expected = cut(folded)(noise(5)), model(noise(5))
    assert off(found[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1]) <= EXACT
    assert off(found, expected) > 0.01


def test_channels_that_vary_give_their_mean_over_all_batches() -> None:
    model = net(nn.Conv2d(8, 6, 1))
    batches = noise(1), noise(2, 3)
    with torch.no_grad():
        hidden = model.get_submodule("act")(
            model.get_submodule("norm")(model.get_submodule("stem")(torch.cat(batches)))
        )
        weight, bias = model.get_parameter("behind.0.weight"), model.get_parameter("behind.0.bias")
        expected = bias + weight[:, [0, 1], 0, 0] @ hidden.mean((0, 2, 3))[[0, 1]]
    folded, _ = fold(model, {"behind.0": [0, 1]}, *batches)
    assert off(folded.get_parameter("behind.0.bias"), expected) <= EXACT


def test_constants_only_leaves_channels_that_vary_alone() -> None:
    model = net(nn.Conv2d(8, 6, 1))
    # Channel 0 varies, 1 is constant.
    both, _ = fold(model, {"behind.0": [0, 1]}, constants_only=True)
    one, _ = fold(model, {"behind.0": [1]})
    none, _ = fold(model, {"behind.0": [0]}, constants_only=True)
    assert torch.equal(both.get_parameter("behind.0.bias"), one.get_parameter("behind.0.bias"))
    assert torch.equal(none.get_parameter("behind.0.bias"), model.get_parameter("behind.0.bias"))


def test_layers_with_neither_bias_nor_norm_are_named_and_stay_as_they_were() -> None:
    model = net(nn.Conv2d(8, 6, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(6))
    folded, left = fold(model, {"behind.0": GONE})
    assert left == ["behind.0"]
    assert all(torch.equal(value, folded.state_dict()[key]) for key, value in model.state_dict().items())


def test_nothing_but_biases_and_means_behind_is_changed_and_flags_stay() -> None:
    model = net(*behind("a convolution with a norm")).train()
    model.get_submodule("norm").eval()
    folded, _ = fold(model, {"behind.0": GONE})
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, folded.state_dict()[key])}
    assert changed == {"behind.1.running_mean"}
    assert [one.training for one in folded.modules()] == [one.training for one in model.modules()]
    assert not any(one._forward_pre_hooks for one in folded.modules())


def test_a_layer_that_is_not_called_stays_as_it_was() -> None:
    model = net(nn.Conv2d(8, 6, 1))
    model.register_module("other", nn.Linear(8, 5))
    folded, left = fold(model, {"other": GONE})
    assert not left
    assert torch.equal(folded.get_parameter("other.bias"), model.get_parameter("other.bias"))
